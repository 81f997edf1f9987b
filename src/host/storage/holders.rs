//! Finds the process that holds QEMU's locks on a file, for messages, as far as /proc shows it.

use std::fs;
use std::path::Path;

use crate::error::Holder;

/// The bytes that are locked: from the first permission in use to the last one denied to others
/// (see `locks.rs`).
const LOCK_BYTES: std::ops::RangeInclusive<u64> = 100..=203;

/// Returns a process that has a lock on the file with this inode number; `None` if none is visible.
/// The locks of an open file belong to no process (`F_OFD_SETLK`), so the descriptors of all
/// processes are searched. Only their `fdinfo` is read, because the files themselves may be on a
/// host that hangs.
pub(super) fn find(inode: u64) -> Option<Holder> {
    let processes = fs::read_dir("/proc").ok()?;
    let mut pids: Vec<u32> =
        processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter().find(|&pid| pid != std::process::id() && holds(pid, inode)).map(|pid| {
        let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        Holder { pid, name: String::from_utf8_lossy(&name).trim_end().to_owned() }
    })
}

fn holds(pid: u32, inode: u64) -> bool {
    let Ok(descriptors) = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fdinfo"))
    else {
        return false;
    };
    descriptors.flatten().any(|entry| {
        let facts = fs::read(entry.path()).unwrap_or_default();
        String::from_utf8_lossy(&facts).lines().any(|line| is_lock_on(line, inode))
    })
}

/// Returns whether a line of fdinfo describes such a lock, for example `lock: 1: OFDLCK  ADVISORY
/// READ -1 fe:00:1234 100 101`.
fn is_lock_on(line: &str, inode: u64) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let mut words = lock.split_whitespace().rev();
    let (_last, first, file) = (words.next(), words.next(), words.next());
    let of_file = file.and_then(|file| file.rsplit(':').next()?.parse().ok()) == Some(inode);
    of_file
        && first
            .and_then(|first| first.parse().ok())
            .is_some_and(|first| LOCK_BYTES.contains(&first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_told_apart() {
        assert!(is_lock_on("lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 100", 1234));
        assert!(is_lock_on("lock:\t2: POSIX  ADVISORY  WRITE 77 00:2d:1234 201 EOF", 1234));
        for other in [
            "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:12345 100 100",
            "lock:\t1: FLOCK  ADVISORY  WRITE 77 fe:00:1234 0 EOF",
            "pos:\t1234",
            "lock:",
            "",
        ] {
            assert!(!is_lock_on(other, 1234), "{other}");
        }
    }
}
