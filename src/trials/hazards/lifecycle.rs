//! Detaching the backing file, resizing the disk, renaming the base: H16 to H18, H34.

use super::*;
use engine::chain::Gate;
use engine::create::{CreateOptions, create};
use engine::disk::DiskOptions;

/// Populates the whole disk, then detaches the backing file.
fn stream(rig: &Rig) {
    rig.disk.populate(0..rig.disk.size(), usize::MAX).unwrap();
    rig.disk.detach_backing(usize::MAX, None).unwrap();
}

#[test]
fn h16_the_base_stays_until_its_last_reader_has_gone() {
    let rig = Rig::without_copy_on_read();
    thread::scope(|scope| {
        let held = hold_base(&rig, 5);
        let reader = scope.spawn(|| rig.read(5));
        held.wait_for(1);
        let streamer = scope.spawn(|| stream(&rig));
        rig.blocked(&streamer, &held);
        assert!(rig.killed().has_backing());
        drop(held);
        assert_eq!(reader.join().unwrap(), from_base(5));
        streamer.join().unwrap();
    });
    let seen = rig.closed();
    assert!(!seen.has_backing());
    assert!((0..CLUSTERS).all(|cluster| seen.at(cluster, CLUSTER).0 == from_base(cluster)));

    // The detach also waits for a request that reads the overlay only.
    let rig = Rig::new();
    rig.disk.populate(0..rig.disk.size(), usize::MAX).unwrap();
    rig.disk.flush().unwrap();
    let host = rig.host(5);
    thread::scope(|scope| {
        let held = rig
            .overlay
            .hold(move |operation| operation.action == Action::Read && operation.at == host);
        let reader = scope.spawn(|| rig.read(5));
        held.wait_for(1);
        let streamer = scope.spawn(|| rig.disk.detach_backing(usize::MAX, None).unwrap());
        rig.blocked(&streamer, &held);
        assert!(rig.killed().has_backing());
        drop(held);
        assert_eq!(reader.join().unwrap(), from_base(5));
        streamer.join().unwrap();
    });
    assert!(!rig.closed().has_backing());
}

#[test]
fn h17_a_discard_before_the_cut_hides_the_base_for_good() {
    let rig = Rig::new();
    rig.disk.populate(0..rig.disk.size(), usize::MAX).unwrap();
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Sync, 0);
        let cut = scope.spawn(|| rig.disk.detach_backing(usize::MAX, None).unwrap());
        held.wait_for(1);
        // The populate has passed these clusters; the check before the detach has not begun.
        rig.discard(2);
        rig.disk.write_zeroes(3 * CLUSTER..4 * CLUSTER).unwrap();
        assert_eq!((rig.read(2), rig.read(3)), (0, 0));
        drop(held);
        cut.join().unwrap();
    });
    let seen = rig.closed();
    assert!(!seen.has_backing());
    assert_eq!(
        [1, 2, 3, 4].map(|cluster| seen.at(cluster, CLUSTER).0),
        [from_base(1), 0, 0, from_base(4)]
    );

    // A cluster that was never copied keeps the backing link.
    let rig = Rig::new();
    rig.disk.populate(CLUSTER..rig.disk.size(), usize::MAX).unwrap();
    rig.disk.detach_backing(usize::MAX, None).unwrap_err();
    assert!(rig.closed().has_backing());
}

/// R12: the detach checks all tables before it drains the requests, and checks again, during the
/// drain, what has changed since.
#[test]
fn h17_what_changes_between_the_check_and_the_cut_is_checked_again() {
    let rig = Rig::new();
    rig.disk.populate(0..rig.disk.size(), usize::MAX).unwrap();
    thread::scope(|scope| {
        // An in-flight request delays the drain, but not the check before it.
        let (range, guard) = rig.disk.hold_for_tests(2 * CLUSTER..3 * CLUSTER);
        let cut = scope.spawn(|| rig.disk.detach_backing(usize::MAX, None));
        while rig.disk.waiting() == 0 {
            assert!(!cut.is_finished(), "the cut did not wait for a request");
            thread::yield_now();
        }
        rig.disk.uncover_for_tests(&guard, range);
        drop(guard);
        let error = cut.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("offset 8192 still comes from"), "{error}");
    });
    assert!(rig.closed().has_backing());

    // A cluster that is missing before the drain is reported without a drain.
    let rig = Rig::new();
    rig.disk.populate(CLUSTER..rig.disk.size(), usize::MAX).unwrap();
    thread::scope(|scope| {
        let (_, guard) = rig.disk.hold_for_tests(2 * CLUSTER..3 * CLUSTER);
        let cut = scope.spawn(|| rig.disk.detach_backing(usize::MAX, None));
        while !cut.is_finished() {
            assert_eq!(rig.disk.waiting(), 0, "the guest waits while tables are looked at");
            thread::yield_now();
        }
        drop(guard);
        cut.join().unwrap().unwrap_err();
    });
}

/// Requests of the guest continue while the detach reads all tables one by one. They wait only for
/// the few tables that the detach reads again during the drain.
#[test]
fn h17_the_guest_does_not_wait_while_all_tables_are_looked_at() {
    // With clusters of 512 bytes, one table maps 64 of them. Memory for tables is too small to keep
    // one.
    let (clusters, tables) = (64 * 40, 40);
    let rig = Rig::build(9, clusters * 512, clusters, 1);
    rig.disk.populate(0..rig.disk.size(), usize::MAX).unwrap();
    rig.disk.flush().unwrap();
    let bytes = rig.overlay.bytes();
    let layout = spec::Layout::of(&bytes).unwrap();
    let places: Vec<u64> = layout.l2_tables(&bytes).map(|(_, at)| at).collect();
    assert_eq!(places.len(), tables);
    let last = places[tables - 1];
    thread::scope(|scope| {
        let held = rig
            .overlay
            .hold(move |operation| operation.action == Action::Read && operation.at == last);
        let before = rig.overlay.operations();
        let cut = scope.spawn(|| rig.disk.detach_backing(usize::MAX, None).unwrap());
        held.wait_for(1);
        let guest = scope.spawn(|| {
            rig.write(3, 0x77);
            rig.read(3)
        });
        while !guest.is_finished() {
            assert_eq!(rig.disk.waiting(), 0, "the guest waits while a table is read");
            thread::yield_now();
        }
        assert_eq!(guest.join().unwrap(), 0x77);
        drop(held);
        cut.join().unwrap();
        let operations = rig.overlay.operations() - before;
        assert!(
            operations < 2 * tables as u64,
            "{operations} operations: all tables were read twice"
        );
    });
    let seen = rig.closed();
    assert!(!seen.has_backing());
    assert_eq!(
        [2, 3, 4].map(|cluster| seen.at(cluster, 512).0),
        [from_base(2), 0x77, from_base(4)]
    );
}

#[test]
fn h18_a_resize_waits_for_the_copy_and_hides_the_longer_base() {
    let (before, after) = (8 * CLUSTER - 512, 12 * CLUSTER);
    let rig = Rig::build(12, before, CLUSTERS, usize::MAX);
    let rig = Rig { disk: rig.disk.copying_up(true), ..rig };
    thread::scope(|scope| {
        let held = hold_base(&rig, 7);
        let reader = scope.spawn(|| {
            let mut buf = [0; 512];
            rig.disk.read(7 * CLUSTER, &mut buf).unwrap();
            buf[0]
        });
        held.wait_for(1);
        let grow = scope.spawn(|| rig.disk.grow(after).unwrap());
        rig.blocked(&grow, &held);
        assert_eq!(rig.disk.size(), before);
        drop(held);
        assert_eq!(reader.join().unwrap(), from_base(7));
        grow.join().unwrap();
    });
    let killed = rig.killed();
    for at in [before, before + 500, 8 * CLUSTER, after - 1] {
        assert_eq!(killed.guest[at as usize], 0, "byte {at} of the base shows");
    }
    assert_eq!(killed.guest[before as usize - 1], from_base(7));
    rig.disk.populate(0..after, usize::MAX).unwrap();
    assert_eq!((7..12).map(|cluster| rig.halves(cluster.max(8)).1).max(), Some(0));
    rig.closed();
}

#[test]
fn h34_a_renamed_base_stays_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base.raw"), dir.path().join("overlay.qcow2"));
    std::fs::write(&base, vec![7; 1 << 20]).unwrap();
    let options = CreateOptions {
        overlay: overlay.clone(),
        base: "base.raw".into(),
        format: BackingFormat::Raw,
        size: None,
        cluster_size: 65536,
        extended_l2: false,
    };
    create(&options, &Gate::default()).unwrap();
    let options = DiskOptions {
        read_only: false,
        copy_on_read: true,
        gate: Gate::default(),
        full_check: false,
        reserve: None,
    };
    let disk = Disk::open(&overlay, &options).unwrap();
    let mut buf = [0; 4096];
    disk.read(0, &mut buf).unwrap();
    // An administrator installs a new version under the old name.
    std::fs::write(dir.path().join("new"), vec![9; 1 << 20]).unwrap();
    std::fs::rename(dir.path().join("new"), &base).unwrap();
    disk.read(512 << 10, &mut buf).unwrap();
    assert_eq!(buf, [7; 4096], "two files are mixed");
    disk.populate(0..1 << 20, usize::MAX).unwrap();
    disk.detach_backing(usize::MAX, None).unwrap();
    let mut all = vec![0; 1 << 20];
    disk.read(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 7));
    disk.close().unwrap();
}

/// R12: if a stream has left out one cluster (the first, one in the middle or the last one), the
/// chain is kept, and the error names the cluster.
#[test]
fn a_single_cluster_that_is_missing_keeps_the_chain() {
    for missing in 0..CLUSTERS {
        let rig = Rig::without_copy_on_read();
        for cluster in (0..CLUSTERS).filter(|&cluster| cluster != missing) {
            rig.write(cluster, 1);
        }
        let error = rig.disk.detach_backing(usize::MAX, None).unwrap_err();
        assert!(
            error.to_string().contains(&format!("offset {} still", missing * CLUSTER)),
            "{error}"
        );
        rig.disk.flush().unwrap();
        assert_eq!(
            rig.killed().at(missing, CLUSTER).0,
            from_base(missing),
            "still read from below"
        );
        rig.write(missing, 1);
        rig.disk.detach_backing(usize::MAX, None).unwrap();
    }
}
