//! The map as characters: coloured blocks on a terminal, ASCII otherwise.

use std::fmt::Write;

use super::cells::{Cells, Shares};
use super::units;

/// Columns left of the map, which show the offset of each row.
pub(super) const LABEL: usize = 10;
/// Most rows of a picture.
const ROWS: usize = 16;

/// How a place of the map is drawn.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PictureStyle {
    /// All of the place is in the overlay.
    Local,
    /// Part of the place is in the overlay: up to a third (1), up to two thirds (2), or more (3).
    /// The rest is zero (`false`), or some of it is remote (`true`).
    Partly(u8, bool),
    /// All of the place is zero.
    Zero,
    /// None of the place is in the overlay, and some of it is remote.
    Remote {
        /// Some of the place is zero.
        some_zero: bool,
    },
}

/// The meaning of a colour. The colours are those of Okabe and Ito, which nearly everybody can tell
/// apart, as close as terminals have them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Colour {
    /// In the overlay.
    Local,
    /// Zero.
    Zero,
    /// In the backing chain.
    Remote,
}

impl Colour {
    /// Returns the number among the 256 colours of terminals.
    pub fn index(self) -> u8 {
        match self {
            Colour::Local => 32,
            Colour::Zero => 238,
            Colour::Remote => 214,
        }
    }
}

impl PictureStyle {
    /// Returns how a place with these bytes is drawn.
    pub fn of(shares: &Shares) -> PictureStyle {
        let total = shares.total();
        match shares {
            Shares { local, .. } if *local > 0 && *local == total => PictureStyle::Local,
            Shares { local: 0, remote: 0, .. } => PictureStyle::Zero,
            Shares { local: 0, zero, .. } => PictureStyle::Remote { some_zero: *zero > 0 },
            Shares { local, remote, .. } => {
                let part = u128::from(*local) * 3;
                let shade = if part <= u128::from(total) {
                    1
                } else {
                    2 + u8::from(part > 2 * u128::from(total))
                };
                PictureStyle::Partly(shade, *remote > 0)
            }
        }
    }

    /// Returns the character for a terminal.
    pub fn block(self) -> char {
        match self {
            PictureStyle::Local => '█',
            PictureStyle::Partly(1, _) => '░',
            PictureStyle::Partly(2, _) => '▒',
            PictureStyle::Partly(..) => '▓',
            PictureStyle::Zero => ' ',
            PictureStyle::Remote { .. } => '·',
        }
    }

    /// Returns the character for output in ASCII.
    pub fn ascii(self) -> char {
        match self {
            PictureStyle::Local => '#',
            PictureStyle::Partly(..) => '+',
            PictureStyle::Zero => '.',
            PictureStyle::Remote { some_zero: false } => '-',
            PictureStyle::Remote { some_zero: true } => '~',
        }
    }

    /// Returns the colour of the character, and that of its background.
    pub fn colours(self) -> (Colour, Option<Colour>) {
        match self {
            PictureStyle::Local | PictureStyle::Partly(_, true) => (Colour::Local, None),
            PictureStyle::Partly(_, false) => (Colour::Local, Some(Colour::Zero)),
            PictureStyle::Zero => (Colour::Zero, Some(Colour::Zero)),
            PictureStyle::Remote { .. } => (Colour::Remote, None),
        }
    }
}

/// The medium of a picture.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Canvas {
    /// Columns.
    pub width: usize,
    /// Most rows of the map itself.
    pub rows: usize,
    /// Use block characters instead of ASCII.
    pub blocks: bool,
    /// Use escape sequences for colours.
    pub colours: bool,
}

impl Canvas {
    /// For a file or a pipe: 80 columns of ASCII.
    pub fn plain() -> Canvas {
        Canvas { width: 80, rows: ROWS, blocks: false, colours: false }
    }

    /// For a terminal of `width` columns and `rows` rows.
    pub fn terminal(width: usize, rows: usize, colours: bool) -> Canvas {
        // Eight rows are left for the title, the scale, the legend and the next prompt.
        Canvas {
            width: width.max(LABEL + 10),
            rows: rows.saturating_sub(8).clamp(1, ROWS),
            blocks: true,
            colours,
        }
    }

    /// Returns how many characters of the map are in a row.
    pub(super) fn columns(&self) -> usize {
        self.width.saturating_sub(LABEL).max(1)
    }

    /// Returns the number of cells that fill the map.
    pub fn cells(&self) -> u64 {
        (self.columns() as u64 * self.rows as u64).clamp(1, Cells::MOST)
    }

    fn paint(&self, text: &mut String, (front, back): (Colour, Option<Colour>), what: &str) {
        if !self.colours {
            text.push_str(what);
            return;
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "\x1b[38;5;{}", front.index());
        if let Some(back) = back {
            let _ = write!(text, ";48;5;{}", back.index());
        }
        let _ = write!(text, "m{what}\x1b[0m");
    }
}

/// Draws the map with the offset of each row, a scale, and a legend with bytes and percent.
pub fn picture(title: &str, cells: &Cells, canvas: &Canvas) -> String {
    let mut text = format!("{title}\n\n");
    let looks: Vec<PictureStyle> =
        cells.spread(canvas.columns() * canvas.rows).iter().map(PictureStyle::of).collect();
    for (row, line) in looks.chunks(canvas.columns()).enumerate() {
        // Exact if there are as many cells as places, as was requested; approximate otherwise.
        let first = row * canvas.columns() * cells.len() / looks.len();
        let _ =
            write!(text, "{:>width$}  ", units::size(cells.range(first).start), width = LABEL - 2);
        let mut rest = line;
        while let Some(look) = rest.first() {
            // Neighbours of the same colours are painted together.
            let alike = rest.iter().take_while(|other| other.colours() == look.colours()).count();
            let run: String = rest[..alike]
                .iter()
                .map(|look| if canvas.blocks { look.block() } else { look.ascii() })
                .collect();
            canvas.paint(&mut text, look.colours(), &run);
            rest = &rest[alike..];
        }
        text.push('\n');
    }
    if !looks.is_empty() {
        let each = cells.size().div_ceil(looks.len() as u64);
        let each = if looks.len() == cells.len() { cells.cell_size() } else { each };
        let _ = writeln!(text, "{:LABEL$}1 character = {}", "", units::size(each));
    }
    text.push('\n');
    legend(&mut text, cells, canvas);
    text
}

fn legend(text: &mut String, cells: &Cells, canvas: &Canvas) {
    let sum = cells.sum();
    let lines = [
        (PictureStyle::Local, "local", sum.local, "in the image itself"),
        (PictureStyle::Zero, "zero", sum.zero, "known to be zero"),
        (PictureStyle::Remote { some_zero: false }, "remote", sum.remote, "in the backing files"),
    ];
    let sign = |look: PictureStyle| if canvas.blocks { look.block() } else { look.ascii() };
    for ((look, name, bytes, meaning), percent) in lines.into_iter().zip(sum.percents()) {
        text.push_str("  ");
        canvas.paint(text, look.colours(), &sign(look).to_string());
        let size = units::size(bytes);
        let line = format!("  {name:<7} {size:>9}  {percent:>7}");
        // On a narrow screen the numbers matter more than their meaning.
        let room = canvas.width >= line.len() + meaning.len() + 6;
        let _ = if room { writeln!(text, "{line}  {meaning}") } else { writeln!(text, "{line}") };
    }
    text.push_str("  ");
    if canvas.blocks {
        for shade in 1..=3 {
            let look = PictureStyle::Partly(shade, true);
            canvas.paint(text, look.colours(), &sign(look).to_string());
        }
        text.push_str("  partly local\n");
    } else {
        text.push_str("+  partly local    ~  partly zero, the rest remote\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One cell of each kind.
    fn cells() -> Cells {
        Cells::new(
            8 * 90 - 30,
            90,
            vec![90, 80, 45, 10, 0, 0, 0, 30],
            vec![0, 0, 0, 80, 90, 0, 30, 0],
        )
        .unwrap()
    }

    #[test]
    fn a_look_says_what_is_there() {
        let looks: Vec<PictureStyle> = cells().spread(100).iter().map(PictureStyle::of).collect();
        let remote = |some_zero| PictureStyle::Remote { some_zero };
        assert_eq!(
            looks,
            [
                PictureStyle::Local,
                PictureStyle::Partly(3, true),
                PictureStyle::Partly(2, true),
                PictureStyle::Partly(1, false),
                PictureStyle::Zero,
                remote(false),
                remote(true),
                PictureStyle::Partly(2, true)
            ]
        );
        assert_eq!(looks.iter().map(|look| look.block()).collect::<String>(), "█▓▒░ ··▒");
        assert_eq!(looks.iter().map(|look| look.ascii()).collect::<String>(), "#+++.-~+");
        // The largest possible numbers.
        assert_eq!(
            PictureStyle::of(&Shares { local: u64::MAX - 1, zero: 1, remote: 0 }),
            PictureStyle::Partly(3, false)
        );
    }

    #[test]
    fn a_plain_picture_is_ascii_in_80_columns() {
        let many = Cells::new(
            3000 << 20,
            1 << 20,
            (0..3000).map(|index| if index < 1500 { 1 << 20 } else { 0 }).collect(),
            vec![0; 3000],
        )
        .unwrap();
        let text = picture("disk", &many, &Canvas::plain());
        assert!(text.is_ascii(), "{text}");
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        let map: String = text
            .lines()
            .skip(2)
            .take_while(|line| !line.contains("character"))
            .map(|line| &line[LABEL..])
            .collect();
        assert_eq!(map.len() as u64, Canvas::plain().cells());
        assert_eq!(map.trim_end_matches('-'), "#".repeat(map.len() / 2), "{text}");
        assert!(text.contains("#  local    1.46 GiB   50.0 %"), "{text}");
        assert!(text.contains("-  remote   1.46 GiB   50.0 %"), "{text}");
        assert!(text.contains(".  zero          0 B    0.0 %"), "{text}");
    }

    #[test]
    fn a_picture_for_a_terminal_has_blocks_and_colours_if_wanted() {
        let text = picture("disk", &cells(), &Canvas::terminal(40, 24, true));
        assert!(
            text.contains("\x1b[38;5;32m█▓▒\x1b[0m\x1b[38;5;32;48;5;238m░\x1b[0m\x1b[38;5;238;48;5;238m \x1b[0m\x1b[38;5;214m··\x1b[0m"),
            "{text:?}"
        );
        let without = picture("disk", &cells(), &Canvas::terminal(40, 24, false));
        assert!(
            !without.contains('\x1b')
                && without.contains("     0 B  █▓▒░ ··▒\n          1 character = 90 B\n"),
            "{without}"
        );
        assert!(without.lines().all(|line| line.chars().count() <= 40), "{without}");
    }

    #[test]
    fn a_disk_without_bytes_has_a_picture_too() {
        let text = picture("disk", &Cells::default(), &Canvas::plain());
        assert!(text.starts_with("disk\n\n\n") && text.contains("0 B    0.0 %"), "{text}");
    }
}
