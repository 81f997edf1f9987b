//! What a stream brings before its walk comes to it: what lies beside the guest's reads, and what
//! guests are known to need.
//!
//! ```text
//! 1. near      a read misses outside of the order: a window around it, which goes on while the
//!              guest reads on in it
//! 2. order     the learned order, in pieces, from the start of the stream on
//! 3. the walk  everything in ascending order (stream.rs)
//! ```
//! A piece of 1 or 2 is a hint. It is copied up as a chunk of the walk is, but it advances no
//! offset, and an error is left to the walk, which comes to every byte in the end. So the offset of
//! the job, its errors and its end are those of a walk alone. A wrong or hostile order costs
//! bandwidth and nothing else.
//!
//! **Touches:** no disk; ranges go in and out. **Locks:** one, `state`, of the job's thread and of
//! the scout's; no other lock is taken under it. **Invariants:** a piece has at most
//! [`STREAM_CHUNK`] bytes and lies inside the stream; at most [`MOST_PIECES`] pieces are kept.
//! Pieces may overlap: what is local already is passed over.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::STREAM_CHUNK;
use crate::disk::GuestRead;
use host::storage::Need;

/// The order in which a stream brings what it copies.
#[derive(Clone, Debug)]
pub enum StreamOrder {
    /// The walk alone.
    Ascending,
    /// The guest's neighbourhoods first, then these ranges in their order, then the walk. Ranges
    /// may overlap, and may reach beyond the end of the disk.
    Guest(Arc<[Range<u64>]>),
}

impl Default for StreamOrder {
    fn default() -> Self {
        StreamOrder::Guest(Arc::default())
    }
}

impl StreamOrder {
    fn pieces(&self, len: u64) -> Vec<Range<u64>> {
        match self {
            StreamOrder::Ascending => Vec::new(),
            StreamOrder::Guest(ranges) => pieces(ranges, len),
        }
    }
}

/// The most pieces of an order: 128 GiB of 512 KiB each. An order is 2^20 ranges long at most.
const MOST_PIECES: usize = 1 << 18;
/// The ranges of an order are sorted by offset within so many bytes, to be joined. The guest needs
/// them at nearly the same time.
const BATCH: u64 = 8 << 20;
/// Ranges with a gap of at most so many bytes are one piece: a request costs more than these bytes.
const GAP: u64 = 64 << 10;
/// The most pieces near the guest's reads that wait. Older ones are dropped: the guest is
/// elsewhere.
const MOST_NEAR: usize = 64;
/// How many pieces, and how many bytes, of the order are said ahead of the stream.
const SAID_PIECES: usize = 128;
const SAID_BYTES: u64 = 64 << 20;

/// A range that is brought before the walk comes to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Piece {
    pub range: Range<u64>,
    pub need: Need,
}

/// The course of one stream.
#[derive(Debug)]
pub(super) struct Course {
    state: Mutex<CourseState>,
}

#[derive(Debug)]
struct CourseState {
    /// End of the stream in bytes.
    len: u64,
    /// `None` if the stream does not follow the guest.
    neighbourhood: Option<Neighbourhood>,
    /// Newest first.
    near: VecDeque<Range<u64>>,
    ordered: Vec<Range<u64>>,
    /// The same ranges in ascending order, without overlaps.
    known: Vec<Range<u64>>,
    /// Index of the next piece that is handed out, and of the next one that is said.
    next: usize,
    said: usize,
    /// Pieces are handed out only after they were said.
    is_scouted: bool,
}

impl Course {
    /// The course of a stream over the first `len` bytes of a disk.
    pub fn new(order: &StreamOrder, len: u64) -> Course {
        let neighbourhood = match order {
            StreamOrder::Ascending => None,
            StreamOrder::Guest(_) => Some(Neighbourhood::default()),
        };
        let ordered = order.pieces(len);
        let (near, next, said, known) = (VecDeque::new(), 0, 0, ascending(&ordered));
        let is_scouted = false;
        let state =
            CourseState { len, neighbourhood, near, ordered, known, next, said, is_scouted };
        Course { state: Mutex::new(state) }
    }

    /// Says whether there is a scout. If so, no piece of the order is handed out before the scout
    /// has said it.
    pub fn set_scouted(&self, is_scouted: bool) {
        self.state.lock().is_scouted = is_scouted;
    }

    /// Whether the stream has to hear of the guest's reads.
    pub fn follows_guest(&self) -> bool {
        self.state.lock().neighbourhood.is_some()
    }

    /// Takes the guest's reads, the oldest first. Returns the pieces that they have promoted.
    pub fn hear(&self, reads: &[GuestRead]) -> Vec<Range<u64>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let Some(neighbourhood) = &mut state.neighbourhood else { return Vec::new() };
        let mut promoted = Vec::new();
        for GuestRead { range, has_missed } in reads {
            // What the order names comes by itself, and says nothing about what lies beside it.
            let is_new = *has_missed && !contains(&state.known, range.start);
            promoted
                .extend(neighbourhood.read(range, is_new, state.len).into_iter().flat_map(chunks));
        }
        for piece in promoted.iter().rev() {
            state.near.push_front(piece.clone());
        }
        state.near.truncate(MOST_NEAR);
        promoted
    }

    /// The pieces of the order that are to be said now; each is returned once.
    pub fn to_say(&self) -> Vec<Range<u64>> {
        let mut state = self.state.lock();
        let ahead = &state.ordered[state.next..state.said];
        let mut bytes: u64 = ahead.iter().map(|piece| piece.end - piece.start).sum();
        let begin = state.said;
        while let Some(piece) = state.ordered.get(state.said)
            && state.said - state.next < SAID_PIECES
            && bytes < SAID_BYTES
        {
            bytes += piece.end - piece.start;
            state.said += 1;
        }
        state.ordered[begin..state.said].to_vec()
    }

    /// What was said and not handed out has to be said again.
    pub fn unsay(&self) {
        let mut state = self.state.lock();
        state.said = state.next;
    }

    /// Whether pieces of the order are left.
    pub fn has_order(&self) -> bool {
        let state = self.state.lock();
        state.next < state.ordered.len()
    }

    /// Sets another order, while the stream runs.
    pub fn set_order(&self, order: &StreamOrder) {
        let mut state = self.state.lock();
        (state.ordered, state.next, state.said) = (order.pieces(state.len), 0, 0);
        state.known = ascending(&state.ordered);
    }

    /// Drops all pieces that are left. New reads of the guest promote others.
    pub fn clear(&self) {
        let mut state = self.state.lock();
        state.near.clear();
        state.known.clear();
        state.next = state.ordered.len();
        state.said = state.next;
    }

    /// Hands out the next piece; `None` if there is none, or if the scout has not said it.
    pub fn next(&self) -> Option<Piece> {
        let mut state = self.state.lock();
        if let Some(range) = state.near.pop_front() {
            return Some(Piece { range, need: Need::Soon });
        }
        if state.is_scouted && state.next == state.said {
            return None;
        }
        let range = state.ordered.get(state.next)?.clone();
        state.next += 1;
        state.said = state.said.max(state.next);
        Some(Piece { range, need: Need::Next })
    }
}

/// The ranges in ascending order, without overlaps.
fn ascending(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Whether one of the ranges, which are in ascending order, has the offset.
fn contains(ranges: &[Range<u64>], offset: u64) -> bool {
    let index = ranges.partition_point(|range| range.end <= offset);
    ranges.get(index).is_some_and(|range| range.start <= offset)
}

/// Cuts a range into pieces.
fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end_of = move |at: u64| (at / STREAM_CHUNK * STREAM_CHUNK + STREAM_CHUNK).min(range.end);
    let mut at = range.start;
    std::iter::from_fn(move || {
        let piece = at..end_of(at);
        at = piece.end;
        (piece.start < piece.end).then_some(piece)
    })
}

/// The pieces of an order: ranges that lie close to each other are joined, batch by batch.
fn pieces(order: &[Range<u64>], len: u64) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut batch: Vec<Range<u64>> = Vec::new();
    let mut bytes = 0;
    let inside = order.iter().map(|range| range.start..range.end.min(len));
    for range in inside.filter(|range| range.start < range.end) {
        bytes += range.end - range.start;
        batch.push(range);
        if bytes >= BATCH {
            bytes = 0;
            join(&mut batch, &mut pieces);
        }
    }
    join(&mut batch, &mut pieces);
    pieces
}

/// Joins the ranges of a batch, and appends the pieces.
fn join(batch: &mut Vec<Range<u64>>, pieces: &mut Vec<Range<u64>>) {
    batch.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in batch.drain(..) {
        match joined.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(GAP) => {
                last.end = last.end.max(range.end);
            }
            _ => joined.push(range),
        }
    }
    let most = MOST_PIECES.saturating_sub(pieces.len());
    pieces.extend(joined.into_iter().flat_map(chunks).take(most));
}

/// The size of a new window in bytes: at the start, and its limits.
const FIRST_WINDOW: u64 = 1 << 20;
const SMALLEST_WINDOW: u64 = 256 << 10;
const LARGEST_WINDOW: u64 = 4 << 20;
/// Windows that are followed at the same time: a guest reads several files at once.
const WINDOWS: usize = 16;
/// So many windows that have ended decide together about the size of the next ones.
const JUDGED: u32 = 8;

/// The windows around the guest's reads.
#[derive(Debug)]
struct Neighbourhood {
    size: u64,
    /// The one that was read last is the last one.
    windows: VecDeque<Window>,
    ended: u32,
    /// Those of them of which the guest has read at least half.
    were_of_use: u32,
}

#[derive(Debug)]
struct Window {
    range: Range<u64>,
    /// Bytes of it that the guest has read.
    read: u64,
}

impl Default for Neighbourhood {
    fn default() -> Self {
        let (size, windows) = (FIRST_WINDOW, VecDeque::new());
        Neighbourhood { size, windows, ended: 0, were_of_use: 0 }
    }
}

impl Neighbourhood {
    /// Takes a read of the guest. Returns the range to bring. Only a read that `is_new` begins a
    /// window.
    fn read(&mut self, read: &Range<u64>, is_new: bool, len: u64) -> Option<Range<u64>> {
        if read.start >= len {
            return None;
        }
        let size = self.size;
        let holds = |window: &Window| {
            (window.range.start..window.range.end.saturating_add(size)).contains(&read.start)
        };
        if let Some(mut window) =
            self.windows.iter().position(holds).and_then(|at| self.windows.remove(at))
        {
            window.read += read.end.saturating_sub(read.start);
            // The guest comes close to the end: the window goes on before it is there.
            let goes_on = read.end.saturating_add(size / 4) >= window.range.end;
            let more = goes_on.then(|| {
                let end = window.range.end.max(read.end).saturating_add(size).min(len);
                let more = window.range.end.min(end)..end;
                window.range.end = end;
                more
            });
            self.windows.push_back(window);
            return more.filter(|more| more.start < more.end);
        }
        if !is_new {
            return None;
        }
        if self.windows.len() == WINDOWS
            && let Some(window) = self.windows.pop_front()
        {
            self.judge(2 * window.read >= window.range.end - window.range.start);
        }
        let start = read.start / size * size;
        let end = start.saturating_add(size).max(read.end).min(len);
        let read = read.end.saturating_sub(read.start);
        self.windows.push_back(Window { range: start..end, read });
        Some(start..end)
    }

    fn judge(&mut self, was_of_use: bool) {
        self.ended += 1;
        self.were_of_use += u32::from(was_of_use);
        if self.ended < JUDGED {
            return;
        }
        self.size = match 2 * self.were_of_use >= self.ended {
            true => (self.size * 2).min(LARGEST_WINDOW),
            false => (self.size / 2).max(SMALLEST_WINDOW),
        };
        (self.ended, self.were_of_use) = (0, 0);
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges that happen to have one")]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn guest(ranges: Vec<Range<u64>>) -> StreamOrder {
        StreamOrder::Guest(ranges.into())
    }

    fn all(course: &Course) -> Vec<Range<u64>> {
        std::iter::from_fn(|| course.next().map(|piece| piece.range)).collect()
    }

    #[test]
    fn ranges_of_an_order_that_lie_close_together_are_one_piece() {
        let order = guest(vec![
            9 * MIB..9 * MIB + 4 * KIB,
            GIB..GIB + 64 * KIB,
            9 * MIB + 60 * KIB..9 * MIB + 64 * KIB,
            5 * MIB..5 * MIB + 700 * KIB,
            3 * GIB..4 * GIB,
            2 * GIB - KIB..9 * GIB,
        ]);
        let course = Course::new(&order, 2 * GIB);
        let expected = [
            5 * MIB..5 * MIB + 512 * KIB,
            5 * MIB + 512 * KIB..5 * MIB + 700 * KIB,
            9 * MIB..9 * MIB + 64 * KIB,
            GIB..GIB + 64 * KIB,
            2 * GIB - KIB..2 * GIB,
        ];
        assert_eq!(all(&course), expected);
        assert!(!course.has_order());
    }

    #[test]
    fn an_order_is_kept_beyond_a_batch() {
        let ranges: Vec<_> = (0..100).rev().map(|at| at * 16 * MIB..at * 16 * MIB + MIB).collect();
        let course = Course::new(&guest(ranges), 2 * GIB);
        let found = all(&course);
        assert_eq!(found.len(), 200);
        // Within a batch of 8 MiB the ranges are sorted.
        assert_eq!(found[0].start, 92 * 16 * MIB);
        assert!(found.chunks(16).is_sorted_by(|a, b| a[0].start > b[0].start));
    }

    #[test]
    fn a_hostile_order_is_bounded() {
        let ranges: Vec<_> = (0..1 << 20)
            .map(|at: u64| {
                let start = at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                start..start.wrapping_add(at % 5 * GIB)
            })
            .chain([0..u64::MAX, u64::MAX - 1..u64::MAX])
            .collect();
        let course = Course::new(&guest(ranges), u64::MAX);
        let found = all(&course);
        assert!(found.len() <= MOST_PIECES);
        assert!(found.iter().all(|piece| piece.start < piece.end));
        assert!(found.iter().all(|piece| piece.end - piece.start <= STREAM_CHUNK));
    }

    fn miss(start: u64, len: u64) -> GuestRead {
        GuestRead { range: start..start + len, has_missed: true }
    }

    #[test]
    fn what_the_guest_misses_comes_before_the_order() {
        let course = Course::new(&guest(vec![GIB..GIB + MIB]), 2 * GIB);
        assert_eq!(course.next().unwrap(), Piece { range: GIB..GIB + MIB / 2, need: Need::Next });
        let promoted = course.hear(&[miss(9 * MIB + 4 * KIB, 4 * KIB)]);
        assert_eq!(promoted, [9 * MIB..9 * MIB + MIB / 2, 9 * MIB + MIB / 2..10 * MIB]);
        let near = course.next().unwrap();
        assert_eq!(near, Piece { range: promoted[0].clone(), need: Need::Soon });
        // The newest neighbourhood is the first one.
        assert_eq!(course.hear(&[miss(700 * MIB, 1)]).len(), 2);
        // What the order names, and what a stream has brought, begins none.
        assert!(course.hear(&[miss(GIB + 5, 1)]).is_empty());
        let hit = GuestRead { range: 90 * MIB..91 * MIB, has_missed: false };
        assert!(course.hear(&[hit]).is_empty());
        let starts: Vec<_> = all(&course).iter().map(|piece| piece.start).collect();
        let half = MIB / 2;
        assert_eq!(starts, [700 * MIB, 700 * MIB + half, 9 * MIB + half, GIB + half]);
        course.set_order(&guest(vec![5 * GIB..6 * GIB, 3 * MIB..4 * MIB]));
        assert_eq!(all(&course), [3 * MIB..3 * MIB + half, 3 * MIB + half..4 * MIB]);
        course.hear(&[miss(50 * MIB, 1)]);
        course.clear();
        assert!(course.next().is_none() && !course.has_order());
    }

    #[test]
    fn with_a_scout_a_piece_is_said_before_it_is_handed_out() {
        let ranges: Vec<_> = (0..300).map(|at| at * 10 * MIB..at * 10 * MIB + MIB / 2).collect();
        let course = Course::new(&guest(ranges), 4 * GIB);
        course.set_scouted(true);
        assert!(course.has_order() && course.next().is_none());
        let said = course.to_say();
        assert_eq!(said.len() as u64, SAID_BYTES / (MIB / 2));
        assert!(course.to_say().is_empty());
        assert_eq!(course.next().unwrap().range, said[0]);
        let more = course.to_say();
        assert_eq!(more.len(), 1);
        course.unsay();
        assert!(course.next().is_none());
        assert_eq!(course.to_say()[0], said[1]);
        assert_eq!(course.next().unwrap().range, said[1]);
    }

    #[test]
    fn a_window_goes_on_while_the_guest_reads_on() {
        let mut neighbourhood = Neighbourhood::default();
        let mut read = |at: u64| neighbourhood.read(&(at..at + 64 * KIB), true, GIB);
        assert_eq!(read(10 * MIB + 512 * KIB), Some(10 * MIB..11 * MIB));
        assert_eq!(read(10 * MIB), None);
        assert_eq!(read(10 * MIB + 900 * KIB), Some(11 * MIB..12 * MIB));
        assert_eq!(read(11 * MIB), None);
        assert_eq!(read(11 * MIB + 900 * KIB), Some(12 * MIB..13 * MIB));
        // Beyond the end by less than a window: the guest has been faster.
        assert_eq!(read(13 * MIB + MIB / 2), Some(13 * MIB..14 * MIB + MIB / 2 + 64 * KIB));
        assert_eq!(read(GIB - 64 * KIB), Some(GIB - MIB..GIB));
        assert_eq!(read(GIB - 64 * KIB), None);
        assert_eq!(read(GIB), None);
    }

    #[test]
    fn windows_are_as_large_as_they_are_of_use() {
        let mut neighbourhood = Neighbourhood::default();
        for at in 0..(WINDOWS as u64 + 2 * u64::from(JUDGED)) {
            neighbourhood.read(&(at * 64 * MIB..at * 64 * MIB + KIB), true, 64 * GIB);
        }
        assert_eq!(neighbourhood.size, SMALLEST_WINDOW);
        for at in 500..(500 + WINDOWS as u64 + 3 * u64::from(JUDGED)) {
            let start = at * 64 * MIB;
            let half = neighbourhood.size / 2;
            neighbourhood.read(&(start..start + half), true, 64 * GIB);
            neighbourhood.read(&(start + KIB..start + KIB + half / 4), false, 64 * GIB);
        }
        assert!(neighbourhood.size > SMALLEST_WINDOW, "{neighbourhood:?}");
    }
}
