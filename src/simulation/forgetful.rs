//! The next process above a host that has lost what it still shows (P4, P7, R3, R7): see [`super::host_cache`].
//!
//! A barrier fails, or a process is killed and the host's own write-back fails. The image is opened
//! again on the same host. What the guest then reads and the host has been asked to keep must still be
//! there when the host drops its cache, and the image must be sound.

use std::sync::Arc;

use super::random::{Random, mix};
use super::spec::{self, Seen};
use super::start::{Fill, Start, pattern};
use super::{Action, Failure, Fault, Recorded, SimStorage, Times};
use crate::Result;
use crate::chain::Chain;
use crate::disk::Disk;
use crate::image::Image;
use crate::storage::{OpenMark, Storage, WriteKind};

const CLUSTER: u64 = 4096;
/// Clusters of the disk; the first half is there at the start.
const CLUSTERS: u64 = 64;
/// Ways in which sectors reach the disk in a write-back that fails; in the first one none does.
const WAYS: u64 = 6;

/// Opens for writing in the order of [`Disk::open`], above `base` where the header names one.
pub fn reopen(file: &Arc<SimStorage>, base: &[u8]) -> Result<Disk> {
    let image = Image::open(file.clone())?;
    let chain = image.reader().backing().map(|_| Chain::of_raw(SimStorage::new(base.to_vec())));
    let leaks = image.may_leak().then(|| image.find_leaks()).transpose()?;
    image.begin_writing()?;
    if let Some(leaks) = leaks {
        image.give_back(&leaks)?;
    }
    Ok(Disk::for_tests(image, chain))
}

/// A host that shows `cached` and has `disk`, after a process that was killed. What was wrong was
/// reported to that process.
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

/// A process opens what a host shows as `cached` and has as `disk`, an image that was not closed. It must
/// read `guest`, and what it writes and flushes must stay, with everything else, when the host drops its
/// cache.
///
/// # Panics
/// Where that is not so.
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
    assert!(all_of(&opened) == expected, "something else is read when the host has dropped its cache");
    opened.close().expect("nothing fails");
    file.drop_clean_pages();
    let Seen { verdict, guest, .. } = spec::look(&file.bytes(), base).expect("an image");
    assert!(verdict.all().is_empty(), "{:?}", verdict.all());
    assert!(guest == expected, "something else is left");
}

/// One story: what was flushed, what was not, and the file.
struct Rig {
    file: Arc<SimStorage>,
    disk: Disk,
    flushed: Vec<u8>,
    written: Vec<u8>,
}

impl Rig {
    /// An image with something in every second cluster, on a host that forgets.
    fn new(is_checked: bool, way: u64) -> Rig {
        let clusters = (0..CLUSTERS / 2).map(|cluster| (cluster, Fill::Data(cluster + 1))).collect();
        let start = Start { clusters, ..Start::new("forgetful", 3, 12, 4, CLUSTERS * CLUSTER) };
        let bytes = start.bytes();
        let file = if is_checked { SimStorage::checked(bytes) } else { SimStorage::new(bytes) };
        file.forget_after_failed_barriers(move |sector| way > 0 && mix(way << 32 | sector) % WAYS < way);
        let disk = reopen(&file, &[]).unwrap();
        let flushed = all_of(&disk);
        let written = flushed.clone();
        Rig { file, disk, flushed, written }
    }

    fn write(&mut self, at: u64, len: u64, tag: u64) {
        let data: Vec<u8> = (0..len.div_ceil(512)).flat_map(|sector| pattern(tag, sector)).take(len as usize).collect();
        self.disk.write(at, &data).unwrap();
        self.written[at as usize..(at + len) as usize].copy_from_slice(&data);
    }

    fn discard(&mut self, at: u64, len: u64) {
        self.disk.discard(at..at + len).unwrap();
        self.written[at as usize..(at + len) as usize].fill(0);
    }

    /// In place, new clusters, and clusters that go: tables and data are dirty.
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

    /// The next process, on a host that is well again.
    fn goes_on(self) {
        let Rig { file, disk, flushed, written } = self;
        drop(disk);
        assert_eq!(file.open_mark().unwrap(), OpenMark::Present);
        file.heal();
        let disk = reopen(&file, &[]).unwrap();
        let found = all_of(&disk);
        for (sector, bytes) in found.chunks(512).enumerate() {
            let at = sector * 512..sector * 512 + 512;
            assert!(bytes == &flushed[at.clone()] || bytes == &written[at], "sector {sector} is neither old nor new");
        }
        let mut rig = Rig { file, disk, flushed: found.clone(), written: found };
        // In clusters that the tables on disk may still name, unless those were read.
        rig.write(50 * CLUSTER, 8 * CLUSTER, 200);
        rig.write(30 * CLUSTER + 100, 700, 201);
        rig.flush().unwrap();
        rig.file.drop_clean_pages();
        assert!(all_of(&rig.disk) == rig.flushed, "something else is read when the host has dropped its cache");
        rig.disk.close().unwrap();
        assert_eq!(rig.file.open_mark().unwrap(), OpenMark::Absent);
        rig.file.drop_clean_pages();
        let Seen { verdict, guest, .. } = spec::look(&rig.file.bytes(), &[]).unwrap();
        assert_eq!((verdict.all(), verdict.all_leaks()), (Vec::new(), 0));
        assert!(guest == rig.flushed);
    }
}

fn barriers_fail(file: &SimStorage, after: u64, times: Times) {
    file.inject(Fault { matches: Box::new(|operation| operation.action == Action::Sync), after, failure: Failure::Errno(5), times });
}

/// P4, P7, R3, R7: each barrier of a flush fails once, the process ends as a latched one does, and the
/// next one goes on with what the disk has.
#[test]
fn after_a_failed_barrier_the_next_process_reads_the_disk() {
    for is_checked in [false, true] {
        for way in 0..WAYS {
            for after in 0.. {
                let mut rig = Rig::new(is_checked, way);
                rig.write(0, CLUSTER, 99);
                rig.flush().unwrap();
                rig.use_it();
                barriers_fail(&rig.file, after, Times::Once);
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

/// P4, P7: the process is killed, and it is the host's own write-back that fails. The first open is told
/// of that and refuses the image; the next one goes on with what the disk has.
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

/// P4: a host that shows all that was written, and has nothing of it.
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

/// P7: as long as the host cannot write back, the image is refused, again and again, and keeps its mark.
#[test]
fn a_host_that_stays_ill_is_refused_every_time() {
    let mut rig = Rig::new(true, 0);
    rig.use_it();
    barriers_fail(&rig.file, 0, Times::ForEver);
    rig.flush().unwrap_err();
    let before = rig.file.bytes();
    for attempt in 0..3 {
        reopen(&rig.file, &[]).unwrap_err();
        assert_eq!(rig.file.open_mark().unwrap(), OpenMark::Present);
        assert!(attempt > 0 || rig.file.bytes() != before, "what is on no disk is not shown any more");
    }
    rig.goes_on();
}

/// An image that was closed is opened without a barrier, and what the host has in memory of it stays.
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
