//! The threads: one that accepts, one that passes events on, two for each client.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender};
use nix::sys::socket::{getsockopt, sockopt};
use parking_lot::Mutex;
use rustix::process::geteuid;
use serde_json::{Value, json};

use super::call::{Backend, Session, Target};
use super::client::Client;
use super::codec::{self, Decoder, Refusal};
use super::dispatch::Answer;
use super::fanout::{Fanout, Listens, ShutdownReason};
use super::queries::greeting;
use super::socket::Socket;
use crate::Result;
use crate::error::Context;
use crate::job::Batch;

/// Clients at a time; each costs two threads.
const MAX_CLIENTS: usize = 32;
/// When all places are taken, who has not negotiated for so long gives way.
const IDLE: Duration = Duration::from_secs(30);
/// What is read at once: requests are short.
const READ: usize = 16 << 10;
/// How long clients may take to read their last lines.
const LAST_LINES: Duration = Duration::from_secs(1);
/// How often a thread that is about to end is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// Pause after a failed `accept`, which is for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The control socket and its threads. Dropped without [`Server::shutdown`], it ends all connections at once.
#[derive(Debug)]
pub struct Server {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
    /// Dropped to end the thread that passes events on.
    alive: Option<Sender<()>>,
}

struct Core {
    socket: Socket,
    backend: Backend,
    fanout: Fanout,
    /// No more clients.
    stopping: AtomicBool,
    /// Threads of clients. Rank 6, a leaf.
    clients: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("socket", &self.socket).field("fanout", &self.fanout).finish_non_exhaustive()
    }
}

impl Server {
    /// Serves the socket.
    ///
    /// # Errors
    /// No more threads.
    pub fn start(socket: Socket, target: Target) -> Result<Server> {
        Self::with_backend(socket, target.into())
    }

    pub(super) fn with_backend(socket: Socket, backend: Backend) -> Result<Server> {
        let events = backend.jobs.subscribe();
        let core = Arc::new(Core {
            socket,
            fanout: Fanout::new(events.clone()),
            backend,
            stopping: AtomicBool::new(false),
            clients: Mutex::default(),
        });
        let (alive, ended) = crossbeam_channel::bounded(0);
        let mut server = Server { core: Arc::clone(&core), threads: Vec::new(), alive: Some(alive) };
        let passing = Arc::clone(&core);
        server.threads.push(spawn("qmp-events", move || pass_events(&passing, &events, &ended)).context(|| "QMP thread")?);
        server.threads.push(spawn("qmp-accept", move || accept(&core)).context(|| "QMP thread")?);
        Ok(server)
    }

    /// Where the socket is, absolute.
    pub fn path(&self) -> &Path {
        self.core.socket.path()
    }

    /// How many clients there are.
    #[cfg(test)]
    pub(super) fn clients(&self) -> usize {
        self.core.fanout.len()
    }

    /// Tells all clients that the process is about to end. To be called first of all on the way out; `quit` has done so already.
    pub fn announce_shutdown(&self, reason: ShutdownReason) {
        self.core.fanout.announce_shutdown(reason);
    }

    /// Tells all clients that the disk is no longer mounted; `id` names the mount.
    pub fn announce_export_deleted(&self, id: &str) {
        self.core.fanout.announce("BLOCK_EXPORT_DELETED", json!({ "id": id }));
    }

    /// To be called when the jobs are closed: whether no command changes the disk any more. One that still does is waited for, but no longer than
    /// `patience`: it may wait for a backing file that hangs. None begins afterwards.
    pub fn settle(&self, patience: Duration) -> bool {
        self.core.backend.starting.try_lock_for(patience).is_some()
    }

    /// The end, when the jobs are over and the disk is closed: sends what there is left to tell (to all, that closing has failed), answers those who asked to quit with how it went,
    /// ends all connections and removes the socket.
    pub fn shutdown(self, closed: &Result<()>) {
        let result = match closed {
            Ok(()) => Ok(json!({})),
            Err(error) => Err(Refusal::generic(error.to_string())),
        };
        if let Err(error) = closed {
            self.core.fanout.announce("X_CLOSE_FAILED", json!({ "error": error.to_string() }));
        }
        self.stop(&result, LAST_LINES);
    }

    fn stop(&self, result: &Result<Value, Refusal>, patience: Duration) {
        self.core.stopping.store(true, Ordering::Release);
        self.core.socket.stop_accepting();
        let give_up = Instant::now() + patience;
        for client in self.core.fanout.end(result) {
            client.wait_until_sent(give_up);
            client.disconnect();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(&Err(Refusal::generic("the daemon has failed")), Duration::ZERO);
        self.alive = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // Now that nobody accepts: who came in last.
        self.stop(&Err(Refusal::generic("the daemon has failed")), Duration::ZERO);
        let clients = std::mem::take(&mut *self.core.clients.lock());
        // Not for ever: one may be inside a command that waits for a backing file. The end of the process ends it.
        let give_up = Instant::now() + LAST_LINES;
        for thread in clients {
            while !thread.is_finished() && Instant::now() < give_up {
                thread::sleep(LOOK_AGAIN);
            }
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).stack_size(codec::STACK).spawn(run)
}

/// Waits for events without taking them, so that a reply that is made meanwhile can.
fn pass_events(core: &Core, events: &Receiver<Arc<Batch>>, ended: &Receiver<()>) {
    let mut next = None;
    loop {
        let mut select = Select::new();
        let woken = core.fanout.woken();
        let (_, woke, end) = (select.recv(events), select.recv(woken), select.recv(ended));
        let ready = match next {
            Some(at) => select.ready_deadline(at).ok(),
            None => Some(select.ready()),
        };
        if ready == Some(end) {
            return;
        }
        if ready == Some(woke) {
            let _ = woken.try_recv();
        }
        next = core.fanout.deliver(&core.backend.jobs);
    }
}

fn accept(core: &Arc<Core>) {
    for number in 1.. {
        let accepted = core.socket.listener().accept();
        if core.stopping.load(Ordering::Acquire) {
            return;
        }
        match accepted.and_then(|(stream, _)| serve(core, number, stream)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => log::warn!("QMP client {number}: {error}"),
            Err(error) => {
                log::warn!("QMP client {number}: {error}");
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// Takes a client in.
fn serve(core: &Arc<Core>, number: u64, stream: UnixStream) -> io::Result<()> {
    // Not rustix: its process ids are never 0, which is what the kernel says of a process outside of our PID namespace.
    let peer = getsockopt(&stream, sockopt::PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {} is refused", peer.uid())));
    }
    log::debug!("QMP client {number}: process {} of user {}", peer.pid(), peer.uid());
    let client = Arc::new(Client::new(number, stream)?);
    let gives_way = |other: &Client| other.connected.elapsed() > IDLE;
    if let Err(client) = core.fanout.join(Arc::clone(&client), codec::line(&greeting()), MAX_CLIENTS, gives_way) {
        let _ = client.stream().shutdown(Shutdown::Both);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "too many clients"));
    }
    let (writer, reader) = (Arc::clone(&client), (Arc::clone(core), Arc::clone(&client)));
    let threads = [
        spawn("qmp-write", move || writer.write_lines()),
        spawn("qmp-read", move || {
            let (core, client) = reader;
            read(&core, &client);
        }),
    ];
    let mut running = core.clients.lock();
    running.retain(|thread| !thread.is_finished());
    let mut failed = Ok(());
    for thread in threads {
        match thread {
            Ok(thread) => running.push(thread),
            Err(error) => {
                core.fanout.leave(&client);
                client.end();
                failed = Err(error);
            }
        }
    }
    failed
}

/// The reader: answers requests until the client leaves or asks to quit.
fn read(core: &Core, client: &Arc<Client>) {
    let mut session = Session::new();
    let mut decoder = Decoder::default();
    let mut buffer = [0; READ];
    loop {
        let mut input: &[u8] = match client.stream().read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => &buffer[..read],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::debug!("QMP client {}: {error}", client.number);
                break;
            }
        };
        while let Some(found) = decoder.next(&mut input) {
            if !client.wait_for_room() {
                break;
            }
            match session.answer(&core.backend, found) {
                Answer::Now(line) => {
                    let listens = if session.negotiated { Listens::Yes } else { Listens::No };
                    core.fanout.reply(client, line, listens);
                    session.hold = None;
                    if let Some(wish) = session.progress.take() {
                        core.fanout.tell_progress(client, wish);
                    }
                }
                Answer::AtTheEnd { id } => {
                    core.fanout.reply_at_the_end(client, id);
                    core.fanout.announce_shutdown(ShutdownReason::HostQmpQuit);
                    // The channel may be full of others' wishes, or the process on its way out.
                    let _ = core.backend.quit.try_send(());
                    return;
                }
            }
        }
    }
    // It may have closed its writing end only: what it asked for is still sent. Until then it keeps its place, and `stop` knows of it.
    core.fanout.deafen(client);
    client.close();
    client.wait_until_ended();
    core.fanout.leave(client);
}
