//! Copy-on-read and streaming against guest requests: H1 to H4, H13 to H15, H19, H20.

use super::*;

#[test]
fn h01_a_guest_write_waits_for_the_copy_and_wins() {
    let rig = Rig::new();
    thread::scope(|scope| {
        let held = hold_base(&rig, 3);
        let reader = scope.spawn(|| rig.read(3));
        held.wait_for(1);
        let writer = scope.spawn(|| rig.write(3, 1));
        rig.blocked(&writer, &held);
        drop(held);
        assert_eq!(reader.join().unwrap(), from_base(3));
        writer.join().unwrap();
    });
    assert_eq!(rig.read(3), 1);
    assert_eq!(rig.closed().at(3, CLUSTER), (1, 1));
}

#[test]
fn h01_a_copy_waits_for_the_guest_write_and_gives_way() {
    let rig = Rig::new();
    thread::scope(|scope| {
        let held = hold_base(&rig, 3);
        // The write covers half a cluster, so the engine completes the cluster from the base, where
        // the hold stops it.
        let writer = scope.spawn(|| rig.write_half(3, 1, 1));
        held.wait_for(1);
        let reader = scope.spawn(|| rig.halves(3));
        rig.blocked(&reader, &held);
        assert_eq!(held.stopped(), 1, "the reader has not gone below");
        drop(held);
        assert_eq!(reader.join().unwrap(), (from_base(3), 1));
        writer.join().unwrap();
    });
    assert_eq!(rig.closed().at(3, CLUSTER), (from_base(3), 1));
}

#[test]
fn h02_two_readers_of_one_cluster_read_the_base_once() {
    let rig = Rig::new();
    rig.write(2, 1);
    rig.disk.flush().unwrap();
    let host = rig.host(2);
    thread::scope(|scope| {
        // `across` holds both clusters shared while it reads the first one, which is local. The two
        // readers therefore see a miss and wait to copy the second cluster up.
        let held = rig
            .overlay
            .hold(move |operation| operation.action == Action::Read && operation.at == host);
        let across = scope.spawn(|| {
            let mut buf = [0; 2 * CLUSTER as usize];
            rig.disk.read(2 * CLUSTER, &mut buf).unwrap();
            (buf[0], buf[CLUSTER as usize])
        });
        held.wait_for(1);
        let readers = [scope.spawn(|| rig.read(3)), scope.spawn(|| rig.read(3))];
        while rig.disk.waiting() < 2 {
            assert!(!readers.iter().any(ScopedJoinHandle::is_finished), "it should have waited");
            thread::yield_now();
        }
        drop(held);
        assert_eq!(across.join().unwrap(), (1, from_base(3)));
        readers.into_iter().for_each(|reader| assert_eq!(reader.join().unwrap(), from_base(3)));
    });
    assert_eq!(rig.base.operations(), 1, "reads of the base");
    assert_eq!(rig.closed().hosts.len(), 2);
}

#[test]
fn h03_a_discard_waits_for_the_copy_and_wins() {
    for zeroes in [false, true] {
        let rig = Rig::new();
        thread::scope(|scope| {
            let held = hold_base(&rig, 3);
            let reader = scope.spawn(|| rig.read(3));
            held.wait_for(1);
            let other = scope.spawn(|| match zeroes {
                true => rig.disk.write_zeroes(3 * CLUSTER..4 * CLUSTER).unwrap(),
                false => rig.discard(3),
            });
            rig.blocked(&other, &held);
            drop(held);
            assert_eq!(reader.join().unwrap(), from_base(3));
            other.join().unwrap();
        });
        assert_eq!(rig.read(3), 0, "nothing comes back");
        let seen = rig.closed();
        assert_eq!(seen.at(3, CLUSTER), (0, 0));
        assert_eq!(
            seen.hosts.contains_key(&3),
            zeroes,
            "zeroes keep their cluster, a discard gives it back"
        );
    }
}

#[test]
fn h04_a_stream_keeps_what_a_guest_wrote_into_its_chunk() {
    let rig = Rig::new();
    thread::scope(|scope| {
        let held = hold_base(&rig, 3);
        let writer = scope.spawn(|| rig.write_half(3, 0, 1));
        held.wait_for(1);
        // The stream has found eight missing clusters before it waits. One of them is no longer
        // missing when the stream continues.
        let stream = scope.spawn(|| rig.disk.populate(0..8 * CLUSTER, usize::MAX).unwrap());
        rig.blocked(&stream, &held);
        drop(held);
        writer.join().unwrap();
        let populated = stream.join().unwrap();
        assert_eq!((populated.copied, populated.skipped), (7 * CLUSTER, CLUSTER));
    });
    let seen = rig.closed();
    assert_eq!(seen.at(3, CLUSTER), (1, from_base(3)));
    assert_eq!((seen.at(2, CLUSTER).0, seen.at(4, CLUSTER).0), (from_base(2), from_base(4)));
    assert_eq!(seen.hosts.len(), 8);
}

fn fails_once(kind: WriteKind) -> Fault {
    let matches = move |operation: &Operation| operation.action == Action::Write(kind);
    Fault {
        matches: Box::new(matches),
        after: 0,
        failure: HostFailure::Errno(28),
        times: Repeat::Once,
    }
}

#[test]
fn h13_a_failed_fill_gives_its_cluster_back_once() {
    let rig = Rig::new();
    rig.write(0, 1);
    rig.disk.flush().unwrap();
    let next = rig.overlay.size();
    // Another allocation is in flight: giving the failed cluster back must not free the cluster of
    // the other allocation.
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Write(WriteKind::NewCluster), 0);
        let failing =
            scope.spawn(|| rig.disk.write(CLUSTER, &[2; CLUSTER as usize]).unwrap_err().errno());
        held.wait_for(1);
        let other = scope.spawn(|| rig.write(2, 3));
        held.wait_for(2);
        rig.overlay.inject(Fault {
            matches: Box::new(move |operation| {
                operation.action == Action::Write(WriteKind::NewCluster) && operation.at == next
            }),
            ..fails_once(WriteKind::NewCluster)
        });
        drop(held);
        assert_eq!(failing.join().unwrap(), Some(28));
        other.join().unwrap();
    });
    assert_eq!(rig.overlay.failures(), 1);
    assert_eq!(rig.read(1), from_base(1), "the old bytes");
    rig.write(4, 5);
    rig.write(5, 6);
    let seen = rig.closed();
    assert_eq!([0, 2, 4, 5].map(|cluster| seen.at(cluster, CLUSTER).0), [1, 3, 5, 6]);
    assert!(
        seen.hosts.values().any(|host| host * CLUSTER == next),
        "what was given back is used again"
    );
}

#[test]
fn h14_a_copy_that_fails_does_not_fail_the_read() {
    let rig = Rig::new();
    rig.overlay.inject(Fault { times: Repeat::ForEver, ..fails_once(WriteKind::NewCluster) });
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Write(WriteKind::NewCluster), 0);
        let one = scope.spawn(|| rig.read(3));
        held.wait_for(1);
        // This read waits for the same cluster. Its own copy fails as well, or is not attempted any
        // more.
        let other = scope.spawn(|| rig.read(3));
        rig.blocked(&other, &held);
        drop(held);
        assert_eq!((one.join().unwrap(), other.join().unwrap()), (from_base(3), from_base(3)));
    });
    let failures = rig.overlay.failures();
    assert!((1..=2).contains(&failures));
    assert_eq!(rig.read(5), from_base(5));
    assert_eq!(rig.overlay.failures(), failures, "no copy is tried for some time");
    assert_eq!(
        rig.disk.write(5 * CLUSTER, &[1; CLUSTER as usize]).unwrap_err().errno(),
        Some(28),
        "a write tells of it"
    );
    assert!(rig.closed().hosts.is_empty());
}

/// A guest may change the memory that it read into at any time, so the copy is written from a
/// buffer of the engine, and before the read returns.
#[test]
fn h15_a_read_returns_after_its_copy_is_written() {
    let rig = Rig::new();
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Write(WriteKind::NewCluster), 0);
        let reader = scope.spawn(|| {
            let mut buf = vec![0; 512];
            rig.disk.read(3 * CLUSTER + 512, &mut buf).unwrap();
            let read = buf[0];
            buf.fill(0xee);
            read
        });
        held.wait_for(1);
        assert!(!reader.is_finished());
        drop(held);
        assert_eq!(reader.join().unwrap(), from_base(3));
    });
    assert_eq!(rig.closed().at(3, CLUSTER), (from_base(3), from_base(3)));
}

#[test]
fn h19_the_end_of_the_last_cluster_is_zeros() {
    // The base is longer than the disk, which ends inside its last cluster.
    let size = CLUSTERS * CLUSTER - 512;
    for by_guest in [false, true] {
        let rig = Rig::build(12, size, CLUSTERS, usize::MAX);
        let last = CLUSTERS - 1;
        thread::scope(|scope| {
            let held = hold_base(&rig, last);
            let first = scope.spawn(|| match by_guest {
                true => rig.disk.write(last * CLUSTER + 1024, &[1; 512]).unwrap(),
                false => drop(rig.disk.populate(last * CLUSTER..size, usize::MAX).unwrap()),
            });
            held.wait_for(1);
            let second = scope.spawn(|| rig.disk.write(size - 512, &[2; 512]).unwrap());
            rig.blocked(&second, &held);
            drop(held);
            first.join().unwrap();
            second.join().unwrap();
        });
        rig.disk.flush().unwrap();
        let host = rig.host(last) as usize;
        let cluster = rig.overlay.bytes()[host..host + CLUSTER as usize].to_vec();
        assert_eq!(
            (cluster[0], cluster[1024]),
            (from_base(last), if by_guest { 1 } else { from_base(last) })
        );
        assert_eq!(
            cluster[CLUSTER as usize - 1024..],
            [[2; 512], [0; 512]].concat(),
            "by a guest: {by_guest}"
        );
    }
}

#[test]
fn h20_two_halves_of_one_new_cluster() {
    let rig = Rig::new();
    thread::scope(|scope| {
        let held = hold_base(&rig, 3);
        let one = scope.spawn(|| rig.write_half(3, 0, 1));
        held.wait_for(1);
        let other = scope.spawn(|| rig.write_half(3, 1, 2));
        rig.blocked(&other, &held);
        assert_eq!(
            held.stopped(),
            1,
            "the second one does not complete from below what the first is about to publish"
        );
        drop(held);
        one.join().unwrap();
        other.join().unwrap();
    });
    assert_eq!(rig.closed().at(3, CLUSTER), (1, 2));
}
