//! The command `cordisk check`: its output, exit status and locks are those of `qemu-img check`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::header::{self, poke};
use crate::support::{CORDISK, Finished, MIB, Rig, Scratch, qemu, run_within};

fn ours(args: &[&str], image: &Path) -> Finished {
    run_within(Command::new(CORDISK).arg("check").args(args).arg(image), Duration::from_secs(60))
}

fn qemus(args: &[&str], image: &Path) -> Finished {
    run_within(
        Command::new("qemu-img").args(["check", "-f", "qcow2"]).args(args).arg(image),
        Duration::from_secs(60),
    )
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).expect("small");
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Makes a healthy image, one with two leaks, and one with corruptions as well.
fn images(scratch: &Scratch) -> [PathBuf; 3] {
    let images = ["good", "leaking", "corrupt"].map(|name| scratch.join(format!("{name}.qcow2")));
    let [good, leaking, corrupt] = &images;
    qemu::create(good, Some(10 * MIB), "", None);
    qemu::io(
        good,
        &["write 0 1M", "write 3M 64k", "write -z 5M 128k", "write -c 7M 64k", "write 2M 64k"],
    );
    let bytes = fs::read(good).expect("image");
    let block = word(&bytes, word(&bytes, 48));
    let clusters = bytes.len().div_ceil(65536) as u64;
    fs::write(leaking, [bytes, vec![0; 4 * 65536]].concat()).expect("image");
    poke(leaking, block + 2 * (clusters + 1), &[0, 1, 0, 1]);
    fs::copy(leaking, corrupt).expect("copy");
    poke(corrupt, block + 2 * 5, &[0, 0, 0, 5]);
    images
}

/// Returns the sorted lines of standard error, one for each error found. The two programs check
/// COPIED flags at different times: cordisk during its walk, QEMU at the end.
fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn it_says_what_qemu_img_says() {
    requires!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    for (image, status) in images(&scratch).iter().zip([0, 3, 2]) {
        let (mine, theirs) = (ours(&[], image), qemus(&[], image));
        assert_eq!(mine.stdout, theirs.stdout);
        assert_eq!(sorted(&mine.stderr), sorted(&theirs.stderr));
        assert_eq!(
            (mine.status.code(), theirs.status.code()),
            (Some(status), Some(status)),
            "{mine:?}"
        );
        let (mine, theirs) = (ours(&["--output", "json"], image), qemus(&["--output=json"], image));
        let json = |done: &Finished| {
            serde_json::from_str::<Value>(&done.stdout)
                .unwrap_or_else(|error| panic!("{error}: {done:?}"))
        };
        assert_eq!(json(&mine), json(&theirs));
        assert_eq!(mine.status.code(), Some(status));
    }
}

#[test]
fn a_repair_is_that_of_qemu_img_but_for_corrupt_images() {
    requires!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let [good, leaking, corrupt] = images(&scratch);
    let before = fs::read(&good).expect("image");
    assert_eq!(ours(&["--repair", "leaks"], &good).status.code(), Some(0));
    assert_eq!(fs::read(&good).expect("image"), before, "nothing to repair, nothing written");
    let copy = scratch.join("copy.qcow2");
    fs::copy(&leaking, &copy).expect("copy");
    let (mine, theirs) = (ours(&["-r", "leaks"], &leaking), qemus(&["-r", "leaks"], &copy));
    assert_eq!(mine.stdout, theirs.stdout);
    assert_eq!(
        (mine.status.code(), theirs.status.code()),
        (Some(0), Some(0)),
        "{mine:?} {theirs:?}"
    );
    qemu::assert_clean(&leaking);
    let before = fs::read(&corrupt).expect("image");
    let done = ours(&["--repair", "leaks", "--output", "json"], &corrupt);
    assert_eq!(done.status.code(), Some(2));
    assert!(
        done.stderr.contains("the leaks were not repaired") && done.stdout.contains("\"leaks\": "),
        "{done:?}"
    );
    assert_eq!(fs::read(&corrupt).expect("image"), before, "a corrupt image is not written");
}

/// An image with the corrupt bit or the dirty bit can be checked but not written. Its backing file
/// is not opened.
#[test]
fn images_that_cannot_be_written_can_be_checked() {
    requires!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let [_, leaking, _] = images(&scratch);
    for bit in [1u64, 2] {
        header::edit(&leaking, |header| header.set_u64(header::AT_INCOMPATIBLE, bit));
        let done = ours(&[], &leaking);
        assert_eq!(
            (done.status.code(), done.stdout),
            (Some(3), qemus(&[], &leaking).stdout),
            "bit {bit}"
        );
        let before = fs::read(&leaking).expect("image");
        let done = ours(&["--repair", "leaks"], &leaking);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert!(done.stderr.contains("qemu-img check -r all"), "{done:?}");
        assert_eq!(fs::read(&leaking).expect("image"), before);
    }
    let orphan = scratch.join("orphan.qcow2");
    qemu::create(&orphan, Some(MIB), "", None);
    header::edit(&orphan, |header| header.backing = Some(b"gone.raw".to_vec()));
    let done = ours(&[], &orphan);
    assert!(
        done.status.success() && done.stdout.starts_with("No errors were found on the image.\n"),
        "{done:?}"
    );
}

#[test]
fn what_cannot_be_checked_has_status_1_and_one_line() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    for args in [&[][..], &["--repair", "leaks"]] {
        let done = ours(args, &rig.overlay);
        assert_eq!((done.status.code(), done.stdout.as_str()), (Some(1), ""), "{done:?}");
        assert!(
            done.stderr.contains("in use by another process") && done.stderr.lines().count() == 1,
            "{done:?}"
        );
    }
    disk.umount();
    for image in [rig.base.clone(), rig.scratch.join("nothing")] {
        let done = ours(&[], &image);
        assert_eq!((done.status.code(), done.stderr.lines().count()), (Some(1), 1), "{done:?}");
    }
    let done = ours(&["--repair", "all"], &rig.overlay);
    assert_eq!(done.status.code(), Some(1), "2 would mean corruptions: {done:?}");
    // Other programs may read the image during a check.
    let reader = rig.mount().args(&["--read-only"]).start();
    assert_eq!(ours(&[], &rig.overlay).status.code(), Some(0));
    assert_eq!(
        ours(&["--repair", "leaks"], &rig.overlay).status.code(),
        Some(1),
        "but nobody may during a repair"
    );
    reader.umount();
}
