//! `cordisk create`: creating an overlay.
//!
//! **Touches:** `format` for the bytes, `storage` for the file, `chain` to examine the base.
//! **Never:** changes a file that exists.
//! **Locks:** none in memory; the new file is locked like any overlay. **Invariants:** when
//! [`create`] returns, the overlay is durable under its name, or it does not exist.

use std::path::{Path, PathBuf};

use crate::chain::{self, Gate};
use host::error::Context;
use host::storage::{Access, FileStorage, ReadAt, Storage, WriteKind};
use host::{Error, ErrorKind, Result};
use qcow2::format::{BackingFormat, BackingReference, Geometry, Header, NewImage, signature};
use remote::url::SourceUrl;

/// Version of new images. Version 3 has zero clusters.
const VERSION: u32 = 3;
/// log2 of the refcount width in bits: 16 bits, QEMU's default.
const REFCOUNT_ORDER: u32 = 4;
/// Sizes of disks are multiples of this, in bytes. Other sizes are rounded up, as qemu-img does.
const GUEST_SECTOR: u64 = 512;

/// Arguments of [`create`].
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Path of the file to create. It must not exist.
    pub overlay: PathBuf,
    /// Backing file name for the header. A relative name is relative to the overlay's directory.
    pub base: String,
    /// Format of the backing file.
    pub format: BackingFormat,
    /// Virtual size in bytes, rounded up to 512 bytes. `None` means the size of the base.
    pub size: Option<u64>,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB; at least 16 KiB with extended L2
    /// entries.
    pub cluster_size: u64,
    /// Whether L2 entries are extended, so that each of the 32 subclusters of a cluster has a
    /// mapping of its own.
    pub extended_l2: bool,
}

impl CreateOptions {
    /// The directory of the overlay, from which relative names start.
    fn directory(&self) -> &Path {
        self.overlay
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."))
    }

    /// Path of the base.
    pub fn base_path(&self) -> PathBuf {
        self.directory().join(&self.base)
    }
}

/// Creates the overlay, durably.
///
/// The base is opened as a later mount will open it, so that a name or a file that the mount would
/// refuse is refused now. `gate` opens remote bases; what they are pinned to is stored in the
/// overlay.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for sizes that the format does not allow; the errors of
/// [`chain::examine_base`]; errors of the operating system. After an error, no overlay is left
/// behind.
pub fn create(options: &CreateOptions, gate: &Gate) -> Result<()> {
    let overlay = &options.overlay;
    let directory = options.directory();
    let backing = BackingReference { name: options.base.clone(), format: Some(options.format) };
    if !directory.is_dir() {
        let text = format!(
            "{}: no such directory to create {} in",
            directory.display(),
            overlay.display()
        );
        return Err(Error::new(ErrorKind::NotFound, text));
    }
    let (base_size, pins) = chain::examine_base(&backing, directory, gate).map_err(|error| match error.kind() {
        ErrorKind::NotFound if Path::new(&options.base).is_relative() => Error::new(
            ErrorKind::NotFound,
            format!("{error}; a relative name of a backing file is relative to the directory of the overlay"),
        ),
        _ => error,
    })?;
    warn(options, base_size);
    let cluster_bits = cluster_bits(options.cluster_size)?;
    let Some(size) = options.size.unwrap_or(base_size).checked_next_multiple_of(GUEST_SECTOR)
    else {
        return Err(Error::new(ErrorKind::InvalidArgument, "virtual size is too large"));
    };
    let mut geometry = Geometry::new(VERSION, cluster_bits, REFCOUNT_ORDER, size).map_err(asked)?;
    if options.extended_l2 {
        geometry = geometry.with_extended_l2().map_err(asked)?;
    }
    let mut writes = NewImage { geometry, backing: Some(backing) }.layout().map_err(asked)?;
    if !pins.is_empty() {
        let end = writes.iter().map(|(offset, bytes)| offset + bytes.len() as u64).max();
        pin(&mut writes[0].1, end.unwrap_or(0), &remote::pin::encode(&pins))?;
    }

    let file = FileStorage::create_new(overlay)?;
    let unfinished = Unfinished(overlay);
    let context = || overlay.display().to_string();
    for (offset, bytes) in &writes {
        file.write_at(WriteKind::Header, *offset, bytes).context(context)?;
    }
    file.sync().context(context)?;
    file.sync_directory().context(context)?;
    std::mem::forget(unfinished);
    Ok(())
}

/// Stores the pins of remote layers in the first cluster of a new image of `size` bytes.
fn pin(cluster: &mut [u8], size: u64, pins: &[u8]) -> Result<()> {
    let change = Header::parse(cluster, size).and_then(|header| header.with_pins(pins));
    let change = change.map_err(asked)?;
    for (at, bytes) in change.before.into_iter().chain([change.patch]) {
        cluster[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    Ok(())
}

/// Warns about arguments that are allowed but rarely intended.
fn warn(options: &CreateOptions, base_size: u64) {
    let (overlay, base) = (options.overlay.display(), options.base_path());
    let mut first = [0; 512];
    // The base was opened a moment ago. If that fails now, there is nothing to warn about.
    let read = !SourceUrl::is_source(&options.base)
        && FileStorage::open_unlocked(&base, Access::ReadOnly)
            .is_ok_and(|file| file.read_at(0, &mut first).is_ok());
    if let Some((name, format)) =
        signature(&first).filter(|_| read && options.format == BackingFormat::Raw)
    {
        let base = base.display();
        log::warn!(
            "{base} begins like a {name} image, but -F raw shows the bytes of the file as they are: unless that is meant, remove {overlay} and \
             make it with -F qcow2 (of a qcow2 image made with qemu-img convert -f {format} -O qcow2, if it is of another format)"
        );
    }
    let size = options.size.unwrap_or(base_size);
    if size < base_size {
        log::warn!(
            "{overlay} has {size} bytes, fewer than its base with {base_size}: the end of the base is not seen in it"
        );
    }
    if size < options.cluster_size {
        log::warn!("{overlay} has {size} bytes, less than one cluster of {}", options.cluster_size);
    }
}

/// An incomplete file of this process, which is removed on drop.
struct Unfinished<'a>(&'a Path);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(self.0) {
            log::warn!("{}: cannot be removed: {}", self.0.display(), host::error::os_text(&error));
        }
    }
}

fn cluster_bits(cluster_size: u64) -> Result<u32> {
    if cluster_size.is_power_of_two() && (512..=2 << 20).contains(&cluster_size) {
        return Ok(cluster_size.ilog2());
    }
    Err(Error::new(
        ErrorKind::InvalidArgument,
        format!("cluster size {cluster_size} is no power of two from 512 to 2097152 bytes"),
    ))
}

/// Converts an error of `format` to one of the user's arguments, because the user chose the sizes
/// of the new image.
fn asked(error: qcow2::format::FormatError) -> Error {
    Error::new(ErrorKind::InvalidArgument, error.to_string())
}

#[cfg(test)]
mod tests;
