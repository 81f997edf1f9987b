//! Content that identifies its position, and repeatable random numbers.

use std::ops::Range;

/// Known content: every 512-byte sector holds its number, a version and a seed, 16 times, so that
/// any 32 bytes identify their place. It compresses well and is never zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pattern {
    pub seed: u32,
    pub version: u32,
}

const SECTOR: u64 = 512;
const RECORD: usize = 32;
const MAGIC: &[u8; 4] = b"CoRd";

impl Pattern {
    pub fn new(seed: u32, version: u32) -> Pattern {
        Pattern { seed, version }
    }

    /// Magic, slot, sector number, version, seed, and 8 bytes that depend on all of them.
    fn record(self, index: u64) -> [u8; RECORD] {
        let (sector, slot) = (index * RECORD as u64 / SECTOR, index % (SECTOR / RECORD as u64));
        let mut record = [0u8; RECORD];
        record[0..4].copy_from_slice(MAGIC);
        record[4..8]
            .copy_from_slice(&u32::try_from(slot).expect("a slot is below 16").to_le_bytes());
        record[8..16].copy_from_slice(&sector.to_le_bytes());
        record[16..20].copy_from_slice(&self.version.to_le_bytes());
        record[20..24].copy_from_slice(&self.seed.to_le_bytes());
        let mix = (sector
            ^ u64::from(self.version).rotate_left(32)
            ^ u64::from(self.seed).rotate_left(48))
        .wrapping_add(1);
        record[24..32].copy_from_slice(&mix.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
        record
    }

    /// Fills `buf` with the content at `offset`, which may be any byte.
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let record = self.record(at / RECORD as u64);
            let skip = usize::try_from(at % RECORD as u64).expect("small");
            let n = rest.len().min(RECORD - skip);
            rest[..n].copy_from_slice(&record[skip..skip + n]);
            at += n as u64;
            rest = &mut rest[n..];
        }
    }

    pub fn bytes(self, offset: u64, len: u64) -> Vec<u8> {
        let mut buf = vec![0; usize::try_from(len).expect("fits memory")];
        self.fill(offset, &mut buf);
        buf
    }
}

/// Describes the 32-byte record around `at`.
fn explain(content: &[u8], at: usize) -> String {
    let start = at / RECORD * RECORD;
    let Some(record) = content.get(start..start + RECORD) else {
        return "cut off at the end".to_owned();
    };
    let number = |range: Range<usize>| {
        record[range].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    if record[0..4] == *MAGIC {
        format!(
            "sector {} version {} seed {:#x} slot {}",
            number(8..16),
            number(16..20),
            number(20..24),
            number(4..8)
        )
    } else if record.iter().all(|byte| *byte == 0) {
        "zeros".to_owned()
    } else {
        format!("foreign bytes {record:02x?}")
    }
}

/// Returns the first byte where two contents of equal length differ.
pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    const STEP: usize = 4096;
    let chunk = a.chunks(STEP).zip(b.chunks(STEP)).position(|(a, b)| a != b)?;
    let start = chunk * STEP;
    a[start..].iter().zip(&b[start..]).position(|(a, b)| a != b).map(|at| start + at)
}

/// Asserts that two contents are equal; the message names the first difference and the record
/// there. `base` is the offset of byte 0.
pub fn assert_same_at(what: &str, base: u64, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if let Some(at) = first_difference(got, want) {
        let differing = got.iter().zip(want).filter(|(a, b)| a != b).count();
        let offset = base + at as u64;
        panic!(
            "{what}: differs at byte {offset} (sector {}), {differing} bytes in all: {:#04x} instead of {:#04x}\n  got:  {}\n  want: {}",
            offset / SECTOR,
            got[at],
            want[at],
            explain(got, at),
            explain(want, at),
        );
    }
}

/// Calls [`assert_same_at`] with offset 0.
pub fn assert_same(what: &str, got: &[u8], want: &[u8]) {
    assert_same_at(what, 0, got, want);
}

/// xorshift64*: small, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Creates a generator seeded from `CORDISK_SEED`, or else from the clock. Prints the seed, so
    /// that a failure can be repeated.
    pub fn for_test(test: &str) -> Rng {
        let from_clock = || {
            let now =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("clock");
            now.as_secs().wrapping_mul(1_000_003) ^ u64::from(now.subsec_nanos())
        };
        let seed = std::env::var("CORDISK_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(from_clock);
        eprintln!("{test}: CORDISK_SEED={seed}");
        Rng::new(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Returns a number below `end`, which must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    /// Returns a range of 1 to `longest` bytes inside `0..size`.
    pub fn range(&mut self, size: u64, longest: u64) -> Range<u64> {
        let start = self.below(size);
        let len = 1 + self.below(longest.min(size - start));
        start..start + len
    }
}
