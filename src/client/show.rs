//! How things are shown to people: sizes, times, parts of a whole, colours.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use crate::error::one_line;

/// `512 B`, `64 KiB`, `3.2 GiB`: powers of 1024, with one decimal where it says anything.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = match count.checked_ilog2() {
        None | Some(0..10) => return format!("{count} B"),
        Some(log) => (log / 10).min(6),
    };
    let tenths = |unit: u32| (u128::from(count) * 10 + (1 << (10 * unit - 1))) >> (10 * unit);
    // 1023.96 MiB is 1 GiB.
    if tenths(unit) >= 10240 && unit < 6 {
        unit += 1;
    }
    let (whole, tenth) = (tenths(unit) / 10, tenths(unit) % 10);
    let name = UNITS[unit as usize - 1];
    if tenth == 0 || whole >= 100 { format!("{whole} {name}") } else { format!("{whole}.{tenth} {name}") }
}

/// Bytes per second.
pub(super) fn rate(per_second: u64) -> String {
    format!("{}/s", bytes(per_second))
}

/// `8 s`, `1 min 52 s`, `2 h 5 min`, `3 d 4 h`.
pub(super) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (large, name, small, small_name) = match seconds {
        0..60 => return format!("{seconds} s"),
        60..3600 => (seconds / 60, "min", seconds % 60, "s"),
        3600..86400 => (seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => (seconds / 86400, "d", seconds % 86400 / 3600, "h"),
    };
    if small == 0 { format!("{large} {name}") } else { format!("{large} {name} {small} {small_name}") }
}

/// A part of a whole in tenths of a percent, rounded down: what is not complete is never 100.
fn per_mille(part: u64, whole: u64) -> u128 {
    if whole == 0 { 1000 } else { u128::from(part.min(whole)) * 1000 / u128::from(whole) }
}

/// `45.2 %`.
pub(super) fn percent(part: u64, whole: u64) -> String {
    match per_mille(part, whole) {
        1000 => "100 %".to_owned(),
        tenths => format!("{}.{} %", tenths / 10, tenths % 10),
    }
}

/// The same without decimals, for progress.
pub(super) fn whole_percent(part: u64, whole: u64) -> u64 {
    u64::try_from(per_mille(part, whole) / 10).unwrap_or(100)
}

/// `1 234 567`: groups of three digits.
pub(super) fn number(count: u64) -> String {
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

/// A path as a shell takes it.
pub(super) fn quoted(path: &Path) -> String {
    let text = one_line(&path.display().to_string());
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// Colours, where they are seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint {
    on: bool,
}

impl Paint {
    /// For standard output: on a terminal, and without `NO_COLOR`.
    pub(super) fn stdout() -> Paint {
        Paint { on: std::io::stdout().is_terminal() && wanted() }
    }

    /// None at all.
    #[cfg(test)]
    pub(super) const fn none() -> Paint {
        Paint { on: false }
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    pub(super) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(super) fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    pub(super) fn red(self, text: &str) -> String {
        self.with("1;31", text)
    }
}

/// Whether a terminal should be coloured (no-color.org).
pub(super) fn wanted() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
}

/// Whether the terminal shows more than ASCII, as far as its locale says.
pub(super) fn is_unicode() -> bool {
    let first = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
    first.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (65536, "64 KiB"),
            ((1 << 20) - 1, "1 MiB"),
            (256 << 20, "256 MiB"),
            ((10 << 30) + (3 << 28), "10.8 GiB"),
            (150 * (1 << 30) + (1 << 29), "150 GiB"),
            (2 << 40, "2 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(count), text, "{count}");
        }
        assert_eq!(rate(50 << 20), "50 MiB/s");
        assert_eq!((number(7), number(1000), number(1_234_567)), ("7".into(), "1 000".into(), "1 234 567".into()));
    }

    #[test]
    fn times_have_two_parts_at_most() {
        for (seconds, text) in
            [(0, "0 s"), (8, "8 s"), (60, "1 min"), (112, "1 min 52 s"), (7500, "2 h 5 min"), (3600, "1 h"), (273_600, "3 d 4 h")]
        {
            assert_eq!(time(Duration::from_secs(seconds)), text, "{seconds}");
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

    #[test]
    fn names_go_through_a_shell_unharmed() {
        assert_eq!(quoted(Path::new("/srv/vm.raw")), "/srv/vm.raw");
        assert_eq!(quoted(Path::new("/srv/my vm's")), "'/srv/my vm'\\''s'");
        assert_eq!(quoted(Path::new("a\u{1b}[31m")), "'a\\u{1b}[31m'");
    }

    #[test]
    fn colours_are_left_out_where_nobody_sees_them() {
        assert_eq!(Paint::none().red("x"), "x");
        assert_eq!(Paint { on: true }.red("x"), "\x1b[1;31mx\x1b[0m");
    }
}
