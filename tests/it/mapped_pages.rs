//! Every promise that all is written back (P15) includes data that a program has written to a
//! shared mapping of the disk and that the kernel has not sent yet. The daemon asks the kernel for
//! that data before it flushes, for every way to end.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::hung_backing::Stopped;
use crate::support::{
    Daemon, MIB, Mount, Pattern, Rig, Scratch, assert_same, qemu, run_within, wait_until,
};

/// Long enough for several expiries of a bounded wait.
const PATIENCE: Duration = Duration::from_secs(60);

/// Maps the disk, writes TEXT at OFFSET for each line "OFFSET TEXT", and confirms it.
const PROGRAM: &str = r"
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
disk = mmap.mmap(fd, 0)
touched = [disk[int(at)] for at in sys.argv[2:]]
print('mapped', flush=True)
for line in sys.stdin:
    at, text = line.split()
    disk[int(at):int(at) + len(text)] = text.encode()
    print('written', flush=True)
os._exit(0)
";

/// A program that has the disk mapped.
struct Mapper {
    child: Child,
    orders: ChildStdin,
    said: Receiver<String>,
}

impl Mapper {
    /// Returns when it has mapped the disk and read the pages at `touched`. `None`, with a reason
    /// on standard error, if the disk cannot be mapped.
    fn start(disk: &Path, touched: &[u64]) -> Option<Mapper> {
        let mut command = Command::new("python3");
        command.args(["-c", PROGRAM]).arg(disk).args(touched.iter().map(u64::to_string));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3");
        let (orders, output) =
            (child.stdin.take().expect("stdin"), child.stdout.take().expect("stdout"));
        let (sender, said) = channel();
        std::thread::spawn(move || {
            BufReader::new(output)
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        let mapper = Mapper { child, orders, said };
        if mapper.said.recv_timeout(PATIENCE).is_err() {
            eprintln!(
                "skipped: this kernel does not map a FUSE file that is open for direct I/O (Linux 6.6 does)"
            );
            return None;
        }
        Some(mapper)
    }

    fn write(&mut self, at: u64, text: &str) {
        writeln!(self.orders, "{at} {text}").expect("an order");
        assert_eq!(self.said.recv_timeout(PATIENCE).as_deref(), Ok("written"));
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn terminate_and_wait_for(disk: &Daemon, what: &str) {
    disk.signal(Signal::TERM);
    wait_until(what, || disk.log().contains(what));
}

/// Protects: P15 for dirty pages of shared mappings. After the first SIGTERM ("all is written back,
/// serving on") earlier writes survive even a kill. A second SIGTERM, QMP `quit` and `umount
/// --lazy` detach the disk and lose no earlier write.
#[test]
fn nothing_that_was_written_to_a_mapping_is_lost() {
    requires!("/dev/fuse", "qemu-img", "python3");
    for ending in ["SIGTERM twice", "SIGKILL after SIGTERM", "quit", "umount --lazy"] {
        let rig = Rig::new(4 * MIB);
        let mut disk = rig.mount().qmp().start();
        let Some(mut mapper) = Mapper::start(disk.path(), &[]) else { return };
        let mut want = rig.content.clone();
        mapper.write(MIB + 100, "before");
        want[(MIB + 100) as usize..][..6].copy_from_slice(b"before");
        match ending {
            "SIGTERM twice" => {
                terminate_and_wait_for(&disk, "all is written back, serving on");
                mapper.write(2 * MIB, "after");
                want[(2 * MIB) as usize..][..5].copy_from_slice(b"after");
                disk.signal(Signal::TERM);
            }
            "SIGKILL after SIGTERM" => {
                terminate_and_wait_for(&disk, "all is written back, serving on");
                disk.die();
                assert_same(ending, &qemu::read_all(&rig.overlay), &want);
                continue;
            }
            "quit" => drop(disk.client().ok("quit", json!({}))),
            _ => {
                let mut umount = rig.scratch.cordisk();
                let done = run_within(umount.args(["umount", "--lazy"]).arg(disk.path()), PATIENCE);
                assert!(done.status.success(), "{done:?}");
            }
        }
        let status = disk
            .ended_within(PATIENCE)
            .unwrap_or_else(|| panic!("{ending}: it does not end\n{}", disk.log()));
        assert!(status.success(), "{ending}: {status}\n{}", disk.log());
        drop(mapper);
        rig.assert_overlay(&want);
    }
}

/// Protects: a page that cannot be written back, because its cluster must be completed from a
/// hanging backing file, does not prevent the end of the daemon; the log does not claim that all is
/// written back.
#[test]
fn a_page_that_hangs_does_not_keep_the_daemon() {
    requires!("/dev/fuse", "qemu-img", "python3");
    let scratch = Scratch::new();
    let served = scratch.join("served.qcow2");
    qemu::create_full(&served, 4 * MIB, "", Pattern::new(44, 1));
    let lower = Mount::named(&scratch, &served, "lower").start();
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some((lower.path().to_str().expect("UTF-8"), "raw")));
    // Without copy-on-read the cluster of the page stays missing although the page was read.
    let mut upper = Mount::named(&scratch, &overlay, "upper").args(&["--no-copy-on-read"]).start();
    let Some(mut mapper) = Mapper::start(upper.path(), &[MIB]) else { return };
    mapper.write(MIB, "page");
    let stopped = Stopped::stop(lower.server_pid());
    terminate_and_wait_for(&upper, "not all could be written back, serving on");
    // The kernel ends the process when the read in the lower disk returns.
    terminate_and_wait_for(&upper, "leaving without them");
    assert!(!upper.log().contains("all is written back"), "{}", upper.log());
    drop((mapper, stopped));
    assert!(upper.ended_within(PATIENCE).is_some(), "it does not end\n{}", upper.log());
    qemu::assert_not_corrupt(&overlay); // opens the base as well
    lower.umount();
}
