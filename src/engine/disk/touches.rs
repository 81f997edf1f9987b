//! What the guest has read of the backing chain: the order of its first touches, and what became of
//! the blocks that streams have brought.
//!
//! ```text
//! a read misses             ─► first touch of its blocks ─┬─► the record (order of the guest)
//! a read of brought blocks  ─► they were of use          ─┘   the stream that listens
//! a write to brought blocks ─► they were of no use
//! ```
//! A miss is recorded where it is known, and costs one short lock. A hit costs one load until a
//! stream has brought something; from then on one more for each block, and the lock only for the
//! first read of a block that was brought.
//!
//! **Touches:** no image. **Never:** delays a request for another one's I/O.
//! **Locks:** one leaf, `record`. **Invariants:** a block is recorded at most once; at most
//! [`MOST_TOUCHES`] runs are kept.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::block_set::{BLOCK, BlockSet, blocks};
use host::sync::{Mutex, rank};

/// The most runs of a record, which bounds its memory to 6 MiB. A machine that starts touches some
/// ten thousand.
pub const MOST_TOUCHES: usize = 1 << 18;

/// The most reads that a stream has not yet heard of. A stream that is paused hears of the last
/// ones only.
const MOST_NEWS: usize = 1 << 10;

/// A run of blocks that the guest has read for the first time, while they were or had been below.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FirstTouch {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes: whole blocks of 64 KiB; the last one may reach beyond the end of the disk.
    pub len: u64,
    /// Milliseconds since the disk was opened.
    pub at_ms: u32,
}

/// The first touches of a disk since it was opened, or a part of them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct TouchRecord {
    /// In the order in which they happened.
    pub touches: Vec<FirstTouch>,
    /// How many there are behind these.
    pub further: usize,
    /// Whether none is missing before the last one: no other process has served the guest before.
    pub is_whole: bool,
    /// Whether there were more than [`MOST_TOUCHES`], which are missing at the end.
    pub is_cut: bool,
}

/// What became of the blocks that streams have brought, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Brought {
    /// Blocks that a stream has copied up before the guest has touched them.
    pub bytes: u64,
    /// Those of them that the guest has read since.
    pub used: u64,
    /// Those of them that the guest has written or discarded before it read them.
    pub overwritten: u64,
}

/// The touches of one disk.
#[derive(Debug)]
pub(super) struct Touches {
    opened: Instant,
    /// Blocks that are in the record.
    seen: BlockSet,
    /// Blocks that a stream has brought and the guest has not touched.
    unused: BlockSet,
    brought: AtomicU64,
    used: AtomicU64,
    overwritten: AtomicU64,
    record: Mutex<{ rank::LEAF }, Record>,
}

#[derive(Debug, Default)]
struct Record {
    touches: Vec<FirstTouch>,
    is_cut: bool,
    is_taken_over: bool,
    listener: Option<Listener>,
}

/// A read of the guest that a stream hears of.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct GuestRead {
    /// Whole blocks, in bytes.
    pub range: Range<u64>,
    /// It has needed bytes of the chain. If not, it has read what a stream has brought.
    pub has_missed: bool,
}

/// A stream that hears of reads.
#[derive(Debug)]
struct Listener {
    news: VecDeque<GuestRead>,
    wake: Sender<()>,
}

impl Touches {
    pub fn new() -> Touches {
        Touches {
            opened: Instant::now(),
            seen: BlockSet::new(),
            unused: BlockSet::new(),
            brought: AtomicU64::new(0),
            used: AtomicU64::new(0),
            overwritten: AtomicU64::new(0),
            record: Mutex::default(),
        }
    }

    /// Notes that another process has served the guest before.
    pub fn taken_over(&self) {
        self.record.lock().is_taken_over = true;
    }

    /// A read of the range has needed bytes of the chain.
    pub fn missed(&self, range: &Range<u64>) {
        self.touch(blocks(range), true);
    }

    /// As [`Touches::missed`], but the range stays below: the guest may read it again and again,
    /// and only the first time counts.
    pub fn missed_and_left(&self, range: &Range<u64>) {
        if blocks(range).any(|block| !self.seen.contains(block)) {
            self.missed(range);
        }
    }

    /// A read of the range was answered by the overlay.
    pub fn hit(&self, range: &Range<u64>) {
        if self.brought.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut used = 0;
        for block in blocks(range) {
            used += u64::from(self.unused.remove(block));
        }
        if used > 0 {
            self.used.fetch_add(used * BLOCK, Ordering::Relaxed);
            self.touch(blocks(range), false);
        }
    }

    /// The guest has written or discarded the range.
    pub fn overwritten(&self, range: &Range<u64>) {
        if self.brought.load(Ordering::Relaxed) == 0 {
            return;
        }
        // Only whole blocks: the rest of a block may still be read.
        for block in range.start.div_ceil(BLOCK)..range.end / BLOCK {
            if self.unused.remove(block) {
                self.overwritten.fetch_add(BLOCK, Ordering::Relaxed);
            }
        }
    }

    /// A stream has copied the range up.
    pub fn brought(&self, range: &Range<u64>) {
        let mut brought = 0;
        for block in blocks(range).filter(|block| !self.seen.contains(*block)) {
            brought += u64::from(self.unused.add(block));
        }
        if brought > 0 {
            self.brought.fetch_add(brought * BLOCK, Ordering::Relaxed);
        }
    }

    /// What became of the blocks that streams have brought.
    pub fn outcome(&self) -> Brought {
        let [bytes, used, overwritten] = [&self.brought, &self.used, &self.overwritten]
            .map(|count| count.load(Ordering::Relaxed));
        Brought { bytes, used, overwritten }
    }

    /// The first touches so far without the first `skip` of them, and at most `most`. Misses wait
    /// while they are copied.
    pub fn record(&self, skip: usize, most: usize) -> TouchRecord {
        let record = self.record.lock();
        let Record { is_taken_over, is_cut, .. } = *record;
        let rest = record.touches.get(skip..).unwrap_or_default();
        let (touches, further) = rest.split_at(rest.len().min(most));
        let further = further.len();
        TouchRecord { touches: touches.to_vec(), further, is_whole: !is_taken_over, is_cut }
    }

    /// Begins to collect what the guest reads, for [`Touches::news`]. The channel is readable when
    /// there is something new. Replaces the last listener.
    pub fn listen(&self) -> Receiver<()> {
        let (wake, woken) = bounded(1);
        self.record.lock().listener = Some(Listener { news: VecDeque::new(), wake });
        woken
    }

    /// Ends [`Touches::listen`].
    pub fn listen_no_more(&self) {
        self.record.lock().listener = None;
    }

    /// What the guest has read below, or of brought blocks, since the last call.
    pub fn news(&self) -> Vec<GuestRead> {
        let mut record = self.record.lock();
        record
            .listener
            .as_mut()
            .map(|listener| listener.news.drain(..).collect())
            .unwrap_or_default()
    }

    fn touch(&self, touched: Range<u64>, has_missed: bool) {
        let at_ms = u32::try_from(self.opened.elapsed().as_millis()).unwrap_or(u32::MAX);
        let bytes = |blocks: Range<u64>| blocks.start * BLOCK..blocks.end.saturating_mul(BLOCK);
        let mut record = self.record.lock();
        let mut wakes = None;
        if let Some(Listener { news, wake }) = &mut record.listener {
            if news.len() == MOST_NEWS {
                news.pop_front();
            }
            news.push_back(GuestRead { range: bytes(touched.clone()), has_missed });
            wakes = Some(wake.clone());
        }
        for block in touched {
            if self.seen.add(block) {
                record.add(bytes(block..block + 1), at_ms);
            }
        }
        drop(record);
        // Other misses do not wait for the system call. It fails if the stream has not taken the
        // last news yet: it takes all of them then.
        if let Some(wake) = wakes {
            let _ = wake.try_send(());
        }
    }
}

impl Record {
    fn add(&mut self, range: Range<u64>, at_ms: u32) {
        let len = range.end - range.start;
        let is_full = self.touches.len() == MOST_TOUCHES;
        match self.touches.last_mut() {
            Some(last) if last.offset + last.len == range.start && last.at_ms == at_ms => {
                last.len += len;
            }
            _ if is_full => self.is_cut = true,
            _ => self.touches.push(FirstTouch { offset: range.start, len, at_ms }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(record: &TouchRecord) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for touch in &record.touches {
            match ranges.last_mut() {
                Some(last) if last.end == touch.offset => last.end += touch.len,
                _ => ranges.push(touch.offset..touch.offset + touch.len),
            }
        }
        ranges.iter().map(|range| range.start / BLOCK..range.end / BLOCK).collect()
    }

    #[test]
    fn a_block_is_recorded_when_it_is_first_read() {
        let touches = Touches::new();
        touches.missed(&(10 * BLOCK..10 * BLOCK + 4096));
        touches.missed(&(10 * BLOCK + 8192..11 * BLOCK + 1));
        touches.missed(&(3 * BLOCK..4 * BLOCK));
        touches.hit(&(20 * BLOCK..21 * BLOCK));
        touches.missed(&(9 * BLOCK..13 * BLOCK));
        let record = touches.record(0, usize::MAX);
        assert_eq!(ranges(&record), [10..12, 3..4, 9..10, 12..13]);
        assert!(record.is_whole);
        assert_eq!(touches.outcome(), Brought::default());
        touches.taken_over();
        assert!(!touches.record(0, usize::MAX).is_whole);
    }

    #[test]
    fn what_a_stream_has_brought_is_used_once_or_overwritten() {
        let touches = Touches::new();
        touches.missed(&(0..BLOCK));
        touches.brought(&(0..8 * BLOCK));
        touches.hit(&(0..BLOCK));
        touches.hit(&(6 * BLOCK..6 * BLOCK + 1));
        touches.hit(&(6 * BLOCK..6 * BLOCK + 1));
        touches.overwritten(&(3 * BLOCK + 1..5 * BLOCK));
        touches.hit(&(2 * BLOCK..5 * BLOCK));
        let outcome = Brought { bytes: 7 * BLOCK, used: 3 * BLOCK, overwritten: BLOCK };
        assert_eq!(touches.outcome(), outcome);
        assert_eq!(ranges(&touches.record(0, usize::MAX)), [0..1, 6..7, 2..5]);
    }

    #[test]
    fn a_listener_hears_of_misses_and_of_what_was_of_use() {
        let touches = Touches::new();
        touches.missed(&(BLOCK..BLOCK + 1));
        let woken = touches.listen();
        assert!(touches.news().is_empty() && woken.try_recv().is_err());
        touches.brought(&(5 * BLOCK..6 * BLOCK));
        touches.missed(&(BLOCK..BLOCK + 1));
        touches.hit(&(4 * BLOCK..6 * BLOCK));
        touches.hit(&(4 * BLOCK..6 * BLOCK));
        assert!(woken.try_recv().is_ok());
        let miss = GuestRead { range: BLOCK..2 * BLOCK, has_missed: true };
        let hit = GuestRead { range: 4 * BLOCK..6 * BLOCK, has_missed: false };
        assert_eq!(touches.news(), [miss, hit]);
        for block in 0..2 * MOST_NEWS as u64 {
            touches.missed(&(block * BLOCK..block * BLOCK + 1));
        }
        let news = touches.news();
        assert_eq!((news.len(), news[0].range.start), (MOST_NEWS, MOST_NEWS as u64 * BLOCK));
        touches.listen_no_more();
        touches.missed(&(0..1));
        assert!(touches.news().is_empty());
    }

    #[test]
    fn a_record_is_bounded() {
        let touches = Touches::new();
        for run in 0..MOST_TOUCHES as u64 + 5 {
            touches.missed(&(2 * run * BLOCK..2 * run * BLOCK + 1));
        }
        let record = touches.record(0, usize::MAX);
        assert_eq!((record.touches.len(), record.is_cut), (MOST_TOUCHES, true));
        let part = touches.record(MOST_TOUCHES - 3, 2);
        assert_eq!(part.touches, record.touches[MOST_TOUCHES - 3..MOST_TOUCHES - 1]);
        assert_eq!((part.further, touches.record(MOST_TOUCHES + 1, 1).touches.len()), (1, 0));
        assert!(record.is_whole);
    }

    /// Protects: what stays below is recorded and told once, however often the guest reads it.
    #[test]
    fn what_stays_below_is_touched_once() {
        let touches = Touches::new();
        let _woken = touches.listen();
        for range in [0..BLOCK, 0..BLOCK, 10..20, BLOCK - 1..BLOCK + 1, BLOCK..BLOCK + 1] {
            touches.missed_and_left(&range);
        }
        assert_eq!(touches.news().len(), 2);
        let record = touches.record(0, usize::MAX);
        assert_eq!(record.touches.iter().map(|touch| touch.len).sum::<u64>(), 2 * BLOCK);
    }
}
