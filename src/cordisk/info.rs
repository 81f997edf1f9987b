//! Facts in the header of an image, in the words of `qemu-img info`.
//!
//! **Touches:** `storage` to open a file for reading, `format` for the header. **Never:** takes a
//! lock, reads guest data, writes.
//! **Locks:** none, on purpose, as `qemu-img info -U`: an image that is in use can be inspected.
//! The first cluster is read once. A process that writes the image meanwhile, ours or QEMU, changes
//! the header in single small writes, each of which leaves a valid header. So the facts were true
//! at some moment, or the header is refused as broken; no operation depends on them.
//! **Invariants:** the format of a backing file is the one that the image above names. It is never
//! guessed, because a guest can write a header of any format into a raw disk. An image named on the
//! command line is qcow2 if it begins like one. It is refused, with the format's name, if it begins
//! like an image of another format, and is raw otherwise.

use std::path::{Path, PathBuf};

use rustix::fs::CWD;

use crate::map::units;
use control::facts::{ImageInfo, ImageInfoSpecific};
use engine::chain::{MAX_LAYERS, Namer, explain};
use host::error::{Context, one_line};
use host::storage::{Access, FileStorage, ReadAt, Rights};
use host::{Error, ErrorKind, Result};
use qcow2::format::{BackingFormat, BackingReference, Header, feature, printable, signature};
use remote::url::SourceUrl;

/// The largest cluster in bytes; a header lies in the first cluster.
const FIRST_CLUSTER: usize = 2 << 20;
/// First bytes of every qcow2 image.
const MAGIC: &[u8] = b"QFI\xfb";
/// Size of a sector in bytes. QEMU rounds the size of a raw disk up to whole sectors.
const SECTOR: u64 = 512;

/// Returns the facts of the image at `path`, which may be in use.
///
/// # Errors
/// Those of open(2); [`ErrorKind::InvalidArgument`] for a file that is neither regular nor a block
/// device; an invalid qcow2 header, or one with an unknown feature.
pub fn of(path: &Path) -> Result<ImageInfo> {
    let file = FileStorage::open_unlocked(path, Access::ReadOnly)?;
    let first = first_bytes(&file)?;
    let format = format_of(path, &first)?;
    Ok(facts(&file, path, format, &first)?.0)
}

/// Returns the facts of the image and of all its backing files, top first.
///
/// # Errors
/// Those of [`of`] for each image. [`ErrorKind::InvalidArgument`] for a backing file whose format
/// the image above does not name, for one that is in the chain already, and for a chain of more
/// than [`MAX_LAYERS`] backing files.
pub fn chain_of(path: &Path) -> Result<Vec<ImageInfo>> {
    let file = FileStorage::open_unlocked(path, Access::ReadOnly)?;
    let first = first_bytes(&file)?;
    let format = format_of(path, &first)?;
    let mut taken = vec![file.identity()];
    let (info, mut next) = facts(&file, path, format, &first)?;
    let mut images = vec![info];
    let (mut path, mut owner, mut rights) = (path.to_owned(), file.owner(), None);
    while let Some(reference) = next {
        // A remote file is not asked; the image above says what there is to say.
        if SourceUrl::is_source(&reference.name) {
            break;
        }
        let invalid = |why: String| {
            Err(Error::new(ErrorKind::InvalidArgument, format!("{}: {why}", path.display())))
        };
        let name = printable(&reference.name);
        if let Some(format) = images
            .last()
            .and_then(|image| image.backing_filename_format.clone())
            .filter(|_| reference.format.is_none())
        {
            return invalid(format!(
                "its backing file \"{name}\" is of format {}, which is not known here",
                one_line(&format)
            ));
        }
        let Some(format) = reference.format else {
            return invalid(format!(
                "does not say of which format its backing file \"{name}\" is, and formats are not guessed; say it once with \
                 qemu-img rebase -u -b \"{name}\" -F FORMAT"
            ));
        };
        let Some(below) = full_name(&path, &reference.name) else {
            return invalid(format!(
                "backing file name \"{name}\": this protocol is not supported"
            ));
        };
        if images.len() > MAX_LAYERS {
            return invalid(format!("backing chain is longer than {MAX_LAYERS} layers"));
        }
        // The open is restricted because an image can name any file: for example, paths in /proc
        // stand for files that other processes have open.
        rights = Rights::below(rights, owner)?;
        let file =
            Rights::run_with(rights.as_ref(), || FileStorage::open_backing(CWD, &below, &below))
                .map_err(|error| {
                    explain(
                        error,
                        Namer::Above { path: &path, owner },
                        rights.as_ref(),
                        &below,
                        format,
                    )
                })?;
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

/// Returns the format of an image that is named on the command line.
fn format_of(path: &Path, first: &[u8]) -> Result<BackingFormat> {
    if first.starts_with(MAGIC) {
        return Ok(BackingFormat::Qcow2);
    }
    match signature(first) {
        Some((name, format)) => {
            let path = path.display();
            let text = format!(
                "{path}: a {name} image, which is not known here; qemu-img info -f {format} {path} tells what is in it"
            );
            Err(Error::new(ErrorKind::UnsupportedFeature, text))
        }
        None => Ok(BackingFormat::Raw),
    }
}

/// Reads as much of the beginning of the file as a header may take.
fn first_bytes(file: &FileStorage) -> Result<Vec<u8>> {
    let len = usize::try_from(file.size()).map_or(FIRST_CLUSTER, |size| size.min(FIRST_CLUSTER));
    let mut first = vec![0; len];
    file.read_at(0, &mut first).context(|| format!("{}: header", file.path().display()))?;
    Ok(first)
}

fn facts(
    file: &FileStorage,
    path: &Path,
    format: BackingFormat,
    first: &[u8],
) -> Result<(ImageInfo, Option<BackingReference>)> {
    let what = || path.display().to_string();
    let actual_size = file.allocated_size().context(what)?;
    let mut info = ImageInfo {
        filename: path.to_string_lossy().into_owned(),
        format: format.to_string(),
        virtual_size: file.size().next_multiple_of(SECTOR),
        actual_size: Some(actual_size),
        ..ImageInfo::default()
    };
    if format == BackingFormat::Raw {
        return Ok((info, None));
    }
    // The positions of the tables are not checked, and a short file is padded. So an image that is
    // being grown, or that was cut off, has facts all the same.
    let mut padded = first.to_vec();
    padded.resize(FIRST_CLUSTER, 0);
    let header =
        Header::parse_to_check(&padded).map_err(|error| Error::from(error).context(what()))?;
    info.virtual_size = header.geometry.size();
    info.cluster_size = Some(header.geometry.cluster_size());
    info.dirty_flag = header.incompatible & feature::DIRTY != 0;
    info.format_specific = Some(ImageInfoSpecific::Qcow2(header.facts()));
    if let Some(backing) = &header.backing {
        info.backing_filename = Some(backing.name.clone());
        info.full_backing_filename =
            full_name(path, &backing.name).map(|name| name.to_string_lossy().into_owned());
        info.backing_filename_format =
            backing.format.map(|format| format.to_string()).or(header.foreign_format.clone());
    }
    Ok((info, header.backing))
}

/// Returns the file that `name` means in the image at `path`; `None` if `name` is not a file name.
fn full_name(path: &Path, name: &str) -> Option<PathBuf> {
    let first_part = name.split('/').next().unwrap_or_default();
    (!first_part.contains(':')).then(|| path.parent().unwrap_or(Path::new("")).join(name))
}

/// Returns the facts as lines, in the words of `qemu-img info`.
pub fn sentences(image: &ImageInfo) -> String {
    let mut lines = vec![
        format!("image: {}", one_line(&image.filename)),
        format!("file format: {}", one_line(&image.format)),
        format!("virtual size: {} ({} bytes)", units::size(image.virtual_size), image.virtual_size),
    ];
    lines.extend(image.actual_size.map(|size| format!("disk size: {}", units::size(size))));
    lines.extend(image.cluster_size.map(|size| format!("cluster_size: {size}")));
    if image.dirty_flag {
        lines.push("cleanly shut down: no".into());
    }
    if let Some(name) = &image.backing_filename {
        let actual = image.full_backing_filename.as_ref().filter(|full| *full != name);
        let actual =
            actual.map_or(String::new(), |full| format!(" (actual path: {})", one_line(full)));
        lines.push(format!("backing file: {}{actual}", one_line(name)));
    }
    lines.extend(
        image
            .backing_filename_format
            .as_ref()
            .map(|format| format!("backing file format: {}", one_line(format))),
    );
    if let Some(ImageInfoSpecific::Qcow2(data)) = &image.format_specific {
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
            assert_eq!(
                full_name(Path::new(path), name),
                Some(PathBuf::from(full)),
                "{path} {name}"
            );
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
        assert_eq!(sentences(&info), want);
    }
}
