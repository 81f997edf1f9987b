//! A served disk whose keeper has died, and the keeper that goes on with it.
//!
//! ```text
//!  the serving process lives:    cordisk upgrade ─▶ a new keeper ─▶ PID.keeper: the descriptors
//!                                ─▶ the serving process flushes and ends ─▶ a successor
//!  a unit of systemd restarts:   the new main process ─▶ LISTEN_FDS: descriptors ─▶ a successor
//! ```
//! The new keeper needs descriptors and facts. The facts are what the keeper that has died has
//! written: in `PID.mount` beside the entry of the disk, or in a file in memory that the service
//! manager keeps with the descriptors (`FDSTORE=1` of sd_notify(3)). A living serving process reads
//! images and talks to clients, so it chooses nothing else than it could before: it gives the
//! descriptors, its jobs and the attributes of the disk's file. Its image must be the file that the
//! facts name, and its devices must be /dev/fuse.
//!
//! The witness of an image (`legacy.rs`) is opened anew if the serving process lives: that process
//! flushes before it ends, and so sees every failed write-back until then.
//!
//! **Touches:** the descriptors of the disk, `PID.mount`, the store of the service manager, the
//! list of mounts. **Never:** lets a successor start before the serving process has ended.
//! **Locks:** none.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::FdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use super::legacy::{Legacy, MOST_DEVICES};
use super::upgrade::PROTOCOL;
use super::wire::{Heirloom, KeptPast, KeptSession, LONGEST, LONGEST_JOBS, Name};
use crate::mount::HostMount;
use export::ShownAttributes;
use host::error::Context;
use host::storage::{MemoryFile, SharedBytes};
use host::{Error, ErrorKind, Result, packet};

/// The longest facts in bytes.
const LONGEST_FACTS: u64 = 512 << 10;
/// How long a serving process may take to end, once it was told to.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// How long a service manager may take to read the messages before a barrier.
const BARRIER_PATIENCE: Duration = Duration::from_secs(5);
/// The device of FUSE.
const DEVICE: &str = "/dev/fuse";

/// What the names of our descriptors in a store begin with.
const PREFIX: &str = "cordisk-";
const FACTS: &str = "cordisk-facts";
const SERVER: &str = "cordisk-server";

/// The variables by which a service manager hands descriptors over (sd_listen_fds(3)).
pub(super) const COUNT: &str = "LISTEN_FDS";
pub(super) const PROCESS: &str = "LISTEN_PID";
pub(super) const NAMES: &str = "LISTEN_FDNAMES";

/// What a keeper writes down for the next one.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Facts {
    /// [`PROTOCOL`].
    pub(super) protocol: u32,
    /// The arguments of the serving process, the subcommand first.
    pub(super) arguments: Vec<Name>,
    /// The directory of relative paths in them.
    pub(super) directory: Name,
    /// Where the disk is mounted: absolute, without symbolic links.
    pub(super) mountpoint: Name,
    /// `major:minor` of the mounted file system.
    pub(super) file_system: String,
    /// The source of the mount.
    pub(super) source: Name,
    /// The process id of the serving process.
    pub(super) server: Option<i32>,
    /// (device, inode) of the image; `None` if the disk is read-only.
    pub(super) image: Option<(u64, u64)>,
    /// (device, inode) of the backing files.
    pub(super) backing: Vec<(u64, u64)>,
    pub(super) session: KeptSession,
    pub(super) past: KeptPast,
    /// The number of completed streams for which the command of `--on-complete` was started.
    pub(super) told: u64,
}

/// A message of a serving process without a keeper.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Bequest {
    /// The message carries this descriptor.
    Descriptor(Heirloom),
    /// What the keeper that has died was not told: the jobs, and the attributes of the disk's file.
    Latest { jobs: Option<String>, attributes: Option<ShownAttributes> },
    /// There are no more.
    All,
    /// The serving process keeps the disk, for this reason.
    Refused(String),
}

/// A served disk without a keeper.
#[derive(Debug)]
pub struct Estate {
    facts: Facts,
    descriptors: Vec<(Heirloom, OwnedFd)>,
    server: FormerServer,
    /// Removed when the disk has its new keeper.
    leftovers: Vec<PathBuf>,
}

/// A disk that was taken over, and that no process serves now.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) legacy: Legacy,
    pub(super) mount: HostMount,
    pub(super) facts: Facts,
}

/// The serving process of an estate.
#[derive(Debug)]
enum FormerServer {
    /// It lives, and ends when it is told so over this connection. The second is its pidfd.
    Connected(OwnedFd, OwnedFd),
    /// The service manager has ended it, or does so now.
    Process(OwnedFd),
}

impl Estate {
    /// Gets the disk of a serving process that lives and has no keeper. `socket` is the one on
    /// which the keeper has listened.
    ///
    /// # Errors
    /// The serving process has ended, does not listen, or gives other files than the keeper has
    /// known. It serves on then.
    pub fn of_process(socket: &Path) -> Result<Estate> {
        let mut facts = Facts::beside(socket)?;
        let connection = super::upgrade::connect_to_orphan(socket)?;
        let server = facts.server.and_then(Pid::from_raw);
        let server = server.ok_or_else(|| wrong("the serving process is not known"))?;
        let process = rustix::process::pidfd_open(server, PidfdFlags::empty());
        let process = process.map_err(io::Error::from).context(|| "the serving process")?;
        let mut descriptors = Vec::new();
        loop {
            match packet::receive::<Bequest>(&connection, LONGEST)? {
                Some((Bequest::Descriptor(name), mut files)) => {
                    let file = files.pop().ok_or_else(|| wrong("a descriptor is missing"))?;
                    facts.check(name, &file)?;
                    descriptors.push((name, file));
                }
                Some((Bequest::Latest { jobs, attributes }, _)) => facts.learn(jobs, attributes),
                Some((Bequest::All, _)) => break,
                Some((Bequest::Refused(why), _)) => return Err(Error::new(ErrorKind::Busy, why)),
                None => return Err(wrong("the serving process has ended")),
            }
        }
        // The entry comes last: without it no later daemon would remove the others.
        let others = ["sock", "json"].map(|suffix| socket.with_extension(suffix));
        let leftovers = [socket.to_owned(), facts_beside(socket)].into_iter().chain(others);
        let server = FormerServer::Connected(connection, process);
        Ok(Estate { facts, descriptors, server, leftovers: leftovers.collect() })
    }

    /// Takes the disk at `mountpoint` out of the store of the service manager that has started this
    /// process; `None` if it has stored nothing of ours.
    ///
    /// # Errors
    /// The disk cannot be taken over: something is missing, or it is another one.
    pub fn of_manager(mountpoint: &Path) -> Result<Option<Estate>> {
        let stored = listed()?;
        if stored.is_empty() {
            return Ok(None);
        }
        let estate = Estate::of_store(stored)?;
        if !estate.is_at(mountpoint) {
            return Err(wrong("the service manager has stored that of another mountpoint"));
        }
        Ok(Some(estate))
    }

    fn of_store(stored: Vec<(String, OwnedFd)>) -> Result<Estate> {
        let (mut facts, mut server, mut descriptors) = (None, None, Vec::new());
        for (name, file) in stored {
            match name.as_str() {
                FACTS => facts = Some(read_facts(file)?),
                SERVER => server = Some(FormerServer::Process(file)),
                name => {
                    let what =
                        heirloom(name).ok_or_else(|| wrong(&format!("{name} is unknown")))?;
                    descriptors.push((what, file));
                }
            }
        }
        let facts: Facts = facts.ok_or_else(|| wrong("the facts are missing"))?;
        let server = server.ok_or_else(|| wrong("the serving process is missing"))?;
        descriptors.iter().try_for_each(|(what, file)| facts.check(*what, file))?;
        Ok(Estate { facts, descriptors, server, leftovers: Vec::new() })
    }

    fn is_at(&self, mountpoint: &Path) -> bool {
        let real = mountpoint
            .parent()
            .and_then(|parent| Some(parent.canonicalize().ok()?.join(mountpoint.file_name()?)));
        real.is_some_and(|real| Name::from(real.as_path()) == self.facts.mountpoint)
    }

    /// Whether the serving process lives, and goes on if no keeper takes the disk over.
    pub(super) fn has_server(&self) -> bool {
        matches!(self.server, FormerServer::Connected(..))
    }

    /// Waits until the serving process has ended, and takes the disk over: what a successor needs,
    /// and the mount.
    ///
    /// # Errors
    /// The serving process keeps the disk; the disk is not mounted any more; something is missing.
    pub(super) fn settle(self) -> Result<Settled> {
        let Estate { facts, mut descriptors, server, leftovers } = self;
        let mut legacy = Legacy::after(facts.past.clone());
        // The devices in their order; a witness that was kept follows its image.
        descriptors.sort_by_key(|(what, _)| what.order());
        for (what, file) in descriptors {
            legacy.keep(what, Some(file))?;
        }
        legacy.complete(facts.session.clone(), facts.image.is_none())?;
        legacy.has_ended();
        let mountpoint = PathBuf::from(facts.mountpoint.clone());
        let source = PathBuf::from(facts.source.clone());
        let adopt = || HostMount::adopt(mountpoint.clone(), &facts.file_system, &source);
        // Until the serving process has ended, the mount is its own: dropping it would detach it.
        std::mem::forget(adopt()?);
        server.end()?;
        // It may have been unmounted meanwhile.
        let mount = adopt()?;
        for path in leftovers {
            let _ = std::fs::remove_file(path);
        }
        Ok(Settled { legacy, mount, facts })
    }
}

impl Facts {
    /// Reads the facts beside the socket of a keeper. They are believed as this user is.
    ///
    /// # Errors
    /// There is no such file; it belongs to another user, or is of another protocol.
    pub(super) fn beside(socket: &Path) -> Result<Facts> {
        let path = facts_beside(socket);
        let what = || path.display().to_string();
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(&path).context(what)?;
        let metadata = file.metadata().context(what)?;
        if !metadata.is_file() || metadata.uid() != rustix::process::geteuid().as_raw() {
            let text =
                format!("{}: it belongs to user {}; ask as that user", what(), metadata.uid());
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let mut text = Vec::new();
        file.take(LONGEST_FACTS).read_to_end(&mut text).context(what)?;
        Facts::parse(&text).map_err(|error| error.context(what()))
    }

    fn parse(text: &[u8]) -> Result<Facts> {
        /// The only part that every version understands.
        #[derive(Deserialize)]
        struct Version {
            protocol: u32,
        }
        let failed = |error| Error::wrap(ErrorKind::InvalidArgument, "facts of the disk", error);
        let Version { protocol } = serde_json::from_slice(text).map_err(failed)?;
        if protocol != PROTOCOL {
            let text = format!(
                "its mount keeper has spoken protocol {protocol}, and this program speaks {PROTOCOL}"
            );
            return Err(Error::new(ErrorKind::UnsupportedFeature, text));
        }
        serde_json::from_slice(text).map_err(failed)
    }

    /// Takes what the serving process has told no keeper.
    fn learn(&mut self, jobs: Option<String>, attributes: Option<ShownAttributes>) {
        if let Some(jobs) = jobs.filter(|jobs| jobs.len() <= LONGEST_JOBS) {
            self.past.jobs = Some(jobs);
        }
        self.session.attributes = attributes.or(self.session.attributes);
    }

    fn to_text(&self) -> Result<Vec<u8>> {
        let text = serde_json::to_vec(self)
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "facts of the disk", error))?;
        if text.len() as u64 > LONGEST_FACTS - FRAME {
            return Err(wrong("too long"));
        }
        Ok(text)
    }

    /// Checks that a descriptor is what the keeper has known.
    fn check(&self, what: Heirloom, file: &OwnedFd) -> Result<()> {
        let stat = rustix::fs::fstat(file).map_err(io::Error::from).context(|| what.name())?;
        let is_right = match what {
            Heirloom::Image | Heirloom::Witness => self.image == Some((stat.st_dev, stat.st_ino)),
            // The successor checks the kind of file, and each record.
            Heirloom::Journal | Heirloom::Requests => true,
            Heirloom::Device(_) => {
                let device = rustix::fs::stat(DEVICE).map_err(io::Error::from);
                device.context(|| DEVICE)?.st_rdev == stat.st_rdev
            }
        };
        if is_right { Ok(()) } else { Err(wrong(&format!("{} is another file", what.name()))) }
    }
}

impl FormerServer {
    /// Makes the process end, and waits for it.
    fn end(self) -> Result<()> {
        match self {
            FormerServer::Connected(connection, process) => {
                packet::send(&connection, &"hand over", LONGEST, &[])?;
                super::upgrade::set_patience(&connection, super::upgrade::OUTCOME_PATIENCE)?;
                match packet::receive::<Bequest>(&connection, LONGEST)? {
                    // The end of a connection is not the end of the process.
                    None => wait_for_end(&process),
                    Some((Bequest::Refused(why), _)) => Err(Error::new(ErrorKind::Busy, why)),
                    Some(_) => Err(wrong("the serving process does not end")),
                }
            }
            FormerServer::Process(process) => {
                let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
                wait_for_end(&process)
            }
        }
    }
}

/// Waits until the serving process has ended with its last thread.
fn wait_for_end(process: &OwnedFd) -> Result<()> {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    let limit = Timespec { tv_sec: END_PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    match rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&limit))) {
        Ok(ready) if ready > 0 => Ok(()),
        _ => Err(wrong("the serving process does not end")),
    }
}

/// Returns the path of the facts, for the socket or the entry beside them.
fn facts_beside(path: &Path) -> PathBuf {
    path.with_extension("mount")
}

fn wrong(why: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("the disk cannot be taken over: {why}"))
}

impl Heirloom {
    /// The name in a store.
    fn name(self) -> String {
        match self {
            Heirloom::Image => format!("{PREFIX}image"),
            Heirloom::Witness => format!("{PREFIX}witness"),
            Heirloom::Journal => format!("{PREFIX}journal"),
            Heirloom::Device(number) => format!("{PREFIX}device-{number}"),
            Heirloom::Requests => format!("{PREFIX}requests"),
        }
    }

    /// The place in the order in which they are kept.
    fn order(self) -> usize {
        match self {
            Heirloom::Image => 0,
            Heirloom::Witness => 1,
            Heirloom::Journal => 2,
            Heirloom::Device(number) => number.saturating_add(3),
            Heirloom::Requests => usize::MAX,
        }
    }
}

fn heirloom(name: &str) -> Option<Heirloom> {
    [Heirloom::Image, Heirloom::Witness, Heirloom::Journal, Heirloom::Requests]
        .into_iter()
        .find(|what| what.name() == name)
        .or_else(|| {
            let number = name.strip_prefix(PREFIX)?.strip_prefix("device-")?;
            number.parse().ok().map(Heirloom::Device)
        })
}

/// Length of the facts before them in a file in memory, in bytes.
const FRAME: u64 = 8;

fn read_facts(file: OwnedFd) -> Result<Facts> {
    let file = MemoryFile::of_descriptor(file)?;
    let what = || "facts of the disk";
    let mut len = [0; FRAME as usize];
    file.read_at(0, &mut len).context(what)?;
    let len = u64::from_le_bytes(len);
    if len > file.size().saturating_sub(FRAME) {
        return Err(wrong("the facts are cut off"));
    }
    let mut text = vec![0; usize::try_from(len).map_err(|_| wrong("the facts are too long"))?];
    file.read_at(FRAME, &mut text).context(what)?;
    Facts::parse(&text)
}

/// Returns our descriptors among those that the service manager has handed over, by name. The
/// others are closed.
fn listed() -> Result<Vec<(String, OwnedFd)>> {
    let listed = sd_listen_fds::get();
    let listed = listed.map_err(|error| {
        Error::wrap(ErrorKind::InvalidArgument, "descriptors of the service manager", error)
    })?;
    let named = listed.into_iter().filter_map(|(name, file)| Some((name?, file.into_std())));
    named
        .filter(|(name, _)| name.starts_with(PREFIX))
        .map(|(name, file)| {
            let closed = rustix::io::fcntl_setfd(&file, FdFlags::CLOEXEC);
            closed.map_err(io::Error::from).context(|| name.clone())?;
            Ok((name, file))
        })
        .collect()
}

/// The facts where the next keeper finds them, as long as the disk is served.
#[derive(Debug, Default)]
pub(super) struct Testament {
    /// The directory of the entry, and the name of the file.
    place: Option<(OwnedFd, OsString)>,
    store: Option<Store>,
}

impl Testament {
    /// Writes the facts beside the entry `entry` in `directory` from now on.
    pub(super) fn beside(&mut self, directory: &OwnedFd, entry: &OsStr) {
        if let Ok(directory) = directory.try_clone() {
            self.place = Some((directory, facts_beside(Path::new(entry)).into_os_string()));
        }
    }

    /// Stores descriptors with the service manager at `socket` from now on. `legacy` has them all.
    pub(super) fn with_manager(&mut self, socket: UnixDatagram, legacy: &Legacy) {
        match Store::new(socket, legacy) {
            Ok(store) => self.store = Some(store),
            Err(error) => log::warn!("the service manager keeps no descriptors: {error}"),
        }
    }

    pub(super) fn is_stored(&self) -> bool {
        self.store.is_some()
    }

    /// Writes the facts. Failures cost a warning: the disk is served, and its keeper cannot be
    /// replaced.
    pub(super) fn write(&self, facts: &Facts) {
        let written = facts.to_text().and_then(|text| {
            if let Some((directory, name)) = &self.place {
                replace(directory, name, &text)?;
            }
            self.store.as_ref().map_or(Ok(()), |store| store.write(&text))
        });
        if let Err(error) = written {
            log::warn!("if this keeper dies, no other one takes its place: {error}");
            // Those of before would be taken for the present ones.
            if let Some((directory, name)) = &self.place {
                let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
            }
            if let Some(store) = &self.store {
                let _ = store.write(&[]);
            }
        }
    }

    /// A serving process has begun to live.
    pub(super) fn lives(&self, server: Pid) {
        if let Some(store) = &self.store
            && let Err(error) = store.replace_server(server)
        {
            log::warn!("the service manager does not know the serving process: {error}");
        }
    }
}

impl Drop for Testament {
    /// The disk is not served any more, or its keeper gives it up.
    fn drop(&mut self) {
        if let Some((directory, name)) = &self.place {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        }
        if let Some(store) = self.store.take() {
            store.clear();
        }
    }
}

/// Replaces a file in one step, so that no reader sees half of it.
fn replace(directory: &OwnedFd, name: &OsStr, text: &[u8]) -> Result<()> {
    let what = || name.display().to_string();
    let mut new = name.to_owned();
    new.push(".new");
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, &new, flags, Mode::RUSR | Mode::WUSR);
    let mut file = File::from(file.map_err(io::Error::from).context(what)?);
    let renamed = file
        .write_all(text)
        .and_then(|()| Ok(rustix::fs::renameat(directory, &new, directory, name)?));
    if renamed.is_err() {
        let _ = rustix::fs::unlinkat(directory, &new, AtFlags::empty());
    }
    renamed.context(what)
}

/// The store of a service manager.
#[derive(Debug)]
struct Store {
    socket: UnixDatagram,
    facts: MemoryFile,
    names: Vec<String>,
}

impl Store {
    /// Stores all descriptors, and a file for the facts.
    fn new(socket: UnixDatagram, legacy: &Legacy) -> Result<Store> {
        let facts = MemoryFile::new(LONGEST_FACTS)?;
        let mut store = Store { socket, facts, names: Vec::new() };
        let filled = store.fill(legacy);
        if filled.is_err() {
            store.clear();
        }
        filled.map(|()| store)
    }

    /// The facts come last: without them the rest is not used.
    fn fill(&mut self, legacy: &Legacy) -> Result<()> {
        for (what, file) in legacy.descriptors() {
            self.add(&what.name(), file)?;
        }
        // A keeper before this one may have stored its own.
        self.send(FACTS, "FDSTOREREMOVE=1", &[])?;
        let facts = self.facts.as_fd().try_clone_to_owned().context(|| FACTS)?;
        self.add(FACTS, facts.as_fd())?;
        self.names.push(SERVER.to_owned());
        Ok(())
    }

    fn add(&mut self, name: &str, file: BorrowedFd<'_>) -> Result<()> {
        self.send(name, "FDSTORE=1\nFDPOLL=0", &[file])?;
        self.names.push(name.to_owned());
        Ok(())
    }

    fn replace_server(&self, server: Pid) -> Result<()> {
        let process = rustix::process::pidfd_open(server, PidfdFlags::empty());
        let process = process.map_err(io::Error::from).context(|| SERVER)?;
        self.send(SERVER, "FDSTOREREMOVE=1", &[])?;
        self.send(SERVER, "FDSTORE=1\nFDPOLL=0", &[process.as_fd()])
    }

    fn send(&self, name: &str, what: &str, files: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_text(&format!("{what}\nFDNAME={name}"), files).context(|| name.to_owned())
    }

    fn send_text(&self, text: &str, files: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(files));
        }
        let sent = rustix::io::retry_on_intr(|| {
            let data = [IoSlice::new(text.as_bytes())];
            rustix::net::sendmsg(&self.socket, &data, &mut control, SendFlags::NOSIGNAL)
        });
        sent.map(drop).map_err(io::Error::from).context(|| "the service manager")
    }

    fn write(&self, text: &[u8]) -> Result<()> {
        // One write(2) of a few pages: a keeper that is killed in it leaves the facts before, those
        // after, or a text that is not JSON.
        let len = (text.len() as u64).to_le_bytes();
        let framed = [&len, text].concat();
        self.facts.write_at(0, &framed).context(|| FACTS)
    }

    /// Removes everything, and waits until the manager has closed it: the last duplicate of the
    /// image holds its locks.
    fn clear(&self) {
        // A manager that does not read would make each message wait.
        let removed =
            self.names.iter().try_for_each(|name| self.send(name, "FDSTOREREMOVE=1", &[]));
        if let Err(error) = removed.and_then(|()| self.barrier()) {
            log::debug!("the service manager: {error}");
        }
    }

    /// Waits until the manager has read all messages before (`BARRIER=1` of sd_notify(3)): it
    /// closes the pipe then.
    fn barrier(&self) -> Result<()> {
        let what = || "a barrier";
        let pipe = rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
        let (end, begin) = pipe.map_err(io::Error::from).context(what)?;
        self.send_text("BARRIER=1", &[begin.as_fd()])?;
        drop(begin);
        let mut polled = [PollFd::new(&end, PollFlags::empty())];
        let limit = Timespec { tv_sec: BARRIER_PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&limit)))
            .map(drop)
            .map_err(io::Error::from)
            .context(what)
    }
}

/// Removes from the store of the service manager what a keeper before this one has stored, and
/// waits until it is closed.
pub(super) fn clear_store(socket: UnixDatagram) {
    let Ok(facts) = MemoryFile::new(FRAME) else { return };
    let devices = (0..MOST_DEVICES).map(Heirloom::Device);
    let others = [Heirloom::Image, Heirloom::Witness, Heirloom::Journal, Heirloom::Requests];
    let names = others.into_iter().chain(devices).map(Heirloom::name);
    let names = names.chain([FACTS.to_owned(), SERVER.to_owned()]).collect();
    Store { socket, facts, names }.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_a_store_lead_back() {
        for what in [
            Heirloom::Image,
            Heirloom::Witness,
            Heirloom::Journal,
            Heirloom::Device(0),
            Heirloom::Device(17),
            Heirloom::Requests,
        ] {
            assert_eq!(heirloom(&what.name()), Some(what));
        }
        for other in ["cordisk-device-", "cordisk-device-x", "image", "cordisk-", "device-1"] {
            assert_eq!(heirloom(other), None, "{other}");
        }
    }
}
