//! Chains made by qemu-img and opened through the gate. They must read as `qemu-img convert` reads
//! them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::*;
use host::storage::{Access, FileStorage};

struct Scratch(TempDir);

impl Scratch {
    fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &str, args: &[&str]) {
        let output = Command::new(program)
            .current_dir(self.0.path())
            .args(args)
            .output()
            .expect("QEMU's tools are installed");
        assert!(
            output.status.success(),
            "{program} {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn raw(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Creates a qcow2 image and runs these qemu-io commands on it.
    fn qcow2(&self, name: &str, size: &str, backing: Option<(&str, &str)>, commands: &[&str]) {
        let backing = backing.map_or(vec![], |(base, format)| vec!["-b", base, "-F", format]);
        self.run(
            "qemu-img",
            &[&["create", "-q", "-f", "qcow2"], &backing[..], &[name, size]].concat(),
        );
        for command in commands {
            self.run("qemu-io", &["-c", command, name]);
        }
    }

    fn open(&self, name: &str, format: Option<BackingFormat>, gate: &Gate) -> Result<Chain> {
        Chain::open(
            &BackingReference { name: name.into(), format },
            Namer::User { directory: self.0.path() },
            gate,
        )
    }

    fn opened(&self, name: &str, format: BackingFormat) -> Chain {
        self.open(name, Some(format), &Gate::default()).unwrap()
    }

    /// The image as QEMU reads it, in raw bytes.
    fn as_raw(&self, name: &str) -> Vec<u8> {
        self.run("qemu-img", &["convert", "-O", "raw", name, "flat"]);
        fs::read(self.path("flat")).unwrap()
    }
}

fn read(chain: &Chain, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    chain.read(offset, &mut buf).unwrap();
    buf
}

/// The runs of the first `len` bytes.
fn runs(chain: &Chain, depth: usize, len: u64) -> Vec<(Content, u64)> {
    let (mut at, mut list) = (0, Vec::<(Content, u64)>::new());
    while at < len {
        let (content, run) = chain.content(depth, at, len - at).unwrap();
        assert!((1..=len - at).contains(&run));
        match list.last_mut() {
            Some((last, sum)) if *last == content => *sum += run,
            _ => list.push((content, run)),
        }
        at += run;
    }
    list
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

#[test]
fn a_raw_file_of_any_length() {
    let scratch = Scratch::new();
    scratch.raw("base", &[7; 1000]);
    let chain = scratch.opened("base", BackingFormat::Raw);
    assert_eq!(chain.size(), 1000);
    assert_eq!(read(&chain, 990, 20), [[7; 10], [0; 10]].concat());
    assert_eq!(read(&chain, 1 << 40, 3), [0; 3]);
    assert_eq!(chain.content(1, 0, MIB).unwrap(), (Content::Data, 1000));
    assert_eq!(chain.content(1, 1000, MIB).unwrap(), (Content::Unallocated, MIB));
    assert_eq!(chain.content(0, 0, MIB).unwrap(), (Content::Unallocated, MIB));
    let layers = chain.layers();
    assert_eq!(
        (layers.len(), layers[0].format, layers[0].size, layers[0].cluster_size),
        (1, BackingFormat::Raw, 1000, None)
    );
    assert_eq!(
        (layers[0].path.clone(), layers[0].reference.name.as_str()),
        (scratch.path("base"), "base")
    );
}

#[test]
fn no_layer_holds_the_holes_of_a_raw_file() {
    let scratch = Scratch::new();
    // qemu-img would write the first block, to find out which alignment the file system requires.
    fs::File::create(scratch.path("base")).unwrap().set_len(4 * MIB).unwrap();
    scratch.run("qemu-io", &["-f", "raw", "-c", "write -q -P 7 1M 1M", "base"]);
    let chain = scratch.opened("base", BackingFormat::Raw);
    assert_eq!(
        runs(&chain, 1, 5 * MIB),
        [(Content::Unallocated, MIB), (Content::Data, MIB), (Content::Unallocated, 3 * MIB)]
    );
}

#[test]
fn a_raw_file_that_looks_like_qcow2_stays_raw() {
    let scratch = Scratch::new();
    scratch.raw("secret", b"secret");
    scratch.qcow2("base", "1M", Some(("secret", "raw")), &[]);
    let bytes = fs::read(scratch.path("base")).unwrap();
    let chain = scratch.opened("base", BackingFormat::Raw);
    assert_eq!((chain.size(), chain.layers().len()), (bytes.len() as u64, 1));
    assert_eq!(read(&chain, 0, bytes.len()), bytes);
}

#[test]
fn formats_are_never_guessed() {
    let scratch = Scratch::new();
    scratch.raw("base", &[0; 512]);
    let error = scratch.open("base", None, &Gate::default()).unwrap_err().to_string();
    assert!(
        error.contains("backing format of \"base\" is missing: pass --backing-format raw|qcow2"),
        "{error}"
    );
    let gate = Gate { backing_format: Some(BackingFormat::Raw), ..Gate::default() };
    assert_eq!(scratch.open("base", None, &gate).unwrap().layers()[0].format, BackingFormat::Raw);
    // The option may repeat the format in the header, but not contradict it.
    scratch.open("base", Some(BackingFormat::Raw), &gate).unwrap();
    let gate = Gate { backing_format: Some(BackingFormat::Qcow2), ..Gate::default() };
    let error = scratch.open("base", Some(BackingFormat::Raw), &gate).unwrap_err().to_string();
    assert!(error.contains("--backing-format qcow2 contradicts the image, which says that its backing file \"base\" is raw"), "{error}");
}

#[test]
fn the_overlay_is_not_its_own_backing_file() {
    let scratch = Scratch::new();
    scratch.raw("overlay", &[0; 512]);
    fs::hard_link(scratch.path("overlay"), scratch.path("innocent")).unwrap();
    std::os::unix::fs::symlink("innocent", scratch.path("link")).unwrap();
    let overlay = FileStorage::open(&scratch.path("overlay"), Access::ReadWrite).unwrap();
    let gate = Gate { taken: vec![overlay.identity()], ..Gate::default() };
    for name in ["overlay", "./overlay", "innocent", "link"] {
        let error = scratch.open(name, Some(BackingFormat::Raw), &gate).unwrap_err();
        assert!(error.to_string().contains("part of this backing chain already"), "{error}");
    }
}

#[test]
fn files_that_are_none_or_in_use_are_refused() {
    let scratch = Scratch::new();
    let open = |name| scratch.open(name, Some(BackingFormat::Raw), &Gate::default()).unwrap_err();
    assert_eq!(open("missing").kind(), ErrorKind::NotFound);
    assert_eq!(open("/dev/zero").kind(), ErrorKind::InvalidArgument);
    assert_eq!(open("../").kind(), ErrorKind::InvalidArgument);
    scratch.raw("busy", b"x");
    let writer = FileStorage::open(&scratch.path("busy"), Access::ReadWrite).unwrap();
    assert_eq!(open("busy").kind(), ErrorKind::Busy);
    drop(writer);
    // P10: the base is locked against writers while the chain is open.
    let _chain = scratch.opened("busy", BackingFormat::Raw);
    assert_eq!(
        FileStorage::open(&scratch.path("busy"), Access::ReadWrite).unwrap_err().kind(),
        ErrorKind::Busy
    );
    scratch.opened("busy", BackingFormat::Raw);
}

#[test]
fn the_size_of_a_base() {
    let scratch = Scratch::new();
    scratch.raw("base", &[0; 1000]);
    let base = |name: &str, format| {
        let base = BackingReference { name: name.into(), format: Some(format) };
        examine_base(&base, scratch.0.path(), &Gate::default()).map(|(size, _)| size)
    };
    assert_eq!(base("base", BackingFormat::Raw).unwrap(), 1000);
    assert_eq!(base("base", BackingFormat::Qcow2).unwrap_err().kind(), ErrorKind::InvalidImage);
}

#[test]
fn names_are_relative_to_the_image_that_has_them() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("sub")).unwrap();
    scratch.raw("sub/base.raw", &[7; 4096]);
    scratch.qcow2("sub/middle.qcow2", "1M", Some(("base.raw", "raw")), &[]);
    scratch.qcow2("top.qcow2", "1M", Some(("sub/middle.qcow2", "qcow2")), &[]);
    let chain = scratch.opened("top.qcow2", BackingFormat::Qcow2);
    let paths: Vec<PathBuf> = chain.layers().into_iter().map(|layer| layer.path).collect();
    assert_eq!(
        paths,
        ["top.qcow2", "sub/middle.qcow2", "sub/base.raw"].map(|name| scratch.path(name))
    );
    let names: Vec<String> = chain.layers().into_iter().map(|layer| layer.reference.name).collect();
    assert_eq!(names, ["top.qcow2", "sub/middle.qcow2", "base.raw"]);
    assert_eq!(read(&chain, 0, 4096), [7; 4096]);
}

#[test]
fn loops_and_long_chains_are_refused() {
    let scratch = Scratch::new();
    scratch.run(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "1M"],
    );
    scratch.run(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "1M"],
    );
    let error = scratch
        .open("a.qcow2", Some(BackingFormat::Qcow2), &Gate::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("part of this backing chain already"), "{error}");
    scratch.qcow2("0.qcow2", "1M", None, &["write -q -P 7 0 64k"]);
    for layer in 1..17 {
        scratch.qcow2(
            &format!("{layer}.qcow2"),
            "1M",
            Some((&format!("{}.qcow2", layer - 1), "qcow2")),
            &[],
        );
    }
    let chain = scratch.opened("15.qcow2", BackingFormat::Qcow2);
    assert_eq!((chain.layers().len(), read(&chain, 0, 512)), (16, vec![7; 512]));
    let error = scratch
        .open("16.qcow2", Some(BackingFormat::Qcow2), &Gate::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("longer than 16 layers"), "{error}");
}

#[test]
fn a_missing_format_deeper_down_is_not_covered_by_the_option() {
    let scratch = Scratch::new();
    scratch.raw("base.raw", &[7; 4096]);
    scratch.qcow2("top.qcow2", "1M", Some(("base.raw", "raw")), &[]);
    // qemu-img no longer creates images without a backing format. Here another extension type
    // replaces that of the format.
    let mut bytes = fs::read(scratch.path("top.qcow2")).unwrap();
    bytes[0x70..0x74].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    fs::write(scratch.path("top.qcow2"), bytes).unwrap();
    let gate = Gate { backing_format: Some(BackingFormat::Qcow2), ..Gate::default() };
    let error = scratch.open("top.qcow2", None, &gate).unwrap_err().to_string();
    assert!(error.contains("backing format of \"base.raw\" is missing"), "{error}");
}

/// Three layers of different lengths with all kinds of clusters.
fn three(scratch: &Scratch) -> Chain {
    scratch.run("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "4M"]);
    scratch.run("qemu-io", &["-f", "raw", "-c", "write -q -P 1 0 4M", "base.raw"]);
    scratch.qcow2(
        "middle.qcow2",
        "2M",
        Some(("base.raw", "raw")),
        &["write -q -P 2 64k 64k", "write -q -z 128k 64k", "write -q -c -P 3 192k 64k"],
    );
    scratch.qcow2(
        "top.qcow2",
        "3M",
        Some(("middle.qcow2", "qcow2")),
        &["write -q -P 4 100k 50k", "write -q -z 1M 64k"],
    );
    scratch.opened("top.qcow2", BackingFormat::Qcow2)
}

#[test]
fn reads_are_those_of_qemu() {
    let scratch = Scratch::new();
    let chain = three(&scratch);
    let expected = scratch.as_raw("top.qcow2");
    assert_eq!(chain.size(), 3 * MIB);
    assert!(read(&chain, 0, expected.len()) == expected);
    for (offset, len) in
        [(0, 1), (100 * KIB - 1, 2), (99 * KIB, 200 * 1024), (2 * MIB - 5, 10), (3 * MIB - 1, 1)]
    {
        assert!(read(&chain, offset, len) == expected[offset as usize..][..len], "{offset} {len}");
    }
    assert_eq!(read(&chain, 3 * MIB - 5, 10), [0; 10]);
}

#[test]
fn content_of_the_whole_chain_and_of_its_top() {
    let scratch = Scratch::new();
    let chain = three(&scratch);
    let k = |n: u64| n * KIB;
    let whole = [
        (Content::Data, k(1024)),
        (Content::Unallocated, k(64)),
        (Content::Data, k(1024 - 64)),
        (Content::Unallocated, MIB),
    ];
    assert_eq!(runs(&chain, 3, 3 * MIB), whole);
    // Beyond the end of the middle layer the base must not be visible, neither now nor after the
    // middle layer is removed. 100k to 150k lie in the second and third cluster of the top layer.
    let two = [
        (Content::Unallocated, k(64)),
        (Content::Data, k(192)),
        (Content::Unallocated, k(768)),
        (Content::Zero, k(64)),
        (Content::Unallocated, k(1024 - 64)),
        (Content::Zero, MIB),
    ];
    assert_eq!(runs(&chain, 2, 3 * MIB), two);
    let one = [
        (Content::Unallocated, k(64)),
        (Content::Data, k(128)),
        (Content::Unallocated, k(832)),
        (Content::Zero, k(64)),
        (Content::Unallocated, k(2048 - 64)),
        (Content::Zero, MIB),
    ];
    assert_eq!(runs(&chain, 1, 4 * MIB), one, "past the end of the top layer, with layers below");
}

/// A raw file that counts how often its block status is queried.
#[derive(Debug)]
struct Asked(FileStorage, std::sync::atomic::AtomicU64);

impl host::storage::ReadAt for Asked {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn allocated_size(&self) -> std::io::Result<u64> {
        self.0.allocated_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn status(&self, offset: u64, max: u64) -> std::io::Result<(host::storage::BlockStatus, u64)> {
        self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.0.status(offset, max)
    }
}

impl host::storage::Storage for Asked {
    fn write_at(&self, _: host::storage::WriteKind, _: u64, _: &[u8]) -> std::io::Result<()> {
        unreachable!("backing files are not written")
    }

    fn punch_hole(&self, _: u64, _: u64) -> std::io::Result<()> {
        unreachable!("backing files are not written")
    }

    fn sync(&self) -> std::io::Result<()> {
        unreachable!("backing files are not written")
    }
}

impl host::storage::Sidecar for Asked {}

/// Protects: many small queries of a stream about one run of data query the file system once, holes
/// stay holes, and no answer exceeds the range of its query.
#[test]
fn a_run_of_data_is_looked_up_once() {
    let scratch = Scratch::new();
    let file = fs::File::create(scratch.path("base")).unwrap();
    file.set_len(4 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; 1 << 20], 1 << 20).unwrap();
    let storage = Arc::new(Asked(
        FileStorage::open(&scratch.path("base"), Access::ReadOnly).unwrap(),
        Default::default(),
    ));
    let chain = Chain::of_raw(storage.clone());
    let ask = |at: u64| chain.content(1, at, 65536).unwrap();
    for round in 0..2 {
        for step in 0..64 {
            let data = (16..32).contains(&step);
            assert_eq!(
                ask(step * 65536),
                (if data { Content::Data } else { Content::Unallocated }, 65536),
                "round {round}, step {step}"
            );
        }
    }
    assert_eq!(ask((2 << 20) - 4096), (Content::Data, 4096), "not beyond its end");
    assert_eq!(storage.1.load(std::sync::atomic::Ordering::Relaxed), 2 * 48 + 1);
}

/// Protects: several small reads of one compressed cluster read and decompress it once, each
/// returns the right bytes, and other clusters evict it from the cache.
#[test]
fn a_compressed_cluster_is_decompressed_once_for_many_small_reads() {
    let scratch = Scratch::new();
    let content: Vec<u8> =
        (0..40 * 65536_u32).map(|at| (at / 512 * 31 + at / 65536) as u8).collect();
    scratch.raw("flat", &content);
    for compression in ["zlib", "zstd"] {
        let option = format!("compression_type={compression}");
        scratch.run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", &option, "flat", "packed"]);
        let file = sim::SimStorage::new(fs::read(scratch.path("packed")).unwrap());
        let chain = Chain::of_two(file.clone(), sim::SimStorage::new(vec![])).unwrap();
        assert_eq!(read(&chain, 0, 65536), content[..65536], "loads the L2 table");
        let cluster_3 = |chain: &Chain| {
            for at in (3 * 65536..4 * 65536).step_by(4096) {
                assert_eq!(read(chain, at as u64, 4096), content[at..at + 4096], "{compression}");
            }
        };
        let before = file.operations();
        cluster_3(&chain);
        assert_eq!(file.operations() - before, 1, "{compression}");
        assert_eq!(
            read(&chain, 3 * 65536 + 100, 2 * 65536),
            content[3 * 65536 + 100..][..2 * 65536]
        );
        assert_eq!(file.operations() - before, 3, "{compression}: one of three was there");
        for cluster in 6..40 {
            assert_eq!(
                read(&chain, cluster * 65536 + 5, 9),
                content[cluster as usize * 65536 + 5..][..9]
            );
        }
        let before = file.operations();
        cluster_3(&chain);
        assert_eq!(file.operations() - before, 1, "{compression}: it was pushed out");
    }
}

/// Protects: only bytes of the raw file can be cloned, up to its end, and only where no layer above
/// holds the run. The raw layer must be among those asked.
#[test]
fn only_what_a_raw_file_holds_can_be_cloned() {
    let scratch = Scratch::new();
    scratch.raw("base", &vec![7; 3 << 20]);
    scratch.qcow2(
        "middle",
        "4M",
        Some(("base", "raw")),
        &["write -q -P 9 1M 64k", "write -q -z 2M 64k"],
    );
    let chain = scratch.opened("middle", BackingFormat::Qcow2);
    let runs = |depth| {
        let (mut at, mut list) = (0, Vec::new());
        while at < 4 * MIB {
            let (from, len) = chain.cloneable(depth, at, 4 * MIB - at).unwrap();
            assert!((1..=4 * MIB - at).contains(&len));
            list.push((from.is_some(), len));
            at += len;
        }
        list
    };
    let others = MIB - 64 * KIB;
    assert_eq!(
        runs(2),
        [
            (true, MIB),
            (false, 64 * KIB),
            (true, others),
            (false, 64 * KIB),
            (true, others),
            (false, MIB)
        ]
    );
    assert!(
        runs(1).iter().all(|(cloneable, _)| !cloneable),
        "the raw file is not among the layers that were asked"
    );
    let (from, _) = chain.cloneable(2, 0, 1).unwrap();
    let from = from.unwrap();
    from.refused(&std::io::Error::from_raw_os_error(28));
    assert!(chain.cloneable(2, 0, 1).unwrap().0.is_some(), "no space: here and now");
    from.refused(&std::io::Error::from_raw_os_error(18));
    assert!(
        runs(2).iter().all(|(cloneable, _)| !cloneable),
        "two file systems are two file systems for good"
    );
}
