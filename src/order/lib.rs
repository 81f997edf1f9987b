//! The order in which guests touch a disk first: ranges of the disk, the first one first. A stream
//! that follows it brings what the next guest needs before what no guest needs.
//!
//! ```text
//!  touches of a mounted disk ──▶ Order::from_touches ─┐          ┌─▶ encode ──▶ file
//!  blocks of the boot files  ──▶ Order::from_touches ─┼─▶ merge ─┤
//!  file                      ──▶ Order::decode ───────┘          └─▶ wanted ──▶ stream
//! ```
//!
//! The **rank** of a byte is the number of bytes that stand before it in an order. It is not
//! stored: it follows from the place. Orders are merged by rank and not by time, so that a slow and
//! a fast machine agree. **Votes** say how many of the records that were merged have a range.
//!
//! [`mod@file`] describes the file.
//!
//! **Touches:** nothing outside of memory. **Never:** trusts a number of a file; reads a disk: the
//! caller of [`BaseIdentity::of`] does.
//! **Locks:** none.
//! **Invariants:** the ranges of an [`Order`] are not empty, lie inside of the disk and do not
//! overlap; there are at most [`MOST_RANGES`]; each has at least one vote, and at most as many as
//! there are records. Where a range begins at the end of the one before it, the two have different
//! votes. So one list of touches is one list of ranges, and one file.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod base;
pub mod file;
#[cfg(any(test, feature = "testing"))]
mod fuzzing;
mod merge;
#[cfg(test)]
mod tests;
mod touches;

use std::ops::Range;

use host::Result;

pub use base::{BaseIdentity, HEAD, MOST_PIN};
pub use file::LONGEST_FILE;
#[cfg(any(test, feature = "testing"))]
pub use fuzzing::fuzz_file;

/// Ranges that an order can have. A boot of a general purpose distribution has about ten thousand.
/// A million is what a day of random reads of 64 KiB leaves on a disk of 64 GiB; in memory it is
/// 24 MiB.
pub const MOST_RANGES: usize = 1 << 20;

/// What the name of an order has after the name of its base.
pub const SUFFIX: &str = ".order";

/// No disk of this program is longer, in bytes: offsets of files are signed.
const LONGEST_DISK: u64 = i64::MAX as u64;

/// A guest has touched a range of the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Touch {
    /// Where the range begins, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Milliseconds after the disk was opened.
    pub at_ms: u32,
}

/// A range of an [`Order`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OrderRange {
    /// Where the range begins, in bytes.
    pub offset: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// When the first byte was touched, in milliseconds after the disk was opened: the mean of the
    /// records that have it.
    pub at_ms: u32,
    /// How many records have the range, from 1 to [`Order::records`].
    pub votes: u32,
}

impl OrderRange {
    /// Offset of the first byte behind the range.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// The range as offsets in bytes.
    pub fn bytes(&self) -> Range<u64> {
        self.offset..self.end()
    }
}

/// Ranges of a disk in the order in which guests touched them first, and the disk that they belong
/// to. See the documentation of the crate for what always holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Order {
    base: BaseIdentity,
    records: u32,
    ranges: Vec<OrderRange>,
}

impl Order {
    /// Makes the order of one record from its touches, which come in the order in which they
    /// happened: `at_ms` is kept, and decides nothing.
    ///
    /// Only the first touch of a byte counts. What lies beyond the disk is cut off. A touch that
    /// begins where the one before it ends continues that range. After [`MOST_RANGES`] the rest is
    /// left out: the first touches are those that a guest waits for. A pin that is longer than
    /// [`MOST_PIN`], or empty, is left out.
    pub fn from_touches(base: BaseIdentity, touches: impl IntoIterator<Item = Touch>) -> Order {
        let base = base.with_bounded_pin();
        let ranges = touches::first_touches(&base, touches.into_iter());
        Order { base, records: 1, ranges }
    }

    /// The disk that the order belongs to.
    pub fn base(&self) -> &BaseIdentity {
        &self.base
    }

    /// How many records were merged, at least 1. It stays at `u32::MAX`.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// The ranges, the one that was touched first at the beginning.
    pub fn ranges(&self) -> &[OrderRange] {
        &self.ranges
    }

    /// Length of all ranges together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// The bytes of the file ([`mod@file`]). They are at most [`LONGEST_FILE`].
    pub fn encode(&self) -> Vec<u8> {
        file::encode(self)
    }

    /// The bytes of a file that is at most `longest` bytes long. If all ranges are too many for
    /// that, those with the fewest votes are left out, and of these the last ones first. An order
    /// without ranges takes at most 1091 bytes, so the file is not shorter than that.
    pub fn encode_at_most(&self, longest: u64) -> Vec<u8> {
        let mut bytes = self.encode();
        let mut shorter = self.clone();
        while bytes.len() as u64 > longest && !shorter.ranges.is_empty() {
            // As if all ranges took the same space; one less, so that the loop ends.
            let (count, len) = (shorter.ranges.len() as u128, bytes.len() as u128);
            let most = (count * u128::from(longest) / len).min(count - 1);
            shorter.ranges = merge::most_wanted(&shorter.ranges, most as usize);
            bytes = shorter.encode();
        }
        bytes
    }

    /// Reads the bytes of a file ([`mod@file`]). Only what [`Order::encode`] writes is accepted.
    /// The memory that this takes is at most 16 times the length of `bytes`.
    ///
    /// # Errors
    /// [`host::ErrorKind::InvalidArgument`] if the file is something else;
    /// [`host::ErrorKind::UnsupportedFeature`] if a later version of the program has written it;
    /// [`host::ErrorKind::Corrupt`] with what is wrong otherwise.
    pub fn decode(bytes: &[u8]) -> Result<Order> {
        file::decode(bytes)
    }

    /// Merges orders of one disk. The result does not depend on which comes first.
    ///
    /// It has each byte that one of them has, with the votes of all. The mean rank decides the
    /// place, and each order weighs as much as the votes that it has for the byte. Ranges are cut
    /// where others begin or end. Adjacent pieces of the same votes become one range again where
    /// they follow each other, or where a record has touched them in one run and the others a
    /// stream's request apart. If more than [`MOST_RANGES`] remain, those with the fewest votes are
    /// left out, and of these the last ones first.
    ///
    /// # Errors
    /// [`host::ErrorKind::InvalidArgument`] if `orders` is empty, or if two are of different disks
    /// ([`Order::check_base`]).
    pub fn merge(orders: &[Order]) -> Result<Order> {
        merge::merge(orders)
    }

    /// Checks that the order belongs to the disk `base`: size and head are equal, and the pins too
    /// if both have one.
    ///
    /// # Errors
    /// [`host::ErrorKind::InvalidArgument`], with what differs.
    pub fn check_base(&self, base: &BaseIdentity) -> Result<()> {
        self.base.check_same(base)
    }

    /// What a stream reads, in this order: by rank, and what is rare ([`Order::is_rare`]) at the
    /// end. No byte is in it twice.
    pub fn wanted(&self) -> Vec<Range<u64>> {
        let (rare, common): (Vec<&OrderRange>, Vec<_>) =
            self.ranges.iter().partition(|range| self.is_rare(range));
        common.into_iter().chain(rare).map(OrderRange::bytes).collect()
    }

    /// Whether fewer than a third of the records have this range of the order.
    pub fn is_rare(&self, range: &OrderRange) -> bool {
        u64::from(range.votes) * 3 < u64::from(self.records)
    }

    /// How much of the disk can have ranges, in bytes.
    fn limit(base: &BaseIdentity) -> u64 {
        base.size.min(LONGEST_DISK)
    }
}

/// Makes one range of each that begins where the one before it ends, if both have the same votes.
/// It keeps the time of the first.
fn join_consecutive(ranges: &mut Vec<OrderRange>) {
    ranges.dedup_by(|next, range| {
        let continues = range.end() == next.offset && range.votes == next.votes;
        if continues {
            range.len += next.len;
        }
        continues
    });
}
