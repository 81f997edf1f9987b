//! Brings the pieces of a stream's course (`course.rs`): reader threads read several of them at the
//! same time, and the job's thread copies them up as they come.
//!
//! **Touches:** `disk`, the course. **Never:** the job's offset. **Locks:** that of the course.
//! **Invariants:** the walk does not go on while pieces of the order are left, unless they are
//! given up after an error; an order that comes later interrupts it. Pieces near the guest's reads
//! delay the walk only while they are copied up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::Priority;
use super::ahead::{Asked, Readers};
use super::course::{Course, Piece};
use crate::disk::{Ahead, Disk};
use host::storage::Need;

/// The number of pieces that are read at the same time or wait for the job's thread.
const PIECES_AHEAD: usize = 8;

/// The pieces that are on their way.
pub(super) struct Pieces {
    course: Arc<Course>,
    readers: Readers,
    asked: VecDeque<(Piece, Asked)>,
}

impl Pieces {
    pub(super) fn new(
        disk: &Arc<Disk>,
        priority: Priority,
        depth: usize,
        course: &Arc<Course>,
    ) -> Pieces {
        let readers = Readers::new(disk, priority, depth);
        Pieces { course: Arc::clone(course), readers, asked: VecDeque::new() }
    }

    /// Whether a piece of the order is on its way or is left.
    pub(super) fn has_order(&self) -> bool {
        self.asked.iter().any(|(piece, _)| piece.need == Need::Next) || self.course.has_order()
    }

    /// Drops all pieces. The walk brings their bytes.
    pub(super) fn give_up(&mut self) {
        self.course.clear();
        self.asked.clear();
    }

    /// Returns a piece whose bytes have come. Waits up to `patience` for the oldest one.
    pub(super) fn take(&mut self, patience: Duration) -> Option<(Piece, Ahead)> {
        while self.asked.len() < PIECES_AHEAD
            && let Some(piece) = self.course.next()
        {
            let asked = self.readers.ask(piece.range.clone());
            self.asked.push_back((piece, asked));
        }
        let ready = (0..self.asked.len())
            .find_map(|index| Some((index, came(&self.asked[index].1, Duration::ZERO)?)));
        let (index, bytes) = match ready {
            Some(ready) => ready,
            None if patience.is_zero() => return None,
            None if self.asked.is_empty() => {
                // The scout has not said the next one yet.
                std::thread::sleep(patience.min(Duration::from_millis(1)));
                return None;
            }
            None => (0, came(&self.asked[0].1, patience)?),
        };
        self.asked.remove(index).map(|(piece, _)| (piece, bytes))
    }
}

/// The bytes of a piece, if they come within `patience`.
fn came(asked: &Asked, patience: Duration) -> Option<Ahead> {
    let Some(bytes) = &asked.bytes else { return Some(Ahead::default()) };
    match bytes.recv_timeout(patience) {
        Ok(bytes) => Some(bytes),
        Err(crossbeam_channel::RecvTimeoutError::Timeout) => None,
        // The reader thread has ended. The piece is read when it is copied up.
        Err(crossbeam_channel::RecvTimeoutError::Disconnected) => Some(Ahead::default()),
    }
}
