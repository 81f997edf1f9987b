//! The write-back pass and requests that run beside it: H8 to H11, H21, H23.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

#[test]
fn h08_a_flush_persists_only_what_is_linked() {
    let rig = Rig::new();
    rig.write(1, 1);
    rig.disk.flush().unwrap();
    let host = rig.host(1);
    thread::scope(|scope| {
        // Stops the write of the data of a new cluster.
        let held = hold_overlay(&rig, Action::Write(WriteKind::NewCluster), 0);
        let writer = scope.spawn(|| rig.disk.write(0, &[2; 2 * CLUSTER as usize]).unwrap());
        held.wait_for(1);
        rig.disk.flush().unwrap();
        let seen = rig.killed();
        assert_eq!((seen.at(0, CLUSTER).0, seen.at(1, CLUSTER).0), (from_base(0), 1));
        assert_eq!(seen.hosts.len(), 1, "a cluster that waits for its data is nobody's");
        // The first cluster is published; the second one is about to be overwritten in place.
        let next = hold_overlay(&rig, Action::Write(WriteKind::Data), host);
        drop(held);
        next.wait_for(1);
        rig.disk.flush().unwrap();
        let seen = rig.killed();
        assert_eq!((seen.at(0, CLUSTER).0, seen.at(1, CLUSTER).0), (2, 1));
        drop(next);
        writer.join().unwrap();
    });
    rig.disk.flush().unwrap();
    assert_eq!(rig.killed().at(1, CLUSTER), (2, 2));
    rig.closed();
}

/// Stops a flush before its 1st, 2nd, … operation and calls `beside` with the number of that step
/// meanwhile. Ends at the first flush that has no such step, and returns the number of steps.
fn beside_every_step(
    rig: &Rig,
    mut before: impl FnMut(u64),
    mut beside: impl FnMut(u64),
    mut after: impl FnMut(u64),
) -> u64 {
    for step in 0.. {
        before(step);
        let stood = thread::scope(|scope| {
            let count = AtomicU64::new(0);
            let held = rig.overlay.hold(move |operation| {
                is_of_a_pass(operation) && count.fetch_add(1, Ordering::SeqCst) == step
            });
            let flush = scope.spawn(|| rig.disk.flush().unwrap());
            while held.stopped() == 0 && !flush.is_finished() {
                thread::yield_now();
            }
            let stood = held.stopped() == 1;
            if stood {
                rig.killed(); // the image must be consistent at any moment
                beside(step);
                rig.killed();
            }
            drop(held);
            flush.join().unwrap();
            stood
        });
        after(step);
        if !stood {
            return step;
        }
    }
    unreachable!("a pass has an end")
}

/// Beside every step of a pass, requests change entries of the table that the pass writes, and
/// allocate clusters while the pass frees others.
#[test]
fn h09_changes_beside_every_step_of_a_pass() {
    let rig = Rig::new();
    let value = |step: u64, what: u64| (1 + 4 * step + what) as u8;
    let steps = beside_every_step(
        &rig,
        |step| {
            rig.discard(0);
            rig.write(1, value(step, 0));
            rig.write(2, value(step, 1));
        },
        |step| {
            rig.discard(1);
            rig.write(2, value(step, 2));
            rig.write(0, value(step, 3));
            rig.disk.discard(3 * CLUSTER..5 * CLUSTER).unwrap();
            rig.write(3, value(step, 3));
            assert_eq!(
                [0, 1, 2, 3].map(|cluster| rig.read(cluster)),
                [value(step, 3), 0, value(step, 2), value(step, 3)]
            );
        },
        |step| {
            // Each cluster has its value from before the flush or the one written beside it.
            let seen = rig.killed();
            assert!([0, value(step, 3)].contains(&seen.at(0, CLUSTER).0));
            assert!([0, value(step, 0)].contains(&seen.at(1, CLUSTER).0));
            assert!([value(step, 1), value(step, 2)].contains(&seen.at(2, CLUSTER).0));
            let now = [0, 1, 2, 3, 4].map(|cluster| rig.read(cluster));
            rig.disk.flush().unwrap();
            let seen = rig.killed();
            assert_eq!(
                [0, 1, 2, 3, 4].map(|cluster| seen.at(cluster, CLUSTER).0),
                now,
                "step {step}"
            );
        },
    );
    assert!(steps >= 4, "refcounts, barrier, table, barrier: {steps}");
    rig.closed();
}

#[test]
fn h10_passes_follow_one_another() {
    let rig = Rig::new();
    rig.write(0, 1);
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Write(WriteKind::L2Table), 0);
        let first = scope.spawn(|| rig.disk.flush().unwrap());
        held.wait_for(1);
        // The stopped write has a copy of the table without this change.
        rig.write(1, 2);
        let second = scope.spawn(|| rig.disk.flush().unwrap());
        let third = scope.spawn(|| rig.disk.flush_if_dirty().unwrap());
        for _ in 0..10_000 {
            assert!(
                !second.is_finished(),
                "it returned beside a pass that had begun before it came"
            );
            assert_eq!(held.stopped(), 1, "a second write of the table beside the first");
            thread::yield_now();
        }
        drop(held);
        first.join().unwrap();
        second.join().unwrap();
        third.join().unwrap();
    });
    assert_eq!(rig.killed().at(1, CLUSTER), (2, 2), "the older copy came last");
    rig.closed();
}

#[test]
fn h11_nothing_is_dropped_from_memory_before_it_is_written() {
    // Six L2 tables, and table memory for one.
    let rig = Rig::build(9, 6 * 64 * 512, 8, 512);
    for table in 0..6 {
        rig.write(table * 64, 10 + table as u8);
        rig.disk.flush().unwrap();
    }
    rig.write(0, 1);
    rig.write(1, 2);
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Write(WriteKind::L2Table), 0);
        let flush = scope.spawn(|| rig.disk.flush().unwrap());
        held.wait_for(1);
        let before = rig.overlay.operations();
        for table in [1, 2, 3, 4, 5, 1, 2, 3] {
            assert_eq!(rig.read(table * 64), 10 + table as u8);
        }
        assert!(rig.overlay.operations() - before > 8, "tables were loaded, so memory was short");
        // The stopped write has not yet put this entry on disk; only memory has it.
        assert_eq!((rig.read(0), rig.read(1)), (1, 2));
        rig.write(2, 3);
        drop(held);
        flush.join().unwrap();
    });
    assert_eq!([0, 1, 2].map(|cluster| rig.read(cluster)), [1, 2, 3]);
    let seen = rig.closed();
    assert_eq!([0, 1, 2, 64].map(|cluster| seen.at(cluster, 512).0), [1, 2, 3, 11]);
}

/// The kernel reports a lost write to one fdatasync(2) only. The next barrier succeeds, and the
/// engine must not trust it.
#[test]
fn h21_a_failed_barrier_fails_the_flush_behind_it() {
    let rig = Rig::new();
    rig.write(0, 1);
    thread::scope(|scope| {
        let held = hold_overlay(&rig, Action::Sync, 0);
        rig.overlay.inject(Fault {
            matches: Box::new(|operation| operation.action == Action::Sync),
            after: 0,
            failure: HostFailure::Errno(5),
            times: Repeat::Once,
        });
        let first = scope.spawn(|| rig.disk.flush().unwrap_err().errno());
        held.wait_for(1);
        rig.write(1, 2);
        let second = scope.spawn(|| rig.disk.flush().is_err());
        let header = scope.spawn(|| rig.disk.grow(2 * CLUSTERS * CLUSTER).is_err());
        drop(held);
        assert_eq!(first.join().unwrap(), Some(5));
        assert!(second.join().unwrap() && header.join().unwrap());
    });
    assert_eq!(rig.overlay.failures(), 1);
    assert!(
        rig.disk.flush().is_err()
            && rig.disk.flush_if_dirty().is_err()
            && rig.disk.write(0, &[1]).is_err()
    );
    assert_eq!([0, 1, 2].map(|cluster| rig.read(cluster)), [1, 2, from_base(2)], "reads go on");
}

/// A refcount block of 512 bytes counts 256 clusters. Every step of a pass allocates more clusters
/// than that, so new refcount blocks are needed.
#[test]
fn h23_new_refcount_blocks_beside_every_step_of_a_pass() {
    let rig = Rig::build(9, 32 * 600 * 512, 8, usize::MAX);
    let many = |first: u64, byte: u8| rig.disk.write(first * 512, &vec![byte; 300 * 512]).unwrap();
    let steps = beside_every_step(
        &rig,
        |step| many(step * 600, 1 + step as u8),
        |step| many(step * 600 + 300, 101 + step as u8),
        |step| {
            assert_eq!(rig.killed().at(step * 600 + 299, 512).0, 1 + step as u8);
        },
    );
    assert!(steps >= 6, "blocks, barrier, their entries, barrier, tables, barrier: {steps}");
    let seen = rig.closed();
    for step in 0..steps {
        assert_eq!(seen.at(step * 600, 512).0, 1 + step as u8);
        assert_eq!(seen.at(step * 600 + 599, 512).0, 101 + step as u8);
    }
}
