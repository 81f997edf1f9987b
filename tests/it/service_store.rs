//! The main process of a service is killed, and the next one goes on with the disk: the descriptors
//! are in the store of a real service manager, systemd, which runs as the manager of a user here.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::daemon::server_of;
use crate::support::{
    CORDISK, MIB, Ours, Pattern, Scratch, assert_same, poll, qemu, read_at, run_ok, run_within,
};

const UNIT: &str = include_str!("../../contrib/systemd/cordisk@.service");
const SYSTEMD: &str = "/lib/systemd/systemd";
/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A service manager of its own: in a mount namespace, where /run/systemd says that the host was
/// booted with systemd, and in a control group.
struct Manager {
    process: Ours,
    runtime: PathBuf,
    group: PathBuf,
}

impl Manager {
    /// Starts the manager, with the unit `name` of this text. Returns `None` if it does not come up
    /// here, after a line that says why.
    fn start(scratch: &Scratch, name: &str, unit: &str) -> Option<Manager> {
        let (units, runtime) = (scratch.dir("units"), scratch.dir("xdg"));
        fs::write(units.join(name), unit).expect("unit");
        let group = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup"]
            .iter()
            .map(Path::new)
            .find(|group| group.join("cgroup.procs").exists())?;
        let group = group.join(format!("cordisk-test-{}", std::process::id()));
        let log = fs::File::create(scratch.join("systemd.log")).expect("log");
        let script = r#"
            set -e
            mkdir -p /run/systemd
            mount -t tmpfs tmpfs /run/systemd
            mkdir /run/systemd/system "$0"
            echo $$ > "$0/cgroup.procs"
            exec "$1" --user --log-target=console --unit=basic.target"#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c", script]);
        command.arg(&group).arg(SYSTEMD).env("XDG_RUNTIME_DIR", &runtime);
        // The empty last part stands for the default directories.
        command.env("SYSTEMD_UNIT_PATH", format!("{}:", units.display()));
        command.env_remove("DBUS_SESSION_BUS_ADDRESS");
        command.stdin(Stdio::null()).stderr(log.try_clone().expect("log")).stdout(log);
        let manager = Manager { process: Ours(command.spawn().expect("unshare")), runtime, group };
        let is_up = poll(Duration::from_secs(20), || {
            let asked =
                run_within(&mut manager.systemctl(&["is-active", "basic.target"]), PATIENCE);
            asked.status.success().then_some(())
        });
        if is_up.is_none() {
            let log = fs::read_to_string(scratch.join("systemd.log")).unwrap_or_default();
            eprintln!("skipped: no service manager comes up here:\n{log}");
            return None;
        }
        Some(manager)
    }

    fn systemctl(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        let process = self.process.pid().as_raw_nonzero();
        command.arg(format!("--mount=/proc/{process}/ns/mnt"));
        command.args(["systemctl", "--user"]).args(words);
        command.env("XDG_RUNTIME_DIR", &self.runtime).stdin(Stdio::null());
        command
    }

    /// A path as the manager and its services see it.
    fn path(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.process.pid().as_raw_nonzero()));
        root.join(path.strip_prefix("/").expect("absolute"))
    }

    /// The main process of the unit.
    fn main_of(&self, unit: &str) -> Option<Pid> {
        let said = run_ok(&mut self.systemctl(&["show", "--property=MainPID", "--value", unit]));
        Pid::from_raw(said.trim().parse().ok()?)
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.systemctl(&["stop", "cordisk@vm.service"]).output();
        let _ = self.systemctl(&["exit"]).output();
        let _ = poll(Duration::from_secs(10), || self.process.0.try_wait().expect("wait"));
        // What is left in the group belongs to this test alone.
        for _ in 0..100 {
            let _ = fs::write(self.group.join("cgroup.kill"), "1");
            let left = fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
            let processes = left.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?));
            for process in processes {
                let _ = kill_process(process, Signal::KILL);
            }
            if fs::remove_dir(&self.group).is_ok() || !self.group.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The unit as it is installed, for files in `scratch`.
fn unit_in(scratch: &Scratch) -> String {
    UNIT.replace("/usr/bin/cordisk", CORDISK)
        .replace("/etc/cordisk", scratch.path().to_str().expect("UTF-8"))
        .replace("RestartSec=2", "RestartSec=100ms")
}

/// Protects: P17 for a service whose main process dies. The service is started again by systemd and
/// goes on with the disk: an open file reads and writes on, also what was not flushed, and the
/// image is whole at the end. A service that is stopped leaves nothing in the store.
#[test]
fn the_next_main_process_goes_on() {
    requires!("/dev/fuse", "qemu-img", "root", SYSTEMD, "unshare", "nsenter", "bash");
    let scratch = Scratch::new();
    let mut expected = Pattern::new(67, 1).bytes(0, 4 * MIB);
    let base = scratch.write("base.raw", &expected);
    let (image, disk) = (scratch.join("vm.qcow2"), scratch.write("vm.raw", b""));
    qemu::create(&image, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
    // Another user serves the disk, so that the signals of the main process need a capability. No
    // other test uses that user: one counts the processes of nobody.
    scratch.open_to_all();
    let options = "--transport dev --user 47110:47110 --allow-other --mode 0666";
    let conf = format!(
        "IMAGE={}\nMOUNTPOINT={}\nOPTIONS={options} --log {}\nCORDISK_RUNTIME_DIR={}\n",
        image.display(),
        disk.display(),
        scratch.join("log").display(),
        scratch.dir("run").display(),
    );
    scratch.write("vm.conf", conf.as_bytes());
    let unit = "cordisk@vm.service";
    let Some(manager) = Manager::start(&scratch, "cordisk@.service", &unit_in(&scratch)) else {
        return;
    };
    let log = || fs::read_to_string(scratch.join("log")).unwrap_or_default();
    let started = run_within(&mut manager.systemctl(&["start", unit]), PATIENCE);
    let status = || run_within(&mut manager.systemctl(&["status", unit]), PATIENCE).stdout;
    assert!(started.status.success(), "{started:?}\n{}\n{}", status(), log());
    if log().contains("no other one takes the disk over") {
        eprintln!("skipped: {}", log());
        return;
    }
    let seen = manager.path(&disk);
    let file = fs::File::options().read(true).write(true).open(&seen).expect("open");
    for life in 1..=3_u8 {
        let data = [life; 100_000];
        let at = u64::from(life) * MIB + 12_345;
        file.write_all_at(&data, at).expect("write");
        expected[at as usize..][..data.len()].copy_from_slice(&data);
        let main = manager.main_of(unit).expect("main process");
        let server = server_of(main);
        kill_process(main, Signal::KILL).expect("kill");
        assert_same("after the death", &read_at(&file, 0, expected.len()), &expected);
        let next = poll(PATIENCE / 3, || {
            let next = manager.main_of(unit).filter(|next| *next != main)?;
            (server_of(next) != server).then_some(())
        });
        assert!(next.is_some(), "no next main process\n{}\n{}", status(), log());
        assert!(log().contains("this one goes on with the disk"), "{}", log());
    }
    let said = run_within(&mut manager.systemctl(&["reload", unit]), PATIENCE);
    assert!(said.status.success(), "{said:?}\n{}", log());
    assert_same("after a reload", &read_at(&file, 0, expected.len()), &expected);
    drop(file);
    run_ok(&mut manager.systemctl(&["stop", unit]));
    assert_same("nothing is mounted", &fs::read(&seen).expect("read"), b"");
    // A stopped service begins anew.
    run_ok(&mut manager.systemctl(&["start", unit]));
    assert_same("mounted again", &fs::read(&seen).expect("read"), &expected);
    run_ok(&mut manager.systemctl(&["stop", unit]));
    drop(manager);
    qemu::assert_clean(&image);
    assert_same("the image", &qemu::read_all(&image), &expected);
}
