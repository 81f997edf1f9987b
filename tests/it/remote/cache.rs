//! The cache that all disks of a host share: each byte is fetched once, and what is in use stays.

use std::thread;

use serde_json::Value;

use super::*;

const SIZE: u64 = 16 * MIB;

/// The bytes that are sent at most for one base: 1.05 times its size, and one part of a request
/// that looks at the file.
fn at_most() -> u64 {
    SIZE + SIZE / 20 + 64 * KIB
}

fn list(remote: &Remote) -> Vec<Value> {
    let cache = remote.cache().display().to_string();
    let text =
        run_ok(remote.scratch.cordisk().args(["cache", "list", "--json", "--cache", &cache]));
    serde_json::from_str(&text).expect("JSON")
}

fn prune(remote: &Remote) -> String {
    let cache = remote.cache().display().to_string();
    run_ok(remote.scratch.cordisk().args(["cache", "prune", "0", "--cache", &cache]))
}

/// Protects: eight disks that read and stream one base at the same time fetch it once; the next
/// disk fetches nothing; the cache drops nothing that is in use.
#[test]
fn eight_disks_fetch_a_base_once() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let mut rng = Rng::for_test("eight_disks_fetch_a_base_once");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let overlays: Vec<PathBuf> =
        (0..8).map(|number| remote.scratch.join(format!("{number}.qcow2"))).collect();
    overlays.iter().for_each(|overlay| remote.create_at(overlay));
    let disks: Vec<Daemon> = overlays
        .iter()
        .enumerate()
        .map(|(number, overlay)| remote.mount_as(overlay, &format!("drive{number}")).start())
        .collect();
    thread::scope(|scope| {
        for (number, disk) in disks.iter().enumerate() {
            let (remote, mut rng) = (&remote, Rng::new(rng.next()));
            scope.spawn(move || {
                let mut guest = remote.guest(disk);
                random_reads(&mut guest, &mut rng, 10);
                if number % 2 == 0 {
                    remote.stream(disk);
                }
                guest.check_all();
            });
        }
    });
    let asked = asked_bytes(&server);
    assert!(
        (SIZE - 3 * MIB..=at_most()).contains(&asked),
        "{asked} bytes were asked for in {:?}",
        asked_ranges(&server)
    );
    let files = list(&remote);
    assert_eq!(files.len(), 1, "{files:?}");
    assert_eq!(files[0]["in-use"], true, "{files:?}");
    assert_eq!(files[0]["size"], SIZE, "{files:?}");
    assert_eq!(files[0]["present"], SIZE, "{files:?}");
    assert!(prune(&remote).starts_with("0 files"), "a file in use is dropped");
    assert_eq!(list(&remote).len(), 1);
    for disk in disks {
        let mut guest = remote.guest(&disk);
        guest.check_all();
        drop(guest.file);
        disk.umount();
    }
    overlays.iter().for_each(|overlay| assert_clean(overlay));

    let later = remote.scratch.join("later.qcow2");
    remote.create_at(&later);
    let disk = remote.mount_as(&later, "later").start();
    let mut guest = remote.guest(&disk);
    remote.stream(&disk);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    let more = asked_bytes(&server) - asked;
    assert!(more <= 64 * KIB, "a disk that finds all in the cache asked for {more} bytes");
    assert_eq!(list(&remote)[0]["in-use"], false);
    let pruned = prune(&remote);
    assert!(pruned.starts_with("1 file dropped"), "{pruned}");
    assert!(list(&remote).is_empty());
    qemu::assert_independent(&later);
}

/// Protects: NBD has no identity in its protocol, but all disks of a host share what was fetched of
/// an export as well.
#[test]
fn two_disks_fetch_an_export_once() {
    requires!("/dev/fuse", "qemu-img", "nbdkit");
    let content = content(SIZE);
    let scratch = Scratch::new();
    let base = scratch.write("base.raw", &content);
    let stats = scratch.join("stats");
    let (file, stats_file) =
        (format!("file={}", base.display()), format!("statsfile={}", stats.display()));
    let arguments = ["-r", "--filter=stats", "file", &file, &stats_file];
    let Some(server) = test_servers::nbdkit(&arguments) else { return };
    let remote = Remote::new(&server.url(""), content);
    let overlays = ["a", "b"].map(|name| remote.scratch.join(format!("{name}.qcow2")));
    overlays.iter().for_each(|overlay| remote.create_at(overlay));
    let disks =
        [0, 1].map(|number| remote.mount_as(&overlays[number], &format!("drive{number}")).start());
    thread::scope(|scope| {
        for disk in &disks {
            scope.spawn(|| {
                remote.stream(disk);
                remote.guest(disk).check_all();
            });
        }
    });
    disks.into_iter().for_each(Daemon::umount);
    overlays.iter().for_each(|overlay| qemu::assert_independent(overlay));
    // The filter writes its numbers when the server ends.
    rustix::process::kill_process(nbd_pid(&server), Signal::TERM).expect("end");
    let read = || -> Option<f64> {
        let text = fs::read_to_string(&stats).ok()?;
        let line = text.lines().find(|line| line.starts_with("read: "))?;
        line.split(", ").find_map(|part| {
            part.split(' ')
                .next()?
                .parse()
                .ok()
                .filter(|_| part.contains("iB") && !part.contains("iB/s"))
        })
    };
    wait_until("the filter writes its numbers", || read().is_some());
    let text = fs::read_to_string(&stats).expect("numbers");
    let mib = read().expect("MiB");
    assert!(mib <= 1.05 * 16.0, "{mib} MiB were sent: {text}");
}
