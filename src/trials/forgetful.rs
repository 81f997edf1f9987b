//! The next process on a host whose page cache shows writes that the disk has lost (P4, P7, R3,
//! R7): see `host_cache.rs` of the crate `sim`.
//!
//! A barrier fails, or a process is killed and the host's own write-back fails. The image is then
//! opened again on the same host. Data that the guest reads then, and data that it writes and
//! flushes later, must still be there when the host drops its cache, and the image must be
//! consistent.

use std::sync::Arc;

use engine::chain::Chain;
use engine::disk::Disk;
use host::Result;
use host::storage::{OpenMark, Sidecar, Storage, WriteKind};
use qcow2::image::{Image, LeakSearch};
use sim::random::{Random, mix};
use sim::spec::{self, Seen};
use sim::start::{Fill, Start, pattern};
use sim::{Action, Fault, HostFailure, Recorded, Repeat, SimStorage};

const CLUSTER: u64 = 4096;
/// Number of clusters of the disk; those in the first half are allocated at the start.
const CLUSTERS: u64 = 64;
/// Number of ways in which a failed write-back selects the sectors that reach the disk. Way 0
/// selects none.
const WAYS: u64 = 6;

/// Opens for writing in the order of [`Disk::open`], above `base` if the header names a backing
/// file.
pub fn reopen(file: &Arc<SimStorage>, base: &[u8]) -> Result<Disk> {
    let image = Image::open(file.clone())?;
    let chain = image.reader().backing().map(|_| Chain::of_raw(SimStorage::new(base.to_vec())));
    image.start_writing(LeakSearch::AfterCrash)?;
    Ok(Disk::for_tests(image, chain))
}

/// Returns a host that shows `cached` and has `disk`, after the process was killed. The host
/// reported the failed write-back to that process.
fn stale(cached: &[u8], disk: &[u8]) -> Arc<SimStorage> {
    let file = SimStorage::new(disk.to_vec());
    file.forget_after_failed_barriers(|_| false);
    for (sector, content) in cached.chunks(512).enumerate() {
        if disk.get(sector * 512..sector * 512 + content.len()) != Some(content) {
            file.write_at(WriteKind::Data, sector as u64 * 512, content).expect("no fault");
        }
    }
    file.write_back_fails();
    file.sync().expect_err("it is reported once");
    file.set_open_mark().expect("in memory");
    file
}

fn all_of(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xa5; disk.size() as usize];
    disk.read(0, &mut bytes).expect("nothing fails");
    bytes
}

/// Opens an image that was not closed, on a host that shows `cached` and has `disk`. The disk must
/// read as `guest`. Later flushed writes, and everything else, must stay when the host drops its
/// cache.
///
/// # Panics
/// If the disk reads as something else.
pub fn restarts(cached: &[u8], disk: &[u8], base: &[u8], guest: &[u8], seed: u64) {
    let file = stale(cached, disk);
    let opened = reopen(&file, base).expect("an image that can be written");
    let mut expected = all_of(&opened);
    assert!(expected == guest, "what is read is not what the disk has");
    let mut random = Random(seed);
    for round in 0..4 {
        let at = random.below(opened.size() - 1);
        let len = 1 + random.below((opened.size() - at).min(3 * opened.cluster_size()));
        let range = at as usize..(at + len) as usize;
        if round % 2 == 0 {
            let data = vec![random.next() as u8 | 1; len as usize];
            opened.write(at, &data).expect("nothing fails");
            expected[range].copy_from_slice(&data);
        } else {
            opened.discard(at..at + len).expect("nothing fails");
            expected[range].fill(0);
        }
    }
    opened.flush().expect("nothing fails");
    file.drop_clean_pages();
    assert!(
        all_of(&opened) == expected,
        "something else is read when the host has dropped its cache"
    );
    opened.close().expect("nothing fails");
    file.drop_clean_pages();
    let Seen { verdict, guest, .. } = spec::look(&file.bytes(), base).expect("an image");
    assert!(verdict.all().is_empty(), "{:?}", verdict.all());
    assert!(guest == expected, "something else is left");
}

/// One disk, its file, the content that was flushed and the content that was written.
struct Rig {
    file: Arc<SimStorage>,
    disk: Disk,
    flushed: Vec<u8>,
    written: Vec<u8>,
}

impl Rig {
    /// Creates an image with data in its first half, on a host that forgets after failed barriers.
    fn new(is_checked: bool, way: u64) -> Rig {
        let clusters =
            (0..CLUSTERS / 2).map(|cluster| (cluster, Fill::Data(cluster + 1))).collect();
        let start = Start { clusters, ..Start::new("forgetful", 3, 12, 4, CLUSTERS * CLUSTER) };
        let bytes = start.bytes();
        let file = if is_checked { SimStorage::checked(bytes) } else { SimStorage::new(bytes) };
        file.forget_after_failed_barriers(move |sector| {
            way > 0 && mix(way << 32 | sector) % WAYS < way
        });
        let disk = reopen(&file, &[]).unwrap();
        let flushed = all_of(&disk);
        let written = flushed.clone();
        Rig { file, disk, flushed, written }
    }

    fn write(&mut self, at: u64, len: u64, tag: u64) {
        let data: Vec<u8> = (0..len.div_ceil(512))
            .flat_map(|sector| pattern(tag, sector))
            .take(len as usize)
            .collect();
        self.disk.write(at, &data).unwrap();
        self.written[at as usize..(at + len) as usize].copy_from_slice(&data);
    }

    fn discard(&mut self, at: u64, len: u64) {
        self.disk.discard(at..at + len).unwrap();
        self.written[at as usize..(at + len) as usize].fill(0);
    }

    /// Writes in place, writes new clusters and discards some, so that tables and data are dirty.
    fn use_it(&mut self) {
        self.write(0, CLUSTER, 100);
        self.write(20 * CLUSTER + 512, 1024, 101);
        self.discard(CLUSTER, 8 * CLUSTER);
        self.write(40 * CLUSTER, 4 * CLUSTER, 102);
    }

    fn flush(&mut self) -> Result<()> {
        self.disk.flush()?;
        self.flushed = self.written.clone();
        Ok(())
    }

    /// Opens the image as the next process does, after the host has recovered.
    fn goes_on(self) {
        let Rig { file, disk, flushed, written } = self;
        drop(disk);
        assert_eq!(file.open_mark().unwrap(), OpenMark::Present);
        file.heal();
        let disk = reopen(&file, &[]).unwrap();
        let found = all_of(&disk);
        for (sector, bytes) in found.chunks(512).enumerate() {
            let at = sector * 512..sector * 512 + 512;
            assert!(
                bytes == &flushed[at.clone()] || bytes == &written[at],
                "sector {sector} is neither old nor new"
            );
        }
        let mut rig = Rig { file, disk, flushed: found.clone(), written: found };
        // These writes allocate clusters. The tables on disk may still name those clusters, unless
        // the open has read the tables from disk.
        rig.write(50 * CLUSTER, 8 * CLUSTER, 200);
        rig.write(30 * CLUSTER + 100, 700, 201);
        rig.flush().unwrap();
        rig.file.drop_clean_pages();
        assert!(
            all_of(&rig.disk) == rig.flushed,
            "something else is read when the host has dropped its cache"
        );
        rig.disk.close().unwrap();
        assert_eq!(rig.file.open_mark().unwrap(), OpenMark::Absent);
        rig.file.drop_clean_pages();
        let Seen { verdict, guest, .. } = spec::look(&rig.file.bytes(), &[]).unwrap();
        assert_eq!((verdict.all(), verdict.all_leaks()), (Vec::new(), 0));
        assert!(guest == rig.flushed);
    }
}

fn barriers_fail(file: &SimStorage, after: u64, times: Repeat) {
    file.inject(Fault {
        matches: Box::new(|operation| operation.action == Action::Sync),
        after,
        failure: HostFailure::Errno(5),
        times,
    });
}

/// P4, P7, R3, R7: each barrier of a flush fails once, the process ends like one after a failed
/// barrier, and the next process continues with what the disk has.
#[test]
fn after_a_failed_barrier_the_next_process_reads_the_disk() {
    for is_checked in [false, true] {
        for way in 0..WAYS {
            for after in 0.. {
                let mut rig = Rig::new(is_checked, way);
                rig.write(0, CLUSTER, 99);
                rig.flush().unwrap();
                rig.use_it();
                barriers_fail(&rig.file, after, Repeat::Once);
                if rig.flush().is_ok() {
                    assert!(after >= 2, "a flush that changes tables has at least two barriers");
                    break;
                }
                rig.file.heal();
                rig.disk.close().unwrap_err();
                rig.goes_on();
            }
        }
    }
}

/// P4, P7: the process is killed, and the host's own write-back fails. The first open receives that
/// error and refuses the image; the next open continues with what the disk has.
#[test]
fn after_a_kill_and_a_failed_write_back_the_next_process_reads_the_disk() {
    for is_checked in [false, true] {
        for way in 0..WAYS {
            let mut rig = Rig::new(is_checked, way);
            rig.use_it();
            rig.flush().unwrap();
            rig.write(5 * CLUSTER + 7, 9000, 103);
            rig.discard(42 * CLUSTER, 3 * CLUSTER);
            rig.file.write_back_fails();
            let error = reopen(&rig.file, &[]).unwrap_err();
            assert!(error.to_string().starts_with("not closed cleanly"), "{error}");
            assert_eq!(error.errno(), Some(5));
            rig.goes_on();
        }
    }
}

/// P4: the host shows all writes, and the disk has none of them.
#[test]
fn a_process_reads_what_the_disk_has_and_not_what_is_shown() {
    for seed in 1..20 {
        let mut rig = Rig::new(false, 0);
        let (disk, guest) = (rig.file.bytes(), rig.flushed.clone());
        rig.use_it();
        rig.flush().unwrap();
        restarts(&rig.file.bytes(), &disk, &[], &guest, seed);
    }
}

/// P7: as long as the host cannot write back, every open refuses the image, and the image keeps its
/// open mark.
#[test]
fn a_host_that_stays_ill_is_refused_every_time() {
    let mut rig = Rig::new(true, 0);
    rig.use_it();
    barriers_fail(&rig.file, 0, Repeat::ForEver);
    rig.flush().unwrap_err();
    let before = rig.file.bytes();
    for attempt in 0..3 {
        reopen(&rig.file, &[]).unwrap_err();
        assert_eq!(rig.file.open_mark().unwrap(), OpenMark::Present);
        assert!(
            attempt > 0 || rig.file.bytes() != before,
            "what is on no disk is not shown any more"
        );
    }
    rig.goes_on();
}

/// An image that was closed is opened without a barrier, and its pages stay in the host's page
/// cache.
#[test]
fn a_closed_image_keeps_its_pages() {
    let mut rig = Rig::new(true, 0);
    rig.use_it();
    rig.disk.close().unwrap();
    rig.file.record();
    drop(Image::open(rig.file.clone()).unwrap());
    assert_eq!(rig.file.recorded(), []);
    rig.file.set_open_mark().unwrap();
    drop(Image::open(rig.file.clone()).unwrap());
    assert_eq!(rig.file.recorded(), [Recorded::Sync { covers: 0 }]);
}
