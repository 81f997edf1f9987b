//! A source that is away for the whole time: what the cache holds is enough, and commands that need
//! no content do not ask for it.

use serde_json::Value;

use super::*;

const SIZE: u64 = 8 * MIB;

/// Fills the cache, ends the server, and returns what is left.
fn filled(options: &[(&str, &str)]) -> Option<Remote> {
    let (server, remote) = on_nginx(SIZE, "")?;
    let remote = options.iter().fold(remote, |remote, (name, value)| remote.option(name, value));
    let remote = remote.create();
    let filled = run_ok(&mut remote.command(&["cache", "fill", &remote.url]));
    assert!(filled.contains("8.00 MiB") || filled.contains("8 MiB"), "{filled}");
    drop(server);
    Some(remote)
}

/// Protects: a disk whose base is in the cache mounts, reads and is streamed to completion without
/// any server.
#[test]
fn a_filled_cache_needs_no_server() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let mut rng = Rng::for_test("a_filled_cache_needs_no_server");
    let Some(remote) = filled(&[]) else { return };
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    random_reads(&mut guest, &mut rng, 10);
    guest.write(100_000..300_000);
    remote.stream(&disk);
    guest.check_all();
    let shadow = guest.shadow;
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&shadow);
}

/// Protects: the same for an image in qcow2 format with a backing file of its own: its tables are
/// read from the cache.
#[test]
fn a_filled_cache_of_a_chain_needs_no_server() {
    requires!("/dev/fuse", "qemu-img", "qemu-io", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let middle = server.root().join("golden/middle.qcow2");
    qemu::create(&middle, None, "", Some(("base.raw", "raw")));
    let pattern = Pattern::new(0x31D, 7);
    qemu::write_pattern(&middle, pattern, &[MIB..2 * MIB]);
    let mut content = remote.content.clone();
    pattern.fill(MIB, &mut content[MIB as usize..2 * MIB as usize]);
    let base = remote.url.clone();
    let url = base.replace("base.raw", "middle.qcow2");
    let remote = Remote { url, content, format: "qcow2", ..remote };
    let prefix = remote.prefix().to_owned();
    let overlay = remote.overlay.to_str().expect("UTF-8");
    let mut create = remote.command(&["create", "-b", &remote.url, "-F", "qcow2", overlay]);
    run_ok(create.args(["--backing-url", &prefix]));
    for url in [&base, &remote.url] {
        run_ok(&mut remote.command(&["cache", "fill", url]));
    }
    drop(server);
    let disk = remote.mount().start();
    remote.guest(&disk).check_all();
    remote.stream(&disk);
    remote.guest(&disk).check_all();
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: the same if the server takes connections and does not answer them, with a deadline
/// that is shorter than the time after which a request counts as stalled.
#[test]
fn a_filled_cache_needs_no_server_that_hangs() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.option("--source-timeout", "2").create();
    run_ok(&mut remote.command(&["cache", "fill", &remote.url]));
    kill_process(nginx_pid(&server), Signal::STOP).expect("stop");
    let disk = remote.mount().start();
    remote.guest(&disk).check_all();
    remote.stream(&disk);
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: without cache and without server, a mount of a pinned raw base works, and its reads
/// fail; `status`, `map`, `info` and `check` answer.
#[test]
fn commands_without_content_need_no_server() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.option("--source-timeout", "1").create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check(0..MIB);
    kill_process(nginx_pid(&server), Signal::STOP).expect("stop");
    commands_answer(&remote, Some(&disk));
    kill_server(nginx_pid(&server));
    commands_answer(&remote, Some(&disk));
    drop(guest.file);
    disk.umount();
    commands_answer(&remote, None);
    fs::remove_dir_all(remote.cache()).expect("remove the cache");
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    guest.check(0..64 * KIB);
    let missing = crate::support::errno(std::os::unix::fs::FileExt::read_at(
        &guest.file,
        &mut [0; 512],
        5 * MIB,
    ));
    assert_eq!(missing, rustix::io::Errno::IO);
    commands_answer(&remote, Some(&disk));
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

fn commands_answer(remote: &Remote, disk: Option<&Daemon>) {
    // Less than any deadline of a source by default.
    let run = |arguments: &[&str]| {
        let done = run_within(remote.scratch.cordisk().args(arguments), Duration::from_secs(20));
        assert!(done.status.success(), "{arguments:?}: {done:?}");
        done.stdout
    };
    let overlay = remote.overlay.to_str().expect("UTF-8");
    if let Some(disk) = disk {
        let path = disk.path().to_str().expect("UTF-8");
        let status = run(&["status", path]);
        assert!(status.contains("base.raw"), "{status}");
        let _: Value = serde_json::from_str(&run(&["status", "--json", path])).expect("JSON");
        let map: Value = serde_json::from_str(&run(&["map", "--json", path])).expect("JSON");
        assert!(map.to_string().contains("start"), "{map}");
        run(&["info", "--backing-chain", path]);
    } else {
        let checked = run(&["check", overlay]);
        assert!(checked.contains("No errors"), "{checked}");
        let info = run(&["info", "--backing-chain", overlay]);
        assert!(info.contains(&remote.url), "{info}");
        let map = run(&["map", overlay]);
        assert!(map.contains(&format!("layer 1 is not asked: {}", remote.url)), "{map}");
        run(&["map", "--png", "/dev/null", overlay]);
    }
}

/// Protects: the map of an image that is not mounted tells what is local, and leaves the rest to
/// the remote file below without asking a server: in a chain with a local image between, and where
/// the remote file is shorter than the disk, without a pin, or itself an image.
#[test]
fn the_map_of_an_image_leaves_the_rest_to_the_server() {
    requires!("qemu-img", "qemu-io", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let overlay = remote.overlay.to_str().expect("UTF-8");
    run_ok(&mut remote.command(&["create", "-b", &remote.url, "-F", "raw", overlay, "9M"]));
    kill_server(nginx_pid(&server));
    let part = |start, length, depth, present: bool, offset: Option<u64>| {
        let mut part = json!({
            "start": start, "length": length, "depth": depth, "present": present,
            "zero": !present, "data": present, "compressed": false,
        });
        if let Some(offset) = offset {
            part["offset"] = offset.into();
        }
        part
    };
    let distant = |mut part: Value| {
        part["filename"] = remote.url.as_str().into();
        part
    };
    let map = |image: &str| -> Vec<Value> {
        let mut command = remote.scratch.cordisk();
        let done = run_within(command.args(["map", "--json", image]), PROMPT);
        assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
        serde_json::from_str(&done.stdout).expect("JSON")
    };
    // The base ends before the disk.
    let short = [distant(part(0, SIZE, 1, true, Some(0))), part(SIZE, MIB, 0, false, None)];
    assert_eq!(map(overlay), short);

    let above = remote.scratch.join("above.qcow2");
    qemu::create(&above, Some(9 * MIB), "", None);
    qemu::io(&above, &["write -P 7 1M 64k"]);
    let alone: Value = serde_json::from_str(&qemu::img(&[
        "map".as_ref(),
        "--output=json".as_ref(),
        above.as_os_str(),
    ]))
    .expect("JSON");
    let offset = alone[1]["offset"].as_u64();
    let above = above.to_str().expect("UTF-8");
    qemu::img(&["rebase", "-u", "-b", overlay, "-F", "qcow2", above]);
    let chain = [
        distant(part(0, MIB, 2, true, Some(0))),
        part(MIB, 64 * KIB, 0, true, offset),
        distant(part(MIB + 64 * KIB, SIZE - MIB - 64 * KIB, 2, true, Some(MIB + 64 * KIB))),
        part(SIZE, MIB, 1, false, None),
    ];
    assert_eq!(map(above), chain);

    let unpinned = |base: &str, format: &str| {
        let image = remote.scratch.join("unpinned").display().to_string();
        qemu::img(&["create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", format, &image, "9M"]);
        image
    };
    // Nothing says how large the file is, or where in it a byte of the disk lies.
    for (format, offset) in [("raw", Some(0)), ("qcow2", None)] {
        let unknown = unpinned(&remote.url, format);
        assert_eq!(map(&unknown), [distant(part(0, 9 * MIB, 1, true, offset))]);
    }
    let secret = format!("{}?X-Amz-Signature=verysecret", remote.url);
    let signed = unpinned(&secret, "raw");
    let picture = run_ok(remote.scratch.cordisk().args(["map", &signed]));
    let list = json!(map(&signed)).to_string();
    for text in [picture, list] {
        assert!(text.contains(&remote.url) && !text.contains("verysecret"), "{text}");
    }
}
