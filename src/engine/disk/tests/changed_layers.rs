//! Backing files that another program changes while they are in use (P9, P10). Reads of clusters
//! that were not copied up fail, no cluster is copied up, and no layer is detached.

use std::sync::Arc;

use crate::disk::*;
use qcow2::format::{BackingFormat, Mapping, NewImage};
use sim::{Action, Operation, SimStorage, Told};

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 16;
const SIZE: u64 = CLUSTERS * CLUSTER;

struct Rig {
    disk: Disk,
    base: Arc<SimStorage>,
    overlay: Arc<SimStorage>,
}

fn bytes(seed: u8) -> Vec<u8> {
    (0..SIZE).map(|at| (at / CLUSTER) as u8 + seed).collect()
}

/// An empty overlay above a raw file of this name.
fn image(backing: &str) -> Arc<SimStorage> {
    let backing = Some((backing, BackingFormat::Raw));
    SimStorage::new(NewImage::file_for_tests(12, SIZE, backing))
}

/// A disk above a raw base. Only cluster 0 is in the overlay.
fn rig() -> Rig {
    rig_of(SimStorage::new(bytes(1)), SimStorage::checked(image("base.raw").bytes()))
}

/// As [`rig`], with a base that is in the host's memory and can be cloned.
fn helped() -> Rig {
    let (base, overlay) =
        (SimStorage::new(bytes(1)), SimStorage::checked(image("base.raw").bytes()));
    base.keep_in_memory(true);
    overlay.allow_clones(CLUSTER);
    rig_of(base, overlay)
}

fn rig_of(base: Arc<SimStorage>, overlay: Arc<SimStorage>) -> Rig {
    let disk =
        Disk::for_tests(Image::open(overlay.clone()).unwrap(), Some(Chain::of_raw(base.clone())));
    disk.populate(0..CLUSTER, 1).unwrap();
    Rig { disk: disk.copying_up(true), base, overlay }
}

impl Rig {
    fn overwrite(&self) {
        self.base.overwrite(bytes(0x80), Told::AtOnce);
    }

    /// Asserts that the error is the right one, that the overlay holds nothing of the new file, and
    /// that cluster 0 still reads as before.
    fn assert_refused<T: std::fmt::Debug>(&self, what: &str, result: Result<T>) {
        let error = result.expect_err(what);
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)), "{what}: {error}");
        assert!(
            error.to_string().contains("/base.raw: was changed while it is in use"),
            "{what}: {error}"
        );
        assert_eq!(self.local(), [0], "{what}");
        let mut read = vec![0; CLUSTER as usize];
        assert_eq!(self.disk.read_local(0, &mut read).unwrap(), Local::Done, "{what}");
        assert!(read == vec![1; CLUSTER as usize], "{what}");
        let info = self.disk.info().unwrap();
        assert!(info.backing[0].changed, "{what}");
    }

    /// The clusters that the overlay maps.
    fn local(&self) -> Vec<u64> {
        let is_local = |cluster: &u64| {
            self.disk.map(cluster * CLUSTER, 1).unwrap().mapping != Mapping::Unallocated
        };
        (0..CLUSTERS).filter(is_local).collect()
    }
}

/// Protects: every way to read an overwritten base is refused.
#[test]
fn whatever_needs_a_base_that_was_overwritten_is_refused() {
    type Use = fn(&Disk) -> Result<()>;
    let uses: [(&str, Use); 10] = [
        ("a read", |disk| disk.read(CLUSTER, &mut [0; 100])),
        ("a read of whole clusters", |disk| disk.read(CLUSTER, &mut [0; 2 * CLUSTER as usize])),
        ("a read of more than is missing", |disk| disk.read(0, &mut [0; 2 * CLUSTER as usize])),
        ("a stream", |disk| disk.populate(0..SIZE, 1).map(drop)),
        ("a stream that has read ahead", |disk| {
            disk.populate_read(0..SIZE, 1, disk.read_ahead(disk.to_read(0..SIZE, 1))).map(drop)
        }),
        ("a write of a part of a cluster", |disk| disk.write(CLUSTER + 1, &[7; 10])),
        ("a discard of a part of a cluster", |disk| disk.discard(CLUSTER + 1..CLUSTER + 10)),
        ("a search for data", |disk| disk.seek(CLUSTER, Seek::Data).map(drop)),
        ("a search for holes", |disk| disk.seek(CLUSTER, Seek::Hole).map(drop)),
        ("a cut", |disk| disk.detach_backing(1, None)),
    ];
    for (what, work) in uses {
        for rig in [rig(), helped()] {
            assert!(!rig.disk.info().unwrap().backing[0].changed);
            rig.overwrite();
            rig.assert_refused(what, work(&rig.disk));
        }
    }
    let rig = rig();
    let rig = Rig { disk: rig.disk.copying_up(false), ..rig };
    rig.overwrite();
    rig.assert_refused("a read that copies nothing up", rig.disk.read(CLUSTER, &mut [0; 100]));
    // A write of a whole cluster does not need the base.
    rig.disk.write(CLUSTER, &[7; CLUSTER as usize]).unwrap();
    assert_eq!(rig.local(), [0, 1]);
}

/// Protects: `read_cached` does not answer from an overwritten base. It leaves the request to the
/// blocking path, which reports the error.
#[test]
fn what_the_host_has_in_memory_of_an_overwritten_base_is_not_answered() {
    let rig = helped();
    let mut read = vec![0; CLUSTER as usize];
    assert_eq!(rig.disk.read_cached(CLUSTER, &mut read, &mut |_| ()).unwrap(), Local::Done);
    rig.overwrite();
    let answered = rig.disk.read_cached(2 * CLUSTER, &mut read, &mut |_| panic!("answered"));
    assert_eq!(answered.unwrap(), Local::Below);
    assert_eq!(rig.local(), [0, 1]);
}

/// Protects: the version of the base is checked after the read, so a change between the request and
/// the read is noticed before the reply and before a publication.
#[test]
fn a_change_between_the_request_and_the_read_is_noticed() {
    let matches: [fn(&Operation) -> bool; 2] =
        [|operation| operation.action == Action::Read, |operation| operation.is_clone];
    let works: [fn(&Disk) -> Result<()>; 2] = [
        |disk| disk.read(CLUSTER, &mut [0; CLUSTER as usize]),
        |disk| disk.populate(CLUSTER..SIZE, 1).map(drop),
    ];
    for (matches, work) in matches.into_iter().zip(works) {
        let rig = helped();
        let hold = rig.base.hold(matches);
        let result = std::thread::scope(|scope| {
            let working = scope.spawn(|| work(&rig.disk));
            hold.wait_for(1);
            rig.overwrite();
            drop(hold);
            working.join().unwrap()
        });
        rig.assert_refused("the change came first", result);
    }
}

/// Protects P10: every cluster was copied up from the old file, and the base is overwritten just
/// before the drain. The chain is not detached.
#[test]
fn a_change_before_the_drain_keeps_the_chain() {
    let rig = rig();
    rig.disk.populate(0..SIZE, 1).unwrap();
    let hold = rig.overlay.hold(|operation| operation.action == Action::Sync);
    let cut = std::thread::scope(|scope| {
        let cutting = scope.spawn(|| rig.disk.detach_backing(1, None));
        hold.wait_for(1);
        rig.overwrite();
        drop(hold);
        cutting.join().unwrap()
    });
    assert!(cut.unwrap_err().to_string().contains("/base.raw: was changed while it is in use"));
    assert!(rig.disk.chain().is_some());
    let mut read = vec![0; SIZE as usize];
    rig.disk.read(0, &mut read).unwrap();
    assert!(read == bytes(1), "all of it had been copied up");
}

/// Protects P10: if the base is on a file server, the server is asked before the chain is detached.
#[test]
fn a_change_that_only_the_server_knows_keeps_the_chain() {
    let rig = rig();
    rig.base.overwrite(bytes(0x80), Told::WhenItAsks);
    rig.disk.populate(0..SIZE, 1).unwrap();
    assert!(!rig.disk.info().unwrap().backing[0].changed, "nothing has asked the server");
    assert!(
        rig.disk
            .detach_backing(1, None)
            .unwrap_err()
            .to_string()
            .contains("/base.raw: was changed while it is in use")
    );
    assert!(rig.disk.chain().is_some());
    assert!(rig.disk.info().unwrap().backing[0].changed);
}

/// Protects: only reads that a changed layer decides are refused. Clusters of a layer above it are
/// read.
#[test]
fn a_layer_above_the_changed_one_is_read() {
    let (base, middle) = (SimStorage::new(bytes(1)), image("base.raw"));
    let above =
        Disk::for_tests(Image::open(middle.clone()).unwrap(), Some(Chain::of_raw(base.clone())));
    above.write(CLUSTER, &[9; CLUSTER as usize]).unwrap();
    above.close().unwrap();
    drop(above);
    let chain = Chain::of_two(SimStorage::new(middle.bytes()), base.clone()).unwrap();
    let disk =
        Disk::for_tests(Image::open(image("middle.qcow2")).unwrap(), Some(chain)).copying_up(true);
    base.overwrite(bytes(0x80), Told::AtOnce);
    let mut read = [0; 100];
    disk.read(CLUSTER, &mut read).unwrap();
    assert_eq!(read, [9; 100]);
    assert_eq!(disk.read(2 * CLUSTER, &mut read).unwrap_err().errno(), Some(5));
    let changed: Vec<bool> =
        disk.info().unwrap().backing.iter().map(|layer| layer.changed).collect();
    assert_eq!(changed, [false, true]);
}
