//! Each limit ends the search, and the answer keeps to it.

use std::sync::Arc;

use tempfile::tempdir;

use super::support::*;
use crate::{BootSet, BootSetLimits, boot_set};

fn limited(limits: &BootSetLimits) -> Option<(BootSet, u64)> {
    if !have(&["mkfs.ext4"]) {
        return None;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    for index in 0..200 {
        put(&root, &format!("/data/{}/file-{index}", index % 7), &content("x", 50_000));
    }
    put(&root, "/deep/1/2/3/4/5/file", b"deep");
    let image = scratch.path().join("image");
    mkfs(&image, &root, 64, &["-b", "4096"]);
    let source = FileSource::open(&image);
    let set = boot_set(source.clone(), &["/data".to_owned(), "/deep".to_owned()], limits).unwrap();
    check(&set, 64 << 20);
    let read = source.bytes_read.load(std::sync::atomic::Ordering::Relaxed);
    Some((set, read))
}

#[test]
fn each_limit_is_named_and_kept() {
    let limits = BootSetLimits::default;
    let Some((all, _)) = limited(&limits()) else { return };
    assert!(all.is_complete && all.bytes() > 10_000_000, "{:?}", all.notes);

    let (set, _) = limited(&BootSetLimits { most_ranges: 5, ..limits() }).unwrap();
    assert!(!set.is_complete && set.ranges.len() == 5);
    assert!(set.notes.iter().any(|note| note.contains("the number of ranges")), "{set:?}");

    let (set, _) = limited(&BootSetLimits { most_bytes_found: 1_000_000, ..limits() }).unwrap();
    assert!(!set.is_complete && set.bytes() == 1_000_000, "{}", set.bytes());
    assert_eq!(set.ranges.first(), all.ranges.first());
    assert!(set.notes.iter().any(|note| note.contains("bytes found")), "{set:?}");

    let (set, read) = limited(&BootSetLimits { most_bytes_read: 300_000, ..limits() }).unwrap();
    assert!(!set.is_complete && read <= 300_000, "{read} bytes read");
    assert!(set.notes.iter().any(|note| note.contains("bytes read from the disk")), "{set:?}");

    let (set, _) = limited(&BootSetLimits { most_files: 20, ..limits() }).unwrap();
    assert!(!set.is_complete && set.bytes() < all.bytes() / 2);
    assert!(set.notes.iter().any(|note| note.contains("the number of files")), "{set:?}");

    let (set, _) = limited(&BootSetLimits { most_bytes_of_a_file: 4096, ..limits() }).unwrap();
    assert!(!set.is_complete && set.bytes() < all.bytes() / 5, "{} bytes", set.bytes());

    let (set, _) = limited(&BootSetLimits { deepest_directory: 3, ..limits() }).unwrap();
    assert!(!set.is_complete, "{set:?}");
    assert!(set.notes.iter().any(|note| note.contains("deeper is left out")), "{set:?}");
}

#[test]
fn paths_are_absolute() {
    let error =
        boot_set(Arc::new(Memory(Vec::new())), &["etc".to_owned()], &BootSetLimits::default());
    assert!(error.unwrap_err().to_string().contains("beginning with /"));
}
