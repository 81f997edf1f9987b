//! A QMP session with QEMU's own client library, `qemu.qmp` from PyPI. It is stricter than the
//! client of these tests: it ends the session if an error reply lacks the `id` of its command, and
//! refuses to negotiate if an event comes before the reply.
//!
//! `scripts/test.sh` installs the library into a virtual environment under `target/` and sets
//! `CORDISK_QMP_PYTHON` to its Python.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{MIB, Mount, Pattern, Scratch, assert_same, have, qemu, run_within};

#[test]
fn qemu_qmp_drives_a_stream_to_its_end() {
    requires!("qemu-img", "/dev/fuse");
    let Some(python) = python() else {
        have(&["python:qemu.qmp"]); // says what is missing, or fails
        return;
    };
    for command in ["block_stream", "block-stream"] {
        let scratch = Scratch::new();
        let size = 16 * MIB;
        let base = scratch.raw("base.raw", size, Pattern::new(7, 1));
        let overlay = scratch.join("overlay.qcow2");
        qemu::create(&overlay, None, "", Some((base.to_str().expect("UTF-8 path"), "raw")));
        let disk = Mount::new(&scratch, &overlay).qmp().start();

        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qmp_client.py");
        let mut client = Command::new(&python);
        client.arg(script).arg(disk.socket());
        // The job takes one second: long enough for the first query to see it running.
        client.args([
            "--command",
            command,
            "--device",
            "drive0",
            "--speed",
            "16777216",
            "--len",
            &size.to_string(),
        ]);
        let done = run_within(&mut client, Duration::from_secs(90));
        assert!(
            done.status.success(),
            "{command}: {}\n{}\n{}",
            done.stdout,
            done.stderr,
            disk.log()
        );
        assert!(done.stdout.lines().any(|line| line == "ok"), "{command}: {}", done.stdout);

        std::fs::remove_file(&base).expect("the base is not needed any more");
        assert_same(
            "the disk without its base",
            &disk.read_all(),
            &Pattern::new(7, 1).bytes(0, size),
        );
        disk.umount();
    }
}

/// Returns a Python that has the library.
pub fn python() -> Option<PathBuf> {
    let named = std::env::var_os("CORDISK_QMP_PYTHON").map(PathBuf::from);
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/qmp-venv/bin/python");
    let imports = |python: &PathBuf| {
        let tried =
            Command::new(python).args(["-c", "import qemu.qmp"]).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    named.into_iter().chain([ours, PathBuf::from("python3")]).find(imports)
}
