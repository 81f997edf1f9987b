//! Detects changes of a file by its size and the time of its last change.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::time::ClockId;

use super::FileStorage;
use crate::storage::{Ask, ReadAt, Version};

/// File system type of statfs(2) for FUSE and virtiofs (linux/magic.h).
const FUSE_SUPER_MAGIC: u64 = 0x6573_5546;
/// The time within which two changes may get the same timestamp if timestamps are whole seconds:
/// FAT counts every other second.
const WHOLE_SECONDS: Duration = Duration::from_millis(2100);
/// The same time for other file systems if the length of a clock tick is unknown: HZ=100.
const LONGEST_TICK: Duration = Duration::from_millis(10);
/// How often [`FileStorage::settle`] waits for a file that another program keeps changing.
const SETTLE_TRIES: u32 = 3;

impl FileStorage {
    /// Returns a version of the file that differs from the version after every later change. If the
    /// last change is so recent that another one could get the same timestamp, it first waits: for
    /// one tick of the host's clock, or for `WHOLE_SECONDS` if the file system seems to count in
    /// seconds.
    ///
    /// Some FUSE servers (QEMU's export is one) return the time of the query as the time of the
    /// last change. For these only the size counts.
    ///
    /// A later change is not noticed if nothing records it. This is so on a block device (the time
    /// of its node does not change with its content). It is so if a program sets the old time again
    /// (utimensat(2)) before the next query, and if one stores through a shared mapping whose pages
    /// were already dirty. The client of a network file system notices a change only when it asks
    /// its server.
    ///
    /// # Errors
    /// Those of statx(2) and fstatfs(2).
    pub fn settle(&self) -> io::Result<Version> {
        let of_fuse = rustix::fs::fstatfs(&self.file)?.f_type as u64 == FUSE_SUPER_MAGIC;
        let mut version = self.version(Ask::Anew)?;
        for _ in 0..SETTLE_TRIES {
            let Some(modified) = version.modified else { break };
            let grain = if modified.1 == 0 { WHOLE_SECONDS } else { tick() };
            if !is_within(modified, grain) {
                break;
            }
            std::thread::sleep(grain);
            let before = std::mem::replace(&mut version, self.version(Ask::Anew)?);
            if of_fuse && before.size == version.size && before.modified != version.modified {
                self.keeps_time.store(false, Ordering::Relaxed);
                let path = self.path.display();
                log::info!(
                    "{path}: keeps no time of change, so only a change of its size is noticed while it is in use"
                );
                return Ok(Version { modified: None, ..version });
            }
        }
        Ok(version)
    }

    /// Implements [`ReadAt::version`].
    pub(super) fn version_now(&self, ask: Ask) -> io::Result<Version> {
        // A device: reads beyond its end fail, and the time of its node does not change with its
        // content.
        if !self.is_file {
            return Ok(Version { size: self.size(), modified: None });
        }
        let sync = match ask {
            Ask::Known => AtFlags::STATX_DONT_SYNC,
            Ask::AsStat => AtFlags::empty(),
            Ask::Anew => AtFlags::STATX_FORCE_SYNC,
        };
        let flags = AtFlags::EMPTY_PATH | sync;
        let keeps_time = self.keeps_time.load(Ordering::Relaxed);
        match retry_on_intr(|| {
            rustix::fs::statx(&self.file, c"", flags, StatxFlags::SIZE | StatxFlags::MTIME)
        }) {
            Ok(file) => {
                let modified =
                    keeps_time.then_some((file.stx_mtime.tv_sec, file.stx_mtime.tv_nsec));
                Ok(Version { size: file.stx_size, modified })
            }
            // Seccomp filters of containers that are older than the call return these errors.
            Err(Errno::NOSYS | Errno::PERM) => {
                let file = self.file.metadata()?;
                let modified = keeps_time.then_some((file.mtime(), file.mtime_nsec() as u32));
                Ok(Version { size: file.size(), modified })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Returns the granularity of the timestamps that the kernel gives to changes, plus a margin: one
/// tick of its coarse clock.
fn tick() -> Duration {
    let tick = rustix::time::clock_getres(ClockId::RealtimeCoarse);
    let tick = Duration::try_from(tick).ok().filter(|tick| !tick.is_zero()).unwrap_or(LONGEST_TICK);
    tick.min(LONGEST_TICK) + Duration::from_millis(1)
}

/// Returns whether a time (seconds since 1970, nanoseconds) is less than `grain` from now, in the
/// past or the future.
fn is_within((seconds, nanoseconds): (i64, u32), grain: Duration) -> bool {
    let Ok(since) = SystemTime::now().duration_since(UNIX_EPOCH) else { return false };
    let Ok(seconds) = u64::try_from(seconds) else { return false };
    Duration::new(seconds, nanoseconds.min(999_999_999)).abs_diff(since) < grain
}
