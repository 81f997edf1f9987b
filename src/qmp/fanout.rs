//! Who is sent what, in which order.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::call::ProgressEvents;
use super::client::{Client, Line};
use super::codec::{self, Refusal};
use super::{events, progress};
use crate::job::{Batch, Jobs, Status};

/// Why the process ends, in the words of QEMU's `ShutdownCause`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ShutdownReason {
    /// A client asked for it.
    HostQmpQuit,
    /// SIGTERM, SIGINT or the like.
    HostSignal,
    /// Something failed.
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

/// All connections, and the events they are told of.
#[derive(Debug)]
pub(super) struct Fanout {
    /// Rank 6: before the outbox of a client.
    inner: Mutex<Inner>,
    woken: Receiver<()>,
}

#[derive(Debug)]
struct Inner {
    events: Receiver<Arc<Batch>>,
    /// Wakes whoever passes events on, for he may have to look at the clock now; room for one.
    wake: Sender<()>,
    members: Vec<Member>,
    /// Requests whose replies come last: the client, and the request's id.
    at_the_end: Vec<(Arc<Client>, Option<Value>)>,
    shutdown_announced: bool,
}

#[derive(Debug)]
struct Member {
    client: Arc<Client>,
    /// Whether it is told of events.
    negotiated: bool,
    progress: Option<Cadence>,
}

/// When a client is told of progress.
#[derive(Debug)]
struct Cadence {
    interval: Duration,
    due: Instant,
}

/// Whether a client is told of events from now on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Listens {
    No,
    Yes,
}

impl Fanout {
    pub fn new(events: Receiver<Arc<Batch>>) -> Self {
        let (wake, woken) = crossbeam_channel::bounded(1);
        let inner = Inner { events, wake, members: Vec::new(), at_the_end: Vec::new(), shutdown_announced: false };
        Fanout { inner: Mutex::new(inner), woken }
    }

    /// Sends what has happened, and progress to those for whom it is time. Whoever is woken by an event calls this. Returns when it is time again,
    /// even if nothing happens.
    pub fn deliver(&self, jobs: &Jobs) -> Option<Instant> {
        let mut inner = self.inner.lock();
        inner.deliver();
        inner.deliver_progress(jobs)
    }

    /// Where something arrives when [`Fanout::deliver`] is to be called although nothing has happened.
    pub fn woken(&self) -> &Receiver<()> {
        &self.woken
    }

    /// Tells a client of progress from now on, or not.
    pub fn tell_progress(&self, client: &Arc<Client>, wish: ProgressEvents) {
        let mut inner = self.inner.lock();
        if let Some(member) = inner.members.iter_mut().find(|member| Arc::ptr_eq(&member.client, client)) {
            member.progress = match wish {
                ProgressEvents::Off => None,
                ProgressEvents::Every(interval) => Some(Cadence { interval, due: Instant::now() }),
            };
        }
        inner.wake();
    }

    /// Sends a reply, after everything that has happened before.
    pub fn reply(&self, client: &Arc<Client>, line: String, listens: Listens) {
        let mut inner = self.inner.lock();
        inner.deliver();
        client.send(Line::Reply, line.into());
        if let Some(member) = inner.members.iter_mut().find(|member| Arc::ptr_eq(&member.client, client)) {
            member.negotiated = listens == Listens::Yes;
        }
    }

    /// Keeps a request whose reply comes last.
    pub fn reply_at_the_end(&self, client: &Arc<Client>, id: Option<Value>) {
        self.inner.lock().at_the_end.push((Arc::clone(client), id));
    }

    /// Sends the replies that come last, after everything that has happened, and takes no more.
    pub fn end(&self, result: &Result<Value, Refusal>) -> Vec<Arc<Client>> {
        let mut inner = self.inner.lock();
        inner.deliver();
        for (client, id) in std::mem::take(&mut inner.at_the_end) {
            client.send(Line::Reply, codec::reply(result.clone(), id).into());
        }
        let clients: Vec<_> = inner.members.drain(..).map(|member| member.client).collect();
        clients.iter().for_each(|client| client.close());
        clients
    }

    /// Tells that the process is about to end; only the first reason is told.
    pub fn announce_shutdown(&self, reason: ShutdownReason) {
        let mut inner = self.inner.lock();
        if !std::mem::replace(&mut inner.shutdown_announced, true) {
            inner.deliver();
            inner.broadcast("SHUTDOWN", json!({ "guest": false, "reason": reason.word() }), SystemTime::now());
        }
    }

    /// Tells of something that is no job's.
    pub fn announce(&self, name: &str, data: Value) {
        let mut inner = self.inner.lock();
        inner.deliver();
        inner.broadcast(name, data, SystemTime::now());
    }

    /// Adds a client, greeting it, unless there are `limit` already, none of which `gives_way`.
    ///
    /// # Errors
    /// The client.
    pub fn join(
        &self,
        client: Arc<Client>,
        greeting: String,
        limit: usize,
        gives_way: impl Fn(&Client) -> bool,
    ) -> Result<(), Arc<Client>> {
        let mut inner = self.inner.lock();
        if inner.members.len() >= limit {
            let Some(index) = inner.members.iter().position(|member| !member.negotiated && gives_way(&member.client)) else {
                return Err(client);
            };
            inner.members.remove(index).client.disconnect();
        }
        client.send(Line::Reply, greeting.into());
        inner.members.push(Member { client, negotiated: false, progress: None });
        Ok(())
    }

    /// How many clients there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.inner.lock().members.len()
    }

    /// Tells a client of no more events. It still has its place.
    pub fn deafen(&self, client: &Arc<Client>) {
        let mut inner = self.inner.lock();
        for member in inner.members.iter_mut().filter(|member| Arc::ptr_eq(&member.client, client)) {
            member.negotiated = false;
            // Nor is the clock looked at for its sake.
            member.progress = None;
        }
    }

    /// Forgets a client.
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
        // Whoever passes events on has perhaps not seen these: a reply has taken them along, and the job they tell of may be one whose progress
        // is to be told.
        if delivered && self.members.iter().any(|member| member.progress.is_some()) {
            self.wake();
        }
    }

    fn wake(&self) {
        // Full: it is awake already.
        let _ = self.wake.try_send(());
    }

    /// Jobs are looked at with all their events sent: what is told of a job never comes after its end.
    fn deliver_progress(&mut self, jobs: &Jobs) -> Option<Instant> {
        if self.members.iter().all(|member| member.progress.is_none()) {
            return None;
        }
        let jobs: Vec<_> = jobs.query().into_iter().filter(|info| info.status != Status::Concluded).collect();
        if jobs.is_empty() {
            return None;
        }
        let (now, at) = (Instant::now(), SystemTime::now());
        let lines: Vec<Arc<str>> = jobs.iter().map(|info| codec::event(progress::EVENT, progress::progress(info), at).into()).collect();
        let mut next = None;
        for Member { client, progress, .. } in &mut self.members {
            let Some(cadence) = progress else { continue };
            if cadence.due <= now {
                lines.iter().for_each(|line| client.send(Line::Event, Arc::clone(line)));
                cadence.due = now + cadence.interval;
            }
            next = Some(next.map_or(cadence.due, |next: Instant| next.min(cadence.due)));
        }
        next
    }

    fn broadcast(&self, name: &str, data: Value, at: SystemTime) {
        let line: Arc<str> = codec::event(name, data, at).into();
        for member in self.members.iter().filter(|member| member.negotiated) {
            member.client.send(Line::Event, Arc::clone(&line));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::job::{JobSpec, OnError};

    /// A reply takes events along that whoever passes events on is then never woken for: he must hear of them, or progress is told to nobody.
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
