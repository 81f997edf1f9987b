//! A hostile image gives an error, never a panic, a hang or a huge allocation (V1 to V27).
//!
//! Images that QEMU made are damaged in critical places (header, tables, refcounts, compressed
//! data), opened, and used through the disk. If the disk accepts an image, it must work without a
//! panic, and the size of the file must stay bounded.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use engine::chain::Gate;
use engine::disk::{Disk, DiskOptions};

use crate::support::Rng;

const SIZE: u64 = 4 << 20;
/// Maximum size of an image of 4 MiB after any requests, in bytes.
const LARGEST: u64 = 64 << 20;

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().expect("qemu-img is needed");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Makes one image of each kind, with data.
fn templates(dir: &Path) -> Vec<PathBuf> {
    let raw = dir.join("in.raw");
    let bytes: Vec<u8> = (0..SIZE)
        .map(|index| if index / 50_000 % 3 == 0 { 0 } else { (index / 100) as u8 })
        .collect();
    std::fs::write(&raw, bytes).unwrap();
    let kinds: [(&[&str], &str); 9] = [
        (&[], ""),
        (&[], "cluster_size=512"),
        (&[], "cluster_size=4k,refcount_bits=1"),
        (&[], "compat=0.10,cluster_size=4k"),
        (&["-c"], "cluster_size=4k"),
        (&["-c"], "compression_type=zstd"),
        (&[], "cluster_size=512,refcount_bits=64"),
        (&[], "cluster_size=16k,extended_l2=on"),
        (&["-c"], "cluster_size=16k,extended_l2=on"),
    ];
    let mut images = Vec::new();
    for (index, (flags, options)) in kinds.iter().enumerate() {
        let image = dir.join(format!("{index}.qcow2"));
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(*flags);
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
        qemu_img(&args);
        images.push(image);
    }
    let backed = dir.join("backed.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        raw.to_str().unwrap(),
        "-F",
        "raw",
        backed.to_str().unwrap(),
    ]);
    images.push(backed);
    images
}

fn be(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Returns a number that may break arithmetic, or one that points into the file.
fn interesting(random: &mut Rng, file: u64) -> u64 {
    match random.below(10) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << random.below(64),
        3 => (1 << random.below(64)) - 1,
        4 => i64::MAX as u64,
        5 => file,
        6 => file.next_multiple_of(65536) - random.below(3) * 512,
        7 => random.below(file) & !511,
        8 => (random.below(file) & !511) | 1 << 63,
        _ => random.next(),
    }
}

/// Damages a few places: fields of the header, entries of the tables that it names, or arbitrary
/// bytes.
fn damage(bytes: &mut [u8], random: &mut Rng) {
    let file = bytes.len() as u64;
    for _ in 0..1 + random.below(3) {
        let (l1, refcounts) = (be(bytes, 40, 8), be(bytes, 48, 8));
        let first_of = |table: u64, bytes: &[u8]| {
            let at = (table as usize).min(bytes.len().saturating_sub(8));
            be(bytes, at, 8) & 0x00ff_ffff_ffff_fe00
        };
        let near = match random.below(6) {
            0 | 1 => random.below(112),
            2 => l1.saturating_add(random.below(64) * 8),
            3 => refcounts.saturating_add(random.below(8) * 8),
            4 => first_of(l1, bytes).saturating_add(random.below(64) * 8),
            _ => first_of(refcounts, bytes).saturating_add(random.below(64)),
        };
        let at = if near.checked_add(8).is_some_and(|end| end <= file) {
            near as usize
        } else {
            random.below(file - 8) as usize
        };
        let len = [1, 4, 8][random.below(3) as usize];
        let value = interesting(random, file).to_be_bytes();
        bytes[at..at + len].copy_from_slice(&value[8 - len..]);
    }
}

/// Uses a disk that could be opened; its requests may return errors.
fn exercise(disk: &Disk, random: &mut Rng) {
    let size = disk.size();
    if size == 0 {
        return;
    }
    let mut buf = vec![0; 100_000];
    for _ in 0..12 {
        let offset = random.below(size.min(SIZE));
        let len = (1 + random.below(buf.len() as u64)).min(size - offset);
        let piece = &mut buf[..len as usize];
        let _ = match random.below(7) {
            0 | 1 => disk.read(offset, piece),
            2 | 3 => disk.write(offset, piece),
            4 => disk.discard(offset..offset + len),
            5 => disk.populate(offset..offset + len, usize::MAX).map(|_| ()),
            _ => disk.flush(),
        };
    }
    let _ = disk.close();
}

#[test]
fn damaged_images_never_panic_or_explode() {
    requires!("qemu-img");
    let seed: u64 =
        std::env::var("CORDISK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5eed);
    let rounds: u64 = std::env::var("CORDISK_HOSTILE_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(150);
    println!("CORDISK_SEED={seed} CORDISK_HOSTILE_ROUNDS={rounds}");
    let dir = tempfile::tempdir().unwrap();
    let templates = templates(dir.path());
    let victim = dir.path().join("victim.qcow2");
    let (mut opened, mut refused) = (0, 0);
    for (index, template) in templates.iter().enumerate() {
        let healthy = std::fs::read(template).unwrap();
        for round in 0..rounds {
            let mut random = Rng::new(seed ^ (index as u64) << 32 ^ round);
            let mut bytes = healthy.clone();
            damage(&mut bytes, &mut random);
            if random.below(8) == 0 {
                bytes.truncate(random.below(bytes.len() as u64) as usize);
            }
            std::fs::write(&victim, &bytes).unwrap();
            let begun = Instant::now();
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let read_only = random.below(4) == 0;
                let options = DiskOptions {
                    read_only,
                    copy_on_read: true,
                    gate: Gate::default(),
                    full_check: false,
                    reserve: None,
                };
                match Disk::open(&victim, &options) {
                    Ok(disk) => {
                        exercise(&disk, &mut random);
                        true
                    }
                    Err(error) => {
                        assert!(!error.to_string().contains('\n'), "one line: {error}");
                        false
                    }
                }
            }));
            let place = format!("template {index}, round {round}, seed {seed}");
            match result {
                Ok(true) => opened += 1,
                Ok(false) => refused += 1,
                Err(_) => panic!("panic at {place}"),
            }
            assert!(begun.elapsed().as_secs() < 60, "hang at {place}");
            let after = std::fs::metadata(&victim).unwrap().len();
            assert!(
                after <= LARGEST.max(bytes.len() as u64),
                "the file grew to {after} bytes at {place}"
            );
        }
    }
    println!("{opened} opened, {refused} refused");
    assert!(
        opened > 100 && refused > 100,
        "{opened} opened, {refused} refused: the damage is too weak or too strong"
    );
}
