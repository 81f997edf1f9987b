//! One QMP session, as a client.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// How long a daemon may take to answer anything. It answers at once while it is well, however slow its disks are.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Longest line that is taken: several times the largest reply there is.
const LONGEST: usize = 16 << 20;
/// Most events that are kept while an answer is waited for: far more than happen in that time.
const MOST_EVENTS: usize = 10_000;
/// Pieces in which the socket is read.
const PIECE: usize = 64 << 10;
/// How often a socket is tried again whose daemon has too many waiting.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// A session in which commands are run and events are heard.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The user who listens.
    listener: Option<u32>,
    /// What is talked to, for messages: the disk as the user has named it.
    name: String,
    /// Bytes that have come and are not a whole line yet, of which the first `looked_at` have no end of a line.
    received: Vec<u8>,
    looked_at: usize,
    events: VecDeque<Value>,
    requests: u64,
    ended: bool,
}

/// A command was refused by the daemon.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// QMP's class: `CommandNotFound`, `DeviceInUse` and so on.
    pub class: String,
    /// A sentence.
    pub description: String,
}

impl Refusal {
    /// The daemon is older than this program.
    pub fn is_unknown_command(&self) -> bool {
        self.class == "CommandNotFound"
    }
}

/// What was heard on a session.
#[derive(Debug)]
pub enum Heard {
    /// An event, whole.
    Event(Value),
    /// Nothing in the time that was given, or a signal came.
    Nothing,
    /// The daemon has ended the session.
    End,
}

/// What came next.
enum Line {
    Message(Value),
    Nothing,
    End,
}

impl Connection {
    /// Connects to the socket at `path` and negotiates; `name` is what messages call the disk. Waits for each answer at most `patience`.
    ///
    /// # Errors
    /// Nobody listens there; this user may not connect; whoever listens does not speak QMP, or says nothing.
    pub fn open(path: &Path, name: &str, patience: Duration) -> Result<Connection> {
        Connection::open_of(path, name, patience, None)
    }

    /// As [`Connection::open`], where only a daemon of the user `owner` may listen, if one is given: a socket that this user has named can be anybody's.
    ///
    /// # Errors
    /// As there; somebody else listens.
    pub fn open_of(path: &Path, name: &str, patience: Duration, owner: Option<u32>) -> Result<Connection> {
        let stream = connect(path, patience).map_err(|error| explain(&error, path, name))?;
        let listener = rustix::net::sockopt::socket_peercred(&stream).ok().map(|who| who.uid.as_raw());
        if let Some(owner) = owner
            && listener != Some(owner)
        {
            let text = format!("{name}: user {owner} says that its control socket is {}, where somebody else listens", path.display());
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
            Line::Message(greeting) if greeting.get("QMP").is_some() => {}
            Line::Message(_) => return Err(connection.nonsense("no greeting")),
            Line::Nothing => return Err(connection.silent(patience)),
            Line::End => {
                let why = "it is on its way out, or too many clients are connected; try again";
                return Err(Error::new(ErrorKind::Busy, format!("{name}: the daemon has hung up: {why}")));
            }
        }
        connection.execute("qmp_capabilities", json!({}))?;
        Ok(connection)
    }

    /// The user whose daemon this is.
    pub fn listener(&self) -> Option<u32> {
        self.listener
    }

    /// What messages call the disk.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a command that is expected to succeed, and returns its result.
    ///
    /// # Errors
    /// The daemon refuses, with what it says; it has ended, or does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let answer = self.ask(command, arguments)?;
        answer.map_err(|refusal| Error::new(ErrorKind::InvalidArgument, format!("{}: {}", self.name, refusal.description)))
    }

    /// Runs a command. Events that come before the answer are kept for [`Connection::next_event`].
    ///
    /// # Errors
    /// The daemon has ended, or does not answer.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Result<Value, Refusal>> {
        let id = self.send(command, arguments)?;
        let give_up = Instant::now() + PATIENCE;
        loop {
            match self.next_line(give_up)? {
                Line::Message(message) if message.get("event").is_some() => {
                    // Whoever listens may be anybody, who never stops.
                    if self.events.len() >= MOST_EVENTS || Instant::now() >= give_up {
                        return Err(self.nonsense("events instead of an answer"));
                    }
                    self.events.push_back(message);
                }
                Line::Message(message) => match answer_of(message, id) {
                    Some(answer) => return Ok(answer),
                    None => return Err(self.nonsense("an answer to something else")),
                },
                Line::Nothing if Instant::now() < give_up => {}
                Line::Nothing => return Err(self.silent(PATIENCE)),
                Line::End => {
                    let text = format!("{}: the daemon has ended; `cordisk status` lists those that run", self.name);
                    return Err(Error::new(ErrorKind::Io, text));
                }
            }
        }
    }

    /// Sends a command whose answer comes at the very end, if ever: it is heard with [`Connection::next_event`].
    ///
    /// # Errors
    /// The daemon has ended.
    pub fn send(&mut self, command: &str, arguments: Value) -> Result<u64> {
        self.requests += 1;
        let mut request = json!({ "execute": command, "id": self.requests });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        let line = format!("{request}\n");
        self.stream.write_all(line.as_bytes()).context(|| format!("{}: the daemon does not listen", self.name))?;
        Ok(self.requests)
    }

    /// The next event: one that came before an answer, or one that comes within `patience`.
    ///
    /// # Errors
    /// What comes is not QMP.
    pub fn next_event(&mut self, patience: Duration) -> Result<Heard> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Heard::Event(event));
        }
        match self.next_line(Instant::now() + patience)? {
            Line::Message(message) => Ok(Heard::Event(message)),
            Line::Nothing => Ok(Heard::Nothing),
            Line::End => Ok(Heard::End),
        }
    }

    /// One line. `Nothing` also where a signal has come, so that whoever waits can look what it was.
    fn next_line(&mut self, until: Instant) -> Result<Line> {
        let mut has_read = false;
        loop {
            if let Some(end) = self.received[self.looked_at..].iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=self.looked_at + end).collect();
                self.looked_at = 0;
                let message: Value = serde_json::from_slice(&line).map_err(|_| self.nonsense("no JSON"))?;
                return if message.is_object() { Ok(Line::Message(message)) } else { Err(self.nonsense("no object")) };
            }
            self.looked_at = self.received.len();
            if self.looked_at > LONGEST {
                return Err(self.nonsense("a line without an end"));
            }
            // Bytes that keep coming one by one are no line either.
            if std::mem::take(&mut has_read) && Instant::now() >= until {
                return Ok(Line::Nothing);
            }
            // Zero would mean for ever.
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left)).context(|| "socket")?;
            let mut piece = [0; PIECE];
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(self.end()),
                Ok(read) => {
                    self.received.extend_from_slice(&piece[..read]);
                    has_read = true;
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {
                    return Ok(Line::Nothing);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(self.end()),
                Err(error) => return Err(Error::io(format!("{}: the control socket", self.name), error)),
            }
        }
    }

    fn end(&mut self) -> Line {
        self.ended = true;
        Line::End
    }

    /// Whether the daemon has ended the session.
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
        Error::new(ErrorKind::InvalidArgument, format!("{}: what listens there does not speak QMP ({what})", self.name))
    }
}

/// The result in an answer to the request `id`.
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

/// Connects without waiting for a daemon that has stopped accepting for longer than `patience`.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let give_up = Instant::now() + patience;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
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

/// Why nobody could be connected to, and what to do.
fn explain(error: &io::Error, path: &Path, name: &str) -> Error {
    let socket = path.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let text = format!("{name}: permission denied: the disk belongs to another user; ask as that user, or as root");
            Error::new(ErrorKind::Io, text)
        }
        io::ErrorKind::ConnectionRefused => {
            let text = format!("{name}: nobody listens at {socket}: the daemon is gone; `cordisk status` lists those that run");
            Error::new(ErrorKind::NotFound, text)
        }
        io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("{name}: its control socket, {socket}, is gone")),
        io::ErrorKind::WouldBlock => {
            Error::new(ErrorKind::Io, format!("{name}: the daemon does not answer: it is stopped, or hangs; `kill -9` ends it"))
        }
        _ => Error::io(format!("{name}: {socket}"), io::Error::from(error.kind())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &str = "{\"QMP\": {}}\r\n";

    /// A daemon that greets, and answers each line with what `lines` has for it.
    fn with_daemon<T>(greeting: &'static str, lines: Vec<String>, talk: impl FnOnce(&Path) -> T) -> T {
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
                let Heard::Event(event) = connection.next_event(PATIENCE).unwrap() else { panic!("no {name}") };
                assert_eq!(event["event"], name);
            }
            assert!(matches!(connection.next_event(PATIENCE).unwrap(), Heard::End));
        });
    }

    #[test]
    fn what_is_not_qmp_is_an_error() {
        let text = |greeting| with_daemon(greeting, vec![], |path| open(path).unwrap_err().to_string());
        assert!(text("SSH-2.0\r\n").contains("does not speak QMP (no JSON)"));
        assert!(text("[]\n").contains("(no object)"));
        assert!(text("{}\n").contains("(no greeting)"));
        assert!(text("").contains("has hung up"), "{}", text(""));
        let other = vec!["{\"return\": {}, \"id\": 9}\r\n".to_owned()];
        let error = with_daemon(GREETING, other, |path| open(path).unwrap_err());
        assert!(error.to_string().contains("an answer to something else"));
    }

    /// Protects: a user cannot have somebody else, root for instance, talk to a socket of a third.
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
        assert!(error.contains("somebody else listens"), "{error}");
    }

    /// Protects: who floods whoever asks is left, and takes neither all of the memory nor all of the time.
    #[test]
    fn a_flood_of_events_is_no_answer() {
        let flood = "{\"event\": \"A\"}\n".repeat(MOST_EVENTS + 1);
        let lines = vec!["{\"return\": {}, \"id\": 1}\r\n".to_owned(), flood];
        let error = with_daemon(GREETING, lines, |path| open(path).unwrap().ask("x", json!({})).unwrap_err());
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
        // No more room for those who wait to be accepted: the one above still does.
        rustix::net::listen(&listener, 0).unwrap();
        let error = Connection::open(&path, "disk", short).unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        drop(listener);
        let error = Connection::open(&path, "disk", short).unwrap_err();
        assert!(error.to_string().contains("nobody listens at"), "{error}");
        let error = Connection::open(&dir.path().join("none"), "disk", short).unwrap_err();
        assert!(error.to_string().contains("is gone"), "{error}");
    }
}
