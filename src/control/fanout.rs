//! Delivery of replies and events to clients, in order.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::call::ProgressEvents;
use super::client::{Client, OutboxLine};
use super::codec::{self, QmpError};
use super::facts::JobProgress;
use super::{events, json, progress};
use engine::job::{Batch, Jobs, Status};

/// Why the process ends, in the words of QEMU's `ShutdownCause`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ShutdownReason {
    /// A client asked to quit.
    HostQmpQuit,
    /// A signal such as SIGTERM or SIGINT.
    HostSignal,
    /// An error.
    HostError,
}

impl ShutdownReason {
    fn word(self) -> &'static str {
        match self {
            ShutdownReason::HostQmpQuit => "host-qmp-quit",
            ShutdownReason::HostSignal => "host-signal",
            ShutdownReason::HostError => "host-error",
        }
    }
}

/// All connections, and the source of their events.
#[derive(Debug)]
pub(super) struct Fanout {
    /// Taken before the lock of the job registry and before the outbox of a client.
    inner: Mutex<Inner>,
    woken: Receiver<()>,
}

#[derive(Debug)]
struct Inner {
    events: Receiver<Arc<Batch>>,
    /// Wakes the thread that delivers events, which then computes its deadline anew. Holds one
    /// message.
    wake: Sender<()>,
    members: Vec<FanoutMember>,
    /// Requests whose replies come last: the client, and the id of the request.
    at_the_end: Vec<(Arc<Client>, Option<Value>)>,
    shutdown_announced: bool,
}

#[derive(Debug)]
struct FanoutMember {
    client: Arc<Client>,
    /// Whether the client gets events.
    negotiated: bool,
    progress: Option<Cadence>,
}

/// When a client gets its next progress events.
#[derive(Debug)]
struct Cadence {
    interval: Duration,
    due: Instant,
}

/// Whether a client gets events from now on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Listens {
    No,
    Yes,
}

impl Fanout {
    pub fn new(events: Receiver<Arc<Batch>>) -> Self {
        let (wake, woken) = crossbeam_channel::bounded(1);
        let inner = Inner {
            events,
            wake,
            members: Vec::new(),
            at_the_end: Vec::new(),
            shutdown_announced: false,
        };
        Fanout { inner: Mutex::new(inner), woken }
    }

    /// Sends all events that have happened, and progress events to the clients for which they are
    /// due. The thread that waits for events calls this. Returns when the next progress events are
    /// due, even if nothing happens.
    pub fn deliver(&self, jobs: &Jobs) -> Option<Instant> {
        let mut inner = self.inner.lock();
        inner.deliver();
        inner.deliver_progress(jobs)
    }

    /// Returns the channel that gets a message when [`Fanout::deliver`] has to be called although
    /// no event has happened.
    pub fn woken(&self) -> &Receiver<()> {
        &self.woken
    }

    /// Turns progress events for a client on or off.
    pub fn tell_progress(&self, client: &Arc<Client>, wish: ProgressEvents) {
        let mut inner = self.inner.lock();
        if let Some(member) =
            inner.members.iter_mut().find(|member| Arc::ptr_eq(&member.client, client))
        {
            member.progress = match wish {
                ProgressEvents::Off => None,
                ProgressEvents::Every(interval) => Some(Cadence { interval, due: Instant::now() }),
            };
        }
        inner.wake();
    }

    /// Sends a reply, after all events that have happened before.
    pub fn reply(&self, client: &Arc<Client>, line: String, listens: Listens) {
        let mut inner = self.inner.lock();
        inner.deliver();
        client.send(OutboxLine::Reply, line.into());
        if let Some(member) =
            inner.members.iter_mut().find(|member| Arc::ptr_eq(&member.client, client))
        {
            member.negotiated = listens == Listens::Yes;
        }
    }

    /// Keeps a request whose reply comes last.
    pub fn reply_at_the_end(&self, client: &Arc<Client>, id: Option<Value>) {
        self.inner.lock().at_the_end.push((Arc::clone(client), id));
    }

    /// Sends all events, then the replies that come last, and closes all connections for further
    /// lines. Returns the clients.
    pub fn end(&self, result: &Result<Value, QmpError>) -> Vec<Arc<Client>> {
        let mut inner = self.inner.lock();
        inner.deliver();
        for (client, id) in std::mem::take(&mut inner.at_the_end) {
            client.send(OutboxLine::Reply, codec::reply(result.clone(), id).into());
        }
        let clients: Vec<_> = inner.members.drain(..).map(|member| member.client).collect();
        clients.iter().for_each(|client| client.close());
        clients
    }

    /// Sends `SHUTDOWN` to all clients; only the first call has an effect.
    pub fn announce_shutdown(&self, reason: ShutdownReason) {
        let mut inner = self.inner.lock();
        if !std::mem::replace(&mut inner.shutdown_announced, true) {
            inner.deliver();
            inner.broadcast(
                "SHUTDOWN",
                json!({ "guest": false, "reason": reason.word() }),
                SystemTime::now(),
            );
        }
    }

    /// Sends an event that does not belong to a job.
    pub fn announce(&self, name: &str, data: Value) {
        let mut inner = self.inner.lock();
        inner.deliver();
        inner.broadcast(name, data, SystemTime::now());
    }

    /// Adds a client and sends its greeting. If there are already `limit` clients, one that has not
    /// negotiated and `gives_way` is disconnected.
    ///
    /// # Errors
    /// The client itself, if there is no place for it.
    pub fn join(
        &self,
        client: Arc<Client>,
        greeting: String,
        limit: usize,
        gives_way: impl Fn(&Client) -> bool,
    ) -> Result<(), Arc<Client>> {
        let mut inner = self.inner.lock();
        if inner.members.len() >= limit {
            let Some(index) = inner
                .members
                .iter()
                .position(|member| !member.negotiated && gives_way(&member.client))
            else {
                return Err(client);
            };
            inner.members.remove(index).client.disconnect();
        }
        client.send(OutboxLine::Reply, greeting.into());
        inner.members.push(FanoutMember { client, negotiated: false, progress: None });
        Ok(())
    }

    /// Returns the number of clients.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.inner.lock().members.len()
    }

    /// Sends no more events to a client. The client keeps its place.
    pub fn deafen(&self, client: &Arc<Client>) {
        let mut inner = self.inner.lock();
        for member in inner.members.iter_mut().filter(|member| Arc::ptr_eq(&member.client, client))
        {
            member.negotiated = false;
            // No deadline is computed for this client any more.
            member.progress = None;
        }
    }

    /// Removes a client.
    pub fn leave(&self, client: &Arc<Client>) {
        self.inner.lock().members.retain(|member| !Arc::ptr_eq(&member.client, client));
    }
}

impl Inner {
    fn deliver(&mut self) {
        let mut delivered = false;
        while let Ok(batch) = self.events.try_recv() {
            for event in &batch.events {
                let (name, data) = events::event(event);
                self.broadcast(name, data, batch.at);
            }
            delivered = true;
        }
        // A reply has delivered these events, so the thread that waits for events may not have seen
        // them. A new job among them may be one whose progress is due.
        if delivered && self.members.iter().any(|member| member.progress.is_some()) {
            self.wake();
        }
    }

    fn wake(&self) {
        // If the channel is full, the thread is already being woken.
        let _ = self.wake.try_send(());
    }

    /// Queries the jobs after all their events were sent, so that no progress of a job follows its
    /// end.
    fn deliver_progress(&mut self, jobs: &Jobs) -> Option<Instant> {
        if self.members.iter().all(|member| member.progress.is_none()) {
            return None;
        }
        let jobs: Vec<_> =
            jobs.query().into_iter().filter(|info| info.status != Status::Concluded).collect();
        if jobs.is_empty() {
            return None;
        }
        let (now, at) = (Instant::now(), SystemTime::now());
        let lines: Vec<Arc<str>> = jobs
            .iter()
            .map(|info| {
                codec::event(progress::EVENT, json::value(&JobProgress::from(info)), at).into()
            })
            .collect();
        let mut next = None;
        for FanoutMember { client, progress, .. } in &mut self.members {
            let Some(cadence) = progress else { continue };
            if cadence.due <= now {
                lines.iter().for_each(|line| client.send(OutboxLine::Event, Arc::clone(line)));
                cadence.due = now + cadence.interval;
            }
            next = Some(next.map_or(cadence.due, |next: Instant| next.min(cadence.due)));
        }
        next
    }

    fn broadcast(&self, name: &str, data: Value, at: SystemTime) {
        let line: Arc<str> = codec::event(name, data, at).into();
        for member in self.members.iter().filter(|member| member.negotiated) {
            member.client.send(OutboxLine::Event, Arc::clone(&line));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use engine::job::{JobSpec, OnError};

    /// Protects: a reply may deliver the event of a new job. Then the thread that waits for events
    /// must be woken, or it would never send progress.
    #[test]
    fn events_that_a_reply_has_taken_along_wake_who_tells_progress() {
        let jobs = Jobs::new();
        let fanout = Fanout::new(jobs.subscribe());
        let (end, _other_end) = UnixStream::pair().unwrap();
        let client = Arc::new(Client::new(1, end).unwrap());
        fanout.join(Arc::clone(&client), "greeting".into(), 1, |_| false).unwrap();
        fanout.tell_progress(&client, ProgressEvents::Every(Duration::from_millis(100)));
        fanout.woken().try_recv().unwrap();
        let spec = JobSpec {
            id: "j".into(),
            kind: "stream",
            len: 1,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            on_error: OnError::Report,
            request: String::new(),
        };
        let control = jobs.create(spec).unwrap();
        control.start();
        fanout.reply(&client, "reply".into(), Listens::Yes);
        fanout.woken().try_recv().expect("somebody has to look at the clock now");
        assert!(fanout.deliver(&jobs).is_some(), "and knows when to look again");
    }
}
