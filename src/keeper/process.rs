//! The keeper's own life: requests are read from standard input until it ends.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam_channel::{Receiver, Sender};
use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::hook::Hook;
use super::looks::Looks;
use super::wire::{self, Answer, Failure, Leftover, Numbered, Reply, Request};
use crate::attributes::{LONGEST_STREAM_NOTE, OPEN_MARK, STREAM_NOTE};
use crate::error::Context;
use crate::fuse::{HostMount, Unmounted};
use crate::logging::{self, Owners};
use crate::{Error, ErrorKind, Result};

/// What the keeper knows.
#[derive(Debug, Default)]
struct Kept {
    files: Vec<KeptFile>,
    /// The image, for its two attributes.
    image: Option<OwnedFd>,
    hook: Option<Hook>,
    /// Backing files.
    backing: Vec<(u64, u64)>,
    looks: Looks,
    /// The log file, and to whom it may belong.
    log: Option<(PathBuf, Owners)>,
    /// There was a mount: nothing new is taken.
    sealed: bool,
    mount: Option<HostMount>,
}

/// A file that goes away at the end. It is found in the directory as it was when the file was entrusted: its path may lead elsewhere by then,
/// through a directory that is somebody else's.
#[derive(Debug)]
struct KeptFile {
    what: Leftover,
    /// For messages.
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
            return Err(Error::new(ErrorKind::InvalidArgument, format!("{}: not a file name", context())));
        };
        let directory = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let directory = directory.map_err(io::Error::from).context(context)?;
        let name = name.to_owned();
        Ok(KeptFile { what, path, directory, name, identity })
    }

    /// Removes it if it is still the one that was named.
    fn remove(self) -> Result<()> {
        match self.what {
            Leftover::Socket => crate::qmp::remove_socket(&self.directory, &self.name, self.identity)
                .context(|| format!("removing QMP socket {}", self.path.display())),
            Leftover::Pidfile | Leftover::Entry => {
                let there = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW);
                let ours = there.is_ok_and(|there| (there.st_dev, there.st_ino) == self.identity);
                let removed = if ours { rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty()) } else { Ok(()) };
                removed.map_err(io::Error::from).context(|| format!("removing {}", self.path.display()))
            }
        }
    }
}

/// The whole life of a keeper process. Ends it, without touching the mount, when the serving process does.
///
/// # Errors
/// Standard input is no socket of a serving process.
pub fn run() -> Result<()> {
    // First of all: the terminal sends these to every process of the group, and the unmount is yet to come. Taken, not ignored, so that
    // fusermount3 does not inherit it.
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false))).context(|| "signal handlers")?;
    }
    // Whoever has started us by hand may be the leader of a session already.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"cordisk-keeper");
    close_inherited();
    rustix::process::umask(Mode::from_raw_mode(0o077));
    rustix::process::chdir("/").map_err(io::Error::from).context(|| "chdir to /")?;
    let (sender, records) = crossbeam_channel::unbounded();
    log::set_max_level(log::LevelFilter::Debug);
    let _ = log::set_boxed_logger(Box::new(Records(sender)));

    let socket = io::stdin();
    let mut kept = Kept::default();
    let ended = serve(&mut kept, socket.as_fd(), &records);
    // Not dropped: that would unmount.
    std::mem::forget(kept.mount.take());
    ended.context(|| "mount keeper: standard input")
}

fn serve(kept: &mut Kept, socket: impl AsFd, records: &Receiver<(usize, String)>) -> Result<()> {
    while let Some((Numbered { number, message }, descriptor)) = wire::receive::<Numbered<Request>>(&socket)? {
        let (result, descriptor) = match kept.answer(message, descriptor) {
            Ok((answer, descriptor)) => (Ok(answer), descriptor),
            Err(error) => (Err(Failure::from(error)), None),
        };
        let reply = Numbered { number, message: Reply { log: records.try_iter().collect(), result } };
        // The copy of /dev/fuse is closed here: the connection must end with the serving process.
        let sent = wire::send(&socket, &reply, descriptor.as_ref().map(AsFd::as_fd));
        if sent.is_err() {
            break;
        }
    }
    Ok(())
}

impl Kept {
    fn answer(&mut self, request: Request, descriptor: Option<OwnedFd>) -> Result<(Answer, Option<OwnedFd>)> {
        let done = Ok((Answer::Done, None));
        match request {
            Request::Remember { .. }
            | Request::RememberImage
            | Request::RememberCommand { .. }
            | Request::RememberLog { .. }
            | Request::RememberFiles(_)
            | Request::Mount(_)
                if self.sealed =>
            {
                Err(Error::new(ErrorKind::InvalidArgument, "the mount keeper keeps one mount, and has it"))
            }
            Request::Remember { what, path, identity } => {
                self.files.push(KeptFile::find(what, path.into(), identity)?);
                done
            }
            Request::RememberImage => {
                let image = descriptor.filter(|_| self.image.is_none());
                self.image = Some(image.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no image, or a second one"))?);
                done
            }
            Request::SetNote(text) => {
                let image = self.image()?;
                let set = match text {
                    Some(text) if text.len() > LONGEST_STREAM_NOTE => {
                        return Err(Error::new(ErrorKind::InvalidArgument, "the note of the stream is too long"));
                    }
                    Some(text) => rustix::fs::fsetxattr(image, STREAM_NOTE, text.as_bytes(), XattrFlags::empty()),
                    None => rustix::fs::fremovexattr(image, STREAM_NOTE),
                };
                match set {
                    Ok(()) | Err(Errno::NODATA) => done,
                    Err(error) => Err(Error::io(STREAM_NOTE, error.into())),
                }
            }
            Request::RememberCommand { command, environment, user } => {
                let environment = environment.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
                self.hook = Some(Hook::new(command.into(), environment, user));
                done
            }
            Request::RunCommand => {
                let hook = self.hook.as_ref().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no command was named"))?;
                hook.run().and(done)
            }
            Request::RememberLog { path, owners } => {
                self.log = Some((path.into(), owners));
                done
            }
            Request::OpenLog => {
                let (path, owners) = self.log.as_ref().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no log was named"))?;
                let file = logging::open_file(path, owners).context(|| format!("--log {}", path.display()))?;
                Ok((Answer::Done, Some(file.into())))
            }
            Request::RememberFiles(files) => {
                self.backing = files;
                done
            }
            Request::IsFile { path, identity } => {
                Ok((Answer::Is(self.backing.contains(&identity) && self.looks.leads_to(path.into(), identity)), None))
            }
            Request::Mount(plan) => {
                let (mount, device) = HostMount::mount(&plan.into())?;
                self.sealed = true;
                let path = mount.path().into();
                self.mount = Some(mount);
                Ok((Answer::Mounted(path), Some(device)))
            }
            Request::Unmount => match self.mount()?.unmount()? {
                Unmounted::Done => done,
                Unmounted::Busy => Ok((Answer::Busy, None)),
            },
            Request::Detach => self.mount()?.detach().and(done),
            Request::Release => {
                self.mount = None;
                done
            }
            Request::Remove(what) => {
                for file in self.files.extract_if(.., |file| file.what == what) {
                    file.remove()?;
                }
                done
            }
            Request::RemoveMark => match rustix::fs::fremovexattr(self.image()?, OPEN_MARK) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => done,
                Err(error) => Err(Error::io("the mark of an open image stays", error.into())),
            },
        }
    }

    fn image(&self) -> Result<&OwnedFd> {
        self.image.as_ref().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no image was named"))
    }

    fn mount(&self) -> Result<&HostMount> {
        self.mount.as_ref().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "nothing is mounted"))
    }
}

/// Closes every descriptor but the standard ones.
pub fn close_inherited() {
    // Without /proc they stay open, which is no reason not to serve.
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for descriptor in open.into_iter().filter(|&descriptor| descriptor > 2) {
        // The one by which the list was read is closed already.
        let _ = nix::unistd::close(descriptor);
    }
}

/// A logger that passes records on: they travel with the next reply, and the serving process logs them.
struct Records(Sender<(usize, String)>);

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

    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::super::Keeper;
    use super::*;

    /// Talks to a keeper that runs on a thread; returns what `talk` does, and how the keeper ended.
    fn with_keeper<T>(mut kept: Kept, talk: impl FnOnce(Keeper) -> T) -> (T, Result<()>) {
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
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

    /// The user to whom a directory belongs can put another one in its place; what was entrusted still goes, and nothing else.
    #[test]
    fn files_are_found_in_the_directory_that_was_entrusted() {
        for what in [Leftover::Pidfile, Leftover::Socket, Leftover::Entry] {
            let dir = tempfile::tempdir().unwrap();
            let (theirs, moved, victim) = (dir.path().join("theirs"), dir.path().join("moved"), dir.path().join("victim"));
            std::fs::create_dir(&theirs).unwrap();
            std::fs::create_dir(&victim).unwrap();
            let ours = theirs.join("pid");
            std::fs::write(&ours, "1").unwrap();
            // The worst case: by number it is the same file.
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

    /// Only when it is told so: without that the image was not closed.
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

    /// The attribute that was named, and no other; from whatever thread.
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
            rustix::fs::fgetxattr(image(), name, &mut text).map(|len| String::from_utf8_lossy(&text[..len]).into_owned())
        };
        let (finished, ended) = with_keeper(Kept::default(), |keeper| {
            let note = keeper.entrust_image(&image()).unwrap();
            assert!(keeper.entrust_image(&image()).is_err(), "one image");
            thread::scope(|scope| {
                scope.spawn(|| note.set_note(Some("first")).unwrap());
                scope.spawn(|| keeper.ask(Request::Release).unwrap());
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

    /// It runs what was named before the mount, and nothing that is named later; those that do not end are not heaped up without bound.
    #[test]
    fn a_command_is_named_before_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        let (file, second) = (dir.path().join("ran"), dir.path().join("second"));
        let command = |path: &Path| OsString::from(format!("echo $CORDISK_DEVICE > {0}.new; mv {0}.new {0}", path.display()));
        let ((), ended) = with_keeper(Kept::default(), |keeper| {
            assert!(keeper.run_command().unwrap_err().to_string().contains("no command"));
            keeper.entrust_command(&command(&file), &[("CORDISK_DEVICE", "d0".as_ref())], None).unwrap();
            keeper.run_command().unwrap();
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
            assert!(keeper.run_command().is_err() && !second.exists());
        });
        assert!(ended.is_ok());
        let ((), ended) = with_keeper(Kept::default(), |keeper| {
            keeper
                .entrust_command("while test -e $CORDISK_IMAGE; do sleep 0.1; done".as_ref(), &[("CORDISK_IMAGE", file.as_ref())], None)
                .unwrap();
            let started = (0..100).take_while(|_| keeper.run_command().is_ok()).count();
            std::fs::remove_file(&file).unwrap();
            assert_eq!(started, 16);
        });
        assert!(ended.is_ok());
    }

    /// The serving process cannot open a file any more; the keeper opens the one that was named,
    /// and no other.
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
            assert!(keeper.entrust_log(&path, &Owners::default()).unwrap_err().to_string().contains("keeps one mount"));
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
            // What it does not know it does not remove, unmount or detach.
            for request in [Request::Remove(Leftover::Pidfile), Request::Release] {
                keeper.ask(request).unwrap();
            }
            for request in [Request::Unmount, Request::Detach, Request::RemoveMark, Request::SetNote(None)] {
                assert_eq!(keeper.ask(request).unwrap_err().kind(), ErrorKind::InvalidArgument);
            }
            assert!(path.exists());
        });
        assert!(ended.is_ok());
    }

    #[test]
    fn nonsense_ends_it() {
        for nonsense in [&b"x"[..], b"\"Format\"", b"{\"Remove\":\"/etc/passwd\"}", b"[[[[", &[0xff; 70_000]] {
            let (lost, ended) = with_keeper(Kept::default(), |keeper| {
                rustix::net::send(keeper.line.socket(), nonsense, rustix::net::SendFlags::NOSIGNAL).unwrap();
                let error = keeper.ask(Request::Release).unwrap_err();
                assert!(error.to_string().contains("mount keeper has died"), "{error}");
                keeper.finish()
            });
            assert!(lost.is_err() && ended.is_err());
        }
    }
}
