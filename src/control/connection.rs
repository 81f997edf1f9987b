//! Client side of a QMP session.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use host::error::Context;
use host::{Error, ErrorKind, Result};

/// How long to wait for an answer of a daemon. A healthy daemon answers at once, however slow its
/// disks are.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Longest line that is accepted, in bytes: several times the largest reply.
const LONGEST: usize = 16 << 20;
/// Most events that are kept while waiting for an answer: far more than happen in that time.
const MOST_EVENTS: usize = 10_000;
/// Bytes per read of the socket.
const PIECE: usize = 64 << 10;
/// Delay before the next attempt to connect to a socket whose backlog is full.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// A session that runs commands and receives events.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// User id of the process that listens.
    listener: Option<u32>,
    /// Name of the disk, as the user has given it, for messages.
    name: String,
    /// Received bytes that are not a whole line yet. The first `looked_at` bytes contain no line
    /// end.
    received: Vec<u8>,
    looked_at: usize,
    events: VecDeque<Value>,
    requests: u64,
    ended: bool,
}

/// An error reply of the daemon.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Error class of QMP: `CommandNotFound`, `DeviceNotActive` and so on.
    pub class: String,
    /// Description of the error: one sentence.
    pub description: String,
}

impl Refusal {
    /// Whether the daemon does not know the command, because it is older than this program.
    pub fn is_unknown_command(&self) -> bool {
        self.class == "CommandNotFound"
    }
}

/// Result of waiting for an event.
#[derive(Debug)]
pub enum Heard {
    /// An event, as a whole JSON object.
    Event(Value),
    /// No event came in the given time, or a signal has interrupted the wait.
    Nothing,
    /// The daemon has closed the session.
    End,
}

/// Result of waiting for a line.
enum ReceivedLine {
    Message(Value),
    Nothing,
    End,
}

impl Connection {
    /// Connects to the socket at `path` and negotiates capabilities; messages call the disk `name`.
    /// Waits at most `patience` for each answer.
    ///
    /// # Errors
    /// No process listens there; this user may not connect; the listening process does not speak
    /// QMP, or does not answer.
    pub fn open(path: &Path, name: &str, patience: Duration) -> Result<Connection> {
        Connection::open_of(path, name, patience, None)
    }

    /// Connects as [`Connection::open`] does. If `owner` is given, the listening process must
    /// belong to that user: the registry entry of a disk can name the socket of any other user.
    ///
    /// # Errors
    /// Those of [`Connection::open`]; another user listens.
    pub fn open_of(
        path: &Path,
        name: &str,
        patience: Duration,
        owner: Option<u32>,
    ) -> Result<Connection> {
        let stream = connect(path, patience).map_err(|error| explain(&error, path, name))?;
        let listener =
            rustix::net::sockopt::socket_peercred(&stream).ok().map(|who| who.uid.as_raw());
        if let Some(owner) = owner
            && listener != Some(owner)
        {
            let text = format!(
                "{name}: user {owner} says that its control socket is {}, where another user listens",
                path.display()
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        stream.set_write_timeout(Some(patience)).context(|| "socket")?;
        let mut connection = Connection {
            stream,
            listener,
            name: name.to_owned(),
            received: Vec::new(),
            looked_at: 0,
            events: VecDeque::new(),
            requests: 0,
            ended: false,
        };
        match connection.next_line(Instant::now() + patience)? {
            ReceivedLine::Message(greeting) if greeting.get("QMP").is_some() => {}
            ReceivedLine::Message(_) => return Err(connection.nonsense("no greeting")),
            ReceivedLine::Nothing => return Err(connection.silent(patience)),
            ReceivedLine::End => {
                let why = "it is on its way out, or too many clients are connected; try again";
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("{name}: the daemon has hung up: {why}"),
                ));
            }
        }
        connection.execute("qmp_capabilities", json!({}))?;
        Ok(connection)
    }

    /// Returns the user id of the daemon.
    pub fn listener(&self) -> Option<u32> {
        self.listener
    }

    /// Returns the name of the disk for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a command and returns its result.
    ///
    /// # Errors
    /// The daemon refuses the command (with its description); it has closed the session, or does
    /// not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let answer = self.ask(command, arguments)?;
        answer.map_err(|refusal| {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{}: {}", self.name, refusal.description),
            )
        })
    }

    /// Runs a command. Events that arrive before the answer are kept for
    /// [`Connection::next_event`].
    ///
    /// # Errors
    /// The daemon has closed the session, or does not answer.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Result<Value, Refusal>> {
        let id = self.send(command, arguments)?;
        let give_up = Instant::now() + PATIENCE;
        loop {
            match self.next_line(give_up)? {
                ReceivedLine::Message(message) if message.get("event").is_some() => {
                    // The listening process may be any program, and may never stop sending events.
                    if self.events.len() >= MOST_EVENTS || Instant::now() >= give_up {
                        return Err(self.nonsense("events instead of an answer"));
                    }
                    self.events.push_back(message);
                }
                ReceivedLine::Message(message) => match answer_of(message, id) {
                    Some(answer) => return Ok(answer),
                    None => return Err(self.nonsense("an answer to something else")),
                },
                ReceivedLine::Nothing if Instant::now() < give_up => {}
                ReceivedLine::Nothing => return Err(self.silent(PATIENCE)),
                ReceivedLine::End => {
                    let text = format!(
                        "{}: the daemon has ended; `cordisk status` lists those that run",
                        self.name
                    );
                    return Err(Error::new(ErrorKind::Io, text));
                }
            }
        }
    }

    /// Sends a command without waiting for its answer, which may come only at the end of the
    /// daemon. The answer is received with [`Connection::next_event`].
    ///
    /// # Errors
    /// The daemon has closed the session.
    pub fn send(&mut self, command: &str, arguments: Value) -> Result<u64> {
        self.requests += 1;
        let mut request = json!({ "execute": command, "id": self.requests });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        let line = format!("{request}\n");
        self.stream
            .write_all(line.as_bytes())
            .context(|| format!("{}: the daemon does not listen", self.name))?;
        Ok(self.requests)
    }

    /// Returns the next event: one that arrived before an answer, or one that arrives within
    /// `patience`.
    ///
    /// # Errors
    /// A line that is not QMP.
    pub fn next_event(&mut self, patience: Duration) -> Result<Heard> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Heard::Event(event));
        }
        match self.next_line(Instant::now() + patience)? {
            ReceivedLine::Message(message) => Ok(Heard::Event(message)),
            ReceivedLine::Nothing => Ok(Heard::Nothing),
            ReceivedLine::End => Ok(Heard::End),
        }
    }

    /// Reads one line. Returns `Nothing` also after a signal, so that the caller can look which one
    /// it was.
    fn next_line(&mut self, until: Instant) -> Result<ReceivedLine> {
        let mut has_read = false;
        loop {
            if let Some(end) =
                self.received[self.looked_at..].iter().position(|&byte| byte == b'\n')
            {
                let line: Vec<u8> = self.received.drain(..=self.looked_at + end).collect();
                self.looked_at = 0;
                let message: Value =
                    serde_json::from_slice(&line).map_err(|_| self.nonsense("no JSON"))?;
                return if message.is_object() {
                    Ok(ReceivedLine::Message(message))
                } else {
                    Err(self.nonsense("no object"))
                };
            }
            self.looked_at = self.received.len();
            if self.looked_at > LONGEST {
                return Err(self.nonsense("a line without an end"));
            }
            // A line that arrives byte by byte must not extend the wait.
            if std::mem::take(&mut has_read) && Instant::now() >= until {
                return Ok(ReceivedLine::Nothing);
            }
            // A timeout of zero is an error for `set_read_timeout`, and would mean no timeout for
            // the kernel.
            let left =
                until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left)).context(|| "socket")?;
            let mut piece = [0; PIECE];
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(self.end()),
                Ok(read) => {
                    self.received.extend_from_slice(&piece[..read]);
                    has_read = true;
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                            | io::ErrorKind::Interrupted
                    ) =>
                {
                    return Ok(ReceivedLine::Nothing);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(self.end());
                }
                Err(error) => {
                    return Err(Error::io(format!("{}: the control socket", self.name), error));
                }
            }
        }
    }

    fn end(&mut self) -> ReceivedLine {
        self.ended = true;
        ReceivedLine::End
    }

    /// Whether the daemon has closed the session.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    fn silent(&self, patience: Duration) -> Error {
        let text = format!(
            "{}: the daemon does not answer ({} s): it is stopped, or hangs; its log may say why, and `kill -9` ends it",
            self.name,
            patience.as_secs()
        );
        Error::new(ErrorKind::Io, text)
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("{}: what listens there does not speak QMP ({what})", self.name),
        )
    }
}

/// Extracts the result from the answer to the request `id`; `None` if it is not such an answer.
fn answer_of(mut message: Value, id: u64) -> Option<Result<Value, Refusal>> {
    if message.get("id").and_then(Value::as_u64) != Some(id) {
        return None;
    }
    if let Some(result) = message.get_mut("return") {
        return Some(Ok(result.take()));
    }
    let error = message.get("error")?;
    let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or("?").to_owned();
    Some(Err(Refusal { class: text("class"), description: text("desc") }))
}

/// Connects. Waits at most `patience` for a daemon that does not accept at present.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let give_up = Instant::now() + patience;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Err(Errno::AGAIN) if Instant::now() < give_up => thread::sleep(TRY_AGAIN),
            result => {
                result?;
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
        }
    }
}

/// Describes why the connection failed, and what the user can do.
fn explain(error: &io::Error, path: &Path, name: &str) -> Error {
    let socket = path.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let text = format!(
                "{name}: permission denied: the disk belongs to another user; ask as that user, or as root"
            );
            Error::new(ErrorKind::PermissionDenied, text)
        }
        io::ErrorKind::ConnectionRefused => {
            let text = format!(
                "{name}: no process listens at {socket}: the daemon is gone; `cordisk status` lists those that run"
            );
            Error::new(ErrorKind::NotFound, text)
        }
        io::ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            format!("{name}: its control socket, {socket}, is gone"),
        ),
        io::ErrorKind::WouldBlock => Error::new(
            ErrorKind::Io,
            format!(
                "{name}: the daemon does not answer: it is stopped, or hangs; `kill -9` ends it"
            ),
        ),
        _ => Error::io(format!("{name}: {socket}"), io::Error::from(error.kind())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &str = "{\"QMP\": {}}\r\n";

    /// A daemon that sends `greeting`, then answers each line that it reads with the next of
    /// `lines`.
    fn with_daemon<T>(
        greeting: &'static str,
        lines: Vec<String>,
        talk: impl FnOnce(&Path) -> T,
    ) -> T {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let daemon = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(greeting.as_bytes());
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            for line in lines {
                if requests.next().is_none() {
                    return;
                }
                let _ = stream.write_all(line.as_bytes());
            }
        });
        let result = talk(&path);
        daemon.join().unwrap();
        result
    }

    fn open(path: &Path) -> Result<Connection> {
        Connection::open(path, "disk", PATIENCE)
    }

    #[test]
    fn events_wait_for_whoever_wants_them() {
        let lines = vec![
            "{\"return\": {}, \"id\": 1}\r\n".to_owned(),
            "{\"event\": \"A\"}\r\n{\"return\": [7], \"id\": 2}\r\n{\"ev".to_owned(),
            "ent\": \"B\"}\r\n{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no x\"}, \"id\": 3}\r\n".to_owned(),
        ];
        with_daemon(GREETING, lines, |path| {
            let mut connection = open(path).unwrap();
            assert_eq!(connection.ask("x", json!({})).unwrap().unwrap(), json!([7]));
            let refusal = connection.ask("x", json!({})).unwrap().unwrap_err();
            assert!(refusal.is_unknown_command() && refusal.description == "no x");
            for name in ["A", "B"] {
                let Heard::Event(event) = connection.next_event(PATIENCE).unwrap() else {
                    panic!("no {name}")
                };
                assert_eq!(event["event"], name);
            }
            assert!(matches!(connection.next_event(PATIENCE).unwrap(), Heard::End));
        });
    }

    #[test]
    fn what_is_not_qmp_is_an_error() {
        let text =
            |greeting| with_daemon(greeting, vec![], |path| open(path).unwrap_err().to_string());
        assert!(text("SSH-2.0\r\n").contains("does not speak QMP (no JSON)"));
        assert!(text("[]\n").contains("(no object)"));
        assert!(text("{}\n").contains("(no greeting)"));
        assert!(text("").contains("has hung up"), "{}", text(""));
        let other = vec!["{\"return\": {}, \"id\": 9}\r\n".to_owned()];
        let error = with_daemon(GREETING, other, |path| open(path).unwrap_err());
        assert!(error.to_string().contains("an answer to something else"));
    }

    /// Protects: a user cannot make another user, such as root, talk to the socket of a third user.
    #[test]
    fn only_whoever_is_said_to_listen_is_talked_to() {
        let me = rustix::process::geteuid().as_raw();
        let open = |owner| {
            with_daemon(GREETING, vec!["{\"return\": {}, \"id\": 1}\n".to_owned()], move |path| {
                let opened = Connection::open_of(path, "disk", PATIENCE, Some(owner));
                opened.map(|connection| connection.listener())
            })
        };
        assert_eq!(open(me).unwrap(), Some(me));
        let error = open(me + 1).unwrap_err().to_string();
        assert!(error.contains("another user listens"), "{error}");
    }

    /// Protects: a listening process that floods a client with events is left; it can exhaust
    /// neither the memory nor the time of the client.
    #[test]
    fn a_flood_of_events_is_no_answer() {
        let flood = "{\"event\": \"A\"}\n".repeat(MOST_EVENTS + 1);
        let lines = vec!["{\"return\": {}, \"id\": 1}\r\n".to_owned(), flood];
        let error = with_daemon(GREETING, lines, |path| {
            open(path).unwrap().ask("x", json!({})).unwrap_err()
        });
        assert!(error.to_string().contains("events instead of an answer"), "{error}");
    }

    #[test]
    fn who_says_nothing_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let short = Duration::from_millis(20);
        let error = Connection::open(&path, "disk", short).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        // A backlog of 0, and the connection from above still waits to be accepted.
        rustix::net::listen(&listener, 0).unwrap();
        let error = Connection::open(&path, "disk", short).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        drop(listener);
        let error = Connection::open(&path, "disk", short).unwrap_err();
        assert!(error.to_string().contains("no process listens at"), "{error}");
        let error = Connection::open(&dir.path().join("none"), "disk", short).unwrap_err();
        assert!(error.to_string().contains("is gone"), "{error}");
    }
}
