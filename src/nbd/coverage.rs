//! Which bytes of a read have come. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

/// The bytes of a range that have come, each at most once.
#[derive(Debug)]
pub(crate) struct Coverage {
    wanted: Range<u64>,
    /// Start and end of each run; runs neither overlap nor touch.
    runs: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Creates a coverage of `wanted` without any byte.
    pub fn new(wanted: Range<u64>) -> Coverage {
        Coverage { wanted, runs: BTreeMap::new() }
    }

    /// Adds `len` bytes at `offset`. Returns whether all of them were wanted and none had come
    /// before; otherwise nothing changes.
    #[must_use]
    pub fn add(&mut self, offset: u64, len: u64) -> bool {
        let Some(mut end) = offset.checked_add(len) else { return false };
        if len == 0 || offset < self.wanted.start || end > self.wanted.end {
            return false;
        }
        let before = self.runs.range(..end).next_back().map(|(&start, &end)| (start, end));
        let mut start = offset;
        if let Some((run, run_end)) = before {
            if run_end > offset {
                return false;
            }
            if run_end == offset {
                start = run;
            }
        }
        if let Some(after) = self.runs.remove(&end) {
            end = after;
        }
        self.runs.insert(start, end);
        true
    }

    /// Whether every wanted byte has come.
    pub fn is_complete(&self) -> bool {
        self.wanted.is_empty() || self.runs.get(&self.wanted.start) == Some(&self.wanted.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_counts_once() {
        let mut coverage = Coverage::new(100..200);
        for (offset, len, fits) in [
            (150, 10, true),
            (150, 10, false),
            (155, 1, false),
            (140, 11, false),
            (159, 2, false),
            (140, 30, false),
            (99, 2, false),
            (199, 2, false),
            (120, 0, false),
            (u64::MAX, 2, false),
            (100, 50, true),
            (170, 30, true),
            (160, 11, false),
        ] {
            assert_eq!(coverage.add(offset, len), fits, "{offset} {len}");
            assert!(!coverage.is_complete());
        }
        assert!(coverage.add(160, 10));
        assert!(coverage.is_complete());
        assert_eq!(coverage.runs.len(), 1, "runs that touch are one");
    }

    /// Compares with one flag per byte, for every order of adding pieces that a counter generates.
    #[test]
    fn agrees_with_one_flag_per_byte() {
        for seed in 1..2000u64 {
            let (mut coverage, mut flags) = (Coverage::new(10..26), [false; 40]);
            let mut state = seed;
            for _ in 0..20 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
                let (offset, len) = ((state >> 33) % 30, (state >> 50) % 8);
                let range = offset as usize..(offset + len) as usize;
                let fits = len > 0
                    && range.start >= 10
                    && range.end <= 26
                    && !flags[range.clone()].contains(&true);
                assert_eq!(coverage.add(offset, len), fits, "seed {seed}: {range:?}");
                if fits {
                    flags[range].fill(true);
                }
                assert_eq!(coverage.is_complete(), !flags[10..26].contains(&false), "seed {seed}");
            }
        }
    }
}
