//! Servers for tests: nbdkit and qemu-nbd as processes, and a thread that sends what a test says.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

use crate::{NbdAddress, NbdClient, NbdConfig, NbdError, NbdPiece};

/// A bound on waiting for what happens at once on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A time that no test reaches.
pub(crate) fn later() -> Instant {
    Instant::now() + PATIENCE
}

/// Whether `program` is installed; says so if it is not.
pub(crate) fn installed(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    if !found {
        assert!(std::env::var_os("CORDISK_REQUIRE_ALL").is_none(), "{program} is not installed");
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// Runs a program that must succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A server process, which ends with this value.
pub(crate) struct ServerProcess {
    child: Child,
}

impl ServerProcess {
    /// Starts a server that writes its process id to `started` when it listens.
    fn start(mut command: Command, started: &Path) -> ServerProcess {
        let _ = std::fs::remove_file(started);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let mut server = ServerProcess { child };
        server.wait_for(started);
        server
    }

    /// Waits until the server has written a line to `started`.
    fn wait_for(&mut self, started: &Path) {
        let end = later();
        while !std::fs::read(started).is_ok_and(|text| text.ends_with(b"\n")) {
            assert_eq!(self.child.try_wait().unwrap(), None, "the server has ended");
            assert!(Instant::now() < end, "the server does not listen");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts nbdkit on `socket`.
    pub fn nbdkit(socket: &Path, arguments: &[&str]) -> ServerProcess {
        let _ = std::fs::remove_file(socket);
        let started = socket.with_extension("pid");
        let mut command = Command::new("nbdkit");
        command.args(["--exit-with-parent", "-f", "-r", "-U"]).arg(socket);
        command.arg("-P").arg(&started).args(arguments);
        ServerProcess::start(command, &started)
    }

    /// Starts qemu-nbd on `socket`.
    pub fn qemu_nbd(socket: &Path, arguments: &[&str]) -> ServerProcess {
        let _ = std::fs::remove_file(socket);
        let started = socket.with_extension("pid");
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-e", "8", "-k"]).arg(socket);
        command.arg("--pid-file").arg(&started).args(arguments);
        ServerProcess::start(command, &started)
    }

    /// Starts nbdkit on a TCP port, which is returned.
    pub fn nbdkit_on_tcp(scratch: &Scratch, arguments: &[&str]) -> (ServerProcess, u16) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let mut command = Command::new("nbdkit");
        command.args(["--exit-with-parent", "-f", "-r", "-i", "127.0.0.1", "-p"]);
        command.arg(port.to_string()).arg("-P").arg(scratch.path("pid")).args(arguments);
        (ServerProcess::start(command, &scratch.path("pid")), port)
    }

    /// Stops the server without ending it, and waits until all of its threads have stopped.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let stopped = waitpid(Some(Pid::from_child(&self.child)), WaitOptions::UNTRACED).unwrap();
        assert!(stopped.is_some_and(|(_, status)| status.stopped()));
    }

    /// Sends a signal to the server.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory with a socket in it.
pub(crate) struct Scratch {
    dir: TempDir,
}

impl Scratch {
    pub fn new() -> Scratch {
        Scratch { dir: tempfile::tempdir().unwrap() }
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path in the directory as a text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    /// The path of the socket.
    pub fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// A configuration for the server on the socket.
    pub fn config(&self) -> NbdConfig {
        NbdConfig::new(NbdAddress::Unix(self.socket()), "")
    }
}

/// Returns what a read gives, and how many of its bytes came as zeros that were not sent.
pub(crate) fn read_with_zeros(
    client: &NbdClient,
    offset: u64,
    len: u64,
) -> Result<(Vec<u8>, u64), NbdError> {
    let mut bytes = vec![0xee; len as usize];
    let mut came = vec![0u8; len as usize]; // compared as bytes, which is fast without optimisation
    let (none, all) = (came.clone(), vec![1u8; len as usize]);
    let mut zeros = 0;
    client.read(offset, len, later(), &mut |at, piece| {
        let start = (at - offset) as usize;
        let len = match piece {
            NbdPiece::Data(data) => {
                bytes[start..start + data.len()].copy_from_slice(data);
                data.len()
            }
            NbdPiece::Zeros(len) => {
                bytes[start..start + len as usize].fill(0);
                zeros += len;
                len as usize
            }
        };
        assert!(came[start..start + len] == none[..len], "a byte came twice");
        came[start..start + len].fill(1);
        Ok(())
    })?;
    assert!(came == all, "a byte did not come");
    Ok((bytes, zeros))
}

/// Returns what a read gives.
pub(crate) fn read(client: &NbdClient, offset: u64, len: u64) -> Result<Vec<u8>, NbdError> {
    read_with_zeros(client, offset, len).map(|(bytes, _)| bytes)
}

/// A thread that accepts connections one after the other, and runs a function of the test on each.
pub(crate) struct ServerThread {
    pub scratch: Scratch,
    thread: Option<JoinHandle<()>>,
    stop: Option<mpsc::Sender<()>>,
}

impl ServerThread {
    /// Starts a server that gives the number of the connection and the connection to `serve`. What
    /// `serve` returns is an error that the client has caused, mostly by closing the connection.
    pub fn start(
        mut serve: impl FnMut(usize, &mut UnixStream) -> io::Result<()> + Send + 'static,
    ) -> ServerThread {
        let scratch = Scratch::new();
        let listener = UnixListener::bind(scratch.socket()).unwrap();
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if matches!(stopped.try_recv(), Err(mpsc::TryRecvError::Disconnected)) {
                    break;
                }
                let mut stream = stream.unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let _ = serve(number, &mut stream);
            }
        });
        ServerThread { scratch, thread: Some(thread), stop: Some(stop) }
    }
}

impl Drop for ServerThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = UnixStream::connect(self.scratch.socket());
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || thread::panicking());
        }
    }
}

/// What a server of a test offers.
#[derive(Clone, Copy)]
pub(crate) struct Offer {
    pub size: u64,
    pub structured: bool,
    pub multi_conn: bool,
}

/// Negotiates as a server.
pub(crate) fn serve_negotiation(stream: &mut UnixStream, offer: Offer) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    assert_eq!(flags, [0, 0, 0, 3]);
    loop {
        let (option, payload) = receive_option(stream)?;
        match option {
            8 if offer.structured => option_reply(stream, option, 1, &[])?,
            10 => {
                assert!(payload.ends_with(b"\0\0\0\x01\0\0\0\x0fbase:allocation"));
                option_reply(stream, option, 4, b"\0\0\0\x2abase:allocation")?;
                option_reply(stream, option, 1, &[])?;
            }
            7 => {
                let flags: u16 = if offer.multi_conn { 0x101 } else { 1 };
                let info = [&[0, 0], &offer.size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
                option_reply(stream, option, 3, &info)?;
                return option_reply(stream, option, 1, &[]);
            }
            _ => option_reply(stream, option, 0x8000_0001, b"not known here")?,
        }
    }
}

/// Receives an option and its payload.
pub(crate) fn receive_option(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    assert!(header.starts_with(b"IHAVEOPT"));
    let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; number(12) as usize];
    stream.read_exact(&mut payload)?;
    Ok((number(8), payload))
}

/// Replies to an option.
pub(crate) fn option_reply(
    stream: &mut UnixStream,
    option: u32,
    kind: u32,
    payload: &[u8],
) -> io::Result<()> {
    let len = payload.len() as u32;
    let header =
        [0x0003_e889_0455_65a9u64.to_be_bytes().as_slice(), &option.to_be_bytes()].concat();
    stream.write_all(&[&header, &kind.to_be_bytes()[..], &len.to_be_bytes(), payload].concat())
}

/// A request as a server sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Received {
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

/// Receives a request.
pub(crate) fn receive_request(stream: &mut UnixStream) -> io::Result<Received> {
    let mut bytes = [0; 28];
    stream.read_exact(&mut bytes)?;
    assert!(bytes.starts_with(b"\x25\x60\x95\x13\0\0"), "{bytes:x?}");
    Ok(Received {
        command: u16::from_be_bytes(bytes[6..8].try_into().unwrap()),
        cookie: u64::from_be_bytes(bytes[8..16].try_into().unwrap()),
        offset: u64::from_be_bytes(bytes[16..24].try_into().unwrap()),
        len: u32::from_be_bytes(bytes[24..28].try_into().unwrap()),
    })
}

/// Returns a chunk of a structured reply; `flags` 1 is the last one.
pub(crate) fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33efu32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Returns a chunk with data.
pub(crate) fn data_chunk(flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    chunk(flags, 1, cookie, &[&offset.to_be_bytes(), data].concat())
}

/// Returns a simple reply.
pub(crate) fn simple_reply(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x6744_6698u32.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(data);
    bytes
}
