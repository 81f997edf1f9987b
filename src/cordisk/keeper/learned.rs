//! The order that a disk leaves beside its base (`--learn`).
//!
//! The serving process can create no file. It writes the order into memory that it shares with the
//! keeper, and the keeper stores it under the name that was remembered before the mount: that of
//! the base, which the owner of the image has chosen. So the keeper uses the rights with which the
//! base was opened, and stores nothing that is no order.
//!
//! **Touches:** one file, and a temporary one beside it. **Never:** another name than the one that
//! was remembered first. **Invariants:** the file has the old content or the new one, as a whole.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use host::error::Context;
use host::place::Place;
use host::storage::{MemoryFile, Rights, SharedBytes};
use host::{Error, ErrorKind, Result};
use order::Order;

/// The most bytes of an order that a disk leaves: some hundred thousand ranges.
pub const LONGEST_LEARNED: u64 = 1 << 20;

/// Where the order goes, and the memory that has it.
#[derive(Debug)]
pub(super) struct LearnedOrder {
    place: Place,
    memory: MemoryFile,
    /// Those of this process if there are none.
    rights: Option<Rights>,
}

impl LearnedOrder {
    /// Opens the directory of `path`, and keeps the rights of a user and group with which the order
    /// is stored.
    ///
    /// # Errors
    /// Those of [`Place::find`]; without a user, the directory belongs to another one; the
    /// descriptor is not memory of a sealed size.
    pub(super) fn find(
        path: &Path,
        memory: Option<OwnedFd>,
        user: Option<(u32, u32)>,
    ) -> Result<LearnedOrder> {
        let missing = || Error::new(ErrorKind::InvalidArgument, "no memory for an order");
        let memory = MemoryFile::of_descriptor(memory.ok_or_else(missing)?)?;
        let name = || format!("--learn: {}", path.display());
        let rights = user.map(|(uid, gid)| Rights::of(uid, gid)).transpose()?;
        let place = Rights::run_with(rights.as_ref(), || Place::find(path)).context(name)?;
        if rights.is_none() && place.is_foreign() {
            let why = "another user can replace the file or its directory: leave --learn out";
            return Err(Error::new(ErrorKind::PermissionDenied, why).context(name()));
        }
        Ok(LearnedOrder { place, memory, rights })
    }

    /// The path of the order.
    pub(super) fn path(&self) -> &Path {
        self.place.path()
    }

    /// Stores the first `len` bytes of the memory, readable by all users.
    ///
    /// # Errors
    /// There are not as many, or they are no order; those of writing and renaming a file.
    pub(super) fn store(&self, len: u64) -> Result<()> {
        if len > self.memory.size().min(LONGEST_LEARNED) {
            return Err(Error::new(ErrorKind::InvalidArgument, "the order is too long"));
        }
        let name = || format!("--learn: {}", self.place.path().display());
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        self.memory.read_at(0, &mut bytes).context(name)?;
        Order::decode(&bytes).context(name)?;
        Rights::run_with(self.rights.as_ref(), || self.replace(&bytes).context(name))
    }

    /// Replaces the file.
    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let mut part = OsString::from(".");
        part.push(self.place.name());
        part.push(format!(".{}.part", std::process::id()));
        let directory = self.place.directory();
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(directory, &part, flags, Mode::from_raw_mode(0o600));
        let file = match open() {
            // Of a keeper of the same number that was killed.
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(directory, &part, AtFlags::empty())?;
                open()?
            }
            file => file?,
        };
        let written = write(File::from(file), bytes).and_then(|()| {
            Ok(rustix::fs::renameat(directory, &part, directory, self.place.name())?)
        });
        if written.is_err() {
            let _ = rustix::fs::unlinkat(directory, &part, AtFlags::empty());
        }
        written
    }
}

/// Writes a file that all users may read, and waits until it is on the disk.
fn write(mut file: File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use order::{BaseIdentity, Touch};

    use super::*;

    #[test]
    fn an_order_is_stored_as_a_whole_under_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.order");
        std::fs::write(&path, "old").unwrap();
        let memory = MemoryFile::new(LONGEST_LEARNED).unwrap();
        let shared = memory.as_fd().try_clone_to_owned().unwrap();
        let learned = LearnedOrder::find(&path, Some(shared), None).unwrap();
        let base = BaseIdentity { size: 1 << 20, head: [7; 32], pin: None };
        let order = Order::from_touches(base, [Touch { offset: 0, len: 512, at_ms: 0 }]).encode();
        memory.write_at(0, &order).unwrap();
        let len = order.len() as u64;
        // A keeper of the same number has left this.
        let part = dir.path().join(format!(".base.order.{}.part", std::process::id()));
        std::fs::write(&part, "part").unwrap();
        learned.store(len).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), order);
        assert!(learned.store(len - 1).is_err() && learned.store(LONGEST_LEARNED + 1).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), order, "what is no order is not stored");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(learned.store(len).unwrap_err().to_string().contains("base.order"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
        let file = File::open(dir.path()).unwrap();
        assert!(LearnedOrder::find(&path, Some(file.into()), None).is_err());
        assert!(LearnedOrder::find(&path, None, None).is_err());
    }

    /// Protects: the keeper of root stores nothing where the owner of the image may not.
    #[test]
    fn an_order_is_stored_with_the_rights_of_the_owner() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: not root");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.order");
        let memory = MemoryFile::new(LONGEST_LEARNED).unwrap();
        let base = BaseIdentity { size: 1 << 20, head: [7; 32], pin: None };
        let order = Order::from_touches(base, [Touch { offset: 0, len: 512, at_ms: 0 }]).encode();
        memory.write_at(0, &order).unwrap();
        let find = || {
            let shared = memory.as_fd().try_clone_to_owned().unwrap();
            LearnedOrder::find(&path, Some(shared), Some((12_345, 12_345)))
        };
        // The directory is that of root, and not even searchable for others.
        assert!(find().is_err() || find().unwrap().store(order.len() as u64).is_err());
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
        find().unwrap().store(order.len() as u64).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().uid(), 12_345);
    }
}
