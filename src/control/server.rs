//! Threads of the server: one accepts, one delivers events, and two serve each client.

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

use super::call::{Session, Target};
use super::client::Client;
use super::codec::{self, Decoder, QmpError};
use super::dispatch::CommandAnswer;
use super::fanout::{Fanout, Listens, ShutdownReason};
use super::queries::greeting;
use super::socket::Socket;
use engine::job::Batch;
use host::error::Context;
use host::{Error, Result};

/// The most clients at a time; each costs two threads.
const MAX_CLIENTS: usize = 32;
/// If all places are taken, a client that has not negotiated for this long loses its connection.
const IDLE: Duration = Duration::from_secs(30);
/// Bytes per read of a client's socket; requests are short.
const READ: usize = 16 << 10;
/// How long clients may take to read their last lines.
const LAST_LINES: Duration = Duration::from_secs(1);
/// Interval at which a thread that is about to end is polled.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// Pause after a failed `accept`, whose cause is a lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The control socket and its threads. If it is dropped without [`Server::shutdown`], all
/// connections end at once.
#[derive(Debug)]
pub struct Server {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
    /// Dropped to end the thread that delivers events.
    alive: Option<Sender<()>>,
}

struct Core {
    socket: Socket,
    target: Target,
    fanout: Fanout,
    /// No more clients are accepted.
    stopping: AtomicBool,
    /// Threads of clients. A leaf lock: no other lock is taken while it is held.
    clients: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("socket", &self.socket)
            .field("fanout", &self.fanout)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Starts to serve the socket.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(socket: Socket, target: Target) -> Result<Server> {
        let events = target.jobs.subscribe();
        let core = Arc::new(Core {
            socket,
            fanout: Fanout::new(events.clone()),
            target,
            stopping: AtomicBool::new(false),
            clients: Mutex::default(),
        });
        let (alive, ended) = crossbeam_channel::bounded(0);
        let mut server =
            Server { core: Arc::clone(&core), threads: Vec::new(), alive: Some(alive) };
        let passing = Arc::clone(&core);
        server.threads.push(
            spawn("qmp-events", move || pass_events(&passing, &events, &ended))
                .context(|| "QMP thread")?,
        );
        server.threads.push(spawn("qmp-accept", move || accept(&core)).context(|| "QMP thread")?);
        Ok(server)
    }

    /// Returns the absolute path of the socket.
    pub fn path(&self) -> &Path {
        self.core.socket.path()
    }

    /// Returns the number of clients.
    #[cfg(test)]
    pub(super) fn clients(&self) -> usize {
        self.core.fanout.len()
    }

    /// Sends the event `SHUTDOWN` to all clients. To be called as the first step of the shutdown;
    /// after `quit` it was sent already.
    pub fn announce_shutdown(&self, reason: ShutdownReason) {
        self.core.fanout.announce_shutdown(reason);
    }

    /// Sends the event `BLOCK_EXPORT_DELETED` to all clients when the disk is no longer mounted;
    /// `id` names the mount.
    pub fn announce_export_deleted(&self, id: &str) {
        self.core.fanout.announce("BLOCK_EXPORT_DELETED", json!({ "id": id }));
    }

    /// Waits until no command changes the disk any more, and returns whether that is so. To be
    /// called when the jobs are closed; no such command begins afterwards. Waits at most
    /// `patience`, because a running command may wait for a backing file that hangs.
    pub fn settle(&self, patience: Duration) -> bool {
        self.core.target.streams.reserve_within(patience).is_some()
    }

    /// Ends the server, when the jobs are over and the disk is closed. Sends `X_CLOSE_FAILED` to
    /// all clients if closing has failed, answers each pending `quit` with the result, ends all
    /// connections and removes the socket.
    pub fn shutdown(self, closed: &Result<()>) {
        let result = match closed {
            Ok(()) => Ok(json!({})),
            Err(error) => Err(QmpError::generic(error.to_string())),
        };
        if let Err(error) = closed {
            self.core.fanout.announce("X_CLOSE_FAILED", json!({ "error": error.to_string() }));
        }
        self.stop(&result, LAST_LINES);
    }

    fn stop(&self, result: &Result<Value, QmpError>, patience: Duration) {
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
        self.stop(&Err(QmpError::generic("the daemon has failed")), Duration::ZERO);
        self.alive = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // The accepting thread has ended: this ends the clients that it accepted last.
        self.stop(&Err(QmpError::generic("the daemon has failed")), Duration::ZERO);
        let clients = std::mem::take(&mut *self.core.clients.lock());
        // Waits only for a limited time, because a thread may run a command that waits for a
        // backing file. Such a thread ends with the process.
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

/// Waits for events without receiving them, so that a thread which makes a reply meanwhile can
/// receive and deliver them first.
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
        next = core.fanout.deliver(&core.target.jobs);
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
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                log::warn!("QMP client {number}: {error}")
            }
            Err(error) => {
                log::warn!("{}", Error::io(format!("QMP client {number}"), error).explain_limit());
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// Accepts a client: checks its user, and starts its threads.
fn serve(core: &Arc<Core>, number: u64, stream: UnixStream) -> io::Result<()> {
    // nix, because rustix has no process id 0, which the kernel reports for a process outside of
    // our PID namespace.
    let peer = getsockopt(&stream, sockopt::PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("user {} is refused", peer.uid()),
        ));
    }
    log::debug!("QMP client {number}: process {} of user {}", peer.pid(), peer.uid());
    let client = Arc::new(Client::new(number, stream)?);
    let gives_way = |other: &Client| other.connected.elapsed() > IDLE;
    if let Err(client) =
        core.fanout.join(Arc::clone(&client), codec::line(&greeting()), MAX_CLIENTS, gives_way)
    {
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
    let mut failed = Ok(());
    {
        let mut running = core.clients.lock();
        running.retain(|thread| !thread.is_finished());
        for thread in threads {
            match thread {
                Ok(thread) => running.push(thread),
                Err(error) => failed = Err(error),
            }
        }
    }
    if failed.is_err() {
        core.fanout.leave(&client);
        client.end();
    }
    failed
}

/// The reader thread: answers requests until the client disconnects or asks to quit.
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
            match session.answer(&core.target, found) {
                CommandAnswer::Now(line) => {
                    let listens = if session.negotiated { Listens::Yes } else { Listens::No };
                    core.fanout.reply(client, line, listens);
                    session.hold = None;
                    if let Some(wish) = session.progress.take() {
                        core.fanout.tell_progress(client, wish);
                    }
                }
                CommandAnswer::AtTheEnd { id } => {
                    core.fanout.reply_at_the_end(client, id);
                    core.fanout.announce_shutdown(ShutdownReason::HostQmpQuit);
                    // The channel may be full because of other clients, or closed because the
                    // process already ends.
                    let _ = core.target.quit.try_send(());
                    return;
                }
            }
        }
    }
    // The client may have closed only its writing end, so pending lines are still sent. Until then
    // the client keeps its place, so that `stop` finds it.
    core.fanout.deafen(client);
    client.close();
    client.wait_until_ended();
    core.fanout.leave(client);
}
