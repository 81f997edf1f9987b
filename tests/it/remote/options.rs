//! Options of mount, together with a remote base.

use super::*;

const SIZE: u64 = 8 * MIB;

/// Protects: `--cache none` works like a cache, and leaves no file.
#[test]
fn without_a_cache_no_file_stays() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let mut rng = Rng::for_test("without_a_cache_no_file_stays");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let mut remote = remote;
    remote.options = vec!["--cache".into(), "none".into()];
    let remote = remote.create();
    let names = || -> Vec<String> {
        let entries = fs::read_dir(remote.scratch.path()).expect("scratch").flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let disk = remote.mount().start();
    let before = names();
    let mut guest = remote.guest(&disk);
    random_reads(&mut guest, &mut rng, 10);
    kill_process(fetcher_of(&disk), Signal::KILL).expect("kill");
    random_reads(&mut guest, &mut rng, 10);
    remote.stream(&disk);
    drop(server);
    guest.check_all();
    assert_eq!(names(), before, "files in the directory of the image");
    drop(guest.file);
    disk.umount();
    assert_eq!(fs::read_dir(remote.cache()).expect("cache").count(), 0, "nothing is kept");
    remote.assert_standalone(&remote.content);
}

/// Reads everything through a disk with `--cache none`, and asserts that hardly anything of it is
/// in the cache afterwards.
fn leaves_the_cache(format: &'static str) {
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let base = server.root().join("golden/base.raw");
    let image = base.with_extension("qcow2");
    let [base, image] = [&base, &image].map(|path| path.to_str().expect("UTF-8"));
    qemu::img(&["convert", "-f", "raw", "-O", "qcow2", base, image]);
    let url = remote.url.replace("base.raw", &format!("base.{format}"));
    let options = vec!["--cache".into(), "none".into()];
    let remote = Remote { url, format, options, ..remote }.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check_all();
    let cached = || {
        let mut status = remote.scratch.cordisk();
        let status = run_ok(status.args(["status", "--json"]).arg(disk.path()));
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        status[0]["sources"][0]["cached-bytes"].as_u64().unwrap_or_else(|| panic!("{status}"))
    };
    // A read is answered before its copy is stored.
    wait_until("the cache is nearly empty", || cached() <= SIZE / 16);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: with `--cache none`, what was copied up leaves the cache while the disk is mounted, of
/// a raw base and of one in qcow2 format.
#[test]
fn what_is_copied_up_leaves_the_cache() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    leaves_the_cache("raw");
    leaves_the_cache("qcow2");
}

/// Protects: a read-only mount reads a remote base, and changes no byte of the image.
#[test]
fn a_read_only_mount_changes_nothing() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let before = fs::read(&remote.overlay).expect("overlay");
    let disk = remote.mount().args(&["--read-only"]).start();
    assert_same("the disk", &disk.read_all(), &remote.content);
    disk.umount();
    assert_eq!(fs::read(&remote.overlay).expect("overlay"), before);
    assert!(fs::read_dir(remote.cache()).expect("cache").count() > 0, "the cache is used");
}

/// Protects: without copy-on-read the image stays small, and the bytes come from the cache.
#[test]
fn without_copy_on_read_the_cache_serves() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().args(&["--no-copy-on-read"]).start();
    let mut guest = remote.guest(&disk);
    guest.check_all();
    guest.write(100..MIB);
    guest.check_all();
    kill_server(nginx_pid(&server));
    guest.file.sync_all().expect("fsync");
    guest.check_all();
    drop(guest.file);
    disk.umount();
    assert!(
        fs::metadata(&remote.overlay).expect("overlay").len() <= 3 * MIB,
        "nothing was copied up"
    );
}

/// Protects: as root with `--user`, everything works that works without, and the keeper starts a
/// new fetcher after the daemon has become that user.
#[test]
fn a_disk_of_another_user() {
    requires!("/dev/fuse", "root", "qemu-img", "nginx", "openssl");
    let mut rng = Rng::for_test("a_disk_of_another_user");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    remote.scratch.open_to_all();
    let disk =
        remote.mount().args(&["--user", "nobody", "--allow-other", "--sandbox", "require"]).start();
    let mut guest = remote.guest(&disk);
    random_reads(&mut guest, &mut rng, 10);
    kill_process(fetcher_of(&disk), Signal::KILL).expect("kill");
    random_reads(&mut guest, &mut rng, 10);
    remote.stream(&disk);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&remote.content);
}
