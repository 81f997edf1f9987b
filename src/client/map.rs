//! `cordisk map`: what of a disk is where, as a picture, as a PNG, or as the list that `qemu-img map` prints.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Deserialize;
use serde_json::json;

use super::connection::Connection;
use super::{Target, explain_busy, facts, find, show};
use crate::error::{Context, one_line};
use crate::format::BackingFormat;
use crate::map::{Canvas, Cells, Extent, OfflineMap, Page, join, picture, units, write_png};
use crate::{Error, ErrorKind, Result};

/// Extents that are asked for at once.
const PAGE: usize = 1024;

/// `cordisk map`.
#[derive(Clone, Debug)]
pub struct MapOptions {
    /// A disk that runs (its mountpoint or socket), or an image.
    pub target: PathBuf,
    /// Format of an image's first backing file, where the image does not say.
    pub backing_format: Option<BackingFormat>,
    /// The list instead of a picture.
    pub json: bool,
    /// A PNG instead of a picture; `-` is standard output.
    pub png: Option<PathBuf>,
}

/// Who knows what is where.
enum Source {
    Running(Connection),
    Image(Box<OfflineMap>),
}

impl Source {
    fn open(options: &MapOptions) -> Result<Source> {
        let target = &options.target;
        match find::find(target) {
            Ok(Target::Running(_) | Target::Dead(_) | Target::Unregistered(_)) => {
                find::connect(target).map(|(connection, _)| Source::Running(connection))
            }
            Err(_) => OfflineMap::open(target, options.backing_format)
                .map(|map| Source::Image(Box::new(map)))
                .map_err(|error| explain_busy(error, target, "ask for that", "map")),
        }
    }

    fn cells(&mut self, cells: u64) -> Result<Cells> {
        match self {
            Source::Running(connection) => facts::cells(connection, cells),
            Source::Image(map) => map.cells(cells),
        }
    }

    fn page(&mut self, from: u64) -> Result<Page> {
        #[derive(Deserialize)]
        struct Answer {
            extents: Vec<Extent>,
            next: Option<u64>,
        }
        match self {
            Source::Image(map) => map.page(from, PAGE),
            Source::Running(connection) => {
                let answer = connection.execute("x-query-map", json!({ "offset": from, "limit": PAGE }))?;
                let Answer { extents, next } = facts::read(answer, connection.name())?;
                // Otherwise there would be no end, or none that can be counted.
                if follow(&extents, from).is_none_or(|end| next.is_some_and(|next| next != end || next == from)) {
                    return Err(Error::new(ErrorKind::InvalidArgument, facts::of_another_version(connection.name())));
                }
                Ok(Page { extents, next })
            }
        }
    }
}

/// Where the extents end if they follow each other without a gap from `from` on, and have numbers that files can have.
fn follow(extents: &[Extent], from: u64) -> Option<u64> {
    extents.iter().try_fold(from, |at, extent| {
        let fits =
            extent.start == at && extent.length > 0 && extent.offset.is_none_or(|offset| offset.checked_add(extent.length).is_some());
        extent.start.checked_add(extent.length).filter(|&end| fits && i64::try_from(end).is_ok())
    })
}

/// Shows the map.
///
/// # Errors
/// There is no such disk or image, or it cannot be read; the output fails.
pub fn run(options: &MapOptions) -> Result<ExitCode> {
    let to_stdout = options.png.as_deref() == Some(Path::new("-"));
    if to_stdout && io::stdout().is_terminal() {
        return Err(Error::new(ErrorKind::InvalidArgument, "a PNG is nothing for a terminal: name a file, or redirect standard output"));
    }
    let mut source = Source::open(options)?;
    let title = options.target.display().to_string();
    let out = BufWriter::new(io::stdout().lock());
    if options.json {
        return no_reader(list(&mut source, out));
    }
    let Some(png) = &options.png else {
        let canvas = canvas();
        let cells = source.cells(canvas.cells())?;
        let title = format!("{}, {}", one_line(&title), units::size(cells.size()));
        let text = picture(&title, &cells, &canvas);
        return no_reader(print(out, text.as_bytes()));
    };
    let cells = source.cells(Cells::MOST)?;
    let mut bytes = Vec::new();
    write_png(&mut bytes, &title, &cells)?;
    if to_stdout {
        return no_reader(print(out, &bytes));
    }
    write_file(png, &bytes).context(|| png.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// What standard output can show.
fn canvas() -> Canvas {
    let stdout = io::stdout();
    let size = rustix::termios::tcgetwinsize(&stdout).ok().filter(|size| size.ws_col > 0);
    match size {
        Some(size) if stdout.is_terminal() && !show::is_dumb() => {
            Canvas { blocks: show::is_unicode(), ..Canvas::terminal(size.ws_col.into(), size.ws_row.into(), show::wanted()) }
        }
        _ => Canvas::plain(),
    }
}

fn print(mut out: impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).and_then(|()| out.flush()).context(|| "standard output")
}

/// `head` and its like have seen enough: nothing that has to be said.
fn no_reader(printed: Result<()>) -> Result<ExitCode> {
    match printed {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.errno() == Some(rustix::io::Errno::PIPE.raw_os_error()) => Ok(ExitCode::FAILURE),
        Err(error) => Err(error),
    }
}

/// The list, page by page, in the layout of `qemu-img map --output=json`.
fn list(source: &mut Source, mut out: impl Write) -> Result<()> {
    let mut write = |text: String| out.write_all(text.as_bytes()).context(|| "standard output");
    // At most two: the one that may go on, and the one that shows that it does not.
    let mut pending: Vec<Extent> = Vec::new();
    let mut separator = "[";
    let mut from = Some(0);
    while let Some(at) = from {
        let page = source.page(at)?;
        for extent in page.extents {
            join(&mut pending, extent);
            if pending.len() > 1 {
                write(entry(separator, &pending.remove(0)))?;
                separator = ",\n";
            }
        }
        from = page.next;
    }
    for extent in &pending {
        write(entry(separator, extent))?;
    }
    write(if pending.is_empty() { "[]\n".into() } else { "]\n".into() })?;
    out.flush().context(|| "standard output")
}

/// One line of the list as QEMU prints it (`dump_map_entry` in qemu-img.c).
fn entry(separator: &str, extent: &Extent) -> String {
    let Extent { start, length, depth, present, zero, data, compressed, offset } = extent;
    let offset = offset.map_or(String::new(), |offset| format!(", \"offset\": {offset}"));
    format!(
        "{separator}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}"
    )
}

/// Writes the file whole or not at all: under another name first. What is no regular file (a pipe, /dev/stdout) is written to as it is.
fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if path.metadata().is_ok_and(|there| !there.is_file()) {
        return File::options().write(true).open(path)?.write_all(bytes);
    }
    // Through a symbolic link to what it names, as without the other name.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let mut file = File::create_new(&part)?;
    let written = file.write_all(bytes).and_then(|()| std::fs::rename(&part, &path));
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_that_of_qemu_img() {
        let extent = Extent {
            start: 524_288,
            length: 131_072,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: Some(327_680),
        };
        let want = "[{ \"start\": 524288, \"length\": 131072, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \
                    \"compressed\": false, \"offset\": 327680}";
        assert_eq!(entry("[", &extent), want);
        assert!(entry(",\n", &Extent { offset: None, ..extent }).ends_with("\"compressed\": false}"));
    }

    #[test]
    fn lists_of_a_daemon_have_no_gap_and_an_end() {
        let extent =
            |start, length| Extent { start, length, depth: 0, present: true, zero: false, data: true, compressed: false, offset: Some(9) };
        assert_eq!(follow(&[extent(5, 3), extent(8, 1)], 5), Some(9));
        assert_eq!(follow(&[], 5), Some(5));
        let end = i64::MAX as u64;
        for wrong in
            [vec![extent(6, 3)], vec![extent(5, 0)], vec![extent(5, 3), extent(9, 1)], vec![extent(5, end - 4)], vec![extent(5, u64::MAX)]]
        {
            assert_eq!(follow(&wrong, 5), None, "{wrong:?}");
        }
        assert_eq!(follow(&[Extent { offset: Some(u64::MAX), ..extent(5, 3) }], 5), None);
    }

    #[test]
    fn a_file_is_written_whole_or_not_at_all() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("map.png");
        write_file(&path, b"one").unwrap();
        let link = scratch.path().join("link.png");
        std::os::unix::fs::symlink("map.png", &link).unwrap();
        write_file(&link, b"two").unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert!(write_file(&scratch.path().join("none/map.png"), b"x").is_err());
        assert!(write_file(scratch.path(), b"x").is_err(), "a directory");
        write_file(Path::new("/dev/null"), b"x").unwrap();
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 2, "nothing else is left");
    }
}
