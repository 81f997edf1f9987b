//! The file of an order.
//!
//! ```text
//!  0  "CORDORDR"
//!  8  version: 1, 32 bits
//! 12  size of the disk in bytes, 64 bits
//! 20  SHA-256 of the first 64 KiB of the disk, or of all if it is shorter
//! 52  number of records that were merged, 32 bits, not 0
//! 56  number of ranges, 32 bits, at most 2^20
//! 60  unit, 8 bits: offsets and lengths are multiples of 2^unit bytes, and not all of 2^(unit+1);
//!     0 if there are no ranges
//! 61  length of the pin in bytes, 16 bits, at most 1024; 0: no pin
//! 63  the pin, UTF-8
//!     the ranges, in the order of their ranks
//!     CRC-32 (IEEE) of all bytes before it, 32 bits; the file ends here
//!
//! a range is three or four numbers:
//!     offset, less the end of the range before it (of the first: less 0), in units     signed
//!     2 × length in units, and 1 more if its votes differ from those before it         unsigned
//!     milliseconds, less those of the range before it (of the first: less 0)           signed
//!     votes, less those of the range before it (of the first: less 1), if they differ  signed
//! ```
//!
//! Numbers of the header and the checksum are big-endian. A number of a range is a varint: 7 bits
//! in each byte, the lowest ones first; the highest bit of a byte says that another one follows;
//! the last byte is not 0 unless it is the only one. A signed number n is stored as 2n, or as -2n-1
//! if it is negative.
//!
//! A range of a boot takes about 5 bytes, so that ten thousand fit 50 KB. An order has one form:
//! what is not exactly as [`Order::encode`] writes it is refused. A later version keeps the magic
//! and the place of the version, and may change everything else.
//!
//! **Touches:** nothing outside of memory. **Never:** allocates for a count before it has compared
//! the count with the length of the file; panics, whatever the bytes are.
//! **Locks:** none.

use host::{Error, ErrorKind, Result};

use crate::{BaseIdentity, HEAD, MOST_PIN, MOST_RANGES, Order, OrderRange};

const MAGIC: [u8; 8] = *b"CORDORDR";
const VERSION: u32 = 1;
/// Length of the part before the pin, in bytes.
const HEADER: usize = 63;
const CHECKSUM: usize = 4;
/// Least and greatest length of a range in bytes: an offset and a length of 64 bits, and two
/// differences of numbers of 32 bits.
const SHORTEST_RANGE: usize = 3;
const LONGEST_RANGE: usize = 10 + 10 + 5 + 5;

/// Length of the longest file of an order in bytes, 30 MiB: the most ranges of the greatest length
/// and the longest pin. A reader takes no more of a file into memory.
pub const LONGEST_FILE: u64 = (HEADER + MOST_PIN + MOST_RANGES * LONGEST_RANGE + CHECKSUM) as u64;

/// See [`Order::encode`].
pub(crate) fn encode(order: &Order) -> Vec<u8> {
    let Order { base, records, ranges } = order;
    let pin = base.pin.as_deref().unwrap_or_default();
    let unit = unit_of(ranges);
    let mut bytes = Vec::with_capacity(HEADER + pin.len() + ranges.len() * 6 + CHECKSUM);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend(base.size.to_be_bytes());
    bytes.extend(base.head);
    bytes.extend(records.to_be_bytes());
    bytes.extend((ranges.len() as u32).to_be_bytes());
    bytes.push(unit);
    bytes.extend((pin.len() as u16).to_be_bytes());
    bytes.extend(pin.as_bytes());
    let mut before = START;
    for range in ranges {
        let votes = i64::from(range.votes) - i64::from(before.votes);
        put_signed(&mut bytes, (range.offset >> unit) as i64 - (before.end() >> unit) as i64);
        put(&mut bytes, (range.len >> unit) << 1 | u64::from(votes != 0));
        put_signed(&mut bytes, i64::from(range.at_ms) - i64::from(before.at_ms));
        if votes != 0 {
            put_signed(&mut bytes, votes);
        }
        before = *range;
    }
    bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
    bytes
}

/// See [`Order::decode`].
pub(crate) fn decode(bytes: &[u8]) -> Result<Order> {
    if bytes.len() as u64 > LONGEST_FILE {
        return Err(bad(format!("it is longer than {LONGEST_FILE} bytes, as no order is")));
    }
    let mut rest = Reader { bytes };
    if rest.array().is_none_or(|magic| magic != MAGIC) {
        let why = if bytes.is_empty() { "it is empty" } else { "it is not an order of cordisk" };
        return Err(Error::new(ErrorKind::InvalidArgument, why));
    }
    let version = u32::from_be_bytes(rest.array().ok_or_else(cut_off)?);
    if version > VERSION {
        return Err(Error::new(
            ErrorKind::UnsupportedFeature,
            format!(
                "it has version {version} of the format, and this program knows {VERSION}: a later \
                 version of cordisk has written it"
            ),
        ));
    }
    if version != VERSION {
        return Err(bad(format!("it has version {version} of the format, which never was")));
    }
    let (covered, checksum) = bytes.split_last_chunk::<CHECKSUM>().ok_or_else(cut_off)?;
    if covered.len() < HEADER {
        return Err(cut_off());
    }
    if crc32fast::hash(covered) != u32::from_be_bytes(*checksum) {
        return Err(bad(
            "its checksum is wrong: it is damaged or cut off, or something follows it",
        ));
    }
    rest.bytes = &covered[MAGIC.len() + size_of_val(&VERSION)..];
    body(rest)
}

/// What follows the version, without the checksum.
fn body(mut rest: Reader) -> Result<Order> {
    let size = u64::from_be_bytes(rest.array().ok_or_else(cut_off)?);
    let head = rest.array().ok_or_else(cut_off)?;
    let records = u32::from_be_bytes(rest.array().ok_or_else(cut_off)?);
    let count = u32::from_be_bytes(rest.array().ok_or_else(cut_off)?) as usize;
    let [unit] = rest.array().ok_or_else(cut_off)?;
    let pin = u16::from_be_bytes(rest.array().ok_or_else(cut_off)?);
    let pin = rest.take(pin.into()).ok_or_else(cut_off)?;
    if records == 0 {
        return Err(bad("it has no record"));
    }
    if pin.len() > MOST_PIN {
        return Err(bad(format!("its pin has {} bytes, more than {MOST_PIN}", pin.len())));
    }
    let pin = std::str::from_utf8(pin).map_err(|_| bad("its pin is not UTF-8"))?;
    let pin = Some(pin).filter(|pin| !pin.is_empty()).map(str::to_owned);
    if count > MOST_RANGES {
        return Err(bad(format!("it has {count} ranges, more than {MOST_RANGES}")));
    }
    if count > rest.bytes.len() / SHORTEST_RANGE {
        return Err(bad(format!("its {} bytes of ranges are not {count}", rest.bytes.len())));
    }
    if u32::from(unit) >= i64::BITS - 1 {
        return Err(bad(format!("its unit 2^{unit} is larger than any disk")));
    }
    let base = BaseIdentity { size, head, pin };
    let limit = Order::limit(&base);
    let mut ranges = Vec::with_capacity(count);
    let mut before = START;
    for index in 0..count {
        let wrong = |why: &str| bad(format!("its range {} {why}", index + 1));
        let range = rest.range(before, unit).ok_or_else(|| wrong("is not a range"))?;
        if range.end() > limit {
            return Err(wrong("lies outside of the disk"));
        }
        if !(1..=records).contains(&range.votes) {
            return Err(wrong("has more or fewer votes than is possible"));
        }
        if index > 0 && range.offset == before.end() && range.votes == before.votes {
            return Err(wrong("is a part of the one before it"));
        }
        before = range;
        ranges.push(before);
    }
    if !rest.bytes.is_empty() {
        return Err(bad(format!("{} bytes follow its last range", rest.bytes.len())));
    }
    if unit_of(&ranges) != unit {
        return Err(bad(format!("its unit 2^{unit} is not that of its ranges")));
    }
    if overlap(&ranges) {
        return Err(bad("two of its ranges overlap"));
    }
    Ok(Order { base, records, ranges })
}

/// What stands before the first range.
const START: OrderRange = OrderRange { offset: 0, len: 0, at_ms: 0, votes: 1 };

/// How many low bits are 0 in all offsets and lengths.
fn unit_of(ranges: &[OrderRange]) -> u8 {
    let bits = ranges.iter().fold(0, |bits, range| bits | range.offset | range.len);
    if bits == 0 { 0 } else { bits.trailing_zeros() as u8 }
}

fn overlap(ranges: &[OrderRange]) -> bool {
    let mut sorted: Vec<_> = ranges.iter().map(OrderRange::bytes).collect();
    sorted.sort_unstable_by_key(|range| range.start);
    sorted.windows(2).any(|pair| pair[0].end > pair[1].start)
}

fn bad(why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Corrupt, why)
}

fn cut_off() -> Error {
    bad("it is cut off: it ends within its header")
}

/// Appends a varint.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Appends a signed varint.
fn put_signed(bytes: &mut Vec<u8>, number: i64) {
    put(bytes, (number << 1 ^ number >> 63) as u64);
}

/// The bytes that have not been read yet.
#[derive(Clone, Copy)]
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length)?;
        self.bytes = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk()?;
        self.bytes = rest;
        Some(*taken)
    }

    /// A varint in its shortest form.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            // Of the tenth byte, one bit is left.
            if bits << shift >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return (byte != 0 || shift == 0).then_some(number);
            }
        }
        None
    }

    fn signed(&mut self) -> Option<i64> {
        let number = self.number()?;
        Some((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    /// The range that follows `before`, with an end that an offset can have.
    fn range(&mut self, before: OrderRange, unit: u8) -> Option<OrderRange> {
        let scaled = |number: u64| {
            let bytes = number.checked_shl(unit.into())?;
            (bytes >> unit == number).then_some(bytes)
        };
        let offset = (before.end() >> unit).checked_add_signed(self.signed()?)?;
        let length = self.number()?;
        let at_ms = i64::from(before.at_ms).checked_add(self.signed()?)?;
        let votes = if length & 1 == 0 {
            before.votes
        } else {
            // A difference of 0 has no place here.
            let difference = self.signed().filter(|difference| *difference != 0)?;
            u32::try_from(i64::from(before.votes).checked_add(difference)?).ok()?
        };
        let (offset, len) = (scaled(offset)?, scaled(length >> 1)?);
        offset.checked_add(len)?;
        let at_ms = u32::try_from(at_ms).ok()?;
        (len > 0).then_some(OrderRange { offset, len, at_ms, votes })
    }
}

/// The head of the file covers as much of the disk as its description says.
const _: () = assert!(HEAD == 64 << 10 && MOST_PIN <= u16::MAX as usize);
