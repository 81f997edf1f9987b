//! Numbers in human-readable form, the same in all output.

use std::time::Duration;

/// Formats bytes with three significant digits and a binary unit, as `qemu-img info` does: `512 B`,
/// `1.5 KiB`, `0.977 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // A larger value would be rounded to four digits.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", significant(value), UNITS[unit])
}

/// Formats bytes per second.
pub fn rate(per_second: u64) -> String {
    format!("{}/s", size(per_second))
}

/// Formats a number with three significant digits and without trailing zeros: `0.977`, `1.5`,
/// `12.3`, `388`.
pub fn significant(value: f64) -> String {
    let decimals = match value {
        _ if value >= 100.0 => 0,
        _ if value >= 10.0 => 1,
        _ if value >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if decimals == 0 { text } else { text.trim_end_matches('0').trim_end_matches('.').to_owned() }
}

/// Formats a number in groups of three digits: `1 234 567`.
pub fn number(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Formats a part of a whole as percentage, rounded down, so that an incomplete part is never 100.
/// The percentage of an empty whole is 100: `45.2 %`, `100 %`.
pub fn percent(part: u64, whole: u64) -> String {
    in_tenths(per_mille(part, whole).into())
}

/// Returns the same percentage without decimals: 0 to 100.
pub fn whole_percent(part: u64, whole: u64) -> u64 {
    per_mille(part, whole) / 10
}

/// Formats parts of their sum as percentages that add up to 100. Each is rounded down, and the
/// remaining tenths go to the parts that lost most by rounding. A part that is not the whole is
/// never 100, and an empty part is always 0.
pub fn percents<const N: usize>(parts: [u64; N]) -> [String; N] {
    let whole: u128 = parts.iter().map(|&part| u128::from(part)).sum();
    if whole == 0 {
        return std::array::from_fn(|_| "0.0 %".to_owned());
    }
    let mut tenths = parts.map(|part| u128::from(part) * 1000 / whole);
    let mut by_loss: Vec<usize> =
        (0..N).filter(|&index| parts[index] > 0 && tenths[index] < 999).collect();
    by_loss.sort_by_key(|&index| std::cmp::Reverse(u128::from(parts[index]) * 1000 % whole));
    let missing = 1000 - tenths.iter().sum::<u128>();
    for index in by_loss.into_iter().cycle().take(usize::try_from(missing).unwrap_or_default()) {
        tenths[index] += 1;
    }
    tenths.map(in_tenths)
}

fn in_tenths(tenths: u128) -> String {
    if tenths == 1000 { "100 %".to_owned() } else { format!("{}.{} %", tenths / 10, tenths % 10) }
}

fn per_mille(part: u64, whole: u64) -> u64 {
    let exact = (u128::from(part.min(whole)) * 1000).checked_div(u128::from(whole));
    exact.and_then(|tenths| u64::try_from(tenths).ok()).unwrap_or(1000)
}

/// Formats nanoseconds with three significant digits: `850 ns`, `12.3 µs`, `1.5 ms`, `2 s`. `micro`
/// is the prefix for a millionth.
pub fn time(nanoseconds: f64, micro: &str) -> String {
    match nanoseconds {
        _ if nanoseconds < 1e3 => format!("{} ns", significant(nanoseconds.max(0.0).round())),
        _ if nanoseconds < 1e6 => format!("{} {micro}s", significant(nanoseconds / 1e3)),
        _ if nanoseconds < 1e9 => format!("{} ms", significant(nanoseconds / 1e6)),
        _ => format!("{} s", significant(nanoseconds / 1e9)),
    }
}

/// Formats whole seconds in the two largest units: `8 s`, `1 min 52 s`, `2 h 5 min`, `3 d`. The
/// smaller unit is left out if it is 0.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (large, name, small, small_name) = match seconds {
        0..60 => return format!("{seconds} s"),
        60..3600 => (seconds / 60, "min", seconds % 60, "s"),
        3600..86400 => (seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => (seconds / 86400, "d", seconds % 86400 / 3600, "h"),
    };
    if small == 0 {
        format!("{large} {name}")
    } else {
        format!("{large} {name} {small} {small_name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: the texts are those of qemu-img 10.0, except where it would print `1e+03`.
    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (397_312, "388 KiB"),
            ((1 << 20) - 1, "1 MiB"),
            ((999 << 20) + (3 << 18), "0.976 GiB"),
            (4 << 20, "4 MiB"),
            (10 << 30, "10 GiB"),
            ((10 << 30) + (300 << 20), "10.3 GiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(rate(50 << 20), "50 MiB/s");
        assert_eq!(
            (number(7), number(1000), number(1_234_567)),
            ("7".into(), "1 000".into(), "1 234 567".into())
        );
    }

    #[test]
    fn times_have_their_unit() {
        for (nanoseconds, text) in [
            (0.0, "0 ns"),
            (850.0, "850 ns"),
            (12_345.0, "12.3 us"),
            (1_500_000.0, "1.5 ms"),
            (2e9, "2 s"),
        ] {
            assert_eq!(time(nanoseconds, "u"), text);
        }
    }

    #[test]
    fn durations_have_two_parts_at_most() {
        for (seconds, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (112, "1 min 52 s"),
            (3600, "1 h"),
            (7500, "2 h 5 min"),
            (172_800, "2 d"),
            (273_600, "3 d 4 h"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), text, "{seconds}");
        }
    }

    #[test]
    fn percentages_add_up() {
        for (parts, want) in [
            ([11 << 20, 0, 1013 << 20], ["1.1 %", "0.0 %", "98.9 %"]),
            ([1, 1, 1], ["33.4 %", "33.3 %", "33.3 %"]),
            ([0, 0, 5], ["0.0 %", "0.0 %", "100 %"]),
            ([0, 0, 0], ["0.0 %", "0.0 %", "0.0 %"]),
            ([1_000_000, 0, 1], ["99.9 %", "0.0 %", "0.1 %"]),
            ([1, 1_000_000, 1], ["0.1 %", "99.9 %", "0.0 %"]),
            ([u64::MAX, u64::MAX, 2], ["50.0 %", "50.0 %", "0.0 %"]),
        ] {
            assert_eq!(percents(parts), want, "{parts:?}");
        }
        let mut state = 7_u64;
        for _ in 0..1000 {
            let parts: [u64; 3] = std::array::from_fn(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state >> 40
            });
            let tenths = percents(parts).map(|text| {
                (text.trim_end_matches(" %").parse::<f64>().unwrap() * 10.0).round() as u64
            });
            assert_eq!(tenths.iter().sum::<u64>(), 1000, "{parts:?}: {tenths:?}");
        }
    }

    #[test]
    fn nothing_is_complete_before_it_is() {
        assert_eq!(percent(999_999, 1_000_000), "99.9 %");
        assert_eq!(percent(1, 1), "100 %");
        assert_eq!(percent(0, 0), "100 %");
        assert_eq!(percent(u64::MAX - 1, u64::MAX), "99.9 %");
        assert_eq!((whole_percent(999, 1000), whole_percent(3, 2)), (99, 100));
    }
}
