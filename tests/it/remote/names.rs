//! Names of remote files: an image is not trusted with them.

use super::*;

/// Makes an overlay whose header has this backing name, as any image may have it.
fn named(remote: &Remote, name: &str) {
    let _ = fs::remove_file(&remote.overlay);
    let overlay = remote.overlay.to_str().expect("UTF-8");
    qemu::img(&["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", overlay, "8M"]);
}

/// Protects: a name in an image makes this host ask no server that the user has not allowed.
#[test]
fn an_image_names_only_what_is_allowed() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(8 * MIB, "") else { return };
    let port = server.http;
    let golden = format!("http://127.0.0.1:{port}/golden/");
    fs::create_dir(server.root().join("golden-evil")).expect("directory");
    fs::write(server.root().join("golden-evil/base.raw"), &remote.content).expect("base");

    named(&remote, &remote.url);
    let refused = remote.refused(&[]);
    assert!(refused.contains(&format!("--backing-url {golden}")), "what to pass: {refused}");
    let refused = remote.refused(&["--backing-url", "http://127.0.0.1:1/golden/"]);
    assert!(refused.contains("--backing-url"), "another port: {refused}");
    let refused = remote.refused(&["--backing-url", &golden.replace("http", "https")]);
    assert!(refused.contains("--backing-url"), "another protocol: {refused}");

    for evil in ["golden-evil/base.raw", "golden/../golden-evil/base.raw"] {
        named(&remote, &format!("http://127.0.0.1:{port}/{evil}"));
        for prefix in [&golden, golden.trim_end_matches('/')] {
            let refused = remote.refused(&["--backing-url", prefix]);
            assert!(refused.contains("golden-evil/"), "{evil} below {prefix}: {refused}");
        }
    }
    named(&remote, &format!("http://127.0.0.1:{port}/golden/%2e%2e%2fgolden-evil/base.raw"));
    let refused = remote.refused(&["--backing-url", &golden]);
    assert!(refused.contains("--backing-url"), "an encoded parent: {refused}");

    let log = server.root().with_file_name("access.log");
    let log = fs::read_to_string(log).unwrap_or_default();
    assert_eq!(log, "", "the server was not asked once");

    named(&remote, &remote.url);
    let disk = remote.mount().start();
    remote.guest(&disk).check_all();
    disk.umount();
}

/// Protects: names with passwords, and JSON, are refused, and the message does not repeat the
/// password.
#[test]
fn names_with_passwords_and_json_are_refused() {
    requires!("/dev/fuse", "qemu-img");
    let remote = Remote::new("http://127.0.0.1:9/golden/base.raw", Vec::new());
    named(&remote, "http://user:hunter2@127.0.0.1:9/golden/base.raw");
    let refused = remote.refused(&["--backing-url", "http://127.0.0.1:9/golden/"]);
    assert!(refused.contains("configuration of sources"), "{refused}");
    assert!(!refused.contains("hunter2"), "{refused}");

    // qemu-img would parse such a name, so it is put into a name of the same length.
    let json = r#"json:{"driver":"http","url":"http://127.0.0.1:9/golden/base.raw"}"#;
    named(&remote, &format!("http://127.0.0.1:9/{}", "x".repeat(json.len() - 19)));
    let mut image = fs::read(&remote.overlay).expect("overlay");
    let at = image.windows(4).position(|bytes| bytes == b"http").expect("the name");
    image[at..at + json.len()].copy_from_slice(json.as_bytes());
    fs::write(&remote.overlay, &image).expect("overlay");
    let refused = remote.refused(&["--backing-url", "http://127.0.0.1:9/golden/"]);
    assert!(refused.contains("protocol is not supported"), "{refused}");
}

/// Protects: `create` says what is wrong with a file that is not there, and leaves no overlay.
#[test]
fn create_refuses_what_is_not_there() {
    requires!("nginx", "openssl");
    let Some((_server, remote)) = on_nginx(8 * MIB, "") else { return };
    let missing = remote.url.replace("base.raw", "missing.raw");
    let overlay = remote.overlay.to_str().expect("UTF-8");
    let done =
        run_within(&mut remote.command(&["create", "-b", &missing, "-F", "raw", overlay]), PROMPT);
    assert_refused(&done);
    assert!(done.stderr.contains("missing.raw") && done.stderr.contains("404"), "{done:?}");
    assert!(!remote.overlay.exists(), "an overlay is left behind");
}
