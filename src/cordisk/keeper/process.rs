//! What the keeper does at the request of the serving process.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags};

use super::estate::{self, Facts, Settled, Testament};
use super::hook::Hook;
use super::learned::LearnedOrder;
use super::legacy::Legacy;
use super::looks::Looks;
use super::manager::{self, ManagerSocket, Relay};
use super::serving::Alive;
use super::upgrade::{PROTOCOL, Programs, UpgradeSocket};
use super::wire::{
    self, Heirloom, KeeperAnswer, KeeperFailure, KeeperReply, KeeperRequest, Leftover, Numbered,
};
use crate::fetching::{Credentials, FetcherPlan, Fetchers};
use crate::logging::{self, Owners};
use crate::mount::{HostMount, Unmounted};
use host::attributes::{LONGEST_STREAM_NOTE, OPEN_MARK, STREAM_NOTE};
use host::error::Context;
use host::{Error, ErrorKind, Result};
use remote::line::StartedFetcher;

/// The state of the keeper.
#[derive(Debug, Default)]
pub(super) struct Kept {
    files: Vec<KeptFile>,
    /// The image whose two attributes the keeper may change.
    image: Option<OwnedFd>,
    hook: Option<Hook>,
    /// The number of completed streams for which the command of `hook` was started.
    told: u64,
    fetcher: Option<FetcherPlan>,
    fetchers: Fetchers,
    credentials: Credentials,
    /// The service manager, if there is one.
    manager: Option<ManagerSocket>,
    pub(super) relay: Option<Relay>,
    /// /dev/null, with which standard output and error are replaced.
    null: Option<OwnedFd>,
    /// (device, inode) of the backing files.
    backing: Vec<(u64, u64)>,
    looks: Looks,
    /// The path of the log file, and the users that may own it.
    log: Option<(PathBuf, Owners)>,
    /// Where the order goes that the disk may leave.
    learned: Option<LearnedOrder>,
    /// True once a mount was made: the keeper accepts no further file, command or mount.
    sealed: bool,
    pub(super) mount: Option<HostMount>,
    /// What a successor of the serving process needs.
    pub(super) legacy: Legacy,
    /// Where signals are passed on.
    pub(super) alive: Arc<Mutex<Alive>>,
    /// How serving processes are started.
    programs: Programs,
    /// Where `cordisk upgrade` asks for another program.
    pub(super) upgrades: Option<UpgradeSocket>,
    /// The directory of relative paths in the arguments.
    pub(super) directory: PathBuf,
    /// What another keeper needs, if this one dies.
    pub(super) testament: Testament,
    /// Whether no caller waits for "ready" from the serving process that it has started.
    pub(super) has_left_console: bool,
    is_read_only: bool,
}

/// A file that is removed at the end. It is found through the directory that was opened when the
/// file was entrusted. By the end its path may lead elsewhere, if a directory on the way belongs to
/// another user.
#[derive(Debug)]
struct KeptFile {
    what: Leftover,
    /// The path at the time of the request, for messages.
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    /// (device, inode).
    identity: (u64, u64),
}

impl KeptFile {
    fn find(what: Leftover, path: PathBuf, identity: (u64, u64)) -> Result<KeptFile> {
        let context = || path.display().to_string();
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{}: not a file name", context()),
            ));
        };
        let directory = rustix::fs::open(
            parent,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let directory = directory.map_err(io::Error::from).context(context)?;
        let name = name.to_owned();
        Ok(KeptFile { what, path, directory, name, identity })
    }

    /// Removes the file if it still has the (device, inode) that was named.
    fn remove(self) -> Result<()> {
        match self.what {
            Leftover::Socket => control::remove_socket(&self.directory, &self.name, self.identity)
                .context(|| format!("removing QMP socket {}", self.path.display())),
            Leftover::Pidfile | Leftover::Entry => {
                let there =
                    rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW);
                let ours = there.is_ok_and(|there| (there.st_dev, there.st_ino) == self.identity);
                let removed = if ours {
                    rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty())
                } else {
                    Ok(())
                };
                removed
                    .map_err(io::Error::from)
                    .context(|| format!("removing {}", self.path.display()))
            }
        }
    }
}

/// Answers requests from `socket` until the serving process has ended, or has shut the socket down.
/// Each reply takes the `records` of the log along.
///
/// # Errors
/// The other side has sent something that is not a request.
pub(super) fn serve(
    kept: &mut Kept,
    socket: impl AsFd,
    records: &Receiver<(usize, String)>,
) -> Result<()> {
    while let Some((Numbered { number, message }, descriptor)) =
        wire::receive::<Numbered<KeeperRequest>>(&socket)?
    {
        let (result, descriptor) = match kept.answer(message, descriptor) {
            Ok((answer, descriptor)) => (Ok(answer), descriptor),
            Err(error) => (Err(KeeperFailure::from(error.explain_limit())), None),
        };
        let reply =
            Numbered { number, message: KeeperReply { log: records.try_iter().collect(), result } };
        // The keeper's copy of /dev/fuse is closed here. The serving process gives the keeper all
        // descriptors of the session back if a successor can take it over.
        let sent = wire::send(&socket, &reply, descriptor.as_ref().map(AsFd::as_fd));
        if sent.is_err() {
            break;
        }
    }
    Ok(())
}

impl Kept {
    /// Nothing is named or mounted yet. `null` is /dev/null.
    pub(super) fn new(
        credentials: Credentials,
        manager: Option<ManagerSocket>,
        null: OwnedFd,
        programs: Programs,
    ) -> Kept {
        let fetchers = Fetchers::hiding(&manager::VARIABLES);
        Kept { credentials, fetchers, manager, null: Some(null), programs, ..Kept::default() }
    }

    /// Decides whether a serving process that has ended has a successor.
    pub(super) fn has_successor(&mut self, status: ExitStatus) -> bool {
        let is_mounted = self.mount.is_some();
        let why = || format!("the new program ended before it served ({status})");
        if !self.legacy.is_served() && self.programs.revert(why) {
            self.legacy.forget_failures();
        }
        self.legacy.has_successor(status, is_mounted) && self.has_left_console
    }

    /// Decides whether another successor is started after one could not be.
    pub(super) fn cannot_start(&mut self, error: &Error) -> bool {
        if self.programs.revert(|| error.to_string()) {
            self.legacy.forget_failures();
            return true;
        }
        self.legacy.try_again()
    }

    /// Says why the disk that the service manager has stored is not gone on with, and makes it let
    /// go of the image and of the old mount, so that the disk can be mounted anew.
    pub(super) fn decline_estate(&mut self, error: &Error) {
        log::warn!("{error}: the disk is mounted anew");
        if let Some(manager) = self.manager.as_ref().and_then(|manager| manager.try_clone().ok()) {
            estate::clear_store(manager.into_socket());
        }
    }

    /// Lets a successor name what the process that has died had named.
    pub(super) fn begin_again(&mut self) {
        self.sealed = false;
        self.image = None;
        if let Some(relay) = self.relay.take() {
            relay.finish();
        }
    }

    fn answer(
        &mut self,
        request: KeeperRequest,
        descriptor: Option<OwnedFd>,
    ) -> Result<(KeeperAnswer, Option<OwnedFd>)> {
        let done = Ok((KeeperAnswer::Done, None));
        match request {
            KeeperRequest::Remember { .. }
            | KeeperRequest::RememberImage
            | KeeperRequest::RememberCommand { .. }
            | KeeperRequest::RememberLog { .. }
            | KeeperRequest::RememberOrder { .. }
            | KeeperRequest::RememberFetcher { .. }
            | KeeperRequest::RememberFiles(_)
            | KeeperRequest::Mount(_)
            | KeeperRequest::Inherit
            | KeeperRequest::Take(_)
            | KeeperRequest::AdoptMount
                if self.sealed =>
            {
                Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "the mount keeper keeps one mount, and has it",
                ))
            }
            KeeperRequest::Remember { what, path, identity } => {
                // The file of a process that has died is replaced.
                self.files.retain(|file| file.what != what);
                let file = KeptFile::find(what, path.into(), identity)?;
                if what == Leftover::Entry && self.upgrades.is_none() {
                    self.testament.beside(&file.directory, &file.name);
                    self.listen(&file);
                }
                self.files.push(file);
                done
            }
            KeeperRequest::RememberImage => {
                let image = descriptor.filter(|_| self.image.is_none());
                self.image = Some(image.ok_or_else(|| {
                    Error::new(ErrorKind::InvalidArgument, "no image, or a second one")
                })?);
                done
            }
            KeeperRequest::SetNote(text) => {
                let image = self.image()?;
                let set = match text {
                    Some(text) if text.len() > LONGEST_STREAM_NOTE => {
                        return Err(Error::new(
                            ErrorKind::InvalidArgument,
                            "the note of the stream is too long",
                        ));
                    }
                    Some(text) => rustix::fs::fsetxattr(
                        image,
                        STREAM_NOTE,
                        text.as_bytes(),
                        XattrFlags::empty(),
                    ),
                    None => rustix::fs::fremovexattr(image, STREAM_NOTE),
                };
                match set {
                    Ok(()) | Err(Errno::NODATA) => done,
                    Err(error) => Err(Error::io(STREAM_NOTE, error.into())),
                }
            }
            KeeperRequest::RememberCommand { command, environment, user } => {
                let environment = environment
                    .into_iter()
                    .map(|(name, value)| (name.into(), value.into()))
                    .collect();
                self.hook = Some(Hook::new(command.into(), environment, user));
                done
            }
            KeeperRequest::RememberFetcher { program, arguments } => {
                let arguments = arguments.into_iter().map(OsString::from).collect();
                self.fetcher = Some(FetcherPlan { program: program.into(), arguments });
                done
            }
            KeeperRequest::StartFetcher => {
                let plan = self.fetcher.as_ref().ok_or_else(|| {
                    Error::new(ErrorKind::InvalidArgument, "no fetcher was named")
                })?;
                let StartedFetcher { socket, before } =
                    self.fetchers.start(plan, &self.credentials)?;
                Ok((KeeperAnswer::Started { before }, Some(socket)))
            }
            KeeperRequest::RunCommand { completed } => {
                let hook = self.hook.as_ref().ok_or_else(|| {
                    Error::new(ErrorKind::InvalidArgument, "no command was named")
                })?;
                // A serving process that was killed after this request cannot tell its successor
                // so. The number does.
                let due = completed.saturating_sub(self.told);
                self.told = self.told.max(completed);
                let run = (0..due).try_for_each(|_| hook.run());
                self.write_facts();
                run.and(done)
            }
            KeeperRequest::RememberLog { path, owners } => {
                self.log = Some((path.into(), owners));
                done
            }
            KeeperRequest::RememberOrder { path, user } => {
                let path = PathBuf::from(path);
                let learned = LearnedOrder::find(&path, descriptor, user)?;
                // The process before this one may have changed the name of the base in the image.
                if self.learned.as_ref().is_some_and(|known| known.path() != learned.path()) {
                    let why = "--learn: the base has another name than when the disk was mounted";
                    return Err(Error::new(ErrorKind::InvalidArgument, why));
                }
                self.learned = Some(learned);
                done
            }
            KeeperRequest::StoreOrder { len } => {
                let none = || Error::new(ErrorKind::InvalidArgument, "no order was named");
                self.learned.as_ref().ok_or_else(none)?.store(len)?;
                done
            }
            KeeperRequest::OpenLog => {
                let (path, owners) = self
                    .log
                    .as_ref()
                    .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no log was named"))?;
                let file = logging::open_file(path, owners)
                    .context(|| format!("--log {}", path.display()))?;
                Ok((KeeperAnswer::Done, Some(file.into())))
            }
            KeeperRequest::ConnectLog(daemon) => {
                Ok((KeeperAnswer::Done, Some(daemon.connect()?.into())))
            }
            KeeperRequest::ConnectManager => {
                let manager = self.manager.as_ref().map(ManagerSocket::try_clone).transpose()?;
                let Some(manager) = manager else {
                    return Ok((KeeperAnswer::Manager { watchdog: None }, None));
                };
                let watchdog = manager.watchdog;
                let (socket, relay) = manager.relay()?;
                self.relay = Some(relay);
                Ok((KeeperAnswer::Manager { watchdog }, Some(socket)))
            }
            KeeperRequest::LeaveConsole => {
                self.has_left_console = true;
                if let Some(null) = &self.null {
                    rustix::stdio::dup2_stdout(null)
                        .and_then(|()| rustix::stdio::dup2_stderr(null))
                        .map_err(io::Error::from)
                        .context(|| "redirecting to /dev/null")?;
                }
                done
            }
            // A serving process that was taken over by an attacker may have changed the names in
            // the image, and ended itself.
            KeeperRequest::RememberFiles(files)
                if self.legacy.session.is_some()
                    && !files.iter().all(|file| self.backing.contains(file)) =>
            {
                Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "the backing files are not those that the disk was mounted with",
                ))
            }
            KeeperRequest::RememberFiles(files) => {
                self.backing = files;
                done
            }
            KeeperRequest::IsFile { path, identity } => Ok((
                KeeperAnswer::Is(
                    self.backing.contains(&identity) && self.looks.leads_to(path.into(), identity),
                ),
                None,
            )),
            KeeperRequest::Mount(plan) => {
                let plan = plan.into();
                let (mount, device) = HostMount::mount(&plan)?;
                self.is_read_only = plan.read_only;
                self.sealed = true;
                let path = mount.path().into();
                self.mount = Some(mount);
                Ok((KeeperAnswer::Mounted(path), Some(device)))
            }
            KeeperRequest::Inherit => {
                let session = self.legacy.session.clone();
                let (has_journal, devices) = (self.legacy.has_journal(), self.legacy.devices());
                let past = self.legacy.past();
                Ok((KeeperAnswer::Inherited { session, has_journal, devices, past }, None))
            }
            KeeperRequest::Take(what) => {
                let descriptor = self.legacy.take(what)?;
                Ok((KeeperAnswer::Done, Some(descriptor)))
            }
            KeeperRequest::AdoptMount => {
                let path = self.mount()?.path().into();
                self.sealed = true;
                self.alive.lock().gets_signals();
                let listener = self.upgrades.as_ref().and_then(UpgradeSocket::duplicate);
                Ok((KeeperAnswer::Mounted(path), listener))
            }
            KeeperRequest::Keep(what) => {
                if what == Heirloom::Witness {
                    return Err(Error::new(ErrorKind::InvalidArgument, "the keeper has its own"));
                }
                if what == Heirloom::Image {
                    let image = identity_of(descriptor.as_ref())?;
                    // A file without extended attributes was not named before.
                    if self.image.is_some() && image != identity_of(self.image.as_ref())? {
                        return Err(Error::new(ErrorKind::InvalidArgument, "another image"));
                    }
                }
                self.legacy.keep(what, descriptor).and(done)
            }
            KeeperRequest::KeepSession(session) => {
                self.legacy.complete(session, self.is_read_only)?;
                self.programs.can_be_replaced();
                self.entrust_to_manager();
                self.write_facts();
                Ok((KeeperAnswer::Done, self.upgrades.as_ref().and_then(UpgradeSocket::duplicate)))
            }
            KeeperRequest::KeepAttributes(attributes) => {
                if let Some(session) = &mut self.legacy.session {
                    session.attributes = Some(attributes);
                }
                self.write_facts();
                done
            }
            KeeperRequest::KeepJobs(text) => {
                self.legacy.keep_jobs(text)?;
                self.write_facts();
                done
            }
            KeeperRequest::Serving => {
                self.legacy.serves();
                self.programs.serves();
                self.entrust_to_manager();
                self.write_facts();
                Ok((KeeperAnswer::Done, self.upgrades.as_ref().and_then(UpgradeSocket::duplicate)))
            }
            KeeperRequest::CannotHandOver(why) => {
                self.programs.refuse(&why);
                done
            }
            KeeperRequest::Unmount => match self.unguarded(|mount| mount.unmount())? {
                Unmounted::Done => done,
                Unmounted::Busy => Ok((KeeperAnswer::Busy, None)),
            },
            KeeperRequest::Detach => self.unguarded(|mount| mount.detach()).and(done),
            KeeperRequest::Release => {
                self.mount = None;
                done
            }
            KeeperRequest::Remove(what) => {
                for file in self.files.extract_if(.., |file| file.what == what) {
                    file.remove()?;
                }
                done
            }
            KeeperRequest::RemoveMark => match rustix::fs::fremovexattr(self.image()?, OPEN_MARK) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => done,
                Err(error) => Err(Error::io("the mark of an open image stays", error.into())),
            },
        }
    }

    /// Unmounts while another thread has the descriptors of the session. umount(2) may wait for
    /// answers of the serving process. If that is killed meanwhile, the thread closes the
    /// descriptors: the kernel then ends the requests with an error and the wait, and the disk has
    /// no successor.
    fn unguarded<T>(&mut self, unmount: impl FnOnce(&HostMount) -> Result<T>) -> Result<T> {
        let devices = self.legacy.lend_devices();
        let server = self.alive.lock().process();
        let guard =
            server.filter(|_| !devices.is_empty()).map(|server| Guard::new(server, devices));
        let unmounted = self.mount().and_then(unmount);
        match guard {
            None => {}
            Some(Ok(guard)) => self.legacy.get_back(guard.finish()),
            Some(Err(error)) => {
                log::warn!("if the serving process is killed, no other one follows: {error}");
                self.legacy.get_back(Vec::new());
                self.programs.cannot_be_replaced();
            }
        }
        unmounted
    }

    /// Listens for `cordisk upgrade` beside the entry. A disk without this socket is served all the
    /// same.
    fn listen(&mut self, entry: &KeptFile) {
        let opened =
            UpgradeSocket::open(&entry.directory, &entry.name, &self.programs, &self.alive);
        match opened {
            Ok(socket) => self.upgrades = Some(socket),
            // No warning: what is lacking may end the start a moment later, with its own line.
            Err(error) => log::info!("{error}: `cordisk upgrade` does not find this disk"),
        }
    }

    /// Stores the descriptors with the service manager, if there is one.
    fn entrust_to_manager(&mut self) {
        let Some(manager) = self.manager.as_ref().filter(|_| !self.testament.is_stored()) else {
            return;
        };
        match manager.try_clone() {
            Ok(manager) => self.testament.with_manager(manager.into_socket(), &self.legacy),
            Err(error) => log::warn!("{error}"),
        }
        if let Some(server) = self.alive.lock().process() {
            self.testament.lives(server);
        }
    }

    /// Writes the facts for another keeper, once everything is kept.
    fn write_facts(&self) {
        let (Some(session), Some(mount)) = (&self.legacy.session, &self.mount) else { return };
        self.testament.write(&Facts {
            protocol: PROTOCOL,
            arguments: self.programs.arguments(),
            directory: self.directory.as_path().into(),
            mountpoint: mount.path().into(),
            file_system: mount.file_system().to_owned(),
            source: mount.source().into(),
            server: self.alive.lock().process().map(|server| server.as_raw_nonzero().get()),
            image: self.legacy.image_identity(),
            backing: self.backing.clone(),
            session: session.clone(),
            past: self.legacy.counted(),
            told: self.told,
        });
    }

    /// Goes on with a disk whose keeper has died.
    pub(super) fn succeed(&mut self, settled: Settled) {
        let Settled { legacy, mount, facts } = settled;
        self.is_read_only = facts.image.is_none();
        self.backing = facts.backing;
        self.told = facts.told;
        (self.legacy, self.mount) = (legacy, Some(mount));
        // A process that fails leaves the disk to another one, with the arguments that the disk
        // had.
        self.has_left_console = true;
        self.programs.can_be_replaced();
        self.programs.try_first(facts.arguments.into_iter().map(OsString::from).collect());
    }

    fn image(&self) -> Result<&OwnedFd> {
        self.image
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no image was named"))
    }

    fn mount(&self) -> Result<&HostMount> {
        self.mount
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "nothing is mounted"))
    }
}

/// A thread that holds descriptors until a process ends.
struct Guard {
    thread: thread::JoinHandle<Vec<OwnedFd>>,
    /// Closing it ends the thread.
    stop: OwnedFd,
}

impl Guard {
    /// Starts the thread.
    ///
    /// # Errors
    /// Those of pidfd_open(2) and pipe(2), or the system has no more threads. The descriptors are
    /// closed then.
    fn new(process: Pid, devices: Vec<OwnedFd>) -> Result<Guard> {
        let what = || "watching the serving process";
        let end = rustix::process::pidfd_open(process, PidfdFlags::empty());
        let end = end.map_err(io::Error::from).context(what)?;
        let (stopped, stop) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from).context(what)?;
        let body = move || {
            let mut polled =
                [PollFd::new(&end, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
            while rustix::event::poll(&mut polled, None).is_err() {}
            if polled[0].revents().is_empty() { devices } else { Vec::new() }
        };
        let thread = thread::Builder::new().name("guard".into()).spawn(body).context(what)?;
        Ok(Guard { thread, stop })
    }

    /// Returns the descriptors, unless the process has ended.
    fn finish(self) -> Vec<OwnedFd> {
        drop(self.stop);
        self.thread.join().unwrap_or_default()
    }
}

/// Returns (device, inode) of an open file.
fn identity_of(file: Option<&OwnedFd>) -> Result<(u64, u64)> {
    let file =
        file.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no descriptor of the image"))?;
    let stat = rustix::fs::fstat(file).map_err(io::Error::from).context(|| "the image")?;
    Ok((stat.st_dev, stat.st_ino))
}

/// A logger that collects records. They are sent with the next reply, and the serving process logs
/// them.
pub(super) struct Records(pub(super) Sender<(usize, String)>);

impl log::Log for Records {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let _ = self.0.send((record.level() as usize, record.args().to_string()));
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::thread;

    use super::super::Keeper;
    use super::*;

    /// Calls `talk` with a keeper that runs on a thread. Returns the result of `talk` and that of
    /// the keeper.
    fn with_keeper<T>(mut kept: Kept, talk: impl FnOnce(Keeper) -> T) -> (T, Result<()>) {
        let (ours, theirs) = host::packet::pair().unwrap();
        let (sender, records) = crossbeam_channel::unbounded();
        sender.send((2, "said before".to_string())).unwrap();
        let keeper = thread::spawn(move || serve(&mut kept, &theirs, &records));
        let talked = talk(Keeper::over(ours, std::process::id()).unwrap());
        (talked, keeper.join().unwrap())
    }

    fn identity(path: &Path) -> (u64, u64) {
        let meta = path.symlink_metadata().unwrap();
        (meta.dev(), meta.ino())
    }

    #[test]
    fn files_go_when_they_are_let_go_and_still_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, replaced) = (dir.path().join("pid"), dir.path().join("socket"));
        std::fs::write(&ours, "1").unwrap();
        std::fs::write(&replaced, "1").unwrap();
        let wrong = (identity(&replaced).0, identity(&replaced).1 + 1);
        let (finished, ended) = with_keeper(Kept::default(), |keeper| {
            let first = keeper.entrust(Leftover::Pidfile, &ours, identity(&ours)).unwrap();
            let second = keeper.entrust(Leftover::Socket, &replaced, wrong).unwrap();
            assert!(ours.exists());
            drop((first, second));
            assert!(!ours.exists() && replaced.exists());
            keeper.finish()
        });
        assert!(finished.is_ok() && ended.is_ok());
    }

    /// Protects: if the owner of a directory puts another directory in its place, the keeper still
    /// removes the entrusted file, and no other.
    #[test]
    fn files_are_found_in_the_directory_that_was_entrusted() {
        for what in [Leftover::Pidfile, Leftover::Socket, Leftover::Entry] {
            let dir = tempfile::tempdir().unwrap();
            let (theirs, moved, victim) =
                (dir.path().join("theirs"), dir.path().join("moved"), dir.path().join("victim"));
            std::fs::create_dir(&theirs).unwrap();
            std::fs::create_dir(&victim).unwrap();
            let ours = theirs.join("pid");
            std::fs::write(&ours, "1").unwrap();
            // The worst case: it is the same file, by device and inode.
            std::fs::hard_link(&ours, victim.join("pid")).unwrap();
            let (finished, ended) = with_keeper(Kept::default(), |keeper| {
                let entrusted = keeper.entrust(what, &ours, identity(&ours)).unwrap();
                std::fs::rename(&theirs, &moved).unwrap();
                std::os::unix::fs::symlink(&victim, &theirs).unwrap();
                drop(entrusted);
                keeper.finish()
            });
            assert!(finished.is_ok() && ended.is_ok());
            assert!(victim.join("pid").exists() && !moved.join("pid").exists(), "{what:?}");
        }
    }

    /// Protects: the keeper removes the mark only on request. Without the request the image was not
    /// closed.
    #[test]
    fn the_mark_goes_when_the_keeper_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "1").unwrap();
        let image = || OwnedFd::from(std::fs::File::open(&path).unwrap());
        let name = OPEN_MARK;
        let marked = || rustix::fs::fgetxattr(image(), name, &mut [0u8; 8]);
        if rustix::fs::fsetxattr(image(), name, b"1", rustix::fs::XattrFlags::empty()).is_err() {
            return;
        }
        for told in [false, true] {
            let (finished, ended) = with_keeper(Kept::default(), |keeper| {
                let entrusted = keeper.entrust_image(&image()).unwrap();
                if told {
                    entrusted.remove_mark().unwrap();
                }
                keeper.finish()
            });
            assert!(finished.is_ok() && ended.is_ok());
            assert_eq!(marked().err(), told.then_some(Errno::NODATA), "told: {told}");
        }
    }

    /// Protects: the keeper changes the attribute that was named and no other, on behalf of any
    /// thread.
    #[test]
    fn the_note_says_what_the_keeper_was_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "1").unwrap();
        let image = || OwnedFd::from(std::fs::File::open(&path).unwrap());
        let name = STREAM_NOTE;
        if rustix::fs::fsetxattr(image(), name, b"1", rustix::fs::XattrFlags::empty()).is_err() {
            return;
        }
        let read = || {
            let mut text = [0; 64];
            rustix::fs::fgetxattr(image(), name, &mut text)
                .map(|len| String::from_utf8_lossy(&text[..len]).into_owned())
        };
        let (finished, ended) = with_keeper(Kept::default(), |keeper| {
            let note = keeper.entrust_image(&image()).unwrap();
            assert!(keeper.entrust_image(&image()).is_err(), "one image");
            thread::scope(|scope| {
                scope.spawn(|| note.set_note(Some("first")).unwrap());
                scope.spawn(|| keeper.ask(KeeperRequest::Release).unwrap());
            });
            assert_eq!(read(), Ok("first".to_string()));
            note.set_note(Some("second")).unwrap();
            assert_eq!(read(), Ok("second".to_string()));
            assert!(note.set_note(Some(&"x".repeat(LONGEST_STREAM_NOTE + 1))).is_err());
            assert_eq!(read(), Ok("second".to_string()), "a note that is too long changes nothing");
            note.set_note(None).unwrap();
            note.set_note(None).unwrap();
            assert_eq!(read(), Err(Errno::NODATA));
            keeper.finish()
        });
        assert!(finished.is_ok() && ended.is_ok());
    }

    /// Protects: the keeper runs the command that was named before the mount, and none that is
    /// named later. Commands that do not end do not accumulate without a bound.
    #[test]
    fn a_command_is_named_before_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        let (file, second) = (dir.path().join("ran"), dir.path().join("second"));
        let command = |path: &Path| {
            OsString::from(format!(
                "echo $CORDISK_DEVICE > {0}.new; mv {0}.new {0}",
                path.display()
            ))
        };
        let ((), ended) = with_keeper(Kept::default(), |keeper| {
            assert!(keeper.run_command(1).unwrap_err().to_string().contains("no command"));
            keeper
                .entrust_command(&command(&file), &[("CORDISK_DEVICE", "d0".as_ref())], None)
                .unwrap();
            keeper.run_command(1).unwrap();
            let start = std::time::Instant::now();
            while !file.exists() {
                assert!(start.elapsed().as_secs() < 20, "the command did not run");
                thread::yield_now();
            }
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "d0\n");
        });
        assert!(ended.is_ok());
        let sealed = Kept { sealed: true, ..Kept::default() };
        let ((), ended) = with_keeper(sealed, |keeper| {
            let error = keeper.entrust_command(&command(&second), &[], None).unwrap_err();
            assert!(error.to_string().contains("keeps one mount"), "{error}");
            assert!(keeper.run_command(1).is_err() && !second.exists());
        });
        assert!(ended.is_ok());
        let ((), ended) = with_keeper(Kept::default(), |keeper| {
            keeper
                .entrust_command(
                    "while test -e $CORDISK_IMAGE; do sleep 0.1; done".as_ref(),
                    &[("CORDISK_IMAGE", file.as_ref())],
                    None,
                )
                .unwrap();
            let started = (1..100).take_while(|&nth| keeper.run_command(nth).is_ok()).count();
            std::fs::remove_file(&file).unwrap();
            assert_eq!(started, 16);
        });
        assert!(ended.is_ok());
    }

    /// Protects: the command runs once for each stream that has completed: a successor that does
    /// not know whether its predecessor has asked for it asks again, and makes up for what was not
    /// asked.
    #[test]
    fn a_command_runs_once_for_each_completion() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("there");
        std::fs::write(&file, "").unwrap();
        let ((), ended) = with_keeper(Kept::default(), |keeper| {
            let command = "while test -e $CORDISK_IMAGE; do sleep 0.1; done".as_ref();
            keeper.entrust_command(command, &[("CORDISK_IMAGE", file.as_ref())], None).unwrap();
            // No command ends, and at most 16 may run: each one that is started counts.
            for completed in [1, 0, 1].repeat(20) {
                keeper.run_command(completed).unwrap();
            }
            for completed in [3, 2, 16, 16] {
                keeper.run_command(completed).unwrap();
            }
            assert_eq!(keeper.run_command(17).unwrap_err().kind(), ErrorKind::Busy);
            keeper.run_command(17).expect("one that failed is not started again");
            std::fs::remove_file(&file).unwrap();
        });
        assert!(ended.is_ok());
    }

    /// Protects: the serving process can no longer open files, so the keeper opens the log file
    /// that was named, and no other.
    #[test]
    fn the_log_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let ((), ended) = with_keeper(Kept::default(), |keeper| {
            assert!(keeper.open_log().unwrap_err().to_string().contains("no log was named"));
            keeper.entrust_log(&path, &Owners::default()).unwrap();
            std::fs::write(&path, "first\n").unwrap();
            io::Write::write_all(&mut keeper.open_log().unwrap(), b"second\n").unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\nsecond\n");
            std::fs::remove_file(&path).unwrap();
            std::fs::create_dir(&path).unwrap();
            let error = keeper.open_log().unwrap_err().to_string();
            assert!(error.starts_with("--log ") && error.contains("directory"), "{error}");
        });
        assert!(ended.is_ok());
        let ((), ended) = with_keeper(Kept { sealed: true, ..Kept::default() }, |keeper| {
            assert!(
                keeper
                    .entrust_log(&path, &Owners::default())
                    .unwrap_err()
                    .to_string()
                    .contains("keeps one mount")
            );
        });
        assert!(ended.is_ok());
    }

    #[test]
    fn it_keeps_one_mount_and_takes_nothing_new_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "1").unwrap();
        let sealed = Kept { sealed: true, ..Kept::default() };
        let ((), ended) = with_keeper(sealed, |keeper| {
            let error = keeper.entrust(Leftover::Pidfile, &path, identity(&path)).unwrap_err();
            assert!(error.to_string().contains("keeps one mount"), "{error}");
            // A file or mount that the keeper does not know is not removed, unmounted or detached.
            for request in [KeeperRequest::Remove(Leftover::Pidfile), KeeperRequest::Release] {
                keeper.ask(request).unwrap();
            }
            for request in [
                KeeperRequest::Unmount,
                KeeperRequest::Detach,
                KeeperRequest::RemoveMark,
                KeeperRequest::SetNote(None),
                KeeperRequest::StoreOrder { len: 1 },
                KeeperRequest::Inherit,
                KeeperRequest::Take(Heirloom::Image),
                KeeperRequest::AdoptMount,
            ] {
                assert_eq!(keeper.ask(request).unwrap_err().kind(), ErrorKind::InvalidArgument);
            }
            assert!(path.exists());
        });
        assert!(ended.is_ok());
    }

    #[test]
    fn nonsense_ends_it() {
        for nonsense in
            [&b"x"[..], b"\"Format\"", b"{\"Remove\":\"/etc/passwd\"}", b"[[[[", &[0xff; 70_000]]
        {
            let (lost, ended) = with_keeper(Kept::default(), |keeper| {
                rustix::net::send(keeper.line.socket(), nonsense, rustix::net::SendFlags::NOSIGNAL)
                    .unwrap();
                let error = keeper.ask(KeeperRequest::Release).unwrap_err();
                assert!(error.to_string().contains("mount keeper has died"), "{error}");
                keeper.finish()
            });
            assert!(lost.is_err() && ended.is_err());
        }
    }
}
