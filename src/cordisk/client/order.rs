//! `cordisk order`: the files of orders, which say what guests touch first ([`order`]).

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::map::{canvas, print, write_file};
use super::order_from_files::FromFilesOptions;
use super::order_save::{OrderSaveOptions, save};
use super::{boot_search, order_from_files};
use crate::map::{order_picture, records, units, write_order_png};
use host::error::Context;
use host::{Error, ErrorKind, Result};
use order::{LONGEST_FILE, Order};

/// Lines that stand below the picture of an order, more than below that of a map.
const BELOW: u16 = 9;

/// `cordisk order`.
#[derive(Clone, Debug)]
pub enum OrderOptions {
    /// Save the order of a mounted disk.
    Save(OrderSaveOptions),
    /// Merge orders of one disk.
    Merge {
        /// Their files.
        files: Vec<PathBuf>,
        /// The file to write; `None` is standard output.
        output: Option<PathBuf>,
    },
    /// Show an order.
    Show {
        /// Its file.
        file: PathBuf,
        /// Print JSON.
        json: bool,
        /// Write a PNG instead of a picture; `-` is standard output.
        png: Option<PathBuf>,
    },
    /// Make one from the files on a disk.
    FromFiles(Box<FromFilesOptions>),
    /// The child of that command, see [`boot_search`].
    Search,
}

/// Runs `cordisk order`.
///
/// # Errors
/// A file cannot be read or written, is no order, or belongs to another disk than the others;
/// standard output is a terminal, and the output is binary.
pub fn run(options: &OrderOptions) -> Result<ExitCode> {
    match options {
        OrderOptions::Save(options) => save(options),
        OrderOptions::Merge { files, output } => merge(files, output.as_deref()),
        OrderOptions::Show { file, json, png } => show(file, *json, png.as_deref()),
        OrderOptions::FromFiles(options) => order_from_files::run(options),
        OrderOptions::Search => boot_search::run_child(),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Reads the file of an order.
///
/// # Errors
/// Those of reading it; it is no order, or that of a later version.
pub fn read_order(path: &Path) -> Result<Order> {
    let name = || path.display().to_string();
    let mut bytes = Vec::new();
    let file = File::open(path).context(name)?;
    file.take(LONGEST_FILE + 1).read_to_end(&mut bytes).context(name)?;
    Order::decode(&bytes).map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::InvalidArgument => "name a file that cordisk order has written",
            ErrorKind::UnsupportedFeature => "use that version",
            _ => "copy it again if it is a copy, or leave it out",
        };
        Error::new(error.kind(), format!("{}: {error}: {advice}", path.display()))
    })
}

/// Writes the file of an order: to `output`, as a whole or not at all, with a line on standard
/// output; or to standard output.
///
/// # Errors
/// Those of writing; standard output is a terminal.
pub fn write_order(order: &Order, output: Option<&Path>) -> Result<()> {
    let Some(path) = output else {
        refuse_terminal("an order")?;
        return print(io::stdout().lock(), &order.encode());
    };
    write_file(path, &order.encode()).context(|| path.display().to_string())?;
    let bytes = units::size(order.bytes());
    let ranges = units::number(order.ranges().len() as u64);
    let records = records(order);
    let text = format!("{}: {bytes} in {ranges} ranges, {records}\n", path.display());
    print(io::stdout().lock(), text.as_bytes())
}

/// Refuses to write `what` to a terminal.
///
/// # Errors
/// Standard output is a terminal.
pub fn refuse_terminal(what: &str) -> Result<()> {
    if !io::stdout().is_terminal() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidArgument,
        format!(
            "{what} is binary, and nothing for a terminal: redirect standard output with > FILE"
        ),
    ))
}

fn merge(files: &[PathBuf], output: Option<&Path>) -> Result<()> {
    if output.is_none() {
        refuse_terminal("an order")?;
    }
    let mut orders: Vec<Order> = Vec::new();
    for path in files {
        let order = read_order(path)?;
        let other = orders.iter().zip(files).find_map(|(other, name)| {
            order.check_base(other.base()).err().map(|error| (name, error))
        });
        if let Some((other, error)) = other {
            let (name, other) = (path.display(), other.display());
            return Err(Error::new(
                error.kind(),
                format!("{name}: {error} as that of {other}: merge orders of one disk only"),
            ));
        }
        orders.push(order);
    }
    write_order(&Order::merge(&orders)?, output)
}

fn show(path: &Path, json: bool, png: Option<&Path>) -> Result<()> {
    let to_stdout = png == Some(Path::new("-"));
    if to_stdout {
        refuse_terminal("a PNG")?;
    }
    let order = read_order(path)?;
    let title = path.display().to_string();
    let Some(png) = png else {
        if json {
            return list(&order, BufWriter::new(io::stdout().lock()))
                .map_err(Error::standard_output);
        }
        return print(
            io::stdout().lock(),
            order_picture(&title, &order, &canvas(BELOW)).as_bytes(),
        );
    };
    let mut bytes = Vec::new();
    write_order_png(&mut bytes, &title, &order)?;
    if to_stdout {
        return print(io::stdout().lock(), &bytes);
    }
    write_file(png, &bytes).context(|| png.display().to_string())
}

/// Prints an order as JSON, with one line for each range.
fn list(order: &Order, mut out: impl Write) -> io::Result<()> {
    let base = order.base();
    writeln!(out, "{{")?;
    writeln!(out, "  \"size\": {},", base.size)?;
    writeln!(out, "  \"head\": \"{}\",", base.head_text())?;
    writeln!(out, "  \"pin\": {},", json!(base.pin))?;
    writeln!(out, "  \"records\": {},", order.records())?;
    writeln!(out, "  \"bytes\": {},", order.bytes())?;
    write!(out, "  \"ranges\": [")?;
    let mut separator = "\n";
    for range in order.ranges() {
        write!(
            out,
            "{separator}    {{ \"offset\": {}, \"length\": {}, \"milliseconds\": {}, \"votes\": {} }}",
            range.offset, range.len, range.at_ms, range.votes
        )?;
        separator = ",\n";
    }
    let end = if order.ranges().is_empty() { "]\n}\n" } else { "\n  ]\n}\n" };
    out.write_all(end.as_bytes())?;
    out.flush()
}
