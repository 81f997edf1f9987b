//! `cordisk map`: shows where the data of a disk is, as a picture, as a PNG, or as the list that
//! `qemu-img map` prints.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::{FoundDisk, explain_busy, facts, find, show};
use crate::map::{Canvas, Cells, MapEntry, OfflineMap, Page, join, picture, units, write_png};
use control::connection::Connection;
use host::error::{Context, one_line};
use host::{Error, ErrorKind, Result};
use qcow2::format::BackingFormat;

/// How many extents one query requests.
const PAGE: usize = 1024;

/// The options of `cordisk map`.
#[derive(Clone, Debug)]
pub struct MapOptions {
    /// A running disk (its mountpoint or socket), or an image.
    pub target: PathBuf,
    /// Format of an image's first backing file, if the image does not name it.
    pub backing_format: Option<BackingFormat>,
    /// Print the list instead of a picture.
    pub json: bool,
    /// Write a PNG instead of a picture; `-` is standard output.
    pub png: Option<PathBuf>,
}

/// The source of the map.
enum MapSource {
    Running(Connection),
    Image(Box<OfflineMap>),
}

impl MapSource {
    fn open(options: &MapOptions) -> Result<MapSource> {
        let target = &options.target;
        match find::find(target) {
            Ok(FoundDisk::Running(_) | FoundDisk::Dead(_) | FoundDisk::Unregistered(_)) => {
                find::connect(target).map(|(connection, _)| MapSource::Running(connection))
            }
            Err(_) => OfflineMap::open(target, options.backing_format)
                .map(|map| MapSource::Image(Box::new(map)))
                .map_err(|error| explain_busy(error, target, "ask for that", "map")),
        }
    }

    fn cells(&mut self, cells: u64) -> Result<Cells> {
        match self {
            MapSource::Running(connection) => facts::cells(connection, cells),
            MapSource::Image(map) => map.cells(cells),
        }
    }

    /// The depth and the name of a remote file that was not asked: its extents are data, because
    /// what is in it is not known.
    fn unasked(&self) -> Option<(usize, String)> {
        match self {
            MapSource::Running(_) => None,
            MapSource::Image(map) => map.remote(),
        }
    }

    fn page(&mut self, from: u64) -> Result<Page> {
        match self {
            MapSource::Image(map) => map.page(from, PAGE),
            MapSource::Running(connection) => {
                let answer =
                    connection.execute("x-query-map", json!({ "offset": from, "limit": PAGE }))?;
                let Page { extents, next } = facts::read(answer, connection.name())?;
                // Without this check a faulty daemon could make the loop in [`list`] endless, or
                // its sums overflow.
                if follow(&extents, from)
                    .is_none_or(|end| next.is_some_and(|next| next != end || next == from))
                {
                    return Err(Error::new(
                        ErrorKind::InvalidArgument,
                        facts::of_another_version(connection.name()),
                    ));
                }
                Ok(Page { extents, next })
            }
        }
    }
}

/// Returns the end of the extents if each follows the one before it without a gap, beginning at
/// `from`, and if their numbers are possible for files.
fn follow(extents: &[MapEntry], from: u64) -> Option<u64> {
    extents.iter().try_fold(from, |at, extent| {
        let fits = extent.start == at
            && extent.length > 0
            && extent.offset.is_none_or(|offset| offset.checked_add(extent.length).is_some());
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
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "a PNG is nothing for a terminal: name a file, or redirect standard output",
        ));
    }
    let mut source = MapSource::open(options)?;
    let title = options.target.display().to_string();
    let out = BufWriter::new(io::stdout().lock());
    if options.json {
        return no_reader(list(&mut source, out));
    }
    let Some(png) = &options.png else {
        let canvas = canvas(0);
        let cells = source.cells(canvas.cells())?;
        let mut title = format!("{}, {}", one_line(&title), units::size(cells.size()));
        if let Some((depth, name)) = source.unasked() {
            title.push_str(&format!("\nlayer {depth} is not asked: {}", one_line(&name)));
        }
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

/// Returns the kind of picture that standard output can show, if `more` lines than below a map
/// stand below it.
pub(super) fn canvas(more: u16) -> Canvas {
    let stdout = io::stdout();
    let size = rustix::termios::tcgetwinsize(&stdout).ok().filter(|size| size.ws_col > 0);
    match size {
        Some(size) if stdout.is_terminal() && !show::is_dumb() => Canvas {
            blocks: show::is_unicode(),
            ..Canvas::terminal(
                size.ws_col.into(),
                size.ws_row.saturating_sub(more).into(),
                show::wanted(),
            )
        },
        _ => Canvas::plain(),
    }
}

pub(super) fn print(mut out: impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).and_then(|()| out.flush()).map_err(Error::standard_output)
}

/// If the reader of standard output has closed it (such as `head`), the exit status is 1 and no
/// message is printed.
fn no_reader(printed: Result<()>) -> Result<ExitCode> {
    match printed {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.kind() == ErrorKind::OutputClosed => Ok(ExitCode::FAILURE),
        Err(error) => Err(error),
    }
}

/// Prints the list page by page, in the layout of `qemu-img map --output=json`.
fn list(source: &mut MapSource, mut out: impl Write) -> Result<()> {
    let unasked = source.unasked();
    let mut write = |text: String| out.write_all(text.as_bytes()).map_err(Error::standard_output);
    // At most two extents: one that may continue, and the next, which shows that it does not.
    let mut pending: Vec<MapEntry> = Vec::new();
    let mut separator = "[";
    let mut from = Some(0);
    while let Some(at) = from {
        let page = source.page(at)?;
        for extent in page.extents {
            join(&mut pending, extent);
            if pending.len() > 1 {
                write(entry(separator, &pending.remove(0), unasked.as_ref()))?;
                separator = ",\n";
            }
        }
        from = page.next;
    }
    for extent in &pending {
        write(entry(separator, extent, unasked.as_ref()))?;
    }
    write(if pending.is_empty() { "[]\n".into() } else { "]\n".into() })?;
    out.flush().map_err(Error::standard_output)
}

/// Formats one line of the list as QEMU prints it (`dump_map_entry` in qemu-img.c). An extent of a
/// file that was not asked also has the member `filename` of QEMU's `MapEntry`.
fn entry(separator: &str, extent: &MapEntry, unasked: Option<&(usize, String)>) -> String {
    let MapEntry { start, length, depth, present, zero, data, compressed, offset } = extent;
    let offset = offset.map_or(String::new(), |offset| format!(", \"offset\": {offset}"));
    let filename = unasked
        .filter(|(at, _)| at == depth && *present)
        .map_or(String::new(), |(_, name)| format!(", \"filename\": {}", json!(name)));
    format!(
        "{separator}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}{filename}}}"
    )
}

/// Writes the file completely or not at all: first under another name, which is then renamed. A
/// target that is not a regular file (a pipe, /dev/stdout) is written to directly.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if path.metadata().is_ok_and(|there| !there.is_file()) {
        return File::options().write(true).open(path)?.write_all(bytes);
    }
    // A symbolic link is resolved first, so that the rename replaces its target and not the link.
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
        let extent = MapEntry {
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
        assert_eq!(entry("[", &extent, None), want);
        assert_eq!(entry("[", &extent, Some(&(1, "s3://golden/a".into()))), want);
        let without = MapEntry { offset: None, ..extent };
        assert!(entry(",\n", &without, None).ends_with("\"compressed\": false}"));
        let remote = entry(",\n", &without, Some(&(0, "s3://golden/\"a".into())));
        assert!(remote.ends_with(r#""compressed": false, "filename": "s3://golden/\"a"}"#));
    }

    #[test]
    fn lists_of_a_daemon_have_no_gap_and_an_end() {
        let extent = |start, length| MapEntry {
            start,
            length,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: Some(9),
        };
        assert_eq!(follow(&[extent(5, 3), extent(8, 1)], 5), Some(9));
        assert_eq!(follow(&[], 5), Some(5));
        let end = i64::MAX as u64;
        for wrong in [
            vec![extent(6, 3)],
            vec![extent(5, 0)],
            vec![extent(5, 3), extent(9, 1)],
            vec![extent(5, end - 4)],
            vec![extent(5, u64::MAX)],
        ] {
            assert_eq!(follow(&wrong, 5), None, "{wrong:?}");
        }
        assert_eq!(follow(&[MapEntry { offset: Some(u64::MAX), ..extent(5, 3) }], 5), None);
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
