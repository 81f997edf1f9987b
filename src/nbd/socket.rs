//! Sockets: TCP or Unix, connected within a deadline.
//!
//! **Touches:** the network, the resolver of host names. **Never:** waits longer than its deadline.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::NbdAddress;
use crate::error::{NbdError, NbdErrorKind, Result, io_text};

/// Idle time before the kernel asks a silent peer whether it is still there, interval of these
/// questions, and how many may remain unanswered: a dead peer of an idle connection is found within
/// a minute and a half.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects to `address`.
    pub fn connect(address: &NbdAddress, deadline: Instant) -> Result<Socket> {
        let socket = match address {
            NbdAddress::Tcp { host, port } => connect_tcp(host, *port, deadline),
            NbdAddress::Unix(path) => connect_unix(path, deadline),
        };
        socket.map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "no answer in time".into(),
                _ => io_text(&error),
            };
            NbdError::new(NbdErrorKind::Connect, format!("cannot connect: {why}"))
        })
    }

    /// Sets the longest time that one read may wait; `None`: without end.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Tcp(socket) => socket.set_read_timeout(timeout),
            Socket::Unix(socket) => socket.set_read_timeout(timeout),
        }
    }

    /// Sets the longest time that one write may wait.
    pub fn set_write_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Socket::Tcp(socket) => socket.set_write_timeout(Some(timeout)),
            Socket::Unix(socket) => socket.set_write_timeout(Some(timeout)),
        }
    }

    /// Ends the connection in both directions: a thread that waits in a read or write returns.
    pub fn shut_down(&self) {
        let result = match self {
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Socket::Unix(socket) => socket.shutdown(Shutdown::Both),
        };
        if let Err(error) = result {
            log::trace!("shutdown of an NBD connection: {error}"); // the server was faster
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => (&*socket).read(bytes),
            Socket::Unix(socket) => (&*socket).read(bytes),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => (&*socket).write(bytes),
            Socket::Unix(socket) => (&*socket).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket whose reads and writes, all together, end at a deadline.
pub(crate) struct UntilDeadline<'a> {
    pub socket: &'a Socket,
    pub deadline: Instant,
}

impl UntilDeadline<'_> {
    fn left(&self) -> io::Result<Duration> {
        time_left(self.deadline)
    }
}

impl Read for UntilDeadline<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        self.socket.read(bytes)
    }
}

impl Write for UntilDeadline<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the time until `deadline`, which is not zero: std takes zero for an error, and the
/// kernel takes it for "without end".
fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(left.max(Duration::from_micros(1)))
    }
}

fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<Socket> {
    let addresses = resolve(host, port, deadline)?;
    let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
    let mut untried = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for address in addresses {
        // An address that does not answer must not use up the time of the others.
        let share = time_left(deadline)? / untried.max(1);
        untried = untried.saturating_sub(1);
        result = TcpStream::connect_timeout(&address, share.max(Duration::from_millis(1)));
        if result.is_ok() {
            break;
        }
    }
    let socket = result?;
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES)?;
    Ok(Socket::Tcp(socket))
}

/// Returns the addresses of `host`. The resolver of the C library has no timeout that a caller can
/// set, so that a thread of its own waits for it; it ends by itself.
fn resolve(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (sender, receiver) = mpsc::channel();
    let name = host.to_string();
    thread::Builder::new().name("nbd-resolve".into()).spawn(move || {
        let found = (name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        let _ = sender.send(found); // the caller may have given up
    })?;
    match receiver.recv_timeout(time_left(deadline)?) {
        Ok(found) => found,
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err(io::Error::other("the name of the host was not resolved in time"))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(io::Error::other("the resolver failed")),
    }
}

/// Connects to a Unix socket. The connection waits while the backlog of the server is full, for as
/// long as the timeout for sending says (unix(7), `unix_stream_connect` of Linux).
fn connect_unix(path: &Path, deadline: Instant) -> io::Result<Socket> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(time_left(deadline)?))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(Socket::Unix(UnixStream::from(socket)))
}
