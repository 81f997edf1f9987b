//! The progress of a job while somebody waits: a bar on a terminal, now and then a line elsewhere. Both on standard error.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::facts::Job;
use super::show;
use super::terminal::Narrow;
use crate::error::one_line;
use crate::map::units;

/// Lines that nobody can take back are written when so much has happened, in percent.
const STEP: u64 = 10;
/// And not more often than this.
const PAUSE: Duration = Duration::from_secs(2);

/// Characters of a name beside a bar: what is said of the job is more than that.
const LONGEST_NAME: usize = 24;

/// What is shown while a job runs.
#[derive(Debug)]
pub(super) struct Progress {
    name: String,
    /// On a terminal.
    bar: Option<ProgressBar>,
    /// Elsewhere: what the last line has said, and when.
    said: (u64, Option<Instant>),
    note: Option<String>,
}

impl Progress {
    /// Of the disk that messages call `name`.
    pub(super) fn new(name: &str) -> Progress {
        let name = one_line(name);
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::term_like_with_hz(Box::new(Narrow), 10));
            bar.set_style(style());
            bar.set_prefix(end_of(&name));
            bar
        });
        Progress { name, bar, said: (0, None), note: None }
    }

    /// The job is here now.
    pub(super) fn update(&mut self, job: &Job) {
        if let Some(bar) = &self.bar {
            bar.set_length(job.len.max(1));
            bar.set_position(if job.len == 0 { 1 } else { job.offset });
            bar.set_message(self.note.clone().unwrap_or_else(|| amounts(job)));
            bar.tick();
            return;
        }
        let percent = units::whole_percent(job.offset, job.len);
        let due = percent / STEP > self.said.0 / STEP && self.said.1.is_none_or(|at| at.elapsed() >= PAUSE);
        if due && percent < 100 {
            self.said = (percent, Some(Instant::now()));
            self.line(&format!("{percent} %, {}", amounts(job)));
        }
    }

    /// The job does not move, and why; `None` when it does again.
    pub(super) fn note(&mut self, note: Option<String>) {
        if self.note == note {
            return;
        }
        match (&self.bar, &note) {
            (Some(bar), Some(note)) => {
                bar.set_message(one_line(note));
                bar.tick();
            }
            (None, Some(note)) => self.line(&one_line(note)),
            (_, None) => {}
        }
        self.note = note;
    }

    /// Nothing more is shown; what comes next is written on a clean line.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        // Where nobody reads any more the job goes on all the same.
        let _ = writeln!(std::io::stderr(), "{}: {text}", self.name);
    }
}

/// `102 MiB of 256 MiB, 30 MiB/s, 5 s left`.
pub(super) fn amounts(job: &Job) -> String {
    let mut text = format!("{} of {}", units::size(job.offset), units::size(job.len));
    if job.rate > 0 {
        text += &format!(", {}", units::rate(job.rate));
    }
    if let Some(seconds) = job.seconds_left {
        text += &format!(", {} left", units::duration(Duration::from_secs(seconds)));
    }
    text
}

/// The end of a long name, which is what tells one disk from another.
fn end_of(name: &str) -> String {
    let length = name.chars().count();
    if length <= LONGEST_NAME {
        return name.to_owned();
    }
    let cut = if show::is_unicode() { "…" } else { "..." };
    cut.chars().chain(name.chars().skip(length - LONGEST_NAME + cut.chars().count())).collect()
}

fn style() -> ProgressStyle {
    let bar = if show::wanted() { "{bar:30.green/dim}" } else { "{bar:30}" };
    let template = format!("{{prefix}} {{percent:>3}} % {bar} {{wide_msg}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars(if show::is_unicode() { "━╸─" } else { "=>-" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_leave_room_for_what_is_said() {
        assert_eq!(end_of("disk"), "disk");
        let long = end_of("/srv/machines/of/somebody/vm.raw");
        assert!(long.chars().count() == LONGEST_NAME && long.ends_with("/somebody/vm.raw") && !long.starts_with('/'), "{long}");
        assert_eq!(end_of(&"ä".repeat(99)).chars().count(), LONGEST_NAME);
    }

    #[test]
    fn amounts_say_what_is_known() {
        let job = Job { offset: 102 << 20, len: 256 << 20, ..Job::default() };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB");
        let job = Job { rate: 30 << 20, seconds_left: Some(65), ..job };
        assert_eq!(amounts(&job), "102 MiB of 256 MiB, 30 MiB/s, 1 min 5 s left");
    }
}
