//! Chunk lists: no byte that is not the published one reaches the disk or stays in the cache.

use std::os::unix::fs::FileExt;
use std::thread;

use rustix::io::Errno;

use super::*;
use crate::support::errno;
use crate::support::pattern::assert_same_at;

const SIZE: u64 = 8 * MIB + 300 * KIB;

/// Writes the chunk list beside the base on the server; returns its name for `--base-digest`.
pub(super) fn publish(server: &Nginx, remote: &Remote) -> String {
    let base = server.root().join("golden/base.raw");
    let text = run_ok(remote.scratch.cordisk().arg("sums").arg(&base));
    let digest = text.split_whitespace().next().expect("a digest").to_owned();
    assert!(digest.starts_with("sha256:") && digest.len() == 7 + 64, "{text}");
    assert!(server.root().join("golden/base.raw.cordisk-sums").exists());
    digest
}

/// Flips one bit in a file, and keeps its time, which is what nginx makes its identity of.
fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("open");
    let modified = file.metadata().and_then(|metadata| metadata.modified()).expect("time");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read");
    file.write_all_at(&[byte[0] ^ 4], offset).expect("write");
    file.set_modified(modified).expect("time");
}

fn with_digest() -> Option<(Nginx, Remote)> {
    let (server, remote) = on_nginx(SIZE, "")?;
    let digest = publish(&server, &remote);
    let remote = remote.option("--base-digest", &digest).create();
    Some((server, remote))
}

/// Protects: with a digest everything works as without, and the digest is part of the pin.
#[test]
fn a_base_with_a_digest_is_read_and_streamed() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = with_digest() else { return };
    let mut rng = Rng::for_test("a_base_with_a_digest_is_read_and_streamed");
    let mut remote = remote;
    // The digest of the pin is used when the mount names none.
    remote.options.truncate(2);
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    random_reads(&mut guest, &mut rng, 10);
    remote.stream(&disk);
    drop(server);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    let mut content = remote.content.clone();
    content.resize(SIZE.next_multiple_of(512) as usize, 0);
    remote.assert_standalone(&content);
}

/// Protects: one flipped bit on the server makes its chunk unreadable and nothing else, and it is
/// never in the cache.
#[test]
fn a_flipped_bit_on_the_server_is_never_read() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = with_digest() else { return };
    let base = server.root().join("golden/base.raw");
    flip(&base, 6 * MIB + 77_777);
    let disk = remote.mount().start();
    // All at once, so that one fetch brings several chunks.
    thread::scope(|scope| {
        for chunk in 0..SIZE.div_ceil(MIB) {
            let mut guest = remote.guest(&disk);
            let range = chunk * MIB..(chunk * MIB + MIB).min(SIZE);
            scope.spawn(move || {
                if chunk != 6 {
                    return guest.check(range);
                }
                for at in [range.start, range.start + 77_777, range.end - 512] {
                    assert_eq!(errno(guest.file.read_at(&mut [0; 512], at)), Errno::IO, "at {at}");
                }
            });
        }
    });
    let mut guest = remote.guest(&disk);
    assert!(disk.log().contains("chunk 6"), "{}", disk.log());
    let data = data_of_cache(&remote);
    let cached = fs::read(&data).expect("cache");
    let chunk = 6 * MIB as usize..7 * MIB as usize;
    assert!(cached[chunk].iter().all(|byte| *byte == 0), "the chunk is in the cache");
    // The right file is back.
    flip(&base, 6 * MIB + 77_777);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: one flipped bit in the cache is found at the next mount, and fetched again.
#[test]
fn a_flipped_bit_in_the_cache_is_fetched_again() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = with_digest() else { return };
    run_ok(&mut remote.command(&["cache", "fill", &remote.url]));
    let data = data_of_cache(&remote);
    assert_same("the cache", &fs::read(&data).expect("cache"), &remote.content);
    flip(&data, 5 * MIB + 4242);
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check_all();
    let log = disk.log();
    assert!(log.contains("chunk 5") && log.contains("damaged in the cache"), "{log}");
    drop(guest.file);
    disk.umount();
    let cached = fs::read(&data).expect("cache");
    assert_same_at("the cache", 0, &cached, &remote.content);
    assert_clean(&remote.overlay);
}

/// Protects: a base with a digest that is in the cache needs no server, not even for its list.
#[test]
fn a_base_with_a_digest_in_the_cache_needs_no_server() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = with_digest() else { return };
    run_ok(&mut remote.command(&["cache", "fill", &remote.url]));
    drop(server);
    let disk = remote.mount().start();
    remote.stream(&disk);
    remote.guest(&disk).check_all();
    disk.umount();
    qemu::assert_independent(&remote.overlay);
}

/// Protects: a list that is not the one that was asked for is refused.
#[test]
fn another_chunk_list_is_refused() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    publish(&server, &remote);
    let other = format!("sha256:{}", "5e".repeat(32));
    let overlay = remote.overlay.to_str().expect("UTF-8");
    let mut create = remote.command(&["create", "-b", &remote.url, "-F", "raw", overlay]);
    let done = run_within(create.args(["--base-digest", &other]), PROMPT);
    assert_refused(&done);
    assert!(done.stderr.contains("is not the chunk list with the digest"), "{done:?}");
    assert!(!remote.overlay.exists());
    let digest = publish(&server, &remote);
    let remote = remote.option("--base-digest", &digest).create();
    let mut remote = remote;
    remote.options.truncate(2);
    let prefix = remote.prefix().to_owned();
    let refused = remote.refused(&["--backing-url", &prefix, "--base-digest", &other]);
    assert!(refused.contains("contradicts"), "{refused}");
}

/// Protects: zeros that an NBD server claims are compared with the chunk list as well. The filter
/// claims zeros where the file has data.
#[test]
fn zeros_that_a_server_claims_are_not_believed() {
    requires!("/dev/fuse", "qemu-img", "nbdkit");
    let content = content(8 * MIB);
    let golden = Scratch::new();
    let base = golden.dir("exports").join("base.raw");
    fs::write(&base, &content).expect("base");
    let text = run_ok(golden.cordisk().arg("sums").arg(&base));
    let digest = text.split_whitespace().next().expect("a digest");
    let claims = golden.write("claims", b"4M 3M hole,zero\n").display().to_string();
    let (directory, claims) =
        (format!("dir={}", golden.join("exports").display()), format!("extentlist={claims}"));
    let arguments = ["-r", "--filter=extentlist", "file", &directory, &claims];
    let Some(server) = test_servers::nbdkit(&arguments) else { return };
    let remote = Remote::new(&server.url("base.raw"), content);
    let remote = remote.option("--base-digest", digest).create();
    let disk = remote.mount().start();
    remote.stream(&disk);
    let mut guest = remote.guest(&disk);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// The one data file of the cache.
fn data_of_cache(remote: &Remote) -> PathBuf {
    let files = fs::read_dir(remote.cache()).expect("cache").flatten().map(|entry| entry.path());
    let mut data: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|suffix| suffix == "data")).collect();
    assert_eq!(data.len(), 1, "{data:?}");
    data.remove(0)
}
