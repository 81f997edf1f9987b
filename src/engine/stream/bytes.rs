//! Sizes and rates as users write them. Pure: text → bytes.
//!
//! The accepted forms are those of `qemu-img` (`65536`, `64K`, `1.5G`, `0x10000`) and those that
//! this program prints (`1.5 GiB`, `20 MiB/s`). Units are powers of 1024, with or without `iB`.
//! `MB` is refused, because other tools mean 1000 × 1000 bytes by it.

/// Units, with the power of two that each one stands for.
const UNITS: [(u8, u32); 6] =
    [(b'K', 10), (b'M', 20), (b'G', 30), (b'T', 40), (b'P', 50), (b'E', 60)];

/// Most digits after the decimal point; further digits are ignored. This many digits resolve less
/// than a byte even in the largest unit, and keep the arithmetic below exact (10^19 < 2^64).
const MOST_DECIMALS: usize = 19;

/// Parses a number of bytes.
///
/// # Errors
/// A message that names the expected form.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    number_with_unit(text, "expected a number of bytes, such as 65536, 64K, 1.5G or 20MiB")
}

/// Parses a number of bytes per second, with or without `/s` at its end.
///
/// # Errors
/// A message that names the expected form.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let trimmed = text.strip_suffix("/s").unwrap_or(text);
    number_with_unit(trimmed, "expected bytes per second, such as 500K, 20M or 1.5GiB/s")
}

fn number_with_unit(text: &str, expected: &str) -> Result<u64, String> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // As in qemu-img, a hexadecimal number has neither a decimal point nor a unit: B and E are
        // digits.
        let is_hex = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        return if is_hex {
            in_range(u128::from_str_radix(digits, 16).ok())
        } else {
            Err(expected.to_owned())
        };
    }
    let end =
        text.bytes().position(|byte| !byte.is_ascii_digit() && byte != b'.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.strip_prefix(' ').unwrap_or(unit).as_bytes();
    let shift = match unit {
        [] => 0,
        [b'B' | b'b'] => 0,
        [letter, rest @ ..] => {
            let letter = letter.to_ascii_uppercase();
            let shift = UNITS.iter().find(|(known, _)| *known == letter).map(|(_, shift)| *shift);
            let shift = shift.ok_or(expected)?;
            match rest {
                [] | [b'i', b'B'] => shift,
                [b'B' | b'b'] => {
                    let letter = char::from(letter);
                    let both = format!(
                        "\"{letter}B\" can mean powers of 1000: write {letter} or {letter}iB"
                    );
                    return Err(format!("{both}, which are powers of 1024"));
                }
                _ => return Err(expected.to_owned()),
            }
        }
    };
    let (whole, decimals) = match number.split_once('.') {
        // A fraction of a byte is not a size.
        Some(_) if shift == 0 => return Err(expected.to_owned()),
        Some((_, decimals)) if decimals.is_empty() || decimals.contains('.') => {
            return Err(expected.to_owned());
        }
        Some((whole, decimals)) => (whole, &decimals[..decimals.len().min(MOST_DECIMALS)]),
        None => (number, ""),
    };
    if whole.is_empty() {
        return Err(expected.to_owned());
    }
    let Ok(whole) = whole.parse::<u64>() else { return in_range(None) };
    // There are at most 19 digits, so both numbers fit 64 bits, and their product with 2^60 fits
    // 128.
    let fraction = decimals.parse::<u64>().unwrap_or_default();
    let scale = 10_u128.pow(u32::try_from(decimals.len()).unwrap_or_default());
    let part = ((u128::from(fraction) << shift) + scale / 2) / scale;
    in_range((u128::from(whole) << shift).checked_add(part))
}

/// Refuses a number that does not fit a signed 64-bit integer: every interface for sizes and QMP
/// speeds uses that type.
fn in_range(bytes: Option<u128>) -> Result<u64, String> {
    let bytes = bytes
        .and_then(|bytes| i64::try_from(bytes).ok())
        .and_then(|bytes| u64::try_from(bytes).ok());
    bytes.ok_or_else(|| "number too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_qemu_img_and_those_that_are_printed() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("64K", 65536),
            ("64k", 65536),
            ("3M", 3 << 20),
            ("10G", 10 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("7E", 7 << 60),
            ("1.5G", 3 << 29),
            ("1.50000000000000000000000001K", 1536),
            ("0.977 KiB", 1000),
            ("20MiB", 20 << 20),
            ("1.5 GiB", 3 << 29),
            ("512 B", 512),
            ("0x10000", 65536),
            ("8388607T", 8_388_607 << 40),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for wrong in [
            "",
            "K",
            "-1",
            "+1",
            "1.5",
            "1.5B",
            "1.",
            ".5G",
            "1.2.3G",
            "1  K",
            "0x",
            "0x1G",
            "0x1.8",
            "٣",
            "1é",
            "1Ki",
            "1KiBs",
            "1M/s",
            "1e3",
            "8388608T",
            "8E",
            "99999999999999999999",
            "0xffffffffffffffff",
            "0xffffffffffffffffffffffffffffffffff",
        ] {
            assert!(parse_bytes(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_rate_may_say_that_it_is_one() {
        for (text, bytes) in
            [("20M/s", 20 << 20), ("1.5 GiB/s", 3 << 29), ("100", 100), ("0", 0), ("5 B/s", 5)]
        {
            assert_eq!(parse_rate(text), Ok(bytes), "{text}");
        }
        for wrong in ["/s", "20M/m", "20M/s/s", "20Mbit/s"] {
            assert!(parse_rate(wrong).unwrap_err().contains("bytes per second"), "{wrong}");
        }
    }

    #[test]
    fn an_ambiguous_unit_is_named() {
        for ambiguous in ["20MB", "20mb", "20 MB"] {
            let why = parse_bytes(ambiguous).unwrap_err();
            assert!(why.contains("write M or MiB"), "{why}");
        }
    }
}
