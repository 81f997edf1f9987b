//! The progress of a job while somebody waits: a bar on a terminal, now and then a line elsewhere. Both on standard error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use super::facts::Job;
use super::show;
use super::terminal::Narrow;
use crate::error::one_line;
use crate::map::units;

/// Lines that nobody can take back are written when so much has happened, in percent.
const STEP: u64 = 10;
/// And not more often than this.
const PAUSE: Duration = Duration::from_secs(2);

/// Most characters of a name beside a bar: the rest of the line says more.
const LONGEST_NAME: usize = 24;
/// Most columns of a bar: a wider one shows nothing more.
const WIDEST_BAR: usize = 30;
/// Fewest columns of a bar that shows anything; without room for it there is none.
const NARROWEST_BAR: usize = 8;
/// Columns of ` 100 %` and of the spaces around a bar.
const PERCENT: usize = 8;

/// What is shown while a job runs.
#[derive(Debug)]
pub(super) struct Progress {
    name: String,
    out: Out,
    note: Option<String>,
}

#[derive(Debug)]
enum Out {
    /// On a terminal.
    Bar(ProgressBar),
    /// Elsewhere: what the last line has said, and when.
    Lines(u64, Option<Instant>),
    /// The caller prints.
    Silent,
}

impl Progress {
    /// Of the disk that messages call `name`.
    pub(super) fn new(name: &str) -> Progress {
        let out = match std::io::stderr().is_terminal() {
            true => Out::Bar(ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::term_like_with_hz(Box::new(Narrow), 10))),
            false => Out::Lines(0, None),
        };
        Progress { name: one_line(name), out, note: None }
    }

    /// Shows nothing.
    pub(super) fn silent() -> Progress {
        Progress { name: String::new(), out: Out::Silent, note: None }
    }

    /// The job is here now.
    pub(super) fn update(&mut self, job: &Job) {
        let percent = units::whole_percent(job.offset, job.len);
        match &mut self.out {
            Out::Bar(bar) => {
                bar.set_length(job.len.max(1));
                bar.set_position(if job.len == 0 { 1 } else { job.offset });
                let said = if self.note.is_some() { format!("{}, {}", short_amounts(job), job.status) } else { amounts_of_bar(job) };
                draw(bar, &self.name, &said);
            }
            Out::Lines(last, at) => {
                let due = percent / STEP > *last / STEP && at.is_none_or(|at| at.elapsed() >= PAUSE);
                if due && percent < 100 {
                    (*last, *at) = (percent, Some(Instant::now()));
                    self.line(&format!("{percent} %, {}", amounts(job)));
                }
            }
            Out::Silent => {}
        }
    }

    /// The job does not move, and why, or what is done about it; `None` when it moves again. Says so on a line of its own, which is
    /// as long as it has to be.
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

    /// Nothing more is shown; what comes next is written on a clean line.
    pub(super) fn clear(&self) {
        if let Out::Bar(bar) = &self.out {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        // Where nobody reads any more the job goes on all the same.
        let _ = writeln!(std::io::stderr(), "{}: {text}", self.name);
    }
}

/// Draws the line so that it fits the terminal: what is said is whole where that can be, and the bar takes what is left.
fn draw(bar: &ProgressBar, name: &str, said: &str) {
    let (name, columns, said) = fit(name, said, Narrow.width().into());
    bar.set_style(style(columns));
    bar.set_prefix(name);
    bar.set_message(said);
    bar.tick();
}

/// Name, columns of the bar and what is said, for a line of `width` columns.
fn fit(name: &str, said: &str, width: usize) -> (String, usize, String) {
    let name = end_of(name, LONGEST_NAME.min(width / 3));
    let left = width.saturating_sub(name.chars().count() + PERCENT);
    let columns = left.saturating_sub(said.chars().count()).min(WIDEST_BAR);
    let columns = if columns < NARROWEST_BAR { 0 } else { columns };
    (name, columns, said.chars().take(left.saturating_sub(columns)).collect())
}

/// `102 MiB of 256 MiB, 40 MiB to copy, 30 MiB/s, 1 s left`.
pub(super) fn amounts(job: &Job) -> String {
    let parts = [Some(short_amounts(job)), to_copy(job), rate(job), left(job)];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The same beside a bar, which says already how far it is.
fn amounts_of_bar(job: &Job) -> String {
    let parts = [to_copy(job).unwrap_or_else(|| short_amounts(job)).into(), rate(job), left(job)];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// What is left, without what is zero or local already.
fn to_copy(job: &Job) -> Option<String> {
    job.bytes_left.map(|bytes| format!("{} to copy", units::size(bytes)))
}

fn rate(job: &Job) -> Option<String> {
    (job.rate > 0).then(|| units::rate(job.rate))
}

fn left(job: &Job) -> Option<String> {
    job.seconds_left.map(|seconds| format!("{} left", units::duration(Duration::from_secs(seconds))))
}

/// As much as is known of a job that does not move.
fn short_amounts(job: &Job) -> String {
    format!("{} of {}", units::size(job.offset), units::size(job.len))
}

/// The end of a long name, which is what tells one disk from another.
fn end_of(name: &str, longest: usize) -> String {
    let length = name.chars().count();
    if length <= longest {
        return name.to_owned();
    }
    let cut = if show::is_unicode() { "…" } else { "..." };
    cut.chars().chain(name.chars().skip((length + cut.chars().count()).saturating_sub(longest))).take(longest).collect()
}

fn style(columns: usize) -> ProgressStyle {
    let bar = match (columns, show::wanted()) {
        (0, _) => String::new(),
        (columns, true) => format!("{{bar:{columns}.green/dim}} "),
        (columns, false) => format!("{{bar:{columns}}} "),
    };
    let template = format!("{{prefix}} {{percent:>3}} % {bar}{{msg}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars(if show::is_unicode() { "━╸─" } else { "=>-" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_leave_room_for_what_is_said() {
        assert_eq!(end_of("disk", LONGEST_NAME), "disk");
        let long = end_of("/srv/machines/of/somebody/vm.raw", LONGEST_NAME);
        assert!(long.chars().count() == LONGEST_NAME && long.ends_with("/somebody/vm.raw") && !long.starts_with('/'), "{long}");
        assert_eq!(end_of(&"ä".repeat(99), LONGEST_NAME).chars().count(), LONGEST_NAME);
        assert!(end_of("/srv/vm.raw", 2).chars().count() <= 2);
    }

    /// Protects: the line fits the terminal, so that it is drawn in place, and says all it has to say in 80 columns.
    #[test]
    fn the_line_fits_80_columns() {
        let said = "10.5 MiB of 1000 GiB, 5.15 MiB/s, 23 h 59 min left";
        let narrow = 80 - 4;
        for name in ["d", "/srv/machines/of/somebody/with/a/long/name/vm.raw"] {
            let (shown, columns, whole) = fit(name, said, narrow);
            assert!(shown.chars().count() + PERCENT + columns + whole.chars().count() <= narrow, "{shown} {columns} {whole}");
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
        let job = Job { offset: 102 << 20, len: 256 << 20, ..Job::default() };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB");
        let job = Job { rate: 30 << 20, seconds_left: Some(65), ..job };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB, 30 MiB/s, 1 min 5 s left");
        let job = Job { bytes_left: Some(84 << 20), ..job };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB, 84 MiB to copy, 30 MiB/s, 1 min 5 s left");
        assert_eq!(amounts_of_bar(&job), "84 MiB to copy, 30 MiB/s, 1 min 5 s left");
    }
}
