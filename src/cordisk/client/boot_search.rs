//! The search for what a disk needs to boot, in a process that may only compute.
//!
//! ```text
//!  this process: the chain is open                 its child: `cordisk order search`
//!    size, paths, limits ────────────────────────▶ enters the sandbox
//!    reads the range from the chain ◀───────────── offset, length         again and again
//!    its bytes, or why there are none ───────────▶
//!    ranges and notes ◀─────────────────────────── the end
//! ```
//! File systems are hostile input. The child parses them and has nothing else: one socket, an empty
//! environment, no right to open, to run or to connect ([`crate::sandbox`]). A child that a crafted
//! disk takes over can read the disk, which it may, and give a wrong list of ranges, which costs
//! time. One that ends early (a panic aborts a release program) gives an error here, and does not
//! end this process.
//!
//! **Touches:** the child, through a socket; the disk, through the function that reads it.
//! **Never:** believes a number of the child: the bytes that it asks for, and the length of its
//! answer, are bounded. **Locks:** none. **Invariants:** the child is dead when [`search`] returns.
//! That of a [`BootSearch`] ends when its socket is closed.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::sandbox;
use bootset::{BlockSource, BootSet, BootSetLimits};
use host::error::{Context, one_line};
use host::{Error, ErrorKind, Result};

/// Bytes that the child asks for at once, at most.
const LONGEST_READ: u32 = 1 << 20;
/// Bytes of the text of an error.
const LONGEST_REASON: usize = 1000;
/// Bytes of a request, which has the paths of the command line, and of an answer: 2¹⁸ ranges of at
/// most 42 bytes each, and notes.
const LONGEST_MESSAGE: u32 = 32 << 20;
/// How long the child may take after its deadline, to put its ranges in order.
const GRACE: Duration = Duration::from_secs(10);
/// How long the child may take if there is no deadline, without a word.
const LONGEST_SILENCE: Duration = Duration::from_secs(120);

/// What the child sends before a range that it asks for.
const READ: u8 = b'R';
/// What it sends before its answer.
const DONE: u8 = b'D';
/// What it is sent before the bytes of a range.
const BYTES: u8 = b'B';
/// What it is sent before the reason why there are none.
const REASON: u8 = b'E';

/// What the child searches.
#[derive(Debug, Deserialize, Serialize)]
struct SearchRequest {
    size: u64,
    paths: Vec<String>,
    milliseconds: Option<u64>,
    most_ranges: usize,
    most_bytes_read: u64,
    most_bytes_found: u64,
    most_bytes_of_a_file: u64,
    most_files: u64,
    deepest_directory: usize,
}

impl SearchRequest {
    fn limits(&self) -> BootSetLimits {
        BootSetLimits {
            until: self.milliseconds.map(|time| Instant::now() + Duration::from_millis(time)),
            most_ranges: self.most_ranges,
            most_bytes_read: self.most_bytes_read,
            most_bytes_found: self.most_bytes_found,
            most_bytes_of_a_file: self.most_bytes_of_a_file,
            most_files: self.most_files,
            deepest_directory: self.deepest_directory,
        }
    }
}

/// What it has found.
#[derive(Debug, Default, Deserialize, Serialize)]
struct SearchAnswer {
    ranges: Vec<(u64, u64)>,
    notes: Vec<String>,
    is_complete: bool,
    /// The error of the search, if it is one.
    refused: Option<String>,
}

/// Searches a disk of `size` bytes in a child of this process, and reads the disk with `read`,
/// which fills its buffer from an offset.
///
/// # Errors
/// The child cannot be started, has ended early, or does not keep to the protocol.
pub fn search(
    size: u64,
    read: impl FnMut(u64, &mut [u8]) -> Result<()>,
    paths: &[String],
    limits: &BootSetLimits,
) -> Result<BootSet> {
    let BootSearch { stream, child } = BootSearch::start(None)?;
    let mut child = Ended(child);
    ask(stream, size, read, paths, limits).map_err(|error| match child.reason() {
        Some(reason) => Error::new(error.kind(), format!("the search has ended early: {reason}")),
        None => error.context("the search"),
    })
}

/// A child that waits for what it is to search.
#[derive(Debug)]
pub struct BootSearch {
    stream: UnixStream,
    child: Child,
}

impl BootSearch {
    /// Starts the child, as this user and group if they are given.
    ///
    /// # Errors
    /// Those of starting a process.
    pub fn start(user: Option<(u32, u32)>) -> Result<BootSearch> {
        let (stream, theirs) = UnixStream::pair().context(|| "starting the search")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("cordisk").args(["order", "search"]).env_clear().current_dir("/");
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        // That of a mount is a pipe, whose end tells the command that the disk is mounted.
        command.stderr(Stdio::null());
        if let Some((uid, gid)) = user {
            command.uid(uid).gid(gid);
        }
        let child = command.spawn().context(|| "starting the search")?;
        Ok(BootSearch { stream, child })
    }

    /// As [`search`], for a process that can neither signal its child nor wait for it. The child
    /// ends when its socket is closed, at the end of this call.
    ///
    /// # Errors
    /// As [`search`].
    pub fn run(
        self,
        size: u64,
        read: impl FnMut(u64, &mut [u8]) -> Result<()>,
        limits: &BootSetLimits,
    ) -> Result<BootSet> {
        ask(self.stream, size, read, &[], limits).map_err(|error| error.context("the search"))
    }
}

/// Sends what is to be searched, and answers reads until the end.
fn ask(
    stream: UnixStream,
    size: u64,
    read: impl FnMut(u64, &mut [u8]) -> Result<()>,
    paths: &[String],
    limits: &BootSetLimits,
) -> Result<BootSet> {
    let remaining = limits.until.map(|until| until.saturating_duration_since(Instant::now()));
    let request = SearchRequest {
        size,
        paths: paths.to_vec(),
        milliseconds: remaining.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        most_ranges: limits.most_ranges,
        most_bytes_read: limits.most_bytes_read,
        most_bytes_found: limits.most_bytes_found,
        most_bytes_of_a_file: limits.most_bytes_of_a_file,
        most_files: limits.most_files,
        deepest_directory: limits.deepest_directory,
    };
    answer_reads(stream, &request, limits.until, read)
}

/// A child that is killed and waited for.
struct Ended(Child);

impl Ended {
    /// Why the child has ended, if it has done so by itself and not in order.
    fn reason(&mut self) -> Option<String> {
        // The socket is closed a moment before the process can be waited for.
        for _ in 0..50 {
            match self.0.try_wait() {
                Ok(Some(status)) if status.success() => return None,
                Ok(Some(status)) => {
                    return Some(match status.signal() {
                        Some(signal) => format!("signal {signal}"),
                        None => status.to_string(),
                    });
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(_) => return None,
            }
        }
        None
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends the request, and answers reads until the end.
fn answer_reads(
    mut stream: UnixStream,
    request: &SearchRequest,
    until: Option<Instant>,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<BootSet> {
    let context = || "the connection to it";
    stream.set_write_timeout(Some(LONGEST_SILENCE)).context(context)?;
    send(&mut stream, &serde_json::to_vec(request).map_err(not_json)?).context(context)?;
    let mut left = request.most_bytes_read;
    let mut buffer = Vec::new();
    loop {
        let mut tag = [0];
        receive(&mut stream, &mut tag, until).context(context)?;
        match tag[0] {
            READ => {
                let (mut offset, mut len) = ([0; 8], [0; 4]);
                receive(&mut stream, &mut offset, until).context(context)?;
                receive(&mut stream, &mut len, until).context(context)?;
                let (offset, len) = (u64::from_le_bytes(offset), u32::from_le_bytes(len));
                let end = offset.checked_add(len.into());
                if len == 0
                    || len > LONGEST_READ
                    || end.is_none_or(|end| end > request.size)
                    || u64::from(len) > left
                {
                    return Err(broken("it asks for more than it may"));
                }
                left -= u64::from(len);
                buffer.clear();
                buffer.push(BYTES);
                buffer.resize(1 + len as usize, 0);
                if let Err(error) = read(offset, &mut buffer[1..]) {
                    let mut reason = one_line(&error.to_string());
                    while reason.len() > LONGEST_REASON {
                        reason.pop();
                    }
                    buffer = [&[REASON][..], &(reason.len() as u32).to_le_bytes()].concat();
                    buffer.extend_from_slice(reason.as_bytes());
                }
                stream.write_all(&buffer).context(context)?;
            }
            DONE => {
                let mut receive = |buf: &mut [u8]| receive(&mut stream, buf, until);
                let message = message(&mut receive).context(context)?;
                let answer: SearchAnswer = serde_json::from_slice(&message).map_err(not_json)?;
                return checked(answer, request);
            }
            _ => return Err(broken("it says what has no meaning")),
        }
    }
}

/// Checks an answer: its ranges lie on the disk, and there are no more than the limits permit.
fn checked(answer: SearchAnswer, request: &SearchRequest) -> Result<BootSet> {
    if let Some(refused) = answer.refused {
        return Err(Error::new(ErrorKind::InvalidArgument, one_line(&refused)));
    }
    let ranges: Vec<Range<u64>> = answer.ranges.iter().map(|&(start, end)| start..end).collect();
    let is_valid = |range: &Range<u64>| range.start < range.end && range.end <= request.size;
    if ranges.len() > request.most_ranges || !ranges.iter().all(is_valid) {
        return Err(broken("its answer is not about this disk"));
    }
    let notes = answer.notes.iter().map(|note| one_line(note)).collect();
    Ok(BootSet { ranges, notes, is_complete: answer.is_complete })
}

fn broken(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{what}; its result is not used"))
}

fn not_json(error: serde_json::Error) -> Error {
    Error::wrap(ErrorKind::Corrupt, "what it has sent", error)
}

/// Sends a length and the bytes.
fn send(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).ok().filter(|&len| len <= LONGEST_MESSAGE);
    let len = len.ok_or_else(|| io::Error::other("there are too many paths"))?;
    stream.write_all(&len.to_le_bytes())?;
    stream.write_all(bytes)
}

/// Receives a length and the bytes.
fn message(receive: &mut dyn FnMut(&mut [u8]) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    receive(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > LONGEST_MESSAGE {
        return Err(io::Error::other("a message is too long"));
    }
    let mut bytes = vec![0; len as usize];
    receive(&mut bytes)?;
    Ok(bytes)
}

/// Receives exactly `buf` from the child. A child that is silent for too long has gone astray.
fn receive(stream: &mut UnixStream, buf: &mut [u8], until: Option<Instant>) -> io::Result<()> {
    let patience = match until {
        Some(until) => (until + GRACE).saturating_duration_since(Instant::now()),
        None => LONGEST_SILENCE,
    };
    if patience.is_zero() {
        return Err(io::Error::other("it has not ended in time"));
    }
    stream.set_read_timeout(Some(patience))?;
    stream.read_exact(buf).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::other(format!("no answer within {} seconds", patience.as_secs()))
        }
        io::ErrorKind::UnexpectedEof => io::Error::other("it was closed"),
        _ => error,
    })
}

/// The child: enters the sandbox, and searches the disk that it is asked to search on its standard
/// input, a socket.
///
/// # Errors
/// There is no such socket, or the other end does not keep to the protocol.
pub fn run_child() -> Result<()> {
    let context = || "standard input: this command is for cordisk itself";
    let stream = io::stdin().as_fd().try_clone_to_owned().context(context)?;
    if rustix::net::sockopt::socket_domain(&stream).map_err(io::Error::from).context(context)?
        != rustix::net::AddressFamily::UNIX
    {
        return Err(Error::new(ErrorKind::InvalidArgument, context()));
    }
    let mut stream = UnixStream::from(stream);
    sandbox::enter(sandbox::Mode::Try)?;
    let request = message(&mut |buf: &mut [u8]| stream.read_exact(buf)).context(context)?;
    let request: SearchRequest = serde_json::from_slice(&request).map_err(not_json)?;
    let reader = stream.try_clone().context(context)?;
    let source = Asked { size: request.size, stream: Mutex::new(reader) };
    let found = bootset::boot_set(Arc::new(source), &request.paths, &request.limits());
    let answer = match found {
        Ok(set) => SearchAnswer {
            ranges: set.ranges.iter().map(|range| (range.start, range.end)).collect(),
            notes: set.notes,
            is_complete: set.is_complete,
            refused: None,
        },
        Err(error) => SearchAnswer { refused: Some(error.to_string()), ..SearchAnswer::default() },
    };
    let answer = serde_json::to_vec(&answer).map_err(not_json)?;
    stream.write_all(&[DONE]).and_then(|()| send(&mut stream, &answer)).context(context)
}

/// The disk, as the child asks its parent for it.
struct Asked {
    size: u64,
    stream: Mutex<UnixStream>,
}

impl BlockSource for Asked {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut stream = self.stream.lock();
        let mut at = offset;
        for part in buf.chunks_mut(LONGEST_READ as usize) {
            let mut request = vec![READ];
            request.extend(at.to_le_bytes());
            request.extend((part.len() as u32).to_le_bytes());
            stream.write_all(&request)?;
            let mut tag = [0];
            stream.read_exact(&mut tag)?;
            if tag[0] != BYTES {
                let reason = message(&mut |buf: &mut [u8]| stream.read_exact(buf))?;
                return Err(io::Error::other(String::from_utf8_lossy(&reason).into_owned()));
            }
            stream.read_exact(part)?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// What [`answer_reads`] makes of a child that sends `bytes` after the request.
    fn told(bytes: Vec<u8>) -> Result<BootSet> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let request = SearchRequest {
            size: 1 << 20,
            paths: Vec::new(),
            milliseconds: None,
            most_ranges: 3,
            most_bytes_read: 100_000,
            most_bytes_found: 1 << 20,
            most_bytes_of_a_file: 1 << 20,
            most_files: 10,
            deepest_directory: 3,
        };
        let child = thread::spawn(move || {
            let request = message(&mut |buf: &mut [u8]| theirs.read_exact(buf)).unwrap();
            let request: SearchRequest = serde_json::from_slice(&request).unwrap();
            assert_eq!((request.size, request.most_ranges), (1 << 20, 3));
            theirs.write_all(&bytes).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            let mut rest = Vec::new();
            // The other end is closed with bytes that were not read.
            let _ = theirs.read_to_end(&mut rest);
            rest
        });
        let read = |offset: u64, buf: &mut [u8]| {
            buf.fill(offset as u8);
            Ok(())
        };
        let found = answer_reads(ours, &request, None, read);
        child.join().unwrap();
        found
    }

    fn read(offset: u64, len: u32) -> Vec<u8> {
        [&[READ][..], &offset.to_le_bytes(), &len.to_le_bytes()].concat()
    }

    fn done(json: &str) -> Vec<u8> {
        [&[DONE][..], &(json.len() as u32).to_le_bytes(), json.as_bytes()].concat()
    }

    #[test]
    fn an_answer_of_a_child_is_taken() {
        let json = r#"{"ranges":[[4096,8192],[0,10]],"notes":["a\u001bb"],"is_complete":true,"refused":null}"#;
        let set = told([read(7, 100), done(json)].concat()).unwrap();
        assert_eq!(set.ranges, [4096..8192, 0..10]);
        assert_eq!(set.notes, [r"a\u{1b}b"]);
        assert!(set.is_complete);
    }

    /// Everything that a child could ask or say beside the protocol ends the search with an error.
    #[test]
    fn a_child_that_was_taken_over_gets_nothing() {
        let set = |ranges: &str| {
            done(&format!(r#"{{"ranges":{ranges},"notes":[],"is_complete":true,"refused":null}}"#))
        };
        for (bytes, why) in [
            (read((1 << 20) - 1, 2), "more than it may"),
            (read(u64::MAX, 2), "more than it may"),
            (read(0, LONGEST_READ + 1), "more than it may"),
            ([read(0, 60_000), read(0, 60_000)].concat(), "more than it may"),
            (vec![b'X'], "no meaning"),
            (vec![], "it was closed"),
            (read(0, 10)[..5].to_vec(), "it was closed"),
            ([&[DONE][..], &u32::MAX.to_le_bytes()].concat(), "too long"),
            (done("{}"), "what it has sent"),
            (set("[[0,2097152]]"), "not about this disk"),
            (set("[[5,5]]"), "not about this disk"),
            (set("[[9,5]]"), "not about this disk"),
            (set("[[0,1],[2,3],[4,5],[6,7]]"), "not about this disk"),
        ] {
            let error = told(bytes.clone()).unwrap_err().to_string();
            assert!(error.contains(why), "{bytes:?}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_with_its_reason() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let source = Asked { size: 1 << 20, stream: Mutex::new(theirs) };
        let request = SearchRequest {
            size: 1 << 20,
            paths: Vec::new(),
            milliseconds: Some(60_000),
            most_ranges: 3,
            most_bytes_read: 100_000,
            most_bytes_found: 1 << 20,
            most_bytes_of_a_file: 1 << 20,
            most_files: 10,
            deepest_directory: 3,
        };
        let child = thread::spawn(move || {
            message(&mut |buf: &mut [u8]| source.stream.lock().read_exact(buf)).unwrap();
            let mut bytes = [0; 300];
            source.read(4096, &mut bytes).unwrap();
            assert_eq!(bytes, [16; 300]);
            source.read(8192, &mut bytes).unwrap_err().to_string()
        });
        let mut reads = 0;
        let read = |offset: u64, buf: &mut [u8]| {
            reads += 1;
            buf.fill((offset / 256) as u8);
            let lost = || Error::new(ErrorKind::Io, "the server is lost".repeat(1000));
            if reads > 1 { Err(lost()) } else { Ok(()) }
        };
        assert!(answer_reads(ours, &request, None, read).is_err());
        let reason = child.join().unwrap();
        assert!(reason.starts_with("the server is lost") && reason.len() <= LONGEST_REASON);
    }
}
