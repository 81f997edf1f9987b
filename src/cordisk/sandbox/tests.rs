//! Tests of the sandbox from inside. The test binary starts itself again for each attempt, since a
//! process cannot leave a sandbox.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::*;

const PROBE: &str = "CORDISK_SANDBOX_PROBE";
/// Number of the signal for a forbidden system call.
const SIGSYS: i32 = 31;
/// Exit status of a probe whose calls succeeded.
const PASSED: i32 = 77;
/// Exit status of a probe whose call was refused.
const REFUSED: i32 = 78;

/// Makes the attempt that [`PROBE`] names. Without that variable it does nothing; it is not a test
/// by itself.
#[test]
fn probe() {
    let Ok(what) = std::env::var(PROBE) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let file =
        File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
    let reader = File::open(&path).unwrap();
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let mut client = UnixStream::connect(dir.path().join("socket")).unwrap();
    // Created now, as the transport creates its rings. A kernel without io_uring has no ring to
    // test.
    let ring = io_uring::IoUring::builder().setup_r_disabled().build(1).ok();
    // Read now, because getppid(2) would end the process in the sandbox.
    let parent = rustix::process::getppid().unwrap();
    let (what, landlock_only) = match what.strip_prefix("landlock:") {
        Some(what) => (what.to_owned(), true),
        None => (what, false),
    };
    if landlock_only {
        assert_ne!(restrict_files().unwrap(), Part::Missing);
    } else {
        enter(Mode::Require).unwrap();
    }

    // Like the serving code, the attempt runs on a thread that is started in the sandbox.
    let attempt = std::thread::spawn(move || -> Result<(), io::Error> {
        match what.as_str() {
            "open" => File::open("/etc/passwd").map(drop),
            "open for writing" => File::options().write(true).open(&path).map(drop),
            "open as the device is opened" => {
                File::options().read(true).write(true).open(&path).map(drop)
            }
            "open the device" => match File::options().read(true).write(true).open(FUSE_DEVICE) {
                // If the device is missing or this user may not open it, the attempt has no
                // meaning.
                Err(error)
                    if !std::path::Path::new(FUSE_DEVICE).exists()
                        || !rustix::process::geteuid().is_root() =>
                {
                    eprintln!("skipped: {error}");
                    Ok(())
                }
                opened => opened.map(drop),
            },
            "create" => File::create(path.with_extension("new")).map(drop),
            "remove" => fs::remove_file(&path),
            "rename" => fs::rename(&path, path.with_extension("new")),
            "chmod" => {
                fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777))
            }
            "stat" => fs::metadata(&path).map(drop),
            "list" => fs::read_dir("/").map(drop),
            "execute" => Err(Command::new("/bin/true").exec()),
            "fork" => Command::new("/bin/true").spawn().map(drop),
            "unmount" => rustix::mount::unmount("/", rustix::mount::UnmountFlags::DETACH)
                .map_err(io::Error::from),
            "mount" => {
                rustix::mount::mount("none", "/", "tmpfs", rustix::mount::MountFlags::empty(), None)
                    .map_err(io::Error::from)
            }
            "socket" => std::net::UdpSocket::bind("127.0.0.1:0").map(drop),
            "listen" => std::net::TcpListener::bind("127.0.0.1:0").map(drop),
            "connect" => UnixStream::connect("/nowhere").map(drop),
            "kill" => rustix::process::test_kill_process(parent).map_err(io::Error::from),
            "priority of another" => {
                rustix::process::setpriority_process(Some(parent), 0).map_err(io::Error::from)
            }
            "another user" => {
                nix::unistd::setuid(nix::unistd::Uid::from_raw(65534)).map_err(io::Error::from)
            }
            "core files" => {
                let all = Rlimit { current: None, maximum: None };
                rustix::process::setrlimit(Resource::Core, all).map_err(io::Error::from)
            }
            "dumpable" => rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)
                .map_err(io::Error::from),
            // The call is refused also for a descriptor that was opened for reading only.
            "set an attribute" => {
                rustix::fs::fsetxattr(&reader, "user.x", b"1", XattrFlags::empty())
                    .map_err(io::Error::from)
            }
            "remove an attribute" => {
                rustix::fs::fremovexattr(&reader, "user.x").map_err(io::Error::from)
            }
            "change directory" => rustix::process::chdir("/").map_err(io::Error::from),
            "serve" => {
                file.write_all_at(&[7; 5000], 3)?;
                rustix::fs::fallocate(
                    &file,
                    rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                    0,
                    4096,
                )?;
                rustix::fs::fdatasync(&file)?;
                file.sync_all()?;
                let mut byte = [0];
                file.read_exact_at(&mut byte, 5002)?;
                assert_eq!((byte, file.metadata()?.len()), ([7], 5003));
                rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0))?;
                rustix::fs::fstatfs(&file)?;
                let (mut server, _) = listener.accept()?;
                server.set_write_timeout(Some(Duration::from_secs(1)))?;
                server.write_all(b"x")?;
                client.read_exact(&mut byte)?;
                server.shutdown(std::net::Shutdown::Both)?;
                std::thread::Builder::new()
                    .name("another".into())
                    .spawn(|| std::thread::sleep(Duration::from_millis(1)))?
                    .join()
                    .unwrap();
                drop(vec![1u8; 64 << 20]);
                // A thread lowers its priority.
                let nice = rustix::process::getpriority_process(None)?;
                rustix::process::setpriority_process(None, nice.max(10))?;
                rustix::fs::fadvise(
                    &file,
                    0,
                    std::num::NonZeroU64::new(4096),
                    rustix::fs::Advice::DontNeed,
                )?;
                Ok(())
            }
            "enable a ring" => ring
                .map_or(Ok(()), |ring: io_uring::IoUring| ring.submitter().register_enable_rings()),
            "register with a ring" => match ring {
                Some(ring) => ring.submitter().register_eventfd(-1),
                None => Err(Errno::NOSYS.into()),
            },
            "panic" => panic!("broken\n\u{1b}[31minvariant"),
            other => unreachable!("{other}"),
        }
    });
    let code = match attempt.join() {
        Ok(Ok(())) => PASSED,
        Ok(Err(error)) => {
            let refusals = [Errno::ACCESS, Errno::PERM].map(|errno| Some(errno.raw_os_error()));
            if refusals.contains(&error.raw_os_error()) { REFUSED } else { 1 }
        }
        Err(_) => 2,
    };
    // The process exits here, because the test harness does not work in the sandbox.
    std::process::exit(code);
}

fn try_it(what: &str) -> (ExitStatus, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sandbox::tests::probe", "--nocapture", "--test-threads=1"])
        .env(PROBE, what)
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

fn is_offered() -> bool {
    let offered = check(Mode::Require);
    if let Err(error) = &offered {
        eprintln!("skipped: {error}");
    }
    offered.is_ok()
}

#[test]
fn paths_are_refused() {
    if !is_offered() {
        return;
    }
    for what in
        ["open", "open for writing", "open as the device is opened", "create", "stat", "list"]
    {
        let (status, said) = try_it(what);
        assert_eq!(status.code(), Some(REFUSED), "{what}: {status:?}\n{said}");
    }
}

#[test]
fn everything_else_ends_the_process() {
    if !is_offered() {
        return;
    }
    for what in [
        "remove",
        "rename",
        "chmod",
        "execute",
        "fork",
        "unmount",
        "mount",
        "socket",
        "listen",
        "connect",
        "kill",
        "priority of another",
        "another user",
        "core files",
        "dumpable",
        "change directory",
        "set an attribute",
        "remove an attribute",
        "register with a ring",
    ] {
        if what == "register with a ring" && io_uring::IoUring::new(1).is_err() {
            continue;
        }
        let (status, said) = try_it(what);
        assert_eq!(status.signal(), Some(SIGSYS), "{what}: {status:?}\n{said}");
    }
}

/// Protects: Landlock alone refuses the calls that seccomp would stop too. Each of the two
/// mechanisms is tested on its own.
#[test]
fn landlock_alone_refuses_as_well() {
    if !is_offered() {
        return;
    }
    for what in [
        "open",
        "open for writing",
        "open as the device is opened",
        "create",
        "remove",
        "rename",
        "execute",
        "unmount",
        "mount",
        "list",
    ] {
        if matches!(what, "unmount" | "mount") && !rustix::process::geteuid().is_root() {
            continue;
        }
        let (status, said) = try_it(&format!("landlock:{what}"));
        assert_eq!(status.code(), Some(REFUSED), "{what}: {status:?}\n{said}");
    }
}

#[test]
fn what_serving_needs_is_left() {
    if !is_offered() {
        return;
    }
    for what in ["serve", "open the device", "enable a ring"] {
        let (status, said) = try_it(what);
        assert_eq!(status.code(), Some(PASSED), "{what}: {status:?}\n{said}");
    }
}

#[test]
fn a_panic_says_so_on_one_line() {
    if !is_offered() {
        return;
    }
    let (status, said) = try_it("panic");
    // The test harness would have exited with 101, and a killed process with no code.
    assert_eq!(status.code(), Some(2), "{status:?}\n{said}");
    let lines: Vec<_> = said.lines().filter(|line| line.contains("panicked")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains("broken\\n\\u{1b}[31minvariant"), "{said}");
}
