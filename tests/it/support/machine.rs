//! A virtual machine: QEMU with Debian's kernel, its root disk on a file under test, its console
//! read by the test.
//!
//! Messages of the guest to the test are lines that begin with `@ `. The other lines on the console
//! are for people.
//!
//! **Never:** leaves a QEMU behind, waits for ever.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::poll;

/// Files that `scripts/guest.sh` downloads.
pub const KERNEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/guest/vmlinuz");
pub const INITRAMFS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/guest/initramfs.gz");
pub const BUSYBOX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/guest/busybox");

/// How long a guest may print nothing. An emulated guest on a busy machine needs much of that.
const PATIENCE: Duration = Duration::from_secs(180);

/// The accelerator of QEMU: `CORDISK_TEST_ACCEL`, else KVM if this user may use it, else emulation.
/// A /dev/kvm on a processor without vmx or svm (some clouds offer that inside their guests) does
/// not boot every kernel.
pub fn accelerator() -> String {
    let usable = || OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    let in_hardware = || {
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        processor.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
    };
    std::env::var("CORDISK_TEST_ACCEL")
        .unwrap_or_else(|_| if in_hardware() && usable() { "kvm" } else { "tcg" }.to_owned())
}

/// A running guest. Dropping it kills QEMU.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    keyboard: ChildStdin,
    lines: Receiver<(Duration, String)>,
    /// All lines of the console, with times.
    console: Vec<String>,
    complaints: PathBuf,
}

impl Machine {
    /// Boots from `disk`, a raw file. `drive` has more options of QEMU for the disk, such as
    /// `cache=none`; `words` has more words of the kernel's command line. QEMU's own messages go to
    /// the file `complaints`.
    pub fn boot(disk: &Path, drive: &str, words: &str, complaints: &Path) -> Machine {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-monitor",
            "none",
            "-serial",
            "stdio",
        ]);
        command.args([
            "-accel",
            &accelerator(),
            "-m",
            "256",
            "-kernel",
            KERNEL,
            "-initrd",
            INITRAMFS,
        ]);
        command.arg("-append").arg(format!("console=ttyS0 quiet loglevel=3 panic=-1 {words}"));
        command.arg("-drive").arg(format!(
            "file.driver=file,file.filename={},format=raw,if=virtio,discard=unmap,{drive}",
            disk.display()
        ));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(complaints).expect("file for QEMU's complaints"));
        let mut child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let keyboard = child.stdin.take().expect("piped");
        let mut screen = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        let started = Instant::now();
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while screen.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                if sender
                    .send((started.elapsed(), String::from_utf8_lossy(&line).trim_end().to_owned()))
                    .is_err()
                {
                    return;
                }
                line.clear();
            }
        });
        Machine { child, keyboard, lines, console: Vec::new(), complaints: complaints.to_owned() }
    }

    /// Returns the guest's next message, without the `@ `; `None` when QEMU has ended.
    fn hear(&mut self) -> Option<String> {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok((time, line)) => {
                    self.console.push(format!("{:8.3} {line}", time.as_secs_f64()));
                    if let Some(said) = line.strip_prefix("@ ") {
                        return Some(said.to_owned());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the guest said nothing for {PATIENCE:?}\n{}", self.console())
                }
            }
        }
    }

    /// Waits for a message that begins with `word`; returns it with all messages before it.
    pub fn wait_for(&mut self, word: &str) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let line = self.hear().unwrap_or_else(|| {
                panic!("the guest ended before it said {word:?}\n{}", self.console())
            });
            assert!(!line.starts_with("FAILED"), "the guest says: {line}\n{}", self.console());
            let found = line.starts_with(word);
            said.push(line);
            if found {
                return said;
            }
        }
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) {
        writeln!(self.keyboard, "{line}")
            .and_then(|()| self.keyboard.flush())
            .expect("the guest's keyboard");
    }

    /// Whether QEMU still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait for QEMU").is_none()
    }

    /// Waits until the guest has powered off, which ends QEMU with status 0.
    pub fn wait_power_off(&mut self) {
        while self.hear().is_some() {}
        let status: Option<ExitStatus> =
            poll(PATIENCE, || self.child.try_wait().expect("wait for QEMU"));
        assert!(
            status.is_some_and(|status| status.success()),
            "QEMU ended with {status:?}\n{}",
            self.console()
        );
        eprintln!("{}", self.console());
    }

    /// Sends SIGKILL to QEMU: for the guest, the power fails. Returns its messages until then.
    pub fn kill9(&mut self) -> Vec<String> {
        self.child.kill().expect("kill QEMU");
        self.child.wait().expect("wait for QEMU");
        let said = std::iter::from_fn(|| self.hear()).collect();
        eprintln!("{}", self.console());
        said
    }

    /// Returns the console and QEMU's own messages.
    fn console(&self) -> String {
        let complaints = std::fs::read_to_string(&self.complaints).unwrap_or_default();
        format!(
            "--- console ({}), seconds since QEMU was started ---\n{}\n{complaints}",
            accelerator(),
            self.console.join("\n")
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
