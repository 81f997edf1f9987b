//! A stream that is interrupted by the end of its daemon continues at the next mount, with the same
//! options; a stream that has ended by itself does not.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::qmp::FIRST_STEP;
use crate::support::{
    Daemon, MIB, Mount, Pattern, QmpClient, Rig, Scratch, assert_same, mounts, poll, qemu, run_ok,
    wait_until,
};

const NOTE: &str = "user.cordisk.stream";

/// Returns the note of a stream in the image's extended attribute.
fn note(image: &Path) -> Option<Value> {
    let mut text = [0; 8192];
    match fgetxattr(File::open(image).expect("image"), NOTE, &mut text) {
        Ok(len) => Some(serde_json::from_slice(&text[..len]).expect("the note is JSON")),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => None,
        Err(error) => panic!("{}: {error}", image.display()),
    }
}

fn set_note(image: &Path, text: &[u8]) {
    fsetxattr(File::open(image).expect("image"), NOTE, text, XattrFlags::empty())
        .expect("fsetxattr");
}

/// Returns the identification of the image that its note must have, computed with coreutils and not
/// with the program.
fn file_of(image: &Path) -> Value {
    let told = |program: &[&str]| {
        let output =
            Command::new(program[0]).args(&program[1..]).arg(image).output().expect("stat");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    };
    let mut file = json!({ "inode": told(&["stat", "-c", "%i"]).parse::<u64>().expect("inode") });
    let id = told(&["stat", "-f", "-c", "%i"]);
    if id.trim_start_matches('0').is_empty() {
        let (major, minor) = (told(&["stat", "-c", "%Hd"]), told(&["stat", "-c", "%Ld"]));
        if major != "0" {
            file["file-system"] = json!(format!("{major}:{minor}"));
        }
    } else {
        // stat(1) prints the two halves of the number in their order in memory.
        let id = format!("{id:0>16}");
        file["file-system"] = json!(format!("{}{}", &id[8..], &id[..8]));
    }
    // "2026-01-02 03:04:05.123456789 +0000", and the seconds of the same.
    let (born, seconds) = (told(&["stat", "-c", "%w"]), told(&["stat", "-c", "%W"]));
    if let Some(nanoseconds) = born.split('.').nth(1).and_then(|rest| rest.split(' ').next()) {
        file["born"] = json!(format!("{seconds}.{nanoseconds}"));
    }
    file
}

/// Whether the file system of the scratch directory supports notes.
fn have_notes(image: &Path) -> bool {
    let file = File::open(image).expect("image");
    let noted =
        fsetxattr(&file, NOTE, b"x", XattrFlags::empty()).and_then(|()| fremovexattr(&file, NOTE));
    if noted.is_err() {
        eprintln!("skipped: no user attributes where scratch directories are");
    }
    noted.is_ok()
}

/// Mounts the image under a new name, so that the log is that of this mount alone.
fn again(scratch: &Scratch, image: &Path) -> Mount {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    Mount::named(scratch, image, &format!("disk{}", COUNT.fetch_add(1, Ordering::Relaxed)))
}

fn jobs(client: &mut QmpClient) -> Vec<Value> {
    client.ok("query-block-jobs", json!({})).as_array().expect("a list").clone()
}

/// How a daemon ends while a stream runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    Kill,
    Term,
    Umount,
    Quit,
}

fn end(mut disk: Daemon, how: End) {
    match how {
        End::Kill => disk.kill9(),
        End::Umount => disk.umount(),
        End::Term => {
            disk.signal(Signal::TERM);
            disk.assert_clean_end();
        }
        End::Quit => {
            disk.client().ok("quit", json!({}));
            disk.assert_clean_end();
        }
    }
}

/// Protects: however the daemon ends, the stream continues at the next mount, at the speed that was
/// set last, with its job id and the options of its client. It completes, and the content is that
/// of the base. After a second interruption it continues again.
#[test]
fn a_stream_goes_on_at_the_next_mount() {
    requires!("/dev/fuse", "qemu-img");
    for how in [End::Kill, End::Term, End::Umount, End::Quit] {
        let rig = Rig::new(8 * MIB);
        if !have_notes(&rig.overlay) {
            return;
        }
        let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
        let mut client = disk.client();
        assert_eq!(note(&rig.overlay), None);
        let asked = json!({"device": "drive0", "job-id": "j1", "speed": 1, "on-error": "stop", "auto-dismiss": false});
        client.ok("block-stream", asked.clone());
        assert_eq!(client.wait_for_first_step(), FIRST_STEP);
        // A higher speed would copy more; at this one the job still sleeps.
        client.ok("block-job-set-speed", json!({"device": "j1", "speed": 2}));
        let written = note(&rig.overlay).expect("a note");
        assert_eq!(
            (&written["speed"], &written["on-error"], &written["job-id"]),
            (&json!(2), &json!("stop"), &json!("j1"))
        );
        let mut offset = client.wait_for_first_step();
        drop(client);
        end(disk, how);
        assert!(note(&rig.overlay).is_some(), "{how:?}: the note outlives the daemon");

        for round in 0..2 {
            let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
            let mut client = disk.client();
            let before = offset;
            offset = client.wait_for_first_step();
            let job = client.job();
            assert_eq!(
                (&job["device"], &job["speed"], &job["auto-dismiss"]),
                (&json!("j1"), &json!(2), &json!(false)),
                "{how:?} {round}"
            );
            assert_eq!(job["paused"], json!(false));
            assert!(
                disk.log().contains("resuming the stream that was interrupted at "),
                "{}",
                disk.log()
            );
            if how != End::Kill {
                let percent = format!("interrupted at {} %", before * 100 / rig.size());
                assert!(disk.log().contains(&percent), "{percent}: {}", disk.log());
                assert!(offset > before, "what was copied stays copied");
            }
            drop(client);
            end(disk, how);
        }
        let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
        let mut client = disk.client();
        client.wait_for_first_step();
        client.finish_job("j1");
        assert_eq!(note(&rig.overlay), None, "who sees the completion does not find the note");
        let last = client.ok("x-query-last-job", json!({}));
        assert_eq!((&last["arguments"], &last["result"]), (&asked, &json!("success")));
        client.ok("block-job-dismiss", json!({"id": "j1"}));
        assert_same("disk", &disk.read_all(), &rig.content);
        drop(client);
        end(disk, how);
        if how != End::Kill {
            rig.assert_standalone(&rig.content);
        }
    }
}

/// Makes base.raw ← mid.qcow2 ← top.qcow2, with data of its own in the middle layer. Returns the
/// content of the disk.
fn three_layers(scratch: &Scratch) -> Vec<u8> {
    scratch.raw("base.raw", 4 * MIB, Pattern::new(70, 1));
    let (mid, top) = (scratch.join("mid.qcow2"), scratch.join("top.qcow2"));
    qemu::create(&mid, None, "", Some(("base.raw", "raw")));
    qemu::write_pattern(&mid, Pattern::new(70, 2), &[0..3 * MIB]);
    qemu::create(&top, None, "", Some(("mid.qcow2", "qcow2")));
    qemu::read_all(&top)
}

/// Protects: `base` means the same file after a restart: the layers above it are copied, and the
/// overlay ends up on it, by the name that was given.
#[test]
fn the_base_means_the_same_after_a_restart() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let want = three_layers(&scratch);
    let top = scratch.join("top.qcow2");
    if !have_notes(&top) {
        return;
    }
    let disk = again(&scratch, &top).qmp().start_settled();
    let mut client = disk.client();
    client.ok(
        "block-stream",
        json!({"device": "drive0", "base": "base.raw", "backing-file": "./base.raw", "speed": 1}),
    );
    client.wait_for_first_step();
    drop(client);
    disk.kill9();
    let disk = again(&scratch, &top).qmp().start_settled();
    let mut client = disk.client();
    client.finish_job("drive0");
    assert_same("disk", &disk.read_all(), &want);
    disk.umount();
    let info = qemu::info(&top);
    assert_eq!(info["backing-filename"], json!("./base.raw"), "{info}");
    fs::remove_file(scratch.join("mid.qcow2")).expect("not needed any more");
    qemu::assert_clean(&top);
    assert_same("top over base", &qemu::read_all(&top), &want);
}

/// Protects: a stream to a base that the chain no longer has is not started, and the log says so;
/// the disk is served. A stream that died after it had detached its chain is over, without a
/// message.
#[test]
fn another_chain_is_not_streamed_and_a_cut_one_is_over() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let want = three_layers(&scratch);
    let top = scratch.join("top.qcow2");
    if !have_notes(&top) {
        return;
    }
    let disk = again(&scratch, &top).qmp().start_settled();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "base": "mid.qcow2", "speed": 1}));
    client.wait_completed();
    assert_eq!(note(&top), None, "nothing lay above that base");
    client.ok("block-stream", json!({"device": "drive0", "base": "base.raw", "speed": 1}));
    client.wait_for_first_step();
    drop(client);
    disk.kill9();
    let kept = note(&top).expect("a note");
    assert_eq!((&kept["file"], &kept["backing"]), (&file_of(&top), &json!("mid.qcow2")));
    // Rebased to a copy of the middle layer without a base: the chain is shorter, and a different
    // one.
    run_ok(
        Command::new("qemu-img")
            .args(["convert", "-O", "qcow2"])
            .arg(scratch.join("mid.qcow2"))
            .arg(scratch.join("flat.qcow2")),
    );
    qemu::img(&["rebase", "-u", "-b", "flat.qcow2", "-F", "qcow2", top.to_str().expect("UTF-8")]);
    let disk = again(&scratch, &top).qmp().start_settled();
    assert_eq!(jobs(&mut disk.client()), Vec::<Value>::new());
    assert!(
        disk.log().contains("not resumed: the chain of backing files is another one"),
        "{}",
        disk.log()
    );
    assert_same("disk", &disk.read_all(), &want);
    assert_eq!(note(&top), Some(kept.clone()), "it may be put right again");
    disk.umount();

    // The same state as if the daemon had died between the detach and the removal of the note.
    qemu::img(&["rebase", "-u", "-b", "base.raw", "-F", "raw", top.to_str().expect("UTF-8")]);
    let disk = again(&scratch, &top).qmp().start_settled();
    assert_eq!(jobs(&mut disk.client()), Vec::<Value>::new());
    assert!(!disk.log().contains("resum"), "{}", disk.log());
    assert_eq!(note(&top), None);
    disk.umount();

    let rig = Rig::new(MIB);
    let disk = again(&rig.scratch, &rig.overlay).args(&["--stream"]).start_settled();
    wait_until("the stream has ended", || {
        qemu::img(&["info", "-U", rig.overlay.to_str().expect("UTF-8")])
            .find("backing file")
            .is_none()
    });
    disk.umount();
    let file = file_of(&rig.overlay);
    let whole = json!({"version": 2, "file": file, "backing": "base.raw", "speed": 1, "on-error": "report", "auto-finalize": true, "auto-dismiss": true, "request": "",
        "paused": false, "offset": 0, "len": MIB});
    set_note(&rig.overlay, whole.to_string().as_bytes());
    let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
    assert_eq!(jobs(&mut disk.client()), Vec::<Value>::new());
    assert_eq!(note(&rig.overlay), None);
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a stream that a user has paused stays paused over a restart, until a user resumes it;
/// a resumed stream does not.
#[test]
fn a_paused_stream_is_paused_after_a_restart() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    if !have_notes(&rig.overlay) {
        return;
    }
    let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    client.wait_for_first_step();
    client.ok("block-job-pause", json!({"device": "drive0"}));
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
    let stood = client.job()["offset"].clone();
    assert_ne!(stood, json!(0));
    drop(client);
    // The fsync of a write writes all tables, which say what was copied.
    let file = File::options().write(true).open(disk.path()).expect("open");
    file.write_all_at(&rig.content[..512], 0).expect("write");
    file.sync_all().expect("fsync");
    drop(file);
    disk.kill9();
    let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
    let mut client = disk.client();
    let paused =
        poll(Duration::from_secs(20), || (client.job()["status"] == "paused").then_some(()));
    assert!(paused.is_some(), "{}", client.job());
    let job = client.job();
    assert_eq!(
        (&job["offset"], &job["paused"], &job["speed"]),
        (&stood, &json!(true), &json!(0)),
        "it stands where it stood: {job}"
    );
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 1}));
    client.ok("job-resume", json!({"id": "drive0"}));
    assert_eq!(note(&rig.overlay).expect("a note")["paused"], json!(false));
    client.wait_for_first_step();
    drop(client);
    disk.kill9();
    let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
    let mut client = disk.client();
    client.wait_for_first_step();
    assert_eq!(client.job()["paused"], json!(false));
    client.finish_job("drive0");
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a stream that has ended by itself (completed, cancelled by a user, failed) is not
/// resumed.
#[test]
fn what_has_ended_does_not_come_back() {
    requires!("/dev/fuse", "qemu-img");
    for ending in ["completed", "cancelled", "failed"] {
        let rig = Rig::new(2 * MIB);
        if !have_notes(&rig.overlay) {
            return;
        }
        let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
        let mut client = disk.client();
        match ending {
            "completed" => {
                client.ok("block-stream", json!({"device": "drive0"}));
                client.wait_completed();
            }
            "cancelled" => {
                client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
                client.wait_for_first_step();
                assert!(note(&rig.overlay).is_some());
                client.ok("block-job-cancel", json!({"device": "drive0"}));
                client.wait_event("BLOCK_JOB_CANCELLED");
            }
            _ => {
                // A base that shrinks while in use cannot be read to its end.
                fs::OpenOptions::new()
                    .write(true)
                    .open(&rig.base)
                    .expect("base")
                    .set_len(MIB)
                    .expect("truncate");
                client.ok("block-stream", json!({"device": "drive0"}));
                let event = client.wait_event("BLOCK_JOB_COMPLETED");
                assert!(event["data"]["error"].is_string(), "{event}");
            }
        }
        assert_eq!(note(&rig.overlay), None, "{ending}: removed before anybody is told");
        drop(client);
        disk.kill9();
        let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
        assert_eq!(jobs(&mut disk.client()), Vec::<Value>::new(), "{ending}");
        disk.kill9();
    }
}

/// Protects: `--no-resume` starts nothing and keeps the note; so does a read-only mount; `--stream`
/// uses its own arguments instead of the note.
#[test]
fn the_command_line_has_the_last_word() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    if !have_notes(&rig.overlay) {
        return;
    }
    let disk =
        again(&rig.scratch, &rig.overlay).qmp().args(&["--stream", "--speed", "1"]).start_settled();
    disk.client().wait_for_first_step();
    disk.kill9();
    let kept = note(&rig.overlay).expect("a note");
    for option in ["--no-resume", "--read-only"] {
        let disk = again(&rig.scratch, &rig.overlay).qmp().args(&[option]).start_settled();
        assert_eq!(jobs(&mut disk.client()), Vec::<Value>::new(), "{option}");
        disk.umount();
        assert_eq!(
            note(&rig.overlay),
            Some(kept.clone()),
            "{option}: the note stays for a later mount"
        );
    }
    let disk =
        again(&rig.scratch, &rig.overlay).qmp().args(&["--stream", "--speed", "3"]).start_settled();
    let mut client = disk.client();
    assert_eq!(client.job()["speed"], json!(3));
    assert_eq!(note(&rig.overlay).expect("a note")["speed"], json!(3));
    client.finish_job("drive0");
    assert_eq!(note(&rig.overlay), None);
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: notes are untrusted input. Whatever a note says, the disk is served, no stream is
/// started that a client could not have started, and one line gives the reason.
#[test]
fn notes_from_anywhere_hurt_nobody() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    if !have_notes(&rig.overlay) {
        return;
    }
    let good = json!({"version": 2, "file": file_of(&rig.overlay), "backing": "base.raw", "speed": 1, "on-error": "report", "auto-finalize": true, "auto-dismiss": true, "request": "",
        "paused": false, "offset": 0, "len": 0});
    let with = |name: &str, value: Value| {
        let mut text = good.clone();
        text[name] = value;
        text.to_string().into_bytes()
    };
    let long = vec![b'x'; 3500];
    for hostile in [
        b"".to_vec(),
        b"\xff\x00{".to_vec(),
        b"{}".to_vec(),
        long,
        with("version", json!(99)),
        with("version", json!(1)),
        with("file", json!(null)),
        with("file", json!({"inode": 1})),
        with("job-id", json!("../../etc")),
        with("speed", json!(-1)),
        with("backing-file", json!("/etc/passwd")),
        with("on-complete", json!("touch /tmp/owned")),
    ] {
        set_note(&rig.overlay, &hostile);
        let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
        assert_eq!(
            jobs(&mut disk.client()),
            Vec::<Value>::new(),
            "{}",
            String::from_utf8_lossy(&hostile)
        );
        let log = disk.log();
        assert_eq!(
            log.matches("the note of an interrupted stream is not obeyed").count(),
            1,
            "{}: {log}",
            String::from_utf8_lossy(&hostile)
        );
        assert_same("disk", &disk.read_all(), &rig.content);
        assert_eq!(note(&rig.overlay), None, "said once");
        disk.umount();
    }
    // This control shows that the helper that modifies notes does not break them itself.
    set_note(&rig.overlay, with("len", json!(MIB)).as_slice());
    let disk = again(&rig.scratch, &rig.overlay).qmp().start_settled();
    // The reads above copied everything, so the stream may be over already.
    wait_until("the stream has ended", || note(&rig.overlay).is_none());
    assert!(disk.log().contains("resuming the stream"), "{}", disk.log());
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a copy of an image with its attributes (`cp -a`, also of a running one) does not
/// resume the stream, and one line says so once. If the copy has the open mark, its first open
/// checks it and removes the mark. The image itself continues, also under another name.
#[test]
fn a_copy_of_an_image_does_not_stream() {
    requires!("/dev/fuse", "qemu-img", "cp");
    let rig = Rig::new(4 * MIB);
    if !have_notes(&rig.overlay) {
        return;
    }
    let disk =
        again(&rig.scratch, &rig.overlay).qmp().args(&["--stream", "--speed", "1"]).start_settled();
    let mut client = disk.client();
    client.wait_for_first_step();
    // Nothing is written during the copy.
    client.ok("block-job-pause", json!({"device": "drive0"}));
    disk.open().sync_all().expect("fsync");
    let copies = [rig.scratch.join("copy.qcow2"), rig.scratch.join("late.qcow2")];
    let copy = |to: &Path| run_ok(Command::new("cp").arg("-a").arg(&rig.overlay).arg(to));
    copy(&copies[0]);
    drop(client);
    disk.umount();
    copy(&copies[1]);
    for image in &copies {
        assert!(note(image).is_some(), "cp -a copies attributes");
        let disk = again(&rig.scratch, image).qmp().start_settled();
        assert_eq!(jobs(&mut disk.client()), Vec::<Value>::new());
        assert_eq!(
            disk.log().matches("it was written for another file").count(),
            1,
            "{}",
            disk.log()
        );
        assert_same("the copy", &disk.read_all(), &rig.content);
        assert_eq!(note(image), None);
        disk.umount();
        let disk = again(&rig.scratch, image).qmp().start_settled();
        assert!(!disk.log().contains("interrupted stream"), "{}", disk.log());
        disk.umount();
        qemu::assert_clean(image);
    }
    let renamed = rig.scratch.join("renamed.qcow2");
    fs::rename(&rig.overlay, &renamed).expect("rename");
    let disk = again(&rig.scratch, &renamed).qmp().start_settled();
    let mut client = disk.client();
    assert_eq!(jobs(&mut client).len(), 1, "{}", disk.log());
    client.ok("block-job-resume", json!({"device": "drive0"}));
    client.finish_job("drive0");
    drop(client);
    disk.umount();
    qemu::assert_independent(&renamed);
}

/// Protects: a note cannot put the name of an arbitrary file into the header: the name for the base
/// in the note must lead to the base, through the gate. A name that does is written.
#[test]
fn a_note_names_no_file_but_its_base() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let want = three_layers(&scratch);
    let top = scratch.join("top.qcow2");
    if !have_notes(&top) {
        return;
    }
    fs::write(scratch.join("secret.raw"), vec![b's'; MIB as usize]).expect("another file");
    std::os::unix::fs::symlink("base.raw", scratch.join("link.raw")).expect("symlink");
    let base = json!({"name": "base.raw", "path": scratch.join("base.raw"), "layers": 1});
    let text = |name: &str| {
        json!({"version": 2, "file": file_of(&top), "backing": "mid.qcow2", "base": base, "speed": 0, "on-error": "report", "auto-finalize": true,
            "auto-dismiss": true, "backing-file": name, "request": "", "paused": false, "offset": 0, "len": 4 * MIB})
    };
    for (name, why) in [
        ("secret.raw", "that of another file"),
        ("json:{}", "this protocol is not supported"),
        ("gone.raw", "No such file"),
        ("/proc/self/exe", "/proc"),
    ] {
        set_note(&top, text(name).to_string().as_bytes());
        let disk = again(&scratch, &top).qmp().start_settled();
        assert_eq!(jobs(&mut disk.client()), Vec::<Value>::new(), "{name}");
        let log = disk.log();
        assert!(
            log.contains("not obeyed, and removed: the name that it would give the base")
                && log.contains(why),
            "{name}: {log}"
        );
        disk.umount();
        assert_eq!(note(&top), None, "{name}");
        assert_eq!(qemu::info(&top)["backing-filename"], json!("mid.qcow2"), "{name}");
    }
    set_note(&top, text("link.raw").to_string().as_bytes());
    let disk = again(&scratch, &top).qmp().start_settled();
    wait_until("the stream has ended", || note(&top).is_none());
    disk.umount();
    assert_eq!(qemu::info(&top)["backing-filename"], json!("link.raw"));
    assert_same("top over base", &qemu::read_all(&top), &want);
}

/// Protects: on a file system without extended attributes a stream still runs, and one line says
/// that it cannot be resumed.
#[test]
fn without_attributes_a_stream_runs_all_the_same() {
    requires!("/dev/fuse", "qemu-img", "root", "fs:ramfs");
    let scratch = Scratch::new();
    let dir = scratch.dir("ramfs");
    run_ok(Command::new("mount").args(["-t", "ramfs", "ramfs"]).arg(&dir));
    let content = Pattern::new(71, 1).bytes(0, 4 * MIB);
    fs::write(dir.join("base.raw"), &content).expect("base");
    let overlay = dir.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some(("base.raw", "raw")));
    let disk = again(&scratch, &overlay).qmp().start_settled();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    client.wait_for_first_step();
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 2}));
    let log = disk.log();
    assert_eq!(log.matches("would not be resumed after a restart").count(), 1, "once: {log}");
    client.finish_job("drive0");
    assert_same("disk", &disk.read_all(), &content);
    disk.umount();
    qemu::assert_independent(&overlay);
    mounts::umount(&dir);
}

/// Protects: a daemon whose user (`--user`) may neither read nor write the attributes of the image
/// resumes, stores and removes notes like any other, because the keeper does it.
#[test]
fn a_stream_of_another_user_goes_on() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(4 * MIB);
    if !have_notes(&rig.overlay) {
        return;
    }
    rig.scratch.open_to_all();
    fs::set_permissions(&rig.overlay, fs::Permissions::from_mode(0o600)).expect("chmod");
    let mount = || {
        again(&rig.scratch, &rig.overlay).qmp().args(&[
            "--user",
            "65534:65533",
            "--sandbox",
            "require",
        ])
    };
    let disk = mount().start_settled();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    client.wait_for_first_step();
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 2}));
    drop(client);
    disk.kill9();
    let disk = mount().start_settled();
    let mut client = disk.client();
    client.wait_for_first_step();
    assert_eq!(client.job()["speed"], json!(2));
    drop(client);
    disk.umount();
    assert!(note(&rig.overlay).is_some(), "the end of the daemon is not that of the stream");
    let disk = mount().start_settled();
    let mut client = disk.client();
    client.wait_for_first_step();
    client.ok("block-job-cancel", json!({"device": "drive0"}));
    client.wait_event("BLOCK_JOB_CANCELLED");
    assert_eq!(note(&rig.overlay), None);
    assert!(!disk.log().contains("WARN"), "{}", disk.log());
    disk.umount();
}
