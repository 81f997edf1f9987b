//! Limits of one call. `tests/it/map_differential.rs` tests that the list is right.

use super::*;
use qcow2::format::NewImage;
use qcow2::image::Image;
use sim::SimStorage;

const CLUSTER: u64 = 512;

/// A disk of 1 MiB in clusters of 512 bytes, so that an L2 table maps only 32 KiB.
fn disk() -> Disk {
    let storage = SimStorage::new(NewImage::file_for_tests(9, 1 << 20, None));
    Disk::for_tests(Image::open(storage).unwrap(), None)
}

/// Protects: a call that reaches its time limit ends between two runs and has made progress, and
/// joined pages are equal to the list of one call.
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

/// Protects: a full page ends with a whole extent, which may consist of many runs.
#[test]
fn a_page_ends_with_an_extent() {
    let disk = disk();
    disk.write(100 * CLUSTER, &[1; 7 * CLUSTER as usize]).unwrap();
    let whole = all(&disk).unwrap();
    assert_eq!(
        whole.iter().map(|extent| (extent.length / CLUSTER, extent.present)).collect::<Vec<_>>(),
        [(100, false), (7, true), (1941, false)]
    );
    let (first, second) =
        (extents(&disk, 0, 2).unwrap(), extents(&disk, 107 * CLUSTER, 2).unwrap());
    assert_eq!((&first.extents[..], first.next), (&whole[..2], Some(107 * CLUSTER)));
    assert_eq!((&second.extents[..], second.next), (&whole[2..], None));
    assert_eq!(extents(&disk, 1 << 20, 1).unwrap(), Page { extents: vec![], next: None });
}

/// Protects: the members are those of QEMU, in QEMU's order.
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
