//! What is typed for one argument, and what it means.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::error::Context;
use crate::format::BackingFormat;
use crate::stream::{Minute, Speed};
use crate::{Error, ErrorKind, Result};

/// Longest device id. QMP job ids are bounded to the same length.
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

/// Relative to the current directory as it is now; symbolic links stay as they are.
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Error::new(ErrorKind::InvalidArgument, "an empty file name names no file"));
    }
    std::path::absolute(path).context(|| format!("{}: the current directory", path.display()))
}

/// Bytes, or bytes per second: a decimal number and at most one of K, M, G, T (powers of 1024, either case).
pub(super) fn parse_size(text: &str) -> std::result::Result<u64, String> {
    crate::stream::parse_bytes(text)
}

/// Bytes per second, with K, M, G or T, or a schedule: `08:00=20M,20:00=0`.
pub fn parse_speed(text: &str) -> std::result::Result<Speed, String> {
    text.parse()
}

/// A time of day, HH:MM.
pub fn parse_minute(text: &str) -> std::result::Result<Minute, String> {
    text.parse()
}

/// A command for the shell.
pub(super) fn parse_shell_command() -> impl TypedValueParser<Value = OsString> {
    let something = |text: OsString| if text.is_empty() { Err("expected a command for /bin/sh") } else { Ok(text) };
    OsStringValueParser::new().try_map(something)
}

/// A cluster size that qcow2 knows and QEMU opens.
pub(super) fn parse_cluster_size(text: &str) -> std::result::Result<u64, String> {
    let size = parse_size(text)?;
    if size.is_power_of_two() && (512..=2 << 20).contains(&size) {
        Ok(size)
    } else {
        Err("expected a power of two from 512 to 2M".to_string())
    }
}

/// A QMP id: a letter, then letters, digits, `-`, `.`, `_` (QEMU's `id_wellformed()`).
pub(super) fn parse_device(text: &str) -> std::result::Result<String, String> {
    let wellformed = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
        && text.len() <= DEVICE_ID_MAX;
    if wellformed {
        Ok(text.to_string())
    } else {
        Err(format!("expected a letter, then letters, digits, '-', '.' or '_', at most {DEVICE_ID_MAX} in all"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("64K"), Ok(65536));
        assert_eq!(parse_size("64k"), Ok(65536));
        assert_eq!(parse_size("3M"), Ok(3 << 20));
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
        for wrong in ["", "K", "-1", "+1", "1.5G", "1KB", "1 K", "0x10", "٣", "1é", "8388608T", "99999999999999999999"] {
            assert!(parse_size(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(parse_size("8388607T"), Ok(8_388_607 << 40));
    }

    #[test]
    fn cluster_sizes_are_those_of_qcow2() {
        assert_eq!(parse_cluster_size("512"), Ok(512));
        assert_eq!(parse_cluster_size("2M"), Ok(2 << 20));
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
