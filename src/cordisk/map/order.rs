//! When guests touched which part of a disk first: an order as characters and as a PNG.
//!
//! A cell shows its first touch, as the tenth of the touched bytes that it belongs to: 0 for the
//! first tenth, 9 for the last. Tenths of bytes and not of the time, because a boot reads in
//! bursts.

use std::fmt::Write as _;
use std::io::Write;

use super::cells::Cells;
use super::legend::Legend;
use super::picture::{Canvas, LABEL};
use super::png::Squares;
use super::units;
use host::Result;
use host::error::one_line;
use order::{HEAD, Order, OrderRange};

/// Parts of the touched bytes that are told apart.
const TENTHS: usize = 10;

/// Columns of a tenth in the table of times.
const COLUMN: usize = 7;

/// Colours of the tenths: viridis of matplotlib, which gets lighter evenly, and which nearly
/// everybody can tell apart. The first is the darkest.
const COLOURS: [[u8; 3]; TENTHS] = [
    [0x44, 0x01, 0x54],
    [0x48, 0x28, 0x78],
    [0x3E, 0x4A, 0x89],
    [0x31, 0x68, 0x8E],
    [0x26, 0x82, 0x8E],
    [0x1F, 0x9E, 0x89],
    [0x35, 0xB7, 0x79],
    [0x6D, 0xCD, 0x59],
    [0xB4, 0xDE, 0x2C],
    [0xFD, 0xE7, 0x25],
];

/// The same among the 256 colours of terminals.
const INDEXES: [u8; TENTHS] = [53, 54, 60, 24, 30, 36, 35, 77, 148, 220];

/// The first tenth that is light, and has black characters on it.
const LIGHT: usize = 5;

/// What no record has.
const NOTHING: [u8; 3] = [0xDD, 0xDD, 0xDD];

/// What fewer than a third of the records have.
const RARE: [u8; 3] = [0x99, 0x99, 0x99];

/// When a cell is touched first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CellTouch {
    /// In no record.
    Never,
    /// In fewer than a third of the records. A stream brings it last.
    Rare,
    /// In this tenth of the bytes that are not rare, from 0 to 9.
    Tenth(u8),
}

impl CellTouch {
    fn sign(self) -> char {
        match self {
            CellTouch::Never => '.',
            CellTouch::Rare => '-',
            CellTouch::Tenth(tenth) => char::from(b'0' + tenth),
        }
    }

    fn colour(self) -> [u8; 3] {
        match self {
            CellTouch::Never => NOTHING,
            CellTouch::Rare => RARE,
            CellTouch::Tenth(tenth) => COLOURS[usize::from(tenth) % TENTHS],
        }
    }
}

/// An order in cells of equal size.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FirstTouches {
    /// Size of a cell in bytes. The last one may be shorter.
    pub cell: u64,
    /// When each cell is touched first.
    pub cells: Vec<CellTouch>,
    /// When each tenth begins, in milliseconds after the disk was opened.
    pub begins: [Option<u32>; TENTHS],
    /// Bytes of the ranges that fewer than a third of the records have.
    pub rare: u64,
}

impl FirstTouches {
    /// Divides the disk into at most `most` cells.
    pub fn of(order: &Order, most: u64) -> FirstTouches {
        let size = order.base().size;
        let cell = size.div_ceil(most.clamp(1, Cells::MOST)).max(1);
        let count = usize::try_from(size.div_ceil(cell)).unwrap_or_default();
        let mut touches = FirstTouches {
            cell,
            cells: vec![CellTouch::Never; count],
            begins: [None; TENTHS],
            rare: 0,
        };
        let is_rare = |range: &&OrderRange| order.is_rare(range);
        touches.rare = order.ranges().iter().filter(is_rare).map(|range| range.len).sum();
        let common = order.bytes() - touches.rare;
        let mut rank = 0;
        for range in order.ranges().iter().filter(|range| !is_rare(range)) {
            for tenth in tenth_of(rank, common)..=tenth_of(rank + range.len - 1, common) {
                touches.begins[usize::from(tenth)].get_or_insert(range.at_ms);
            }
            touches.mark(range, |offset| {
                CellTouch::Tenth(tenth_of(rank + (offset - range.offset), common))
            });
            rank += range.len;
        }
        for range in order.ranges().iter().filter(is_rare) {
            touches.mark(range, |_| CellTouch::Rare);
        }
        touches
    }

    /// Marks the cells of a range that have no mark yet, each by its first byte in the range.
    fn mark(&mut self, range: &OrderRange, when: impl Fn(u64) -> CellTouch) {
        let place = |offset: u64| usize::try_from(offset / self.cell).unwrap_or(usize::MAX);
        let places = place(range.offset)..=place(range.end() - 1);
        for (index, mark) in self.cells.iter_mut().enumerate().skip(*places.start()) {
            if index > *places.end() {
                break;
            }
            if *mark == CellTouch::Never {
                *mark = when(range.offset.max(index as u64 * self.cell));
            }
        }
    }
}

/// The tenth of `total` bytes that the byte of this rank is in.
fn tenth_of(rank: u64, total: u64) -> u8 {
    let tenth = u128::from(rank) * TENTHS as u128 / u128::from(total.max(1));
    u8::try_from(tenth).unwrap_or(u8::MAX).min(TENTHS as u8 - 1)
}

/// Milliseconds in at most six characters.
fn time(ms: u32) -> String {
    match ms / 1000 {
        _ if ms == 0 => "0 s".to_owned(),
        0..600 => units::time(f64::from(ms) * 1e6, "u"),
        seconds @ 600..6000 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

/// Draws an order with the offset of each row, a legend, the times, and the facts about it.
pub fn order_picture(title: &str, order: &Order, canvas: &Canvas) -> String {
    let touches = FirstTouches::of(order, canvas.cells());
    let base = order.base();
    let size = units::size(base.size);
    let mut text =
        format!("{}: what guests touched first, on a disk of {size}\n\n", one_line(title));
    draw(&mut text, &touches, canvas);
    legend(&mut text, &touches, canvas);
    facts(&mut text, order);
    text
}

// Writing to a String cannot fail.
fn draw(text: &mut String, touches: &FirstTouches, canvas: &Canvas) {
    for (row, line) in touches.cells.chunks(canvas.columns()).enumerate() {
        let offset = (row * canvas.columns()) as u64 * touches.cell;
        let _ = write!(text, "{:>width$}  ", units::size(offset), width = LABEL - 2);
        for run in line.chunk_by(|one, other| one == other) {
            paint(text, run[0], run.len(), canvas);
        }
        text.push('\n');
    }
    if !touches.cells.is_empty() {
        let _ = writeln!(text, "{:LABEL$}1 character = {}", "", units::size(touches.cell));
        text.push('\n');
    }
}

fn paint(text: &mut String, when: CellTouch, count: usize, canvas: &Canvas) {
    let sign = if canvas.blocks && when == CellTouch::Never { '·' } else { when.sign() };
    let run: String = std::iter::repeat_n(sign, count).collect();
    match when {
        CellTouch::Tenth(tenth) if canvas.colours => {
            let tenth = usize::from(tenth) % TENTHS;
            let front = if tenth < LIGHT { 231 } else { 16 };
            let _ = write!(text, "\x1b[38;5;{front};48;5;{}m{run}\x1b[0m", INDEXES[tenth]);
        }
        _ => text.push_str(&run),
    }
}

fn legend(text: &mut String, touches: &FirstTouches, canvas: &Canvas) {
    text.push_str("  ");
    paint(text, CellTouch::Tenth(0), 1, canvas);
    text.push_str(" to ");
    paint(text, CellTouch::Tenth(9), 1, canvas);
    text.push_str("  tenths of the touched bytes, in order; a character shows its earliest\n  ");
    paint(text, CellTouch::Never, 1, canvas);
    text.push_str("       not touched\n");
    if touches.rare > 0 {
        let rare = units::size(touches.rare);
        let _ = writeln!(
            text,
            "  -       in fewer than a third of the records ({rare}): streamed last"
        );
    }
    text.push('\n');
    if has_times(touches) {
        times(text, touches, canvas);
    }
}

/// An order that was made from a file system has none.
fn has_times(touches: &FirstTouches) -> bool {
    touches.begins.iter().flatten().any(|at| *at > 0)
}

/// The table of times: how long after the opening of its disk a guest has come to each tenth.
fn times(text: &mut String, touches: &FirstTouches, canvas: &Canvas) {
    let begins: Vec<(u8, u32)> =
        (0..).zip(touches.begins).filter_map(|(tenth, at)| at.map(|at| (tenth, at))).collect();
    let columns = (canvas.width.saturating_sub(LABEL) / COLUMN).clamp(1, TENTHS);
    for part in begins.chunks(columns) {
        text.push_str("  tenth ");
        for (tenth, _) in part {
            text.push_str(&" ".repeat(COLUMN - 1));
            paint(text, CellTouch::Tenth(*tenth), 1, canvas);
        }
        text.push_str("\n  after ");
        for (_, at) in part {
            let _ = write!(text, "{:>COLUMN$}", time(*at));
        }
        text.push_str("\n\n");
    }
}

fn facts(text: &mut String, order: &Order) {
    let base = order.base();
    let bytes = order.bytes();
    let _ = writeln!(
        text,
        "  touched {}, {} of the disk, in {} ranges; {}",
        units::size(bytes),
        units::percent(bytes, base.size),
        units::number(order.ranges().len() as u64),
        records(order)
    );
    let _ = writeln!(
        text,
        "  disk    {} bytes; SHA-256 of its first {}:\n          {}",
        units::number(base.size),
        units::size(base.size.min(HEAD as u64)),
        base.head_text()
    );
    if let Some(pin) = &base.pin {
        let _ = writeln!(text, "  pin     {}", one_line(pin));
    }
}

/// `1 record`, `12 records`.
pub fn records(order: &Order) -> String {
    let records = units::number(order.records().into());
    if order.records() == 1 { "1 record".to_owned() } else { format!("{records} records") }
}

/// Writes an order as a picture of one square for each cell, with its legend.
///
/// # Errors
/// Those of `to`.
pub fn write_order_png(to: &mut dyn Write, title: &str, order: &Order) -> Result<()> {
    let touches = FirstTouches::of(order, Cells::MOST);
    let mut kinds: Vec<(CellTouch, String, String)> = Vec::new();
    for (tenth, at) in (0..).zip(touches.begins) {
        let Some(at) = at else { continue };
        let long = match has_times(&touches) {
            true => format!("tenth {tenth} of the touched bytes, after {}", time(at)),
            false => format!("tenth {tenth} of the touched bytes"),
        };
        kinds.push((CellTouch::Tenth(tenth), format!("tenth {tenth}"), long));
    }
    let rare = "touched in fewer than a third of the records".to_owned();
    kinds.extend((touches.rare > 0).then(|| (CellTouch::Rare, "rare".to_owned(), rare)));
    kinds.push((CellTouch::Never, "never".to_owned(), "not touched".to_owned()));
    let below = [
        format!(
            "1 square = {}, first at the top left; its earliest touch",
            units::size(touches.cell)
        ),
        format!(
            "{} ({} of the disk) in {} ranges, {}",
            units::size(order.bytes()),
            units::percent(order.bytes(), order.base().size),
            units::number(order.ranges().len() as u64),
            records(order)
        ),
    ];
    let entry = |(when, name, _): &(CellTouch, String, String)| {
        let [red, green, blue] = when.colour();
        format!("{name} #{red:02X}{green:02X}{blue:02X}")
    };
    let explained: Vec<_> =
        kinds.iter().map(|(when, _, long)| (when.colour(), long.clone())).collect();
    let squares = Squares {
        title,
        disk_bytes: order.base().size,
        cell_bytes: touches.cell,
        colours: touches.cells.iter().map(|when| when.colour()).collect(),
        legend: Legend::of_lines(title, order.base().size, &explained, &below),
        text: kinds.iter().map(entry).collect::<Vec<_>>().join("\n"),
    };
    squares.write(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use order::{BaseIdentity, Touch};

    const MIB: u64 = 1 << 20;

    fn order(size: u64, touches: &[(u64, u64, u32)]) -> Order {
        let base = BaseIdentity { size, head: [0x5a; 32], pin: Some("\"v1\u{1b}\"".to_owned()) };
        let touch = |&(offset, len, at_ms): &(u64, u64, u32)| Touch { offset, len, at_ms };
        Order::from_touches(base, touches.iter().map(touch))
    }

    /// Ten ranges of 1 MiB from the end of the disk to its beginning, and one record of four that
    /// has the last MiB as well.
    fn merged() -> Order {
        let touches: Vec<(u64, u64, u32)> =
            (0..10).map(|n| ((18 - 2 * n) * MIB, MIB, n as u32 * 1000)).collect();
        let own: Vec<_> = [(39 * MIB, MIB, 0)].iter().chain(&touches).copied().collect();
        let common = order(40 * MIB, &touches);
        Order::merge(&[common.clone(), common.clone(), common, order(40 * MIB, &own)]).unwrap()
    }

    fn signs(touches: &FirstTouches) -> String {
        touches.cells.iter().map(|when| when.sign()).collect()
    }

    #[test]
    fn a_cell_shows_its_first_touch() {
        let touches = FirstTouches::of(&merged(), 40);
        assert_eq!((touches.cell, touches.rare), (MIB, MIB));
        assert_eq!(signs(&touches), "9.8.7.6.5.4.3.2.1.0....................-");
        assert_eq!(touches.begins, std::array::from_fn(|n| Some(n as u32 * 1000)));
        assert_eq!(signs(&FirstTouches::of(&merged(), 10)), "86420....-");
        // What is common counts before what is rare.
        assert_eq!(signs(&FirstTouches::of(&merged(), 1)), "0");
        // A long range has several tenths, and begins and ends within cells.
        let long = order(100, &[(15, 60, 7)]);
        let touches = FirstTouches::of(&long, 10);
        assert_eq!(signs(&touches), ".0024579..");
        assert_eq!(touches.begins, [Some(7); 10]);
        assert_eq!(signs(&FirstTouches::of(&order(0, &[]), 10)), "");
        assert_eq!(signs(&FirstTouches::of(&order(3, &[]), 10)), "...");
    }

    #[test]
    fn the_largest_disk_has_cells_too() {
        let size = i64::MAX as u64;
        let touches = FirstTouches::of(&order(size, &[(0, size, u32::MAX)]), u64::MAX);
        assert_eq!(touches.cells.len() as u64, Cells::MOST);
        assert_eq!(touches.cells[0], CellTouch::Tenth(0));
        assert_eq!(touches.cells.last(), Some(&CellTouch::Tenth(9)));
    }

    #[test]
    fn a_plain_picture_is_ascii_in_80_columns() {
        let text = order_picture("a.order", &merged(), &Canvas::plain());
        assert!(text.is_ascii() && text.lines().all(|line| line.len() <= 80), "{text}");
        let map: String = text
            .lines()
            .skip(2)
            .take_while(|line| !line.contains("1 character"))
            .map(|line| &line[LABEL..])
            .collect();
        assert_eq!(map, signs(&FirstTouches::of(&merged(), Canvas::plain().cells())), "{text}");
        for line in [
            "a.order: what guests touched first, on a disk of 40 MiB",
            "  -       in fewer than a third of the records (1 MiB): streamed last",
            "  tenth       0      1      2      3      4      5      6      7      8      9",
            "  after     0 s    1 s    2 s    3 s    4 s    5 s    6 s    7 s    8 s    9 s",
            "  touched 11 MiB, 27.5 % of the disk, in 11 ranges; 4 records",
            "  disk    41 943 040 bytes; SHA-256 of its first 64 KiB:",
            "          5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a",
            "  pin     \"v1\\u{1b}\"",
        ] {
            assert!(text.lines().any(|there| there == line), "no {line:?} in {text}");
        }
        let size = i64::MAX as u64;
        let largest = order_picture("a", &order(size, &[(1, size, u32::MAX)]), &Canvas::plain());
        assert!(largest.lines().all(|line| line.len() <= 80), "{largest}");
        assert!(largest.contains(" 1193 h"), "{largest}");
    }

    #[test]
    fn what_is_not_there_is_not_explained() {
        let text = order_picture("a", &order(MIB, &[(0, 4096, 0)]), &Canvas::plain());
        assert!(!text.contains("after") && !text.contains("third"), "{text}");
        let empty = order_picture("a", &order(0, &[]), &Canvas::plain());
        assert!(empty.contains("touched 0 B") && !empty.contains("character ="), "{empty}");
    }

    #[test]
    fn a_terminal_gets_colours_and_a_narrow_one_a_narrow_table() {
        let text = order_picture("a", &merged(), &Canvas::terminal(80, 24, true));
        assert!(text.contains("\x1b[38;5;231;48;5;53m0\x1b[0m"), "the first is dark: {text:?}");
        assert!(text.contains("\x1b[38;5;16;48;5;220m9\x1b[0m"), "the last is light: {text:?}");
        let text = order_picture("a", &merged(), &Canvas::terminal(40, 24, false));
        assert!(!text.contains('\x1b') && text.contains('\u{b7}'), "{text}");
        let tables: Vec<_> = text.lines().filter(|line| line.starts_with("  tenth")).collect();
        assert!(tables.len() == 3 && tables.iter().all(|line| line.len() <= 40), "{text}");
    }

    #[test]
    fn the_png_has_the_colours_of_the_first_touches() {
        let order = merged();
        let mut file = Vec::new();
        write_order_png(&mut file, "a.order", &order).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let info = reader.info();
        let text = |keyword: &str| {
            let texts = &info.uncompressed_latin1_text;
            texts.iter().find(|chunk| chunk.keyword == keyword).unwrap().text.clone()
        };
        let number = |keyword: &str| text(keyword).parse::<usize>().unwrap();
        let (columns, side) = (number("Columns"), number("Cell-Pixels"));
        assert_eq!(number("Disk-Bytes") as u64, 40 * MIB);
        let pixels = pixels.as_chunks::<4>().0;
        let touches = FirstTouches::of(&order, number("Cells") as u64);
        assert_eq!(touches.cell, number("Cell-Bytes") as u64);
        for (index, when) in touches.cells.iter().enumerate() {
            let (row, column) = (index / columns * side, index % columns * side);
            let [red, green, blue] = when.colour();
            let pixel = pixels[row * info.width as usize + column];
            assert_eq!(pixel, [red, green, blue, 0xFF], "cell {index}");
        }
        let legend = text("Legend");
        assert!(
            legend.starts_with("tenth 0 #440154\ntenth 1 #482878\n")
                && legend.ends_with("tenth 9 #FDE725\nrare #999999\nnever #DDDDDD"),
            "{legend}"
        );
    }
}
