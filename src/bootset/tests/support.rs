//! Images for tests, and what other programs say of them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{BlockSource, BootSet, BootSetLimits, boot_set};

/// Whether the programs are here. Says which one is not, and panics if the gate requires all.
pub(super) fn have(programs: &[&str]) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    for program in programs {
        if !path.split(':').any(|directory| Path::new(directory).join(program).exists()) {
            let is_required =
                |name| std::env::var(name).is_ok_and(|value| value == "1" || value == "true");
            assert!(
                !(is_required("CI") || is_required("CORDISK_REQUIRE_ALL")),
                "this test needs {program}"
            );
            eprintln!("skipped: {program} is not installed");
            return false;
        }
    }
    true
}

/// Runs a program, and returns its output.
pub(super) fn run(command: &mut Command) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = command.env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Bytes that are different for each name, of a size that no block divides.
pub(super) fn content(name: &str, len: usize) -> Vec<u8> {
    let seed = name.bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8 | 1
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Writes a file below `root`, with its directories.
pub(super) fn put(root: &Path, path: &str, bytes: &[u8]) {
    let path = root.join(path.trim_start_matches('/'));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Makes a symbolic link below `root`.
pub(super) fn link(root: &Path, path: &str, target: &str) {
    let path = root.join(path.trim_start_matches('/'));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(target, path).unwrap();
}

/// Makes a file system of `mebibytes` MiB from a directory.
pub(super) fn mkfs(image: &Path, root: &Path, mebibytes: u64, options: &[&str]) {
    run(Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-E", "root_owner=0:0", "-d"])
        .arg(root)
        .args(options)
        .arg(image)
        .arg(format!("{mebibytes}M")));
}

/// What debugfs prints for a request.
pub(super) fn debugfs(image: &Path, request: &str) -> String {
    run(Command::new("debugfs").args(["-R", request]).arg(image))
}

/// The bytes of an image of a file system that debugfs says a file has, without its metadata.
pub(super) fn data_of(image: &Path, path: &str, block_size: u64) -> BTreeSet<u64> {
    // `blocks` lists blocks of the map as well; `stat` says which are which.
    let stat = debugfs(image, &format!("stat {path}"));
    let list = stat.split_once("EXTENTS:").or_else(|| stat.split_once("BLOCKS:"));
    let Some((_, list)) = list else { return BTreeSet::new() };
    let list = list.split("TOTAL").next().unwrap();
    let mut blocks = BTreeSet::new();
    for part in list.split([',', '\n']).map(str::trim).filter(|part| !part.is_empty()) {
        // (ETB0):33, (0-11):100-111, (IND):5
        let (name, place) = part.split_once(':').unwrap();
        if name.contains("ETB") || name.contains("IND") {
            continue;
        }
        let (first, last) = place.split_once('-').unwrap_or((place, place));
        blocks.extend(first.parse::<u64>().unwrap()..=last.parse().unwrap());
    }
    blocks.into_iter().map(|block| block * block_size).collect()
}

/// The offsets of all blocks that touch one of the ranges.
pub(super) fn blocks_of(ranges: &[Range<u64>], block_size: u64) -> BTreeSet<u64> {
    let mut blocks = BTreeSet::new();
    for range in ranges {
        blocks.extend(
            (range.start / block_size..range.end.div_ceil(block_size)).map(|b| b * block_size),
        );
    }
    blocks
}

/// A file as a disk, which counts what is read.
#[derive(Debug)]
pub(super) struct FileSource {
    file: File,
    size: u64,
    pub(super) bytes_read: AtomicU64,
}

impl FileSource {
    pub(super) fn open(path: &Path) -> Arc<FileSource> {
        let file = File::open(path).unwrap();
        let size = file.metadata().unwrap().len();
        Arc::new(FileSource { file, size, bytes_read: AtomicU64::new(0) })
    }
}

impl BlockSource for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.bytes_read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.file.read_exact_at(buf, offset)
    }
}

/// Bytes in memory as a disk.
#[derive(Debug)]
pub(super) struct Memory(pub(super) Vec<u8>);

impl BlockSource for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0[start..start + buf.len()]);
        Ok(())
    }
}

/// Bytes in memory, some of which are changed.
#[derive(Debug)]
pub(super) struct Patched {
    pub(super) bytes: Arc<Vec<u8>>,
    pub(super) changed: Vec<(usize, u8)>,
}

impl BlockSource for Patched {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        for (at, value) in &self.changed {
            if let Some(byte) = at.checked_sub(start).and_then(|at| buf.get_mut(at)) {
                *byte = *value;
            }
        }
        Ok(())
    }
}

/// Searches an image with the default limits, and checks what holds of every answer.
pub(super) fn search(image: &Path, paths: &[&str]) -> BootSet {
    let paths: Vec<String> = paths.iter().map(|&path| path.to_owned()).collect();
    let source = FileSource::open(image);
    let set = boot_set(source.clone(), &paths, &BootSetLimits::default()).unwrap();
    check(&set, source.size);
    set
}

/// Ranges do not overlap, are not empty, lie within the disk, and neighbours are joined.
pub(super) fn check(set: &BootSet, size: u64) {
    let mut sorted = set.ranges.clone();
    sorted.sort_by_key(|range| range.start);
    for pair in sorted.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{pair:?} overlap");
    }
    assert!(sorted.iter().all(|range| range.start < range.end && range.end <= size), "{sorted:?}");
    for pair in set.ranges.windows(2) {
        assert_ne!(pair[0].end, pair[1].start, "neighbours are not joined");
    }
    assert!(set.notes.iter().all(|note| !note.contains(char::is_control)), "{:?}", set.notes);
}

/// A copy of an image that has the bytes of `ranges`, and zeros elsewhere.
pub(super) fn sparse_copy(image: &Path, ranges: &[Range<u64>], copy: &Path) -> PathBuf {
    let from = File::open(image).unwrap();
    let to = File::create(copy).unwrap();
    to.set_len(from.metadata().unwrap().len()).unwrap();
    for range in ranges {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        from.read_exact_at(&mut bytes, range.start).unwrap();
        to.write_all_at(&bytes, range.start).unwrap();
    }
    copy.to_owned()
}
