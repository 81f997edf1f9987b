//! QEMU's tools: they make images for the tests, and they check and read images that cordisk wrote.
//! Every failure shows the whole output.

use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::{Finished, Pattern, run_ok, run_within};

/// Runs `qemu-img ARGS`, which must succeed.
pub fn img<A: AsRef<OsStr>>(args: &[A]) -> String {
    run_ok(Command::new("qemu-img").args(args))
}

/// Runs `qemu-img ARGS`, which may fail.
pub fn img_any<A: AsRef<OsStr>>(args: &[A]) -> Finished {
    run_within(Command::new("qemu-img").args(args), Duration::from_secs(120))
}

/// Creates a qcow2 image. `options` is the text after `-o` (may be empty); `backing` is the name
/// and format for the header.
pub fn create(path: &Path, size: Option<u64>, options: &str, backing: Option<(&str, &str)>) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    if let Some((name, format)) = backing {
        command.args(["-b", name, "-F", format]);
    }
    command.arg(path);
    command.args(size.map(|size| size.to_string()));
    run_ok(&mut command);
}

/// Creates a qcow2 image without backing file that is filled with `pattern`.
pub fn create_full(path: &Path, size: u64, options: &str, pattern: Pattern) {
    create(path, Some(size), options, None);
    write_pattern(path, pattern, &[0..size]);
}

/// Runs `qemu-io -c COMMAND ...` on a qcow2 image, without flushing to the disk.
pub fn io<C: AsRef<str>>(path: &Path, commands: &[C]) -> String {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2", "-t", "unsafe"]);
    for text in commands {
        command.args(["-c", text.as_ref()]);
    }
    let out = run_ok(command.arg(path));
    assert!(!out.contains("failed") && !out.contains("error"), "{command:?}: {out}");
    out
}

/// Writes the content of `pattern` at these ranges (multiples of 512) into a qcow2 image.
pub fn write_pattern(path: &Path, pattern: Pattern, ranges: &[Range<u64>]) {
    let dir = tempfile::tempdir().expect("directory for chunks");
    let mut commands = Vec::new();
    for (index, range) in ranges.iter().enumerate() {
        let chunk = dir.path().join(index.to_string());
        fs::write(&chunk, pattern.bytes(range.start, range.end - range.start)).expect("chunk");
        commands.push(format!(
            "write -q -s {} {} {}",
            chunk.display(),
            range.start,
            range.end - range.start
        ));
    }
    io(path, &commands);
}

/// The result of `qemu-img check`.
#[derive(Debug, Eq, PartialEq)]
pub struct Check {
    pub corruptions: u64,
    pub leaks: u64,
    pub check_errors: u64,
}

pub fn check(path: &Path) -> Check {
    let done = run_within(
        Command::new("qemu-img").args(["check", "-f", "qcow2", "--output=json"]).arg(path),
        Duration::from_secs(60),
    );
    let json: Value = serde_json::from_str(&done.stdout)
        .unwrap_or_else(|_| panic!("qemu-img check {}: {done:?}", path.display()));
    let count = |name: &str| json.get(name).map_or(0, |value| value.as_u64().expect("a count"));
    let found = Check {
        corruptions: count("corruptions"),
        leaks: count("leaks"),
        check_errors: count("check-errors"),
    };
    if found != (Check { corruptions: 0, leaks: 0, check_errors: 0 }) {
        eprintln!(
            "qemu-img check {}:\n{}",
            path.display(),
            img_any(&[OsStr::new("check"), path.as_os_str()]).stdout
        );
    }
    found
}

/// Asserts that the image has no corruption and no leaks.
pub fn assert_clean(path: &Path) {
    assert_eq!(
        check(path),
        Check { corruptions: 0, leaks: 0, check_errors: 0 },
        "qemu-img check {}",
        path.display()
    );
}

/// Asserts that the image has no corruption; leaks are allowed (after a kill).
pub fn assert_not_corrupt(path: &Path) {
    let found = check(path);
    assert_eq!(
        (found.corruptions, found.check_errors),
        (0, 0),
        "qemu-img check {}: {found:?}",
        path.display()
    );
}

/// Returns the output of `qemu-img info --output=json`.
pub fn info(path: &Path) -> Value {
    let out =
        run_ok(Command::new("qemu-img").args(["info", "-f", "qcow2", "--output=json"]).arg(path));
    serde_json::from_str(&out).expect("qemu-img info prints JSON")
}

/// Asserts that the image has no backing file and no backing format.
pub fn assert_independent(path: &Path) {
    let info = info(path);
    for member in ["backing-filename", "full-backing-filename", "backing-filename-format"] {
        assert_eq!(info.get(member), None, "{member} is still there: {info}");
    }
}

/// A run of guest bytes and the layer that holds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Run {
    pub range: Range<u64>,
    /// 0 is the overlay itself.
    pub depth: u64,
    pub zero: bool,
    pub data: bool,
    pub present: bool,
}

/// Returns the output of `qemu-img map --output=json`.
pub fn map(path: &Path) -> Vec<Run> {
    let out =
        run_ok(Command::new("qemu-img").args(["map", "-f", "qcow2", "--output=json"]).arg(path));
    let json: Vec<Value> = serde_json::from_str(&out).expect("qemu-img map prints JSON");
    let number =
        |run: &Value, name: &str| run[name].as_u64().unwrap_or_else(|| panic!("{name} in {run}"));
    let flag =
        |run: &Value, name: &str| run[name].as_bool().unwrap_or_else(|| panic!("{name} in {run}"));
    json.iter()
        .map(|run| {
            let start = number(run, "start");
            Run {
                range: start..start + number(run, "length"),
                depth: number(run, "depth"),
                zero: flag(run, "zero"),
                data: flag(run, "data"),
                present: flag(run, "present"),
            }
        })
        .collect()
}

/// Returns the guest ranges that the overlay itself holds (data or zero), joined.
pub fn local_ranges(path: &Path) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for run in map(path).into_iter().filter(|run| run.depth == 0 && run.present) {
        match ranges.last_mut() {
            Some(last) if last.end == run.range.start => last.end = run.range.end,
            _ => ranges.push(run.range),
        }
    }
    ranges
}

/// Reads the whole disk with QEMU, through the image and its backing files.
pub fn read_all(path: &Path) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("directory for the raw copy");
    let raw = to_raw(path, &dir.path().join("raw"));
    fs::read(raw).expect("raw copy")
}

/// Runs `qemu-img convert -O raw`.
pub fn to_raw(path: &Path, raw: &Path) -> PathBuf {
    run_ok(
        Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw", "-t", "unsafe"])
            .arg(path)
            .arg(raw),
    );
    raw.to_owned()
}

/// Runs `qemu-img compare` on a qcow2 image and a raw file.
pub fn assert_compare(qcow2: &Path, raw: &Path) {
    let done = run_within(
        Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "raw"]).arg(qcow2).arg(raw),
        Duration::from_secs(60),
    );
    assert!(
        done.status.success() && done.stdout.contains("identical"),
        "{} is not {}: {done:?}",
        qcow2.display(),
        raw.display()
    );
}
