//! Puts the bytes of one answer into the cache, and says which blocks are complete.

use std::io;
use std::ops::Range;

use remote::cache::{BLOCK, CacheObject};
use remote::sums::{CHUNK, ChunkList};

use crate::source::{Retry, SourceError};

/// The bytes of one answer on their way into the cache.
pub struct Writer<'a> {
    cache: &'a CacheObject,
    sums: Option<&'a ChunkList>,
    range: Range<u64>,
    /// Where the next byte belongs.
    at: u64,
    /// Everything from the start of the range to here is in the map of the cache.
    complete_to: u64,
    /// The bytes of the chunk that is not complete, if there is a chunk list: they are compared
    /// before any of them is written.
    chunk: Vec<u8>,
    is_damaged: bool,
    /// The error of the cache: the error of a sink cannot carry its kind.
    failed: Option<host::Error>,
}

impl<'a> Writer<'a> {
    /// Begins with the first byte of `range`, which lies inside the file and begins with a block,
    /// and with a chunk if there is a chunk list.
    pub fn new(
        cache: &'a CacheObject,
        sums: Option<&'a ChunkList>,
        range: Range<u64>,
    ) -> Writer<'a> {
        let (at, complete_to) = (range.start, range.start);
        Writer {
            cache,
            sums,
            range,
            at,
            complete_to,
            chunk: Vec::new(),
            is_damaged: false,
            failed: None,
        }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// Those of the cache; more bytes than the range has; a chunk that is not the one of the list.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if bytes.len() as u64 > self.range.end - self.at {
            return Err(io::Error::other("the answer is longer than the range"));
        }
        let Some(sums) = self.sums else {
            let written = self.cache.write_at(self.at, bytes);
            self.note(written)?;
            self.at += bytes.len() as u64;
            let complete =
                if self.at == self.range.end { self.at } else { self.at / BLOCK * BLOCK };
            return self.mark(self.complete_to, complete);
        };
        while !bytes.is_empty() {
            let end = (self.at / CHUNK * CHUNK + CHUNK).min(self.range.end);
            let (piece, rest) = bytes.split_at(bytes.len().min((end - self.at) as usize));
            self.chunk.extend_from_slice(piece);
            self.at += piece.len() as u64;
            bytes = rest;
            if self.at < end {
                break;
            }
            let start = end - self.chunk.len() as u64;
            if !sums.verify(start / CHUNK, &self.chunk) {
                self.is_damaged = true;
                return Err(io::Error::other("damaged"));
            }
            let written = self.cache.write_at(start, &self.chunk);
            self.note(written)?;
            self.chunk.clear();
            self.mark(self.complete_to, end)?;
        }
        Ok(())
    }

    fn mark(&mut self, from: u64, to: u64) -> io::Result<()> {
        if from >= to {
            return Ok(());
        }
        let marked = self.cache.mark_present(&(from..to));
        self.note(marked)?;
        self.complete_to = to;
        Ok(())
    }

    fn note(&mut self, done: host::Result<()>) -> io::Result<()> {
        done.map_err(|error| {
            let text = error.to_string();
            self.failed = Some(error);
            io::Error::other(text)
        })
    }

    /// The error of the cache that has ended the answer.
    pub fn take_failure(&mut self) -> Option<host::Error> {
        self.failed.take()
    }

    /// Everything from the start of the range to here is in the cache.
    pub fn complete_to(&self) -> u64 {
        self.complete_to
    }

    /// Judges the end of an answer: the error of the answer, of a chunk, or of one that is short.
    ///
    /// # Errors
    /// As described.
    pub fn end(&self, read: Result<(), SourceError>) -> Result<(), SourceError> {
        if self.is_damaged {
            let number = self.at.saturating_sub(1) / CHUNK;
            return Err(SourceError::new(
                Retry::Damaged,
                format!("the bytes of chunk {number} (1 MiB each) are not those of the chunk list"),
            ));
        }
        read?;
        if self.at < self.range.end {
            return Err(SourceError::new(Retry::LATER, "the answer ended too early"));
        }
        Ok(())
    }
}
