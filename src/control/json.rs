//! Values to text, byte for byte as QEMU's `qobject/json-writer.c` prints them: ASCII, one line,
//! members in the order of QEMU's hash table.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Map, Number, Value};

use super::unicode;

/// Converts a struct of this crate to a value. This fails only for keys that are not strings, which
/// no such struct has.
pub(super) fn value(facts: &impl Serialize) -> Value {
    serde_json::to_value(facts).unwrap_or_default()
}

/// Returns `value` as text, without a line end.
pub(super) fn to_text(value: &Value) -> String {
    let mut text = String::new();
    write_value(&mut text, value);
    text
}

/// Returns the members of an object in the order in which QEMU visits them.
///
/// The protocol gives this order no meaning. QEMU's order is kept because it decides which of
/// several errors is reported, and because replies can then be compared byte for byte.
pub(super) fn in_order(members: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut ordered: Vec<_> = members.iter().collect();
    ordered.sort_by_key(|(key, _)| bucket(key));
    ordered
}

/// Bucket of `key` in a QDict: `tdb_hash` modulo its 512 buckets.
fn bucket(key: &str) -> u32 {
    const BUCKETS: u32 = 512;
    let start = 0x238f_13af_u32.wrapping_mul(key.len() as u32);
    let hash = key
        .bytes()
        .zip(0u32..)
        .fold(start, |hash, (byte, i)| hash.wrapping_add(u32::from(byte) << (i * 5 % 24)));
    hash.wrapping_mul(1_103_515_243).wrapping_add(12345) % BUCKETS
}

fn write_value(text: &mut String, value: &Value) {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(value) => text.push_str(if *value { "true" } else { "false" }),
        Value::Number(number) => write_number(text, number),
        Value::String(string) => write_string(text, string),
        Value::Array(elements) => {
            text.push('[');
            for (i, element) in elements.iter().enumerate() {
                text.push_str(if i == 0 { "" } else { ", " });
                write_value(text, element);
            }
            text.push(']');
        }
        Value::Object(members) => {
            text.push('{');
            for (i, (key, value)) in in_order(members).into_iter().enumerate() {
                text.push_str(if i == 0 { "" } else { ", " });
                write_string(text, key);
                text.push_str(": ");
                write_value(text, value);
            }
            text.push('}');
        }
    }
}

/// Escapes all characters except printable ASCII, with upper-case digits.
fn write_string(text: &mut String, string: &str) {
    text.push('"');
    for c in string.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(c),
            _ => {
                let c = unicode::character(c.into()).unwrap_or(char::REPLACEMENT_CHARACTER);
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
}

fn write_number(text: &mut String, number: &Number) {
    match number.as_f64() {
        Some(value) if number.is_f64() => write_double(text, value),
        _ => {
            let _ = write!(text, "{number}");
        }
    }
}

/// Formats as printf's `%.17g`: 17 significant digits, plain or with an exponent, without trailing
/// zeros of the fraction.
fn write_double(text: &mut String, value: f64) {
    const DIGITS: i32 = 17;
    let scientific = format!("{value:.*e}", DIGITS as usize - 1);
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..DIGITS).contains(&exponent) {
        let decimals = usize::try_from(DIGITS - 1 - exponent).unwrap_or_default();
        text.push_str(without_zeros(&format!("{value:.decimals$}")));
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(text, "{}e{sign}{:02}", without_zeros(mantissa), exponent.abs());
    }
}

fn without_zeros(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Protects: the order of members, copied from a session with qemu-storage-daemon.
    #[test]
    fn members_stand_in_the_order_of_qemu() {
        let greeting = json!({"QMP": {"capabilities": ["oob"], "version": {"package": "p", "qemu": {"major": 10, "minor": 0, "micro": 2}}}});
        assert_eq!(
            to_text(&greeting),
            r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "p"}, "capabilities": ["oob"]}}"#
        );
        let event = json!({"event": "E", "data": {"id": "j", "status": "created"}, "timestamp": {"microseconds": 2, "seconds": 1}});
        assert_eq!(
            to_text(&event),
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "E", "data": {"status": "created", "id": "j"}}"#
        );
        assert_eq!(
            to_text(&json!({"error": {"desc": "d", "class": "c"}, "id": 1})),
            r#"{"id": 1, "error": {"class": "c", "desc": "d"}}"#
        );
        assert_eq!(to_text(&json!({"id": 1, "return": {}})), r#"{"return": {}, "id": 1}"#);
    }

    #[test]
    fn numbers_are_printed_as_printf_does() {
        for (value, expected) in [
            (json!(1e3), "1000"),
            (json!(0.1), "0.10000000000000001"),
            (json!(-0.0), "-0"),
            (json!(1.5), "1.5"),
            (json!(12345678901234567890123.0), "1.2345678901234568e+22"),
            (json!(1e-7), "9.9999999999999995e-08"),
            (json!(0.0001), "0.0001"),
            (json!(1e16), "10000000000000000"),
            (json!(1e17), "1e+17"),
            (json!(u64::MAX), "18446744073709551615"),
            (json!(i64::MIN), "-9223372036854775808"),
        ] {
            assert_eq!(to_text(&value), expected);
        }
    }

    #[test]
    fn strings_are_ascii() {
        assert_eq!(
            to_text(&json!("\0\u{7f}é😀/'\"\\\n")),
            r#""\u0000\u007F\u00E9\uD83D\uDE00/'\"\\\n""#
        );
    }
}
