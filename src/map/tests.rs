//! What one call looks at. That the list is right is `tests/it/map_differential.rs`.

use super::*;
use crate::format::{Geometry, NewImage};
use crate::image::Image;
use crate::simulation::SimStorage;
use crate::storage::{Storage, WriteKind};

const CLUSTER: u64 = 512;

/// 1 MiB in clusters of 512 bytes, so that an L2 table reaches no further than 32 KiB.
fn disk() -> Disk {
    let new = NewImage { geometry: Geometry::new(3, 9, 4, 1 << 20).unwrap(), backing: None };
    let storage = SimStorage::new(Vec::new());
    for (at, piece) in new.layout().unwrap() {
        storage.write_at(WriteKind::Header, at, &piece).unwrap();
    }
    Disk::for_tests(Image::open(storage).unwrap(), None)
}

/// Protects: a look that takes too long ends between two runs, further on than it began, and what comes in pieces is joined to what it would have
/// been.
#[test]
fn a_look_ends_in_time() {
    let disk = disk();
    let mut list = Vec::new();
    let (mut at, mut calls) = (Some(0), 0);
    while let Some(from) = at {
        let page = extents_until(&disk, from, 100, Instant::now()).unwrap();
        assert_eq!(page.extents.len(), 1);
        page.extents.into_iter().for_each(|extent| join(&mut list, extent));
        (at, calls) = (page.next, calls + 1);
    }
    assert_eq!(calls, 32, "one table after the other");
    assert_eq!(list, all(&disk).unwrap());
    assert_eq!(list.len(), 1);
}

/// Protects: a full page ends with a whole extent, which may be made of many runs.
#[test]
fn a_page_ends_with_an_extent() {
    let disk = disk();
    disk.write(100 * CLUSTER, &[1; 7 * CLUSTER as usize]).unwrap();
    let whole = all(&disk).unwrap();
    assert_eq!(
        whole.iter().map(|extent| (extent.length / CLUSTER, extent.present)).collect::<Vec<_>>(),
        [(100, false), (7, true), (1941, false)]
    );
    let (first, second) = (extents(&disk, 0, 2).unwrap(), extents(&disk, 107 * CLUSTER, 2).unwrap());
    assert_eq!((&first.extents[..], first.next), (&whole[..2], Some(107 * CLUSTER)));
    assert_eq!((&second.extents[..], second.next), (&whole[2..], None));
    assert_eq!(extents(&disk, 1 << 20, 1).unwrap(), Page { extents: vec![], next: None });
}

/// Protects: the members are those of QEMU, in its order.
#[test]
fn the_words_are_those_of_qemu() {
    let disk = disk();
    disk.write(0, &[1; CLUSTER as usize]).unwrap();
    let list = serde_json::to_string(&all(&disk).unwrap()).unwrap();
    let offset = all(&disk).unwrap()[0].offset.unwrap();
    assert_eq!(
        list,
        format!(
            r#"[{{"start":0,"length":512,"depth":0,"present":true,"zero":false,"data":true,"compressed":false,"offset":{offset}}},{}]"#,
            r#"{"start":512,"length":1048064,"depth":0,"present":false,"zero":true,"data":false,"compressed":false}"#
        )
    );
}
