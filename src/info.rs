//! What an image says of itself in its header, in the words of `qemu-img info`.
//!
//! **Touches:** `storage` to open a file for reading, `format` for the header. **Never:** takes a lock, reads guest data, writes.
//! **Locks:** none, on purpose, as `qemu-img info -U`: an image that is in use can be looked at. What is read is one read of the first cluster. Whoever
//! writes it meanwhile, we or QEMU, changes the header in single small writes, each of which leaves a header that can be read, so what is told was
//! true at some moment, or is refused as broken; nothing is ever done because of it.
//! **Invariants:** the format of a backing file is what the image above says, never guessed: a guest can write a header of any format into a raw
//! disk. An image that is named on the command line is qcow2 if it begins like one, refused by name
//! if it begins like an image of another format, and raw otherwise.

use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use serde::{Deserialize, Serialize};

use crate::chain::{MAX_LAYERS, Namer, explain};
use crate::error::{Context, one_line};
use crate::format::{BackingFormat, BackingReference, Header, Qcow2Facts, feature, printable, signature};
use crate::map::units;
use crate::storage::{Access, FileStorage, Rights, Storage};
use crate::{Error, ErrorKind, Result};

/// A header lies in the first cluster, which is at most so long.
const FIRST_CLUSTER: usize = 2 << 20;
/// First bytes of every qcow2 image.
const MAGIC: &[u8] = b"QFI\xfb";
/// QEMU counts the size of a disk in sectors.
const SECTOR: u64 = 512;

/// Facts of one image, with the names of QMP's `ImageInfo`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file, as it was named.
    pub filename: String,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// Bytes that the file occupies on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Bytes of a cluster, for qcow2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// The image was not closed cleanly (only with lazy refcounts).
    #[serde(default)]
    pub dirty_flag: bool,
    /// The backing file as it stands in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The same, seen from where the image was seen from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file's format as it stands in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// What only qcow2 has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// The image below, in answers of a daemon.
    #[serde(default, skip_serializing)]
    pub backing_image: Option<Box<ImageInfo>>,
}

/// Facts that only one format has.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct FormatSpecific {
    /// `qcow2`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The facts.
    pub data: Qcow2Facts,
}

/// Facts of the image at `path`, which may be in use.
///
/// # Errors
/// Those of open(2); [`ErrorKind::InvalidArgument`] for anything but a regular file or a block device; a qcow2 header that makes no sense, or
/// has a feature that nobody here knows.
pub fn of(path: &Path) -> Result<ImageInfo> {
    let file = FileStorage::open_unlocked(path, Access::ReadOnly)?;
    let first = first_bytes(&file)?;
    let format = format_of(path, &first)?;
    Ok(facts(&file, path, format, &first)?.0)
}

/// The same of the image and of all below it, top first.
///
/// # Errors
/// As [`of`] for each of them; [`ErrorKind::InvalidArgument`] for a backing file whose format the image above does not say, one that is in the
/// chain already, and a chain of more than [`MAX_LAYERS`] backing files.
pub fn chain_of(path: &Path) -> Result<Vec<ImageInfo>> {
    let file = FileStorage::open_unlocked(path, Access::ReadOnly)?;
    let first = first_bytes(&file)?;
    let format = format_of(path, &first)?;
    let mut taken = vec![file.identity()];
    let (info, mut next) = facts(&file, path, format, &first)?;
    let mut images = vec![info];
    let (mut path, mut owner, mut rights) = (path.to_owned(), file.owner(), None);
    while let Some(reference) = next {
        let invalid = |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{}: {why}", path.display())));
        let name = printable(&reference.name);
        if let Some(format) = images.last().and_then(|image| image.backing_filename_format.clone()).filter(|_| reference.format.is_none()) {
            return invalid(format!("its backing file \"{name}\" is of format {}, which is not known here", one_line(&format)));
        }
        let Some(format) = reference.format else {
            return invalid(format!(
                "does not say of which format its backing file \"{name}\" is, and formats are not guessed; say it once with \
                 qemu-img rebase -u -b \"{name}\" -F FORMAT"
            ));
        };
        let Some(below) = full_name(&path, &reference.name) else {
            return invalid(format!("backing file name \"{name}\": protocols (json:, nbd:, ...) are not supported"));
        };
        if images.len() > MAX_LAYERS {
            return invalid(format!("backing chain is longer than {MAX_LAYERS} layers"));
        }
        // Not just any file that an image names: what is in /proc stands for files that others have open.
        rights = Rights::below(rights, owner)?;
        let file = Rights::run_with(rights.as_ref(), || FileStorage::open_backing(CWD, &below, &below))
            .map_err(|error| explain(error, Namer::Above { path: &path, owner }, rights.as_ref(), &below, format))?;
        owner = file.owner();
        if taken.contains(&file.identity()) {
            return invalid(format!("backing file \"{name}\" is in this chain already"));
        }
        taken.push(file.identity());
        let (info, deeper) = facts(&file, &below, format, &first_bytes(&file)?)?;
        images.push(info);
        (path, next) = (below, deeper);
    }
    Ok(images)
}

/// The format of an image that is named on the command line.
fn format_of(path: &Path, first: &[u8]) -> Result<BackingFormat> {
    if first.starts_with(MAGIC) {
        return Ok(BackingFormat::Qcow2);
    }
    match signature(first) {
        Some((name, format)) => {
            let path = path.display();
            let text = format!("{path}: a {name} image, which is not known here; qemu-img info -f {format} {path} tells what is in it");
            Err(Error::new(ErrorKind::UnsupportedFeature, text))
        }
        None => Ok(BackingFormat::Raw),
    }
}

/// As much of the beginning of the file as a header may take.
fn first_bytes(file: &FileStorage) -> Result<Vec<u8>> {
    let len = usize::try_from(file.size()).map_or(FIRST_CLUSTER, |size| size.min(FIRST_CLUSTER));
    let mut first = vec![0; len];
    file.read_at(0, &mut first).context(|| format!("{}: header", file.path().display()))?;
    Ok(first)
}

fn facts(file: &FileStorage, path: &Path, format: BackingFormat, first: &[u8]) -> Result<(ImageInfo, Option<BackingReference>)> {
    let what = || path.display().to_string();
    let actual_size = file.allocated_size().context(what)?;
    let mut info = ImageInfo {
        filename: path.to_string_lossy().into_owned(),
        format: format.to_string(),
        virtual_size: file.size().next_multiple_of(SECTOR),
        actual_size: Some(actual_size),
        cluster_size: None,
        dirty_flag: false,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        format_specific: None,
        backing_image: None,
    };
    if format == BackingFormat::Raw {
        return Ok((info, None));
    }
    // Where the tables are does not matter here: an image that is grown meanwhile, or cut off, has facts all the same.
    let mut padded = first.to_vec();
    padded.resize(FIRST_CLUSTER, 0);
    let header = Header::parse_to_check(&padded).map_err(|error| Error::from(error).context(what()))?;
    info.virtual_size = header.geometry.size();
    info.cluster_size = Some(header.geometry.cluster_size());
    info.dirty_flag = header.incompatible & feature::DIRTY != 0;
    info.format_specific = Some(FormatSpecific { kind: "qcow2".into(), data: header.facts() });
    if let Some(backing) = &header.backing {
        info.backing_filename = Some(backing.name.clone());
        info.full_backing_filename = full_name(path, &backing.name).map(|name| name.to_string_lossy().into_owned());
        info.backing_filename_format = backing.format.map(|format| format.to_string()).or(header.foreign_format.clone());
    }
    Ok((info, header.backing))
}

/// The file that `name` means in the image at `path`; `None` for names that are no file names.
fn full_name(path: &Path, name: &str) -> Option<PathBuf> {
    let first_part = name.split('/').next().unwrap_or_default();
    (!first_part.contains(':')).then(|| path.parent().unwrap_or(Path::new("")).join(name))
}

impl ImageInfo {
    /// The facts as lines, in the words of `qemu-img info`.
    pub fn sentences(&self) -> String {
        let mut lines = vec![
            format!("image: {}", one_line(&self.filename)),
            format!("file format: {}", one_line(&self.format)),
            format!("virtual size: {} ({} bytes)", units::size(self.virtual_size), self.virtual_size),
        ];
        lines.extend(self.actual_size.map(|size| format!("disk size: {}", units::size(size))));
        lines.extend(self.cluster_size.map(|size| format!("cluster_size: {size}")));
        if self.dirty_flag {
            lines.push("cleanly shut down: no".into());
        }
        if let Some(name) = &self.backing_filename {
            let actual = self.full_backing_filename.as_ref().filter(|full| *full != name);
            let actual = actual.map_or(String::new(), |full| format!(" (actual path: {})", one_line(full)));
            lines.push(format!("backing file: {}{actual}", one_line(name)));
        }
        lines.extend(self.backing_filename_format.as_ref().map(|format| format!("backing file format: {}", one_line(format))));
        if let Some(FormatSpecific { data, .. }) = &self.format_specific {
            lines.push("Format specific information:".into());
            lines.push(format!("    compat: {}", one_line(&data.compat)));
            lines.push(format!("    compression type: {}", one_line(&data.compression_type)));
            lines.extend(data.lazy_refcounts.map(|lazy| format!("    lazy refcounts: {lazy}")));
            lines.push(format!("    refcount bits: {}", data.refcount_bits));
            lines.extend(data.corrupt.map(|corrupt| format!("    corrupt: {corrupt}")));
            lines.extend(data.extended_l2.map(|extended| format!("    extended l2: {extended}")));
        }
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_images_start_from_the_image() {
        for (path, name, full) in [
            ("o.qcow2", "b.raw", "b.raw"),
            ("./o", "b", "./b"),
            ("/d/o", "../b", "/d/../b"),
            ("/d/o", "/b", "/b"),
            ("d/o", "./a:b", "d/./a:b"),
        ] {
            assert_eq!(full_name(Path::new(path), name), Some(PathBuf::from(full)), "{path} {name}");
        }
        assert_eq!(full_name(Path::new("/o"), "nbd:host:10809"), None);
    }

    #[test]
    fn sentences_are_those_of_qemu_img() {
        let info: ImageInfo = serde_json::from_value(serde_json::json!({
            "filename": "dir/o.qcow2", "format": "qcow2", "virtual-size": 4 << 20, "actual-size": 397_312, "cluster-size": 65536, "dirty-flag": true,
            "backing-filename": "b.raw", "full-backing-filename": "dir/b.raw", "backing-filename-format": "raw",
            "format-specific": { "type": "qcow2", "data": { "compat": "1.1", "compression-type": "zlib", "lazy-refcounts": false,
                "refcount-bits": 16, "corrupt": false, "extended-l2": false } },
        }))
        .unwrap();
        let want = "image: dir/o.qcow2\nfile format: qcow2\nvirtual size: 4 MiB (4194304 bytes)\ndisk size: 388 KiB\ncluster_size: 65536\n\
            cleanly shut down: no\nbacking file: b.raw (actual path: dir/b.raw)\nbacking file format: raw\nFormat specific information:\n    \
            compat: 1.1\n    compression type: zlib\n    lazy refcounts: false\n    refcount bits: 16\n    corrupt: false\n    extended l2: false\n";
        assert_eq!(info.sentences(), want);
    }
}
