//! Marks threads whose reads can wait: those of a stream, and others that no guest waits for. A
//! file on another machine lets the reads of all other threads overtake them, as ioprio_set(2) does
//! on a local disk.
//!
//! The mark belongs to the thread and not to a request, because a read of a stream goes through the
//! same layers as one of a guest, and only the last one, which asks the server, looks at the mark.
//!
//! Threads of a stream also give way on the processor while the guest is active: they do their work
//! in pieces, and let other threads run between two of them. A thread that wakes up because a
//! request has come, or its answer, does not replace a thread that runs: Linux lets that one use up
//! its time slice, of a few milliseconds, whatever their nice values (EEVDF, Linux 6.6 and later).
//! On two processors, 512 KiB that were copied in one call therefore delayed one request in a
//! thousand by 2 ms; in pieces of 64 KiB it is 0.4 ms.

use std::cell::Cell;

/// The most bytes that a thread which gives way reads before it lets others run, or copies up after
/// it has read them ahead, if clusters are not larger.
pub const PIECE: usize = 64 << 10;

thread_local! {
    static IS_MARKED: Cell<bool> = const { Cell::new(false) };
    static HAS_LOWER_PRIORITY: Cell<bool> = const { Cell::new(false) };
    static GIVES_WAY: Cell<bool> = const { Cell::new(false) };
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

/// Sets whether the calling thread gives way on the processor from now on.
pub fn set_gives_way(gives_way: bool) {
    GIVES_WAY.set(gives_way);
}

/// Whether the calling thread gives way on the processor.
pub fn gives_way() -> bool {
    GIVES_WAY.get()
}

/// The number of bytes that the calling thread may read at once if `len` bytes are wanted: at most
/// [`PIECE`] if it gives way.
pub fn piece(len: usize) -> usize {
    if gives_way() { len.min(PIECE) } else { len }
}

/// Lets other threads run, if the calling thread gives way. The caller must hold no guard and no
/// lock for which a guest's request may wait, unless it has made an [`Unmarked`].
pub fn let_others_run() {
    if gives_way() {
        std::thread::yield_now();
    }
}

/// Takes the mark off the calling thread until it is dropped: while the thread holds what a guest
/// may wait for, its reads must not wait, and it gives way to no thread.
#[derive(Debug)]
pub struct Unmarked {
    was_marked: bool,
    gave_way: bool,
}

impl Unmarked {
    /// Takes the mark off.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it has an effect")]
    pub fn new() -> Unmarked {
        Unmarked { was_marked: IS_MARKED.replace(false), gave_way: GIVES_WAY.replace(false) }
    }
}

impl Drop for Unmarked {
    fn drop(&mut self) {
        IS_MARKED.set(self.was_marked);
        GIVES_WAY.set(self.gave_way);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_gives_way_works_in_pieces() {
        let other = std::thread::spawn(|| {
            set_gives_way(true);
            assert_eq!([PIECE - 1, PIECE, 9 * PIECE].map(piece), [PIECE - 1, PIECE, PIECE]);
            let while_it_holds_a_guard = {
                let _unmarked = Unmarked::new();
                piece(9 * PIECE)
            };
            [while_it_holds_a_guard, piece(9 * PIECE)]
        });
        assert_eq!(other.join().unwrap(), [9 * PIECE, PIECE]);
        assert_eq!(piece(9 * PIECE), 9 * PIECE);
    }

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
