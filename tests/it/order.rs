//! The commands `order merge` and `order show`: the tests compare their output with the orders that
//! went in.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use order::{BaseIdentity, Order, OrderRange, Touch};
use serde_json::{Value, json};

use crate::support::terminal::Terminal;
use crate::support::{Finished, KIB, MIB, Scratch, Snapshot, run_within};

const LIMIT: Duration = Duration::from_secs(60);
const GIB: u64 = 1 << 30;

fn cordisk(scratch: &Scratch, args: &[&OsStr]) -> Finished {
    run_within(scratch.cordisk().arg("order").args(args), LIMIT)
}

fn said(scratch: &Scratch, args: &[&OsStr]) -> String {
    let done = cordisk(scratch, args);
    assert!(done.status.success() && done.stderr.is_empty(), "{args:?}: {done:?}");
    done.stdout
}

/// The line that a refused command prints.
fn refused(scratch: &Scratch, args: &[&OsStr]) -> String {
    let done = cordisk(scratch, args);
    assert_eq!((done.status.code(), done.stdout.as_str()), (Some(1), ""), "{args:?}: {done:?}");
    assert_eq!(done.stderr.lines().count(), 1, "one line: {done:?}");
    done.stderr
}

fn word(text: &str) -> &OsStr {
    OsStr::new(text)
}

fn base() -> BaseIdentity {
    BaseIdentity { size: 16 * GIB, head: [0xc4; 32], pin: None }
}

fn order(base: BaseIdentity, touches: &[(u64, u64, u32)]) -> Order {
    let touch = |&(offset, len, at_ms): &(u64, u64, u32)| Touch { offset, len, at_ms };
    Order::from_touches(base, touches.iter().map(touch))
}

/// The beginning of the disk, a kernel, and files; `own` is what only this machine has touched, and
/// `slow` how much slower it is than the fastest.
fn boot(own: u64, slow: u32) -> Order {
    let files = (0..40).map(|n| ((n * 37 % 40) * 128 * MIB + GIB, 64 * KIB, n as u32 * 100 * slow));
    let early = [(0, 64 * KIB, 0), (512 * MIB, 8 * MIB, 10 * slow)];
    let all: Vec<_> = early.into_iter().chain(files).chain([(own, 4 * KIB, 5000)]).collect();
    order(base(), &all)
}

fn write(scratch: &Scratch, name: &str, order: &Order) -> PathBuf {
    scratch.write(name, &order.encode())
}

/// Protects: the merged file has what [`Order::merge`] makes of the orders, whichever comes first,
/// on standard output and with `-o`.
#[test]
fn a_merge_is_that_of_all_orders() {
    let scratch = Scratch::new();
    let orders = [boot(10 * GIB, 1), boot(11 * GIB, 7), boot(12 * GIB, 2), boot(12 * GIB, 3)];
    let names = ["a.order", "b.order", "c.order", "d.order"];
    let files: Vec<PathBuf> =
        names.iter().zip(&orders).map(|(name, order)| write(&scratch, name, order)).collect();
    let merged = scratch.join("merged.order");
    let out = fs::File::create(&merged).expect("output");
    let status = scratch.cordisk().args(["order", "merge"]).args(&files).stdout(out).status();
    assert!(status.expect("cordisk").success());
    let result = Order::decode(&fs::read(&merged).expect("output")).expect("an order");
    assert_eq!(result, Order::merge(&orders).expect("one base"));
    // What all have touched comes first, and in their order, however slow they were.
    assert_eq!(result.records(), 4);
    let common: Vec<u64> =
        result.ranges().iter().filter(|range| range.votes == 4).map(|range| range.offset).collect();
    let places = |order: &Order| order.ranges().iter().map(|range| range.offset).collect();
    let alone: Vec<u64> = places(&orders[0]);
    assert_eq!(common, alone[..alone.len() - 1]);
    let votes = |offset: u64| {
        let found = result.ranges().iter().find(|range| range.offset == offset);
        found.map(|range| range.votes)
    };
    assert_eq!([10, 11, 12].map(|n| votes(n * GIB)), [Some(1), Some(1), Some(2)]);

    let other = scratch.join("other.order");
    fs::write(&other, "something old").expect("old file");
    let mut args = vec![word("merge"), word("-o"), other.as_os_str()];
    args.extend(files.iter().rev().map(|file| file.as_os_str()));
    let line = said(&scratch, &args);
    assert_eq!(fs::read(&other).expect("output"), fs::read(&merged).expect("output"));
    let summary = format!("{}: 10.6 MiB in 45 ranges, 4 records\n", other.display());
    assert_eq!(line, summary);
    // One alone stays as it is, and a merge can replace one of its orders.
    said(&scratch, &[word("merge"), word("-o"), files[0].as_os_str(), files[0].as_os_str()]);
    assert_eq!(fs::read(&files[0]).expect("order"), orders[0].encode());
    said(
        &scratch,
        &[
            word("merge"),
            word("-o"),
            files[0].as_os_str(),
            files[0].as_os_str(),
            files[1].as_os_str(),
        ],
    );
    let pair = Order::decode(&fs::read(&files[0]).expect("order")).expect("an order");
    assert_eq!(pair, Order::merge(&orders[..2]).expect("one base"));
}

/// Protects: the JSON has every range, in its order, and the identity of the disk.
#[test]
fn show_prints_the_whole_order_as_json() {
    let scratch = Scratch::new();
    let pin = Some("\"v\u{e9}1\\\"".to_owned());
    let with_pin = order(BaseIdentity { pin: pin.clone(), ..base() }, &[(GIB, 4096, 7), (0, 1, 9)]);
    let merged = Order::merge(&[with_pin, boot(10 * GIB, 2)]).expect("one base");
    let file = write(&scratch, "a.order", &merged);
    let shown: Value =
        serde_json::from_str(&said(&scratch, &[word("show"), word("--json"), file.as_os_str()]))
            .expect("JSON");
    let range = |range: &OrderRange| json!({ "offset": range.offset, "length": range.len, "milliseconds": range.at_ms, "votes": range.votes });
    assert_eq!(
        shown,
        json!({
            "size": 16 * GIB,
            "head": "c4".repeat(32),
            "pin": pin,
            "records": 2,
            "bytes": merged.bytes(),
            "ranges": merged.ranges().iter().map(range).collect::<Vec<_>>(),
        })
    );
    let empty = write(&scratch, "empty.order", &order(base(), &[]));
    let shown: Value = serde_json::from_str(&said(
        &scratch,
        &[word("show"), word("--output"), word("json"), empty.as_os_str()],
    ))
    .expect("JSON");
    assert_eq!(
        (&shown["ranges"], &shown["pin"], &shown["bytes"]),
        (&json!([]), &Value::Null, &json!(0))
    );
}

/// Protects: the picture is 80 columns of ASCII without a terminal; its rows show where on the disk
/// what is touched when, and the facts stand below.
#[test]
fn show_draws_when_what_is_touched() {
    let scratch = Scratch::new();
    // Ten ranges of 64 MiB, each in a GiB of its own, from the last one to the first.
    let backwards: Vec<(u64, u64, u32)> =
        (0..10).map(|n| ((15 - n) * GIB + 100 * MIB, 64 * MIB, n as u32 * 250)).collect();
    let file = write(&scratch, "back\nwards.order", &order(base(), &backwards));
    let text = said(&scratch, &[word("show"), file.as_os_str()]);
    assert!(text.is_ascii() && text.lines().skip(1).all(|line| line.len() <= 80), "{text}");
    let title = text.lines().next().expect("a title");
    assert!(
        title.ends_with("back\\nwards.order: what guests touched first, on a disk of 16 GiB"),
        "{title}"
    );
    let rows: Vec<&str> =
        text.lines().skip(2).take_while(|line| !line.contains("1 character")).collect();
    let (columns, count) = (70, 16);
    assert_eq!(rows.len(), count, "{text}");
    // Each row is 1 GiB and a few bytes.
    for (row, line) in rows.iter().enumerate() {
        let (label, map) = line.split_at(10);
        assert_eq!(map.len(), columns, "{line}");
        let expected = if row >= 6 { char::from(b'0' + (15 - row) as u8) } else { '.' };
        let marked: String = map.chars().filter(|sign| *sign != '.').collect();
        assert!(marked.chars().all(|sign| sign == expected), "{row}: {line}");
        assert_eq!(!marked.is_empty(), row >= 6, "{row}: {line}");
        assert!(label.trim_end().ends_with("iB") || row == 0, "{line}");
    }
    for line in [
        "  after     0 s 250 ms 500 ms 750 ms    1 s 1.25 s  1.5 s 1.75 s    2 s 2.25 s",
        "  touched 640 MiB, 3.9 % of the disk, in 10 ranges; 1 record",
        "  disk    17 179 869 184 bytes; SHA-256 of its first 64 KiB:",
    ] {
        assert!(text.lines().any(|there| there == line), "no {line:?}: {text}");
    }
    assert!(text.contains(&format!("\n          {}\n", "c4".repeat(32))), "{text}");
    assert!(!text.contains("pin"), "there is none: {text}");
}

/// Protects: the PNG is the same in a file and on standard output, and has the title and the
/// colours of the first and of the last touch.
#[test]
fn show_writes_a_png() {
    let scratch = Scratch::new();
    let file = write(&scratch, "a.order", &boot(10 * GIB, 1));
    let png = scratch.join("a.png");
    fs::write(&png, "something old").expect("old file");
    assert_eq!(
        said(&scratch, &[word("show"), word("--png"), png.as_os_str(), file.as_os_str()]),
        ""
    );
    let bytes = fs::read(&png).expect("PNG");
    let piped = scratch
        .cordisk()
        .args([word("order"), word("show"), word("--png"), word("-"), file.as_os_str()])
        .output();
    assert_eq!(piped.expect("cordisk").stdout, bytes);
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("small")];
    reader.next_frame(&mut pixels).expect("pixels");
    let info = reader.info();
    assert_eq!(info.utf8_text[0].get_text().expect("title"), file.to_str().expect("UTF-8"));
    let text = |keyword: &str| {
        let found = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword);
        found.unwrap_or_else(|| panic!("no {keyword}")).text.clone()
    };
    let number = |keyword: &str| text(keyword).parse::<u64>().expect(keyword);
    assert_eq!(number("Disk-Bytes"), 16 * GIB);
    let colour = |offset: u64| {
        let (cell, side) = (offset / number("Cell-Bytes"), number("Cell-Pixels"));
        let (row, column) = (cell / number("Columns") * side, cell % number("Columns") * side);
        let at = usize::try_from((row * u64::from(info.width) + column) * 4).expect("small");
        [pixels[at], pixels[at + 1], pixels[at + 2]]
    };
    let (first, last, never) = ([0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25], [0xDD, 0xDD, 0xDD]);
    assert_eq!([0, 10 * GIB, 15 * GIB].map(colour), [first, last, never]);
    for (name, colour) in [("tenth 0", "#440154"), ("tenth 9", "#FDE725"), ("never", "#DDDDDD")] {
        let line = format!("{name} {colour}");
        assert!(text("Legend").lines().any(|there| there == line), "{line}");
    }
}

/// Protects: a picture fits a terminal of 24 rows, has colours and blocks there, and binary output
/// is not written to a terminal.
#[test]
fn a_terminal_gets_a_picture_and_no_bytes() {
    requires!("terminal");
    let scratch = Scratch::new();
    let merged =
        Order::merge(&[boot(10 * GIB, 1), boot(11 * GIB, 2), boot(12 * GIB, 1), boot(13 * GIB, 1)]);
    let file = write(&scratch, "a.order", &merged.expect("one base"));
    let mut terminal =
        Terminal::cordisk(&scratch, &[word("order"), word("show"), file.as_os_str()], &[], 24, 80);
    terminal.assert_status(0);
    let screen = terminal.contents();
    assert!(
        screen.contains("a.order: what guests touched first"),
        "the title is in sight:\n{screen}"
    );
    assert!(screen.contains(&"c4".repeat(32)) && screen.contains('\u{b7}'), "{screen}");
    // The title takes as many rows as the name of the directory needs.
    let row = terminal.look(|screen| {
        let heads = |row: u16| -> String {
            let cells = (0..9).filter_map(|column| screen.cell(row, column));
            cells.map(|cell| cell.contents().to_owned()).collect()
        };
        (0..24).find(|row| heads(*row).trim_start().starts_with("0 B")).expect("a map")
    });
    let (sign, front, back) = terminal.look(|screen| {
        let cell = screen.cell(row, 10).expect("the first character of the map");
        (cell.contents().to_owned(), cell.fgcolor(), cell.bgcolor())
    });
    assert_eq!((sign.as_str(), front, back), ("0", vt100::Color::Idx(231), vt100::Color::Idx(53)));
    let rare: Vec<&str> =
        screen.lines().filter(|line| line.contains("fewer than a third")).collect();
    assert!(rare.len() == 1 && rare[0].contains("(16 KiB)"), "{screen}");

    for (args, what) in [
        (vec![word("order"), word("merge"), file.as_os_str()], "an order is binary"),
        (
            vec![word("order"), word("show"), word("--png"), word("-"), file.as_os_str()],
            "a PNG is binary",
        ),
    ] {
        let mut terminal = Terminal::cordisk(&scratch, &args, &[], 24, 80);
        terminal.assert_status(1);
        let line = terminal.contents().replace('\n', "");
        assert!(line.contains(what) && line.contains("> FILE"), "{line}");
    }
}

/// Protects: a file that is no order, is damaged, belongs to another disk or was written by a later
/// version gives one line that names it and says what to do, and nothing is written.
#[test]
fn what_cannot_be_used_is_named() {
    let scratch = Scratch::new();
    let good = boot(10 * GIB, 1);
    let file = write(&scratch, "good.order", &good);
    let mut bytes = good.encode();
    bytes[100] ^= 1;
    let damaged = scratch.write("damaged.order", &bytes);
    let cut = scratch.write("cut.order", &good.encode()[..80]);
    let mut bytes = good.encode();
    bytes[11] = 9;
    let later = scratch.write("later.order", &bytes);
    let image = scratch.write("disk.qcow2", b"QFI\xfb\0\0\0\x03 and so on");
    let smaller =
        write(&scratch, "smaller.order", &order(BaseIdentity { size: GIB, ..base() }, &[]));
    let other =
        write(&scratch, "other.order", &order(BaseIdentity { head: [1; 32], ..base() }, &[]));
    let pinned = |pin: &str| order(BaseIdentity { pin: Some(pin.to_owned()), ..base() }, &[]);
    let (one, two) = (
        write(&scratch, "one.order", &pinned("\"1\"")),
        write(&scratch, "two.order", &pinned("\"2\"")),
    );
    let missing = scratch.join("missing.order");
    let before = Snapshot::of(scratch.path());
    let output = scratch.join("output.order");
    for (path, why) in [
        (&damaged, &["damaged.order: its checksum is wrong", "copy it again"][..]),
        (&cut, &["cut.order: its checksum is wrong", "cut off"]),
        (&later, &["later.order: it has version 9", "knows 1", "use that version"]),
        (&image, &["disk.qcow2: it is not an order", "name a file that cordisk order has written"]),
        (&missing, &["missing.order: No such file or directory"]),
        (&PathBuf::from("/dev/null"), &["/dev/null: it is empty"]),
        (&scratch.path().to_owned(), &["Is a directory"]),
    ] {
        let merge =
            [word("merge"), word("-o"), output.as_os_str(), file.as_os_str(), path.as_os_str()];
        let show = [word("show"), path.as_os_str()];
        for line in [refused(&scratch, &merge), refused(&scratch, &show)] {
            assert!(why.iter().all(|part| line.contains(part)), "{why:?}: {line}");
        }
    }
    for (paths, why) in [
        (
            [&file, &smaller],
            &[
                "smaller.order: the order belongs to a disk of 1073741824 bytes, not 17179869184",
                "good.order",
                "one disk only",
            ][..],
        ),
        ([&file, &other], &["other.order", "first 65536 bytes", "0101", "c4c4", "good.order"]),
        ([&one, &two], &["two.order", "pin", "\"2\"", "\"1\"", "one.order"]),
    ] {
        let merge = [
            word("merge"),
            word("-o"),
            output.as_os_str(),
            paths[0].as_os_str(),
            paths[1].as_os_str(),
        ];
        let line = refused(&scratch, &merge);
        assert!(why.iter().all(|part| line.contains(part)), "{why:?}: {line}");
    }
    // The first has no pin, so the two others are compared with each other.
    let merge = [
        word("merge"),
        word("-o"),
        output.as_os_str(),
        file.as_os_str(),
        one.as_os_str(),
        two.as_os_str(),
    ];
    let line = refused(&scratch, &merge);
    assert!(line.contains("two.order") && line.contains("one.order"), "{line}");
    let nowhere = scratch.join("none/output.order");
    let merge = [word("merge"), word("-o"), nowhere.as_os_str(), file.as_os_str()];
    assert!(refused(&scratch, &merge).contains("none/output.order: No such file or directory"));
    let changes = before.changes(&Snapshot::of(scratch.path()));
    assert_eq!(changes, Vec::<String>::new(), "nothing is written");
}

/// Protects: a file that is larger than any order is not read as a whole.
#[test]
fn a_large_file_is_refused_without_reading_it() {
    let scratch = Scratch::new();
    let mut bytes = boot(10 * GIB, 1).encode();
    let file = scratch.write("large.order", &bytes);
    fs::File::options().write(true).open(&file).expect("file").set_len(1 << 40).expect("a hole");
    let line = refused(&scratch, &[word("show"), file.as_os_str()]);
    assert!(line.contains("large.order: it is longer than"), "{line}");
    bytes.push(0);
    let file = scratch.write("longer.order", &bytes);
    let line = refused(&scratch, &[word("show"), file.as_os_str()]);
    assert!(line.contains("longer.order: its checksum is wrong"), "{line}");
}
