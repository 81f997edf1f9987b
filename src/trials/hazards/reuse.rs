//! Reuse of freed clusters while requests still use them: H5 to H7, H12.

use super::*;

/// Creates a disk with cluster 0 flushed; returns it with the cluster's host offset.
fn one_cluster() -> (Rig, u64) {
    let rig = Rig::new();
    rig.write(0, 1);
    rig.disk.close().unwrap();
    let host = rig.host(0);
    (rig, host)
}

#[test]
fn h05_a_cluster_is_not_reused_under_its_reader() {
    let (rig, host) = one_cluster();
    thread::scope(|scope| {
        let held = rig
            .overlay
            .hold(move |operation| operation.action == Action::Read && operation.at == host);
        let reader = scope.spawn(|| rig.read(0));
        held.wait_for(1);
        let discard = scope.spawn(|| rig.discard(0));
        rig.blocked(&discard, &held);
        // Neither allocations nor flushes change the cluster meanwhile.
        for cluster in 1..4 {
            rig.write(cluster, 9);
            rig.disk.flush().unwrap();
        }
        drop(held);
        assert_eq!(reader.join().unwrap(), 1);
        discard.join().unwrap();
    });
    rig.disk.flush().unwrap();
    rig.write(5, 6);
    rig.disk.flush().unwrap();
    assert_eq!(rig.host(5), host, "used again once it is free");
    assert_eq!((rig.read(0), rig.read(5)), (0, 6));
    rig.closed();
}

#[test]
fn h06_a_cluster_is_not_reused_under_its_writer() {
    let (rig, host) = one_cluster();
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Write(WriteKind::Data), host);
        let writer = scope.spawn(|| rig.write(0, 2));
        held.wait_for(1);
        let discard = scope.spawn(|| rig.discard(0));
        rig.blocked(&discard, &held);
        for cluster in 1..4 {
            rig.write(cluster, 9);
            rig.disk.flush().unwrap();
        }
        assert!(
            rig.killed()
                .hosts
                .iter()
                .all(|(&cluster, &owned)| (cluster == 0) == (owned * CLUSTER == host))
        );
        drop(held);
        writer.join().unwrap();
        discard.join().unwrap();
    });
    rig.disk.flush().unwrap();
    rig.write(5, 6);
    let seen = rig.closed();
    assert_eq!((seen.at(0, CLUSTER), seen.at(5, CLUSTER)), ((0, 0), (6, 6)));
    assert_eq!(seen.hosts[&5] * CLUSTER, host);
}

#[test]
fn h07_a_cluster_is_not_reused_before_it_is_punched() {
    let (rig, host) = one_cluster();
    rig.discard(0);
    rig.write(1, 2);
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Punch, host);
        let flush = scope.spawn(|| rig.disk.flush().unwrap());
        held.wait_for(1);
        // The removal is durable and the cluster is about to become free. These writes allocate
        // clusters at that moment.
        for cluster in 2..6 {
            rig.write(cluster, 10 + cluster as u8);
        }
        drop(held);
        flush.join().unwrap();
    });
    for cluster in 2..6 {
        assert_eq!(rig.read(cluster), 10 + cluster as u8, "a hole was punched into it");
    }
    rig.write(7, 7);
    let seen = rig.closed();
    assert_eq!(seen.hosts[&7] * CLUSTER, host, "and now it is used again");
    assert_eq!(seen.at(7, CLUSTER), (7, 7));
}

/// Writing the larger L1 table fails. The old table is still in use and stays counted, whatever is
/// allocated meanwhile and afterwards.
#[test]
fn h12_a_failed_move_of_a_table_frees_nothing() {
    // One L2 table of 512-byte clusters maps 32 KiB; one cluster of the L1 table names 64 L2
    // tables.
    let rig = Rig::build(9, 64 * 64 * 512, 8, usize::MAX);
    rig.write(0, 1);
    rig.disk.flush().unwrap();
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Write(WriteKind::L1Table), rig.overlay.size());
        let grow = scope.spawn(|| rig.disk.grow(65 * 64 * 512).unwrap_err().errno());
        held.wait_for(1);
        rig.overlay.inject(Fault {
            matches: Box::new(|operation| operation.action == Action::Write(WriteKind::L1Table)),
            after: 0,
            failure: HostFailure::Short(512, 28),
            times: Repeat::Once,
        });
        let writer = scope.spawn(|| rig.write(1, 2));
        rig.blocked(&writer, &held);
        drop(held);
        assert_eq!(grow.join().unwrap(), Some(28));
        writer.join().unwrap();
    });
    rig.disk.flush().unwrap();
    (2..8).for_each(|cluster| rig.write(cluster, 3));
    let seen = rig.closed();
    assert_eq!((seen.at(0, 512), seen.at(1, 512), seen.at(7, 512)), ((1, 1), (2, 2), (3, 3)));
    assert_eq!(rig.disk.size(), 64 * 64 * 512);
    rig.disk.grow(65 * 64 * 512).unwrap();
    rig.write(64 * 64, 4);
    assert_eq!(rig.closed().at(64 * 64, 512), (4, 4));
}
