//! What the base is pinned to: a disk never mixes two files of one name.

use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use rustix::io::Errno;

use super::*;
use crate::support::pattern::assert_same_at;
use crate::support::{QmpClient, errno};

const SIZE: u64 = 8 * MIB;

/// Replaces the base on the server by another one of the same size, and another time.
fn replace(server: &Nginx) {
    let base = server.root().join("golden/base.raw");
    let new = server.root().join("golden/new");
    fs::write(&new, Pattern::new(0xBAD, 2).bytes(0, SIZE)).expect("new base");
    let later = SystemTime::now() + Duration::from_secs(7);
    File::options()
        .write(true)
        .open(&new)
        .and_then(|file| file.set_modified(later))
        .expect("time of the new base");
    fs::rename(&new, &base).expect("replace the base");
}

/// Protects: a base that was replaced between two mounts is refused.
#[test]
fn a_base_that_was_replaced_is_not_mounted() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().start();
    remote.guest(&disk).check(0..MIB);
    disk.umount();
    let before = fs::read(&remote.overlay).expect("overlay");
    replace(&server);
    let prefix = remote.prefix().to_owned();
    let refused = remote.refused(&["--backing-url", &prefix]);
    assert!(refused.contains("is not the file"), "{refused}");
    assert_eq!(fs::read(&remote.overlay).expect("overlay"), before, "the overlay is untouched");
}

/// Protects: when the base is replaced below a mounted disk, reads of what was not fetched fail,
/// and everything that is local or cached stays what it was.
#[test]
fn a_base_that_is_replaced_below_a_disk_is_not_mixed() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check(0..512 * KIB);
    guest.write(6 * MIB..6 * MIB + 128 * KIB);
    guest.check(5 * MIB..5 * MIB + 64 * KIB);
    replace(&server);
    let (mut failed, mut read) = (0, 0);
    for at in (0..SIZE).step_by(64 << 10) {
        let mut bytes = vec![0; 64 << 10];
        match guest.file.read_exact_at(&mut bytes, at) {
            Ok(()) => {
                read += 1;
                let want = &guest.shadow[at as usize..at as usize + bytes.len()];
                assert_same_at("a read after the replacement", at, &bytes, want);
            }
            Err(error) => {
                failed += 1;
                assert_eq!(Errno::from_io_error(&error), Some(Errno::IO), "read at {at}: {error}");
            }
        }
    }
    assert!(read > 8 + 2, "what was local or cached can be read: {read}");
    assert!(failed > SIZE / (64 << 10) / 2, "what is missing cannot: {failed}");
    guest.check(0..512 * KIB);
    guest.check(6 * MIB..6 * MIB + 128 * KIB);
    guest.file.sync_all().expect("fsync");
    assert!(disk.log().contains("is not the file"), "{}", disk.log());
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: a server that gives no identity is refused, unless the user says that the file never
/// changes.
#[test]
fn a_server_without_identity_needs_a_word_of_the_user() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "etag off;") else { return };
    let overlay = remote.overlay.to_str().expect("UTF-8");
    let mut create = remote.command(&["create", "-b", &remote.url, "-F", "raw", overlay]);
    let done = run_within(&mut create, PROMPT);
    assert_refused(&done);
    assert!(done.stderr.contains("--unpinned"), "{done:?}");
    assert!(!remote.overlay.exists());
    let mut remote = remote;
    remote.options.push("--unpinned".into());
    let remote = remote.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    remote.stream(&disk);
    drop(server);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: an overlay that QEMU has made is pinned by its first mount.
#[test]
fn an_overlay_of_qemu_is_pinned_by_the_first_mount() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let overlay = remote.overlay.to_str().expect("UTF-8");
    let size = SIZE.to_string();
    let names = ["create", "-q", "-u", "-f", "qcow2", "-b", &remote.url, "-F", "raw"];
    qemu::img(&[&names[..], &[overlay, &size]].concat());
    assert!(!remote.is_pinned());
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check(MIB..2 * MIB);
    guest.write(0..4096);
    let shadow = guest.shadow;
    drop(guest.file);
    disk.umount();
    assert!(remote.is_pinned(), "the first mount pins");
    assert_clean(&remote.overlay);
    let disk = remote.mount().start();
    let mut guest = Guest::new(disk.open(), shadow, 1);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    replace(&server);
    let prefix = remote.prefix().to_owned();
    let refused = remote.refused(&["--backing-url", &prefix]);
    assert!(refused.contains("is not the file"), "{refused}");
}

/// Protects: an image of this host that was made above the base, and now is a backing file itself,
/// keeps what it is pinned to: its clusters are those of that base.
#[test]
fn a_local_image_in_the_middle_keeps_its_pin() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check(0..MIB);
    guest.write(2 * MIB..3 * MIB);
    let shadow = guest.shadow;
    drop(guest.file);
    disk.umount();
    let prefix = remote.prefix().to_owned();
    let create = |name: &str| {
        let top = remote.scratch.join(name);
        let middle = remote.overlay.to_str().expect("UTF-8");
        let mut command = remote.command(&["create", "-b", middle, "-F", "qcow2"]);
        (run_within(command.args(["--backing-url", &prefix]).arg(&top), PROMPT), top)
    };
    let (created, top) = create("top.qcow2");
    assert!(created.status.success(), "{created:?}");
    let disk = remote.mount_as(&top, "drive0").start();
    let mut guest = Guest::new(disk.open(), shadow, 1);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    replace(&server);
    let (refused, other) = create("other.qcow2");
    assert_refused(&refused);
    assert!(refused.stderr.contains("is not the file"), "{refused:?}");
    assert!(!other.exists());
}

/// Protects: a read-only mount of an overlay without pins writes nothing, and still does not mix.
#[test]
fn a_read_only_mount_pins_for_its_own_time() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let overlay = remote.overlay.to_str().expect("UTF-8");
    let size = SIZE.to_string();
    let names = ["create", "-q", "-u", "-f", "qcow2", "-b", &remote.url, "-F", "raw"];
    qemu::img(&[&names[..], &[overlay, &size]].concat());
    let before = fs::read(&remote.overlay).expect("overlay");
    let disk = remote.mount().args(&["--read-only"]).start();
    let file = File::open(disk.path()).expect("the disk");
    no_read_ahead(&file);
    let got = crate::support::read_at(&file, MIB, 4096);
    assert_same_at("a read", MIB, &got, &remote.content[MIB as usize..MIB as usize + 4096]);
    replace(&server);
    assert_eq!(errno(file.read_at(&mut [0; 4096], 5 * MIB)), Errno::IO);
    drop(file);
    disk.umount();
    assert_eq!(fs::read(&remote.overlay).expect("overlay"), before, "nothing was written");
}

/// Protects: a stream down to a remote base writes its whole name into the header, also if the
/// image that has named it lies elsewhere. What is left out in messages can be a signature.
#[test]
fn a_stream_down_to_a_remote_base_keeps_its_whole_name() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, mut remote)) = on_nginx(SIZE, "") else { return };
    remote.url.push_str("?X-Amz-Signature=5ec4e7");
    let middle = remote.scratch.dir("elsewhere").join("middle.qcow2");
    remote.create_at(&middle);
    let middle = middle.to_str().expect("UTF-8");
    let mut create = remote.command(&["create", "-b", middle, "-F", "qcow2"]);
    run_ok(create.args(["--backing-url", remote.prefix()]).arg(&remote.overlay));
    let disk = remote.mount().qmp().start();
    let mut client = QmpClient::connect(disk.socket());
    client.ok("block-stream", json!({"device": "drive0", "base-node": "backing-2"}));
    client.wait_completed();
    disk.umount();
    let backing = header::Header::load(&remote.overlay).backing.expect("a backing file");
    assert_eq!(String::from_utf8_lossy(&backing), remote.url);
    let disk = remote.mount().start();
    remote.guest(&disk).check_all();
    disk.umount();
}
