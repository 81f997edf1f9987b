//! Standard error as a terminal to draw on, a little narrower than it really is.
//!
//! A terminal shows `^C` when the user types it. After a line as wide as the terminal, `^C` wraps
//! to the next line. Only that next line is cleared afterwards, and the bar stays above it. So some
//! columns are always kept free for `^C`.

use std::io::{self, Write};

use indicatif::TermLike;

/// Columns that stay free: twice the width of `^C`, which costs nothing.
const ROOM: u16 = 4;
/// Columns and lines of a terminal that does not report its size.
const USUAL: (u16, u16) = (80, 24);

/// Standard error.
#[derive(Debug)]
pub(super) struct Narrow;

impl Narrow {
    fn size() -> (u16, u16) {
        match rustix::termios::tcgetwinsize(io::stderr()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col, size.ws_row),
            _ => USUAL,
        }
    }

    fn moves(steps: usize, letter: char) -> io::Result<()> {
        if steps == 0 { Ok(()) } else { write!(io::stderr(), "\x1b[{steps}{letter}") }
    }
}

impl TermLike for Narrow {
    fn width(&self) -> u16 {
        Narrow::size().0.saturating_sub(ROOM).max(1)
    }

    fn height(&self) -> u16 {
        Narrow::size().1
    }

    fn move_cursor_up(&self, lines: usize) -> io::Result<()> {
        Narrow::moves(lines, 'A')
    }

    fn move_cursor_down(&self, lines: usize) -> io::Result<()> {
        Narrow::moves(lines, 'B')
    }

    fn move_cursor_right(&self, columns: usize) -> io::Result<()> {
        Narrow::moves(columns, 'C')
    }

    fn move_cursor_left(&self, columns: usize) -> io::Result<()> {
        Narrow::moves(columns, 'D')
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        writeln!(io::stderr(), "{line}")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        io::stderr().write_all(text.as_bytes())
    }

    fn clear_line(&self) -> io::Result<()> {
        io::stderr().write_all(b"\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        io::stderr().flush()
    }
}
