//! The file of the host.

use std::io;
use std::path::{Path, PathBuf};

use super::{Holding, Storage};

/// How an image file is opened and what is locked against other programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// For reading and writing; nobody else may write or resize it.
    ReadWrite,
    /// For reading; nobody else may write or resize it meanwhile.
    ReadOnly,
}

/// A file, opened once, used by offset only.
#[derive(Debug)]
pub struct FileStorage {
    path: PathBuf,
}

impl FileStorage {
    /// Opens and locks.
    ///
    /// # Errors
    /// As documented.
    #[allow(clippy::todo)]
    pub fn open(_path: &Path, _access: Access) -> crate::Result<Self> {
        todo!()
    }

    /// Creates a new file that must not exist, opened for writing and locked.
    ///
    /// # Errors
    /// As documented.
    #[allow(clippy::todo)]
    pub fn create_new(_path: &Path) -> crate::Result<Self> {
        todo!()
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// (device, inode): what a file is, whatever its name.
    #[allow(clippy::todo)]
    pub fn identity(&self) -> (u64, u64) {
        todo!()
    }
}

#[allow(clippy::todo)]
impl Storage for FileStorage {
    fn size(&self) -> u64 {
        todo!()
    }
    fn allocated_size(&self) -> io::Result<u64> {
        todo!()
    }
    fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
        todo!()
    }
    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        todo!()
    }
    fn punch_hole(&self, _offset: u64, _len: u64) -> io::Result<()> {
        todo!()
    }
    fn sync(&self) -> io::Result<()> {
        todo!()
    }
    fn holding(&self, _offset: u64, _max: u64) -> io::Result<(Holding, u64)> {
        todo!()
    }
}
