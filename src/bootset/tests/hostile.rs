//! Damaged and hostile disks: every search ends, within its limits, without a panic.

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use sim::random::Random;
use tempfile::tempdir;

use super::support::*;
use crate::{BlockSource, BootSet, BootSetLimits, boot_set};

/// Searches bytes, and checks that no thread has panicked, and that the limits hold.
fn search_bytes(bytes: Vec<u8>, paths: &[String]) -> BootSet {
    search_source(Arc::new(Memory(bytes)), paths)
}

fn search_source(source: Arc<dyn BlockSource>, paths: &[String]) -> BootSet {
    let size = source.size();
    let limits = BootSetLimits {
        most_bytes_found: 64 << 20,
        most_bytes_read: 64 << 20,
        most_ranges: 5000,
        most_files: 5000,
        ..BootSetLimits::default()
    };
    let set = boot_set(source, paths, &limits).unwrap();
    check(&set, size);
    assert!(set.ranges.len() <= limits.most_ranges && set.bytes() <= limits.most_bytes_found);
    let fault = set.notes.iter().find(|note| note.contains("has a fault"));
    assert!(fault.is_none(), "{fault:?}");
    set
}

/// A small file system with what the built-in list looks for, and directories, links and maps of
/// each kind.
fn small(options: &[&str]) -> Option<Vec<u8>> {
    if !have(&["mkfs.ext4"]) {
        return None;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    super::order::guest(&root);
    fs::write(root.join("large"), content("large", 300_000)).unwrap();
    for index in 0..100 {
        put(&root, &format!("/many/name-number-{index}"), b"x");
    }
    let image = scratch.path().join("image");
    mkfs(&image, &root, 8, options);
    Some(fs::read(image).unwrap())
}

/// Offsets of bytes that are not zero and that the walk reads: its metadata.
fn metadata(bytes: &[u8]) -> Vec<usize> {
    let set = search_bytes(bytes.to_vec(), &[]);
    let places = set.ranges.iter().flat_map(|range| range.clone()).map(|at| at as usize);
    places.filter(|&at| bytes[at] != 0).collect()
}

const KINDS: &[&[&str]] = &[
    &["-b", "1024", "-O", "^has_journal,^metadata_csum,inline_data"],
    &["-b", "1024", "-O", "^has_journal,^extents,^64bit,^metadata_csum"],
    &["-b", "4096", "-O", "64bit,metadata_csum"],
];

/// Each byte of the superblock and of the first descriptors, changed to several values.
#[test]
fn every_byte_of_the_superblock_changed() {
    for options in KINDS {
        let Some(image) = small(options) else { return };
        let image = Arc::new(image);
        for at in (1024..2048).chain(4096..4096 + 64) {
            for value in [image[at] ^ 0xff, image[at] ^ 0x01] {
                let bytes = Arc::clone(&image);
                let source = Patched { bytes, changed: vec![(at, value)] };
                search_source(Arc::new(source), &["/etc".to_owned()]);
            }
        }
    }
}

/// Bytes of what the search reads, at random: one, a few, or a whole run of them.
#[test]
fn random_damage_of_the_metadata() {
    let mut random = Random::of_test(15);
    let rounds = if cfg!(debug_assertions) { 200 } else { 4000 };
    for options in KINDS {
        let Some(image) = small(options) else { return };
        let places = metadata(&image);
        let image = Arc::new(image);
        for _ in 0..rounds {
            let mut changed = Vec::new();
            for _ in 0..=random.below(8) {
                let at = places[random.below(places.len() as u64) as usize];
                for at in at..at + 1 + random.below(16) as usize {
                    changed.push((at, random.below(256) as u8));
                }
            }
            let source = Patched { bytes: Arc::clone(&image), changed };
            search_source(Arc::new(source), &[]);
        }
    }
}

/// Disks that end too early, at every 512 bytes of their beginning and at random.
#[test]
fn truncated_disks() {
    let mut random = Random::of_test(16);
    for options in KINDS {
        let Some(image) = small(options) else { return };
        let ends = (0..=64).map(|sector| sector * 512);
        for end in ends.chain((0..100).map(|_| random.below(image.len() as u64) as usize)) {
            search_bytes(image[..end].to_vec(), &[]);
        }
    }
}

/// Arbitrary bytes, with and without the magics that lead further.
#[test]
fn arbitrary_bytes() {
    let mut random = Random::of_test(17);
    for round in 0..300 {
        let len = random.below(256 << 10) as usize;
        let mut bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
        let mut set = |at: usize, magic: &[u8]| {
            if let Some(part) = bytes.get_mut(at..at + magic.len()) {
                part.copy_from_slice(magic);
            }
        };
        if round % 2 == 0 {
            set(510, &[0x55, 0xaa]);
            set(446, &[0]);
        }
        match round % 5 {
            0 => set(0x438, &[0x53, 0xef]),
            1 => set(450, &[0x05]),
            2 => {
                set(450, &[0xee]);
                set(512, b"EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00");
            }
            3 => {
                set(0x438, &[0x53, 0xef]);
                set(0x418, &[2, 0, 0, 0]);
                set(0x460, &[0x42, 0, 0, 0]);
            }
            _ => {}
        }
        search_bytes(bytes, &["/etc/*".to_owned()]);
    }
}

/// A GPT with a correct checksum that names four billion entries: nothing is allocated for them.
#[test]
fn a_gpt_of_four_billion_entries() {
    let mut header = gptman::GPTHeader {
        signature: *b"EFI PART",
        revision: [0, 0, 1, 0],
        header_size: 92,
        crc32_checksum: 0,
        reserved: [0; 4],
        primary_lba: 1,
        backup_lba: u64::MAX,
        first_usable_lba: 34,
        last_usable_lba: u64::MAX,
        disk_guid: [1; 16],
        partition_entry_lba: 2,
        number_of_partition_entries: u32::MAX,
        size_of_partition_entry: 128,
        partition_entry_array_crc32: 0,
    };
    for (lba, count, size) in
        [(2, u32::MAX, 128), (u64::MAX, 128, 128), (2, 128, u32::MAX), (2, 128, 0)]
    {
        header.partition_entry_lba = lba;
        header.number_of_partition_entries = count;
        header.size_of_partition_entry = size;
        header.update_crc32_checksum();
        let mut disk = io::Cursor::new(vec![0; 1 << 20]);
        gptman::GPT::write_protective_mbr_into(&mut disk, 512).unwrap();
        let mut bytes = disk.into_inner();
        let mut encoded = Vec::new();
        encoded.extend(header.signature);
        encoded.extend(header.revision);
        encoded.extend(header.header_size.to_le_bytes());
        encoded.extend(header.crc32_checksum.to_le_bytes());
        encoded.extend(header.reserved);
        for field in
            [header.primary_lba, header.backup_lba, header.first_usable_lba, header.last_usable_lba]
        {
            encoded.extend(field.to_le_bytes());
        }
        encoded.extend(header.disk_guid);
        encoded.extend(header.partition_entry_lba.to_le_bytes());
        for field in [count, size, header.partition_entry_array_crc32] {
            encoded.extend(field.to_le_bytes());
        }
        bytes[512..512 + encoded.len()].copy_from_slice(&encoded);
        let set = search_bytes(bytes, &[]);
        assert!(set.notes.iter().any(|note| note.contains("no GPT that can be read")), "{set:?}");
    }
}

/// Directories in a circle, and a link to itself: the tree is entered once.
#[test]
fn circles_end() {
    let Some(mut image) = small(KINDS[1]) else { return };
    // Every entry of a directory that names inode 12 or above names the root instead.
    let set = search_bytes(image.clone(), &["/etc".to_owned()]);
    for range in &set.ranges {
        for at in (range.start as usize..range.end as usize - 7).step_by(4) {
            let inode = u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
            let name_len = image[at + 6];
            if (12..400).contains(&inode) && (1..64).contains(&name_len) && image[at + 7] == 2 {
                image[at..at + 4].copy_from_slice(&2_u32.to_le_bytes());
            }
        }
    }
    search_bytes(image.clone(), &["/".to_owned(), "/etc/etc/etc".to_owned()]);
    search_bytes(image, &[]);
}

/// A source that fails: what was found before stays.
#[test]
fn errors_of_the_source_are_notes() {
    #[derive(Debug)]
    struct Failing(Memory, std::sync::atomic::AtomicU64);
    impl BlockSource for Failing {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            let left = &self.1;
            if left
                .fetch_update(
                    std::sync::atomic::Ordering::SeqCst,
                    std::sync::atomic::Ordering::SeqCst,
                    |left| left.checked_sub(1),
                )
                .is_err()
            {
                return Err(io::Error::other("the cable is out"));
            }
            self.0.read(offset, buf)
        }
    }
    let Some(image) = small(KINDS[2]) else { return };
    let mut before = 0;
    for reads in 0..40 {
        let source = Failing(Memory(image.clone()), reads.into());
        let set = boot_set(Arc::new(source), &[], &BootSetLimits::default()).unwrap();
        check(&set, image.len() as u64);
        assert!(set.bytes() >= before, "{} bytes after {reads} reads", set.bytes());
        before = set.bytes();
        if set.is_complete {
            assert!(reads > 3);
            return;
        }
        assert!(set.notes.iter().any(|note| note.contains("the cable is out")), "{:?}", set.notes);
    }
    panic!("40 reads of 64 KiB were not enough for a disk of 8 MiB");
}

/// A source that panics stands for a fault of the search: a note, and an answer.
#[test]
fn a_panic_is_a_note() {
    #[derive(Debug)]
    struct Panicking;
    impl BlockSource for Panicking {
        fn size(&self) -> u64 {
            1 << 30
        }
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            panic!("on purpose")
        }
    }
    let set = boot_set(Arc::new(Panicking), &[], &BootSetLimits::default()).unwrap();
    assert!(!set.is_complete);
    assert!(set.notes.iter().any(|note| note.contains("has a fault: on purpose")), "{set:?}");
}

/// A deadline in the past, and one that a slow source passes.
#[test]
fn a_search_ends_at_its_deadline() {
    let Some(image) = small(KINDS[0]) else { return };
    let limits = BootSetLimits { until: Some(Instant::now()), ..BootSetLimits::default() };
    let set = boot_set(Arc::new(Memory(image.clone())), &[], &limits).unwrap();
    assert!(!set.is_complete && set.notes.iter().any(|note| note.contains("the time")), "{set:?}");

    #[derive(Debug)]
    struct Slow(Memory);
    impl BlockSource for Slow {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            std::thread::sleep(Duration::from_millis(30));
            self.0.read(offset, buf)
        }
    }
    let until = Some(Instant::now() + Duration::from_millis(100));
    let limits = BootSetLimits { until, ..BootSetLimits::default() };
    let set = boot_set(Arc::new(Slow(Memory(image))), &[], &limits).unwrap();
    assert!(!set.is_complete && set.notes.iter().any(|note| note.contains("the time")), "{set:?}");
    assert!(set.bytes() > 0);
}

/// The inputs from which the fuzzer starts: they lead to the walk, and random changes of them end.
#[test]
fn inputs_of_the_fuzzer() {
    let mut random = Random::of_test(18);
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/corpus/boot_set");
    let mut count = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        crate::fuzz_disk(&bytes);
        let set = search_bytes(crate::fuzzing::disk_of(&bytes), &[]);
        let is_table = path.ends_with("gpt") || path.ends_with("logical");
        let expected = if is_table { "partitions: " } else { "kernel /boot/v, by the boot loader" };
        assert!(set.notes.iter().any(|note| note.contains(expected)), "{path:?}: {set:?}");
        count += 1;
        for _ in 0..100 {
            let mut damaged = bytes.clone();
            for _ in 0..=random.below(6) {
                let at = random.below(damaged.len() as u64) as usize;
                damaged[at] = random.below(256) as u8;
            }
            crate::fuzz_disk(&damaged);
        }
    }
    assert!(count >= 5, "{count} inputs");
}
