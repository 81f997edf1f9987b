//! The progress of a job while the command waits: a bar on a terminal, or occasional lines
//! otherwise. Both go to standard error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use super::show;
use super::terminal::Narrow;
use crate::map::units;
use control::facts::JobProgress;
use host::error::one_line;

/// ProgressDisplay, in percent, between two lines if standard error is not a terminal; such lines
/// cannot be overwritten.
const STEP: u64 = 10;
/// Shortest time between two such lines.
const PAUSE: Duration = Duration::from_secs(2);

/// Most characters of a name beside a bar; the rest of the line is more important.
const LONGEST_NAME: usize = 24;
/// Most columns of a bar; a wider one shows nothing more.
const WIDEST_BAR: usize = 30;
/// Fewest columns of a useful bar. If fewer are left, the bar is omitted.
const NARROWEST_BAR: usize = 8;
/// Columns of ` 100 %` and of the spaces around a bar.
const PERCENT: usize = 8;

/// The progress display of a running job.
#[derive(Debug)]
pub(super) struct ProgressDisplay {
    name: String,
    out: Out,
    note: Option<String>,
}

#[derive(Debug)]
enum Out {
    /// A bar on a terminal.
    Bar(ProgressBar),
    /// Lines otherwise: the percentage in the last line, and its time.
    Lines(u64, Option<Instant>),
    /// Nothing; the caller prints.
    Silent,
}

impl ProgressDisplay {
    /// Makes the display for the disk that messages call `name`.
    pub(super) fn new(name: &str) -> ProgressDisplay {
        let out = match std::io::stderr().is_terminal() {
            true => Out::Bar(ProgressBar::with_draw_target(
                Some(0),
                ProgressDrawTarget::term_like_with_hz(Box::new(Narrow), 10),
            )),
            false => Out::Lines(0, None),
        };
        ProgressDisplay { name: one_line(name), out, note: None }
    }

    /// Makes a display that shows nothing.
    pub(super) fn silent() -> ProgressDisplay {
        ProgressDisplay { name: String::new(), out: Out::Silent, note: None }
    }

    /// Shows the current state of the job.
    pub(super) fn update(&mut self, job: &JobProgress) {
        let percent = units::whole_percent(job.offset, job.len);
        match &mut self.out {
            Out::Bar(bar) => {
                bar.set_length(job.len.max(1));
                bar.set_position(if job.len == 0 { 1 } else { job.offset });
                let said = if self.note.is_some() {
                    format!("{}, {}", short_amounts(job), job.status)
                } else {
                    amounts_of_bar(job)
                };
                draw(bar, &self.name, &said);
            }
            Out::Lines(last, at) => {
                let due =
                    percent / STEP > *last / STEP && at.is_none_or(|at| at.elapsed() >= PAUSE);
                if due && percent < 100 {
                    (*last, *at) = (percent, Some(Instant::now()));
                    self.line(&format!("{percent} %, {}", amounts(job)));
                }
            }
            Out::Silent => {}
        }
    }

    /// Sets the note that explains why the job does not proceed, or names the action taken; `None`
    /// when the job proceeds again. A new note is printed on a line of its own, of any length.
    pub(super) fn note(&mut self, note: Option<String>) {
        if self.note == note {
            return;
        }
        if let Some(note) = &note {
            match &self.out {
                Out::Bar(bar) => bar.suspend(|| self.line(&one_line(note))),
                Out::Lines(..) => self.line(&one_line(note)),
                Out::Silent => {}
            }
        }
        self.note = note;
    }

    /// Ends the display and clears its line, so that the next output starts on a clean line.
    pub(super) fn clear(&self) {
        if let Out::Bar(bar) = &self.out {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        // An error is ignored: the job goes on even if standard error has no reader.
        let _ = writeln!(std::io::stderr(), "{}: {text}", self.name);
    }
}

/// Draws the line so that it fits the terminal. The text is complete if it fits, and the bar takes
/// the rest.
fn draw(bar: &ProgressBar, name: &str, said: &str) {
    let (name, columns, said) = fit(name, said, Narrow.width().into());
    bar.set_style(style(columns));
    bar.set_prefix(name);
    bar.set_message(said);
    bar.tick();
}

/// Returns name, columns of the bar, and text for a line of `width` columns.
fn fit(name: &str, said: &str, width: usize) -> (String, usize, String) {
    let name = end_of(name, LONGEST_NAME.min(width / 3));
    let left = width.saturating_sub(name.chars().count() + PERCENT);
    let columns = left.saturating_sub(said.chars().count()).min(WIDEST_BAR);
    let columns = if columns < NARROWEST_BAR { 0 } else { columns };
    (name, columns, said.chars().take(left.saturating_sub(columns)).collect())
}

/// Describes the amounts: `102 MiB of 256 MiB, 40 MiB to copy, 30 MiB/s, 1 s left`.
pub(super) fn amounts(job: &JobProgress) -> String {
    let parts = [Some(short_amounts(job)), to_copy(job), rate(job), left(job)];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Describes the amounts beside a bar, which already shows the percentage.
fn amounts_of_bar(job: &JobProgress) -> String {
    let parts = [to_copy(job).unwrap_or_else(|| short_amounts(job)).into(), rate(job), left(job)];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Describes the remaining bytes, without those that are zero or already local.
fn to_copy(job: &JobProgress) -> Option<String> {
    job.bytes_left.map(|bytes| format!("{} to copy", units::size(bytes)))
}

fn rate(job: &JobProgress) -> Option<String> {
    (job.rate > 0).then(|| units::rate(job.rate))
}

fn left(job: &JobProgress) -> Option<String> {
    job.seconds_left
        .map(|seconds| format!("{} left", units::duration(Duration::from_secs(seconds))))
}

/// Describes the amounts that are known of a job that does not proceed.
fn short_amounts(job: &JobProgress) -> String {
    format!("{} of {}", units::size(job.offset), units::size(job.len))
}

/// Returns the end of a long name, since the end tells one disk from another.
fn end_of(name: &str, longest: usize) -> String {
    let length = name.chars().count();
    if length <= longest {
        return name.to_owned();
    }
    let cut = if show::is_unicode() { "…" } else { "..." };
    cut.chars()
        .chain(name.chars().skip((length + cut.chars().count()).saturating_sub(longest)))
        .take(longest)
        .collect()
}

fn style(columns: usize) -> ProgressStyle {
    let bar = match (columns, show::wanted()) {
        (0, _) => String::new(),
        (columns, true) => format!("{{bar:{columns}.green/dim}} "),
        (columns, false) => format!("{{bar:{columns}}} "),
    };
    let template = format!("{{prefix}} {{percent:>3}} % {bar}{{msg}}");
    let style =
        ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars(if show::is_unicode() { "━╸─" } else { "=>-" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_leave_room_for_what_is_said() {
        assert_eq!(end_of("disk", LONGEST_NAME), "disk");
        let long = end_of("/srv/machines/of/somebody/vm.raw", LONGEST_NAME);
        assert!(
            long.chars().count() == LONGEST_NAME
                && long.ends_with("/somebody/vm.raw")
                && !long.starts_with('/'),
            "{long}"
        );
        assert_eq!(end_of(&"ä".repeat(99), LONGEST_NAME).chars().count(), LONGEST_NAME);
        assert!(end_of("/srv/vm.raw", 2).chars().count() <= 2);
    }

    /// Protects: the line fits the terminal, so that it is drawn in place, and its text is complete
    /// in 80 columns.
    #[test]
    fn the_line_fits_80_columns() {
        let said = "10.5 MiB of 1000 GiB, 5.15 MiB/s, 23 h 59 min left";
        let narrow = 80 - 4;
        for name in ["d", "/srv/machines/of/somebody/with/a/long/name/vm.raw"] {
            let (shown, columns, whole) = fit(name, said, narrow);
            assert!(
                shown.chars().count() + PERCENT + columns + whole.chars().count() <= narrow,
                "{shown} {columns} {whole}"
            );
            if name == "d" {
                assert_eq!(whole, said);
            }
        }
        assert_eq!(fit("vm.raw", "1 MiB of 4 MiB", 200).1, WIDEST_BAR);
        for width in 2 * PERCENT..60 {
            let (name, columns, said) = fit("/srv/vm.raw", said, width);
            let used = name.chars().count() + columns + said.chars().count();
            assert!(used + PERCENT <= width, "{width}: {name} {columns} {said}");
        }
    }

    #[test]
    fn amounts_say_what_is_known() {
        let job = JobProgress { offset: 102 << 20, len: 256 << 20, ..JobProgress::default() };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB");
        let job = JobProgress { rate: 30 << 20, seconds_left: Some(65), ..job };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB, 30 MiB/s, 1 min 5 s left");
        let job = JobProgress { bytes_left: Some(84 << 20), ..job };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB, 84 MiB to copy, 30 MiB/s, 1 min 5 s left");
        assert_eq!(amounts_of_bar(&job), "84 MiB to copy, 30 MiB/s, 1 min 5 s left");
    }
}
