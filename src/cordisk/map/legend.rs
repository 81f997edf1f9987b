//! The legend below a picture: the meaning of each colour, and the size of a cell.

use std::convert::Infallible;

use embedded_graphics::Drawable;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_1::FONT_9X15;
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::Pixel;
use embedded_graphics::primitives::{Primitive, PrimitiveStyle, Rectangle};
use embedded_graphics::text::{Baseline, Text};

use super::cells::Cells;
use super::png::{LOCAL, REMOTE, ZERO};
use super::units;

/// Width of a character of the font, in pixels.
const CHARACTER: usize = 9;
/// Distance of two lines of text, in pixels.
const LINE: usize = 20;
/// Margin around the text, in pixels.
const MARGIN: usize = 8;
/// Side of a coloured square, in pixels.
const SQUARE: usize = 14;
/// Most characters of a title. A longer title loses its beginning, since names of files differ at
/// their end.
const LONGEST_TITLE: usize = 60;

/// The drawn legend: black on white.
#[derive(Debug)]
pub(super) struct Legend {
    width: usize,
    height: usize,
    /// Four bytes per pixel: red, green, blue, opacity.
    pixels: Vec<u8>,
}

impl Legend {
    /// The legend of a map: each colour in bytes and percent.
    pub fn new(title: &str, cells: &Cells) -> Legend {
        let sum = cells.sum();
        let parts = [
            (LOCAL, "local", sum.local, "in the image itself"),
            (ZERO, "zero", sum.zero, "known to be zero"),
            (REMOTE, "remote", sum.remote, "in the backing files"),
        ];
        let explained: Vec<_> = parts
            .iter()
            .zip(sum.percents())
            .map(|((colour, name, bytes, meaning), percent)| {
                let size = units::size(*bytes);
                (*colour, format!("{name:<7}{size:>10}  {percent:>7}  {meaning}"))
            })
            .collect();
        let cell = format!(
            "1 square = {}, first at the top left; mixed colours: parts of a square",
            units::size(cells.cell_size())
        );
        Legend::of_lines(title, cells.size(), &explained, &[cell])
    }

    /// A title with the size of the disk, lines that each explain a colour, and other lines.
    pub fn of_lines(
        title: &str,
        size: u64,
        explained: &[([u8; 3], String)],
        below: &[String],
    ) -> Legend {
        let title = format!("{}, {}", printable(title), units::size(size));
        let indent = 2 * SQUARE;
        let width = |line: &String| line.chars().count() * CHARACTER;
        let widest = explained
            .iter()
            .map(|(_, line)| width(line) + indent)
            .chain(below.iter().map(width))
            .fold(width(&title), usize::max);
        let lines = 1 + explained.len() + below.len();
        let (width, height) = (widest + 2 * MARGIN, 2 * MARGIN + LINE * lines);
        let mut legend = Legend { width, height, pixels: vec![0xFF; width * height * 4] };
        legend.text(0, 0, &title);
        for (index, (colour, line)) in explained.iter().enumerate() {
            legend.square(index + 1, *colour);
            legend.text(indent, index + 1, line);
        }
        for (index, line) in below.iter().enumerate() {
            legend.text(0, explained.len() + 1 + index, line);
        }
        legend
    }

    /// Returns the width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Returns the pixels of each row.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.pixels.chunks(self.width * 4)
    }

    fn text(&mut self, indent: usize, line: usize, text: &str) {
        let style = MonoTextStyle::new(&FONT_9X15, Rgb888::BLACK);
        let Ok(_) = Text::with_baseline(
            text,
            point(MARGIN + indent, MARGIN + line * LINE),
            style,
            Baseline::Top,
        )
        .draw(self);
    }

    fn square(&mut self, line: usize, [red, green, blue]: [u8; 3]) {
        let side = u32::try_from(SQUARE).unwrap_or_default();
        let area = Rectangle::new(point(MARGIN, MARGIN + line * LINE), Size::new(side, side));
        let Ok(()) =
            area.into_styled(PrimitiveStyle::with_fill(Rgb888::new(red, green, blue))).draw(self);
    }
}

/// Returns the title with characters that the font has; a long title is reduced to its end.
fn printable(title: &str) -> String {
    let known = |c: char| if c.is_control() || u32::from(c) > 0xFF { '?' } else { c };
    let count = title.chars().count();
    if count <= LONGEST_TITLE {
        return title.chars().map(known).collect();
    }
    "...".chars().chain(title.chars().skip(count - LONGEST_TITLE + 3).map(known)).collect()
}

fn point(x: usize, y: usize) -> Point {
    Point::new(i32::try_from(x).unwrap_or(i32::MAX), i32::try_from(y).unwrap_or(i32::MAX))
}

impl OriginDimensions for Legend {
    fn size(&self) -> Size {
        Size::new(
            u32::try_from(self.width).unwrap_or(u32::MAX),
            u32::try_from(self.height).unwrap_or(u32::MAX),
        )
    }
}

impl DrawTarget for Legend {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(Point { x, y }, colour) in pixels {
            let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y)) else { continue };
            if x < self.width
                && let Some(pixel) = self
                    .pixels
                    .get_mut((y * self.width + x) * 4..)
                    .and_then(|rest| rest.get_mut(..4))
            {
                pixel.copy_from_slice(&[colour.r(), colour.g(), colour.b(), 0xFF]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_is_what_the_font_has_of_it() {
        assert_eq!(printable("/srv/vm.raw"), "/srv/vm.raw");
        assert_eq!(printable("\u{e9}\u{4e00}\u{1b}[31m"), "\u{e9}??[31m");
        let long = printable(&format!("/start/{}/vm.raw", "x".repeat(200)));
        assert!(
            long.chars().count() == LONGEST_TITLE
                && long.starts_with("...")
                && long.ends_with("/vm.raw"),
            "{long}"
        );
    }

    #[test]
    fn it_is_black_on_white_with_three_colours() {
        let cells =
            Cells::new(4 << 20, 1 << 20, vec![1 << 20, 0, 0, 0], vec![0, 1 << 20, 0, 0]).unwrap();
        let legend = Legend::new(&"long ".repeat(100), &cells);
        assert_eq!(legend.lines().count(), legend.height());
        let pixels: Vec<&[u8]> = legend.lines().flat_map(|line| line.chunks(4)).collect();
        for colour in [LOCAL, ZERO, REMOTE] {
            let count = pixels.iter().filter(|pixel| pixel[..3] == colour).count();
            assert_eq!(count, SQUARE * SQUARE, "{colour:?}");
        }
        let dark = pixels.iter().filter(|pixel| pixel[..3] == [0; 3]).count();
        assert!(dark > 1000, "{dark} pixels of text");
        assert!(pixels.iter().all(|pixel| pixel[3] == 0xFF));
    }
}
