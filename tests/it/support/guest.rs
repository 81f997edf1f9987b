//! A guest that writes, zeroes and discards on the mounted file, and remembers the expected
//! content.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::pattern::assert_same_at;
use super::{Pattern, Rng};

/// The disk, and its content as the guest expects it.
#[derive(Debug)]
pub struct Guest {
    pub file: File,
    /// The expected value of every byte of the disk.
    pub shadow: Vec<u8>,
    pattern: Pattern,
}

pub const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
pub const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

impl Guest {
    /// `shadow` is the present content of the disk. Writes contain `seed` and a version that rises
    /// with each write.
    pub fn new(file: File, shadow: Vec<u8>, seed: u32) -> Guest {
        Guest { file, shadow, pattern: Pattern::new(seed, 100) }
    }

    fn slice(&mut self, range: &Range<u64>) -> &mut [u8] {
        let index = |at: u64| usize::try_from(at).expect("fits memory");
        &mut self.shadow[index(range.start)..index(range.end)]
    }

    pub fn write(&mut self, range: Range<u64>) {
        self.pattern.version += 1;
        let data = self.pattern.bytes(range.start, range.end - range.start);
        self.file
            .write_all_at(&data, range.start)
            .unwrap_or_else(|error| panic!("write {range:?}: {error}"));
        self.slice(&range).copy_from_slice(&data);
    }

    fn allocate(&mut self, flags: FallocateFlags, range: &Range<u64>) {
        fallocate(&self.file, flags, range.start, range.end - range.start)
            .unwrap_or_else(|error| panic!("fallocate {flags:?} {range:?}: {error}"));
        self.slice(range).fill(0);
    }

    pub fn punch(&mut self, range: Range<u64>) {
        self.allocate(PUNCH, &range);
    }

    pub fn zero(&mut self, range: Range<u64>) {
        self.allocate(ZERO, &range);
    }

    /// Reads a range and compares it with the shadow.
    pub fn check(&mut self, range: Range<u64>) {
        let got = super::read_at(
            &self.file,
            range.start,
            usize::try_from(range.end - range.start).expect("fits"),
        );
        assert_same_at(&format!("read of {range:?}"), range.start, &got, self.slice(&range));
    }

    pub fn check_all(&mut self) {
        let size = self.shadow.len() as u64;
        self.check(0..size);
    }

    /// Performs one random operation: half are writes, a quarter zeroing, a quarter reads;
    /// sometimes an fsync follows.
    pub fn step(&mut self, rng: &mut Rng, longest: u64) {
        let range = rng.range(self.shadow.len() as u64, longest);
        match rng.below(16) {
            0..8 => self.write(range),
            8..10 => self.punch(range),
            10..12 => self.zero(range),
            12..15 => self.check(range),
            _ => self.file.sync_data().expect("fdatasync"),
        }
    }
}
