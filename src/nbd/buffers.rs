//! Buffers that pass from the thread of a link to the caller and back, so that a piece is not
//! copied and memory is not cleared for each one.
//!
//! **Locks:** the list of free buffers, a leaf.

use std::sync::Arc;

use parking_lot::Mutex;

/// Most bytes of one piece of data: large enough that system calls cost little, small enough that
/// the caller can work on the first piece while the next one arrives.
pub(crate) const PIECE: usize = 256 << 10;
/// Smaller pieces get memory of their own: a server that sends many of them must not make each hold
/// a large buffer.
const WORTH_KEEPING: usize = 64 << 10;
/// Most buffers that are kept although no piece is in them: 8 MiB.
const KEPT: usize = 32;

/// The free buffers of a client.
#[derive(Debug, Default)]
pub(crate) struct BufferPool {
    free: Mutex<Vec<Vec<u8>>>,
}

/// A piece of data. Its memory goes back to the pool when the piece is dropped.
#[derive(Debug)]
pub(crate) struct PieceBuffer {
    memory: Vec<u8>,
    len: usize,
    pool: Arc<BufferPool>,
}

impl BufferPool {
    /// Returns a buffer of `len` bytes, at most [`PIECE`], with unspecified content.
    pub fn take(self: &Arc<Self>, len: usize) -> PieceBuffer {
        let len = len.min(PIECE);
        let memory = if len < WORTH_KEEPING {
            vec![0; len]
        } else {
            self.free.lock().pop().unwrap_or_else(|| vec![0; PIECE])
        };
        PieceBuffer { memory, len, pool: Arc::clone(self) }
    }
}

impl PieceBuffer {
    /// The bytes of the piece.
    pub fn bytes(&self) -> &[u8] {
        self.memory.get(..self.len).unwrap_or_default()
    }

    /// The bytes of the piece, to fill in.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(..self.len).unwrap_or_default()
    }
}

impl Drop for PieceBuffer {
    fn drop(&mut self) {
        if self.memory.len() == PIECE {
            let mut free = self.pool.free.lock();
            if free.len() < KEPT {
                free.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_are_used_again_and_small_ones_are_not_kept() {
        let pool = Arc::new(BufferPool::default());
        let mut first = pool.take(PIECE);
        first.bytes_mut().fill(7);
        let place = first.bytes().as_ptr();
        drop(first);
        let again = pool.take(WORTH_KEEPING);
        assert_eq!((again.bytes().as_ptr(), again.bytes().len()), (place, WORTH_KEEPING));
        drop(pool.take(512));
        assert!(pool.free.lock().is_empty());
        drop((0..2 * KEPT).map(|_| pool.take(PIECE)).collect::<Vec<_>>());
        assert_eq!(pool.free.lock().len(), KEPT);
    }
}
