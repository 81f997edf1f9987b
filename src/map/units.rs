//! Numbers as people read them.

/// Bytes with three significant digits and a binary unit, as `qemu-img info` writes them: `512 B`, `1.5 KiB`, `0.977 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", significant(value), UNITS[unit])
}

/// Three significant digits, without zeros that say nothing: `0.977`, `1.5`, `12.3`, `388`.
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

/// Nanoseconds with three significant digits: `850 ns`, `12.3 µs`, `1.5 ms`, `2 s`. `micro` is what stands for a millionth.
pub fn time(nanoseconds: f64, micro: &str) -> String {
    match nanoseconds {
        _ if nanoseconds < 1e3 => format!("{} ns", significant(nanoseconds.max(0.0).round())),
        _ if nanoseconds < 1e6 => format!("{} {micro}s", significant(nanoseconds / 1e3)),
        _ if nanoseconds < 1e9 => format!("{} ms", significant(nanoseconds / 1e6)),
        _ => format!("{} s", significant(nanoseconds / 1e9)),
    }
}

/// Seconds as the two largest units: `9 s`, `2 min 10 s`, `3 h 05 min`, `2 d 04 h`.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words are those of qemu-img 10.0.
    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1536, "1.5 KiB"),
            (397_312, "388 KiB"),
            (4 << 20, "4 MiB"),
            (10 << 30, "10 GiB"),
            ((10 << 30) + (300 << 20), "10.3 GiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_have_their_unit() {
        for (nanoseconds, text) in [(0.0, "0 ns"), (850.0, "850 ns"), (12_345.0, "12.3 us"), (1_500_000.0, "1.5 ms"), (2e9, "2 s")] {
            assert_eq!(time(nanoseconds, "u"), text);
        }
        for (seconds, text) in [(0, "0 s"), (59, "59 s"), (130, "2 min 10 s"), (11_100, "3 h 05 min"), (187_200, "2 d 04 h")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
