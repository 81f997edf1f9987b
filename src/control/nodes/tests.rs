//! Finding layers by name, and the answers about layers byte for byte.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::*;
use crate::json::{self, to_text};
use engine::chain::Chain;
use engine::disk::Disk;
use qcow2::format::{BackingReference, NewImage, Qcow2Facts};
use qcow2::image::Image;
use sim::SimStorage;

fn image(below: &str, format: BackingFormat) -> Arc<SimStorage> {
    SimStorage::new(NewImage::file_for_tests(16, 1 << 20, Some((below, format))))
}

/// Protects: if no name in the chain matches, a base is found by the file to which its path
/// leads.
#[test]
fn a_base_is_a_file_by_whatever_name() {
    let chain =
        Chain::of_two(image("base.raw", BackingFormat::Raw), SimStorage::new(vec![7; 1 << 20]))
            .unwrap();
    let disk = Disk::for_tests(
        Image::open(image("middle.qcow2", BackingFormat::Qcow2)).unwrap(),
        Some(chain),
    );
    let mut info = disk.info().unwrap();
    info.backing[1].identity = Some((1, 2));
    let is_file = |path: &Path, file: (u64, u64)| path == Path::new("/alias.raw") && file == (1, 2);
    let find = |name: &str, depth| find_file(&info, depth, name, &is_file);
    assert_eq!(
        (find("middle.qcow2", 0), find("/base.raw", 0), find("alias.raw", 0)),
        (Some(1), Some(2), Some(2))
    );
    assert_eq!((find("other.raw", 0), find("middle.qcow2", 1)), (None, None));
}

fn facts(compat: &str) -> Qcow2Facts {
    let of_v3 = |set: bool| (compat != "0.10").then_some(set);
    Qcow2Facts {
        compat: compat.into(),
        compression_type: "zstd".into(),
        lazy_refcounts: of_v3(false),
        refcount_bits: 16,
        corrupt: of_v3(false),
        extended_l2: of_v3(true),
    }
}

/// Returns a disk whose overlay has no backing file.
fn alone() -> DiskInfo {
    DiskInfo {
        path: "/images/overlay \u{e9}.qcow2".into(),
        size: 1 << 40,
        allocated_size: 200_704,
        cluster_size: 65536,
        version: 3,
        qcow2: facts("1.1"),
        file_size: 262_144,
        block_device: false,
        deleted: false,
        read_only: false,
        copy_on_read: true,
        backing: Vec::new(),
    }
}

/// Returns a disk of three layers: a qcow2 file on a version 2 image on a raw block device.
fn on_two() -> DiskInfo {
    let middle = LayerInfo {
        reference: BackingReference {
            name: "middle.qcow2".into(),
            format: Some(BackingFormat::Qcow2),
        },
        path: "/images/middle.qcow2".into(),
        format: BackingFormat::Qcow2,
        size: 1 << 39,
        allocated_size: 4096,
        cluster_size: Some(4096),
        qcow2: Some(facts("0.10")),
        identity: Some((1, 2)),
        file_size: 8192,
        is_remote: false,
        block_device: false,
        deleted: true,
        changed: true,
    };
    let base = LayerInfo {
        reference: BackingReference {
            name: "/dev/vg/base".into(),
            format: Some(BackingFormat::Raw),
        },
        path: "/dev/vg/base".into(),
        format: BackingFormat::Raw,
        size: 1 << 38,
        allocated_size: 1 << 38,
        cluster_size: None,
        qcow2: None,
        identity: None,
        file_size: 1 << 38,
        is_remote: false,
        block_device: true,
        deleted: false,
        changed: false,
    };
    DiskInfo { backing: vec![middle, base], ..alone() }
}

/// Returns facts as they are sent. A client must read them as they are.
fn told<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(facts: Vec<T>) -> Value {
    let value = json::value(&facts);
    assert_eq!(serde_json::from_value::<Vec<T>>(value.clone()).unwrap(), facts);
    value
}

/// Protects: clients read the same bytes from version to version. `answers.txt` has one answer per
/// line. It was recorded when the answers were still written by hand, and compared with QEMU's.
#[test]
fn answers_about_layers_stay_the_same_bytes() {
    let disks = [
        ("alone", alone()),
        ("on a block device", DiskInfo { block_device: true, read_only: true, ..alone() }),
        ("on two", on_two()),
    ];
    let mut answers = String::new();
    for (name, disk) in &disks {
        let block = to_text(&told(vec![block_info("drive0", disk)]));
        answers += &format!("query-block, {name}: {block}\n");
        for (word, images) in [("flat", Images::Flat), ("nested", Images::Nested)] {
            let nodes = to_text(&told(all(disk, images)));
            answers += &format!("query-named-block-nodes {word}, {name}: {nodes}\n");
        }
    }
    assert_eq!(answers.lines().count(), 9);
    for (answer, recorded) in answers.lines().zip(include_str!("answers.txt").lines()) {
        assert_eq!(answer, recorded);
    }
    assert_eq!(answers, include_str!("answers.txt"));
}
