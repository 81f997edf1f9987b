//! Lookups that hold no guard.

use qcow2::format::{GuestOffset, GuestSubcluster, Mapping};

use super::*;

/// Looks up eight subclusters while the first of them becomes zero. The others stay unallocated, so
/// a run of zeros ends after the first.
fn look_up_beside_a_change(geometry: Geometry) {
    let unit = geometry.subcluster_size();
    let storage = SimStorage::new(Vec::new());
    for (at, piece) in (NewImage { geometry, backing: None }).layout().unwrap() {
        host::storage::Storage::write_at(&*storage, WriteKind::Header, at, &piece).unwrap();
    }
    let image = Arc::new(Image::open(storage).unwrap());
    let locks = Arc::new(RangeLock::new(geometry.cluster_size()));
    // The L2 table exists, so that the lookup finds the entries and not only their absence.
    {
        let held = locks.exclusive(0..geometry.size());
        image.zero(&held, GuestSubcluster(8)..GuestSubcluster(9)).unwrap();
    }
    let changer = {
        let (image, locks) = (Arc::clone(&image), Arc::clone(&locks));
        thread::spawn(move || {
            let held = locks.exclusive(0..geometry.cluster_size());
            image.zero(&held, GuestSubcluster(0)..GuestSubcluster(1)).unwrap();
        })
    };
    let run = image.map(GuestOffset(0), 8 * unit).unwrap();
    match run.mapping {
        Mapping::Unallocated => assert_eq!(run.len, 8 * unit),
        Mapping::Zero { .. } => assert_eq!(run.len, unit, "a run of zeros has unallocated ones"),
        other => panic!("{other:?}"),
    }
    changer.join().unwrap();
}

/// Each entry of a run was as the run says when the lookup read it, although no guard keeps other
/// threads from changing it (I6).
#[test]
fn schedules_of_lookups_without_a_guard() {
    explore(1, || look_up_beside_a_change(Geometry::new(3, 9, 4, 64 * 512).unwrap()));
    explore(1, || {
        let geometry = Geometry::new(3, 14, 4, 64 * 512).and_then(Geometry::with_extended_l2);
        look_up_beside_a_change(geometry.unwrap());
    });
}
