//! The entries of one L2 table as runs, for a table that does not change. What was
//! written in one piece is a few runs, and takes some hundred bytes instead of a whole
//! cluster.
//!
//! **Invariants:** [`Packed::raw`] returns exactly the words that were packed, whatever
//! they are.

use crate::format::RawL2Entry;

/// A table is packed only if it has at most one run for so many words, which makes it a
/// twentieth of its size or less. Tests, whose tables are small, pack more of them.
const WORDS_PER_RUN: usize =
    if cfg!(any(test, feature = "testing")) { 4 } else { WORDS_PER_RUN_OF_LARGE };
const WORDS_PER_RUN_OF_LARGE: usize = 64;

/// Entries that follow each other: from one to the next, the descriptor grows by the same
/// amount, and the bitmap stays.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Index of the first entry.
    start: u32,
    /// Whether the descriptor grows by a cluster from entry to entry. If not, it stays.
    grows: bool,
    /// The first entry.
    first: RawL2Entry,
}

/// The entries of one table.
#[derive(Debug)]
pub(super) struct Packed {
    /// By their start; the first one starts at 0. Never empty.
    runs: Box<[Run]>,
    /// Number of entries.
    entries: usize,
    /// Size of a cluster in bytes.
    cluster_size: u64,
}

impl Packed {
    /// Packs the entries of a table with so many words; returns `None` if they are too
    /// many runs.
    pub fn new(
        entries: impl Iterator<Item = RawL2Entry>,
        words: usize,
        cluster_size: u64,
    ) -> Option<Packed> {
        let mut runs: Vec<Run> = Vec::new();
        let mut count = 0;
        for (index, raw) in entries.enumerate() {
            let start = u32::try_from(index).ok()?;
            count = index + 1;
            if let Some(last) = runs.last_mut() {
                if last.start + 1 == start {
                    last.grows = last.first.descriptor.wrapping_add(cluster_size) == raw.descriptor;
                }
                if last.at(start, cluster_size) == raw {
                    continue;
                }
                last.grows &= last.start + 1 < start;
            }
            if runs.len() >= words / WORDS_PER_RUN {
                return None;
            }
            runs.push(Run { start, grows: false, first: raw });
        }
        if runs.is_empty() {
            return None;
        }
        Some(Packed { runs: runs.into(), entries: count, cluster_size })
    }

    /// Returns the raw entry at `index`.
    pub fn raw(&self, index: usize) -> RawL2Entry {
        assert!(index < self.entries, "entry {index} of {}", self.entries);
        self.runs[self.run_of(index)].at(index as u32, self.cluster_size)
    }

    /// Returns all entries.
    pub fn iter(&self) -> impl Iterator<Item = RawL2Entry> {
        self.runs.iter().enumerate().flat_map(|(number, run)| {
            (run.start..self.end(number) as u32).map(|index| run.at(index, self.cluster_size))
        })
    }

    /// Returns how many entries from `index` on, at most `most`, have descriptors that
    /// begin with `first` and grow by `step` from one to the next.
    pub fn series(&self, index: usize, first: u64, step: u64, most: usize) -> usize {
        let end = self.entries.min(index.saturating_add(most));
        let (mut at, mut expected) = (index, first);
        let mut number = self.run_of(index);
        while at < end && self.raw_of(number, at).descriptor == expected {
            let run = &self.runs[number];
            let is_whole = step == if run.grows { self.cluster_size } else { 0 };
            let next = if is_whole { self.end(number).min(end) } else { at + 1 };
            expected = expected.wrapping_add(step.wrapping_mul((next - at) as u64));
            at = next;
            number += usize::from(at == self.end(number));
        }
        at - index
    }

    /// Returns the memory that the runs take, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.runs)
    }

    fn run_of(&self, index: usize) -> usize {
        self.runs.partition_point(|run| run.start as usize <= index) - 1
    }

    fn raw_of(&self, number: usize, index: usize) -> RawL2Entry {
        self.runs[number].at(index as u32, self.cluster_size)
    }

    /// Index of the first entry behind a run.
    fn end(&self, number: usize) -> usize {
        self.runs.get(number + 1).map_or(self.entries, |next| next.start as usize)
    }
}

impl Run {
    fn at(&self, index: u32, cluster_size: u64) -> RawL2Entry {
        let distance = if self.grows { u64::from(index - self.start) } else { 0 };
        RawL2Entry {
            descriptor: self.first.descriptor.wrapping_add(distance.wrapping_mul(cluster_size)),
            ..self.first
        }
    }
}

#[cfg(test)]
mod tests {
    use sim::random::Random;

    use super::*;

    const CLUSTER: u64 = 1 << 16;
    const COPIED: u64 = 1 << 63;

    fn plain(descriptor: u64) -> RawL2Entry {
        RawL2Entry { descriptor, bitmap: 0 }
    }

    fn pack(entries: &[RawL2Entry]) -> Option<Packed> {
        Packed::new(entries.iter().copied(), entries.len(), CLUSTER)
    }

    fn check(entries: &[RawL2Entry]) -> Packed {
        let packed = pack(entries).unwrap();
        assert!(packed.iter().eq(entries.iter().copied()));
        for (index, raw) in entries.iter().enumerate() {
            assert_eq!(packed.raw(index), *raw, "index {index}");
        }
        packed
    }

    /// Protects: entries in a row, entries that stay, and both beside each other.
    #[test]
    fn runs_give_the_words_back() {
        let rows = |runs: &[(u64, u64, u64)]| -> Vec<_> {
            let run = |&(first, step, len): &(u64, u64, u64)| {
                (0..len).map(move |n| plain(first.wrapping_add(n * step)))
            };
            runs.iter().flat_map(run).collect()
        };
        for (runs, count) in [
            (&[(0, 0, 512)][..], 1),
            (&[(COPIED | (5 * CLUSTER), CLUSTER, 512)], 1),
            (&[(u64::MAX, 0, 512)], 1),
            (&[(u64::MAX - 3, CLUSTER, 512)], 1),
            (&[(0, 0, 1), (COPIED, CLUSTER, 511)], 2),
            (&[(COPIED, CLUSTER, 1), (7, 0, 1), (COPIED, CLUSTER, 510)], 3),
            // The second run begins where the first one would go on.
            (&[(CLUSTER, 0, 2), (2 * CLUSTER, CLUSTER, 510)], 2),
            (&[(CLUSTER, CLUSTER, 2), (2 * CLUSTER, 0, 510)], 2),
            (&[(9, 3, 3), (0, 0, 509)], 4),
        ] {
            assert_eq!(check(&rows(runs)).runs.len(), count, "{runs:?}");
        }
    }

    /// Protects: an entry whose bitmap differs is not part of a run.
    #[test]
    fn bitmaps_are_kept() {
        let mut entries: Vec<_> =
            (0..512).map(|n| RawL2Entry { descriptor: n * CLUSTER, bitmap: 7 }).collect();
        assert_eq!(check(&entries).runs.len(), 1);
        entries[1].bitmap = 8;
        entries[300].bitmap = 8;
        check(&entries);
    }

    /// Protects: a table with too many runs is not packed.
    #[test]
    fn too_many_runs_are_not_packed() {
        let most = 512 / WORDS_PER_RUN;
        let in_runs = |count: usize| -> Vec<_> {
            (0..512).map(|n| plain(3 * (n * count / 512) as u64)).collect()
        };
        assert_eq!(check(&in_runs(most)).runs.len(), most);
        assert!(pack(&in_runs(most + 1)).is_none());
        assert!(pack(&[]).is_none());
        assert!(size_of::<Run>() * 20 <= WORDS_PER_RUN_OF_LARGE * 8);
    }

    /// Protects: a series is as long as entry by entry.
    #[test]
    fn series_are_as_long_as_the_words_say() {
        let mut random = Random::of_test(20_261_130);
        let mut below = |end: u64| random.below(end) as usize;
        for _ in 0..200 {
            let mut entries = Vec::new();
            while entries.len() < 1024 {
                let first = [0, CLUSTER, COPIED | CLUSTER, 3][below(4)];
                let step = [0, CLUSTER][below(2)];
                let len = [1, 2, 300, 700][below(4)];
                entries.extend((0..len).map(|n| plain(first + n * step)));
            }
            let packed = check(&entries);
            for _ in 0..200 {
                let index = below(entries.len() as u64);
                let first = entries[index].descriptor;
                let step = [0, CLUSTER][below(2)];
                let most = below(1500);
                let wanted = entries[index..]
                    .iter()
                    .take(most)
                    .zip(0..)
                    .take_while(|(raw, n)| raw.descriptor == first + n * step)
                    .count();
                assert_eq!(packed.series(index, first, step, most), wanted);
                assert_eq!(packed.series(index, first + 1, step, most), 0);
            }
        }
    }
}
