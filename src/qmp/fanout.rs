//! Who is sent what, in which order.

use std::sync::Arc;
use std::time::SystemTime;

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::client::{Client, Line};
use super::codec::{self, Refusal};
use super::events;
use crate::job::Batch;

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
}

#[derive(Debug)]
struct Inner {
    events: Receiver<Arc<Batch>>,
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
}

/// Whether a client is told of events from now on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Listens {
    No,
    Yes,
}

impl Fanout {
    pub fn new(events: Receiver<Arc<Batch>>) -> Self {
        Fanout { inner: Mutex::new(Inner { events, members: Vec::new(), at_the_end: Vec::new(), shutdown_announced: false }) }
    }

    /// Sends what has happened. Whoever is woken by an event calls this.
    pub fn deliver(&self) {
        self.inner.lock().deliver();
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
        inner.members.push(Member { client, negotiated: false });
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
        inner.members.iter_mut().filter(|member| Arc::ptr_eq(&member.client, client)).for_each(|member| member.negotiated = false);
    }

    /// Forgets a client.
    pub fn leave(&self, client: &Arc<Client>) {
        self.inner.lock().members.retain(|member| !Arc::ptr_eq(&member.client, client));
    }
}

impl Inner {
    fn deliver(&mut self) {
        while let Ok(batch) = self.events.try_recv() {
            for event in &batch.events {
                let (name, data) = events::event(event);
                self.broadcast(name, data, batch.at);
            }
        }
    }

    fn broadcast(&self, name: &str, data: Value, at: SystemTime) {
        let line: Arc<str> = codec::event(name, data, at).into();
        for member in self.members.iter().filter(|member| member.negotiated) {
            member.client.send(Line::Event, Arc::clone(&line));
        }
    }
}
