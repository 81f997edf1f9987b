//! Buffers for clusters on their way up. They are used again as they are: who takes one writes every byte of it before anybody reads it. The one that
//! was given back last is taken first: it may still be in the processor's cache.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::sync::{Mutex, rank};

/// Buffers that are kept; with all of them at their largest that is 32 MiB.
const KEPT: usize = 16;
/// The largest buffer that is kept, bytes: one cluster of the largest size.
const LARGEST_KEPT: usize = 2 << 20;
/// The smallest buffer that is made, bytes: one chunk of a stream, so that nearly all of them fit nearly all needs.
const SMALLEST_MADE: usize = 512 << 10;

/// The buffers that nobody uses at present.
#[derive(Clone, Debug)]
pub(super) struct Bounces(Arc<Mutex<{ rank::LEAF }, Vec<Vec<u8>>>>);

impl Bounces {
    pub fn new() -> Bounces {
        Bounces(Arc::default())
    }

    /// A buffer of `len` bytes that hold anything.
    pub fn take(&self, len: usize) -> Bounce {
        let mut bytes = self.0.lock().pop().unwrap_or_default();
        if bytes.len() < len {
            bytes = vec![0; len.max(SMALLEST_MADE)];
        }
        // What is read without having been written is to be seen by every test.
        if cfg!(debug_assertions) {
            bytes[..len].fill(0xb5);
        }
        Bounce { bytes, len, home: self.clone() }
    }
}

/// A buffer in use; it goes back when it is dropped.
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
