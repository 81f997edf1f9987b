//! Tests of the checker against QEMU's: both must agree on which images are broken.

use std::process::Command;

use super::super::start::{Fill, Start, set_refcount};
use super::*;

/// Makes images with two L2 tables, data, zeros and a reserved cluster.
fn starts() -> Vec<Start> {
    let mut starts = Vec::new();
    for (version, bits, order) in [
        (3, 9, 4),
        (3, 9, 0),
        (3, 9, 6),
        (3, 9, 1),
        (3, 9, 2),
        (3, 9, 3),
        (3, 9, 5),
        (3, 12, 4),
        (2, 9, 4),
        (2, 12, 4),
    ] {
        let mut start = Start::new("some", version, bits, order, 64 << 10);
        start.clusters = vec![
            (0, Fill::Data(1)),
            (1, Fill::Data(2)),
            (5, Fill::Data(3)),
            ((64 << 10 >> bits) - 1, Fill::Data(4)),
        ];
        if version == 3 {
            start.clusters.extend([(2, Fill::Zero), (3, Fill::Reserved(5))]);
        }
        starts.push(start);
    }
    let mut extended = Start::new("extended", 3, 14, 4, 320 << 10);
    extended.extended = true;
    extended.clusters = vec![
        (0, Fill::Data(1)),
        (1, Fill::Parts(2, 0x0000_ff00_8000_00ff)),
        (2, Fill::Zero),
        (3, Fill::Reserved(5)),
        (19, Fill::Parts(6, 0)),
    ];
    starts.push(extended);
    starts
}

/// Returns whether `qemu-img check` finds errors, and leaks. An image that it cannot open counts as
/// an error.
fn qemu(bytes: &[u8]) -> (bool, bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let output = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2", "--output=json"])
        .arg(&path)
        .output()
        .unwrap();
    match output.status.code() {
        Some(0) => (false, false),
        Some(3) => (false, true),
        Some(1 | 2) => (true, false),
        other => panic!("qemu-img check: {other:?}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

fn agree(bytes: &[u8], what: &str) -> bool {
    let (ours, theirs) = (check(bytes), qemu(bytes));
    let is_wrong = !ours.errors.is_empty() || !ours.not_copied.is_empty();
    assert_eq!(is_wrong, theirs.0, "{what}: {ours:?}");
    if !is_wrong {
        assert_eq!(ours.leaks > 0, theirs.1, "{what}: {} leaks", ours.leaks);
    }
    theirs.0
}

#[test]
fn what_is_whole_is_whole_for_qemu_too() {
    for start in starts() {
        assert!(!agree(&start.bytes(), &format!("{start:?}")));
    }
    let mut full = Start::new("counted", 3, 9, 6, 64 << 10);
    full.counted = 4096;
    full.free = 3;
    assert!(!agree(&full.bytes(), "counted"));
}

/// Protects: every class of damage is found, in every width of refcounts.
#[test]
fn what_is_broken_is_broken_for_qemu_too() {
    let mut broken = 0;
    for start in starts() {
        let bytes = start.bytes();
        let layout = Layout::of(&bytes).unwrap();
        let cluster = layout.cluster_size();
        let (l1, table) = (layout.l1.0 as usize, layout.refcount_table.0 as usize);
        let block = number(&bytes, table as u64, 8) as usize;
        let l2 = (number(&bytes, l1 as u64, 8) & OFFSET) as usize;
        let Contents::Data(data) = layout.find(&bytes, 0) else { panic!() };
        let host = data >> layout.cluster_bits;
        let with = |at: usize, value: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            bytes
        };
        let entry = |at: usize, raw: u64| with(at, &raw.to_be_bytes());
        let old = |at: usize| number(&bytes, at as u64, 8);
        let counted = |index: u64, value: u64| {
            let mut bytes = bytes.clone();
            set_refcount(
                &mut bytes[block..block + cluster as usize],
                layout.refcount_order,
                index,
                value,
            );
            bytes
        };
        let mut damage = vec![
            ("data not counted", counted(host, 0)),
            ("L2 table not counted", counted(l2 as u64 / cluster, 0)),
            ("L1 table not counted", counted(l1 as u64 / cluster, 0)),
            ("header not counted", counted(0, 0)),
            ("block not counted", counted(block as u64 / cluster, 0)),
            ("refcount table not counted", counted(table as u64 / cluster, 0)),
            ("COPIED gone from L2", entry(l2, old(l2) & !COPIED)),
            ("COPIED gone from L1", entry(l1, old(l1) & !COPIED)),
            ("two references", entry(l2, old(l2 + 8))),
            ("data is L2 table", entry(l2, COPIED | l2 as u64)),
            ("data outside the file", entry(l2, COPIED | (bytes.len() as u64 + cluster))),
            ("reserved bits in L2", entry(l2, old(l2) | 4)),
            ("reserved bits in L1", entry(l1, old(l1) | 4)),
            ("L1 is COPIED and nothing", entry(l1, COPIED)),
            ("compressed and COPIED", entry(l2, COPIED | COMPRESSED | data)),
            (
                "compressed, outside the file",
                entry(l2, COMPRESSED | (bytes.len() as u64 + cluster)),
            ),
            ("compressed, in another's cluster", entry(l2, COMPRESSED | (old(l2 + 8) & OFFSET))),
            ("L2 table outside the file", entry(l1, COPIED | (bytes.len() as u64 + cluster))),
            ("reserved bits in refcount table", entry(table, old(table) | 4)),
            ("no block", entry(table, 0)),
            ("block outside the file", entry(table + 8, bytes.len() as u64 + 4 * cluster)),
            ("no magic", with(0, b"QFX")),
            ("version", with(4, &7u32.to_be_bytes())),
            ("cluster_bits", with(20, &8u32.to_be_bytes())),
            ("L1 too short", with(36, &0u32.to_be_bytes())),
            ("L1 unaligned", with(40, &(l1 as u64 + 8).to_be_bytes())),
            ("refcount table unaligned", with(48, &(table as u64 + 8).to_be_bytes())),
            ("no refcount table", with(56, &0u32.to_be_bytes())),
        ];
        if layout.refcount_order > 0 {
            damage.push(("refcount two, COPIED", counted(host, 2)));
        }
        if layout.cluster_bits > 9 {
            damage.push(("data unaligned", entry(l2, old(l2) + 512)));
        }
        if layout.version == 3 {
            damage.push(("refcount_order", with(96, &7u32.to_be_bytes())));
            damage.push(("feature", with(72, &(1u64 << 40).to_be_bytes())));
            damage.push(("header_length", with(100, &80u32.to_be_bytes())));
        }
        for (what, bytes) in damage {
            assert!(
                agree(&bytes, &format!("{what} of {start:?}")),
                "{what} of {start:?} is nothing to QEMU"
            );
            broken += 1;
        }
        // Violations of the specification that `qemu-img check` ignores.
        let mut tolerated = vec![("COPIED and nothing", entry(l2 + 4 * 8, COPIED))];
        if layout.version == 2 {
            tolerated.push(("zero in version 2", entry(l2, old(l2) | 1)));
        }
        for (what, bytes) in tolerated {
            assert!(
                !agree(&bytes, &format!("{what} of {start:?}")),
                "{what} of {start:?} is something to QEMU"
            );
            assert_eq!(check(&bytes).tolerated.len(), 1, "{what} of {start:?}");
        }
        // Leaks, and an image from which an entry was removed.
        for (what, bytes) in
            [("leak", counted(bytes.len() as u64 / cluster - 1, 1)), ("entry gone", entry(l2, 0))]
        {
            agree(&bytes, &format!("{what} of {start:?}"));
        }
    }
    assert!(broken > 200, "{broken}");
}

#[test]
fn places_are_found() {
    let start = &starts()[0];
    let bytes = start.bytes();
    let layout = Layout::of(&bytes).unwrap();
    let at = |cluster: u64| layout.find(&bytes, cluster * 512 + 7);
    let Contents::Data(data) = at(1) else { panic!() };
    assert_eq!(bytes[data as usize], super::super::start::pattern(2, 1)[7]);
    assert_eq!(
        (at(2), at(3), at(4), at(64)),
        (Contents::Zero, Contents::Zero, Contents::Unallocated, Contents::Unallocated)
    );
}
