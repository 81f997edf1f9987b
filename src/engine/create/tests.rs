//! qemu-img must accept new overlays, and a failed creation must leave no file behind.

use std::fs;
use std::process::Command;

use super::*;

fn create(options: &CreateOptions) -> Result<()> {
    super::create(options, &Gate::default())
}

fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .current_dir(dir)
        .args(args)
        .output()
        .expect("qemu-img is installed");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn options(dir: &Path) -> CreateOptions {
    fs::write(dir.join("base.raw"), vec![7; 1_000_000]).unwrap();
    CreateOptions {
        overlay: dir.join("overlay.qcow2"),
        base: "base.raw".into(),
        format: BackingFormat::Raw,
        size: None,
        cluster_size: 65536,
        extended_l2: false,
    }
}

#[test]
fn overlays_of_every_cluster_size_read_as_their_base() {
    for bits in 9..=21 {
        let dir = tempfile::tempdir().unwrap();
        create(&CreateOptions { cluster_size: 1 << bits, ..options(dir.path()) }).unwrap();
        qemu_img(dir.path(), &["check", "-q", "overlay.qcow2"]);
        let info = qemu_img(dir.path(), &["info", "--output=json", "overlay.qcow2"]);
        for part in [
            "\"backing-filename\": \"base.raw\"",
            "\"backing-filename-format\": \"raw\"",
            "\"virtual-size\": 1000448",
        ] {
            assert!(info.contains(part), "{info}");
        }
        assert!(info.contains(&format!("\"cluster-size\": {}", 1 << bits)), "{info}");
        qemu_img(
            dir.path(),
            &["compare", "-q", "-f", "qcow2", "-F", "raw", "overlay.qcow2", "base.raw"],
        );
    }
}

#[test]
fn sizes_are_those_asked_for() {
    for (asked, expected) in [
        (None, 1_000_448),
        (Some(0), 0),
        (Some(1), 512),
        (Some(1 << 40), 1u64 << 40),
        (Some(512), 512),
    ] {
        let dir = tempfile::tempdir().unwrap();
        create(&CreateOptions { size: asked, ..options(dir.path()) }).unwrap();
        let info = qemu_img(dir.path(), &["info", "--output=json", "overlay.qcow2"]);
        assert!(info.contains(&format!("\"virtual-size\": {expected},")), "{info}");
        qemu_img(dir.path(), &["check", "-q", "overlay.qcow2"]);
    }
}

#[test]
fn nonsense_is_refused_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let good = options(dir.path());
    for (bad, kind, word) in [
        (CreateOptions { base: "missing".into(), ..good.clone() }, ErrorKind::NotFound, "missing"),
        (
            CreateOptions { base: "nbd:localhost".into(), ..good.clone() },
            ErrorKind::UnsupportedFeature,
            "protocol",
        ),
        (
            CreateOptions { base: String::new(), ..good.clone() },
            ErrorKind::InvalidArgument,
            "empty",
        ),
        (
            CreateOptions { format: BackingFormat::Qcow2, ..good.clone() },
            ErrorKind::InvalidImage,
            "base.raw: not a qcow2 image",
        ),
        (
            CreateOptions { cluster_size: 65537, ..good.clone() },
            ErrorKind::InvalidArgument,
            "65537",
        ),
        (CreateOptions { cluster_size: 256, ..good.clone() }, ErrorKind::InvalidArgument, "256"),
        (
            CreateOptions { cluster_size: 4 << 20, ..good.clone() },
            ErrorKind::InvalidArgument,
            "4194304",
        ),
        (
            CreateOptions { size: Some(1 << 61), ..good.clone() },
            ErrorKind::InvalidArgument,
            "too large",
        ),
        (
            CreateOptions { size: Some(u64::MAX), ..good.clone() },
            ErrorKind::InvalidArgument,
            "too large",
        ),
        (
            CreateOptions {
                overlay: dir.path().join("none/overlay"),
                base: "../base.raw".into(),
                ..good.clone()
            },
            ErrorKind::NotFound,
            "none",
        ),
    ] {
        let error = create(&bad).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(!bad.overlay.exists());
    }
    create(&good).unwrap();
}

#[test]
fn a_file_that_exists_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    fs::write(&options.overlay, b"precious").unwrap();
    let error = create(&options).unwrap_err();
    assert_eq!(error.errno(), Some(17), "{error}");
    assert_eq!(fs::read(&options.overlay).unwrap(), b"precious");
}

#[test]
fn a_qcow2_base_gives_its_virtual_size() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    qemu_img(
        dir.path(),
        &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2", "5M"],
    );
    create(&CreateOptions { base: "middle.qcow2".into(), format: BackingFormat::Qcow2, ..options })
        .unwrap();
    assert!(qemu_img(dir.path(), &["info", "overlay.qcow2"]).contains("5 MiB"));
}

/// Protects: a partial file is removed when the file system fills up while the overlay is written.
/// A limit on the size of files, in a process of its own, stands in for a full file system.
#[test]
fn a_partial_file_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    if std::env::var_os("CORDISK_TEST_PARTIAL").is_none() {
        let test = "create::tests::a_partial_file_is_removed";
        let limited =
            format!("trap '' XFSZ; ulimit -f 100; exec \"$0\" --exact {test} --nocapture");
        let exe = std::env::current_exe().unwrap();
        let status = Command::new("bash")
            .args(["-c", &limited])
            .arg(exe)
            .env("CORDISK_TEST_PARTIAL", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    fs::write(dir.path().join("base.raw"), vec![7; 4096]).unwrap();
    let options = CreateOptions {
        overlay: dir.path().join("overlay.qcow2"),
        base: "base.raw".into(),
        format: BackingFormat::Raw,
        size: None,
        cluster_size: 65536,
        extended_l2: false,
    };
    let error = create(&options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(!options.overlay.exists());
}
