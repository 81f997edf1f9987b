//! The list of extents against `qemu-img map`, on random chains: the lists are equal, member by
//! member.
//!
//! `CORDISK_MAP_ROUNDS=N` makes N chains (default 40).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use engine::chain::Gate;
use engine::disk::{Disk, DiskOptions};
use engine::map::{MapEntry, Page, all, extents, join};
use serde_json::{Value, json};

use crate::support::{CLUSTER, KIB, MIB, Rig, Rng, Scratch, run_ok, run_within};

fn open(path: &Path) -> Disk {
    let options = DiskOptions {
        read_only: true,
        copy_on_read: false,
        gate: Gate::default(),
        full_check: false,
        reserve: None,
    };
    Disk::open(path, &options).expect("open")
}

/// The output of `qemu-img map` for an image.
struct OfQemu {
    extents: Vec<MapEntry>,
    /// Whether it reports which clusters are compressed: QEMU 8.2 and later. Debian 12 has 7.2.
    tells_compressed: bool,
}

impl OfQemu {
    fn of(path: &Path, options: &[&str]) -> OfQemu {
        let list = run_ok(
            Command::new("qemu-img")
                .args(["map", "-f", "qcow2", "--output=json"])
                .args(options)
                .arg(path),
        );
        let mut list: Vec<Value> = serde_json::from_str(&list).expect("qemu-img map prints a list");
        let tells_compressed = list.iter().all(|extent| extent.get("compressed").is_some());
        if !tells_compressed {
            eprintln!(
                "not compared: what is compressed, which this qemu-img does not tell (QEMU 8.2 does)"
            );
            list.iter_mut().for_each(|extent| extent["compressed"] = json!(false));
        }
        OfQemu {
            extents: serde_json::from_value(Value::Array(list)).expect("extents"),
            tells_compressed,
        }
    }

    /// Returns `ours` without what this QEMU does not report.
    fn comparable(&self, ours: &[MapEntry]) -> Vec<MapEntry> {
        ours.iter()
            .map(|&extent| MapEntry {
                compressed: extent.compressed && self.tells_compressed,
                ..extent
            })
            .collect()
    }
}

/// Makes a raw file with holes; in one of three cases its length is arbitrary.
fn raw_base(path: &Path, random: &mut Rng) {
    let size = 1 + random.below(3 * MIB);
    let size = if random.below(3) == 0 { size } else { size.next_multiple_of(512) };
    let file = File::create(path).expect("base");
    file.set_len(size).expect("length");
    for _ in 0..random.below(12) {
        let range = random.range(size, 200 * KIB);
        let bytes = vec![7; usize::try_from(range.end - range.start).expect("small")];
        file.write_all_at(&bytes, range.start).expect("data");
    }
    settle(path);
}

/// Makes the host's answers about a file stable between two queries: the number of its blocks, and
/// which unwritten blocks count as data, which they do while they are in memory.
fn settle(path: &Path) {
    File::open(path).and_then(|file| file.sync_all()).expect("fsync");
    std::fs::read(path).expect("read");
}

/// Makes a qcow2 image of any supported kind, with random changes by qemu-io.
fn image(path: &Path, below: Option<&(PathBuf, &str)>, preallocation: &str, random: &mut Rng) {
    let version_2 = random.below(4) == 0;
    let cluster = 512 << random.below(9);
    let mut options =
        format!("cluster_size={cluster},compat={}", if version_2 { "0.10" } else { "1.1" });
    if !version_2 && cluster >= 16 << 10 && random.below(2) == 0 {
        options += ",extended_l2=on";
    }
    if below.is_none() {
        options += &format!(",preallocation={preallocation}");
    }
    let size = 512 * (1 + random.below(6000));
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", &options]);
    if let Some((below, format)) = below {
        create.args([OsStr::new("-b"), below.as_os_str(), OsStr::new("-F"), OsStr::new(format)]);
    }
    run_ok(create.arg(path).arg(size.to_string()));
    let mut commands = Vec::new();
    for _ in 0..random.below(16) {
        let at = 512 * random.below(size / 512);
        let len = (512 * (1 + random.below(400))).min(size - at);
        let pattern = 1 + random.below(250);
        let whole = at - at % cluster;
        match random.below(6) {
            0 if !version_2 => commands.push(format!("write -q -z {at} {len}")),
            1 if !version_2 => commands.push(format!("write -q -z -u {at} {len}")),
            2 if whole + cluster <= size => {
                let clusters = (len / cluster).clamp(1, 6).min((size - whole) / cluster);
                commands.extend((0..clusters).map(|number| {
                    format!("write -q -c -P {pattern} {} {cluster}", whole + number * cluster)
                }));
            }
            3 => commands.push(format!("discard -q {at} {len}")),
            _ => commands.push(format!("write -q -P {pattern} {at} {len}")),
        }
    }
    // Some commands fail: an allocated cluster cannot be written compressed.
    let mut io = Command::new("qemu-io");
    io.args(["-f", "qcow2", "-t", "unsafe"]);
    for command in &commands {
        io.args(["-c", command]);
    }
    run_within(io.arg(path), Duration::from_secs(60));
    settle(path);
}

/// Protects: the list equals that of `qemu-img map`, extent by extent, for raw and qcow2 bases,
/// short and long ones, holes, compressed and zero clusters, both versions, all cluster sizes,
/// preallocated images; and its pages together make the whole list.
#[test]
fn the_list_is_the_one_of_qemu_img() {
    requires!("qemu-img", "qemu-io");
    let mut random = Rng::for_test("map_differential");
    let rounds = std::env::var("CORDISK_MAP_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(40);
    let mut kinds = BTreeSet::new();
    for round in 0..rounds {
        let scratch = Scratch::new();
        let mut below: Option<(PathBuf, &str)> = None;
        // The lowest image is above a raw file, or has no base, or is preallocated with most of its
        // clusters as holes of the file.
        let preallocation = ["off", "off", "off", "metadata", "falloc"][round % 5];
        if preallocation == "off" && random.below(3) > 0 {
            let path = scratch.join("base.raw");
            raw_base(&path, &mut random);
            below = Some((path, "raw"));
        }
        for layer in 0..=random.below(3) {
            let path = scratch.join(format!("{layer}.qcow2"));
            image(&path, below.as_ref(), preallocation, &mut random);
            below = Some((path, "qcow2"));
        }
        let (top, _) = below.expect("at least one image");
        let (qemus, disk) = (OfQemu::of(&top, &[]), open(&top));
        let ours = all(&disk).expect("map");
        let (found, expected) = (qemus.comparable(&ours), &qemus.extents);
        let different = found
            .iter()
            .zip(expected)
            .position(|(ours, qemus)| ours != qemus)
            .unwrap_or(found.len().min(expected.len()));
        assert!(
            found == *expected,
            "round {round}: ours: {:?}\nqemu-img's: {:?}\n{}",
            &found[different..],
            &expected[different..],
            run_ok(Command::new("qemu-img").args(["info", "--backing-chain"]).arg(&top))
        );
        for extent in &ours {
            kinds.insert((
                extent.present,
                extent.zero,
                extent.data,
                extent.compressed,
                extent.offset.is_some(),
                extent.depth.min(1),
            ));
        }
        in_pages(&disk, &qemus, &mut random);
    }
    let has_holes = kinds.iter().any(|&(_, zero, data, ..)| zero && data);
    assert!(kinds.len() >= 9 && has_holes, "too few kinds of extents to mean anything: {kinds:?}");
}

/// Checks pages of any length, from any start.
fn in_pages(disk: &Disk, qemus: &OfQemu, random: &mut Rng) {
    let expected = &qemus.extents[..];
    let limit = usize::try_from(1 + random.below(5)).expect("small");
    let (mut at, mut pages) = (Some(0), Vec::new());
    while let Some(from) = at {
        let page = extents(disk, from, limit).expect("map");
        assert!(
            page.extents.len() <= limit && page.next.is_none_or(|next| next > from),
            "{page:?}"
        );
        pages.extend(page.extents);
        at = page.next;
    }
    assert_eq!(qemus.comparable(&pages), expected, "in pages of {limit}");
    let middle = random.below(disk.size());
    let Page { extents, next } = extents(disk, middle, usize::MAX).expect("map");
    assert_eq!((extents[0].start, next), (middle, None));
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), disk.size() - middle);
    assert_eq!(qemus.comparable(&extents[1..]), expected[expected.len() + 1 - extents.len()..]);
}

/// Protects: the pages that a client of a mounted disk receives equal the output of `qemu-img map`
/// after a flush. The cells, which are counted from the tables of the overlay alone, agree with the
/// list.
#[test]
fn a_mounted_disk_is_told_as_qemu_img_tells_it() {
    requires!("/dev/fuse", "qemu-img");
    let mut random = Rng::for_test("map_of_a_mount");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().qmp().start();
    let file = disk.open();
    for _ in 0..12 {
        let range = random.range(8 * MIB, 3 * CLUSTER);
        let (at, len) = (range.start, range.end - range.start);
        match random.below(4) {
            0 => file
                .write_all_at(&vec![9; usize::try_from(len).expect("small")], at)
                .expect("write"),
            1 => {
                let punch =
                    rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, punch, at, len).expect("punch");
            }
            2 => rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::ZERO_RANGE, at, len)
                .expect("zero"),
            // Twice: a read returns before its copy is stored, but the next request for the same
            // clusters waits for it.
            _ => (0..2).for_each(|_| {
                drop(crate::support::read_at(&file, at, usize::try_from(len).expect("small")))
            }),
        }
    }
    file.sync_all().expect("fsync");
    settle(&rig.overlay);
    let qemus = OfQemu::of(&rig.overlay, &["-U"]);
    let mut client = disk.client();
    let (mut found, mut next) = (Vec::new(), json!(0));
    while !next.is_null() {
        let mut page = client.ok("x-query-map", json!({"offset": next, "limit": 3}));
        let extents: Vec<MapEntry> =
            serde_json::from_value(page["extents"].take()).expect("extents");
        assert!((1..=3).contains(&extents.len()), "{extents:?}");
        extents.into_iter().for_each(|extent| join(&mut found, extent));
        next = page["next"].take();
    }
    assert_eq!(qemus.comparable(&found), qemus.extents);

    let cells = client.ok("x-query-cells", json!({"cells": 128}));
    assert_eq!(cells["cell-size"], json!(CLUSTER));
    for (cell, (local, zero)) in cells["local"]
        .as_array()
        .expect("list")
        .iter()
        .zip(cells["zero"].as_array().expect("list"))
        .enumerate()
    {
        let at = cell as u64 * CLUSTER;
        let extent = found
            .iter()
            .find(|extent| extent.start <= at && at < extent.start + extent.length)
            .expect("all is told");
        let (is_local, is_zero) =
            (extent.depth == 0 && extent.data, extent.depth == 0 && extent.zero && !extent.data);
        let bytes = |is: bool| json!(if is { CLUSTER } else { 0 });
        assert_eq!((local, zero), (&bytes(is_local), &bytes(is_zero)), "cell {cell} of {extent:?}");
    }
    drop((file, client));
    disk.umount();
}
