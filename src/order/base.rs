//! What an order belongs to: a disk, by its size, its first bytes and its pin.
//!
//! An order is kept longer than the machine that it was recorded on, and is copied from host to
//! host. The name of the image would say nothing there. A digest of the whole image would need all
//! of it, which is what a stream wants to avoid. The first 64 KiB have the partition table with the
//! identity of the disk, and the boot code; for a file system without a partition table they have
//! its superblock with the UUID.

use host::{Error, ErrorKind, Result};
use sha2::{Digest as _, Sha256};

use crate::LONGEST_DISK;

/// How many bytes of the disk [`BaseIdentity::head`] covers: the partition table, and the
/// superblock of a file system that begins at 0 (ext4 has it at 1 KiB, XFS at 0; that of btrfs at
/// 64 KiB is not in the head).
pub const HEAD: usize = 64 << 10;

/// Length of a pin in bytes. Entity tags and versions of objects have less than 100.
pub const MOST_PIN: usize = 1 << 10;

/// What an order belongs to: the disk below the overlay, as the guest sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BaseIdentity {
    /// Size of the disk in bytes.
    pub size: u64,
    /// SHA-256 of its first [`HEAD`] bytes, or of all if it is shorter.
    pub head: [u8; 32],
    /// The validator of a remote base as text, at most [`MOST_PIN`] bytes, not empty.
    pub pin: Option<String>,
}

impl BaseIdentity {
    /// Finds the identity of a disk of `size` bytes. `read` fills its argument with the first bytes
    /// of the disk, and is called once unless the disk is empty.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if no disk can be that large, or if the pin is longer than
    /// [`MOST_PIN`]; those of `read`.
    pub fn of(
        size: u64,
        read: impl FnOnce(&mut [u8]) -> Result<()>,
        pin: Option<String>,
    ) -> Result<BaseIdentity> {
        if size > LONGEST_DISK {
            let why = format!("no disk has {size} bytes: the largest has {LONGEST_DISK}");
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        let length = pin.as_ref().map_or(0, String::len);
        if length > MOST_PIN {
            let why = format!("the pin of the base has {length} bytes, more than {MOST_PIN}");
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        let mut head = vec![0; usize::try_from(size).map_or(HEAD, |size| size.min(HEAD))];
        if !head.is_empty() {
            read(&mut head)?;
        }
        let head = Sha256::digest(&head).into();
        Ok(BaseIdentity { size, head, pin }.with_bounded_pin())
    }

    /// The same without a pin that no file of an order can have. It only makes the check weaker.
    pub(crate) fn with_bounded_pin(mut self) -> BaseIdentity {
        self.pin = self.pin.filter(|pin| (1..=MOST_PIN).contains(&pin.len()));
        self
    }

    /// Checks that `other` is the same disk: size and head, and the pins if both have one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`], with what differs.
    pub(crate) fn check_same(&self, other: &BaseIdentity) -> Result<()> {
        let pins = self.pin.as_ref().zip(other.pin.as_ref());
        let why = if self.size != other.size {
            format!("the order belongs to a disk of {} bytes, not {}", self.size, other.size)
        } else if self.head != other.head {
            let length = self.size.min(HEAD as u64);
            format!(
                "the order belongs to another disk of the same size: the SHA-256 of its first \
                 {length} bytes is {}, not {}",
                self.head_text(),
                other.head_text()
            )
        } else if let Some((one, another)) = pins.filter(|(one, another)| one != another) {
            format!(
                "the order belongs to another version of the disk: its pin is {one}, not {another}"
            )
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::InvalidArgument, why))
    }

    /// [`BaseIdentity::head`] as 64 hexadecimal digits.
    pub fn head_text(&self) -> String {
        self.head.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
