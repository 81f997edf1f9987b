//! `cordisk create`: a new overlay.
//!
//! **Touches:** `format` for the bytes, `storage` for the file, `chain` to look at the base. **Never:** changes a file that exists.
//! **Locks:** none of ours (the new file is locked like any overlay). **Invariants:** when it returns, the overlay is durable under its
//! name, or there is none.

use std::path::{Path, PathBuf};

use crate::error::Context;
use crate::format::{BackingFormat, BackingReference, Geometry, NewImage, signature};
use crate::storage::{Access, FileStorage, Storage, WriteKind};
use crate::{Error, ErrorKind, Result, chain};

/// Version of new images: the one with zero clusters.
const VERSION: u32 = 3;
/// log2 of 16 bits, QEMU's default.
const REFCOUNT_ORDER: u32 = 4;
/// Disk sizes are multiples of this, bytes; as qemu-img, others are rounded up.
const GUEST_SECTOR: u64 = 512;

/// What `cordisk create` is asked for.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The file to create; must not exist.
    pub overlay: PathBuf,
    /// The backing file name as it is to stand in the header; relative names are relative to the overlay's directory.
    pub base: String,
    /// Its format.
    pub format: BackingFormat,
    /// Virtual size in bytes; the base's where `None`. Rounded up to 512 bytes.
    pub size: Option<u64>,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
}

impl CreateOptions {
    /// The directory of the overlay, from which relative names start.
    fn directory(&self) -> &Path {
        self.overlay.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Where the base is.
    pub fn base_path(&self) -> PathBuf {
        self.directory().join(&self.base)
    }
}

/// Creates the overlay, durably. The base is opened as it will be when the overlay is mounted, so a name or a file that would be refused
/// then is refused now.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for sizes that the format does not allow; what [`chain::base_size`] says of the base; errors of the
/// operating system, after which no overlay is left behind.
pub fn create(options: &CreateOptions) -> Result<()> {
    let overlay = &options.overlay;
    let directory = options.directory();
    let backing = BackingReference { name: options.base.clone(), format: Some(options.format) };
    if !directory.is_dir() {
        let text = format!("{}: no such directory to create {} in", directory.display(), overlay.display());
        return Err(Error::new(ErrorKind::NotFound, text));
    }
    let base_size = chain::base_size(&backing, directory).map_err(|error| match error.kind() {
        ErrorKind::NotFound if Path::new(&options.base).is_relative() => Error::new(
            ErrorKind::NotFound,
            format!("{error}; a relative name of a backing file is relative to the directory of the overlay"),
        ),
        _ => error,
    })?;
    warn(options, base_size);
    let cluster_bits = cluster_bits(options.cluster_size)?;
    let Some(size) = options.size.unwrap_or(base_size).checked_next_multiple_of(GUEST_SECTOR) else {
        return Err(Error::new(ErrorKind::InvalidArgument, "virtual size is too large"));
    };
    let geometry = Geometry::new(VERSION, cluster_bits, REFCOUNT_ORDER, size).map_err(asked)?;
    let writes = NewImage { geometry, backing: Some(backing) }.layout().map_err(asked)?;

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

/// Says what is allowed but seldom meant.
fn warn(options: &CreateOptions, base_size: u64) {
    let (overlay, base) = (options.overlay.display(), options.base_path());
    let mut first = [0; 512];
    // It was opened a moment ago; where it cannot be opened any more there is nothing to say.
    let read = FileStorage::open_unlocked(&base, Access::ReadOnly).is_ok_and(|file| file.read_at(0, &mut first).is_ok());
    if let Some((name, format)) = signature(&first).filter(|_| read && options.format == BackingFormat::Raw) {
        let base = base.display();
        log::warn!(
            "{base} begins like a {name} image, but -F raw shows the bytes of the file as they are: unless that is meant, remove {overlay} and \
             make it with -F qcow2 (of a qcow2 image made with qemu-img convert -f {format} -O qcow2, if it is of another format)"
        );
    }
    let size = options.size.unwrap_or(base_size);
    if size < base_size {
        log::warn!("{overlay} has {size} bytes, fewer than its base with {base_size}: the end of the base is not seen in it");
    }
    if size < options.cluster_size {
        log::warn!("{overlay} has {size} bytes, less than one cluster of {}", options.cluster_size);
    }
}

/// A file of ours that is not worth keeping yet; dropped, it is removed.
struct Unfinished<'a>(&'a Path);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(self.0) {
            log::warn!("{}: cannot be removed: {}", self.0.display(), crate::error::os_text(&error));
        }
    }
}

fn cluster_bits(cluster_size: u64) -> Result<u32> {
    if cluster_size.is_power_of_two() && (512..=2 << 20).contains(&cluster_size) {
        return Ok(cluster_size.ilog2());
    }
    Err(Error::new(ErrorKind::InvalidArgument, format!("cluster size {cluster_size} is no power of two from 512 to 2097152 bytes")))
}

/// What `format` finds wrong with a new image was asked for by the user.
fn asked(error: crate::format::FormatError) -> Error {
    Error::new(ErrorKind::InvalidArgument, error.to_string())
}

#[cfg(test)]
mod tests;
