//! The simulated memory that outlives a process: it records its writes, in one order with those of
//! a simulated file.

use std::io;
use std::sync::Arc;

use super::SimStorage;
use host::storage::SharedBytes;
use host::sync::unranked::Mutex;

/// A write into the memory.
#[derive(Clone, Debug)]
pub struct JournalWrite {
    /// How many changes of the file were recorded before it.
    pub after: usize,
    /// Offset in bytes.
    pub at: u64,
    /// The data.
    pub data: Box<[u8]>,
}

/// Memory that outlives a process and is lost with the power.
#[derive(Debug)]
pub struct SimJournal {
    size: u64,
    /// The file whose changes are counted; `None` for memory that a test fills itself.
    file: Option<Arc<SimStorage>>,
    state: Mutex<SimJournalState>,
}

#[derive(Debug, Default)]
struct SimJournalState {
    bytes: Vec<u8>,
    writes: Vec<JournalWrite>,
    fails: bool,
}

impl SimJournal {
    /// Makes memory of `size` bytes, all zero, beside `file`.
    pub fn new(size: u64, file: &Arc<SimStorage>) -> Arc<SimJournal> {
        SimJournal::of(vec![0; size as usize], Some(Arc::clone(file)))
    }

    /// Makes memory with these bytes. Writes are recorded with the changes of `file` before them.
    pub fn of(bytes: Vec<u8>, file: Option<Arc<SimStorage>>) -> Arc<SimJournal> {
        Arc::new(SimJournal {
            size: bytes.len() as u64,
            file,
            state: Mutex::new(SimJournalState { bytes, ..SimJournalState::default() }),
        })
    }

    /// Returns the bytes now.
    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().bytes.clone()
    }

    /// Returns all writes since the memory was made.
    pub fn writes(&self) -> Vec<JournalWrite> {
        self.state.lock().writes.clone()
    }

    /// Returns how many writes there were.
    pub fn writes_len(&self) -> usize {
        self.state.lock().writes.len()
    }

    /// Makes every later write fail, or none.
    pub fn fail(&self, fails: bool) {
        self.state.lock().fails = fails;
    }
}

impl SharedBytes for SimJournal {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock();
        let at = offset as usize;
        let found = state.bytes.get(at..at + buf.len());
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let after = self.file.as_ref().map_or(0, |file| file.recorded_len());
        let mut state = self.state.lock();
        if state.fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let at = offset as usize;
        assert!(at + data.len() <= state.bytes.len(), "a journal does not grow");
        state.bytes[at..at + data.len()].copy_from_slice(data);
        state.writes.push(JournalWrite { after, at: offset, data: data.into() });
        Ok(())
    }
}
