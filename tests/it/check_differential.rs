//! `cordisk check` against `qemu-img check`, on images whose metadata was damaged at random: the
//! exit status is equal, and where both could check, so are the numbers.
//!
//! Intended differences, each of them the cautious choice, and each named by [`intended`]:
//! * An image whose header all commands refuse (V2 to V8, V15 to V20) cannot be checked: status 1,
//!   where QEMU may check it.
//! * Images with internal snapshots or persistent bitmaps cannot be checked: status 1.
//! * Backing files are not opened: an image whose backing file is missing can be checked, where
//!   QEMU cannot open it.
//!
//! `CORDISK_CHECK_ROUNDS=N` checks N damaged copies of each image (default 20).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use engine::chain::Gate;
use engine::disk::{Disk, DiskOptions};
use qcow2::check::{CheckOptions, Output, Repair, check};
use serde_json::Value;

use crate::support::{MIB, Pattern, Rng, Scratch, qemu, run_within};

/// The result of a checker: exit status, and its numbers if it has some.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Verdict {
    status: i32,
    numbers: Option<Numbers>,
}

/// In the order of the names in [`qemus`].
type Numbers = [u64; 7];

fn qemus(image: &Path) -> Verdict {
    let done = run_within(
        Command::new("qemu-img").args(["check", "-f", "qcow2", "--output=json"]).arg(image),
        Duration::from_secs(60),
    );
    let status =
        done.status.code().unwrap_or_else(|| panic!("qemu-img check was killed: {done:?}"));
    let numbers = (status != 1).then(|| {
        let json: Value =
            serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:?}"));
        let members = [
            "corruptions",
            "leaks",
            "image-end-offset",
            "total-clusters",
            "allocated-clusters",
            "fragmented-clusters",
            "compressed-clusters",
        ];
        members.map(|member| json[member].as_u64().unwrap_or(0))
    });
    Verdict { status, numbers }
}

/// Returns cordisk's result, and the reason if it could not check.
fn ours(image: &Path) -> (Verdict, String) {
    match check(&CheckOptions { image: image.to_owned(), repair: None, output: Output::Human }) {
        Err(error) => (Verdict { status: 1, numbers: None }, error.to_string()),
        Ok(checked) => {
            let status = i32::from(checked.status());
            let found = checked.report;
            let numbers = [
                found.corruptions,
                found.leaks,
                found.image_end,
                found.total_clusters,
                found.allocated_clusters,
                found.fragmented_clusters,
                found.compressed_clusters,
            ];
            (Verdict { status, numbers: (status != 1).then_some(numbers) }, String::new())
        }
    }
}

/// Whether `why` is an intended reason not to check what QEMU checks.
fn intended(why: &str) -> bool {
    let header = [
        "header_length",
        "backing file name",
        "backing format",
        "extension",
        "compression_type",
        "virtual size",
    ];
    header.iter().any(|field| why.contains(field)) || why.contains("use qemu-img check")
}

/// Makes images of every kind, with data, zeros, discarded and shared clusters.
fn templates(scratch: &Scratch) -> Vec<PathBuf> {
    let kinds = [
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=4k,refcount_bits=2",
        "cluster_size=16k,refcount_bits=4",
        "cluster_size=64k,refcount_bits=8",
        "cluster_size=64k",
        "cluster_size=2M,refcount_bits=32",
        "compat=0.10,cluster_size=4k",
        "compat=0.10,cluster_size=512",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,extended_l2=on",
    ];
    let mut images = Vec::new();
    for (index, options) in kinds.iter().enumerate() {
        let image = scratch.join(format!("{index}.qcow2"));
        let cluster = if options.contains("2M") { 2 * MIB } else { 64 << 10 };
        qemu::create(&image, Some(40 * cluster), options, None);
        let at = |clusters: u64| clusters * cluster;
        let mut commands = vec![
            format!("write -P 1 0 {}", at(3)),
            format!("write -P 2 {} {}", at(9), at(1)),
            format!("write -P 3 {} {}", at(5), at(1)),
            format!("discard {} {}", at(1), at(1)),
        ];
        if !options.contains("0.10") {
            commands.push(format!("write -z {} {}", at(20), at(2)));
            commands.push(format!("write -z {} {}", at(9), at(1)));
        }
        if options.contains("extended_l2") {
            let sub = if options.contains("16k") { 512 } else { 2048 };
            commands.push(format!("write -P 5 {} {}", at(30) + 3 * sub, 2 * sub));
            commands.push(format!("write -z {} {}", at(30) + 7 * sub, 5 * sub));
            commands.push(format!("write -z {} {}", at(1) + sub, 2 * sub));
        }
        if !options.contains("2M") {
            commands.push(format!("write -c -P 4 {} {}", at(12), at(1)));
        }
        qemu::io(&image, &commands);
        images.push(image);
    }
    // Compressed clusters that share host clusters.
    let raw = scratch.write(
        "raw",
        &Pattern::new(60, 1).bytes(0, 300_000).iter().map(|byte| byte & 3).collect::<Vec<u8>>(),
    );
    for options in [
        "cluster_size=4k",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=16k,extended_l2=on",
    ] {
        let image = scratch.join(format!("{}.qcow2", images.len()));
        let (raw, image_name) = (raw.to_str().expect("UTF-8"), image.to_str().expect("UTF-8"));
        qemu::img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image_name]);
        images.push(image);
    }
    // Two images that cordisk wrote: one closed, one left as by a kill.
    for closed in [true, false] {
        let image = scratch.join(format!("{}.qcow2", images.len()));
        qemu::create(&image, None, "cluster_size=4k", Some(("raw", "raw")));
        let options = DiskOptions {
            read_only: false,
            copy_on_read: true,
            gate: Gate::default(),
            full_check: false,
            reserve: None,
        };
        let disk = Disk::open(&image, &options).expect("open");
        disk.populate(0..200_000, usize::MAX).expect("populate");
        disk.discard(50_000..90_000).expect("discard");
        disk.write(60_000, &[7; 10_000]).expect("write");
        if closed {
            disk.close().expect("close")
        } else {
            disk.flush().expect("flush")
        };
        images.push(image);
    }
    images
}

fn be(bytes: &[u8], at: u64, len: usize) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    bytes
        .get(at..at.saturating_add(len))
        .map_or(0, |bytes| bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Returns an entry of a table, damaged in one of several ways.
fn worse(entry: u64, others: &[u64], cluster: u64, file: u64, random: &mut Rng) -> u64 {
    let flags = entry & !OFFSET;
    match random.below(14) {
        0 => 0,
        1 => entry ^ 1 << 63,
        2 => entry ^ 1,
        3 => entry ^ 1 << 62,
        4 => entry ^ 1 << random.below(64),
        5 => random.next(),
        6 => flags | (file + random.below(4) * cluster) & OFFSET,
        7 => flags | (file.saturating_sub(cluster / 2)) & OFFSET,
        8 => entry ^ 512,
        9 => flags | (random.below(file / cluster + 1) * cluster),
        10 => flags | (random.below(8) * cluster),
        11 => 1 << 63,
        12 => 1 << 62 | random.below(file),
        _ => others.get(random.below(others.len().max(1) as u64) as usize).copied().unwrap_or(0),
    }
}

/// Damages one to three places; returns their description.
fn damage(bytes: &mut Vec<u8>, random: &mut Rng) -> String {
    let mut said = String::new();
    for _ in 0..1 + random.below(3) {
        let file = (bytes.len() as u64).max(512);
        let cluster = 1u64 << be(bytes, 20, 4).clamp(9, 21);
        let (l1, l1_size, refcounts) =
            (be(bytes, 40, 8), be(bytes, 36, 4).clamp(1, 64), be(bytes, 48, 8));
        let used = |table: u64, entries: u64, bytes: &[u8]| -> Vec<u64> {
            (0..entries)
                .map(|index| be(bytes, table + index * 8, 8))
                .filter(|entry| *entry != 0)
                .collect()
        };
        let pick = |list: &[u64], random: &mut Rng| {
            list.get(random.below(list.len().max(1) as u64) as usize).copied().unwrap_or(0)
        };
        let l1_entries = used(l1, l1_size, bytes);
        let l2 = pick(&l1_entries, random) & OFFSET;
        let block = pick(&used(refcounts, 64, bytes), random) & OFFSET;
        let in_table = |table: u64, random: &mut Rng, bytes: &[u8]| {
            // Mostly at entries that are not empty.
            let full: Vec<u64> =
                (0..cluster / 8).filter(|index| be(bytes, table + index * 8, 8) != 0).collect();
            let index = if full.is_empty() || random.below(4) == 0 {
                random.below(cluster / 8)
            } else {
                pick(&full, random)
            };
            table + index * 8
        };
        let (at, len, value) = match random.below(16) {
            0 | 1 => {
                let at = l1 + random.below(l1_size) * 8;
                (at, 8, worse(be(bytes, at, 8), &l1_entries, cluster, file, random))
            }
            2..=6 if l2 != 0 => {
                let at = in_table(l2, random, bytes);
                let others = [used(l2, cluster / 8, bytes), vec![0]].concat();
                (at, 8, worse(be(bytes, at, 8), &others, cluster, file, random))
            }
            7 => {
                let at = refcounts + random.below(3) * 8;
                let others = [used(refcounts, 64, bytes), vec![l2]].concat();
                (at, 8, worse(be(bytes, at, 8), &others, cluster, file, random))
            }
            8..=11 => (
                block + random.below((file / cluster * 2 + 8).min(cluster - 8)),
                1,
                [0, 1, 2, 3, 255, random.next() & 255][random.below(6) as usize],
            ),
            12 => (40, 8, [l1 + cluster, 0, file, refcounts, l1 ^ 512][random.below(5) as usize]),
            13 => match random.below(4) {
                0 => (
                    48,
                    8,
                    [refcounts + cluster, 0, file, l1, refcounts ^ 512][random.below(5) as usize],
                ),
                1 => (56, 4, random.below(4)),
                2 => (36, 4, be(bytes, 36, 4) + random.below(70)),
                _ => (
                    24,
                    8,
                    [0, 512, be(bytes, 24, 8) / 2, be(bytes, 24, 8) + 513]
                        [random.below(4) as usize],
                ),
            },
            14 => {
                let len = match random.below(3) {
                    0 => file + random.below(5) * cluster + random.below(cluster),
                    1 => file - random.below(cluster.min(file)),
                    _ => random.below(file).max(cluster),
                };
                said += &format!(" length {file}->{len}");
                bytes.resize(usize::try_from(len).expect("small"), 0);
                continue;
            }
            _ => (random.below(file / 8) * 8, 8, random.next()),
        };
        let value = value.to_be_bytes();
        let Some(place) = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at..at + len))
        else {
            continue;
        };
        // The rest of the first cluster, beyond the fields above, belongs to the header tests:
        // damage there says nothing about tables.
        if at < 24 || (60..cluster).contains(&at) {
            continue;
        }
        said += &format!(" {at:#x}:{len}={:x?}", &value[8 - len..]);
        place.copy_from_slice(&value[8 - len..]);
    }
    said
}

#[test]
fn damaged_images_are_judged_as_qemu_judges_them() {
    requires!("qemu-img", "qemu-io");
    let mut seeds = Rng::for_test("damaged images");
    let rounds: u64 = std::env::var("CORDISK_CHECK_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(20);
    let scratch = Scratch::new();
    let victim = scratch.join("victim.qcow2");
    let mut seen = [0u64; 4];
    let mut differences = Vec::new();
    for (index, template) in templates(&scratch).iter().enumerate() {
        let healthy = fs::read(template).expect("template");
        let (ours_first, why) = ours(template);
        assert_eq!(ours_first, qemus(template), "template {index}, undamaged {why}");
        for round in 0..rounds {
            let mut random = Rng::new(seeds.next());
            let mut bytes = healthy.clone();
            let said = damage(&mut bytes, &mut random);
            fs::write(&victim, &bytes).expect("victim");
            let (mine, why) = ours(&victim);
            let theirs = qemus(&victim);
            seen[usize::try_from(theirs.status).expect("small").min(3)] += 1;
            if mine == theirs || (mine.status == 1 && intended(&why)) {
                continue;
            }
            if std::env::var_os("CORDISK_KEEP").is_some() {
                fs::copy(
                    &victim,
                    std::env::temp_dir().join(format!("check-{index}-{round}.qcow2")),
                )
                .expect("copy");
            }
            differences.push(format!(
                "template {index}, round {round},{said}: ours {mine:?} {why}, QEMU's {theirs:?}"
            ));
        }
    }
    println!("clean {}, not possible {}, corrupt {}, leaks {}", seen[0], seen[1], seen[2], seen[3]);
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences.join("\n")
    );
    assert!(
        rounds < 20 || seen.iter().all(|count| *count > 3),
        "the damage is too weak or too strong: {seen:?}"
    );
}

/// An image that cannot be checked gives status 1 and a reason; QEMU checks it.
#[test]
fn what_cannot_be_checked_is_named() {
    requires!("qemu-img");
    let scratch = Scratch::new();
    let image = scratch.join("a.qcow2");
    let name = image.to_str().expect("UTF-8");
    qemu::create(&image, Some(MIB), "", None);
    qemu::img(&["snapshot", "-c", "one", name]);
    let (verdict, why) = ours(&image);
    assert_eq!(verdict.status, 1);
    assert!(why.contains("internal snapshots") && intended(&why), "{why}");
    qemu::img(&["snapshot", "-d", "one", name]);
    assert_eq!(ours(&image).0, qemus(&image));
    qemu::img(&["bitmap", "--add", name, "b"]);
    let (verdict, why) = ours(&image);
    assert_eq!(verdict.status, 1);
    assert!(why.contains("persistent bitmaps"), "{why}");
}

/// A repair frees all leaked clusters and nothing else, like QEMU's; an image with corruption is
/// left unchanged.
#[test]
fn repaired_leaks_are_gone_for_qemu_too() {
    requires!("qemu-img", "qemu-io");
    let mut seeds = Rng::for_test("repaired leaks");
    let scratch = Scratch::new();
    let victim = scratch.join("victim.qcow2");
    let (mut repaired, mut refused) = (0, 0);
    for template in templates(&scratch) {
        let healthy = fs::read(&template).expect("template");
        for _ in 0..6 {
            let mut random = Rng::new(seeds.next());
            let mut bytes = healthy.clone();
            // Damages only refcounts: raises them, also those of clusters beyond the end of the
            // file. A raised refcount of a cluster with COPIED counts as a corruption.
            let (cluster, refcounts) = (1u64 << be(&bytes, 20, 4), be(&bytes, 48, 8));
            let block = usize::try_from(be(&bytes, refcounts, 8)).expect("small");
            for _ in 0..1 + random.below(4) {
                let reach = usize::try_from((bytes.len() as u64 / cluster + 4).min(cluster))
                    .expect("small");
                let at = block + usize::try_from(random.below(reach as u64)).expect("small");
                bytes[at] |= [1, 2, 0x40][usize::try_from(random.below(3)).expect("small")];
            }
            fs::write(&victim, &bytes).expect("victim");
            let before = qemus(&victim);
            let result = check(&CheckOptions {
                image: victim.clone(),
                repair: Some(Repair::Leaks),
                output: Output::Human,
            });
            match before.status {
                3 => {
                    let checked = result.expect("a repair");
                    let after = qemus(&victim);
                    assert_eq!(
                        i32::from(checked.status()),
                        after.status,
                        "{before:?} became {after:?}"
                    );
                    assert_eq!(
                        after.numbers.expect("numbers")[0],
                        0,
                        "no corruption was made: {before:?} became {after:?}"
                    );
                    assert_eq!(
                        checked.leaks_fixed,
                        before.numbers.expect("numbers")[1] - after.numbers.expect("numbers")[1]
                    );
                    repaired += u64::from(after.status == 0);
                }
                2 => {
                    let checked = result.expect("a check");
                    assert_eq!((checked.status(), checked.leaks_fixed), (2, 0));
                    assert_eq!(
                        fs::read(&victim).expect("victim"),
                        bytes,
                        "nothing is written to a corrupt image"
                    );
                    refused += 1;
                }
                _ => assert_eq!(fs::read(&victim).expect("victim"), bytes),
            }
        }
    }
    println!("{repaired} repaired, {refused} refused");
    assert!(repaired > 8 && refused > 8, "{repaired} repaired, {refused} refused");
}
