//! The fetcher as a process: what it warns of, why it cannot start, and how it is reaped.

use super::*;
use crate::support::CORDISK;

const SIZE: u64 = 8 * MIB;

/// What no log may contain.
const SECRET: &str = "verysecret";

/// A program that is the fetcher, until there is a file `broken`: then it cannot start.
fn breakable(remote: &Remote) -> String {
    let script = format!(
        "#!/bin/sh\nif test -e {}; then\n  echo 'cannot load https://host/lib?sig={SECRET}' >&2\n  exit 127\nfi\nexec {} \"$@\"\n",
        remote.scratch.join("broken").display(),
        Path::new(CORDISK).with_file_name("cordisk-fetcher").display(),
    );
    let program = remote.scratch.write("fetcher", script.as_bytes());
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&program, executable).expect("chmod");
    program.display().to_string()
}

/// Protects: a file of secrets that every user may read is reported by the command that the user
/// has typed, and in the log of the daemon.
#[test]
fn secrets_that_everybody_may_read_are_reported() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let headers = remote.scratch.write("headers", format!("X-Key: {SECRET}\n").as_bytes());
    fs::set_permissions(&headers, std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .expect("chmod");
    let text = format!(
        "[[source]]\nprefix = \"{}\"\nheader-file = \"{}\"\n",
        remote.prefix(),
        headers.display()
    );
    let remote = remote.sources(&text);
    let warning = format!("{}: every user of this host may read this secret", headers.display());
    let overlay = remote.overlay.to_str().expect("UTF-8");
    let (mountpoint, log) = (remote.scratch.join("vm.raw"), remote.scratch.join("vm.log"));
    let paths = [&mountpoint, &log].map(|path| path.to_str().expect("UTF-8").to_owned());
    let mount = ["mount", "--backing-url", remote.prefix(), "--log", &paths[1], overlay, &paths[0]];
    let create = ["create", "-b", &remote.url, "-F", "raw", overlay];
    let fill = ["cache", "fill", &remote.url];
    for arguments in [&create[..], &fill, &mount] {
        let done = run_within(remote.command(arguments).env_remove("RUST_LOG"), PROMPT);
        assert!(done.status.success(), "{done:?}");
        assert!(done.stderr.contains(&warning), "{arguments:?}: {done:?}");
        assert!(!done.stderr.contains(SECRET), "{done:?}");
    }
    run_ok(remote.scratch.cordisk().args(["umount", &paths[0]]));
    let logged = fs::read_to_string(&log).expect("log");
    assert!(logged.contains(&warning) && !logged.contains(SECRET), "{logged}");
}

/// Protects: if the fetcher cannot start, the error of the command names the reason in one line.
#[test]
fn a_fetcher_that_cannot_start_is_named() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let program = breakable(&remote);
    fs::write(remote.scratch.join("broken"), "").expect("break it");
    for (program, want) in [
        (
            program.as_str(),
            "the fetcher ends before it answers (cannot load https://host/lib?… (exit status: 127))",
        ),
        ("/nowhere/cordisk-fetcher", "/nowhere/cordisk-fetcher: not installed"),
        ("/dev/null", "starting /dev/null: Permission denied"),
    ] {
        let remote = Remote {
            environment: vec![("CORDISK_FETCHER".into(), program.into())],
            ..Remote::new(&remote.url, Vec::new())
        };
        fs::create_dir_all(remote.cache()).expect("cache");
        let overlay = remote.overlay.display().to_string();
        qemu::img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            &remote.url,
            "-F",
            "raw",
            &overlay,
            "8M",
        ]);
        let prefix = remote.prefix().to_owned();
        let said = remote.refused(&["--backing-url", &prefix]);
        assert!(said.contains(want) && !said.contains(SECRET), "{said}");
        let mut create = remote.command(&["create", "-b", &remote.url, "-F", "raw", "none.qcow2"]);
        let done = run_within(&mut create, PROMPT);
        assert_refused(&done);
        assert!(done.stderr.contains(want) && !done.stderr.contains(SECRET), "{done:?}");
    }
}

/// Protects: what a fetcher prints goes to the log of the daemon, without secrets, and the error of
/// a read that no fetcher answers names the reason.
#[test]
fn a_fetcher_that_cannot_start_again_is_in_the_log() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let program = breakable(&remote);
    let log = remote.scratch.join("vm.log");
    let remote = remote.option("--source-timeout", "1").environment("CORDISK_FETCHER", &program);
    let remote = remote.create();
    let disk = remote.mount().args(&["--log", log.to_str().expect("UTF-8")]).start();
    let mut guest = remote.guest(&disk);
    guest.check(0..MIB);
    fs::write(remote.scratch.join("broken"), "").expect("break it");
    kill_process(fetcher_of(&disk), Signal::KILL).expect("kill");
    let missing = std::os::unix::fs::FileExt::read_at(&guest.file, &mut [0; 512], 5 * MIB);
    assert_eq!(crate::support::errno(missing), rustix::io::Errno::IO);
    let reason = "cannot load https://host/lib?…";
    for want in [
        "fetcher: signal: 9 (SIGKILL)".to_owned(),
        format!("fetcher: {reason}"),
        "fetcher: exit status: 127".to_owned(),
        format!("the fetcher does not answer: {reason} (exit status: 127)"),
    ] {
        wait_until(&want, || fs::read_to_string(&log).expect("log").contains(&want));
    }
    fs::remove_file(remote.scratch.join("broken")).expect("repair it");
    guest.check_all();
    assert!(!fs::read_to_string(&log).expect("log").contains(SECRET));
    drop(guest.file);
    disk.umount();
}

/// Protects: no fetcher that was killed stays a zombie, also if no further one is started.
#[test]
fn fetchers_are_reaped() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    for turn in 0..4 {
        guest.check(turn * MIB..(turn + 1) * MIB);
        let fetcher = fetcher_of(&disk);
        kill_process(fetcher, Signal::KILL).expect("kill");
        wait_until("the fetcher is reaped", || {
            !Path::new(&format!("/proc/{}", fetcher.as_raw_nonzero())).exists()
        });
        let left = descendants(disk.pid());
        assert!(left.iter().all(|pid| is_running(*pid)), "zombies among {left:?}");
    }
    guest.check_all();
    drop(guest.file);
    disk.umount();
}
