//! The file system of the cache is full: what no disk uses is dropped from it, and where nothing
//! can be dropped, only reads of what is missing fail.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use super::*;
use crate::support::mounts::MountGuard;
use crate::support::{errno, read_at};

const SIZE: u64 = 16 * MIB;

/// Moves the cache of `remote`, which is not created yet, to a new tmpfs of `size` bytes.
fn with_cache_of(size: u64, remote: Remote) -> (Remote, MountGuard) {
    let dir = remote.scratch.dir("small");
    let small = MountGuard::tmpfs(&dir, size);
    let cache = dir.join("cache").display().to_string();
    (Remote { options: vec!["--cache".into(), cache], ..remote }, small)
}

fn cache_of(remote: &Remote) -> PathBuf {
    PathBuf::from(&remote.options[1])
}

fn list(remote: &Remote) -> Vec<Value> {
    let mut list = remote.scratch.cordisk();
    list.args(["cache", "list", "--json", "--cache"]).arg(cache_of(remote));
    serde_json::from_str(&run_ok(&mut list)).expect("JSON")
}

/// Fills the file system of the cache with a file of its own.
fn fill(remote: &Remote) {
    let dir = cache_of(remote).parent().expect("a directory").to_owned();
    let rest = File::create(dir.join("rest")).expect("file");
    let block = [1; 4096];
    let mut at = 0;
    while rest.write_all_at(&block, at).is_ok() {
        at += 4096;
    }
}

/// Protects: a base that fits into the cache only without another one, which no disk uses, is read
/// and streamed; the other one is dropped, also if not even a small file fits.
#[test]
fn what_no_disk_uses_is_dropped_for_what_a_disk_needs() {
    requires!("/dev/fuse", "root", "qemu-img", "nginx", "openssl");
    let mut rng = Rng::for_test("what_no_disk_uses_is_dropped_for_what_a_disk_needs");
    for is_all_full in [false, true] {
        let Some((server, remote)) = on_nginx(SIZE, "") else { return };
        let (remote, _small) = with_cache_of(SIZE + 4 * MIB, remote);
        let remote = remote.create();
        let disk = remote.mount().start();
        remote.stream(&disk);
        disk.umount();
        wait_until("no process uses the first base", || {
            list(&remote).iter().all(|file| file["in-use"] == false)
        });
        assert_eq!(list(&remote)[0]["present"], SIZE);
        if is_all_full {
            fill(&remote);
        }

        let other = Pattern::new(0x0B, 2).bytes(0, SIZE);
        fs::write(server.root().join("golden/other.raw"), &other).expect("base on the server");
        let overlay = remote.scratch.join("other.qcow2");
        let url = remote.url.replace("base.raw", "other.raw");
        let remote = Remote { url, overlay, content: other, ..remote }.create();
        let disk = remote.mount_as(&remote.overlay, "other").start();
        let mut guest = remote.guest(&disk);
        random_reads(&mut guest, &mut rng, 5);
        remote.stream(&disk);
        guest.check_all();
        let files = list(&remote);
        assert_eq!(files.len(), 1, "the first base is dropped: {files:?}");
        assert_eq!(files[0]["name"], remote.url, "{files:?}");
        assert_eq!(files[0]["present"], SIZE, "{files:?}");
        drop(guest.file);
        disk.umount();
        remote.assert_standalone(&remote.content);
    }
}

/// Protects: where nothing can be dropped, reads of what is missing fail, and the log says which
/// directory is full and what to do. Reads of what is in the overlay and in the cache go on, and so
/// do writes. With space, all reads succeed without a new mount.
#[test]
fn only_what_is_missing_fails_if_nothing_can_be_dropped() {
    requires!("/dev/fuse", "root", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let (remote, _small) = with_cache_of(8 * MIB, remote);
    let remote = remote.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.write(15 * MIB..15 * MIB + 64 * KIB);
    guest.file.sync_all().expect("flush");
    guest.check(0..64 * KIB);
    fill(&remote);

    let mut failed = Vec::new();
    for at in (0..SIZE).step_by(1 << 20) {
        let read = guest.file.read_exact_at(&mut [0; 4096], at);
        if read.is_err() {
            assert_eq!(errno(read), rustix::io::Errno::IO, "at {at}");
            failed.push(at);
        }
    }
    assert!(failed.contains(&(14 * MIB)), "the cache was never full: {failed:?}");
    assert!(!failed.contains(&0) && !failed.contains(&(15 * MIB)), "is there: {failed:?}");
    let log = disk.log();
    let directory = cache_of(&remote).display().to_string();
    let line = log
        .lines()
        .find(|line| line.contains(&directory) && line.contains("No space left on device"))
        .unwrap_or_else(|| panic!("no line names {directory}:\n{log}"));
    let advice = "free space on its file system, or choose another one with --cache";
    assert!(line.contains(advice), "what to do: {line}");

    guest.check(0..4096);
    guest.check(15 * MIB..15 * MIB + 64 * KIB);
    guest.write(15 * MIB..15 * MIB + 128 * KIB);
    guest.file.sync_all().expect("flush");
    guest.check(15 * MIB..15 * MIB + 128 * KIB);

    fs::remove_file(cache_of(&remote).with_file_name("rest")).expect("remove");
    let small = cache_of(&remote).with_file_name("");
    run_ok(Command::new("mount").args(["-o", "remount,size=40M"]).arg(&small));
    for at in &failed {
        let want = &guest.shadow[*at as usize..*at as usize + 4096];
        assert_same("a read that failed before", &read_at(&guest.file, *at, 4096), want);
    }
    remote.stream(&disk);
    guest.check_all();
    let shadow = guest.shadow;
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&shadow);
}
