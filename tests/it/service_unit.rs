//! The systemd unit: settings that it must not have, the verdict of systemd-analyze, and its
//! commands.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use crate::support::{
    CORDISK, MIB, Ours, Pattern, Scratch, assert_same, mounts, poll, qemu, run_ok, run_within,
    wait_until,
};

const UNIT: &str = include_str!("../../contrib/systemd/cordisk@.service");
const PROGRAM: &str = "/usr/bin/cordisk";

/// The settings of the unit, in order.
fn settings() -> Vec<(&'static str, &'static str)> {
    let lines = UNIT.lines().filter(|line| !line.starts_with(['#', '[']));
    lines.filter_map(|line| line.split_once('=')).collect()
}

fn setting(name: &str) -> &'static str {
    let found: Vec<_> = settings().into_iter().filter(|(key, _)| *key == name).collect();
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found[0].1
}

/// Protects: the mount is visible to the rest of the system: no setting gives the service a mount
/// namespace of its own (systemd.exec(5), and `exec_needs_mount_namespace()` in its source). Also,
/// openat2(2) works; RestrictSUIDSGID= would make it fail with ENOSYS.
#[test]
fn no_setting_hides_the_mount_or_takes_openat2_away() {
    const FORBIDDEN: &[&str] = &[
        "BindPaths",
        "BindReadOnlyPaths",
        "DynamicUser",
        "ExecPaths",
        "ExtensionDirectories",
        "ExtensionImages",
        "InaccessiblePaths",
        "LogNamespace",
        "MountAPIVFS",
        "MountFlags",
        "MountImages",
        "NoExecPaths",
        "PrivateDevices",
        "PrivateIPC",
        "PrivateMounts",
        "PrivateNetwork",
        "PrivateTmp",
        "PrivateUsers",
        "ProcSubset",
        "ProtectControlGroups",
        "ProtectHome",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectProc",
        "ProtectSystem",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "RestrictSUIDSGID",
        "RootDirectory",
        "RootImage",
        "TemporaryFileSystem",
        "User",
    ];
    for (name, value) in settings() {
        assert!(!FORBIDDEN.contains(&name), "{name}={value}");
    }
    assert_eq!(
        (setting("Type"), setting("NotifyAccess"), setting("KillMode")),
        ("notify", "main", "mixed")
    );
    for call in ["landlock_restrict_self", "seccomp", "@mount"] {
        assert!(
            settings().iter().any(|(name, value)| *name == "SystemCallFilter"
                && !value.starts_with('~')
                && value.contains(call)),
            "{call}"
        );
    }
}

/// Protects: systemd knows every setting and reports no problem.
#[test]
fn systemd_finds_nothing_wrong() {
    requires!("systemd-analyze");
    let scratch = Scratch::new();
    let unit = scratch.write("cordisk@example.service", UNIT.replace(PROGRAM, CORDISK).as_bytes());
    let done = run_within(
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit),
        Duration::from_secs(60),
    );
    let ours: Vec<&str> = done.stderr.lines().filter(|line| line.contains("cordisk@")).collect();
    assert!(ours.is_empty() && done.status.success(), "{done:?}");
}

/// Expands variables like systemd.service(5): `$WORD` as a word of its own is split at spaces,
/// `${WORD}` is not.
fn expanded(line: &str, environment: &[(&str, String)]) -> Vec<String> {
    let value = |name: &str| {
        environment
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.clone())
            .unwrap_or_default()
    };
    let words = line.split_whitespace().flat_map(|word| {
        match word.strip_prefix("${").and_then(|word| word.strip_suffix('}')) {
            Some(name) => vec![value(name)],
            None => match word.strip_prefix('$') {
                Some(name) => value(name).split_whitespace().map(str::to_owned).collect(),
                None => vec![word.to_owned()],
            },
        }
    });
    words.collect()
}

/// Protects: the commands of the unit work with the values of a configuration file. The service
/// starts, reports that it is ready, and is stopped: if the disk is in use, by the second SIGTERM,
/// which systemd sends itself; otherwise by an unmount.
#[test]
fn its_commands_start_and_stop_a_disk() {
    requires!("/dev/fuse", "qemu-img", "root");
    for in_use in [false, true] {
        eprintln!("in use: {in_use}");
        let scratch = Scratch::new();
        let content = Pattern::new(66, 1).bytes(0, MIB);
        let base = scratch.write("base.raw", &content);
        let (image, disk) = (scratch.join("vm.qcow2"), scratch.write("vm.raw", b""));
        qemu::create(&image, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
        let socket = scratch.join("notify");
        let manager = UnixDatagram::bind(&socket).expect("notify socket");
        manager.set_read_timeout(Some(Duration::from_secs(30))).expect("timeout");
        let environment = [
            ("IMAGE", image.display().to_string()),
            ("MOUNTPOINT", disk.display().to_string()),
            (
                "OPTIONS",
                format!("--transport dev --qmp {} --device vm", scratch.join("vm.qmp").display()),
            ),
        ];
        let start = setting("ExecStart").replace(PROGRAM, CORDISK);
        let words = expanded(&start, &environment);
        assert!(words.len() == 11, "{words:?}");
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env("NOTIFY_SOCKET", &socket).stdin(Stdio::null());
        let mut service = Ours(command.spawn().expect("start"));
        let mut message = [0; 1000];
        // The descriptors for the store come before.
        let len = loop {
            let len = manager.recv(&mut message).expect("READY=1");
            if !message[..len].starts_with(b"FDSTORE") {
                break len;
            }
        };
        assert!(message[..len].starts_with(b"READY=1\n"));
        assert_same("the disk", &fs::read(&disk).expect("read"), &content);

        let user = in_use.then(|| fs::File::open(&disk).expect("open"));
        let reload = setting("ExecReload").replace(PROGRAM, CORDISK);
        let words = expanded(&reload, &environment);
        let said = run_within(Command::new(&words[0]).args(&words[1..]), Duration::from_secs(30));
        // A kernel before 6.9 sends no requests again.
        let is_refused = said.stderr.contains("cannot be replaced");
        assert!(is_refused || said.stdout.contains("served by cordisk"), "{said:?}");
        assert_same("after a reload", &fs::read(&disk).expect("read"), &content);
        let stop = setting("ExecStop")
            .strip_prefix("+/bin/sh -c '")
            .and_then(|line| line.strip_suffix('\''))
            .expect("a line for the shell");
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", stop])
            .env("MOUNTPOINT", &disk)
            .env("MAINPID", service.0.id().to_string());
        run_ok(&mut command);
        assert_eq!(mounts::at(&disk).is_some(), in_use, "what nobody uses is unmounted");
        if in_use {
            assert!(service.0.try_wait().expect("wait").is_none(), "in use: still served");
            kill_process(service.pid(), Signal::TERM).expect("systemd's SIGTERM");
        }
        let status = poll(Duration::from_secs(30), || service.0.try_wait().expect("wait"));
        assert!(status.is_some_and(|status| status.success()), "{status:?}");
        wait_until("it is not mounted", || mounts::at(&disk).is_none());
        drop(user);
        qemu::assert_clean(&image);
    }
}
