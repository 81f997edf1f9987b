//! QEMU's interactive shell, `qmp-shell -p` of the PyPI package `qemu.qmp`, with the commands of a
//! stream as its input.
//!
//! [`crate::qmp_client`] says where the package comes from.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::qmp_client::python;
use crate::support::{MIB, Rig, have, poll};

const PATIENCE: Duration = Duration::from_secs(60);

/// Returns a value that the shell printed: the text between `before` and the line that closes the
/// value.
fn printed(output: &str, before: &str) -> Option<Value> {
    let (_, rest) = output.split_once(before)?;
    let end = rest.find("\n}")?;
    serde_json::from_str(&rest[..end + 2]).ok()
}

/// Protects: an interactive session: greeting, completion by `query-commands`, `key=value`
/// arguments, formatted replies, an error reply that does not end the session, the events on an
/// empty line, and the end.
#[test]
fn a_stream_typed_into_qmp_shell() {
    requires!("/dev/fuse", "qemu-img");
    let Some(python) = python() else {
        have(&["python:qemu.qmp"]); // says what is missing, or fails
        return;
    };
    let rig = Rig::new(2 * MIB);
    let disk = rig.mount().qmp().start();
    let mut hearing = disk.client();
    let (out, err) = (rig.scratch.join("shell.out"), rig.scratch.join("shell.err"));
    let mut command = Command::new(&python);
    command
        .args(["-u", "-c", "from qemu.qmp.qmp_shell import main; main()", "-p"])
        .arg(disk.socket());
    // The shell keeps its history in the home directory.
    command.env("HOME", rig.scratch.path()).env("TERM", "dumb").stdin(Stdio::piped());
    command
        .stdout(fs::File::create(&out).expect("file"))
        .stderr(fs::File::create(&err).expect("file"));
    let mut shell = Killed(command.spawn().expect("qmp-shell"));
    let mut keyboard = shell.0.stdin.take().expect("stdin");
    let said = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let mut types =
        |line: &str| writeln!(keyboard, "{line}").and_then(|()| keyboard.flush()).expect("type");

    types("block-job-cancel device=nope");
    types("block-stream device=drive0 speed=0");
    // An empty line prints the events so far, so the test first waits for all of them.
    hearing.wait_completed();
    hearing.wait_status("null");
    types("query-block-jobs");
    types("");
    let shown = poll(PATIENCE, || {
        let output = said(&out);
        let all = output.contains("'BLOCK_JOB_COMPLETED'") && output.contains("'status': 'null'");
        if !all {
            // The shell receives the events asynchronously.
            types("");
            std::thread::sleep(Duration::from_millis(50));
        }
        all.then_some(output)
    });
    let output = shown.unwrap_or_else(|| {
        panic!("no completion shown:\n{}\n{}\n{}", said(&out), said(&err), disk.log())
    });
    drop(keyboard); // Ctrl-D
    let status = poll(PATIENCE, || shell.0.try_wait().expect("wait"));
    assert!(status.is_some_and(|status| status.success()), "{status:?}\n{output}\n{}", said(&err));

    assert!(output.contains("Connected to QEMU 10.2.0"), "{output}");
    let replies: Vec<Value> =
        output.split("(QEMU) ").filter_map(|part| printed(&format!("{part}\n"), "")).collect();
    let want = [
        json!({"error": {"class": "DeviceNotActive", "desc": "Block job 'nope' not found"}}),
        json!({"return": {}}),
        json!({"return": []}),
    ];
    for (reply, want) in replies.iter().zip(&want) {
        for (name, value) in want.as_object().expect("object") {
            assert_eq!(reply.get(name), Some(value), "{output}");
        }
    }
    assert_eq!(replies.len(), want.len(), "{output}");
    // The shell prints events like Python dictionaries.
    let completed = output
        .lines()
        .find(|line| line.contains("'BLOCK_JOB_COMPLETED'"))
        .expect("the line of the event");
    for member in [
        "'type': 'stream'",
        "'device': 'drive0'",
        "'len': 2097152",
        "'offset': 2097152",
        "'speed': 0",
    ] {
        assert!(completed.contains(member), "{member} in {completed}");
    }
    assert!(!completed.contains("error"), "{completed}");
    drop(hearing);
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// A process that is killed when dropped.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
