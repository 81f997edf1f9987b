//! Several orders of one disk become one.
//!
//! ```text
//!  one      ├──────a──────┤         the ranges of all orders, sorted by offset
//!  another        ├──────b──────┤
//!  pieces   ├──1──┼───2───┼──1──┤   cut where one begins or ends, votes added
//! ```
//!
//! A sweep over all begins and ends makes the pieces. It keeps the sums of what it is in: votes,
//! rank and time, each weighed by the votes. The rank grows with the offset inside of a range, so
//! its sum is one number and one slope. Sums of integers do not depend on the order of the
//! arguments, and neither does anything that follows from them.
//!
//! A piece joins its neighbour below if they have the same votes, some record has both in one
//! range, and their ranks are at most [`NEAR`] from where one range would have them. Otherwise two
//! machines that read the same file in other pieces would leave the smallest pieces of both. A cut
//! that all records have stays, so that the merge of an order with itself has its ranges.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use host::{Error, ErrorKind, Result};

use crate::{BaseIdentity, MOST_RANGES, Order, OrderRange, join_consecutive};

/// By how many bytes of rank a piece may be off its place in a joined range. It is the least that a
/// stream asks a remote base for in one request, so that the stream sees no other order.
const NEAR: u64 = 1 << 20;

/// See [`Order::merge`].
pub(crate) fn merge(orders: &[Order]) -> Result<Order> {
    let [first, others @ ..] = orders else {
        return Err(Error::new(ErrorKind::InvalidArgument, "there is no order to merge"));
    };
    if others.is_empty() {
        return Ok(first.clone());
    }
    let base = common_base(first, others)?;
    let records = orders.iter().fold(0_u32, |sum, order| sum.saturating_add(order.records));
    let mut pieces = pieces(sorted(orders));
    pieces.sort_unstable_by_key(|piece| (piece.rank, piece.range.offset));
    let mut ranges: Vec<OrderRange> = pieces.into_iter().map(|piece| piece.range).collect();
    join_consecutive(&mut ranges);
    if ranges.len() > MOST_RANGES {
        ranges = most_wanted(&ranges, MOST_RANGES);
    }
    Ok(Order { base, records, ranges })
}

/// The base that all have. A pin is kept if one of them has it.
fn common_base(first: &Order, others: &[Order]) -> Result<BaseIdentity> {
    let mut base = first.base.clone();
    for order in others {
        base.check_same(&order.base)?;
        base.pin = base.pin.or_else(|| order.base.pin.clone());
    }
    Ok(base)
}

/// A range of one of the orders, with the rank of its first byte.
struct Ranked {
    range: OrderRange,
    rank: u64,
}

/// The ranges of all orders by their offsets.
fn sorted(orders: &[Order]) -> Vec<Ranked> {
    let mut all = Vec::with_capacity(orders.iter().map(|order| order.ranges.len()).sum());
    for order in orders {
        let mut rank = 0;
        for &range in &order.ranges {
            all.push(Ranked { range, rank });
            rank += range.len;
        }
    }
    all.sort_unstable_by_key(|ranked| ranked.range.offset);
    all
}

/// A part of the disk that the same ranges cover, or several that were joined.
struct Piece {
    range: OrderRange,
    /// Mean rank of the first byte.
    rank: u64,
}

/// Sums over the ranges that cover an offset, each weighed by its votes. 128 bits: a million orders
/// of 2^32 votes and ranks of 2^63 fit.
#[derive(Clone, Copy, Default)]
struct Sums {
    votes: u64,
    /// Rank less offset.
    rank: i128,
    at_ms: u128,
}

impl Sums {
    fn of(ranked: &Ranked) -> Sums {
        let votes = ranked.range.votes;
        let rank = i128::from(ranked.rank) - i128::from(ranked.range.offset);
        Sums {
            votes: votes.into(),
            rank: rank * i128::from(votes),
            at_ms: u128::from(ranked.range.at_ms) * u128::from(votes),
        }
    }

    fn add(&mut self, other: Sums) {
        self.votes += other.votes;
        self.rank += other.rank;
        self.at_ms += other.at_ms;
    }

    fn subtract(&mut self, other: Sums) {
        self.votes -= other.votes;
        self.rank -= other.rank;
        self.at_ms -= other.at_ms;
    }

    /// The piece that begins at `offset`, if a range covers it.
    fn piece(self, offset: u64, end: u64) -> Option<Piece> {
        let votes = u128::from(self.votes);
        let at_ms = self.at_ms.checked_div(votes)?;
        // The mean of ranks is a rank: neither negative nor more than the disk has bytes.
        let mean = self.rank.div_euclid(i128::from(self.votes)) + i128::from(offset);
        let range = OrderRange {
            offset,
            len: end - offset,
            at_ms: u32::try_from(at_ms).unwrap_or(u32::MAX),
            votes: u32::try_from(self.votes).unwrap_or(u32::MAX),
        };
        Some(Piece { range, rank: u64::try_from(mean).unwrap_or(u64::MAX) })
    }
}

/// Cuts `ranked`, which is sorted by offset, into pieces, and joins what belongs together.
fn pieces(ranked: Vec<Ranked>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(ranked.len());
    let mut sums = Sums::default();
    // Ends of the ranges that cover `at`, the nearest first, with their places in `ranked`.
    let mut ends: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut begins = ranked.iter().enumerate().peekable();
    loop {
        let begin = begins.peek().map(|(_, ranked)| ranked.range.offset);
        let end = ends.peek().map(|Reverse((end, _))| *end);
        let Some(at) = begin.into_iter().chain(end).min() else {
            return pieces;
        };
        while let Some(&Reverse((end, index))) = ends.peek()
            && end == at
        {
            ends.pop();
            sums.subtract(Sums::of(&ranked[index]));
        }
        // A range that has begun before, and has not ended: it goes over the cut.
        let spans = sums.votes > 0;
        while let Some((index, ranked)) = begins.next_if(|(_, next)| next.range.offset == at) {
            sums.add(Sums::of(ranked));
            ends.push(Reverse((ranked.range.end(), index)));
        }
        let begin = begins.peek().map(|(_, ranked)| ranked.range.offset);
        let end = ends.peek().map(|Reverse((end, _))| *end);
        let next = begin.into_iter().chain(end).min().unwrap_or(at);
        if let Some(piece) = sums.piece(at, next) {
            match pieces.last_mut().filter(|last| spans && last.continues(&piece)) {
                Some(last) => last.range.len += piece.range.len,
                None => pieces.push(piece),
            }
        }
    }
}

impl Piece {
    /// Whether `next`, which begins where this piece ends, may become a part of it.
    fn continues(&self, next: &Piece) -> bool {
        let expected = self.rank.saturating_add(self.range.len);
        self.range.end() == next.range.offset
            && self.range.votes == next.range.votes
            && expected.abs_diff(next.rank) <= NEAR
    }
}

/// At most `most` of them: those with the most votes, and of these the first ones. Their order
/// stays, and ranges that follow each other now are joined.
pub(crate) fn most_wanted(ranges: &[OrderRange], most: usize) -> Vec<OrderRange> {
    let mut places: Vec<usize> = (0..ranges.len()).collect();
    places.sort_by_key(|&place| Reverse(ranges[place].votes));
    places.truncate(most);
    places.sort_unstable();
    let mut wanted = places.into_iter().map(|place| ranges[place]).collect();
    join_consecutive(&mut wanted);
    wanted
}
