//! System calls of FUSE over io_uring that fail: strace(1) injects the errors.
//!
//! strace changes a system call before seccomp checks it, and the changed call is not on the list
//! of allowed calls. So these disks run without a sandbox.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::service::Manager;
use crate::support::{
    Daemon, MIB, Ours, Rig, assert_same, errno, mounts, poll, read_at, run_within, wait_until,
    within,
};
use crate::transports::has_uring;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A strace that makes each io_uring_enter(2) of a process fail; dropping it detaches it from the
/// process.
struct Refusal {
    strace: Child,
    /// The process that is traced.
    pid: Pid,
    /// What strace prints about the process: a line for each call and for each stop of a thread.
    printed: PathBuf,
}

impl Refusal {
    /// Returns when every thread is traced; `None`, with a reason on stderr, if tracing is not
    /// possible here.
    fn begin(disk: &Daemon, error: &str) -> Option<Refusal> {
        let pid = disk.server_pid();
        let printed = disk.path().with_extension("strace");
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-e", "trace=io_uring_enter", "-o"]).arg(&printed);
        command.args(["-e", &format!("inject=io_uring_enter:error={error}")]);
        command.args(["-p", &pid.as_raw_nonzero().to_string()]);
        let strace = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("strace");
        let mut refusal = Refusal { strace, pid, printed };
        let began = poll(PATIENCE, || {
            let ended = refusal.strace.try_wait().expect("wait for strace").is_some();
            (ended || is_traced(pid)).then_some(!ended)
        });
        match began {
            // strace may have ended because the process has ended.
            Some(false) if mounts::at(disk.path()).is_some() => {
                eprintln!("skipped: strace may not trace here");
                None
            }
            Some(_) => Some(refusal),
            None => panic!("strace does not reach all threads"),
        }
    }
}

/// The threads of a process; none if the process is gone.
fn threads(pid: Pid) -> impl Iterator<Item = PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()));
    tasks.into_iter().flatten().filter_map(|task| Some(task.ok()?.path()))
}

/// Whether every thread of a process has a tracer, or the process is gone.
fn is_traced(pid: Pid) -> bool {
    threads(pid).filter_map(|thread| fs::read_to_string(thread.join("status")).ok()).all(|state| {
        state
            .lines()
            .any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
    })
}

impl Refusal {
    /// Whether strace has seen every thread of the process stop.
    fn has_seen_all_stop(&self) -> bool {
        let printed = fs::read_to_string(&self.printed).unwrap_or_default();
        let stopped: HashSet<&str> = printed
            .lines()
            .filter(|line| line.contains("--- stopped by SIGSTOP ---"))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        threads(self.pid).all(|thread| {
            thread.file_name().is_some_and(|id| stopped.contains(&*id.to_string_lossy()))
        })
    }
}

impl Drop for Refusal {
    /// Detaches strace while all threads of the process are stopped. strace replaces a call that it
    /// is to refuse by one that does not exist, and puts the error in when that has returned. A
    /// thread that loses its tracer between the two would get ENOSYS.
    fn drop(&mut self) {
        if !matches!(self.strace.try_wait(), Ok(None)) {
            return; // It ends when the process has ended.
        }
        let _ = kill_process(self.pid, Signal::STOP);
        let all_stopped = poll(PATIENCE, || {
            let ended = !matches!(self.strace.try_wait(), Ok(None));
            (ended || self.has_seen_all_stop()).then_some(())
        });
        let strace = i32::try_from(self.strace.id()).ok().and_then(Pid::from_raw);
        if let (Some(strace), Ok(None)) = (strace, self.strace.try_wait()) {
            let _ = kill_process(strace, Signal::INT);
        }
        if poll(PATIENCE, || self.strace.try_wait().ok().flatten()).is_none() {
            let _ = self.strace.kill();
            let _ = self.strace.wait();
        }
        let _ = kill_process(self.pid, Signal::CONT);
        if all_stopped.is_none() && !std::thread::panicking() {
            panic!("strace does not see all threads stop: {}", self.printed.display());
        }
    }
}

/// Protects: if the kernel permanently refuses to deliver requests, the disk ends, and requests of
/// programs fail instead of hanging.
#[test]
fn an_error_of_io_uring_that_stays_ends_the_disk() {
    requires!("/dev/fuse", "qemu-img", "strace");
    if !has_uring() {
        return;
    }
    for error in ["EBADF", "EIO"] {
        let rig = Rig::new(MIB);
        let mut disk = rig.mount().args(&["--transport", "uring", "--sandbox", "off"]).start();
        let file = disk.open();
        assert_same("before", &read_at(&file, 0, 4096), &rig.content[..4096]);
        let Some(_refusal) = Refusal::begin(&disk, error) else { return };
        let (path, reader) = (disk.path().to_owned(), file.try_clone().expect("dup"));
        // The read may arrive before the end of the disk or after it; it must fail in time.
        let read = within(PATIENCE, move || reader.read_at(&mut [0; 4096], 8192));
        let failed = errno(read.unwrap_or_else(|| panic!("{error}: a read hangs\n{}", disk.log())));
        eprintln!("{error}: a read is answered with {failed}");
        let status = disk.ended_within(PATIENCE);
        let log = disk.log();
        assert_eq!(status.and_then(|status| status.code()), Some(1), "{error}: {status:?}\n{log}");
        let named = log
            .lines()
            .filter(|line| {
                line.contains("cordisk: ") && line.contains("FUSE over io_uring, queue ")
            })
            .count();
        assert_eq!(named, 1, "{error}: the reason, once\n{log}");
        drop(file);
        wait_until("nothing is mounted any more", || mounts::at(&path).is_none());
        // The daemon has released the image.
        let again = rig.mount().args(&["--transport", "uring"]).start();
        assert_same("mounted again", &again.read_all(), &rig.content);
        again.umount();
    }
}

/// A program that reads a disk on request. It is a separate process that is started before the disk
/// hangs: a process that starts later closes its copies of the test's open files, and a close on a
/// hanging disk hangs as well. It must be dropped after the disk, because it may wait for it.
struct Reader(Ours);

impl Reader {
    fn prepare() -> Reader {
        let mut command = Command::new("sh");
        command
            .args(["-c", "read -r disk && exec cat -- \"$disk\""])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Reader(Ours(command.spawn().expect("sh")))
    }

    /// Starts reading; sends all bytes when the read is complete.
    fn read(&mut self, disk: &Path) -> Receiver<Vec<u8>> {
        let mut to = self.0.0.stdin.take().expect("stdin");
        writeln!(to, "{}", disk.display()).expect("tell the reader");
        let mut from = self.0.0.stdout.take().expect("stdout");
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.read_to_end(&mut bytes).map(|_| sender.send(bytes));
        });
        receiver
    }
}

/// Protects: while requests are not answered, `status` says so and the service manager gets no
/// pings; afterwards everything continues.
#[test]
fn a_transport_that_hangs_is_seen_and_may_come_back() {
    requires!("/dev/fuse", "qemu-img", "strace");
    if !has_uring() {
        return;
    }
    let rig = Rig::new(MIB);
    let manager = Manager::new(&rig.scratch);
    let mut reader = Reader::prepare();
    let disk =
        manager.starts(rig.mount().args(&["--transport", "uring", "--sandbox", "off"])).start();
    assert_same("before", &disk.read_all(), &rig.content);
    manager.wait_for_more_pings(2);
    let status =
        || run_within(rig.scratch.cordisk().arg("status").arg(disk.path()), PATIENCE).stdout;
    assert!(
        status().lines().next().is_some_and(|line| line.ends_with("  running")),
        "{}",
        status()
    );

    // The kernel returns "try again" every time, so no request arrives any more.
    let Some(refusal) = Refusal::begin(&disk, "EAGAIN") else { return };
    let hung = reader.read(disk.path());
    let text = status();
    assert!(text.lines().next().is_some_and(|line| line.ends_with("  not answering")), "{text}");
    wait_until("the pings end", || manager.is_silent());
    assert!(hung.try_recv().is_err(), "a request got through");
    let log = disk.log();
    assert!(
        log.contains("requests of the kernel are not answered") && log.contains("trying again"),
        "{log}"
    );

    drop(refusal);
    assert_same(
        "the read that hung",
        &hung.recv_timeout(PATIENCE).expect("it goes on"),
        &rig.content,
    );
    manager.wait_for_more_pings(3);
    let text = status();
    assert!(text.lines().next().is_some_and(|line| line.ends_with("  running")), "{text}");
    disk.umount();
}
