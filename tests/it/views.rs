//! The commands `map`, `info` and `top`. The tests compare their output with the requests and
//! streams of the test, and with qemu-img.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Cursor;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::header;
use crate::support::terminal::{Terminal, hang_up_on};
use crate::support::{
    CLUSTER, CORDISK, Daemon, Finished, KIB, MIB, Mount, Pattern, QmpClient, Rig, Scratch, qemu,
    read_at, run_within, wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs `cordisk ARGS` with the registry of this test's disks.
fn cordisk(scratch: &Scratch, args: &[&OsStr]) -> Finished {
    run_within(scratch.cordisk().args(args), LIMIT)
}

fn said(scratch: &Scratch, args: &[&OsStr]) -> String {
    let done = cordisk(scratch, args);
    assert!(done.status.success() && done.stderr.is_empty(), "{args:?}: {done:?}");
    done.stdout
}

fn refused(scratch: &Scratch, args: &[&OsStr]) -> String {
    let done = cordisk(scratch, args);
    assert_eq!((done.status.code(), done.stdout.as_str()), (Some(1), ""), "{args:?}: {done:?}");
    assert_eq!(done.stderr.lines().count(), 1, "one line: {done:?}");
    done.stderr
}

fn word(text: &str) -> &OsStr {
    OsStr::new(text)
}

/// Makes a base without zeros and an overlay with clusters of every kind, at offsets that are not
/// borders of cells.
fn mixed() -> Rig {
    let rig = Rig::new(48 * MIB);
    qemu::write_pattern(
        &rig.overlay,
        Pattern::new(3, 1),
        &[0..10 * MIB + CLUSTER, 20 * MIB..20 * MIB + 5 * CLUSTER],
    );
    qemu::io(&rig.overlay, &["write -z 30M 3M", "write -z 40M 64k"]);
    rig
}

/// Returns, for each cell of `cell` bytes, how many bytes are local, zero and remote according to
/// qemu-img.
fn cells_by_qemu(image: &Path, cell: u64) -> Vec<[u64; 3]> {
    let runs = qemu::map(image);
    let size = runs.last().map_or(0, |run| run.range.end);
    let mut cells = vec![[0; 3]; usize::try_from(size.div_ceil(cell)).expect("small")];
    for run in runs {
        // A range that no layer holds is zero, and so is a zero cluster of the overlay. How the
        // lower layers hold their data does not matter.
        let kind = match (run.depth, run.present, run.data) {
            (_, false, _) | (0, true, false) => 1,
            (0, true, true) => 0,
            _ => 2,
        };
        let mut at = run.range.start;
        while at < run.range.end {
            let end = (at / cell + 1) * cell;
            let len = end.min(run.range.end) - at;
            cells[usize::try_from(at / cell).expect("small")][kind] += len;
            at += len;
        }
    }
    cells
}

fn sum(cells: &[[u64; 3]]) -> [u64; 3] {
    cells.iter().fold([0; 3], |sum, cell| [sum[0] + cell[0], sum[1] + cell[1], sum[2] + cell[2]])
}

/// Colours of local, zero and remote.
const COLOURS: [[u8; 3]; 3] = [[0x00, 0x72, 0xB2], [0xDD, 0xDD, 0xDD], [0xE6, 0x9F, 0x00]];

/// Decodes a PNG: returns its text chunks and the colour of the middle of each cell. Asserts that
/// each cell has one colour.
fn decode(png: &[u8]) -> (BTreeMap<String, String>, Vec<[u8; 4]>) {
    let mut reader = png::Decoder::new(Cursor::new(png)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("small")];
    reader.next_frame(&mut pixels).expect("pixels");
    let info = reader.info();
    let text: BTreeMap<_, _> = info
        .uncompressed_latin1_text
        .iter()
        .map(|chunk| (chunk.keyword.clone(), chunk.text.clone()))
        .collect();
    let number =
        |name: &str| text[name].parse::<usize>().unwrap_or_else(|_| panic!("{name}: {text:?}"));
    let (cells, columns, side) = (number("Cells"), number("Columns"), number("Cell-Pixels"));
    let width = info.width as usize;
    let (height, below) = (info.height as usize, cells.div_ceil(columns) * side);
    assert!(
        width >= columns * side && height > below,
        "{width}x{height} pixels for {cells} cells and a legend"
    );
    let pixel = |x: usize, y: usize| -> [u8; 4] {
        pixels[(y * width + x) * 4..][..4].try_into().expect("four bytes")
    };
    for [red, green, blue] in COLOURS {
        let shown = |at: usize| pixel(at % width, at / width) == [red, green, blue, 0xff];
        assert!(
            (below * width..height * width).any(shown),
            "no #{red:02X}{green:02X}{blue:02X} in the legend"
        );
    }
    let found = (0..cells).map(|cell| {
        let (x, y) = (cell % columns * side, cell / columns * side);
        let colour = pixel(x, y);
        assert!(
            (0..side * side).all(|at| pixel(x + at % side, y + at / side) == colour),
            "cell {cell} has several colours"
        );
        colour
    });
    let colours = found.collect();
    (text, colours)
}

/// The colour of a cell that is a mixture of local (blue), zero (grey) and remote (orange).
fn mixture(cell: &[u64; 3]) -> [u8; 4] {
    let total: u64 = cell.iter().sum();
    let channel = |channel: usize| {
        let sum: u64 =
            (0..3).map(|kind: usize| cell[kind] * u64::from(COLOURS[kind][channel])).sum();
        u8::try_from((sum + total / 2) / total).expect("a byte")
    };
    [channel(0), channel(1), channel(2), 0xFF]
}

fn assert_png(png: &[u8], image: &Path) {
    let (text, colours) = decode(png);
    let cells = cells_by_qemu(image, text["Cell-Bytes"].parse().expect("a number"));
    assert_eq!(colours.len(), cells.len());
    for (index, (colour, cell)) in colours.iter().zip(&cells).enumerate() {
        assert_eq!(*colour, mixture(cell), "cell {index}: {cell:?}");
    }
    let [local, zero, remote] = sum(&cells);
    for (name, bytes) in
        [("local #0072B2", local), ("zero #DDDDDD", zero), ("remote #E69F00", remote)]
    {
        assert!(text["Legend"].contains(&format!("{name} {bytes} bytes")), "{text:?}");
    }
}

/// Splits a picture into the characters of the map, without the offsets on the left, and the other
/// lines.
fn characters(picture: &str) -> (Vec<char>, String) {
    let (map, rest): (Vec<&str>, Vec<&str>) =
        picture.lines().skip(2).partition(|line| line.find("B  ").is_some_and(|at| at == 7));
    (map.iter().flat_map(|line| line.chars().skip(10)).collect(), rest.join("\n"))
}

/// Protects: the picture, the PNG and the list of an image agree with qemu-img, cell by cell.
#[test]
fn a_map_of_an_image_is_what_is_in_it() {
    requires!("qemu-img", "qemu-io");
    let rig = mixed();
    let image = rig.overlay.as_os_str();
    let list = said(&rig.scratch, &[word("map"), word("--json"), image]);
    let qemus = qemu::img(&[word("map"), word("--output=json"), image]);
    // QEMU before 8.2 does not report which clusters are compressed.
    let untold = if qemus.contains("compressed") {
        [""; 2]
    } else {
        [", \"compressed\": false", ", \"compressed\": true"]
    };
    assert_eq!(list.replace(untold[0], "").replace(untold[1], ""), qemus);

    let text = said(&rig.scratch, &[word("map"), image]);
    assert!(text.is_ascii() && text.lines().skip(1).all(|line| line.len() <= 80), "{text}");
    let (map, legend) = characters(&text);
    // 768 clusters, one character each.
    let cells = cells_by_qemu(&rig.overlay, CLUSTER);
    let expected: String = cells
        .iter()
        .map(|cell| {
            if cell[0] > 0 {
                '#'
            } else if cell[1] > 0 {
                '.'
            } else {
                '-'
            }
        })
        .collect();
    assert_eq!(map.iter().collect::<String>(), expected, "{text}");
    for line in [
        "#  local    10.4 MiB   21.6 %",
        ".  zero     3.06 MiB    6.4 %",
        "-  remote   34.6 MiB   72.0 %",
        "1 character = 64 KiB",
    ] {
        assert!(legend.contains(line), "{line}\n{text}");
    }

    let png = rig.scratch.join("map.png");
    fs::write(&png, "something old").expect("old file");
    assert_eq!(said(&rig.scratch, &[word("map"), word("--png"), png.as_os_str(), image]), "");
    assert_png(&fs::read(&png).expect("PNG"), &rig.overlay);
    let piped = std::process::Command::new(CORDISK)
        .args([word("map"), word("--png"), word("-"), image])
        .output()
        .expect("cordisk map");
    assert_eq!(piped.stdout, fs::read(&png).expect("PNG"), "{piped:?}");
    // Cells that are larger than clusters: a disk of 40 GiB has at most 65536 cells.
    let large = rig.scratch.join("large.qcow2");
    qemu::create(&large, Some(40 << 30), "", Some(("base.raw", "raw")));
    qemu::io(&large, &["write 10G 100k", "write -z 10241M 64k", "write 40900M 2M"]);
    said(&rig.scratch, &[word("map"), word("--png"), png.as_os_str(), large.as_os_str()]);
    assert_png(&fs::read(&png).expect("PNG"), &large);
    let names: Vec<_> = fs::read_dir(rig.scratch.path())
        .expect("list")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains(".part")), "{names:?}");
}

/// Protects: while no data changes, a running disk has the same map as its image after the unmount.
/// For an image that is in use, the error says where it is mounted.
#[test]
fn a_mounted_disk_has_the_map_of_its_image() {
    requires!("/dev/fuse", "qemu-img", "qemu-io");
    let rig = mixed();
    let disk = rig.mount().args(&["--reserve", "0"]).start();
    let mut guest = rig.guest(&disk);
    guest.write(12 * MIB + 100..13 * MIB);
    guest.punch(2 * MIB..3 * MIB);
    read_at(&guest.file, 25 * MIB, 300 * 1024);
    guest.file.sync_all().expect("fsync");
    drop(guest);

    let look = |name: &OsStr| {
        let list = said(&rig.scratch, &[word("map"), word("--json"), name]);
        let text = said(&rig.scratch, &[word("map"), name]);
        let png = rig.scratch.join("map.png");
        said(&rig.scratch, &[word("map"), word("--png"), png.as_os_str(), name]);
        (
            list,
            characters(&text),
            decode(&fs::read(&png).expect("PNG")),
            fs::read(&png).expect("PNG"),
        )
    };
    let mounted = look(disk.path().as_os_str());
    let busy = refused(&rig.scratch, &[word("map"), rig.overlay.as_os_str()]);
    let path = disk.path().to_str().expect("UTF-8").to_owned();
    assert!(busy.contains("is in use") && busy.contains(&format!("cordisk map {path}")), "{busy}");
    disk.umount();
    let image = look(rig.overlay.as_os_str());
    assert_eq!((&mounted.0, &mounted.1, &mounted.2), (&image.0, &image.1, &image.2));
    assert_png(&mounted.3, &rig.overlay);
    assert!(sum(&cells_by_qemu(&rig.overlay, CLUSTER))[0] > 10 * MIB, "something was written");
}

/// Protects: on a terminal the map is drawn in coloured blocks, as wide as the terminal, and
/// without colours where they are disabled.
#[test]
fn a_map_on_a_terminal_has_blocks_and_colours() {
    requires!("qemu-img", "qemu-io", "terminal");
    let rig = mixed();
    let args = [word("map"), rig.overlay.as_os_str()];
    let mut terminal = Terminal::cordisk(&rig.scratch, &args, &[], 30, 74);
    terminal.assert_status(0);
    let cells = cells_by_qemu(&rig.overlay, CLUSTER);
    // 64 columns, 12 rows.
    for (index, cell) in cells.iter().enumerate() {
        let (row, column) = (
            u16::try_from(2 + index / 64).expect("small"),
            u16::try_from(10 + index % 64).expect("small"),
        );
        let (sign, front, back) = terminal.look(|screen| {
            let cell = screen.cell(row, column).expect("on the screen");
            (cell.contents().to_owned(), cell.fgcolor(), cell.bgcolor())
        });
        let colour = vt100::Color::Idx;
        match cell {
            [local, _, _] if *local > 0 => {
                assert_eq!((sign.as_str(), front), ("█", colour(32)), "cell {index}")
            }
            [_, zero, _] if *zero > 0 => {
                assert_eq!((sign.trim(), back), ("", colour(238)), "cell {index}")
            }
            _ => assert_eq!((sign.as_str(), front), ("·", colour(214)), "cell {index}"),
        }
    }
    let mut terminal = Terminal::cordisk(&rig.scratch, &args, &[("NO_COLOR", word("1"))], 30, 74);
    terminal.assert_status(0);
    assert!(!terminal.raw().contains(&0x1b), "{}", terminal.contents());
    assert!(
        terminal.contents().contains("████") && terminal.contents().contains("10.4 MiB"),
        "{}",
        terminal.contents()
    );
    let mut terminal = Terminal::cordisk(&rig.scratch, &args, &[("LC_ALL", word("C"))], 30, 74);
    terminal.assert_status(0);
    assert!(
        terminal.contents().is_ascii() && terminal.contents().contains("####"),
        "no more than the locale has\n{}",
        terminal.contents()
    );
    assert!(terminal.raw().contains(&0x1b), "colours");
    let png = [word("map"), word("--png"), word("-"), rig.overlay.as_os_str()];
    let mut terminal = Terminal::cordisk(&rig.scratch, &png, &[], 30, 74);
    terminal.assert_status(1);
    assert!(
        terminal.contents().contains("a PNG is nothing for a terminal"),
        "{}",
        terminal.contents()
    );
}

/// Protects: `info` prints what `qemu-img info` prints, member by member and line by line, also for
/// an image in use.
#[test]
fn info_says_what_qemu_img_says() {
    requires!("/dev/fuse", "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let dir = scratch.dir("sub");
    scratch.raw("base.raw", MIB, Pattern::new(1, 1));
    scratch.write("odd.raw", &[1; 1000]);
    let at = |name: &str| scratch.join(name);
    qemu::create(&at("over.qcow2"), None, "", Some(("base.raw", "raw")));
    qemu::create(&dir.join("top.qcow2"), None, "cluster_size=4k", Some(("../over.qcow2", "qcow2")));
    qemu::create(&at("old.qcow2"), Some(MIB), "compat=0.10", None);
    qemu::create(
        &at("new.qcow2"),
        Some(3 * MIB + 512),
        "compression_type=zstd,lazy_refcounts=on,refcount_bits=8",
        None,
    );
    let same = |name: &str| {
        let path = at(name);
        let ours: Value = serde_json::from_str(&said(
            &scratch,
            &[word("info"), word("--json"), path.as_os_str()],
        ))
        .expect("JSON");
        let theirs: Value = serde_json::from_str(&qemu::img(&[
            word("info"),
            word("-U"),
            word("--output=json"),
            path.as_os_str(),
        ]))
        .expect("JSON");
        assert_members(&ours, &theirs, &["children"]);
        let lines = said(&scratch, &[word("info"), path.as_os_str()]);
        let theirs = qemu::img(&[word("info"), word("-U"), path.as_os_str()]);
        // QEMU adds the protocol node at the end, which `info` does not show.
        assert_eq!(lines, theirs.split("Child node").next().expect("a part"), "{name}");
    };
    for name in ["over.qcow2", "sub/top.qcow2", "old.qcow2", "new.qcow2", "base.raw", "odd.raw"] {
        same(name);
    }
    let top = at("sub/top.qcow2");
    let chain = |args: &[&OsStr]| -> Vec<Value> {
        serde_json::from_str(&said(&scratch, args)).expect("a list")
    };
    let ours = chain(&[word("info"), word("--json"), word("--backing-chain"), top.as_os_str()]);
    let theirs: Vec<Value> = serde_json::from_str(&qemu::img(&[
        word("info"),
        word("--output=json"),
        word("--backing-chain"),
        top.as_os_str(),
    ]))
    .expect("JSON");
    assert_eq!((ours.len(), theirs.len()), (3, 3));
    ours.iter().zip(&theirs).for_each(|(ours, theirs)| assert_members(ours, theirs, &["children"]));
    let lines = said(&scratch, &[word("info"), word("--backing-chain"), top.as_os_str()]);
    assert_eq!(lines.matches("image: ").count(), 3, "{lines}");
    assert!(lines.contains("backing file: ../over.qcow2 (actual path: "), "{lines}");

    // The image in use, named by its own path and by the mounted disk.
    let disk = Mount::new(&scratch, &top).start();
    same("sub/top.qcow2");
    for name in [disk.path().as_os_str()] {
        let mut ours = chain(&[word("info"), word("--json"), word("--backing-chain"), name]);
        assert_eq!(ours.len(), 3);
        let mountpoint = ours[0].as_object_mut().expect("an object").remove("mountpoint");
        assert_eq!(mountpoint, Some(disk.path().to_str().into()));
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let path = |value: &Value, name: &str| {
                value.get(name).map(|path| {
                    Path::new(path.as_str().expect("text")).canonicalize().expect("path")
                })
            };
            for name in ["filename", "full-backing-filename"] {
                assert_eq!(path(ours, name), path(theirs, name));
            }
            // For a mounted disk the daemon reports what it has in memory, without the members that
            // are specific to a format.
            assert_members(
                ours,
                theirs,
                &[
                    "children",
                    "format-specific",
                    "filename",
                    "full-backing-filename",
                    "actual-size",
                ],
            );
        }
        let lines = said(&scratch, &[word("info"), name]);
        assert!(lines.contains(&format!("mounted at: {}\n", disk.path().display())), "{lines}");
    }
    disk.umount();
}

/// Asserts that both have the same members with the same values, except for those named in
/// `except`.
fn assert_members(ours: &Value, theirs: &Value, except: &[&str]) {
    let members = |value: &Value| -> BTreeMap<String, Value> {
        let mut members: BTreeMap<_, _> =
            value.as_object().expect("an object").clone().into_iter().collect();
        except.iter().for_each(|name| drop(members.remove(*name)));
        members
    };
    assert_eq!(members(ours), members(theirs));
}

/// Protects: a file that cannot be shown is refused in one line that names the file and the reason.
#[test]
fn what_has_no_view_is_refused_in_one_line() {
    requires!("qemu-img", "qemu-io");
    let rig = Rig::new(MIB);
    let nothing = rig.scratch.join("nothing");
    let dir = rig.scratch.dir("dir");
    let text = rig.scratch.write("text", b"no image");
    for command in ["map", "info", "top"] {
        let why = refused(&rig.scratch, &[word(command), nothing.as_os_str()]);
        let reason = if command == "top" {
            "no cordisk disk is mounted"
        } else {
            "No such file or directory"
        };
        assert!(why.contains("nothing") && why.contains(reason), "{why}");
        let why = refused(&rig.scratch, &[word(command), dir.as_os_str()]);
        let reason =
            if command == "top" { "no cordisk disk is mounted" } else { "not a regular file" };
        assert!(why.contains("dir") && why.contains(reason), "{why}");
    }
    let why = refused(&rig.scratch, &[word("map"), text.as_os_str()]);
    assert!(why.contains("text: not a qcow2 image"), "{why}");
    let unsaid = rig.scratch.join("unsaid.qcow2");
    fs::copy(&rig.overlay, &unsaid).expect("copy");
    header::edit(&unsaid, |header| {
        header.extensions.retain(|(kind, _)| *kind != header::EXT_BACKING_FORMAT)
    });
    let why = refused(&rig.scratch, &[word("map"), unsaid.as_os_str()]);
    assert!(why.contains("--backing-format raw|qcow2"), "{why}");
    assert!(
        said(
            &rig.scratch,
            &[word("map"), word("--backing-format"), word("raw"), unsaid.as_os_str()]
        )
        .contains("remote      1 MiB")
    );
    let why = refused(&rig.scratch, &[word("info"), word("--backing-chain"), unsaid.as_os_str()]);
    assert!(why.contains("unsaid.qcow2: does not say of which format"), "{why}");
    let rig_dir = rig.scratch.join("none/map.png");
    let why = refused(
        &rig.scratch,
        &[word("map"), word("--png"), rig_dir.as_os_str(), rig.overlay.as_os_str()],
    );
    assert!(why.contains("none/map.png: No such file or directory"), "{why}");
    let looped = rig.scratch.join("loop.qcow2");
    qemu::create(&looped, Some(MIB), "", None);
    qemu::img(&[
        word("rebase"),
        word("-u"),
        word("-b"),
        word("loop.qcow2"),
        word("-F"),
        word("qcow2"),
        looped.as_os_str(),
    ]);
    let why = refused(&rig.scratch, &[word("info"), word("--backing-chain"), looped.as_os_str()]);
    assert!(why.contains("is in this chain already"), "{why}");
    // A reader may close the pipe early; no error is printed then.
    let head = format!("'{CORDISK}' map --json '{}' 2>&1 | true", rig.overlay.display());
    assert_eq!(run_within(std::process::Command::new("sh").args(["-c", &head]), LIMIT).stdout, "");
}

// ---- top

/// Returns the number at `at` in bytes; the next word is its unit.
fn size(words: &[&str], at: usize) -> f64 {
    let number: f64 = words[at].parse().unwrap_or_else(|_| panic!("no number at {at}: {words:?}"));
    let power = ["B", "KiB", "MiB", "GiB"]
        .iter()
        .position(|unit| words[at + 1].trim_end_matches("/s") == *unit);
    number
        * 1024_f64.powi(
            i32::try_from(power.unwrap_or_else(|| panic!("no unit: {words:?}"))).expect("small"),
        )
}

fn nanoseconds(words: &[&str], at: usize) -> f64 {
    let factor = match words[at + 1] {
        "ns" => 1.0,
        "µs" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        other => panic!("{other}: {words:?}"),
    };
    words[at].parse::<f64>().expect("a number") * factor
}

/// Returns the words of the line that begins with `name`.
fn row(contents: &str, name: &str) -> Vec<String> {
    let lines =
        contents.lines().map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    lines
        .into_iter()
        .find(|words| words.first().is_some_and(|first| first == name))
        .unwrap_or_default()
}

fn direct(disk: &Daemon) -> fs::File {
    let flags = OFlags::DIRECT.bits().cast_signed();
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(disk.path())
        .expect("open with O_DIRECT")
}

/// Returns a buffer and the offset in it that is aligned for O_DIRECT.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let buf = vec![0xA5; len + 4096];
    let start = buf.as_ptr().align_offset(4096);
    (buf, start)
}

/// Reads with O_DIRECT, in one request per call.
fn read_direct(file: &fs::File, offset: u64, len: usize) {
    let (mut buf, start) = aligned(len);
    file.read_exact_at(&mut buf[start..start + len], offset).expect("read");
}

/// Protects: throughput, operations, latencies and hits on the screen are those of the requests
/// between two samples. A key triggers each sample here, so that the test knows which requests lie
/// between them.
#[test]
fn top_shows_what_is_read_and_written() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let rig = Rig::new(32 * MIB);
    let disk = rig.mount().qmp().args(&["--device", "d1"]).start();
    let began = Instant::now();
    let args = [word("top"), word("--interval"), word("3600"), disk.path().as_os_str()];
    let mut terminal = Terminal::cordisk(&rig.scratch, &args, &[], 24, 120);
    let first = terminal.wait_for("the disk", |screen| screen.contents().contains("32 MiB"));
    assert_eq!(row(&first, "read")[1], "-", "one look has no rates\n{first}");
    let inner = Instant::now();
    let file = direct(&disk);
    for index in 0..6 {
        read_direct(&file, index * MIB, 64 << 10); // from the base, and copied up
    }
    wait_until("the copies are stored", || qmp_bytes(&disk, "local") >= 6 * CLUSTER);
    for _ in 0..3 {
        for index in 0..6 {
            read_direct(&file, index * MIB, 64 << 10); // from the overlay
        }
    }
    let (buf, start) = aligned(512 << 10);
    for index in 0..8 {
        file.write_all_at(&buf[start..start + (512 << 10)], 16 * MIB + index * MIB).expect("write");
    }
    let inner = inner.elapsed().as_secs_f64();
    wait_until("the statistics have seen all that", || {
        qmp_bytes(&disk, "local") == 4 * MIB + 6 * CLUSTER
    });
    terminal.send(b"\x1b[B");
    // The screen is drawn from the top, so the lowest line appears last.
    let text = terminal.wait_for("rates and the legend", |screen| {
        let rates =
            row(&screen.contents(), "write").get(2).is_some_and(|unit| unit.ends_with("/s"));
        rates && screen.contents().contains("remote 27.6 MiB 86.3 %")
    });
    let outer = began.elapsed().as_secs_f64();

    let status = disk.client().ok("x-query-status", json!({}));
    for (name, bytes, operations) in [("read", 24 * 64 * KIB, 24.0), ("write", 4 * MIB, 8.0)] {
        let words = row(&text, name);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (rate, bytes) = (size(&words, 1), bytes as f64);
        assert!(
            rate <= bytes / inner * 1.01 && rate >= bytes / outer * 0.99,
            "{name}: {rate} of {bytes} in {inner} to {outer} s\n{text}"
        );
        let shown: f64 = words[3].parse().expect("operations per second");
        assert!(
            shown <= operations / inner * 1.05 + 0.5 && shown >= operations / outer * 0.95 - 0.5,
            "{name}: {shown}\n{text}"
        );
        // There were no requests before the first sample, so the means since the start equal those
        // of this interval.
        let counted = status["requests"]
            .as_array()
            .expect("requests")
            .iter()
            .find(|requests| requests["kind"] == name)
            .expect("kind")
            .clone();
        assert_eq!(counted["operations"].as_f64(), Some(operations), "{counted}");
        let mean = counted["total-time-ns"].as_f64().expect("time") / operations;
        let [shown, median, most] = [4, 6, 8].map(|at| nanoseconds(&words, at));
        assert!((shown / mean - 1.0).abs() < 0.01, "{name}: mean {shown} is not {mean}\n{text}");
        let expected = [0.5, 0.99]
            .map(|part| quantile(&counted["latency"], &status["latency-bounds-ns"], part));
        assert!(
            (median / expected[0] - 1.0).abs() < 0.01 && (most / expected[1] - 1.0).abs() < 0.01,
            "{median} {most}: {expected:?}\n{text}"
        );
    }
    assert_eq!((status["hits"].as_u64(), status["misses"].as_u64()), (Some(18), Some(6)));
    assert_eq!(row(&text, "hits")[1], "75.0", "{text}");
    // 6 clusters copied by reads, 64 written.
    let last =
        text.lines().find(|line| line.contains("█ local")).unwrap_or_else(|| panic!("{text}"));
    assert!(last.contains("local 4.38 MiB 13.7 %"), "{text}");
    terminal.send(b"q");
    terminal.assert_status(0);
    drop(file);
    disk.umount();
}

/// Returns the quantile `part` of a histogram: interpolates inside the class in which it lies, like
/// Prometheus.
fn quantile(counts: &Value, bounds: &Value, part: f64) -> f64 {
    let counts: Vec<f64> = counts
        .as_array()
        .expect("counts")
        .iter()
        .map(|count| count.as_f64().expect("a number"))
        .collect();
    let bounds: Vec<f64> = bounds
        .as_array()
        .expect("bounds")
        .iter()
        .map(|bound| bound.as_f64().expect("a number"))
        .collect();
    let total: f64 = counts.iter().sum();
    let up_to = |class: usize| counts[..=class].iter().sum::<f64>();
    let class = (0..counts.len())
        .find(|&class| up_to(class) >= part * total && counts[class] > 0.0)
        .expect("a class");
    let Some(upper) = bounds.get(class) else { return bounds[bounds.len() - 1] };
    let lower = if class == 0 { 0.0 } else { bounds[class - 1] };
    upper - (upper - lower) * (up_to(class) - part * total) / counts[class]
}

fn qmp_bytes(disk: &Daemon, kind: &str) -> u64 {
    disk.client().ok("x-query-status", json!({}))["bytes"][kind].as_u64().expect("bytes")
}

/// Protects: the bar, the map and the list follow the stream to its end. `p` pauses and resumes the
/// job. The terminal is restored afterwards.
#[test]
fn top_follows_a_stream() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let rig = Rig::new(64 * MIB);
    let disk = rig
        .mount()
        .qmp()
        .args(&["--stream", "--speed", "16M", "--stream-priority", "normal"])
        .start();
    let mut terminal = Terminal::cordisk(
        &rig.scratch,
        &[word("top"), word("--interval"), word("0.2")],
        &[],
        24,
        80,
    );
    terminal.wait_for_text("limit 16 MiB/s");
    assert!(terminal.look(vt100::Screen::alternate_screen));
    let mut client = disk.client();
    // The whole stream takes four seconds at this speed. Even if it is paused late, it continues
    // below.
    wait_until("some of it is copied", || {
        client.job()["offset"].as_u64().is_some_and(|offset| offset > 6 * MIB)
    });
    terminal.send(b"p");
    terminal.wait_for_text("the stream is paused");
    wait_until("the job is paused", || client.job()["status"] == "paused");
    let job = client.job();
    let (offset, len) =
        (job["offset"].as_u64().expect("offset"), job["len"].as_u64().expect("len"));
    let percent = format!("{}.{} %", offset * 1000 / len / 10, offset * 1000 / len % 10);
    let local = qmp_bytes_settled(&mut client);
    let text = terminal.wait_for("the numbers of the paused job", |screen| {
        let text = screen.contents();
        text.contains(&format!("{percent}  paused"))
            && text.contains(&format!(
                "local {} {:.1} %",
                human(local),
                local as f64 / (64 * MIB) as f64 * 100.0
            ))
    });
    assert!(text.contains(&format!("paused {} %", offset * 100 / len)), "in the list\n{text}");
    // The part of the map that is drawn as blocks equals the local part, within a character or two
    // for partial cells.
    terminal.wait_for("the map of the paused job", |screen| {
        let contents = screen.contents();
        let rows: Vec<&str> = contents.lines().skip(12).take(10).collect();
        let full =
            rows.iter().flat_map(|row| row.chars()).filter(|c| "█▓▒░".contains(*c)).count() as f64;
        let dots = rows.iter().flat_map(|row| row.chars()).filter(|c| *c == '·').count() as f64;
        let part = local as f64 / (64 * MIB) as f64;
        full + dots > 700.0 && (full / (full + dots) - part).abs() < 0.01
    });
    // A smaller terminal shows the essential lines; a larger one shows everything again.
    terminal.resize(10, 40);
    terminal.wait_for("a small screen", |screen| {
        let text = screen.contents();
        text.contains("paused")
            && text.contains("q quit")
            && text.contains("local")
            && !text.contains("cordisk top")
    });
    terminal.resize(24, 80);
    terminal.wait_for_text("cordisk top");
    terminal.send(b"?");
    terminal.wait_for_text("p: pause or resume its job");
    terminal.send(b"?");
    terminal.send(b"p");
    terminal.wait_for_text("the stream goes on");
    client.finish_job("drive0");
    let text = terminal.wait_for("the end of the stream", |screen| {
        screen.contents().contains("none; stream completed ")
            && screen.contents().contains("local 64 MiB 100 %")
    });
    assert!(!text.contains("limit"), "{text}");
    terminal.wait_for("a full map", |screen| {
        screen.contents().lines().skip(12).take(10).all(|row| row.trim() == "█".repeat(76))
    });
    terminal.send(b"\x1b");
    terminal.assert_status(0);
    assert!(
        terminal.look(|screen| !screen.alternate_screen() && !screen.hide_cursor()),
        "the terminal is as it was"
    );
    drop(client);
    disk.umount();
}

/// Formats a size in MiB with three digits.
fn human(bytes: u64) -> String {
    let value = bytes as f64 / MIB as f64;
    let text = if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") };
    format!("{} MiB", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Returns the local bytes once nothing changes any more; the statistics may be a second old.
fn qmp_bytes_settled(client: &mut QmpClient) -> u64 {
    let mut local = 0;
    wait_until("statistics that are newer than the pause", || {
        let status = client.ok("x-query-status", json!({}));
        let copied = status["jobs"][0]["bytes-copied"].as_u64().expect("bytes");
        local = status["bytes"]["local"].as_u64().expect("bytes");
        local == copied
    });
    local
}

/// Protects: several disks are listed and the arrow keys select one. A disk whose daemon dies is
/// shown as gone while the others continue, and returns with its daemon. Every way to quit restores
/// the terminal.
#[test]
fn top_outlives_its_disks() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let scratch = Scratch::new();
    for (name, size) in [("one", 8 * MIB), ("two", 24 * MIB)] {
        qemu::create(&scratch.join(format!("{name}.qcow2")), Some(size), "", None);
    }
    let mount =
        |name: &str| Mount::named(&scratch, &scratch.join(format!("{name}.qcow2")), name).start();
    let one = mount("one");
    let two = mount("two");
    let top = || {
        Terminal::cordisk(&scratch, &[word("top"), word("--interval"), word("0.1")], &[], 24, 80)
    };
    let mut terminal = top();
    terminal.wait_for("both disks", |screen| {
        let text = screen.contents();
        text.contains("one.disk")
            && text.contains("two.disk")
            && text.contains("2 disks")
            && text.contains("24 MiB")
    });
    let chosen = |name: &'static str| {
        move |screen: &vt100::Screen| {
            screen.contents().lines().any(|line| line.starts_with('▸') && line.contains(name))
        }
    };
    terminal.wait_for("the first is chosen", chosen("one.disk"));
    terminal.wait_for_text("zero 8 MiB 100 %");
    terminal.send(b"\x1b[B");
    terminal.wait_for("the second is chosen", chosen("two.disk"));
    terminal.wait_for_text("zero 24 MiB 100 %");
    terminal.send(b"p");
    terminal.wait_for_text("there is no job to pause");
    two.kill9();
    terminal.wait_for("the second is gone", |screen| {
        screen.contents().lines().any(|line| line.contains("two.disk") && line.contains("gone"))
    });
    terminal.send(b"\x1b[A");
    terminal.wait_for("the first is chosen", chosen("one.disk"));
    let two = mount("two");
    terminal.wait_for("the second is back", |screen| {
        let text = screen.contents();
        text.lines().any(|line| line.contains("two.disk") && !line.contains("gone"))
            && !text.contains("gone")
    });
    terminal.signal(Signal::TERM);
    terminal.assert_status(143);
    assert!(
        terminal.look(|screen| !screen.alternate_screen() && !screen.hide_cursor()),
        "the terminal is as it was"
    );
    for (key, status) in [(&b"\x03"[..], 0), (b"q", 0)] {
        let mut terminal = top();
        terminal.wait_for_text("two.disk");
        terminal.send(key);
        terminal.assert_status(status);
        assert!(
            terminal.look(|screen| !screen.alternate_screen() && !screen.hide_cursor()),
            "the terminal is as it was"
        );
    }
    two.umount();
    one.umount();
    let mut terminal = top();
    terminal.wait_for_text("no disk is running here");
    terminal.send(b"q");
    terminal.assert_status(0);
}

/// Protects: `top` ends when its terminal disappears, whether or not SIGHUP is ignored, and ends on
/// each signal.
#[test]
fn top_ends_with_its_terminal() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let scratch = Scratch::new();
    qemu::create(&scratch.join("one.qcow2"), Some(8 * MIB), "", None);
    let disk = Mount::named(&scratch, &scratch.join("one.qcow2"), "one").start();
    let directory = scratch.runtime_dir();
    let env = [("CORDISK_RUNTIME_DIR", directory.as_os_str())];
    let ended = hang_up_on(CORDISK, &[word("top")], &env, "one.disk");
    // The signal's default action, the signal handler, or the check of the terminal ended it.
    assert!(!ended.success(), "{ended:?}");
    let ignoring = [word("-c"), word("trap '' HUP; exec \"$0\" top"), word(CORDISK)];
    let ended = hang_up_on("sh", &ignoring, &env, "one.disk");
    assert!(!ended.success(), "{ended:?}");
    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130)] {
        let mut terminal = Terminal::cordisk(&scratch, &[word("top")], &[], 24, 80);
        terminal.wait_for_text("one.disk");
        terminal.signal(signal);
        terminal.assert_status(status);
    }
    disk.umount();
}

/// Protects: a daemon that hangs delays only its own line; keys and the exit of `top` still work.
#[test]
fn top_does_not_wait_for_a_disk_that_hangs() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let scratch = Scratch::new();
    for name in ["one", "two"] {
        qemu::create(&scratch.join(format!("{name}.qcow2")), Some(8 * MIB), "", None);
    }
    let mount =
        |name: &str| Mount::named(&scratch, &scratch.join(format!("{name}.qcow2")), name).start();
    let (one, two) = (mount("one"), mount("two"));
    let mut terminal =
        Terminal::cordisk(&scratch, &[word("top"), word("--interval"), word("0.1")], &[], 24, 80);
    terminal.wait_for_text("2 disks");
    let stopped = crate::hung_backing::Stopped::stop(one.server_pid());
    let file = direct(&two);
    let (buf, start) = aligned(64 << 10);
    terminal.wait_for("the second goes on", |screen| {
        file.write_all_at(&buf[start..start + (64 << 10)], 0).expect("write");
        let row = screen
            .contents()
            .lines()
            .find(|line| line.contains("two.disk"))
            .map(str::to_owned)
            .unwrap_or_default();
        row.split_whitespace()
            .rev()
            .nth(2)
            .is_some_and(|rate| rate.parse::<f64>().is_ok_and(|rate| rate > 0.0))
    });
    terminal.send(b"?");
    terminal.wait_for_text("p: pause or resume its job");
    terminal.send(b"q");
    terminal.assert_status(0);
    drop((stopped, file));
    one.umount();
    two.umount();
}

/// Protects: without a terminal there is one snapshot in ASCII, with the numbers of one interval.
#[test]
fn top_without_a_terminal_prints_one_snapshot() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(16 * MIB);
    assert_eq!(
        said(&rig.scratch, &[word("top"), word("--interval"), word("0.1")]),
        "no disk is running here\n"
    );
    let disk = rig.mount().qmp().start();
    rig.guest(&disk).write(MIB..5 * MIB);
    let text = said(
        &rig.scratch,
        &[word("top"), word("--interval"), word("0.1"), disk.path().as_os_str()],
    );
    assert!(text.is_ascii(), "{text}");
    let want = [
        format!("{}\n", disk.path().display()),
        format!("image   {}\n", rig.overlay.display()),
        "size    16 MiB (16777216 bytes)\n".to_owned(),
        "local   4 MiB (25.0 %)\n".to_owned(),
        "remote  12 MiB (75.0 %)\n".to_owned(),
        "read    0 B/s, 0 op/s\n".to_owned(),
        "job     none\n".to_owned(),
    ];
    for line in want {
        assert!(text.contains(&line), "{line}\n{text}");
    }
    // One disk named by its socket, then all disks.
    let by_socket = said(
        &rig.scratch,
        &[word("top"), word("--interval"), word("0.1"), disk.socket().as_os_str()],
    );
    assert_eq!(by_socket, text);
    assert_eq!(said(&rig.scratch, &[word("top"), word("--interval"), word("0.1")]), text);
    disk.umount();
}
