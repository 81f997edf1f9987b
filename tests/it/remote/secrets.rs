//! Secrets of sources: they are in no argument, log, status or error.

use super::*;

const SIZE: u64 = 4 * MIB;

/// Asserts that a text, such as the arguments of processes, has none of the secrets.
fn assert_without(what: &str, text: &str, secrets: &[&str]) {
    for secret in secrets {
        assert!(!text.contains(secret), "{what} contains the secret {secret}: {text}");
    }
}

/// Everything that other users of this host, or readers of its logs, see of a disk.
fn assert_secret(remote: &Remote, disk: &Daemon, secrets: &[&str]) {
    for pid in descendants(disk.pid()).into_iter().chain([disk.pid()]) {
        let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
        let arguments = arguments.unwrap_or_default();
        assert_without("a command line", &String::from_utf8_lossy(&arguments), secrets);
    }
    assert_without("the log", &disk.log(), secrets);
    let path = disk.path().to_str().expect("UTF-8");
    for arguments in
        [&["status", path][..], &["status", "--json", path], &["status"], &["top", path]]
    {
        let done = run_within(remote.scratch.cordisk().args(arguments), PROMPT);
        assert_without(
            &format!("{arguments:?}"),
            &format!("{}{}", done.stdout, done.stderr),
            secrets,
        );
    }
    for entry in fs::read_dir(remote.scratch.runtime_dir()).expect("registry").flatten() {
        let text = fs::read(entry.path()).unwrap_or_default();
        assert_without("the registry", &String::from_utf8_lossy(&text), secrets);
    }
    let cache = remote.cache().display().to_string();
    let cached = run_ok(remote.scratch.cordisk().args(["cache", "list", "--cache", &cache]));
    assert_without("the list of the cache", &cached, secrets);
    for entry in fs::read_dir(remote.cache()).expect("cache").flatten() {
        if entry.path().extension().is_some_and(|suffix| suffix == "json") {
            let text = fs::read_to_string(entry.path()).expect("facts of a cached file");
            assert_without("a file of the cache", &text, secrets);
        }
    }
}

/// Protects: the secret key of an object store, and the signature of a presigned URL.
#[test]
fn secrets_are_nowhere() {
    requires!("/dev/fuse", "qemu-img", "radosgw", "ceph-mon", "ceph-osd", "python3");
    let Some(ceph) = test_servers::radosgw() else { return };
    let content = content(SIZE);
    let remote = on_s3(&ceph, "base.raw", content.clone());
    let text = format!(
        "[[source]]\nprefix = \"s3://golden/\"\nendpoint = \"{}\"\nallow-http = true\n",
        ceph.endpoint
    );
    let remote = remote.sources(&text).option("--source-timeout", "1").create();
    let presigned = ceph.presign("/golden/base.raw", 600);
    let signature = presigned.split("X-Amz-Signature=").nth(1).expect("a signature").to_owned();
    let signed = Remote::new(&presigned, content).option("--source-timeout", "1").create();

    let disks = [remote.mount().start(), signed.mount().start()];
    let secrets = [ceph.secret_key.clone(), signature];
    let secrets: Vec<&str> = secrets.iter().map(String::as_str).collect();
    for (remote, disk) in [&remote, &signed].into_iter().zip(&disks) {
        let mut guest = remote.guest(disk);
        guest.check(0..MIB);
        assert_secret(remote, disk, &secrets);
    }
    drop(ceph);
    for (remote, disk) in [&remote, &signed].into_iter().zip(&disks) {
        let guest = remote.guest(disk);
        let missing = std::os::unix::fs::FileExt::read_at(&guest.file, &mut [0; 512], 3 * MIB);
        assert_eq!(crate::support::errno(missing), rustix::io::Errno::IO);
        assert_secret(remote, disk, &secrets);
    }
    disks.into_iter().for_each(Daemon::umount);
    // A mount that fails says why, without the signature.
    fs::remove_file(&signed.overlay).expect("the overlay");
    let overlay = signed.overlay.to_str().expect("UTF-8");
    let names = ["create", "-q", "-u", "-f", "qcow2", "-b", &presigned, "-F", "raw", overlay, "4M"];
    qemu::img(&names);
    let prefix = signed.prefix().to_owned();
    for more in [&[][..], &["--backing-url", &prefix]] {
        let refused = signed.refused(more);
        assert_without("an error", &refused, &secrets);
    }
}

/// Asserts that no process of the disk with the main process `main` but its fetcher has a secret in
/// its environment.
fn assert_environments(main: Pid, secrets: &[&str]) {
    let read = |pid: Pid, name: &str| {
        let bytes = fs::read(format!("/proc/{}/{name}", pid.as_raw_nonzero())).expect("/proc");
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let all = descendants(main).into_iter().chain([main]);
    let others: Vec<Pid> =
        all.filter(|pid| read(*pid, "comm").trim() != "cordisk-fetcher").collect();
    let names: Vec<String> =
        others.iter().map(|pid| read(*pid, "comm").trim().to_owned()).collect();
    assert_eq!(names, ["cordisk", "cordisk-keeper"]);
    for pid in others {
        let environment = read(pid, "environ");
        assert!(environment.contains("PATH="), "{environment}");
        assert_without("an environment", &environment, secrets);
        assert!(!environment.contains("AWS_"), "{environment}");
        assert_without("a command line", &read(pid, "cmdline"), secrets);
    }
}

/// Protects: credentials of the environment are in that of the fetcher alone, also of a fetcher
/// that was started anew; the serving process, the keeper and the command of `--on-complete` do not
/// have them. In the foreground and in the background.
#[test]
fn credentials_of_the_environment_are_those_of_the_fetcher() {
    requires!("/dev/fuse", "qemu-img", "radosgw", "ceph-mon", "ceph-osd", "python3");
    let Some(ceph) = test_servers::radosgw() else { return };
    let remote = on_s3(&ceph, "base.raw", content(SIZE))
        .environment("AWS_ENDPOINT_URL", &ceph.endpoint)
        .environment("AWS_ALLOW_HTTP", "true")
        .environment("HTTPS_PROXY", "http://user:proxysecret@proxy.invalid:3128");
    let text = "[[source]]\nprefix = \"s3://golden/\"\nallow-http = true\n";
    let remote = remote.sources(text).create();
    let secrets = [ceph.secret_key.as_str(), "proxysecret"];
    let seen = remote.scratch.join("environment");
    let command = format!("cat /proc/self/environ >{0}.new; mv {0}.new {0}", seen.display());

    let disk = remote.mount().args(&["--on-complete", &command]).start();
    let mut guest = remote.guest(&disk);
    for turn in 0..2 {
        guest.check(turn * MIB..(turn + 1) * MIB);
        assert_environments(disk.pid(), &secrets);
        kill_process(fetcher_of(&disk), Signal::KILL).expect("kill");
    }
    remote.stream(&disk);
    wait_until("the command has run", || seen.exists());
    let environment = fs::read(&seen).expect("the environment of the command");
    let environment = String::from_utf8_lossy(&environment);
    assert!(environment.contains("CORDISK_IMAGE="), "{environment}");
    assert_without("the environment of the command", &environment, &secrets);
    guest.check_all();
    drop(guest.file);
    disk.umount();

    let second = remote.scratch.join("second.qcow2");
    remote.create_at(&second);
    let mountpoint = remote.scratch.join("second.raw");
    let paths = [&second, &mountpoint].map(|path| path.to_str().expect("UTF-8").to_owned());
    run_ok(&mut remote.command(&["mount", "--backing-url", remote.prefix(), &paths[0], &paths[1]]));
    let status = run_ok(remote.scratch.cordisk().args(["status", "--json", &paths[1]]));
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    let pid = status[0]["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    assert_environments(pid.expect("a process id"), &secrets);
    assert_same("the disk", &fs::read(&mountpoint).expect("read"), &remote.content);
    run_ok(remote.scratch.cordisk().args(["umount", &paths[1]]));
}
