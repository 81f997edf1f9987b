//! From touches in the order in which they happened to ranges without overlap.

use std::collections::BTreeMap;

use crate::{BaseIdentity, MOST_RANGES, Order, OrderRange, Touch};

/// Which bytes have been touched: begin and end of ranges that neither overlap nor meet.
#[derive(Default)]
struct Touched {
    ranges: BTreeMap<u64, u64>,
}

impl Touched {
    /// Adds a range, and calls `is_new` with each part of it that was not there, the first first.
    /// Each call removes or lengthens as many ranges as it passes, so that a list of touches takes
    /// n log n, whatever they are.
    fn add(&mut self, begin: u64, end: u64, mut is_new: impl FnMut(u64, u64)) {
        let (mut from, mut to, mut at) = (begin, end, begin);
        if let Some((&first, &last)) = self.ranges.range(..begin).next_back()
            && last >= begin
        {
            if last >= end {
                return;
            }
            (from, at) = (first, last);
        }
        while let Some((&first, &last)) = self.ranges.range(at..=end).next() {
            if first > at {
                is_new(at, first);
            }
            (at, to) = (last.min(end), to.max(last));
            self.ranges.remove(&first);
        }
        if at < end {
            is_new(at, end);
        }
        self.ranges.insert(from, to);
    }
}

/// The first touch of each byte inside of the disk, with adjacent ones joined.
pub(crate) fn first_touches(
    base: &BaseIdentity,
    touches: impl Iterator<Item = Touch>,
) -> Vec<OrderRange> {
    let limit = Order::limit(base);
    let mut touched = Touched::default();
    let mut ranges: Vec<OrderRange> = Vec::new();
    for touch in touches {
        let end = touch.offset.saturating_add(touch.len).min(limit);
        if touch.offset >= end {
            continue;
        }
        touched.add(touch.offset, end, |offset, end| {
            let range = OrderRange { offset, len: end - offset, at_ms: touch.at_ms, votes: 1 };
            match ranges.last_mut() {
                Some(last) if last.end() == offset => last.len += range.len,
                _ => ranges.push(range),
            }
        });
        if ranges.len() > MOST_RANGES {
            ranges.truncate(MOST_RANGES);
            break;
        }
    }
    ranges
}
