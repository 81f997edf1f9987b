//! Pictures as PNG: one square for each cell of a disk, and the legend below. The file also has the
//! same facts as text, for programs.

use std::io::Write;

use super::cells::{Cells, Shares};
use super::legend::Legend;
use super::units;
use host::{Error, ErrorKind, Result};

/// Most columns of cells.
const COLUMNS: usize = 512;
/// Width and height of a cell in pixels.
pub const CELL_PIXELS: usize = 4;
/// Colour of local bytes. The three colours are those of Okabe and Ito, which nearly everybody can
/// tell apart: blue, light grey, orange.
pub const LOCAL: [u8; 3] = [0x00, 0x72, 0xB2];
/// Colour of bytes known to be zero.
pub const ZERO: [u8; 3] = [0xDD, 0xDD, 0xDD];
/// Colour of bytes in the backing chain.
pub const REMOTE: [u8; 3] = [0xE6, 0x9F, 0x00];

/// Returns columns and rows of a picture of `cells` cells: four times as wide as high, and at most
/// [`COLUMNS`] wide.
pub fn shape(cells: usize) -> (usize, usize) {
    let columns = (cells as f64 * 4.0).sqrt().ceil() as usize;
    let columns = columns.clamp(1, COLUMNS).min(cells.max(1));
    (columns, cells.div_ceil(columns).max(1))
}

/// Returns the colour of a cell: the mean of the colours of its bytes.
pub fn colour(shares: &Shares) -> [u8; 3] {
    let total = u128::from(shares.total()).max(1);
    let mut mixed = [0; 3];
    for (channel, value) in mixed.iter_mut().enumerate() {
        let sum = u128::from(shares.local) * u128::from(LOCAL[channel])
            + u128::from(shares.zero) * u128::from(ZERO[channel])
            + u128::from(shares.remote) * u128::from(REMOTE[channel]);
        // The mean of byte values fits a byte.
        *value = u8::try_from((sum + total / 2) / total).unwrap_or(u8::MAX);
    }
    mixed
}

/// Writes the picture of a map.
///
/// # Errors
/// Those of `to`.
pub fn write_png(to: &mut dyn Write, title: &str, cells: &Cells) -> Result<()> {
    let sum = cells.sum();
    let [local, zero, remote] = sum.percents();
    let entry = |name: &str, [red, green, blue]: [u8; 3], bytes: u64, percent: String| {
        format!(
            "{name} #{red:02X}{green:02X}{blue:02X} {bytes} bytes ({}, {percent})",
            units::size(bytes)
        )
    };
    let text = [
        entry("local", LOCAL, sum.local, local),
        entry("zero", ZERO, sum.zero, zero),
        entry("remote", REMOTE, sum.remote, remote),
    ]
    .join("\n");
    let squares = Squares {
        title,
        disk_bytes: cells.size(),
        cell_bytes: cells.cell_size(),
        colours: (0..cells.len()).map(|index| colour(&cells.shares(index))).collect(),
        legend: Legend::new(title, cells),
        text,
    };
    squares.write(to)
}

/// A picture of a disk: one square for each cell, and the legend below.
#[derive(Debug)]
pub(super) struct Squares<'a> {
    pub title: &'a str,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Size of a cell in bytes.
    pub cell_bytes: u64,
    /// Red, green and blue of each cell, the first at the top left.
    pub colours: Vec<[u8; 3]>,
    pub legend: Legend,
    /// The legend for programs, in ASCII.
    pub text: String,
}

impl Squares<'_> {
    /// Writes the picture: the cells, then the legend. Places past the end of the disk in the last
    /// row, and beside the narrower of the two parts, are transparent.
    ///
    /// # Errors
    /// Those of `to`.
    pub(super) fn write(&self, to: &mut dyn Write) -> Result<()> {
        let legend = &self.legend;
        let (columns, rows) = shape(self.colours.len());
        let (width, height) =
            (legend.width().max(columns * CELL_PIXELS), rows * CELL_PIXELS + legend.height());
        let mut pixels = Vec::with_capacity(width * height * 4);
        for row in 0..rows {
            let mut line = Vec::with_capacity(width * 4);
            for column in 0..columns {
                let pixel = match self.colours.get(row * columns + column) {
                    Some([red, green, blue]) => [*red, *green, *blue, 0xFF],
                    None => [0; 4],
                };
                line.extend(std::iter::repeat_n(pixel, CELL_PIXELS).flatten());
            }
            line.resize(width * 4, 0);
            for _ in 0..CELL_PIXELS {
                pixels.extend_from_slice(&line);
            }
        }
        for line in legend.lines() {
            pixels.extend_from_slice(line);
            pixels.extend(std::iter::repeat_n(0, width * 4 - line.len()));
        }
        self.encode(to, columns, (width, height), &pixels).map_err(|error| match error {
            png::EncodingError::IoError(error) => Error::io("writing the picture", error),
            other => Error::wrap(ErrorKind::Io, "making the picture", other),
        })
    }

    fn encode(
        &self,
        to: &mut dyn Write,
        columns: usize,
        (width, height): (usize, usize),
        pixels: &[u8],
    ) -> Result<(), png::EncodingError> {
        let side = |pixels: usize| u32::try_from(pixels).unwrap_or(u32::MAX);
        let mut encoder = png::Encoder::new(to, side(width), side(height));
        encoder.set_color(png::ColorType::Rgba);
        encoder.set_depth(png::BitDepth::Eight);
        // Names of files are UTF-8, which tEXt cannot hold; the other texts are ASCII.
        encoder.add_itxt_chunk("Title".into(), self.title.into())?;
        encoder.add_text_chunk("Legend".into(), self.text.clone())?;
        let facts = [
            ("Software", concat!("cordisk ", env!("CARGO_PKG_VERSION")).to_owned()),
            ("Disk-Bytes", self.disk_bytes.to_string()),
            ("Cell-Bytes", self.cell_bytes.to_string()),
            ("Cells", self.colours.len().to_string()),
            ("Columns", columns.to_string()),
            ("Cell-Pixels", CELL_PIXELS.to_string()),
        ];
        for (keyword, text) in facts {
            encoder.add_text_chunk(keyword.into(), text)?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(pixels)?;
        writer.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(info: &png::Info<'_>, keyword: &str) -> String {
        let found = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword);
        found.unwrap_or_else(|| panic!("no {keyword}")).text.clone()
    }

    #[test]
    fn every_cell_of_the_picture_has_the_colours_of_its_bytes() {
        for count in [1, 2, 5, 511, 512, 513, 4097, 65536] {
            let kinds = |index: u64| match index % 7 {
                0 => (1000, 0),
                1 => (0, 1000),
                2 => (0, 0),
                3 => (500, 0),
                4 => (250, 250),
                5 => (0, 300),
                _ => (999, 1),
            };
            let (local, zero): (Vec<u64>, Vec<u64>) = (0..count).map(kinds).unzip();
            let cells = Cells::new(count * 1000, 1000, local, zero).unwrap();
            let mut file = Vec::new();
            write_png(&mut file, "disk \u{e9}\u{4e00}", &cells).unwrap();

            let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            let info = reader.info();
            let columns: usize = text_of(info, "Columns").parse().unwrap();
            let width = info.width as usize;
            let rows = (count as usize).div_ceil(columns);
            assert!(width >= columns * CELL_PIXELS && text_of(info, "Cells") == count.to_string());
            assert!(
                columns <= COLUMNS && info.height as usize > rows * CELL_PIXELS,
                "the legend has a place of its own"
            );
            assert_eq!(info.utf8_text[0].get_text().unwrap(), "disk \u{e9}\u{4e00}");
            let (map, legend) = pixels.as_chunks::<4>().0.split_at(width * rows * CELL_PIXELS);
            for wanted in [LOCAL, ZERO, REMOTE] {
                assert!(
                    legend.iter().any(|pixel| pixel[..3] == wanted && pixel[3] == 0xFF),
                    "{wanted:?} is not explained"
                );
            }
            for (at, pixel) in map.iter().enumerate() {
                let index = at / width / CELL_PIXELS * columns + at % width / CELL_PIXELS;
                if at % width >= columns * CELL_PIXELS {
                    assert_eq!(pixel[3], 0, "beside the map");
                    continue;
                }
                if index >= cells.len() {
                    assert_eq!(pixel[3], 0, "past the end at cell {index} of {count}");
                    continue;
                }
                let want = match kinds(index as u64) {
                    (1000, 0) => LOCAL,
                    (0, 1000) => ZERO,
                    (0, 0) => REMOTE,
                    (500, 0) => [0x73, 0x89, 0x59],
                    (250, 250) => [0xAA, 0xA3, 0x64],
                    (0, 300) => [0xE3, 0xB2, 0x42],
                    _ => [0x00, 0x72, 0xB2],
                };
                assert_eq!(pixel[..], [&want[..], &[0xFF]].concat(), "cell {index} of {count}");
            }
        }
    }

    #[test]
    fn the_legend_has_the_bytes() {
        let cells =
            Cells::new(4 << 20, 1 << 20, vec![1 << 20, 0, 0, 0], vec![0, 1 << 20, 0, 0]).unwrap();
        let mut file = Vec::new();
        write_png(&mut file, "disk", &cells).unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let legend = text_of(reader.info(), "Legend");
        assert_eq!(
            legend,
            "local #0072B2 1048576 bytes (1 MiB, 25.0 %)\nzero #DDDDDD 1048576 bytes (1 MiB, 25.0 %)\nremote #E69F00 2097152 bytes (2 MiB, 50.0 %)"
        );
    }

    #[test]
    fn a_disk_without_bytes_has_a_picture_too() {
        let mut file = Vec::new();
        write_png(&mut file, "disk", &Cells::default()).unwrap();
        assert!(png::Decoder::new(std::io::Cursor::new(file)).read_info().is_ok());
    }
}
