//! Tests that headers of qemu-img are parsed to the right numbers and that qemu-img accepts headers
//! written here. Everything else must be refused with a message that names the field.

use std::fs;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;

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

/// Runs `qemu-img create` with `options`, `size` and optional backing arguments; returns the first
/// bytes of the file and its size.
fn made(options: &str, size: &str, backing: &[&str]) -> (Vec<u8>, u64) {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    qemu_img(
        dir.path(),
        &[&["create", "-q", "-u", "-f", "qcow2", "-o", options], backing, &["a.qcow2", size]]
            .concat(),
    );
    let bytes = fs::read(dir.path().join("a.qcow2")).unwrap();
    let len = bytes.len() as u64;
    (bytes, len)
}

fn parse(bytes: &[u8]) -> Result<Header, FormatError> {
    Header::parse(&bytes[..bytes.len().min(2 << 20)], bytes.len() as u64)
}

#[test]
fn qemu_img_images_have_the_right_numbers() {
    for (options, bits, version, order) in [
        ("compat=1.1", 16, 3, 4),
        ("compat=0.10", 16, 2, 4),
        ("cluster_size=512", 9, 3, 4),
        ("cluster_size=2M", 21, 3, 4),
        ("refcount_bits=1", 16, 3, 0),
        ("refcount_bits=64,cluster_size=4k", 12, 3, 6),
        ("compression_type=zstd", 16, 3, 4),
        ("lazy_refcounts=on", 16, 3, 4),
        ("extended_l2=on", 16, 3, 4),
        ("extended_l2=on,cluster_size=16k", 14, 3, 4),
        ("extended_l2=on,cluster_size=2M", 21, 3, 4),
    ] {
        let (bytes, len) = made(options, "64M", &[]);
        let header = parse(&bytes).unwrap();
        let geometry = header.geometry;
        assert_eq!(
            (geometry.version(), geometry.cluster_bits(), geometry.refcount_order()),
            (version, bits, order),
            "{options}"
        );
        assert_eq!(
            (geometry.size(), u64::from(header.l1_size)),
            (64 << 20, geometry.l1_entries_needed()),
            "{options}"
        );
        let extended = options.contains("extended");
        assert_eq!(geometry.has_extended_l2(), extended, "{options}");
        assert_eq!(header.facts().extended_l2, (version > 2).then_some(extended), "{options}");
        assert_eq!(header.refcount_table_offset, geometry.cluster_size(), "{options}");
        assert!(header.l1_table_offset + 8 <= len);
        assert_eq!(header.compression == CompressionType::Zstd, options.contains("zstd"));
        assert_eq!(header.compatible, u64::from(options.contains("lazy")));
        assert_eq!((header.backing.clone(), header.check_writable()), (None, Ok(())));
        assert!(format!("{header:?}").len() < 1000, "Debug is short");
    }
}

#[test]
fn qemu_img_backing_references() {
    for (options, name, format) in [
        ("compat=1.1", "base.raw", "raw"),
        ("compat=0.10", "sub dir/base ü.qcow2", "qcow2"),
        ("cluster_size=512", "x", "raw"),
    ] {
        let (bytes, _) = made(options, "10M", &["-b", name, "-F", format]);
        let backing = parse(&bytes).unwrap().backing.unwrap();
        assert_eq!(
            (backing.name.as_str(), backing.format.unwrap().to_string().as_str()),
            (name, format)
        );
    }
    // An old image without `-F` and without a size: qemu-img refuses to make one today, so the
    // extension is cut out here.
    let (mut bytes, _) = made("compat=0.10", "10M", &["-b", "base.raw", "-F", "raw"]);
    bytes[72..76].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    assert_eq!(
        parse(&bytes).unwrap().backing,
        Some(BackingReference { name: "base.raw".into(), format: None })
    );
}

#[test]
fn an_empty_disk_has_no_l1_table() {
    let (bytes, _) = made("compat=1.1", "0", &[]);
    let header = parse(&bytes).unwrap();
    assert_eq!((header.geometry.size(), header.l1_size, header.l1_table_offset), (0, 0, 0));
}

#[test]
fn a_size_between_sectors_is_rounded_down_and_kept_in_the_file() {
    let (mut bytes, _) = made("compat=1.1", "10M", &["-b", "base.raw", "-F", "raw"]);
    put(&mut bytes, 24, &(1000u64).to_be_bytes());
    let header = parse(&bytes).unwrap();
    assert_eq!(header.geometry.size(), 512);
    let patch = header.with_backing(None).unwrap();
    apply(&mut bytes, &patch);
    assert_eq!(be64(&bytes, 24), 1000);
    assert_eq!(parse(&bytes).unwrap(), patch.header);
}

#[test]
fn features_refuse_writing_and_say_what_to_do() {
    let (clean, _) = made("compat=1.1", "10M", &[]);
    for (at, value, word, remedy) in [
        (72, feature::DIRTY, "closed cleanly", "qemu-img check -r all"),
        (72, feature::CORRUPT, "corrupt", "qemu-img check -r all"),
        (88, feature::AUTOCLEAR_BITMAPS, "bitmaps", "qemu-img bitmap --remove"),
    ] {
        let mut bytes = clean.clone();
        put(&mut bytes, at, &value.to_be_bytes());
        let text = parse(&bytes).unwrap().check_writable().unwrap_err().to_string();
        assert!(
            text.contains(word) && text.contains(remedy) && text.contains("--read-only"),
            "{text}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]);
    qemu_img(dir.path(), &["snapshot", "-c", "one", "a.qcow2"]);
    let header = parse(&fs::read(dir.path().join("a.qcow2")).unwrap()).unwrap();
    assert_eq!(header.nb_snapshots, 1);
    assert!(header.check_writable().unwrap_err().to_string().contains("snapshot"));

    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "b.qcow2", "10M"]);
    qemu_img(dir.path(), &["bitmap", "--add", "b.qcow2", "mine"]);
    let header = parse(&fs::read(dir.path().join("b.qcow2")).unwrap()).unwrap();
    assert!(header.check_writable().unwrap_err().to_string().contains("bitmap"));
    qemu_img(dir.path(), &["bitmap", "--remove", "b.qcow2", "mine"]);
    assert_eq!(
        parse(&fs::read(dir.path().join("b.qcow2")).unwrap()).unwrap().check_writable(),
        Ok(())
    );
}

#[test]
fn unsupported_images_of_qemu_img_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (options, word) in [
        ("data_file=data.raw", "external data file"),
        ("data_file=data.raw,data_file_raw=on", "external data file"),
        // Not LUKS: qemu-img measures its key derivation in CPU time of a thread, and fails if
        // other programs leave that at 0 ms.
        ("encrypt.format=aes,encrypt.key-secret=s", "encrypted"),
    ] {
        let _ = fs::remove_file(dir.path().join("a.qcow2"));
        qemu_img(
            dir.path(),
            &[
                "create",
                "-q",
                "--object",
                "secret,id=s,data=x",
                "-f",
                "qcow2",
                "-o",
                options,
                "a.qcow2",
                "10M",
            ],
        );
        match parse(&fs::read(dir.path().join("a.qcow2")).unwrap()) {
            Err(FormatError::Unsupported(text)) => assert!(text.contains(word), "{text}"),
            other => panic!("{options}: {other:?}"),
        }
    }
    // The fields that qemu-img writes for encrypt.format=luks, without the key derivation: method
    // 2, and the location of the LUKS header.
    let (mut bytes, _) = made("compat=1.1", "10M", &[]);
    put(&mut bytes, 32, &2u32.to_be_bytes());
    bytes.copy_within(112..4096 - 24, 112 + 24);
    put(
        &mut bytes,
        112,
        &extension(0x0537_be77, &[0x4_0000u64.to_be_bytes(), 0x1f_9000u64.to_be_bytes()].concat()),
    );
    match parse(&bytes) {
        Err(FormatError::Unsupported(text)) => {
            assert!(text.contains("encrypted") && text.contains("crypt_method 2"), "{text}")
        }
        other => panic!("LUKS: {other:?}"),
    }
    for format in ["raw", "qed", "vmdk", "vdi", "vhdx"] {
        qemu_img(dir.path(), &["create", "-q", "-f", format, "b", "10M"]);
        assert!(
            matches!(
                parse(&fs::read(dir.path().join("b")).unwrap()),
                Err(FormatError::NotQcow2(_))
            ),
            "{format}"
        );
    }
}

/// Overwrites bytes.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Every bound once: offset in the header, bytes to put there, and a word that the message must
/// contain.
#[test]
fn every_field_out_of_bounds_is_refused_by_name() {
    let (clean, len) = made("compat=1.1", "1G", &["-b", "base.raw", "-F", "raw"]);
    let u32s = |value: u32| value.to_be_bytes().to_vec();
    let u64s = |value: u64| value.to_be_bytes().to_vec();
    let cases: Vec<(&str, usize, Vec<u8>, &str)> = vec![
        ("V2", 0, b"QFI\xfa".to_vec(), "not a qcow2 image"),
        ("V2", 4, u32s(1), "version 1"),
        ("V2", 4, u32s(4), "version 4"),
        ("V3", 20, u32s(8), "cluster_bits is 8"),
        ("V3", 20, u32s(22), "cluster_bits is 22"),
        ("V3", 20, u32s(u32::MAX), "cluster_bits"),
        ("V4", 100, u32s(96), "header_length is 96"),
        ("V4", 100, u32s(108), "header_length is 108"),
        ("V4", 100, u32s(1 << 20), "header_length"),
        ("V5", 8, u64s(8), "backing file name at 0x8"),
        ("V5", 8, u64s(65530), "backing file name at 0xfffa"),
        ("V5", 8, u64s(u64::MAX), "backing file name"),
        ("V5", 8, u64s(120), "does not fit before 0x78"),
        ("V6", 8, u64s(0), "backing file name at 0x0"),
        ("V6", 16, u32s(0), "0 bytes"),
        ("V6", 16, u32s(1024), "1024 bytes"),
        ("V6", 16, u32s(u32::MAX), "backing file name"),
        ("V6", 0x210, b"ba\nse".to_vec(), "control characters"),
        ("V6", 0x210, b"ba\xffse".to_vec(), "not UTF-8"),
        ("V7", 72, u64s(1 << 63 | 1 << 5), "bit 5, bit 63"),
        ("V7", 72, u64s(4), "external data file"),
        ("V7", 88, u64s(2), "external data file"),
        ("V8", 96, u32s(7), "refcount_order is 7"),
        ("V9", 56, u32s(0), "refcount_table_clusters is 0"),
        ("V9", 56, u32s(129), "refcount table of 129 clusters"),
        ("V9", 56, u32s(u32::MAX), "refcount table"),
        ("V10", 48, u64s(0), "refcount table at 0x0"),
        ("V10", 48, u64s(0x1_0200), "refcount table at 0x10200"),
        ("V10", 48, u64s(1 << 40), "refcount table at 0x10000000000"),
        ("V10", 48, u64s(u64::MAX - 0xffff), "refcount table at"),
        ("V11", 36, u32s(1), "l1_size is 1, too small"),
        ("V11", 36, u32s((4 << 20) + 1), "l1_size is 4194305"),
        ("V11", 36, u32s(u32::MAX), "l1_size is 4294967295"),
        ("V12", 40, u64s(0), "L1 table at 0x0"),
        ("V12", 40, u64s(0x3_0008), "L1 table at 0x30008"),
        ("V12", 40, u64s(len.next_multiple_of(65536)), "is not inside the file"),
        ("V13", 24, u64s((1 << 61) + 1), "virtual size"),
        ("V13", 24, u64s(u64::MAX), "virtual size"),
        ("V13", 24, u64s(1 << 61), "l1_size is 2, too small"),
        ("V14", 60, u32s(65537), "nb_snapshots is 65537"),
        ("V14", 60, u32s(1), "snapshot table at 0x0"),
        ("V14", 64, u64s(8), "snapshots_offset 0x8"),
        ("V15", 0x20c, u32s(9), "header extension 0x00000000"),
        ("V15", 0x74, u32s(0xffff_fff0), "header extension 0xe2792aca"),
        ("V15", 0x74, u32s(u32::MAX), "header extension 0xe2792aca"),
        ("V16", 0x78, b"vmd".to_vec(), "backing format \"vmd\""),
        ("V16", 0x74, u32s(0x10), "16 bytes"),
        ("V18", 0x80, u32s(0x2385_2875), "bitmaps extension has"),
        ("V19", 0x80, u32s(0x0537_be77), "encryption"),
        ("V19", 32, u32s(1), "encrypted"),
        ("V20", 104, vec![1], "compression_type is 1"),
        ("V20", 104, vec![2], "compression_type is 2"),
        ("V20", 72, u64s(8), "compression_type is 0"),
        ("V21", 48, u64s(0x3_0000), "overlaps"),
        ("V21", 40, u64s(0x1_0000), "overlaps"),
        ("V21", 60, [u32s(1), u64s(0x1_0000)].concat(), "snapshot table at 0x10000 overlaps"),
    ];
    parse(&clean).unwrap();
    for (rule, at, value, word) in cases {
        let mut bytes = clean.clone();
        if rule == "V16" && word == "16 bytes" {
            // The longer format reaches into the next extension. That one is cleared, so that the
            // error is about the length and not about the bytes that follow.
            put(&mut bytes, 0x88, &[0; 0x180]);
        }
        put(&mut bytes, at, &value);
        let text = parse(&bytes).expect_err(&format!("{rule} at {at}")).to_string();
        assert!(text.contains(word) && !text.contains('\n'), "{rule} at {at}: {text}");
    }
}

#[test]
fn bitmap_extensions_are_checked_where_they_count() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]);
    qemu_img(dir.path(), &["bitmap", "--add", "a.qcow2", "mine"]);
    let clean = fs::read(dir.path().join("a.qcow2")).unwrap();
    let at =
        clean.windows(4).position(|window| window == 0x2385_2875u32.to_be_bytes()).unwrap() + 8;
    parse(&clean).unwrap();
    for (offset, value, word) in [
        (0, &[0u8; 4][..], "nb_bitmaps is 0"),
        (0, &[0xff; 4], "nb_bitmaps is 4294967295"),
        (4, &[1; 4], "reserved"),
        (8, &[0; 8], "bitmap_directory_size is 0"),
        (8, &[0xff; 8], "bitmap_directory_size"),
        (16, &[0; 8], "bitmap directory at 0x0"),
        (16, &0x1_0000u64.to_be_bytes(), "overlaps"),
        (16, &[0xff; 8], "bitmap directory"),
    ] {
        let mut bytes = clean.clone();
        put(&mut bytes, at + offset, value);
        let text = parse(&bytes).expect_err(word).to_string();
        assert!(text.contains(word), "{text}");
        // Without the autoclear bit the extension is stale and may have any content.
        put(&mut bytes, 88, &[0; 8]);
        parse(&bytes).unwrap();
    }
}

#[test]
fn unknown_features_are_named_from_the_image_but_harmlessly() {
    let (mut bytes, _) = made("compat=1.1", "10M", &[]);
    put(&mut bytes, 72, &(1u64 << 3 | 1 << 9).to_be_bytes());
    put(&mut bytes, 0x78, b"\0\x09fish\x1b[31m\n\xff");
    let text = parse(&bytes).unwrap_err().to_string();
    assert_eq!(text, "unsupported incompatible feature(s): bit 9 \"fish\\u{1b}[31m\\n\u{fffd}\"");
    // A table whose length is no multiple of its entry size is ignored.
    put(&mut bytes, 0x74, &0x17fu32.to_be_bytes());
    assert_eq!(
        parse(&bytes).unwrap_err().to_string(),
        "unsupported incompatible feature(s): bit 9"
    );
}

#[test]
fn short_files_are_refused() {
    let (bytes, _) = made("compat=1.1", "10M", &[]);
    for len in (0..200).chain([511, 512, 65535, 65536, 0x2_0000]) {
        assert!(parse(&bytes[..len]).is_err(), "{len}");
    }
    let text = Header::parse(&bytes[..4096], 4096).unwrap_err().to_string();
    assert!(text.contains("4096 bytes"), "{text}");
    // The claimed size of a sparse file causes no overflow, whatever it is.
    for size in [u64::MAX, i64::MAX as u64, 1 << 62] {
        let _ = Header::parse(&bytes, size);
    }
}

fn apply(bytes: &mut [u8], patch: &HeaderPatch) {
    let old = bytes.to_vec();
    let (at, data) = &patch.patch;
    assert!(*at as usize + data.len() <= 512, "one sector");
    if let Some((at, data)) = &patch.before {
        put(bytes, *at as usize, data);
        assert_eq!(
            parse(bytes).unwrap(),
            parse(&old).unwrap(),
            "the first write alone changes nothing"
        );
    }
    put(bytes, *at as usize, data);
}

/// Applies a change of the backing file, and checks what must hold for every patch.
fn rebased(bytes: &[u8], backing: Option<&BackingReference>) -> Result<Vec<u8>, FormatError> {
    let mut after = bytes.to_vec();
    let before = parse(bytes).unwrap();
    let patch = before.with_backing(backing)?;
    apply(&mut after, &patch);
    let parsed = parse(&after).unwrap();
    assert_eq!(parsed, patch.header);
    assert_eq!(parsed.backing.as_ref(), backing);
    let fields =
        |header: &Header| Header { backing: None, area: Area(Vec::new()), ..header.clone() };
    assert_eq!(fields(&parsed), fields(&before));
    let cluster_size = before.geometry.cluster_size() as usize;
    assert_eq!(after[cluster_size..], bytes[cluster_size..]);
    Ok(after)
}

fn raw(name: &str) -> BackingReference {
    BackingReference { name: name.into(), format: Some(BackingFormat::Raw) }
}

/// Returns what qemu-img reports about the image after it has checked it (the backing file need not
/// exist).
fn info(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.qcow2"), bytes).unwrap();
    let alone =
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"},"backing":null}"#;
    let check = qemu_img(dir.path(), &["check", "-q", alone]);
    check + &qemu_img(dir.path(), &["info", "--output=json", "a.qcow2"])
}

#[test]
fn dropping_the_backing_file_of_a_qemu_img_image_leaves_no_trace() {
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "lazy_refcounts=on,compression_type=zstd",
    ] {
        let (bytes, _) = made(options, "10M", &["-b", "base.raw", "-F", "raw"]);
        let after = rebased(&bytes, None).unwrap();
        let text = info(&after);
        assert!(!text.contains("backing"), "{options}: {text}");
        assert_eq!(text.contains("\"lazy-refcounts\": true"), options.contains("lazy"), "{text}");
        assert!(
            !after[..512].windows(4).any(|window| window == 0xe279_2acau32.to_be_bytes()),
            "{options}"
        );
        // Applying the same change again changes nothing.
        assert_eq!(rebased(&after, None).unwrap(), after);
    }
}

#[test]
fn changing_the_backing_file_of_a_qemu_img_image() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2M"] {
        let (bytes, _) = made(options, "10M", &["-b", "base.raw", "-F", "qcow2"]);
        for name in ["a", "another base.raw", &"x".repeat(250)] {
            let after = rebased(&bytes, Some(&raw(name))).unwrap();
            let text = info(&after);
            assert!(
                text.contains(&format!("\"backing-filename\": \"{name}\"")),
                "{options}: {text}"
            );
            assert!(text.contains("\"backing-filename-format\": \"raw\""), "{options}: {text}");
            let back = rebased(
                &after,
                Some(&BackingReference {
                    name: "base.raw".into(),
                    format: Some(BackingFormat::Qcow2),
                }),
            )
            .unwrap();
            assert!(info(&back).contains("\"backing-filename\": \"base.raw\""));
            assert!(!info(&rebased(&back, None).unwrap()).contains("backing"));
        }
    }
}

#[test]
fn a_backing_file_for_an_image_that_had_none() {
    let (bytes, _) = made("compat=0.10", "10M", &[]);
    assert!(
        info(&rebased(&bytes, Some(&raw("b"))).unwrap()).contains("\"backing-filename\": \"b\"")
    );
    // With the feature name table of qemu-img, sector 0 has no space for a format extension, but a
    // backing name without a format fits.
    let (bytes, _) = made("compat=1.1", "10M", &[]);
    assert!(rebased(&bytes, Some(&raw("b"))).unwrap_err().to_string().contains("no room"));
    rebased(&bytes, Some(&BackingReference { name: "b".into(), format: None })).unwrap();
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let (bytes, _) = made("cluster_size=512", "10M", &["-b", "base.raw", "-F", "raw"]);
    let header = parse(&bytes).unwrap();
    assert!(
        header
            .with_backing(Some(&raw(&"x".repeat(400))))
            .unwrap_err()
            .to_string()
            .contains("no room")
    );
    for name in ["", "a\nb", &"x".repeat(1024)] {
        assert!(header.with_backing(Some(&raw(name))).is_err());
    }
    let (bytes, _) = made("compat=1.1", "10M", &["-b", "base.raw", "-F", "raw"]);
    rebased(&bytes, Some(&raw(&"x".repeat(1023)))).unwrap();
}

/// Makes a version 3 header: 104 or more bytes, extensions as given (with or without END), then the
/// name.
fn by_hand(length: usize, extensions: &[u8], name: Option<&str>) -> Vec<u8> {
    let mut bytes = made("cluster_size=4k", "10M", &[]).0;
    bytes[length..4096].fill(0);
    put(&mut bytes, 100, &(length as u32).to_be_bytes());
    put(&mut bytes, length, extensions);
    if let Some(name) = name {
        let at = length + extensions.len();
        put(&mut bytes, 8, &(at as u64).to_be_bytes());
        put(&mut bytes, 16, &(name.len() as u32).to_be_bytes());
        put(&mut bytes, at, name.as_bytes());
    }
    bytes
}

fn extension(magic: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = [magic.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0xa5); // padding has no meaning, but is preserved
    bytes
}

/// Returns the backing format that qemu-img reports, or `None` if it refuses the image.
fn qemu_takes(bytes: &[u8]) -> Option<Option<String>> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.qcow2"), bytes).unwrap();
    let output = Command::new("qemu-img")
        .current_dir(dir.path())
        .args(["info", "--output=json", "a.qcow2"])
        .output()
        .unwrap();
    let info: serde_json::Value =
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())?;
    Some(info.get("backing-filename-format").map(|format| format.as_str().unwrap().to_string()))
}

#[test]
fn an_end_marker_with_a_length_is_taken_as_qemu_takes_it() {
    let end = |len: u32| [[0; 4], len.to_be_bytes()].concat();
    for (extensions, name, taken) in [
        (end(8), Some("base.raw"), false),
        (end(1), Some("base.raw"), false),
        (end(4096), None, false),
        (end(u32::MAX), None, false),
        (end(4096 - 104 - 8), None, true),
        ([end(8), vec![0xee; 8]].concat(), Some("base.raw"), true),
        (
            [extension(0xe279_2aca, b"raw"), end(12), vec![0xee; 16]].concat(),
            Some("base.raw"),
            true,
        ),
    ] {
        let bytes = by_hand(104, &extensions, name);
        assert_eq!(qemu_takes(&bytes).is_some(), taken, "{extensions:?}");
        match parse(&bytes) {
            Ok(_) => assert!(taken, "{extensions:?}"),
            Err(error) => assert!(
                !taken && error.to_string().contains("does not fit"),
                "{extensions:?}: {error}"
            ),
        }
        if taken {
            for backing in [None, Some(raw("b")), Some(raw(&"x".repeat(700)))] {
                let after = rebased(&bytes, backing.as_ref()).unwrap();
                assert_eq!(info(&after).contains("\"backing-filename\""), backing.is_some());
                rebased(&after, None).unwrap();
            }
        }
    }
}

#[test]
fn the_last_extension_may_lack_its_padding() {
    let unpadded = [&0x1234_5678u32.to_be_bytes()[..], &5u32.to_be_bytes(), b"abcde"].concat();
    let bytes = by_hand(104, &unpadded, Some("base.raw"));
    assert_eq!(qemu_takes(&bytes), Some(None));
    for backing in [None, Some(raw("b"))] {
        let after = rebased(&bytes, backing.as_ref()).unwrap();
        let format = extension(0xe279_2aca, b"raw").len();
        let at = 104 + if backing.is_some() { format } else { 0 };
        assert_eq!(
            after[at..][..24],
            [&unpadded[..], &[0; 11]].concat(),
            "padded, then the end marker"
        );
        info(&after);
    }
}

#[test]
fn a_backing_format_ends_at_its_first_nul_and_an_empty_one_is_none() {
    let (raw, qcow2) = (Some(BackingFormat::Raw), Some(BackingFormat::Qcow2));
    for (text, expected) in [
        (&b""[..], None),
        (b"\0", None),
        (b"\0raw", None),
        (b"raw", raw),
        (b"raw\0", raw),
        (b"raw\0\0\0", raw),
        (b"raw\0qcow2", raw),
        (b"qcow2\0", qcow2),
        (b"qcow2\0\0\0\0\0\0\0\0\0\0", qcow2),
    ] {
        let bytes =
            by_hand(104, &[extension(0xe279_2aca, text), vec![0; 8]].concat(), Some("base.raw"));
        let backing = parse(&bytes).unwrap().backing.unwrap();
        assert_eq!((backing.name.as_str(), backing.format), ("base.raw", expected), "{text:?}");
        assert_eq!(qemu_takes(&bytes), Some(expected.map(|format| format.to_string())), "{text:?}");
        assert!(!info(&rebased(&bytes, None).unwrap()).contains("backing"));
    }
    for (text, word) in [
        (&b"vmdk\0raw"[..], "\"vmdk\""),
        (b" raw", "\" raw\""),
        (b"RAW\0", "\"RAW\""),
        (&[0; 16], "16 bytes"),
    ] {
        let bytes =
            by_hand(104, &[extension(0xe279_2aca, text), vec![0; 8]].concat(), Some("base.raw"));
        let error = parse(&bytes).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

/// Protects: of several backing formats the last one counts, as in QEMU, whatever the others say.
/// After a change of the header there is one of them, or none.
#[test]
fn the_last_backing_format_counts() {
    let unknown = extension(0x1234_5678, b"keep me");
    let named = |text: &[u8]| extension(0xe279_2aca, text);
    for (texts, expected) in [
        (&[&b"raw"[..], b"qcow2"][..], Some("qcow2")),
        (&[b"qcow2", b"raw"], Some("raw")),
        (&[b"qcow2", b"qcow2", b"raw"], Some("raw")),
        (&[b"vmdk", b"raw"], Some("raw")),
        (&[b"raw", b""], None),
        (&[b"", b"raw"], Some("raw")),
    ] {
        let mut all: Vec<u8> =
            texts.iter().flat_map(|text| [named(text), unknown.clone()].concat()).collect();
        all.extend([0; 8]);
        let bytes = by_hand(104, &all, Some("base.raw"));
        let backing = parse(&bytes).unwrap().backing.unwrap();
        assert_eq!(
            backing.format.map(|format| format.to_string()).as_deref(),
            expected,
            "{texts:?}"
        );
        assert_eq!(qemu_takes(&bytes), Some(expected.map(str::to_owned)), "{texts:?}");
        let others = unknown.repeat(texts.len());
        let after = rebased(&bytes, None).unwrap();
        assert_eq!(
            after[104..][..others.len() + 8],
            [others.clone(), vec![0; 8]].concat(),
            "{texts:?}"
        );
        let after = rebased(&bytes, Some(&raw("b"))).unwrap();
        let format = [&named(b"raw")[..11], &[0; 5]].concat();
        assert_eq!(
            after[104..][..16 + others.len() + 8],
            [format, others, vec![0; 8]].concat(),
            "{texts:?}"
        );
        assert_eq!(qemu_takes(&after), Some(Some("raw".into())), "{texts:?}");
    }
    for (texts, word) in
        [(&[&b"raw"[..], b"vmdk"][..], "\"vmdk\""), (&[&[b'x'; 16], b"raw"], "16 bytes")]
    {
        let all: Vec<u8> = texts.iter().flat_map(|text| named(text)).chain([0; 8]).collect();
        let bytes = by_hand(104, &all, Some("base.raw"));
        let error = parse(&bytes).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        if word == "16 bytes" {
            assert_eq!(
                qemu_takes(&bytes),
                None,
                "a format that is too long is an error wherever it stands"
            );
        }
    }
}

/// Protects: of several feature name tables the last one counts, as in QEMU. Every other extension
/// that must be unique is refused if there are two.
#[test]
fn other_extensions_that_stand_there_twice() {
    let table = |name: &[u8]| {
        let mut entry = vec![0, 40];
        entry.extend(name);
        entry.resize(48, 0);
        extension(0x6803_f857, &entry)
    };
    let mut bytes = by_hand(104, &[table(b"first"), table(b"second"), vec![0; 8]].concat(), None);
    assert_eq!(qemu_takes(&bytes), Some(None));
    parse(&bytes).unwrap();
    put(&mut bytes, 72, &(1u64 << 40).to_be_bytes());
    let error = parse(&bytes).unwrap_err().to_string();
    assert!(error.contains("bit 40 \"second\""), "{error}");
    for (magic, len) in [(0x2385_2875, 24), (0x4441_5441, 8)] {
        let bytes =
            by_hand(104, &[extension(magic, &vec![1; len]).repeat(2), vec![0; 8]].concat(), None);
        let error = parse(&bytes).unwrap_err().to_string();
        assert!(error.contains("twice"), "{error}");
    }
}

#[test]
fn unknown_fields_and_extensions_survive_byte_for_byte() {
    let unknown = extension(0x1234_5678, b"keep me");
    let twice = extension(0x1234_5678, b"and me too");
    let all = [unknown.clone(), extension(0xe279_2aca, b"raw"), twice.clone(), vec![0; 8]].concat();
    let mut bytes = by_hand(120, &all, Some("base.raw"));
    put(&mut bytes, 105, &[0x11; 15]);
    put(&mut bytes, 80, &0xdead_beef_0000_0001u64.to_be_bytes());
    put(&mut bytes, 88, &(1u64 << 40).to_be_bytes());
    let after = rebased(&bytes, None).unwrap();
    assert_eq!(after[20..120], bytes[20..120]);
    assert_eq!(
        after[120..][..unknown.len() + twice.len() + 8],
        [unknown.clone(), twice.clone(), vec![0; 8]].concat()
    );
    let changed = rebased(
        &bytes,
        Some(&BackingReference { name: "q".into(), format: Some(BackingFormat::Qcow2) }),
    )
    .unwrap();
    assert_eq!(changed[120..][..unknown.len()], unknown);
    assert_eq!(
        changed[120 + unknown.len()..][..8],
        [0xe279_2acau32.to_be_bytes(), 5u32.to_be_bytes()].concat()
    );
    assert_eq!(changed[136 + unknown.len()..][..twice.len()], twice);
}

#[test]
fn extensions_beyond_the_sector_stay_where_they_are() {
    let large = extension(0x1234_5678, &[0x77; 600]);
    let all = [extension(0xe279_2aca, b"raw"), large, vec![0; 8]].concat();
    let bytes = by_hand(104, &all, Some("base.raw"));
    let patch = parse(&bytes).unwrap().with_backing(None).unwrap();
    assert_eq!((patch.before, patch.patch), (None, (8, vec![0; 12])));
    rebased(&bytes, None).unwrap();
    // The format can change in place, because the extension keeps its length. It can be neither
    // removed nor added.
    let other = BackingReference { name: "other".into(), format: Some(BackingFormat::Qcow2) };
    rebased(&bytes, Some(&other)).unwrap();
    assert!(
        rebased(&bytes, Some(&BackingReference { name: "other".into(), format: None })).is_err()
    );
}

#[test]
fn a_missing_end_marker_does_not_turn_the_name_into_an_extension() {
    // Version 2 images of old tools have the name directly after the header.
    let mut bytes = made("compat=0.10", "10M", &[]).0;
    put(&mut bytes, 8, &72u64.to_be_bytes());
    put(&mut bytes, 16, &600u32.to_be_bytes());
    put(&mut bytes, 72, &[b'x'; 600]);
    assert_eq!(parse(&bytes).unwrap().backing.unwrap().name.len(), 600);
    let after = rebased(&bytes, None).unwrap();
    assert!(!info(&after).contains("backing"));
    rebased(&bytes, Some(&raw("other"))).unwrap();
    // These extensions are too long for an end marker to be added: the change is refused, and the
    // image is not damaged.
    let large = extension(0x1234_5678, &[0x77; 600]);
    let bytes = by_hand(104, &large, Some("base.raw"));
    assert!(rebased(&bytes, None).is_err());
}

#[test]
fn the_fields_are_what_a_rewrite_writes() {
    let (bytes, _) = made("compat=1.1", "10M", &["-b", "base.raw", "-F", "raw"]);
    let mut header = parse(&bytes).unwrap();
    header.incompatible |= feature::CORRUPT;
    header.refcount_table_offset = 0x12_0000;
    header.refcount_table_clusters = 3;
    header.l1_table_offset = 0x34_0000;
    header.l1_size = 77;
    header.geometry = header.geometry.resized(20 << 20).unwrap();
    let (at, data) = header.with_backing(None).unwrap().patch;
    let mut after = bytes.clone();
    put(&mut after, at as usize, &data);
    assert_eq!((be64(&after, 72), be64(&after, 48), be32(&after, 56)), (2, 0x12_0000, 3));
    assert_eq!((be64(&after, 24), be32(&after, 36), be64(&after, 40)), (20 << 20, 77, 0x34_0000));
    let (at, data) = patch::size_and_l1(20 << 20, 77, 0x34_0000);
    assert_eq!(after[at as usize..][..data.len()], data);
    let (at, data) = patch::refcount_table(0x12_0000, 3);
    assert_eq!(after[at as usize..][..data.len()], data);
}

#[test]
fn new_images_pass_qemu_img_check() {
    for (bits, size, name, is_extended) in [
        (9, 0, "b"),
        (9, 512, "b"),
        (9, (128 << 30) - 512, "b"),
        (9, 128 << 30, &*"x".repeat(300)),
        (12, 1 << 40, "b"),
        (16, 0, "b"),
        (16, 10 << 30, &*"x".repeat(1023)),
        (16, 2 << 50, "b"),
        (21, 1 << 30, "b"),
        (21, 1 << 60, "b"),
    ]
    .into_iter()
    .flat_map(|case| [(case, false), (case, true)])
    .filter(|((bits, size, _), is_extended)| !is_extended || *bits > 12 && *size < 2 << 50)
    .map(|((bits, size, name), is_extended)| (bits, size, name, is_extended))
    {
        let backing = Some(raw(name));
        let mut geometry = Geometry::new(3, bits, 4, size).unwrap();
        if is_extended {
            geometry = geometry.with_extended_l2().unwrap();
        }
        let image = NewImage { geometry, backing: backing.clone() };
        let mut end = 0;
        let mut bytes = Vec::new();
        for (offset, data) in image.layout().unwrap() {
            assert_eq!(offset, end, "in order, without gaps");
            end += data.len() as u64;
            bytes.extend(data);
        }
        let header = parse(&bytes).unwrap();
        assert_eq!(
            (header.geometry, header.backing.clone(), header.check_writable()),
            (image.geometry, backing, Ok(()))
        );
        let text = info(&bytes);
        assert!(text.contains(&format!("\"virtual-size\": {size}")), "{text}");
        assert!(text.contains(&format!("\"cluster-size\": {}", 1 << bits)), "{text}");
        assert!(text.contains(&format!("\"extended-l2\": {is_extended}")), "{text}");
        assert!(
            text.contains("\"backing-filename-format\": \"raw\"") && text.contains(name),
            "{text}"
        );
        assert!(!info(&rebased(&bytes, None).unwrap()).contains("backing"));
    }
}

#[test]
fn new_images_that_cannot_be_are_refused() {
    let new = |bits, size, name: &str| {
        NewImage { geometry: Geometry::new(3, bits, 4, size).unwrap(), backing: Some(raw(name)) }
            .layout()
    };
    assert!(
        new(9, (128 << 30) + 1, "b")
            .unwrap_err()
            .to_string()
            .contains("which reach 137438953472 bytes")
    );
    assert!(new(16, 1 << 61, "b").is_err());
    assert!(new(9, 512, &"x".repeat(400)).unwrap_err().to_string().contains("does not fit"));
    assert!(new(16, 512, "").is_err());
}

#[test]
fn qemu_fills_a_new_image_without_moving_its_refcount_table() {
    let dir = tempfile::tempdir().unwrap();
    let image = NewImage { geometry: Geometry::new(3, 9, 4, 16 << 20).unwrap(), backing: None };
    let bytes: Vec<u8> = image.layout().unwrap().into_iter().flat_map(|(_, data)| data).collect();
    fs::write(dir.path().join("a.qcow2"), &bytes).unwrap();
    let status = Command::new("qemu-io")
        .current_dir(dir.path())
        .args(["-c", "write -q -P 7 0 16M", "a.qcow2"])
        .status()
        .unwrap();
    assert!(status.success());
    qemu_img(dir.path(), &["check", "-q", "a.qcow2"]);
    let after = parse(&fs::read(dir.path().join("a.qcow2")).unwrap()).unwrap();
    assert_eq!(
        after.refcount_table_offset, 512,
        "16 MiB in clusters of 512 bytes need 128 refcount blocks: more than one table cluster"
    );
    assert_eq!(after.refcount_table_clusters, 3);
}

proptest! {
    /// Protects: no bytes cause a panic or a large allocation, and an accepted header satisfies the
    /// bounds.
    #[test]
    fn arbitrary_fields_never_panic(changes in prop::collection::vec((0usize..700, any::<u8>()), 1..40), size in any::<u64>()) {
        let mut bytes = sample();
        for (at, value) in changes {
            bytes[at] = value;
        }
        for size in [size, bytes.len() as u64] {
            if let Ok(header) = Header::parse(&bytes, size) {
                let end = size.next_multiple_of(header.geometry.cluster_size());
                prop_assert!(header.refcount_table_offset < end && u64::from(header.l1_size) >= header.geometry.l1_entries_needed());
                let _ = header.check_writable();
            }
        }
        // A header that parses can be rewritten, or the rewrite is refused. A rewritten one parses
        // to the header that the patch announced.
        if let Ok(header) = parse(&bytes) {
            for backing in [None, Some(raw("other"))] {
                if let Ok(patch) = header.with_backing(backing.as_ref()) {
                    let mut after = bytes.clone();
                    apply(&mut after, &patch);
                    prop_assert_eq!(parse(&after).unwrap(), patch.header);
                }
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), size in any::<u64>()) {
        let _ = Header::parse(&bytes, size);
        let magic = bytes.len().min(8);
        bytes[..magic].copy_from_slice(&b"QFI\xfb\0\0\0\x03"[..magic]);
        let _ = Header::parse(&bytes, size);
    }
}

/// Makes a small image with every part of a header, without qemu-img because proptest makes many.
fn sample() -> Vec<u8> {
    let image = NewImage {
        geometry: Geometry::new(3, 9, 4, 1 << 20).unwrap(),
        backing: Some(raw("base.raw")),
    };
    let mut bytes: Vec<u8> =
        image.layout().unwrap().into_iter().flat_map(|(_, data)| data).collect();
    bytes.resize(bytes.len().max(64 << 10), 0);
    bytes
}

/// Pins of remote backing files: they fit beside what qemu-img writes, QEMU keeps them when it
/// changes the header, and they go with the backing file.
#[test]
fn pins_are_kept_by_qemu_and_go_with_the_backing_file() {
    let pins = "6f0c1db5 1073741824 etag \"9a0364b9e99bb480dd25e1f0284c8555-128\"".repeat(2);
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "compression_type=zstd"] {
        let (bytes, _) = made(options, "10M", &["-u", "-b", "s3://golden/base.raw", "-F", "raw"]);
        let before = parse(&bytes).unwrap();
        assert_eq!(before.pins(), None);
        let mut after = bytes.clone();
        let patch = before.with_pins(pins.as_bytes()).unwrap();
        assert!(patch.patch.0 as usize + patch.patch.1.len() <= 512, "one sector");
        apply(&mut after, &patch);
        let pinned = parse(&after).unwrap();
        assert_eq!(pinned, patch.header);
        assert_eq!(pinned.pins().as_deref(), Some(pins.as_bytes()), "{options}");
        assert_eq!(pinned.backing, before.backing);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        fs::write(&path, &after).unwrap();
        let name = path.to_str().unwrap();
        qemu_img(dir.path(), &["rebase", "-u", "-F", "raw", "-b", "https://host/other.raw", name]);
        let rebased = fs::read(&path).unwrap();
        assert_eq!(parse(&rebased).unwrap().pins().as_deref(), Some(pins.as_bytes()), "{options}");

        // Another pin takes the place of the first one.
        let patch = parse(&rebased).unwrap().with_pins(b"x").unwrap();
        let mut again = rebased.clone();
        apply(&mut again, &patch);
        assert_eq!(parse(&again).unwrap().pins().as_deref(), Some(&b"x"[..]), "{options}");
        let patch = parse(&again).unwrap().with_backing(None).unwrap();
        apply(&mut again, &patch);
        let alone = parse(&again).unwrap();
        assert_eq!((alone.pins(), alone.backing), (None, None), "{options}");
    }
    let (bytes, _) = made("compat=1.1", "10M", &[]);
    assert!(parse(&bytes).unwrap().with_pins(b"x").is_err());
}
