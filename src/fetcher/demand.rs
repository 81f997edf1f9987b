//! How much to fetch when a thread waits for a few bytes: little at a random place, and more and
//! more where the requests follow each other.

use std::ops::Range;

/// What a request at a random place fetches, in bytes: two clusters of the usual size. More would
/// cost bandwidth that the next random request needs.
pub const FIRST: u64 = 128 << 10;

/// The most that one request fetches, in bytes.
pub const LARGEST: u64 = 8 << 20;

/// The number of sequences that are followed at the same time.
const SEQUENCES: usize = 16;

/// How far behind the end of a sequence a request may begin and still follow it, in bytes: requests
/// of several threads arrive in any order.
const GAP: u64 = 256 << 10;

/// A run of requests that follow each other.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    /// Where the last fetch ended.
    end: u64,
    /// The length of the last fetch.
    len: u64,
    /// When it was last followed, as a count of requests.
    used: u64,
}

/// The sequences of requests of one file.
#[derive(Debug, Default)]
pub struct Sequences {
    known: Vec<Sequence>,
    requests: u64,
}

impl Sequences {
    /// Returns what to fetch for a request that waits for `missing`: a range around it in units of
    /// `unit` bytes (a power of two), inside a file of `size` bytes.
    pub fn plan(&mut self, missing: Range<u64>, unit: u64, size: u64) -> Range<u64> {
        self.requests += 1;
        let requests = self.requests;
        let is_followed = |sequence: &Sequence| {
            sequence.end <= missing.start && missing.start - sequence.end <= GAP
        };
        let followed = self.known.iter().position(is_followed);
        let followed = followed.map(|index| (index, self.known[index]));
        let len = match followed {
            Some((_, sequence)) => sequence.len.saturating_mul(2).min(LARGEST),
            None => FIRST,
        }
        .max(unit);
        // A fetch at a random place is aligned to its length, so that the bytes before the request
        // come with it; a sequence goes on where it ended.
        let start = match followed {
            Some((_, sequence)) => sequence.end.max(missing.start.saturating_sub(GAP)),
            None => missing.start / len * len,
        };
        let start = start.min(missing.start) / unit * unit;
        let end = (start + len).max(missing.end).next_multiple_of(unit).min(size);
        let next = Sequence { end, len, used: requests };
        match followed {
            Some((index, _)) => self.known[index] = next,
            None if self.known.len() < SEQUENCES => self.known.push(next),
            None => {
                if let Some(oldest) = self.known.iter_mut().min_by_key(|sequence| sequence.used) {
                    *oldest = next;
                }
            }
        }
        start..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn requests_that_follow_each_other_fetch_more_and_more() {
        let mut sequences = Sequences::default();
        let mut at = 10 * MIB;
        let mut lengths = Vec::new();
        for _ in 0..9 {
            let planned = sequences.plan(at..at + 4096, 65536, 1 << 40);
            assert!(planned.start <= at && at + 4096 <= planned.end);
            lengths.push(planned.end - planned.start);
            at = planned.end;
        }
        let first: Vec<u64> = (0..7).map(|step| FIRST << step).collect();
        assert_eq!(lengths[..7], first);
        assert_eq!(lengths[7..], [LARGEST; 2]);
    }

    #[test]
    fn requests_at_random_places_fetch_little() {
        let mut sequences = Sequences::default();
        for at in (0..100).map(|step| step * 7919 * MIB / 16) {
            let planned = sequences.plan(at..at + 4096, 65536, 1 << 40);
            assert!(planned.end - planned.start <= FIRST + 65536, "{planned:?}");
            assert!(planned.start <= at && at + 4096 <= planned.end);
        }
    }

    #[test]
    fn what_is_fetched_covers_the_request_and_ends_with_the_file() {
        let mut sequences = Sequences::default();
        let size = 3 * MIB + 100;
        assert_eq!(sequences.plan(3 * MIB..size, MIB, size), 3 * MIB..size);
        assert_eq!(sequences.plan(0..2 * MIB + 1, MIB, size), 0..3 * MIB);
        let planned = sequences.plan(1..20 * MIB, 65536, 1 << 40);
        assert_eq!(planned, 0..20 * MIB);
    }
}
