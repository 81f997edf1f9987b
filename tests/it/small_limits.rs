//! Limits of the process, and directories without space. A limit that is too small to serve a disk
//! is refused in one line, with nothing left mounted. A limit that is reached later costs at most a
//! request or a line of the log.

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use serde_json::json;

use crate::support::mounts::{self, MountGuard};
use crate::support::{
    CLUSTER, CORDISK, Finished, KIB, MIB, Rig, assert_same, errno, qemu, read_at, run_ok,
    run_within, wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);
/// An ordinary user with a name, which fusermount3 needs.
const NOBODY: u32 = 65_534;
/// A user that has only the processes of one test, because the limit counts all processes of a
/// user.
const CAROL: u32 = 61_772;

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

/// Runs `cordisk ARGS` below a shell that has set `limit`.
fn limited(rig: &Rig, limit: &str, args: &[&str]) -> Finished {
    let program = rig.scratch.cordisk();
    let mut command = Command::new("sh");
    command
        .env_remove("RUST_LOG")
        .envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
        .args(["-c", &format!("ulimit {limit} && exec \"$0\" \"$@\""), CORDISK])
        .args(args)
        .current_dir(rig.scratch.path());
    run_within(&mut command, LIMIT)
}

fn assert_one_line(done: &Finished, what: &str) {
    assert_eq!((done.status.code(), done.stderr.lines().count()), (Some(1), 1), "{what}: {done:?}");
    assert!(done.stderr.starts_with("cordisk: "), "{what}: {done:?}");
}

/// Protects: for every limit of processes of an ordinary user, a mount either works or gives one
/// line that says which limit to raise, with nothing left mounted. A limit never makes one of the
/// three processes fail later.
#[test]
fn every_number_of_processes_serves_or_is_refused() {
    requires!(
        "/dev/fuse",
        "qemu-img",
        "root",
        "unshare",
        "setpriv",
        "prlimit",
        "fusermount3",
        "mknod",
        "cmp"
    );
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let program = rig.scratch.join("cordisk");
    fs::copy(CORDISK, &program).expect("copy of the program");
    fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("chmod");
    let dir = rig.scratch.dir("own");
    fs::copy(&rig.base, dir.join("base.raw")).expect("copy");
    let base = dir.join("base.raw");
    qemu::create(&dir.join("top.qcow2"), None, "", Some((base.to_str().expect("UTF-8"), "raw")));
    for path in [dir.clone(), base, dir.join("top.qcow2")] {
        chown(path, Some(NOBODY), Some(NOBODY)).expect("chown");
    }
    let script = format!(
        "mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse; cd own
        export CORDISK_RUNTIME_DIR=$PWD/run
        user='setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups'
        trap '$user \"$1\" umount -l disk 2>/dev/null || true' EXIT
        for n in 1 2 3 4 5 6 7 8 20 40 44 46 48 50 51 52 53 54 55 56 58 60 64 80 2000; do
            if prlimit --nproc=$n $user \"$1\" mount top.qcow2 disk 2>err; then
                $user cmp disk base.raw
                $user \"$1\" umount disk
                echo $n serves
            else
                echo \"$n refused $? $(wc -l <err) $(cat err)\"
                if grep -q \"$PWD/disk \" /proc/self/mountinfo; then echo still mounted; exit 9; fi
            fi
            test ! -e disk
        done"
    );
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"])
        .arg(&program)
        .current_dir(rig.scratch.path());
    let done = run_within(&mut command, Duration::from_secs(240));
    assert!(done.status.success(), "{done:?}");
    let lines: Vec<&str> = done.stdout.lines().collect();
    for line in &lines {
        let is_fine = line.ends_with(" serves")
            || (line.contains(" refused 1 1 cordisk: ") && line.contains("ulimit -u"));
        assert!(is_fine, "{line}\n{}", done.stdout);
    }
    assert!(
        lines[0].starts_with("1 refused ") && lines.last() == Some(&"2000 serves"),
        "{}",
        done.stdout
    );
}

/// Protects: threads that cannot be started while the disk is served lose no request and make none
/// hang. A client for which there is no thread is disconnected, a job is refused, and everything
/// works again with a higher limit.
#[test]
fn no_request_is_lost_where_threads_cannot_be_started() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv", "prlimit");
    let rig = Rig::new(8 * MIB);
    rig.scratch.open_to_all();
    fs::set_permissions(&rig.base, Permissions::from_mode(0o644)).expect("chmod");
    let disk = rig
        .mount()
        .qmp()
        .args(&["--user", &format!("{CAROL}:{CAROL}"), "--allow-other"])
        .start_settled();
    let mut client = disk.client();
    fs::set_permissions(disk.path(), Permissions::from_mode(0o666)).expect("for the test");
    // That user sets the limit of its own processes, which needs no capability.
    let limit = |most: u32| {
        let user = CAROL.to_string();
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            &user,
            "--regid",
            &user,
            "--clear-groups",
            "prlimit",
            &format!("--nproc={most}:"),
            "--pid",
        ]);
        run_ok(command.arg(disk.server_pid().as_raw_nonzero().to_string()));
    };
    limit(1);

    let file = disk.open();
    let mut want = rig.content.clone();
    for (index, cluster) in want.chunks_mut(at(CLUSTER)).enumerate().skip(1).step_by(2) {
        cluster[..512].fill(index as u8);
    }
    // Reads of missing clusters, and writes to parts of others: both kinds of misses, many more at
    // the same time than there are workers.
    std::thread::scope(|scope| {
        for (index, cluster) in want.chunks(at(CLUSTER)).enumerate() {
            let (file, offset) = (&file, index as u64 * CLUSTER);
            scope.spawn(move || match index % 2 {
                0 => assert_same("a cold read", &read_at(file, offset, cluster.len()), cluster),
                _ => file.write_all_at(&cluster[..512], offset).expect("a write to a part"),
            });
        }
    });
    assert_same("afterwards", &disk.read_all(), &want);
    file.sync_all().expect("a flush");
    let warnings = disk.log().matches("requests wait for the workers that there are").count();
    assert!((1..=2).contains(&warnings), "one for each pool: {}", disk.log());
    assert!(disk.log().contains("ulimit -u"), "{}", disk.log());

    // A client is disconnected instead of waiting.
    let mut refused = UnixStream::connect(disk.socket()).expect("connect");
    refused.set_read_timeout(Some(LIMIT)).expect("timeout");
    let mut said = Vec::new();
    let read = refused.read_to_end(&mut said);
    assert!(read.is_ok() || errno(read) == Errno::CONNRESET, "{}", String::from_utf8_lossy(&said));
    let error = client.err("block-stream", json!({"device": "drive0"}));
    assert!(
        error.desc.contains("a thread for the stream") && error.desc.contains("ulimit -u"),
        "{error:?}"
    );
    assert_eq!(client.ok("query-jobs", json!({})), json!([]), "no job that has failed");
    assert_eq!(client.event_names(), Vec::<String>::new());

    limit(2000);
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    disk.client().ok("query-block", json!({}));
    drop((file, client));
    disk.umount();
    rig.assert_standalone(&want);
}

/// Protects: a limit of file sizes (RLIMIT_FSIZE) kills no program. A limit that leaves an image no
/// space is refused, one that leaves little gives a warning; beyond the limit a write fails and a
/// read does not.
#[test]
fn a_limit_of_file_sizes_is_refused_or_met_as_a_full_disk() {
    requires!("/dev/fuse", "qemu-img", "qemu-io", "sh");
    let rig = Rig::new(16 * MIB);
    let (overlay, disk) = (rig.overlay.to_str().expect("UTF-8"), rig.scratch.join("m"));
    let (path, base) = (disk.to_str().expect("UTF-8"), rig.base.to_str().expect("UTF-8"));
    // Blocks are units of 512 bytes.
    for (foreground, blocks) in [("-f", 100), ("", 100), ("-f", 2047), ("", 2047)] {
        let args: Vec<&str> = ["mount", foreground, overlay, path]
            .into_iter()
            .filter(|word| !word.is_empty())
            .collect();
        let done = limited(&rig, &format!("-f {blocks}"), &args);
        assert_one_line(&done, "mount");
        assert!(
            done.stderr.contains("limit of file sizes is ")
                && done.stderr.contains("needs 1 MiB: raise it (ulimit -f"),
            "{done:?}"
        );
        assert!(!disk.exists());
    }
    // Commands that write are not killed either.
    let done = limited(&rig, "-f 1", &["create", "new.qcow2", "-b", base, "-F", "raw"]);
    assert_one_line(&done, "create");
    assert!(
        done.stderr.contains("File too large") && !rig.scratch.join("new.qcow2").exists(),
        "{done:?}"
    );

    let mounted = limited(&rig, "-f 8192", &["mount", overlay, path]);
    assert!(mounted.status.success(), "{mounted:?}");
    assert!(
        mounted.stderr.contains("can grow to 4 MiB, which is the limit of file sizes"),
        "{mounted:?}"
    );
    let file = fs::File::options().read(true).write(true).open(&disk).expect("open");
    let mut want = rig.content.clone();
    let mut refused = 0;
    for offset in (0..16 * MIB).step_by(at(CLUSTER)) {
        let part = at(offset)..at(offset + CLUSTER);
        assert_same("a cold read", &read_at(&file, offset, part.len()), &want[part.clone()]);
        match file.write_all_at(&[5; 4096], offset) {
            Ok(()) => want[part.start..part.start + 4096].fill(5),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(Errno::FBIG.raw_os_error()));
                refused += 1;
            }
        }
    }
    assert!((1..256).contains(&refused), "{refused} of 256 writes were refused");
    file.sync_all().expect("a flush");
    drop(file);
    run_ok(rig.scratch.cordisk().arg("umount").arg(&disk));
    rig.assert_overlay(&want);

    // A limit below the size of an image of 4 MiB.
    let done = limited(&rig, "-f 6144", &["mount", overlay, path]);
    assert_one_line(&done, "an image beyond the limit");
    assert!(done.stderr.contains("limit of file sizes is 3 MiB") && !disk.exists(), "{done:?}");
    let done = limited(&rig, "-f 6144", &["mount", "--read-only", overlay, path]);
    assert!(done.status.success() && !done.stderr.contains("limit"), "it need not grow: {done:?}");
    assert_same("read-only", &fs::read(&disk).expect("read"), &want);
    run_ok(rig.scratch.cordisk().arg("umount").arg(&disk));
}

/// Protects: a disk needs no locked memory, over any transport.
#[test]
fn no_memory_may_be_locked() {
    requires!("/dev/fuse", "qemu-img", "sh");
    let rig = Rig::new(MIB);
    let (overlay, disk) = (rig.overlay.to_str().expect("UTF-8"), rig.scratch.join("m"));
    let done = limited(&rig, "-l 0", &["mount", overlay, disk.to_str().expect("UTF-8")]);
    assert!(done.status.success(), "{done:?}");
    assert_same("content", &fs::read(&disk).expect("read"), &rig.content);
    run_ok(rig.scratch.cordisk().arg("umount").arg(&disk));
    rig.assert_overlay(&rig.content);
}

/// Uses all space; removing `ballast` frees it.
fn fill(dir: &Path) {
    let ballast = fs::File::create(dir.join("ballast")).expect("ballast");
    let mut end = 0;
    while ballast.write_at(&[1; 4096], end).is_ok() {
        end += 4096;
    }
}

/// Mounts a file system without space for one more byte.
fn full(dir: &Path) -> MountGuard {
    let guard = MountGuard::tmpfs(dir, 64 * KIB);
    fill(dir);
    assert_eq!(errno(fs::write(dir.join("more"), "1")), Errno::NOSPC, "it is full");
    fs::remove_file(dir.join("more")).expect("remove");
    guard
}

/// Protects: a pidfile that cannot be written gives one line, and the disk is unmounted again; no
/// empty file is left.
#[test]
fn no_room_for_the_pidfile() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    let small = rig.scratch.dir("small");
    let guard = full(&small);
    for foreground in [&[][..], &["-f"]] {
        let mut command = rig.scratch.cordisk();
        command
            .env_remove("RUST_LOG")
            .arg("mount")
            .args(foreground)
            .arg("--pidfile")
            .arg(small.join("pid"));
        let done = run_within(command.arg(&rig.overlay).arg(rig.scratch.join("m")), LIMIT);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        let last = done.stderr.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("cordisk: ")
                && last.contains("small/pid")
                && last.contains("No space left on device"),
            "{done:?}"
        );
        assert!(foreground.len() == 1 || done.stderr.lines().count() == 1, "{done:?}");
        assert!(
            !rig.scratch.join("m").exists()
                && !small.join("pid").exists()
                && mounts::at(&rig.scratch.join("m")).is_none()
        );
    }
    guard.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: a log file without space delays no request. When there is space, the first line says
/// how many lines are missing, and each line is complete.
#[test]
fn no_room_for_the_log() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    let small = rig.scratch.dir("small");
    let guard = full(&small);
    // The last page of the log has some bytes left.
    let log = small.join("log");
    fs::remove_file(small.join("ballast")).expect("remove");
    fs::write(&log, "x".repeat(4050) + "\n").expect("log");
    fs::set_permissions(&log, Permissions::from_mode(0o600)).expect("chmod");
    fill(&small);
    let mut command = rig.scratch.cordisk();
    command
        .env_remove("RUST_LOG")
        .arg("mount")
        .arg("--log")
        .arg(&log)
        .arg(&rig.overlay)
        .arg(rig.scratch.join("m"));
    let done = run_within(&mut command, LIMIT);
    assert!(done.status.success(), "{done:?}");
    assert_same("content", &fs::read(rig.scratch.join("m")).expect("read"), &rig.content);
    let read = || fs::read_to_string(&log).expect("log");
    wait_until("the log is full", || read().len() == 4096);
    fs::remove_file(small.join("ballast")).expect("remove");
    run_ok(rig.scratch.cordisk().arg("umount").arg(rig.scratch.join("m")));
    let text = read();
    let lines: Vec<&str> = text.lines().skip(1).collect();
    assert!(lines[1].contains(" lines of the log were lost"), "behind the torn line: {lines:?}");
    assert!(
        lines[1..].iter().all(|line| line.starts_with('[') && line.matches('[').count() == 1),
        "{lines:?}"
    );
    assert!(lines.last().is_some_and(|line| line.ends_with("is closed")), "{lines:?}");
    guard.umount();
}

/// Protects: a runtime directory without space costs the registry entry, which one line reports,
/// and not the disk; no file is left there.
#[test]
fn no_room_for_the_entry() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    let small = rig.scratch.dir("small");
    let guard = full(&small);
    fs::set_permissions(&small, Permissions::from_mode(0o700)).expect("chmod");
    let mut command = Command::new(CORDISK);
    command
        .env_remove("RUST_LOG")
        .env(crate::support::RUNTIME_DIR, &small)
        .arg("mount")
        .arg(&rig.overlay)
        .arg(rig.scratch.join("m"));
    let done = run_within(&mut command, LIMIT);
    assert!(done.status.success() && done.stderr.contains("No space left on device"), "{done:?}");
    assert!(done.stderr.contains("only `umount` finds this disk"), "{done:?}");
    assert_same("content", &fs::read(rig.scratch.join("m")).expect("read"), &rig.content);
    let umount = Command::new(CORDISK)
        .env(crate::support::RUNTIME_DIR, &small)
        .arg("umount")
        .arg(rig.scratch.join("m"))
        .output();
    let umount = umount.expect("umount");
    assert!(umount.status.success(), "{umount:?}");
    let left = || {
        fs::read_dir(&small)
            .expect("list")
            .map(|entry| entry.expect("entry").file_name())
            .collect::<Vec<_>>()
    };
    wait_until("nothing is left but the ballast", || left() == ["ballast"]);
    guard.umount();
    rig.assert_overlay(&rig.content);
}
