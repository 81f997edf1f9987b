//! A QMP client on a raw socket. It keeps everything that it receives, in order, and never waits
//! for ever.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{KIB, poll};

/// The first step of a job, in bytes. The rate limit does not delay it: a job at 1 byte per second
/// sleeps after it.
pub const FIRST_STEP: u64 = 512 * KIB;

const PATIENCE: Duration = Duration::from_secs(90);

/// An error reply.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct QmpError {
    pub class: String,
    pub desc: String,
}

/// One session.
#[derive(Debug)]
pub struct QmpClient {
    stream: UnixStream,
    received: Vec<u8>,
    next_id: u64,
    cursor: usize,
    /// The first line of the session.
    pub greeting: Value,
    /// Every event so far.
    pub events: Vec<Value>,
    /// Every message so far: greeting, replies, events.
    pub trace: Vec<Value>,
    /// The last line, as it was sent.
    pub line: String,
}

impl QmpClient {
    /// Connects and negotiates.
    pub fn connect(socket: &Path) -> QmpClient {
        let mut client = QmpClient::greeted(socket);
        client.ok("qmp_capabilities", json!({}));
        client
    }

    /// Connects and reads the greeting, without negotiation.
    pub fn greeted(socket: &Path) -> QmpClient {
        let stream = UnixStream::connect(socket)
            .unwrap_or_else(|error| panic!("connect to {}: {error}", socket.display()));
        stream.set_read_timeout(Some(Duration::from_millis(100))).expect("read timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("write timeout");
        let mut client = QmpClient {
            stream,
            received: Vec::new(),
            next_id: 1,
            cursor: 0,
            greeting: Value::Null,
            events: Vec::new(),
            trace: Vec::new(),
            line: String::new(),
        };
        client.greeting = client.message(PATIENCE).expect("greeting");
        assert!(
            client.greeting["QMP"]["version"]["qemu"]["major"].is_u64(),
            "greeting: {}",
            client.greeting
        );
        assert!(client.greeting["QMP"]["capabilities"].is_array(), "greeting: {}", client.greeting);
        client
    }

    /// Sends text unchanged.
    pub fn send_raw(&mut self, text: &str) {
        self.send_bytes(text.as_bytes());
    }

    /// Sends bytes unchanged.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("send");
    }

    /// Duplicates the connection, for a thread that sends while another one reads.
    pub fn another_hand(&self) -> UnixStream {
        self.stream.try_clone().expect("clone of the socket")
    }

    /// Returns the next message of any kind; `None` at the end of the session.
    pub fn message(&mut self, limit: Duration) -> Option<Value> {
        match self.next_message(limit) {
            Next::Message(message) => Some(message),
            Next::End => None,
            Next::Nothing => panic!("no message within {limit:?}; so far: {:#?}", self.trace),
        }
    }

    fn next_message(&mut self, limit: Duration) -> Next {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Next::Message(self.note(&line));
            }
            let mut chunk = [0; 16384];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Next::End,
                Ok(n) => self.received.extend(&chunk[..n]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) =>
                {
                    if Instant::now() > deadline {
                        return Next::Nothing;
                    }
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Next::End,
                Err(error) => panic!("read from the socket: {error}"),
            }
        }
    }

    /// Framing is part of the protocol: one JSON object per line, ASCII, CR LF.
    fn note(&mut self, line: &[u8]) -> Value {
        assert!(line.is_ascii(), "not ASCII: {}", String::from_utf8_lossy(line));
        assert!(line.ends_with(b"\r\n"), "a line must end with CR LF: {line:?}");
        let message: Value = serde_json::from_slice(line)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(line)));
        assert!(message.is_object(), "not an object: {message}");
        self.line = String::from_utf8_lossy(line).into_owned();
        if message.get("event").is_some() {
            assert!(
                message["timestamp"]["seconds"].is_i64()
                    && message["timestamp"]["microseconds"].is_i64(),
                "timestamp of {message}"
            );
            self.events.push(message.clone());
        }
        self.trace.push(message.clone());
        message
    }

    /// Runs a command and returns its reply; keeps the events that come before it.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({"execute": command, "id": id});
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        self.send_raw(&format!("{request}\n"));
        loop {
            let message = self
                .message(PATIENCE)
                .unwrap_or_else(|| panic!("the session ended before the reply to {request}"));
            if message.get("event").is_some() {
                continue;
            }
            assert_eq!(message["id"], json!(id), "reply to {request}: {message}");
            if let Some(error) = message.get("error") {
                let text = |name: &str| {
                    error[name].as_str().unwrap_or_else(|| panic!("{name} in {message}")).to_owned()
                };
                return Err(QmpError { class: text("class"), desc: text("desc") });
            }
            return Ok(message
                .get("return")
                .unwrap_or_else(|| panic!("neither return nor error: {message}"))
                .clone());
        }
    }

    /// Runs a command that must succeed.
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        self.execute(command, arguments.clone())
            .unwrap_or_else(|error| panic!("{command} {arguments}: {error:?}"))
    }

    /// Runs a command that must fail.
    pub fn err(&mut self, command: &str, arguments: Value) -> QmpError {
        match self.execute(command, arguments.clone()) {
            Err(error) => error,
            Ok(value) => panic!("{command} {arguments} had to fail, but returned {value}"),
        }
    }

    /// Returns the next event for which `fits` returns true, after the last event that was
    /// returned.
    pub fn wait(&mut self, what: &str, mut fits: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while self.cursor < self.events.len() {
                self.cursor += 1;
                if fits(&self.events[self.cursor - 1]) {
                    return self.events[self.cursor - 1].clone();
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next_message(left) {
                Next::Message(_) => {}
                Next::End => {
                    panic!("the session ended while waiting for {what}; events: {:#?}", self.events)
                }
                Next::Nothing => {
                    panic!("no {what} within {PATIENCE:?}; events: {:#?}", self.events)
                }
            }
        }
    }

    pub fn wait_event(&mut self, name: &str) -> Value {
        self.wait(name, |event| event["event"] == name)
    }

    /// Waits for a `JOB_STATUS_CHANGE` to this status.
    pub fn wait_status(&mut self, status: &str) -> Value {
        self.wait(status, |event| {
            event["event"] == "JOB_STATUS_CHANGE" && event["data"]["status"] == status
        })
    }

    /// Waits for `BLOCK_JOB_COMPLETED` without an error and returns its data.
    pub fn wait_completed(&mut self) -> Value {
        let event = self.wait_event("BLOCK_JOB_COMPLETED");
        assert_eq!(event["data"].get("error"), None, "the job failed: {event}");
        event["data"].clone()
    }

    /// Receives the messages that arrive within `time`.
    pub fn listen(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while let Next::Message(_) =
            self.next_message(deadline.saturating_duration_since(Instant::now()))
        {}
    }

    /// Removes the speed limit of the job, unless it is finishing already, and waits for its
    /// completion.
    pub fn finish_job(&mut self, device: &str) -> Value {
        if let Err(error) =
            self.execute("block-job-set-speed", json!({"device": device, "speed": 0}))
        {
            let finishing = error.class == "DeviceNotActive"
                || error.desc.contains("cannot accept command verb 'set-speed'");
            assert!(finishing, "block-job-set-speed: {error:?}");
        }
        self.wait_completed()
    }

    /// Returns the only running block job.
    pub fn job(&mut self) -> Value {
        let jobs = self.ok("query-block-jobs", json!({}));
        let jobs = jobs.as_array().expect("a list");
        assert_eq!(jobs.len(), 1, "exactly one job: {jobs:?}");
        jobs[0].clone()
    }

    /// Waits until the only job, at a very low speed, sleeps after its [`FIRST_STEP`]. Returns its
    /// offset; data that was local already does not count as part of the step.
    pub fn wait_for_first_step(&mut self) -> u64 {
        let asleep =
            |job: &Value| job["busy"] == json!(false) && job["offset"].as_u64() >= Some(FIRST_STEP);
        let job = poll(Duration::from_secs(20), || Some(self.job()).filter(asleep));
        job.unwrap_or_else(|| panic!("the first step of 512 KiB is free of charge: {}", self.job()))
            ["offset"]
            .as_u64()
            .expect("a number")
    }

    /// Returns the names of events in order; a `JOB_STATUS_CHANGE` is given as its status.
    pub fn event_names(&self) -> Vec<String> {
        let name = |event: &Value| match event["event"].as_str().expect("event name") {
            "JOB_STATUS_CHANGE" => event["data"]["status"].as_str().expect("status").to_owned(),
            other => other.to_owned(),
        };
        self.events.iter().map(name).collect()
    }

    /// Shuts the socket down, so that the server sees the end of the session.
    pub fn hang_up(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

enum Next {
    Message(Value),
    End,
    Nothing,
}

/// Returns the timestamp of an event in seconds.
pub fn seconds(event: &Value) -> f64 {
    let stamp = &event["timestamp"];
    stamp["seconds"].as_f64().expect("seconds")
        + stamp["microseconds"].as_f64().expect("microseconds") / 1e6
}
