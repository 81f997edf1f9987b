//! Ranges of bytes in the order in which they were first needed.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::failure::{Failure, Step};

/// Ranges without overlap, in the order in which they were added. The part of a range that was
/// added before is not added again.
#[derive(Debug)]
pub(crate) struct RangeList {
    ordered: Vec<Range<u64>>,
    /// Start to end of what is covered, with adjacent ranges joined.
    covered: BTreeMap<u64, u64>,
    bytes: u64,
    most_ranges: usize,
    most_bytes: u64,
}

impl RangeList {
    pub(crate) fn new(most_ranges: usize, most_bytes: u64) -> RangeList {
        RangeList {
            ordered: Vec::new(),
            covered: BTreeMap::new(),
            bytes: 0,
            most_ranges,
            most_bytes,
        }
    }

    /// Adds the parts of `range` that are not covered yet. At a limit nothing more is added.
    pub(crate) fn add(&mut self, range: Range<u64>) -> Step<()> {
        let mut at = range.start;
        while at < range.end {
            if let Some((_, &end)) = self.covered.range(..=at).next_back()
                && end > at
            {
                at = end;
                continue;
            }
            let next = self.covered.range(at..).next().map_or(range.end, |(&start, _)| start);
            self.append(at..next.min(range.end))?;
            at = next;
        }
        Ok(())
    }

    /// Adds a range of which no byte is covered.
    fn append(&mut self, range: Range<u64>) -> Step<()> {
        let allowed = self.most_bytes - self.bytes;
        if allowed == 0 {
            return Err(Failure::Limit("bytes found"));
        }
        let end = range.end.min(range.start.saturating_add(allowed));
        let is_full = self.ordered.len() >= self.most_ranges;
        match self.ordered.last_mut() {
            Some(last) if last.end == range.start => last.end = end,
            _ if is_full => {
                return Err(Failure::Limit("the number of ranges"));
            }
            _ => self.ordered.push(range.start..end),
        }
        self.bytes += end - range.start;
        self.cover(range.start..end);
        if end < range.end { Err(Failure::Limit("bytes found")) } else { Ok(()) }
    }

    fn cover(&mut self, range: Range<u64>) {
        let mut joined = range;
        if let Some((&start, &end)) = self.covered.range(..=joined.start).next_back()
            && end == joined.start
        {
            joined.start = start;
        }
        if let Some(end) = self.covered.remove(&joined.end) {
            joined.end = end;
        }
        self.covered.insert(joined.start, joined.end);
    }

    /// Returns how many bytes all ranges have.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the ranges in their order.
    pub(crate) fn into_ranges(self) -> Vec<Range<u64>> {
        self.ordered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut list = RangeList::new(100, 1000);
        for range in ranges {
            list.add(range.clone()).unwrap();
        }
        assert_eq!(
            list.bytes(),
            list.ordered.iter().map(|range| range.end - range.start).sum::<u64>()
        );
        list.into_ranges()
    }

    #[test]
    fn the_first_need_of_a_byte_decides_its_place() {
        assert_eq!(list(&[10..20, 0..30]), [10..20, 0..10, 20..30]);
        assert_eq!(list(&[0..10, 20..30, 40..50, 5..45]), [0..10, 20..30, 40..50, 10..20, 30..40]);
        assert_eq!(list(&[0..10, 0..10, 3..7, 4..4, 20..21]), [0..10, 20..21]);
    }

    #[test]
    fn neighbours_in_order_are_joined() {
        assert_eq!(list(&[0..10, 10..20, 30..40, 20..30]), [0..20, 30..40, 20..30]);
    }

    #[test]
    fn limits_are_kept_to_the_byte() {
        let mut bytes = RangeList::new(100, 15);
        bytes.add(0..10).unwrap();
        assert!(matches!(bytes.add(20..30), Err(Failure::Limit("bytes found"))));
        assert_eq!(bytes.into_ranges(), [0..10, 20..25]);
        let mut count = RangeList::new(2, 1000);
        count.add(0..10).unwrap();
        count.add(20..30).unwrap();
        assert!(matches!(count.add(40..50), Err(Failure::Limit("the number of ranges"))));
        count.add(30..40).unwrap();
        assert_eq!(count.into_ranges(), [0..10, 20..40]);
    }

    /// Each byte in the list exactly once, at the place of its first need.
    #[test]
    fn random_ranges_agree_with_a_list_of_bytes() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..200 {
            let mut list = RangeList::new(1000, 1000);
            let mut bytes: Vec<u64> = Vec::new();
            for _ in 0..20 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let (start, len) = (state >> 33 & 63, state >> 40 & 15);
                list.add(start..start + len).unwrap();
                for byte in start..start + len {
                    if !bytes.contains(&byte) {
                        bytes.push(byte);
                    }
                }
            }
            let found: Vec<u64> = list.into_ranges().into_iter().flatten().collect();
            assert_eq!(found, bytes);
        }
    }
}
