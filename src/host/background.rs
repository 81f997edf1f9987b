//! Marks threads whose reads can wait: those of a stream, and others that no guest waits for. A
//! file on another machine lets the reads of all other threads overtake them, as ioprio_set(2) does
//! on a local disk.
//!
//! The mark belongs to the thread and not to a request, because a read of a stream goes through the
//! same layers as one of a guest, and only the last one, which asks the server, looks at the mark.

use std::cell::Cell;

thread_local! {
    static IS_MARKED: Cell<bool> = const { Cell::new(false) };
    static HAS_LOWER_PRIORITY: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread for the rest of its life.
pub fn mark_thread() {
    IS_MARKED.set(true);
}

/// Whether the calling thread is marked.
pub fn is_marked() -> bool {
    IS_MARKED.get()
}

/// Lowers the priority of the calling thread for the rest of its life, to a nice value of `nice` or
/// the present one, whichever is higher. On Linux the nice value is that of a single thread.
pub fn lower_priority(nice: i32) {
    HAS_LOWER_PRIORITY.set(true);
    if rustix::process::getpriority_process(None).is_ok_and(|now| now < nice) {
        // If the system refuses, the thread competes with the guest at its old priority.
        let _ = rustix::process::setpriority_process(None, nice);
    }
}

/// Whether the priority of the calling thread was lowered: other threads must not do its work at
/// theirs.
pub fn has_lower_priority() -> bool {
    HAS_LOWER_PRIORITY.get()
}

/// Takes the mark off the calling thread until it is dropped: while the thread holds what a guest
/// may wait for, its reads must not wait.
#[derive(Debug)]
pub struct Unmarked {
    was_marked: bool,
}

impl Unmarked {
    /// Takes the mark off.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it has an effect")]
    pub fn new() -> Unmarked {
        Unmarked { was_marked: IS_MARKED.replace(false) }
    }
}

impl Drop for Unmarked {
    fn drop(&mut self) {
        IS_MARKED.set(self.was_marked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_that_of_one_thread() {
        let marked = std::thread::spawn(|| {
            mark_thread();
            let unmarked = Unmarked::new();
            assert!(!is_marked());
            drop(unmarked);
            is_marked()
        });
        assert!(marked.join().unwrap());
        assert!(!is_marked());
    }
}
