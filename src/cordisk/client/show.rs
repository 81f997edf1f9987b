//! Output for terminals and shells: colours, characters, names. [`crate::map::units`] formats
//! numbers.

use std::io::IsTerminal;
use std::path::Path;

use host::error::one_line;

/// Returns a path quoted for a shell.
pub(super) fn quoted(path: &Path) -> String {
    let text = one_line(&path.display().to_string());
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// Colours and characters for the output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint {
    on: bool,
    unicode: bool,
}

impl Paint {
    /// For standard output: colours only on a terminal, and without `NO_COLOR`.
    pub(super) fn stdout() -> Paint {
        Paint { on: std::io::stdout().is_terminal() && wanted(), unicode: is_unicode() }
    }

    /// Returns the mark before the name of a disk.
    pub(super) fn mark(self) -> &'static str {
        if self.unicode { "●" } else { "*" }
    }

    /// Returns the sign between a layer and the one below.
    pub(super) fn arrow(self) -> &'static str {
        if self.unicode { " ← " } else { " <- " }
    }

    /// Makes a value without colours.
    #[cfg(test)]
    pub(super) const fn none() -> Paint {
        Paint { on: false, unicode: true }
    }

    /// Makes a value without colours and without characters beyond ASCII.
    #[cfg(test)]
    pub(super) const fn ascii() -> Paint {
        Paint { on: false, unicode: false }
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

/// Tells whether a terminal should be coloured (no-color.org).
pub(super) fn wanted() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && !is_dumb()
}

/// Tells whether the terminal can only print text.
pub(super) fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb")
}

/// Tells whether the terminal shows more than ASCII, according to its locale.
pub(super) fn is_unicode() -> bool {
    let first = ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
    first.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_through_a_shell_unharmed() {
        assert_eq!(quoted(Path::new("/srv/vm.raw")), "/srv/vm.raw");
        assert_eq!(quoted(Path::new("/srv/my vm's")), "'/srv/my vm'\\''s'");
        assert_eq!(quoted(Path::new("a\u{1b}[31m")), "'a\\u{1b}[31m'");
    }

    #[test]
    fn colours_are_left_out_where_nobody_sees_them() {
        assert_eq!(Paint::none().red("x"), "x");
        assert_eq!(Paint { on: true, unicode: true }.red("x"), "\x1b[1;31mx\x1b[0m");
    }
}
