//! Values of single arguments, and their parsers.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::{OsStringValueParser, TypedValueParser};

use engine::job::OnError;
use engine::stream::{Minute, Speed};
use host::error::Context;
use host::{Error, ErrorKind, Result};
use qcow2::format::BackingFormat;

/// Most bytes of a device id. QMP job ids are bounded to the same length.
const DEVICE_ID_MAX: usize = 128;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum FormatArg {
    Raw,
    Qcow2,
}

impl From<FormatArg> for BackingFormat {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => BackingFormat::Raw,
            FormatArg::Qcow2 => BackingFormat::Qcow2,
        }
    }
}

/// How a command prints: the same two options everywhere, ours and qemu-img's.
#[derive(Debug, clap::Args)]
pub(super) struct OutputArgs {
    /// Print JSON, for programs
    #[arg(long, conflicts_with = "output")]
    json: bool,
    /// As qemu-img has it: `json` is --json
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    output: OutputArg,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum OutputArg {
    Human,
    Json,
}

impl OutputArgs {
    pub(super) fn is_json(&self) -> bool {
        self.json || self.output == OutputArg::Json
    }
}

/// What an error does to a stream: QMP's words (`BlockdevOnError`).
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(super) enum OnErrorArg {
    /// The stream fails
    Report,
    /// The stream goes on without what it could not copy, and fails at the end
    Ignore,
    /// No space left pauses the stream, any other error fails it
    Enospc,
    /// The stream is paused; `cordisk job resume` tries again
    Stop,
}

impl OnErrorArg {
    /// Returns the word of QMP.
    pub(super) fn word(self) -> &'static str {
        match self {
            OnErrorArg::Report => "report",
            OnErrorArg::Ignore => "ignore",
            OnErrorArg::Enospc => "enospc",
            OnErrorArg::Stop => "stop",
        }
    }
}

impl From<OnErrorArg> for OnError {
    fn from(action: OnErrorArg) -> Self {
        match action {
            OnErrorArg::Report => OnError::Report,
            OnErrorArg::Ignore => OnError::Ignore,
            OnErrorArg::Enospc => OnError::Enospc,
            OnErrorArg::Stop => OnError::Stop,
        }
    }
}

/// Makes `path` absolute, relative to the present current directory; symbolic links are not
/// resolved.
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Error::new(ErrorKind::InvalidArgument, "an empty file name names no file"));
    }
    std::path::absolute(path).context(|| format!("{}: the current directory", path.display()))
}

/// Parses a number of bytes, in the syntax of qemu-img and of this program's output.
pub(super) fn parse_size(text: &str) -> std::result::Result<u64, String> {
    engine::stream::parse_bytes(text)
}

/// Parses bytes per second, such as `20M` or `1.5 GiB/s`, or a schedule: `08:00=20M,20:00=0`.
pub fn parse_speed(text: &str) -> std::result::Result<Speed, String> {
    text.parse()
}

/// Parses a time of day, HH:MM.
pub fn parse_minute(text: &str) -> std::result::Result<Minute, String> {
    text.parse()
}

/// Parses permission bits in octal, with or without leading zeros.
pub(super) fn parse_mode(text: &str) -> std::result::Result<u16, String> {
    let is_octal = !text.is_empty() && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    let mode = if is_octal { u16::from_str_radix(text, 8).ok() } else { None };
    mode.filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "expected permissions in octal from 0000 to 0777, such as 0660".to_owned())
}

/// Parses a command for the shell, which must not be empty.
pub(super) fn parse_shell_command() -> impl TypedValueParser<Value = OsString> {
    let something = |text: OsString| {
        if text.is_empty() { Err("expected a command for /bin/sh") } else { Ok(text) }
    };
    OsStringValueParser::new().try_map(something)
}

/// Parses a cluster size in bytes that qcow2 permits and QEMU opens.
pub(super) fn parse_cluster_size(text: &str) -> std::result::Result<u64, String> {
    let size = parse_size(text)?;
    if size.is_power_of_two() && (512..=2 << 20).contains(&size) {
        Ok(size)
    } else {
        Err("expected a power of two from 512 to 2M".to_string())
    }
}

/// Parses a QMP id: a letter, then letters, digits, `-`, `.`, `_` (QEMU's `id_wellformed()`).
pub(super) fn parse_device(text: &str) -> std::result::Result<String, String> {
    let wellformed = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
        && text.len() <= DEVICE_ID_MAX;
    if wellformed {
        Ok(text.to_string())
    } else {
        Err(format!(
            "expected a letter, then letters, digits, '-', '.' or '_', at most {DEVICE_ID_MAX} in all"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a size that was printed is parsed as the number that it shows.
    #[test]
    fn what_is_printed_is_understood() {
        use crate::map::units;
        for bytes in [0, 1, 999, 1000, 1536, 397_312, 10 << 30, 3 << 39, 1 << 60] {
            let printed = units::size(bytes);
            assert_eq!(units::size(parse_size(&printed).unwrap()), printed);
            let Ok(Speed::Fixed(rate)) = parse_speed(&units::rate(bytes)) else {
                panic!("{printed}/s")
            };
            assert_eq!(units::size(rate), printed);
        }
    }

    #[test]
    fn cluster_sizes_are_those_of_qcow2() {
        assert_eq!(parse_cluster_size("512"), Ok(512));
        assert_eq!(parse_cluster_size("2M"), Ok(2 << 20));
        assert_eq!(parse_cluster_size("64 KiB"), Ok(65536));
        assert_eq!(parse_cluster_size("0.5M"), Ok(512 << 10));
        for wrong in ["0", "256", "1000", "4M"] {
            assert!(parse_cluster_size(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn device_ids_are_those_of_qmp() {
        assert!(parse_device("drive0").is_ok());
        assert!(parse_device("a-b.c_9").is_ok());
        for wrong in ["", "0a", "-a", "a b", "a,b", "é", &"a".repeat(129)] {
            assert!(parse_device(wrong).is_err(), "{wrong:?}");
        }
    }
}
