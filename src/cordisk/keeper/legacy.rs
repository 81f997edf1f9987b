//! What the keeper holds for a successor of the serving process, and how often it starts one.
//!
//! The kernel ends the requests that were read from a descriptor of /dev/fuse when the last
//! duplicate of it is closed, and releases the locks of the image when the last duplicate of its
//! descriptor is closed. The keeper has a duplicate of each, so requests and locks outlive the
//! serving process. It reads and writes none of these files.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant, SystemTime};

use nix::libc;
use rustix::fs::{Mode, OFlags};

use super::upgrade::HANDED_OVER;
use super::wire::{Heirloom, KeptPast, KeptSession, LONGEST_JOBS};
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// How many serving processes in a row may end before the keeper gives up: because they fail to
/// start, or because they crash.
const TRIES: u32 = 5;

/// A process that has served for this long ends a row of failures.
const LONG: Duration = Duration::from_secs(60);

/// The most descriptors of /dev/fuse that a session has.
pub(super) const MOST_DEVICES: usize = 64;

/// The signals of a process that has ended itself or has done something that it must not.
const CRASHES: [i32; 6] =
    [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];

/// The descriptors and facts of a served disk.
#[derive(Debug, Default)]
pub(super) struct Legacy {
    image: Option<OwnedFd>,
    witness: Option<OwnedFd>,
    journal: Option<OwnedFd>,
    devices: Vec<OwnedFd>,
    requests: Option<OwnedFd>,
    pub(super) session: Option<KeptSession>,
    /// Whether a process has served: what it says later is not trusted with more.
    is_closed: bool,
    /// When the present serving process began to serve; `None` before that.
    since: Option<Instant>,
    /// Processes in a row that have failed.
    failures: u32,
    /// The text of [`super::wire::KeeperRequest::KeepJobs`].
    jobs: Option<String>,
    /// How many successors have served.
    takeovers: u64,
    /// When the disk was mounted.
    mounted: Option<SystemTime>,
}

impl Legacy {
    /// What a keeper before this one has counted.
    pub(super) fn after(past: KeptPast) -> Legacy {
        let KeptPast { jobs, takeovers, mounted } = past;
        Legacy { jobs, takeovers, mounted, ..Legacy::default() }
    }

    /// Takes the rest of what a successor needs.
    ///
    /// # Errors
    /// The session is complete already, or something is missing: a disk that is written needs its
    /// image and its journal, and a session over io_uring the memory of its requests.
    pub(super) fn complete(&mut self, session: KeptSession, is_read_only: bool) -> Result<()> {
        let has_image = self.image.is_some() && self.journal.is_some();
        let has_requests = self.requests.is_some() || session.negotiated.rings.is_none();
        let has_all = (has_image || is_read_only) && has_requests && !self.devices.is_empty();
        if self.is_closed || !has_all {
            return Err(Error::new(ErrorKind::InvalidArgument, "the session is not kept"));
        }
        self.session = Some(session);
        self.serves();
        self.mounted.get_or_insert_with(SystemTime::now);
        Ok(())
    }

    /// Keeps the jobs of the disk.
    ///
    /// # Errors
    /// The text is too long. The last one stays.
    pub(super) fn keep_jobs(&mut self, text: String) -> Result<()> {
        if text.len() > LONGEST_JOBS {
            return Err(Error::new(ErrorKind::InvalidArgument, "the list of jobs is too long"));
        }
        self.jobs = Some(text);
        Ok(())
    }

    /// Returns what has happened, for the successor that is starting.
    pub(super) fn past(&self) -> KeptPast {
        let takeovers = self.takeovers.saturating_add(1);
        KeptPast { takeovers, ..self.counted() }
    }

    /// Returns what has happened until now.
    pub(super) fn counted(&self) -> KeptPast {
        KeptPast { jobs: self.jobs.clone(), takeovers: self.takeovers, mounted: self.mounted }
    }

    /// Returns (device, inode) of the image; `None` if the disk is read-only.
    pub(super) fn image_identity(&self) -> Option<(u64, u64)> {
        let stat = rustix::fs::fstat(self.image.as_ref()?).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }

    /// The present serving process serves from now on. Nothing more is kept.
    pub(super) fn serves(&mut self) {
        if self.is_closed && self.since.is_none() {
            self.takeovers = self.takeovers.saturating_add(1);
        }
        self.is_closed = true;
        self.since.get_or_insert_with(Instant::now);
    }

    /// Whether the present serving process serves.
    pub(super) fn is_served(&self) -> bool {
        self.since.is_some()
    }

    /// The serving process has ended.
    pub(super) fn has_ended(&mut self) {
        self.since = None;
    }

    /// Returns all descriptors.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (Heirloom, BorrowedFd<'_>)> {
        let files = [
            (Heirloom::Image, &self.image),
            (Heirloom::Witness, &self.witness),
            (Heirloom::Journal, &self.journal),
            (Heirloom::Requests, &self.requests),
        ];
        let files =
            files.into_iter().filter_map(|(what, file)| Some((what, file.as_ref()?.as_fd())));
        let devices = self.devices.iter().enumerate();
        files.chain(devices.map(|(number, device)| (Heirloom::Device(number), device.as_fd())))
    }

    /// Counts failures anew.
    pub(super) fn forget_failures(&mut self) {
        self.failures = 0;
    }

    /// Keeps a descriptor.
    ///
    /// # Errors
    /// The session is complete already, or the descriptor is not the next one.
    pub(super) fn keep(&mut self, what: Heirloom, descriptor: Option<OwnedFd>) -> Result<()> {
        let wrong = || Error::new(ErrorKind::InvalidArgument, format!("{what:?} is not kept"));
        let descriptor = descriptor.filter(|_| !self.is_closed).ok_or_else(wrong)?;
        match what {
            Heirloom::Image if self.image.is_none() => {
                // The serving process gets no file with more rights than it has.
                let mode = rustix::fs::fcntl_getfl(&descriptor).map_err(io::Error::from);
                if mode.context(|| "the image")? & OFlags::RWMODE != OFlags::RDWR {
                    return Err(wrong());
                }
                // An open file of its own, which nothing synchronises: it still knows of a failed
                // write-back that the serving process has perhaps not lived to see (P7).
                let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
                let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let witness = rustix::fs::open(path, flags, Mode::empty());
                self.witness =
                    Some(witness.map_err(io::Error::from).context(|| "opening the image again")?);
                self.image = Some(descriptor);
            }
            // Of a keeper that has died: its own knows more than the one that was opened just now.
            Heirloom::Witness if self.image.is_some() => self.witness = Some(descriptor),
            Heirloom::Journal if self.journal.is_none() => self.journal = Some(descriptor),
            Heirloom::Device(number) if number == self.devices.len() && number < MOST_DEVICES => {
                self.devices.push(descriptor);
            }
            Heirloom::Requests if self.requests.is_none() => self.requests = Some(descriptor),
            _ => return Err(wrong()),
        }
        Ok(())
    }

    /// Returns a duplicate of a descriptor.
    ///
    /// # Errors
    /// There is no such descriptor; those of fcntl(2).
    pub(super) fn take(&self, what: Heirloom) -> Result<OwnedFd> {
        let descriptor = match what {
            Heirloom::Image => self.image.as_ref(),
            Heirloom::Witness => self.witness.as_ref(),
            Heirloom::Journal => self.journal.as_ref(),
            Heirloom::Device(number) => self.devices.get(number),
            Heirloom::Requests => self.requests.as_ref(),
        };
        let descriptor = descriptor.ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, format!("no {what:?} is kept"))
        })?;
        descriptor.try_clone().context(|| format!("{what:?}"))
    }

    /// Gives the descriptors of the session away until [`Legacy::get_back`].
    pub(super) fn lend_devices(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.devices)
    }

    /// Takes the descriptors of the session back. Without them there is no session.
    pub(super) fn get_back(&mut self, devices: Vec<OwnedFd>) {
        if devices.is_empty() {
            self.session = None;
        }
        self.devices = devices;
    }

    pub(super) fn has_journal(&self) -> bool {
        self.journal.is_some()
    }

    pub(super) fn devices(&self) -> usize {
        self.devices.len()
    }

    /// Counts a successor that could not be started. Returns whether another one may be.
    pub(super) fn try_again(&mut self) -> bool {
        self.failures += 1;
        self.failures < TRIES
    }

    /// Returns how long to wait before a successor is started: a little longer after each failure,
    /// because what failed may pass.
    pub(super) fn pause(&self) -> Duration {
        self.failures.saturating_sub(1) * Duration::from_millis(300)
    }

    /// Decides whether a successor is started after a serving process has ended. `is_mounted` says
    /// whether the process has left the mount as it is.
    ///
    /// A process that was killed from outside while it served does not count as a failure: another
    /// one has the same prospects. One that crashes, or that fails before it serves, does.
    pub(super) fn has_successor(&mut self, status: ExitStatus, is_mounted: bool) -> bool {
        let since = self.since.take();
        let was_serving = since.is_some();
        if since.is_some_and(|since| since.elapsed() >= LONG) {
            self.failures = 0;
        }
        let has_ended = was_serving && status.code().is_some_and(|code| code != HANDED_OVER);
        if self.session.is_none() || !is_mounted || has_ended {
            return false;
        }
        // The signal by which a user ends a program and asks for its memory.
        if status.signal() == Some(libc::SIGQUIT) {
            return false;
        }
        let crashed = status.signal().is_some_and(|signal| CRASHES.contains(&signal));
        self.failures = if was_serving && !crashed { 0 } else { self.failures + 1 };
        self.failures < TRIES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legacy() -> Legacy {
        let negotiated = serde_json::from_str(
            r#"{"over-io-uring":false,"minor":40,"max-write":1048576,"capabilities":0}"#,
        );
        let session = KeptSession { negotiated: negotiated.unwrap(), attributes: None };
        Legacy { session: Some(session), ..Legacy::default() }
    }

    /// Protects: a disk whose serving process was killed gets another one however often, and one
    /// whose process crashes or cannot start gets a bounded number.
    #[test]
    fn crashes_are_bounded_and_kills_are_not() {
        let mut killed = legacy();
        for _ in 0..1000 {
            killed.serves();
            assert!(killed.has_successor(ExitStatus::from_raw(libc::SIGKILL), true));
        }
        let mut rarely = legacy();
        for _ in 0..20 {
            rarely.since = Instant::now().checked_sub(LONG);
            assert!(rarely.has_successor(ExitStatus::from_raw(libc::SIGSEGV), true));
        }
        let mut crashing = legacy();
        let tries = (0..)
            .take_while(|_| {
                crashing.serves();
                crashing.has_successor(ExitStatus::from_raw(libc::SIGABRT), true)
            })
            .count();
        assert_eq!(tries as u32, TRIES - 1);
        let mut failing = legacy();
        let tries =
            (0..).take_while(|_| failing.has_successor(ExitStatus::from_raw(1 << 8), true)).count();
        assert_eq!(tries as u32, TRIES - 1);
    }

    /// Protects: a process that has ended by itself after it served has said why, and has no
    /// successor; neither has one whose disk is unmounted or whose session was not kept.
    #[test]
    fn an_orderly_end_is_the_end() {
        let mut ended = Legacy { since: Some(Instant::now()), ..legacy() };
        assert!(!ended.has_successor(ExitStatus::from_raw(1 << 8), true));
        let mut unmounted = Legacy { since: Some(Instant::now()), ..legacy() };
        assert!(!unmounted.has_successor(ExitStatus::from_raw(libc::SIGKILL), false));
        let mut unkept = Legacy { since: Some(Instant::now()), ..Legacy::default() };
        assert!(!unkept.has_successor(ExitStatus::from_raw(libc::SIGKILL), true));
    }

    /// Protects: a successor is counted when it serves, and not when it fails to start or says so
    /// twice. The jobs of the last process that has said anything about them are kept, in a text of
    /// bounded length.
    #[test]
    fn takeovers_are_counted_and_jobs_are_kept() {
        let mut kept = legacy();
        kept.serves();
        assert_eq!((kept.past().takeovers, kept.past().jobs), (1, None));
        for life in 1..=3 {
            kept.keep_jobs(format!("[{life}]")).unwrap();
            assert!(kept.has_successor(ExitStatus::from_raw(libc::SIGKILL), true));
            assert!(kept.has_successor(ExitStatus::from_raw(1 << 8), true), "it failed to start");
            let past = kept.past();
            assert_eq!((past.takeovers, past.jobs), (life, Some(format!("[{life}]"))));
            kept.serves();
            kept.serves();
        }
        assert!(kept.keep_jobs("x".repeat(LONGEST_JOBS + 1)).is_err());
        assert_eq!(kept.past().jobs.as_deref(), Some("[3]"), "a text that is too long");
    }

    /// Protects: a session over io_uring is kept only with the memory of its requests, without
    /// which no successor can answer them.
    #[test]
    fn a_session_over_io_uring_needs_its_memory() {
        let descriptor = || Some(std::fs::File::open("/dev/null").unwrap().into());
        let negotiated = serde_json::from_str(
            r#"{"over-io-uring":true,"minor":45,"max-write":1048576,"capabilities":0,
                "rings":{"address":68719476736,"queues":2,"depth":96}}"#,
        );
        let session = KeptSession { negotiated: negotiated.unwrap(), attributes: None };
        let mut kept = Legacy::default();
        kept.keep(Heirloom::Device(0), descriptor()).unwrap();
        assert!(kept.complete(session.clone(), true).is_err());
        kept.keep(Heirloom::Requests, descriptor()).unwrap();
        assert!(kept.keep(Heirloom::Requests, descriptor()).is_err(), "a second one");
        kept.complete(session, true).unwrap();
        assert!(kept.take(Heirloom::Requests).is_ok());
    }

    /// Protects: what was kept cannot be replaced once the session is complete.
    #[test]
    fn a_session_is_kept_once() {
        let descriptor = || Some(std::fs::File::open("/dev/null").unwrap().into());
        let mut kept = Legacy::default();
        assert!(kept.keep(Heirloom::Device(1), descriptor()).is_err(), "not the next one");
        kept.keep(Heirloom::Device(0), descriptor()).unwrap();
        let error = kept.keep(Heirloom::Image, descriptor()).unwrap_err();
        assert!(error.to_string().contains("not kept"), "read-only: {error}");
        assert!(kept.keep(Heirloom::Journal, None).is_err(), "no descriptor");
        kept.keep(Heirloom::Journal, descriptor()).unwrap();
        assert!(kept.keep(Heirloom::Journal, descriptor()).is_err(), "a second one");
        kept.serves();
        assert!(kept.keep(Heirloom::Device(1), descriptor()).is_err(), "too late");
        assert!(kept.take(Heirloom::Device(0)).is_ok() && kept.take(Heirloom::Image).is_err());
    }
}
