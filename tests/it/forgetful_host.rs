//! The next mount after the host has failed to write (P4, P7, R3, R7). The overlay is on ext4, on a
//! loop device above a disk whose writes fail on demand. The host keeps the pages that it could not
//! write, marks them clean, and shows them to the next process that opens the file, until it needs
//! the memory. The tests force that eviction: data that a mount has read, and data that a guest has
//! flushed, must be there afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::fs::{Advice, FallocateFlags};
use rustix::io::Errno;

use crate::support::mounts::{LoopDevice, LoopMount, umount};
use crate::support::nbd::{Fault, NbdFile};
use crate::support::{
    CLUSTER, Daemon, MIB, Mount, Pattern, Scratch, assert_same, errno, poll, qemu, read_at, run_ok,
};

const SIZE: u64 = 8 * MIB;
const LONG: Duration = Duration::from_secs(30);

/// An overlay on a file system whose disk can fail, above a base on a disk that does not.
struct Host {
    // Fields are dropped in this order.
    _mount: LoopMount,
    disk_below: NbdFile,
    overlay: PathBuf,
    /// The content of the base.
    below: Vec<u8>,
    scratch: Scratch,
}

impl Host {
    /// Without a journal the file system continues after the disk has failed, as XFS does with
    /// data.
    fn new() -> Host {
        let scratch = Scratch::new();
        let below = Pattern::new(170, 1).bytes(0, SIZE);
        let base = scratch.write("base.raw", &below);
        let image = scratch.join("ext4");
        File::create(&image)
            .and_then(|file| file.set_len(64 * MIB))
            .expect("a file for the file system");
        run_ok(Command::new("mkfs.ext4").args(["-q", "-m", "0", "-O", "^has_journal"]).arg(&image));
        let disk_below = NbdFile::serve(
            &scratch,
            "disk",
            &std::fs::read(&image).expect("the file system"),
            &(0..0),
        );
        let mount =
            LoopMount::on(LoopDevice::attach(disk_below.path()), "ext4", &scratch.dir("host"));
        let overlay = mount.dir().join("overlay.qcow2");
        qemu::create(&overlay, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
        Host { _mount: mount, disk_below, overlay, below, scratch }
    }

    fn mount(&self, name: &str) -> Mount {
        Mount::named(&self.scratch, &self.overlay, name).args(&["--reserve", "0"])
    }

    /// Mounts, lets the guest do `before`, durably, and makes the disk below refuse all writes from
    /// then on. Returns the daemon, and the disk as the guest has it open.
    fn fails_after(&self, before: impl FnOnce(&File)) -> (Daemon, File) {
        let disk = self.mount("first").start();
        let file = disk.open();
        before(&file);
        file.sync_all().expect("the disk is well");
        assert!(self.sync());
        self.disk_below.fail(Fault::Write);
        (disk, file)
    }

    /// The guest's flush fails, and so does the daemon at its end. Then the disk below is well
    /// again.
    fn flush_fails(&self, mut disk: Daemon, file: File) {
        assert_eq!(errno(file.sync_all()), Errno::IO);
        drop(file);
        umount(disk.path());
        assert_eq!(disk.ended_within(LONG).expect("it ends").code(), Some(1), "{}", disk.log());
        drop(disk);
        self.disk_below.repair(Fault::Write);
    }

    /// Syncs the overlay's file system; returns whether the disk took all writes.
    fn sync(&self) -> bool {
        Command::new("sync").arg("-f").arg(&self.overlay).status().expect("sync").success()
    }

    /// Mounts again, like a service manager that restarts a failed service. The host may report its
    /// failed write-back once.
    fn mount_again(&self) -> Daemon {
        for attempt in 0..3 {
            let mut disk = self.mount(&format!("again{attempt}")).spawn();
            let state = poll(LONG, || {
                if disk.is_mounted() {
                    Some(None)
                } else {
                    disk.ended_within(Duration::ZERO).map(Some)
                }
            });
            match state.expect("it mounts or says why not") {
                None => return disk,
                Some(status) => {
                    assert_eq!(status.code(), Some(1));
                    assert!(
                        disk.log()
                            .contains("overlay.qcow2: not closed cleanly, and its last writes"),
                        "{}",
                        disk.log()
                    );
                }
            }
        }
        panic!("the disk below is well again, and three mounts failed");
    }

    /// Drops the pages of the overlay from the host's page cache.
    fn drop_pages(&self) {
        let file = File::open(&self.overlay).expect("overlay");
        file.sync_all().expect("the disk is well");
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("fadvise");
    }

    /// Mounts again and checks that what the guest reads, writes and flushes is there after the
    /// host has dropped its pages, and at the end. `is_right` checks what it reads first.
    fn goes_on(&self, is_right: impl Fn(&[u8])) {
        let disk = self.mount_again();
        let file = disk.open();
        let mut want = read_at(&file, 0, usize::try_from(SIZE).expect("small"));
        is_right(&want);
        // New clusters; if the open freed leaked clusters, the writes use these.
        let at = 96 * CLUSTER;
        let data = Pattern::new(171, 1).bytes(at, 8 * CLUSTER);
        file.write_all_at(&data, at).expect("write");
        file.write_all_at(&[0xa7; 700], 1000).expect("write in place");
        file.sync_all().expect("the disk is well again");
        want[usize::try_from(at).expect("small")..][..data.len()].copy_from_slice(&data);
        want[1000..1700].fill(0xa7);
        self.drop_pages();
        assert_same("after the host has dropped its pages", &disk.read_all(), &want);
        drop(file);
        disk.umount();
        self.drop_pages();
        qemu::assert_clean(&self.overlay);
        assert_same("in the end", &qemu::read_all(&self.overlay), &want);
    }
}

/// Asserts that each page of these clusters has one of the allowed contents.
fn assert_clusters(bytes: &[u8], clusters: std::ops::Range<u64>, allowed: impl Fn(u64) -> Vec<u8>) {
    for cluster in clusters {
        let start = usize::try_from(cluster * CLUSTER).expect("small");
        for page in bytes[start..start + usize::try_from(CLUSTER).expect("small")].chunks(4096) {
            let allowed = allowed(cluster);
            assert!(
                allowed.contains(&page[0]) && page.iter().all(|byte| *byte == page[0]),
                "cluster {cluster}: {:02x?}",
                &page[..8]
            );
        }
    }
}

fn write(file: &File, clusters: std::ops::Range<u64>, byte: impl Fn(u64) -> u8) {
    for cluster in clusters {
        file.write_all_at(
            &vec![byte(cluster); usize::try_from(CLUSTER).expect("small")],
            cluster * CLUSTER,
        )
        .expect("write");
    }
}

/// Protects: P4 and P7. Data in place: a failed flush loses it, the daemon ends with status 1, and
/// the next mount reads what was flushed before, not what the host still shows.
#[test]
fn data_of_a_flush_that_failed() {
    requires!("/dev/fuse", "root", "qemu-img", "nbdkit", "nbdfuse", "losetup", "mkfs.ext4");
    let host = Host::new();
    let (disk, file) = host.fails_after(|file| write(file, 0..4, |_| b'1'));
    write(&file, 0..4, |_| b'2');
    host.flush_fails(disk, file);
    host.goes_on(|bytes| {
        assert_clusters(bytes, 0..4, |_| vec![b'1']);
        let rest = usize::try_from(4 * CLUSTER).expect("small");
        assert_same("from below", &bytes[rest..], &host.below[rest..]);
    });
}

/// Protects: R3 and R7. Tables: clusters that the tables name on the disk, but no longer in the
/// host's page cache, are not allocated.
#[test]
fn tables_of_a_flush_that_failed() {
    requires!("/dev/fuse", "root", "qemu-img", "nbdkit", "nbdfuse", "losetup", "mkfs.ext4");
    let host = Host::new();
    let tag = |cluster: u64| 65 + u8::try_from(cluster).expect("small");
    let (disk, file) = host.fails_after(|file| write(file, 0..32, tag));
    // This change writes only tables.
    rustix::fs::fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        0,
        8 * CLUSTER,
    )
    .expect("discard");
    host.flush_fails(disk, file);
    host.goes_on(|bytes| {
        assert_clusters(bytes, 0..8, |cluster| vec![tag(cluster), 0]);
        assert_clusters(bytes, 8..32, |cluster| vec![tag(cluster)]);
    });
}

/// Protects: P4 and P7. The daemon is killed while the disk refuses writes. Then the host writes
/// back by itself, or a user calls sync(1), and no process receives the error.
#[test]
fn killed_on_a_disk_that_takes_no_writes() {
    requires!("/dev/fuse", "root", "qemu-img", "nbdkit", "nbdfuse", "losetup", "mkfs.ext4");
    let host = Host::new();
    let (disk, file) = host.fails_after(|file| write(file, 0..16, |_| b'1'));
    write(&file, 0..16, |_| b'2');
    disk.kill9();
    drop(file);
    host.sync();
    host.disk_below.repair(Fault::Write);
    host.goes_on(|bytes| assert_clusters(bytes, 0..16, |_| vec![b'1', b'2']));
}
