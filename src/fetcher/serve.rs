//! The fetcher's side of the line: requests come from the socket, replies go to it through a thread
//! of their own, so that a fetcher with much to say still listens.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;
use rustix::io::Errno;

use host::storage::{MemoryFile, SharedBytes as _};
use host::{Error, ErrorKind, Result, packet};
use remote::cache::{CacheDirectory, CacheObject};
use remote::pin::{Pin, Validator, cache_key};
use remote::sums::ChunkList;
use remote::url::SourceUrl;
use remote::wire::{FetchFailure, FetchReply, FetchRequest, LONGEST};

use crate::beside;
use crate::config::SourcesConfig;
use crate::download::{Download, DownloadParts};
use crate::health::retried;
use crate::permissions::Permissions;
use crate::source::{RemoteSource, Retry};
use crate::space::{SpaceMaker, full, report};

/// How often new bytes of the cache are made durable. A process that is killed loses at most what
/// it has fetched in this time.
const COMMIT_EVERY: Duration = Duration::from_secs(10);

/// After how many commits the cache is pruned to its limit.
const COMMITS_PER_PRUNE: u32 = 6;

/// The most records of the log that wait for the socket; further ones are dropped. No process reads
/// the socket while no thread of it waits for a reply.
const MOST_RECORDS: usize = 256;

/// A file that could not be opened again is tried again when a range of it is wanted, after this
/// time.
const OPEN_AGAIN: Duration = Duration::from_secs(1);

/// How long the open of a file waits for its server: to confirm the pin, or to answer at all.
const LONGEST_LOOK: Duration = Duration::from_secs(5);

/// The place of the bytes that were fetched.
#[derive(Debug)]
pub enum CacheChoice {
    /// A directory that all disks of the host share.
    Shared(CacheDirectory),
    /// Files without a name in this directory, which end with the process (`--cache none`).
    None {
        /// The directory.
        directory: PathBuf,
    },
}

impl CacheChoice {
    /// The directory in which files are made.
    pub fn path(&self) -> &Path {
        match self {
            CacheChoice::Shared(directory) => directory.path(),
            CacheChoice::None { directory } => directory,
        }
    }
}

/// A reply, with the descriptors that it carries.
type Answer = (FetchReply, Vec<OwnedFd>);

/// An open file, or the reason why it is not open.
enum Slot {
    /// Requests that came while the file is being opened.
    Opening(Vec<FetchRequest>),
    Open(Arc<Download>),
    Failed {
        failure: FetchFailure,
        /// The request that has failed, and when.
        open: FetchRequest,
        at: Instant,
    },
}

/// The open files of one line.
pub struct Fetcher {
    config: SourcesConfig,
    cache: Arc<CacheChoice>,
    space: Arc<SpaceMaker>,
    permissions: Permissions,
    answers: Sender<Answer>,
    replies: Sender<FetchReply>,
    files: Mutex<BTreeMap<u32, Slot>>,
}

/// The line of a fetcher, whose standard input is the socket.
///
/// # Errors
/// Standard input is not a socket of another process of this program.
pub fn line_of(input: BorrowedFd<'_>) -> Result<OwnedFd> {
    let kind = rustix::net::sockopt::socket_type(input);
    if kind != Ok(rustix::net::SocketType::SEQPACKET) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "standard input is not the socket of a process that asks: cordisk starts this program",
        ));
    }
    input.try_clone_to_owned().map_err(|error| Error::io("standard input", error))
}

/// Answers every request with the error that prevents to serve it.
///
/// # Errors
/// The socket fails.
pub fn refuse_all(socket: &OwnedFd, error: &Error, log: &LineLog) -> Result<()> {
    log.send(socket);
    while let Some((request, _)) = next_request(socket)? {
        if let Some(id) = request.id() {
            let failure = FetchFailure { kind: error.kind(), text: error.to_string() };
            packet::send(socket, &FetchReply::Failed { id, failure }, LONGEST, &[])?;
        }
    }
    Ok(())
}

/// Serves the line until its other end is closed.
///
/// # Errors
/// The socket fails.
pub fn serve(
    socket: OwnedFd,
    config: SourcesConfig,
    cache: CacheChoice,
    permissions: Permissions,
    log: LineLog,
) -> Result<()> {
    // Before the reply to the first request: the process that asks may read nothing after it.
    log.send(&socket);
    let socket = Arc::new(socket);
    let (answers, to_send) = unbounded::<Answer>();
    let (replies, plain) = unbounded::<FetchReply>();
    let sender = Arc::clone(&socket);
    spawn("fetch-reply", move || {
        send_all(&sender, &to_send, &plain, &log.0);
        // The other process finds the socket closed, and starts another fetcher.
        let _ = rustix::net::shutdown(&*sender, rustix::net::Shutdown::Both);
    })?;
    let cache = Arc::new(cache);
    let space = SpaceMaker::new(&cache);
    let files = Mutex::new(BTreeMap::new());
    let fetcher = Arc::new(Fetcher { config, cache, space, permissions, answers, replies, files });
    let committer = Arc::clone(&fetcher);
    spawn("fetch-commit", move || {
        loop {
            for _ in 0..COMMITS_PER_PRUNE {
                std::thread::sleep(COMMIT_EVERY);
                committer.commit();
            }
            if let Err(error) = committer.prune() {
                log::warn!("{error}");
            }
        }
    })?;
    while let Some((request, memory)) = next_request(&socket)? {
        fetcher.take(request, memory);
    }
    fetcher.commit();
    Ok(())
}

/// Receives the next request, and the memory that it carries; `None` if the other end is closed,
/// also with replies that it has not read.
fn next_request(socket: &OwnedFd) -> Result<Option<(FetchRequest, Option<OwnedFd>)>> {
    match packet::receive::<FetchRequest>(socket.as_fd(), LONGEST) {
        Err(error) if error.errno() == Some(Errno::CONNRESET.raw_os_error()) => Ok(None),
        received => Ok(received?.map(|(request, memory)| (request, memory.into_iter().next()))),
    }
}

/// What this process has logged and not sent yet.
#[derive(Debug)]
pub struct LineLog(Receiver<FetchReply>);

impl LineLog {
    /// Starts the log of this process.
    pub fn start() -> LineLog {
        let (records, to_log) = bounded::<FetchReply>(MOST_RECORDS);
        log::set_max_level(log::LevelFilter::Info);
        let _ = log::set_boxed_logger(Box::new(Records(records)));
        LineLog(to_log)
    }

    /// Sends what was logged so far, as far as the socket has space.
    fn send(&self, socket: &OwnedFd) {
        for record in self.0.try_iter() {
            if matches!(packet::try_send(socket, &record, LONGEST, &[]), Ok(false)) {
                return;
            }
        }
    }
}

/// The log of the fetcher: its records go to the serving process.
struct Records(Sender<FetchReply>);

impl log::Log for Records {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        // Records of libraries may contain whole URLs, and so signatures. The names of this
        // program's crates begin with this.
        metadata.target().starts_with("cordisk_")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let text = host::error::one_line(&record.args().to_string());
            let _ = self.0.try_send(FetchReply::Log(record.level() as usize, text));
        }
    }

    fn flush(&self) {}
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map(drop)
        .map_err(|error| Error::io("fetcher: starting a thread", error))
}

/// Sends replies until the socket ends.
fn send_all(
    socket: &OwnedFd,
    answers: &Receiver<Answer>,
    replies: &Receiver<FetchReply>,
    records: &Receiver<FetchReply>,
) {
    loop {
        let (reply, descriptors) = crossbeam_channel::select! {
            recv(answers) -> answer => match answer { Ok(answer) => answer, Err(_) => return },
            recv(replies) -> reply => match reply { Ok(reply) => (reply, Vec::new()), Err(_) => return },
            recv(records) -> record => match record { Ok(record) => (record, Vec::new()), Err(_) => return },
        };
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let sent = match packet::send(socket, &reply, LONGEST, &borrowed) {
            Err(error) if error.kind() == ErrorKind::InvalidArgument => {
                packet::send(socket, &shorter(reply, &error), LONGEST, &[])
            }
            sent => sent,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// What is sent instead of a reply that is too long for a message.
fn shorter(reply: FetchReply, error: &Error) -> FetchReply {
    /// A text of so many characters fits, whatever they are.
    const FITS: usize = 1024;
    let shorten = |text: String| text.chars().take(FITS).collect::<String>();
    match reply {
        FetchReply::Failed { id, failure: FetchFailure { kind, text } } => {
            FetchReply::Failed { id, failure: FetchFailure { kind, text: shorten(text) } }
        }
        FetchReply::Log(level, text) => FetchReply::Log(level, shorten(text)),
        FetchReply::Opened { id, .. }
        | FetchReply::Have { id }
        | FetchReply::Facts { id, .. }
        | FetchReply::Content { id, .. }
        | FetchReply::Written { id } => {
            let failure = FetchFailure { kind: ErrorKind::Io, text: error.to_string() };
            FetchReply::Failed { id, failure }
        }
    }
}

impl Fetcher {
    fn commit(&self) {
        let open: Vec<_> = self
            .files
            .lock()
            .values()
            .filter_map(|slot| match slot {
                Slot::Open(download) => Some(Arc::clone(download)),
                _ => None,
            })
            .collect();
        for download in open {
            if let Err(error) = download.commit() {
                log::warn!("{error}");
            }
        }
    }

    fn prune(&self) -> Result<()> {
        if let CacheChoice::Shared(directory) = &*self.cache {
            report(&directory.prune_to_limit()?);
        }
        Ok(())
    }

    /// Takes a request, and the memory that it carries; never waits for a server.
    fn take(self: &Arc<Self>, request: FetchRequest, memory: Option<OwnedFd>) {
        let file = match &request {
            FetchRequest::Open { file, .. } => {
                self.files.lock().insert(*file, Slot::Opening(Vec::new()));
                self.open(request);
                return;
            }
            FetchRequest::Facts { id } => {
                self.facts(*id);
                return;
            }
            FetchRequest::ReadBeside { .. } | FetchRequest::WriteOrder { .. } => {
                self.read_or_write(request, memory);
                return;
            }
            FetchRequest::Want { file, .. }
            | FetchRequest::WillNeed { file, .. }
            | FetchRequest::Enough { file }
            | FetchRequest::Done { file, .. } => *file,
        };
        let mut files = self.files.lock();
        let download = match files.get_mut(&file) {
            Some(Slot::Open(download)) => Arc::clone(download),
            Some(Slot::Opening(later)) => {
                later.push(request);
                return;
            }
            Some(Slot::Failed { failure, open, at }) => {
                let is_wanted = matches!(request, FetchRequest::Want { .. });
                if is_wanted && at.elapsed() >= OPEN_AGAIN {
                    let open = open.clone();
                    files.insert(file, Slot::Opening(vec![request]));
                    drop(files);
                    self.open(open);
                } else {
                    self.refuse(&request, failure.clone());
                }
                return;
            }
            None => {
                let text = format!("the fetcher has no file with the number {file}");
                self.refuse(&request, FetchFailure { kind: ErrorKind::Io, text });
                return;
            }
        };
        drop(files);
        pass(&download, request);
    }

    fn refuse(&self, request: &FetchRequest, failure: FetchFailure) {
        if let FetchRequest::Want { id, .. } = request {
            let _ = self.replies.send(FetchReply::Failed { id: *id, failure });
        }
    }

    fn facts(&self, id: u64) {
        let open: Vec<_> = self
            .files
            .lock()
            .iter()
            .filter_map(|(number, slot)| match slot {
                Slot::Open(download) => Some((*number, Arc::clone(download))),
                _ => None,
            })
            .collect();
        let files = open.iter().map(|(number, download)| (*number, download.facts())).collect();
        let _ = self.replies.send(FetchReply::Facts { id, files });
    }

    /// Reads or writes a small file on a thread of its own, because a server may take its time.
    fn read_or_write(self: &Arc<Self>, request: FetchRequest, memory: Option<OwnedFd>) {
        let Some(id) = request.id() else { return };
        let this = Arc::clone(self);
        let started = spawn("fetch-beside", move || {
            let answer = match request {
                FetchRequest::ReadBeside { url, longest, patience, .. } => {
                    this.read_beside(id, &url, longest, patience.map(Duration::from_millis))
                }
                FetchRequest::WriteOrder { url, len, patience, .. } => {
                    this.write_order(id, &url, memory, len, Duration::from_millis(patience))
                }
                _ => return,
            };
            this.answer(id, answer);
        });
        if let Err(error) = started {
            self.answer(id, Err(error));
        }
    }

    fn answer(&self, id: u64, answer: Result<Answer>) {
        let answer = answer.unwrap_or_else(|error| {
            let failure = FetchFailure { kind: error.kind(), text: error.to_string() };
            (FetchReply::Failed { id, failure }, Vec::new())
        });
        let _ = self.answers.send(answer);
    }

    fn read_beside(
        &self,
        id: u64,
        url: &str,
        longest: u64,
        patience: Option<Duration>,
    ) -> Result<Answer> {
        let url = SourceUrl::parse(url)?;
        self.permissions.check_beside(&url)?;
        let source = self.source(&url)?;
        let bytes = beside::read_whole(&url, &*source, longest, soon(patience))?;
        let memory = MemoryFile::new(bytes.len() as u64)?;
        memory.write_at(0, &bytes).map_err(|error| Error::io(url.to_string(), error))?;
        let memory = memory.as_fd().try_clone_to_owned();
        let memory = memory.map_err(|error| Error::io(url.to_string(), error))?;
        Ok((FetchReply::Content { id, len: bytes.len() as u64 }, vec![memory]))
    }

    fn write_order(
        &self,
        id: u64,
        url: &str,
        memory: Option<OwnedFd>,
        len: u64,
        patience: Duration,
    ) -> Result<Answer> {
        let order = self.permissions.order_beside(&SourceUrl::parse(url)?)?;
        let source = self.source(&order)?;
        let deadline = Instant::now().checked_add(patience);
        beside::write_order(&order, &*source, memory, len, deadline)?;
        Ok((FetchReply::Written { id }, Vec::new()))
    }

    /// Opens a file on a thread of its own, because a server may take its time.
    fn open(self: &Arc<Self>, request: FetchRequest) {
        let this = Arc::clone(self);
        let of_thread = request.clone();
        let started = spawn("fetch-open", move || {
            let FetchRequest::Open { url, pin, unpinned, digest, patience, .. } = of_thread.clone()
            else {
                return;
            };
            let patience = patience.map(Duration::from_millis);
            let opened = this.open_file(&url, pin, unpinned, digest, patience);
            this.opened(of_thread, opened);
        });
        if let Err(error) = started {
            self.opened(request, Err(error));
        }
    }

    /// Answers a request to open a file, and the requests that have come meanwhile.
    fn opened(&self, open: FetchRequest, opened: Result<(Arc<Download>, Vec<OwnedFd>)>) {
        let FetchRequest::Open { id, file, .. } = open else { return };
        let mut files = self.files.lock();
        let later = match files.remove(&file) {
            Some(Slot::Opening(later)) => later,
            _ => Vec::new(),
        };
        match opened {
            Ok((download, descriptors)) => {
                // The answer goes first: after "have" the other process looks at these files.
                let pin = download.pin().clone();
                let _ = self.answers.send((FetchReply::Opened { id, pin }, descriptors));
                files.insert(file, Slot::Open(Arc::clone(&download)));
                drop(files);
                later.into_iter().for_each(|request| pass(&download, request));
            }
            Err(error) => {
                let failure = FetchFailure { kind: error.kind(), text: error.to_string() };
                let slot = Slot::Failed { failure: failure.clone(), open, at: Instant::now() };
                files.insert(file, slot);
                drop(files);
                later.iter().for_each(|request| self.refuse(request, failure.clone()));
                let _ = self.replies.send(FetchReply::Failed { id, failure });
            }
        }
    }

    fn open_file(
        &self,
        url: &str,
        pin: Option<Pin>,
        unpinned: bool,
        digest: Option<String>,
        patience: Option<Duration>,
    ) -> Result<(Arc<Download>, Vec<OwnedFd>)> {
        let url = SourceUrl::parse(url)?;
        self.permissions.check(&url)?;
        let deadline = soon(patience);
        let source: Arc<dyn RemoteSource> = self.source(&url)?.into();
        let pin = match pin {
            Some(pin) => known(&url, &source, pin, patience)?,
            // A chunk list is more than any identity that a server could give.
            None => self.look(&url, &*source, unpinned || digest.is_some(), deadline)?,
        };
        let pin = Pin { digest: digest.or(pin.digest.clone()), ..pin };
        let cache = self.cache_of(&url, &pin)?;
        let sums = match &pin.digest {
            Some(digest) => Some(self.chunk_list(&url, &pin, digest, deadline)?),
            None => None,
        };
        let (data, map) = cache.files_for_reader()?;
        let parts = DownloadParts {
            name: url.to_string(),
            source,
            pin,
            cache,
            sums,
            keeps_nothing: matches!(&*self.cache, CacheChoice::None { .. }),
            patience,
            make_space: self.space.maker(),
        };
        let download = Download::new(parts, self.replies.clone());
        Ok((download, vec![data, map]))
    }

    fn source(&self, url: &SourceUrl) -> Result<Box<dyn RemoteSource>> {
        crate::open(url, &self.config)
            .map_err(|error| Error::new(ErrorKind::InvalidArgument, error.to_string()))
    }

    /// Asks for size and identity, again and again until `deadline`.
    fn look(
        &self,
        url: &SourceUrl,
        source: &dyn RemoteSource,
        unpinned: bool,
        deadline: Option<Instant>,
    ) -> Result<Pin> {
        let pin = retried(url, source, deadline, || source.look())?;
        let needs_none = matches!(
            url.scheme(),
            remote::url::Scheme::Nbd | remote::url::Scheme::Nbds | remote::url::Scheme::NbdUnix
        );
        if pin.validator == Validator::None && !unpinned && !needs_none {
            return Err(Error::new(
                ErrorKind::UnsupportedFeature,
                format!(
                    "{url}: the server gives the file no strong identity (ETag), so a change of it would not be seen: pass --unpinned if it never changes, or --base-digest"
                ),
            ));
        }
        Ok(pin)
    }

    fn cache_of(&self, url: &SourceUrl, pin: &Pin) -> Result<CacheObject> {
        match &*self.cache {
            CacheChoice::Shared(directory) => {
                report(&directory.prune_to_limit()?);
                loop {
                    let asked = Instant::now();
                    match directory.object(url, pin) {
                        Err(error) if error.kind() == ErrorKind::NoSpace => {
                            if !self.space.make(asked)? {
                                return Err(full(&error));
                            }
                        }
                        other => return other,
                    }
                }
            }
            CacheChoice::None { directory } => CacheObject::anonymous(directory, pin.size),
        }
    }

    /// The chunk list of a file: from the cache, which has it since the first open, so that no
    /// server needs to answer; otherwise from beside the file.
    fn chunk_list(
        &self,
        url: &SourceUrl,
        pin: &Pin,
        digest: &str,
        deadline: Option<Instant>,
    ) -> Result<ChunkList> {
        let kept = match &*self.cache {
            CacheChoice::Shared(directory) => {
                Some(directory.path().join(format!("{}.sums", cache_key(url, pin))))
            }
            CacheChoice::None { .. } => None,
        };
        // A list that is damaged or half written has another digest.
        let known = kept
            .as_ref()
            .and_then(|path| std::fs::read(path).ok())
            .and_then(|bytes| ChunkList::parse(&bytes).ok())
            .filter(|list| list.digest() == digest && list.size() == pin.size);
        if let Some(list) = known {
            return Ok(list);
        }
        let list = self.fetch_chunk_list(url, pin, digest, deadline)?;
        if let Some(path) = kept
            && let Err(error) = std::fs::write(&path, list.to_bytes())
        {
            log::warn!("{}: {}", path.display(), host::error::os_text(&error));
        }
        Ok(list)
    }

    /// Fetches the chunk list that lies beside the file.
    fn fetch_chunk_list(
        &self,
        url: &SourceUrl,
        pin: &Pin,
        digest: &str,
        deadline: Option<Instant>,
    ) -> Result<ChunkList> {
        let beside = url.beside(".cordisk-sums")?;
        // A digest of 32 bytes for each chunk, and a header.
        let longest = pin.size.div_ceil(remote::sums::CHUNK) * 32 + 4096;
        let source = self.source(&beside)?;
        let list = beside::read_whole(&beside, &*source, longest, deadline)?;
        let list = ChunkList::parse(&list)
            .map_err(|error| Error::new(error.kind(), format!("{beside}: {error}")))?;
        if list.digest() != digest || list.size() != pin.size {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{beside}: is not the chunk list with the digest sha256:{digest}"),
            ));
        }
        Ok(list)
    }
}

/// The deadline of what a user waits for, and can repeat.
fn soon(patience: Option<Duration>) -> Option<Instant> {
    patience.map(|patience| Instant::now() + patience.min(LONGEST_LOOK))
}

/// Looks whether a pinned file is still the one that it is pinned to. A server that does not
/// answer, or not soon, is no obstacle: the cache may have all that is needed.
fn known(
    url: &SourceUrl,
    source: &Arc<dyn RemoteSource>,
    pin: Pin,
    patience: Option<Duration>,
) -> Result<Pin> {
    let (found, looked) = bounded(1);
    let of_thread = Arc::clone(source);
    spawn("fetch-look", move || drop(found.send(of_thread.look())))?;
    let wait = patience.map_or(LONGEST_LOOK, |patience| (patience / 2).min(LONGEST_LOOK));
    match looked.recv_timeout(wait) {
        Ok(Ok(now)) if is_same(&pin, &now) => return Ok(pin),
        Ok(Ok(_)) => {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{url}: is not the file that the disk was made with (another size or identity): bring the old one back, or make a new overlay"
                ),
            ));
        }
        Ok(Err(error)) if matches!(error.retry, Retry::Changed) => {
            let text = error.about(&url.to_string());
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        Ok(Err(error)) => {
            let error = error.about(&url.to_string());
            log::warn!("{error}; what the cache holds can be read all the same");
        }
        Err(_) => log::warn!(
            "{url}: the server has not answered yet; what the cache holds can be read all the same"
        ),
    }
    Ok(pin)
}

fn is_same(pin: &Pin, now: &Pin) -> bool {
    pin.size == now.size && (pin.validator == Validator::None || pin.validator == now.validator)
}

/// Passes a request to an open file.
fn pass(download: &Arc<Download>, request: FetchRequest) {
    match request {
        FetchRequest::Want { id, offset, len, patience, background, .. } => {
            let patience = patience.map(Duration::from_millis);
            download.want(id, offset..offset.saturating_add(len), patience, background);
        }
        FetchRequest::WillNeed { offset, len, need, .. } => download.will_need(offset, len, need),
        FetchRequest::Enough { .. } => download.enough(),
        FetchRequest::Done { offset, len, .. } => download.done(offset, len),
        // These name no open file.
        FetchRequest::Open { .. }
        | FetchRequest::Facts { .. }
        | FetchRequest::ReadBeside { .. }
        | FetchRequest::WriteOrder { .. } => {}
    }
}

#[cfg(test)]
mod tests;
