//! Limits the log to [`LINES`] lines per second: a guest that reads a broken range in a loop must
//! not fill the log.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// Lines per second. A client that causes errors must not be able to fill the log.
const LINES: u32 = 10;

/// A counter of lines per second. Races between threads may let a few more lines pass.
#[derive(Debug)]
pub(super) struct LogLimit {
    start: Instant,
    second: AtomicU64,
    lines: AtomicU32,
    suppressed: AtomicU64,
}

impl Default for LogLimit {
    fn default() -> Self {
        LogLimit {
            start: Instant::now(),
            second: AtomicU64::new(0),
            lines: AtomicU32::new(0),
            suppressed: AtomicU64::new(0),
        }
    }
}

impl LogLimit {
    /// Calls `line` with the number of lines that were suppressed before it, or suppresses this
    /// line.
    pub(super) fn run(&self, line: impl FnOnce(u64)) {
        self.run_at(self.start.elapsed().as_secs(), line);
    }

    fn run_at(&self, second: u64, line: impl FnOnce(u64)) {
        if self.second.swap(second, Ordering::Relaxed) != second {
            self.lines.store(0, Ordering::Relaxed);
        }
        if self.lines.fetch_add(1, Ordering::Relaxed) < LINES {
            line(self.suppressed.swap(0, Ordering::Relaxed));
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_a_second_and_then_a_count() {
        let limit = LogLimit::default();
        let mut lines = 0;
        for _ in 0..25 {
            limit.run_at(3, |_| lines += 1);
        }
        assert_eq!(lines, 10);
        let mut suppressed = 0;
        limit.run_at(4, |n| suppressed = n);
        assert_eq!(suppressed, 15);
    }
}
