//! Buffers for clusters that are copied up.
//!
//! Buffers are reused with their old content: the user of a buffer writes every byte of it before
//! any byte is read. The buffer that was returned last is reused first, because it may still be in
//! the processor's cache.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use host::sync::{Mutex, rank};

/// Number of buffers that are kept. With all of them at the largest size that is 32 MiB.
const KEPT: usize = 16;
/// Largest buffer that is kept, in bytes: one cluster of the largest size.
const LARGEST_KEPT: usize = 2 << 20;
/// Smallest buffer that is allocated, in bytes: one chunk of a stream, so that nearly every buffer
/// fits nearly every use.
const SMALLEST_MADE: usize = 512 << 10;

/// The unused buffers, shared by all threads that copy up.
#[derive(Clone, Debug)]
pub(super) struct Bounces(Arc<Mutex<{ rank::LEAF }, Vec<Vec<u8>>>>);

impl Bounces {
    pub fn new() -> Bounces {
        Bounces(Arc::default())
    }

    /// Returns a buffer of `len` bytes with arbitrary content.
    pub fn take(&self, len: usize) -> Bounce {
        let mut bytes = self.0.lock().pop().unwrap_or_default();
        if bytes.len() < len {
            bytes = vec![0; len.max(SMALLEST_MADE)];
        }
        // The fill makes every test notice a byte that is read without having been written.
        if cfg!(debug_assertions) {
            bytes[..len].fill(0xb5);
        }
        Bounce { bytes, len, home: self.clone() }
    }
}

/// A buffer in use. It is returned to the unused ones when dropped.
#[derive(Debug)]
pub(super) struct Bounce {
    bytes: Vec<u8>,
    len: usize,
    home: Bounces,
}

impl Deref for Bounce {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Bounce {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        if self.bytes.len() <= LARGEST_KEPT {
            let mut kept = self.home.0.lock();
            if kept.len() < KEPT {
                kept.push(std::mem::take(&mut self.bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_unless_they_are_large_or_many() {
        let bounces = Bounces::new();
        let first = bounces.take(4096);
        assert_eq!((first.len(), first.bytes.len()), (4096, SMALLEST_MADE));
        let place = first.as_ptr();
        drop(first);
        let again = bounces.take(65536);
        assert_eq!((again.len(), again.as_ptr()), (65536, place), "the same one, longer");
        drop(again);
        assert_eq!(bounces.take(LARGEST_KEPT).len(), LARGEST_KEPT);
        drop(bounces.take(LARGEST_KEPT + 1));
        let all: Vec<_> = (0..2 * KEPT).map(|_| bounces.take(1)).collect();
        assert!(all.iter().all(|bounce| bounce.bytes.len() <= LARGEST_KEPT));
        drop(all);
        assert_eq!(bounces.0.lock().len(), KEPT);
    }
}
