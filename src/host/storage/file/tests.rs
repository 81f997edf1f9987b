//! Tests of the host file: bytes, holes, a file that shrinks, and locks against QEMU's programs in
//! both directions.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use super::*;
use crate::storage::{CannotClone, cannot_clone};

fn scratch(len: u64) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.raw");
    File::create(&path).unwrap().set_len(len).unwrap();
    (dir, path)
}

#[test]
fn bytes_go_round_and_zeros_lie_beyond_the_end() {
    let (_dir, path) = scratch(0);
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    assert_eq!(file.size(), 0);
    file.write_at(WriteKind::Data, 1000, b"hello").unwrap();
    assert_eq!(file.size(), 1005);
    let mut buf = [0xee; 20];
    file.read_at(995, &mut buf).unwrap();
    assert_eq!(&buf, b"\0\0\0\0\0hello\0\0\0\0\0\0\0\0\0\0");
    file.read_at(1 << 40, &mut buf).unwrap();
    assert_eq!(buf, [0; 20]);
    file.write_at(WriteKind::Data, 0, b"x").unwrap();
    assert_eq!(file.size(), 1005, "the size only grows");
    file.read_at(u64::MAX, &mut buf).unwrap();
    file.sync().unwrap();
    file.sync_directory().unwrap();
}

#[test]
fn p9_a_file_that_shrank_is_an_error_and_not_zeros() {
    let (_dir, path) = scratch(1 << 20);
    let file = FileStorage::open(&path, Access::ReadOnly).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let mut buf = [0; 512];
    file.read_at(0, &mut buf).unwrap();
    for offset in [4095, 4096, (1 << 20) - 1] {
        assert_eq!(file.read_at(offset, &mut buf).unwrap_err().raw_os_error(), Some(5), "{offset}");
    }
    file.read_at(1 << 20, &mut buf).unwrap();
    // The lost range does not become a hole either.
    assert_eq!(file.status(8192, 512).unwrap_err().raw_os_error(), Some(5));
}

#[test]
fn holes_are_seen_and_made() {
    let (_dir, path) = scratch(4 << 20);
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    let mib = 1 << 20;
    assert_eq!(file.status(0, u64::MAX).unwrap(), (BlockStatus::Hole, u64::MAX));
    file.write_at(WriteKind::Data, mib, &vec![7; mib as usize]).unwrap();
    assert_eq!(file.status(0, 100 * mib).unwrap(), (BlockStatus::Hole, mib));
    assert_eq!(file.status(0, 4096).unwrap(), (BlockStatus::Hole, 4096));
    assert_eq!(file.status(mib, 100 * mib).unwrap(), (BlockStatus::Data, mib));
    assert_eq!(file.status(mib + 512, 512).unwrap(), (BlockStatus::Data, 512));
    assert_eq!(file.status(2 * mib, 100 * mib).unwrap(), (BlockStatus::Hole, 100 * mib));
    assert_eq!(file.status(100 * mib, 5).unwrap(), (BlockStatus::Hole, 5));
    let before = file.allocated_size().unwrap();
    assert!(before >= mib);
    file.punch_hole(mib, mib / 2).unwrap();
    file.punch_hole(0, 0).unwrap();
    assert!(file.allocated_size().unwrap() <= before - mib / 2);
    assert_eq!(file.status(mib, 100 * mib).unwrap(), (BlockStatus::Hole, mib / 2));
    file.punch_hole(3 * mib, 100 * mib).unwrap();
    assert_eq!((file.size(), path.metadata().unwrap().len()), (4 * mib, 4 * mib), "the size stays");
    let mut byte = [1];
    file.read_at(mib, &mut byte).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
fn only_regular_files_and_block_devices_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, access, kind, word) in [
        (fifo.as_path(), Access::ReadOnly, ErrorKind::InvalidArgument, "not a regular file"),
        (socket.as_path(), Access::ReadOnly, ErrorKind::Io, "No such device"),
        (dir.path(), Access::ReadOnly, ErrorKind::InvalidArgument, "not a regular file"),
        (dir.path(), Access::ReadWrite, ErrorKind::Io, "Is a directory"),
        (
            Path::new("/dev/null"),
            Access::ReadWrite,
            ErrorKind::InvalidArgument,
            "not a regular file",
        ),
        (&dir.path().join("none"), Access::ReadOnly, ErrorKind::NotFound, "none: No such file"),
    ] {
        let error = FileStorage::open(path, access).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn a_new_file_must_not_exist() {
    let (dir, path) = scratch(0);
    assert_eq!(FileStorage::create_new(&path).unwrap_err().errno(), Some(17));
    let new = FileStorage::create_new(&dir.path().join("new")).unwrap();
    let again = FileStorage::open_unlocked(new.path(), Access::ReadOnly).unwrap();
    assert_eq!(new.identity(), again.identity());
    assert_eq!(again.lock().unwrap_err().kind(), ErrorKind::Busy);
}

#[test]
fn a_read_only_file_cannot_be_written() {
    let (_dir, path) = scratch(512);
    let file = FileStorage::open(&path, Access::ReadOnly).unwrap();
    assert!(file.write_at(WriteKind::Data, 0, b"x").is_err());
    assert!(file.punch_hole(0, 512).is_err());
}

#[test]
fn ours_keep_each_other_off() {
    let (_dir, path) = scratch(512);
    let open = |access| FileStorage::open(&path, access);
    let (one, two) = (open(Access::ReadOnly).unwrap(), open(Access::ReadOnly).unwrap());
    let text = open(Access::ReadWrite).unwrap_err().to_string();
    assert!(
        text.ends_with(
            "image.raw: in use by another process (its \"write\" lock is held); stop it first"
        ),
        "{text}"
    );
    drop((one, two));
    let writer = open(Access::ReadWrite).unwrap();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert_eq!(open(access).unwrap_err().kind(), ErrorKind::Busy);
    }
    drop(writer);
    open(Access::ReadOnly).unwrap();
}

/// Makes an empty qcow2 image. While QEMU's tools read a qcow2 image they deny writing to others;
/// with a raw image they do not.
fn qcow2() -> (TempDir, PathBuf) {
    let (dir, path) = scratch(0);
    assert!(qemu_img(&["create", "-q", "-f", "qcow2"], &path, &["1M"]).status.success());
    (dir, path)
}

fn qemu_img(before: &[&str], path: &Path, after: &[&str]) -> Output {
    Command::new("qemu-img")
        .args(before)
        .arg(path)
        .args(after)
        .output()
        .expect("qemu-img is installed")
}

fn qemu_io(flags: &[&str], command: &str, path: &Path) -> Output {
    Command::new("qemu-io")
        .args(flags)
        .args(["-c", command])
        .arg(path)
        .output()
        .expect("qemu-io is installed")
}

fn refused(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("lock")
}

#[test]
fn p12_our_locks_keep_qemu_off() {
    let (_dir, path) = qcow2();
    let read = || qemu_io(&["-r", "-f", "qcow2"], "read 0 512", &path);
    let write = || qemu_io(&["-f", "qcow2"], "write 0 512", &path);
    let write_raw = || qemu_io(&["-f", "raw"], "write 4k 0", &path);
    let resize = || qemu_img(&["resize", "-q", "-f", "qcow2"], &path, &["2M"]);
    let check = || qemu_img(&["check", "-q"], &path, &[]);
    let info = || qemu_img(&["info"], &path, &[]);
    let forced = || qemu_img(&["info", "-U"], &path, &[]);

    let ours = FileStorage::open(&path, Access::ReadWrite).unwrap();
    for output in [read(), write(), write_raw(), resize(), check(), info()] {
        assert!(refused(&output) && !output.status.success(), "{output:?}");
    }
    assert!(forced().status.success());
    drop(ours);

    let ours = FileStorage::open(&path, Access::ReadOnly).unwrap();
    for output in [write(), write_raw(), resize()] {
        assert!(refused(&output) && !output.status.success(), "{output:?}");
    }
    for output in [read(), check(), info(), forced()] {
        assert!(output.status.success(), "{output:?}");
    }
    drop(ours);
    for output in [read(), write(), write_raw(), resize(), check(), info()] {
        assert!(output.status.success(), "{output:?}");
    }
}

/// A qemu-io process that holds the image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(flags: &[&str], path: &Path) -> Holder {
        let mut command = Command::new("qemu-io");
        command.args(flags).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io is installed");
        // The prompt appears once the image is open.
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn p12_qemu_locks_keep_us_off() {
    let (_dir, path) = qcow2();
    let open = |access| FileStorage::open(&path, access);
    let busy = |access| {
        let error = open(access).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.to_string().contains("\"write\""), "{error}");
    };
    for format in ["qcow2", "raw"] {
        let writer = Holder::new(&["-f", format], &path);
        busy(Access::ReadOnly);
        busy(Access::ReadWrite);
        drop(writer);
    }
    let reader = Holder::new(&["-r", "-f", "qcow2"], &path);
    open(Access::ReadOnly).unwrap();
    busy(Access::ReadWrite);
    drop(reader);
    let careless = Holder::new(&["-r", "-U", "-f", "qcow2"], &path);
    open(Access::ReadWrite).unwrap();
    drop(careless);
    open(Access::ReadWrite).unwrap();
}

/// Protects: the locks exclude qemu-storage-daemon, with which libvirt and users export images.
#[test]
fn p12_qemu_storage_daemon() {
    let (dir, path) = qcow2();
    let (socket, started) = (dir.path().join("nbd"), dir.path().join("pid"));
    let node =
        format!("driver=qcow2,node-name=a,file.driver=file,file.filename={}", path.display());
    let start = |export: &str| {
        let mut command = Command::new("qemu-storage-daemon");
        command.args([
            "--blockdev",
            &node,
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", socket.display()),
        ]);
        command.args(["--export", export, "--pidfile"]).arg(&started).stderr(Stdio::piped());
        command.spawn().expect("qemu-storage-daemon is installed")
    };
    let ours = FileStorage::open(&path, Access::ReadWrite).unwrap();
    let output = start("type=nbd,id=e,node-name=a,writable=on").wait_with_output().unwrap();
    assert!(refused(&output) && !output.status.success(), "{output:?}");
    drop(ours);
    let mut daemon = start("type=nbd,id=e,node-name=a,writable=on");
    while !started.exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let error = FileStorage::open(&path, Access::ReadOnly).unwrap_err();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    FileStorage::open(&path, Access::ReadWrite).unwrap();
}

#[test]
fn a_copy_of_the_descriptor_does_not_keep_the_lock() {
    let (_dir, path) = scratch(512);
    let ours = FileStorage::open(&path, Access::ReadWrite).unwrap();
    // A child has such a copy between fork and exec.
    let _copy = ours.file.try_clone().unwrap();
    assert_eq!(FileStorage::open(&path, Access::ReadWrite).unwrap_err().kind(), ErrorKind::Busy);
    drop(ours);
    FileStorage::open(&path, Access::ReadWrite).unwrap();
}

#[test]
fn an_exclusive_lock_of_a_stranger_is_busy_too() {
    let (_dir, path) = scratch(512);
    let stranger = File::options().read(true).write(true).open(&path).unwrap();
    let exclusive = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as _,
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&stranger, nix::fcntl::FcntlArg::F_OFD_SETLK(&exclusive)).unwrap();
    assert_eq!(FileStorage::open(&path, Access::ReadOnly).unwrap_err().kind(), ErrorKind::Busy);
    drop(stranger);
    FileStorage::open(&path, Access::ReadOnly).unwrap();
}

#[test]
fn many_threads_read_what_they_wrote() {
    let (_dir, path) = scratch(0);
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let file = &file;
            scope.spawn(move || {
                for round in 0..200u64 {
                    let offset = (round * 4 + thread) * 1000;
                    file.write_at(WriteKind::Data, offset, &[thread as u8 + 1; 1000]).unwrap();
                    let mut buf = [0; 1000];
                    file.read_at(offset, &mut buf).unwrap();
                    assert_eq!(buf, [thread as u8 + 1; 1000]);
                }
            });
        }
    });
    assert_eq!(file.size(), 800_000);
    let mut byte = [0];
    file.file.read_exact_at(&mut byte, 799_999).unwrap();
    assert_eq!(byte, [4]);
}

#[test]
fn the_mark_of_an_open_image_stays_until_it_is_removed() {
    let (_dir, path) = scratch(1 << 20);
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    if file.open_mark().unwrap() == OpenMark::Unsupported {
        println!("skipped: no extended attributes here");
        return;
    }
    assert_eq!(file.open_mark().unwrap(), OpenMark::Absent);
    file.remove_open_mark().unwrap();
    file.set_open_mark().unwrap();
    file.set_open_mark().unwrap();
    assert_eq!(file.open_mark().unwrap(), OpenMark::Present);
    drop(file);
    let file = FileStorage::open(&path, Access::ReadOnly).unwrap();
    assert_eq!(file.open_mark().unwrap(), OpenMark::Present, "it is the file's, not ours");
    drop(file);
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    file.remove_open_mark().unwrap();
    assert_eq!(file.open_mark().unwrap(), OpenMark::Absent);
    assert_eq!(file.size(), 1 << 20);
}

/// Protects: a file that cannot have a mark is not taken for a file that was closed.
#[test]
fn a_file_without_attributes_says_so() {
    // Files of /proc cannot have user attributes.
    let file = File::open("/proc/self/status").unwrap();
    let storage = FileStorage {
        path: "/proc/self/status".into(),
        file,
        access: Access::ReadOnly,
        identity: (0, 0),
        owner: 0,
        size: AtomicU64::new(0),
        locked: AtomicBool::new(true),
        shrinking_reported: AtomicBool::new(false),
        mark_entrusted: AtomicBool::new(false),
        is_shared: false,
        is_file: true,
        keeps_time: AtomicBool::new(true),
        is_in_memory: false,
        is_on_ext4: false,
        ahead: Ahead::default(),
    };
    assert_eq!(storage.open_mark().unwrap(), OpenMark::Unsupported);
    storage.set_open_mark().unwrap();
    storage.remove_open_mark().unwrap();
}

/// Protects: the size is read again under the lock, because the previous holder of the lock may
/// have grown the file since it was opened.
#[test]
fn the_size_is_that_under_the_lock() {
    let (_dir, path) = scratch(4096);
    let first = FileStorage::open(&path, Access::ReadWrite).unwrap();
    let second = FileStorage::open_unlocked(&path, Access::ReadWrite).unwrap();
    first.write_at(WriteKind::NewCluster, 4096, &[7; 4096]).unwrap();
    drop(first);
    second.lock().unwrap();
    let mut buf = [0; 16];
    second.read_at(4096, &mut buf).unwrap();
    assert_eq!((second.size(), buf), (8192, [7; 16]));
}

/// Protects: a file keeps its identity under another name and when it is opened again. A copy of
/// it, and a file put in its place, have other identities.
#[test]
fn a_file_is_told_from_its_copy() {
    let (dir, path) = scratch(4096);
    let id = |path: &Path| {
        FileStorage::open_unlocked(path, Access::ReadOnly)
            .unwrap()
            .file_id()
            .unwrap()
            .expect("a file")
    };
    let (first, renamed) = (id(&path), dir.path().join("renamed"));
    std::fs::copy(&path, dir.path().join("copy")).unwrap();
    assert_ne!(id(&dir.path().join("copy")), first);
    std::fs::rename(&path, &renamed).unwrap();
    assert_eq!(id(&renamed), first);
    std::fs::copy(&renamed, &path).unwrap();
    assert_ne!(id(&path), first);
    let text = serde_json::to_string(&first).unwrap();
    assert_eq!(serde_json::from_str::<FileId>(&text).unwrap(), first, "{text}");
}

/// Protects: the process that removes the mark for us neither gets our locks nor keeps them.
#[test]
fn the_mark_can_be_left_to_somebody_else() {
    let (_dir, path) = scratch(0);
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    file.set_open_mark().unwrap();
    if file.open_mark().unwrap() == OpenMark::Unsupported {
        return;
    }
    let theirs = file.entrust_attributes().unwrap().expect("a regular file");
    file.remove_open_mark().unwrap();
    assert_eq!(file.open_mark().unwrap(), OpenMark::Present, "it is no longer ours to remove");
    drop(file);
    let again = FileStorage::open(&path, Access::ReadWrite).expect("nobody holds a lock");
    rustix::fs::fremovexattr(&theirs, OPEN_MARK).unwrap();
    assert_eq!(again.open_mark().unwrap(), OpenMark::Absent);
}

/// Protects: `can_clone` predicts what `clone_range` does, whatever this file system supports, and
/// a clone counts as a write.
#[test]
fn blocks_are_shared_or_the_host_says_why_not() {
    let (dir, path) = scratch(1 << 20);
    let below = vec![7; 1 << 20];
    std::fs::write(&path, &below).unwrap();
    let base = FileStorage::open(&path, Access::ReadOnly).unwrap();
    let overlay = FileStorage::create_new(&dir.path().join("overlay")).unwrap();
    let source = CloneSource::new(&base);
    overlay.clone_range(WriteKind::NewCluster, source, 0, 0, 0).unwrap();
    assert_eq!(overlay.size(), 0, "nothing is nothing, and not all there is");
    let possible = overlay.can_clone(source);
    assert_eq!(
        (overlay.size(), overlay.file.metadata().unwrap().size()),
        (0, 0),
        "to ask changes nothing"
    );
    let cloned = overlay.clone_range(WriteKind::NewCluster, source, 64 << 10, 128 << 10, 256 << 10);
    let mut read = vec![0xee; 384 << 10];
    match (possible, cloned) {
        (Ok(()), Ok(())) => {
            assert_eq!(overlay.size(), 384 << 10);
            overlay.read_at(0, &mut read).unwrap();
            assert!(
                read[128 << 10..] == below[..256 << 10]
                    && read[..128 << 10].iter().all(|&byte| byte == 0)
            );
        }
        (Err(before), Err(error)) => {
            assert_eq!(before.raw_os_error(), error.raw_os_error());
            assert_eq!(cannot_clone(&error), CannotClone::Ever, "{error}");
            assert_eq!(overlay.size(), 0);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn refusals_are_sorted() {
    let sorted = |errno: Errno| cannot_clone(&errno.into());
    for errno in
        [Errno::OPNOTSUPP, Errno::NOTTY, Errno::XDEV, Errno::INVAL, Errno::PERM, Errno::TXTBSY]
    {
        assert_eq!(sorted(errno), CannotClone::Ever, "{errno}");
    }
    for errno in [Errno::NOSPC, Errno::DQUOT, Errno::AGAIN] {
        assert_eq!(sorted(errno), CannotClone::Now, "{errno}");
    }
    assert_eq!(
        (sorted(Errno::IO), sorted(Errno::NOMEM)),
        (CannotClone::Failed, CannotClone::Failed)
    );
    assert_eq!(cannot_clone(&io::Error::other("no number")), CannotClone::Failed);
}

/// Protects: a hint about any range, also one outside the file, changes nothing and is no error.
#[test]
fn a_write_out_changes_no_byte() {
    let (_dir, path) = scratch(0);
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 4096 + at % 251) as u8).collect();
    file.write_at(WriteKind::NewCluster, 0, &data).unwrap();
    for (offset, len) in
        [(0, 1 << 20), (1000, 5000), (0, 0), (1 << 20, 4096), (0, u64::MAX), (u64::MAX, 1)]
    {
        file.start_write_out(offset, len);
        let mut read = vec![0; data.len()];
        file.read_at(0, &mut read).unwrap();
        assert!(read == data, "{offset} {len}");
    }
    file.sync().unwrap();
    assert_eq!(file.size(), 1 << 20);
}

/// P7: the result of fdatasync(2) is the result of the barrier. fdatasync(2) fails on a file of
/// /proc, although that is a regular file.
#[test]
fn an_error_of_the_host_is_an_error_of_the_barrier() {
    let file =
        FileStorage::open_unlocked(Path::new("/proc/self/limits"), Access::ReadOnly).unwrap();
    assert_eq!(file.sync().unwrap_err().raw_os_error(), Some(Errno::INVAL.raw_os_error()));
}

/// Protects: a range of which the host has only the first page in memory is a miss. A buffer with
/// only its beginning filled is never returned as an answer.
#[test]
fn a_range_that_is_partly_in_memory_is_a_miss() {
    const PAGE: usize = 4096;
    const PAGES: usize = 64;
    let (_dir, path) = scratch(0);
    let content: Vec<u8> = (0..PAGES * PAGE).map(|at| (at / PAGE + 1) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let file = FileStorage::open(&path, Access::ReadOnly).unwrap();
    let mut whole = vec![0; content.len()];
    if !file.read_cached(0, &mut whole) {
        println!(
            "skipped: this file system does not read from memory only, or has dropped the file already"
        );
        return;
    }
    assert!(whole == content);
    file.file.sync_all().unwrap();
    rustix::fs::fadvise(&file.file, 0, None, Advice::DontNeed).unwrap();
    // Disables readahead, so that only the requested page is read.
    rustix::fs::fadvise(&file.file, 0, None, Advice::Random).unwrap();
    file.read_at(0, &mut [0; PAGE]).unwrap();
    let mut buf = vec![0xee; content.len()];
    let answered = file.read_cached(0, &mut buf);
    assert!(
        !answered || buf == content,
        "{} of {PAGES} pages were filled",
        buf.chunks(PAGE).filter(|page| page[0] != 0xee).count()
    );
    // After a read that waits for the disk, the whole range is in memory.
    file.read_at(0, &mut buf).unwrap();
    assert!(buf == content);
}

/// Protects: a file on a tmpfs is read without waiting, although preadv2(2) does not know that it
/// is in memory. One that has become shorter is a miss, and the read that may wait reports it.
#[test]
fn a_file_on_a_tmpfs_is_in_memory() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        println!("skipped: there is no /dev/shm");
        return;
    };
    let path = dir.path().join("file");
    std::fs::write(&path, [7; 10_000]).unwrap();
    let file = FileStorage::open(&path, Access::ReadOnly).unwrap();
    if !file.is_in_memory {
        println!("skipped: /dev/shm is not a tmpfs");
        return;
    }
    let mut buf = [0; 5000];
    assert!(file.read_cached(5000, &mut buf) && buf == [7; 5000]);
    assert!(!file.read_cached(5001, &mut buf), "beyond the end");
    File::options().write(true).open(&path).unwrap().set_len(9000).unwrap();
    assert!(!file.read_cached(5000, &mut buf));
    assert!(file.read_at(5000, &mut buf).is_err());
}

/// Protects: P9, P10. Every way to change the bytes of a file changes its version, also directly
/// after the file was made. A new name, a lost name, another mode, and another file under its name
/// do not.
#[test]
fn a_version_tells_changes_of_bytes_from_changes_of_names() {
    use std::os::unix::fs::PermissionsExt;
    type Change = fn(&Path);
    let changes: [(&str, Change); 5] = [
        ("overwritten", |path| {
            File::options().write(true).open(path).unwrap().write_all_at(&[2], 4096).unwrap()
        }),
        ("written anew", |path| std::fs::write(path, vec![2; 8192]).unwrap()),
        ("longer", |path| {
            File::options().append(true).open(path).map(|file| file.set_len(9000)).unwrap().unwrap()
        }),
        ("shorter", |path| {
            File::options().write(true).open(path).map(|file| file.set_len(1)).unwrap().unwrap()
        }),
        ("another time", |path| {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(std::time::UNIX_EPOCH)
                .unwrap();
        }),
    ];
    let harmless: [(&str, Change); 4] = [
        ("renamed", |path| std::fs::rename(path, path.with_extension("old")).unwrap()),
        ("replaced", |path| {
            std::fs::write(path.with_extension("new"), "new").unwrap();
            std::fs::rename(path.with_extension("new"), path).unwrap();
        }),
        ("removed", |path| std::fs::remove_file(path).unwrap()),
        ("linked", |path| {
            std::fs::hard_link(path, path.with_extension("link")).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }),
    ];
    let seen = |change: Change| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        std::fs::write(&path, vec![1; 8192]).unwrap();
        let file = FileStorage::open(&path, Access::ReadOnly).unwrap();
        let before = file.settle().unwrap();
        drop(File::options().write(true).open(&path).unwrap());
        assert_eq!(file.version(Ask::AsStat).unwrap(), before, "an open changes nothing");
        change(&path);
        let asked = [Ask::Known, Ask::AsStat, Ask::Anew].map(|ask| file.version(ask).unwrap());
        assert_eq!(asked, [asked[0]; 3], "a file of this machine");
        asked[0] != before
    };
    for (what, change) in changes {
        assert!(seen(change), "{what}");
    }
    for (what, change) in harmless {
        assert!(!seen(change), "{what}");
    }
}
