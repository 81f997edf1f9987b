//! A file in memory that outlives the process that writes it, as long as another process has it
//! open.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Bytes that survive the process that writes them, but not the power failure that ends them with
/// every process. The size is fixed.
///
/// Offsets and lengths are in bytes. Errors are those of the operating system.
pub trait SharedBytes: Send + Sync + fmt::Debug {
    /// Returns the size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Those of pread(2); [`io::ErrorKind::UnexpectedEof`] beyond the end.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `offset`. A process that is killed in the call may leave any part of
    /// it written.
    ///
    /// # Errors
    /// Those of pwrite(2). After an error any part of `data` may have been written.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// A memfd whose size is sealed and whose pages exist, so that a write never fails for lack of
/// memory.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    size: u64,
}

/// The seals: no process that has the file open can change its size.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

impl MemoryFile {
    /// Makes a file of `size` bytes, all zero.
    ///
    /// # Errors
    /// Those of memfd_create(2) and fallocate(2), for example ENOMEM.
    pub fn new(size: u64) -> Result<MemoryFile> {
        let what = || "a file in memory";
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know the flag for files that are never executed.
        let file = rustix::fs::memfd_create(c"cordisk-shared", flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| rustix::fs::memfd_create(c"cordisk-shared", flags))
            .map_err(io::Error::from)
            .context(what)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size)
            .map_err(io::Error::from)
            .context(what)?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(io::Error::from).context(what)?;
        Ok(MemoryFile { file: file.into(), size })
    }

    /// Takes over a file that [`MemoryFile::new`] of another process has made.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if it is another kind of file, whose size could change.
    pub fn of_descriptor(descriptor: OwnedFd) -> Result<MemoryFile> {
        let sealed = rustix::fs::fcntl_get_seals(&descriptor)
            .is_ok_and(|seals| seals.contains(SealFlags::SHRINK | SealFlags::GROW));
        if !sealed {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "what is shared must be a file in memory with a sealed size",
            ));
        }
        let file = File::from(descriptor);
        let size = file.metadata().context(|| "a file in memory")?.len();
        Ok(MemoryFile { file, size })
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl SharedBytes for MemoryFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a second holder reads what the first one wrote, and neither can change the size.
    #[test]
    fn it_is_shared_and_keeps_its_size() {
        let file = MemoryFile::new(8192).unwrap();
        file.write_at(8190, &[7, 8]).unwrap();
        let other = file.as_fd().try_clone_to_owned().unwrap();
        let other = MemoryFile::of_descriptor(other).unwrap();
        drop(file);
        let mut found = [0; 2];
        other.read_at(8190, &mut found).unwrap();
        assert_eq!((found, other.size()), ([7, 8], 8192));
        assert!(other.write_at(8191, &[1, 2]).is_err(), "a write does not grow it");
        assert!(other.file.set_len(4096).is_err() && other.file.set_len(10_000).is_err());
        assert!(other.read_at(8191, &mut found).is_err());
    }

    /// Protects: a file whose size can change is no journal.
    #[test]
    fn other_files_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = MemoryFile::of_descriptor(file.into()).unwrap_err();
        assert!(error.to_string().contains("sealed size"), "{error}");
    }
}
