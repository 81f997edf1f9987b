//! A file behind an NBD server.
//!
//! NBD has no identity of content: a file is pinned to its size, unless there is a chunk list.
//!
//! **Touches:** the server, through the crate `nbd`. **Locks:** one leaf lock, `client`, held while
//! a connection is made, so that all threads share it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd::{
    NBD_PORT, NbdAddress, NbdClient, NbdConfig, NbdError, NbdErrorKind, NbdExtent, NbdPiece, NbdTls,
};
use parking_lot::Mutex;

use host::storage::BlockStatus;
use remote::pin::{Pin, Validator};
use remote::url::{Scheme, SourceUrl};

use crate::config::SourcesConfig;
use crate::source::{RemoteSource, Retry, Sink, SourceError};

/// The longest time of one request. A server that sends nothing, or next to nothing, is given up
/// earlier (the stall timeout).
const LONGEST: Duration = Duration::from_secs(600);

/// EIO, ENOMEM, ENOSPC and ESHUTDOWN, as the NBD protocol numbers them: they may pass.
const PASSING: [u32; 4] = [5, 12, 28, 108];

/// How many zeros go to a sink at once, in bytes.
const ZEROS: usize = 256 << 10;

/// A file behind an NBD server.
#[derive(Debug)]
pub struct NbdSource {
    config: NbdConfig,
    client: Mutex<Option<Arc<NbdClient>>>,
}

impl NbdSource {
    /// Reads the name; makes no connection.
    ///
    /// # Errors
    /// The name has no host, or a path that is not UTF-8.
    pub fn open(url: &SourceUrl, config: &SourcesConfig) -> Result<NbdSource, SourceError> {
        let export = percent_encoding::percent_decode_str(url.url().path().trim_start_matches('/'))
            .decode_utf8()
            .map_err(|error| SourceError::never("the name of the export", &error))?
            .into_owned();
        let settings = config.settings(url);
        let host = url.url().host_str().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let address = match url.scheme() {
            Scheme::NbdUnix => {
                NbdAddress::Unix(PathBuf::from(url.parameter("socket").unwrap_or_default()))
            }
            _ => NbdAddress::Tcp { host: host.clone(), port: url.url().port().unwrap_or(NBD_PORT) },
        };
        let tls = (url.scheme() == Scheme::Nbds)
            .then(|| NbdTls { ca_file: settings.ca.clone(), server_name: host });
        let config = NbdConfig {
            tls,
            connect_timeout: config.connect_timeout,
            stall_timeout: config.stall_timeout,
            ..NbdConfig::new(address, export)
        };
        Ok(NbdSource { config, client: Mutex::new(None) })
    }

    fn client(&self) -> Result<Arc<NbdClient>, SourceError> {
        let mut client = self.client.lock();
        if let Some(client) = &*client {
            return Ok(Arc::clone(client));
        }
        let connected = Arc::new(NbdClient::connect(self.config.clone()).map_err(sorted)?);
        *client = Some(Arc::clone(&connected));
        Ok(connected)
    }

    /// A client of the file that `pin` names. A server that was away when the file was opened may
    /// have come back with another file.
    fn client_of(&self, pin: &Pin) -> Result<Arc<NbdClient>, SourceError> {
        let client = self.client()?;
        if client.size() != pin.size {
            let text = format!("has {} bytes, and had {}", client.size(), pin.size);
            return Err(SourceError::new(Retry::Changed, text));
        }
        Ok(client)
    }
}

/// NBD has no way to end a request: what was asked for comes.
const NBD_PART: u64 = 2 << 20;

impl RemoteSource for NbdSource {
    fn part(&self) -> u64 {
        NBD_PART
    }

    fn look(&self) -> Result<Pin, SourceError> {
        let size = self.client()?.size();
        Ok(Pin { size, validator: Validator::None, digest: None })
    }

    fn read(&self, pin: &Pin, range: Range<u64>, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let client = self.client_of(pin)?;
        let mut pieces = InOrder { at: range.start, early: BTreeMap::new(), failed: None };
        let len = range.end - range.start;
        let read = client.read(range.start, len, Instant::now() + LONGEST, &mut |at, piece| {
            pieces.take(at, piece, sink)
        });
        match (read, pieces.failed) {
            (Err(_), Some(failed)) => {
                Err(SourceError::new(Retry::Local(failed), "the bytes could not be taken"))
            }
            (read, _) => read.map_err(sorted),
        }
    }

    fn status(
        &self,
        pin: &Pin,
        offset: u64,
        max: u64,
    ) -> Result<Vec<(BlockStatus, u64)>, SourceError> {
        let client = self.client_of(pin)?;
        let deadline = Instant::now() + self.config.stall_timeout.min(LONGEST);
        let told = client.block_status(offset, max, deadline);
        let extents = told.map_err(|error| match error.kind() {
            NbdErrorKind::Deadline => SourceError::new(Retry::Never, error.to_string()),
            _ => sorted(error),
        })?;
        let Some(extents) = extents else { return Ok(vec![(BlockStatus::Data, max)]) };
        let run = |extent: &NbdExtent| {
            let status = if extent.zero { BlockStatus::Hole } else { BlockStatus::Data };
            (status, extent.len)
        };
        Ok(extents.iter().map(run).collect())
    }
}

/// Puts the pieces of a read, which come in any order, in order.
struct InOrder {
    /// Where the next byte for the sink belongs.
    at: u64,
    /// Pieces that came too early. They are those of requests in flight for one read, so at most
    /// its length.
    early: BTreeMap<u64, Early>,
    failed: Option<io::Error>,
}

enum Early {
    Data(Vec<u8>),
    Zeros(u64),
}

impl InOrder {
    fn take(&mut self, at: u64, piece: NbdPiece<'_>, sink: &mut Sink<'_>) -> io::Result<()> {
        if at != self.at {
            let early = match piece {
                NbdPiece::Data(bytes) => Early::Data(bytes.to_vec()),
                NbdPiece::Zeros(len) => Early::Zeros(len),
            };
            self.early.insert(at, early);
            return Ok(());
        }
        self.pass(piece, sink)?;
        while let Some(early) = self.early.remove(&self.at) {
            match early {
                Early::Data(bytes) => self.pass(NbdPiece::Data(&bytes), sink)?,
                Early::Zeros(len) => self.pass(NbdPiece::Zeros(len), sink)?,
            }
        }
        Ok(())
    }

    fn pass(&mut self, piece: NbdPiece<'_>, sink: &mut Sink<'_>) -> io::Result<()> {
        let passed = match piece {
            NbdPiece::Data(bytes) => {
                self.at += bytes.len() as u64;
                sink(bytes)
            }
            NbdPiece::Zeros(len) => {
                self.at += len;
                let zeros = [0; ZEROS];
                let lengths = (0..len).step_by(ZEROS).map(|at| (len - at).min(ZEROS as u64));
                lengths.into_iter().try_for_each(|len| sink(&zeros[..len as usize]))
            }
        };
        passed.map_err(|error| {
            let told = io::Error::from(error.kind());
            self.failed = Some(error);
            told
        })
    }
}

/// What an error of the client means for another try.
fn sorted(error: NbdError) -> SourceError {
    let retry = match error.kind() {
        NbdErrorKind::Closed { .. } => Retry::AtOnce,
        NbdErrorKind::Connect
        | NbdErrorKind::Stalled
        | NbdErrorKind::Protocol
        | NbdErrorKind::Deadline => Retry::LATER,
        NbdErrorKind::Server(number) if PASSING.contains(&number) => Retry::LATER,
        NbdErrorKind::Changed => Retry::Changed,
        NbdErrorKind::Server(_)
        | NbdErrorKind::Tls
        | NbdErrorKind::NoExport
        | NbdErrorKind::Sink
        | NbdErrorKind::Argument => Retry::Never,
    };
    SourceError::new(retry, error.to_string())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Serves one connection to an export of `size` bytes, by the oldest form of the protocol that
    /// clients still speak, up to the first request.
    fn negotiate(stream: &mut TcpStream, size: u64) -> io::Result<()> {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x02")?;
        let mut name = [0; 4 + 16]; // the flags of the client, and NBD_OPT_EXPORT_NAME ""
        stream.read_exact(&mut name)?;
        stream.write_all(&[&size.to_be_bytes()[..], &[0, 1]].concat())?;
        stream.read_to_end(&mut Vec::new()).map(drop)
    }

    fn receive<const N: usize>(stream: &mut TcpStream) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        stream.read_exact(&mut bytes).map(|()| bytes)
    }

    /// Serves one connection to an export of 1 GiB, about which it tells 512 bytes at a time.
    fn tell_little(stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        receive::<4>(stream)?;
        loop {
            let header = receive::<16>(stream)?;
            let len = u32::from_be_bytes([header[12], header[13], header[14], header[15]]);
            stream.read_exact(&mut vec![0; len as usize])?;
            let option = header[11];
            let reply = |kind: u8, payload: &[u8]| {
                let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
                let len = payload.len() as u8;
                [&magic[..], &[0, 0, 0, option, 0, 0, 0, kind, 0, 0, 0, len], payload].concat()
            };
            match option {
                10 => stream.write_all(&reply(4, b"\0\0\0\x2abase:allocation"))?,
                7 => stream.write_all(&reply(3, &[0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 1]))?,
                _ => {}
            }
            stream.write_all(&reply(1, &[]))?;
            if option == 7 {
                break;
            }
        }
        loop {
            let request = receive::<28>(stream)?;
            if request[7] != 7 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
            let run = [0, 0, 0, 42, 0, 0, 2, 0, 0, 0, 0, 0];
            let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5];
            stream.write_all(&[&head, &request[8..16], &[0, 0, 0, 12], &run].concat())?;
        }
    }

    /// Protects: workers, and the threads of the guest behind them, do not wait for a server that
    /// takes its time to tell of zeros, although it never stalls.
    #[test]
    fn a_server_that_tells_little_is_not_asked_for_long() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = tell_little(&mut stream);
        });
        let url = SourceUrl::parse(&format!("nbd://127.0.0.1:{port}/")).unwrap();
        let path = std::path::Path::new("sources.toml");
        let config = SourcesConfig::parse("stall-timeout = 1", path, Vec::new()).unwrap();
        let source = NbdSource::open(&url, &config).unwrap();
        let pin = Pin { size: 1 << 30, validator: Validator::None, digest: None };
        let begun = Instant::now();
        assert_eq!(source.status(&pin, 0, 512).unwrap(), [(BlockStatus::Data, 512)]);
        let error = source.status(&pin, 0, 256 << 20).unwrap_err();
        assert!(matches!(error.retry, Retry::Never), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        drop(source);
        server.join().unwrap();
    }

    /// Protects: the zeros of another file, which a server has that comes back after it was away
    /// when the disk was mounted, never count as zeros of the pinned one.
    #[test]
    fn nothing_is_believed_of_an_export_with_another_size() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = negotiate(&mut stream, 2 << 20);
        });
        let url = SourceUrl::parse(&format!("nbd://127.0.0.1:{port}/")).unwrap();
        let source = NbdSource::open(&url, &SourcesConfig::default()).unwrap();
        let pin = |size| Pin { size, validator: Validator::None, digest: None };
        let error = source.status(&pin(1 << 20), 0, 1 << 20).unwrap_err();
        assert!(matches!(error.retry, Retry::Changed), "{error}");
        let error = source.read(&pin(1 << 20), 0..4096, &mut |_| Ok(())).unwrap_err();
        assert!(matches!(error.retry, Retry::Changed), "{error}");
        let told = source.status(&pin(2 << 20), 0, 1 << 20).unwrap();
        assert_eq!(told, [(BlockStatus::Data, 1 << 20)]);
        drop(source);
        server.join().unwrap();
    }
}
