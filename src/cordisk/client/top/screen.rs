//! The screen as lines: a pure function of the model and of the terminal's size.
//!
//! If the terminal is too small, parts are left out, the least important first: the flushes, empty
//! lines, headings, the title. The map takes the rows that are left.

use std::time::Duration;

use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::bars;
use super::model::{DiskView, FAILED, Model};
use super::rates::{Flow, Rates, failed_since_start};
use crate::client::facts::{self, InWords};
use crate::map::{Cells, Colour, PictureStyle, Shares, units};
use control::facts::{DiskStatus, JobProgress, SourceStatus};
use host::error::one_line;

/// The width in columns at which all columns fit.
const WIDE: usize = 64;
/// The width in columns at which each disk also gets a bar.
const VERY_WIDE: usize = 100;
/// The height in rows at which headings are shown.
const HIGH: usize = 14;
/// The height in rows at which flushes and empty lines are shown.
const ROOMY: usize = 20;
const LABEL: usize = 10;

const KEYS: [&str; 4] = ["q quit", "↑ ↓ choose a disk", "p pause", "? help"];
const HELP: [&str; 7] = [
    "q, Esc or Ctrl-C: quit",
    "↑ ↓: choose a disk",
    "p: pause or resume its job",
    "local: in the image itself",
    "zero: known to be zero",
    "remote: in the backing files",
    "hits: reads from the image alone",
];

/// Returns the lines for a terminal whose locale is not UTF-8. Each drawing character becomes one
/// ASCII character, so that nothing moves. Names of files stay unchanged.
pub(super) fn in_ascii(lines: Vec<Line<'static>>) -> Vec<Line<'static>> {
    let plain = |c: char| match c {
        '█' => '#',
        '▏' | '▎' | '▍' | '▌' | '▋' | '▊' | '▉' | '▓' | '▒' | '░' => '+',
        '▁' | '▂' => '.',
        '▃' | '▄' => ':',
        '▅' | '▆' | '▇' => '|',
        '·' => '-',
        '▸' => '>',
        '↑' => '^',
        '↓' => 'v',
        'µ' => 'u',
        '…' => '.',
        c => c,
    };
    let in_plain = |span: Span<'static>| {
        Span::styled(span.content.chars().map(plain).collect::<String>(), span.style)
    };
    lines
        .into_iter()
        .map(|line| {
            Line::from(line.spans.into_iter().map(in_plain).collect::<Vec<_>>()).style(line.style)
        })
        .collect()
}

fn plain() -> Style {
    Style::new()
}

fn dim() -> Style {
    plain().add_modifier(Modifier::DIM)
}

fn bold() -> Style {
    plain().add_modifier(Modifier::BOLD)
}

fn alarm() -> Style {
    plain().fg(Color::Red).add_modifier(Modifier::BOLD)
}

fn colour(colour: Colour) -> Color {
    Color::Indexed(colour.index())
}

fn filled() -> Style {
    plain().fg(colour(Colour::Local))
}

/// Style of the filled part of a bar. It has the background of the empty part, since the last
/// character may be filled in part.
fn bar_filled() -> Style {
    filled().patch(hollow())
}

/// Style of the empty part of a bar.
fn hollow() -> Style {
    plain().bg(colour(Colour::Zero))
}

/// Returns the screen as exactly `height` lines.
pub(super) fn screen(model: &Model, width: usize, height: usize) -> Vec<Line<'static>> {
    let layout =
        Layout { width, wide: width >= WIDE, high: height >= HIGH, roomy: height >= ROOMY };
    let mut lines = Vec::new();
    if height >= 12 {
        lines.push(layout.title(model));
    }
    if layout.roomy {
        lines.push(Line::default());
    }
    let footer = layout.footer(model);
    match model.selected() {
        None => lines.push(Line::from(
            "  no disk is running here; `cordisk mount IMAGE MOUNTPOINT` starts one",
        )),
        Some(disk) => {
            layout.list(model, height, &mut lines);
            layout.details(disk, &mut lines);
            let legend = disk.status().and_then(facts::shares).map(|sum| layout.legend(&sum));
            let used = lines.len() + usize::from(legend.is_some()) + footer.len();
            if let Some(cells) = disk.last.as_ref().and_then(|last| last.cells.as_ref()) {
                layout.map(cells, height.saturating_sub(used), &mut lines);
            }
            lines.extend(legend);
        }
    }
    // The footer is at the bottom. If the lines above it are too many, the last of them are cut
    // off.
    lines.resize(height.saturating_sub(footer.len()), Line::default());
    lines.extend(footer);
    lines.truncate(height);
    lines
}

/// Returns the approximate number of cells that fill the map on a screen of this size.
pub(super) fn map_places(width: usize, height: usize) -> u64 {
    (width.saturating_sub(4) as u64 * height as u64).clamp(64, Cells::MOST)
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    width: usize,
    wide: bool,
    high: bool,
    roomy: bool,
}

impl Layout {
    fn title(&self, model: &Model) -> Line<'static> {
        let count = match model.disks.len() {
            1 => String::new(),
            count => format!("{count} disks, "),
        };
        let right = format!("{count}every {} s ", units::significant(model.interval));
        let left = "  cordisk top";
        let gap = self.width.saturating_sub(left.len() + right.len());
        Line::from(vec![
            Span::styled(left, bold()),
            Span::raw(" ".repeat(gap)),
            Span::styled(right, dim()),
        ])
    }

    /// Adds one line for each disk, as many as fit, including the selected one.
    fn list(&self, model: &Model, height: usize, lines: &mut Vec<Line<'static>>) {
        if self.wide && height >= 12 {
            lines.push(self.heading());
        }
        let room = (height / 4).max(1).min(model.disks.len());
        let first = (model.selected + 1).saturating_sub(room).min(model.disks.len() - room);
        for (index, disk) in model.disks.iter().enumerate().skip(first).take(room) {
            lines.push(self.disk(disk, model.disks.len() > 1 && index == model.selected));
        }
        if self.roomy {
            lines.push(Line::default());
        }
    }

    /// Returns the columns of the list that are left for the name.
    fn name_width(&self) -> usize {
        let others = match self.width {
            WIDE.. => 2 + 10 + 8 + 13 + 13 + 14 + self.bar_width(),
            _ => 2 + 8 + 14,
        };
        self.width.saturating_sub(others).max(6)
    }

    fn bar_width(&self) -> usize {
        if self.width >= VERY_WIDE { 12 } else { 0 }
    }

    fn heading(&self) -> Line<'static> {
        let (name, bar) = (self.name_width(), self.bar_width());
        let text = format!(
            "  {:name$}{:>10}{:bar$}{:>8}{:>13}{:>13}  {:<12}",
            "disk", "size", "", "local", "read", "write", "job"
        );
        Line::from(Span::styled(text, dim()))
    }

    fn disk(&self, disk: &DiskView, chosen: bool) -> Line<'static> {
        let width = self.name_width();
        let name = format!("{:width$}", shortened(&disk.name, width - 1));
        let mut spans = vec![
            Span::styled(if chosen { "▸ " } else { "  " }, filled()),
            Span::styled(name, if chosen { bold() } else { plain() }),
        ];
        let status = disk.status();
        let fetched = status.and_then(facts::shares).map(|bytes| bytes.fetched());
        if self.wide {
            spans.push(Span::raw(format!(
                "{:>10}",
                status.map_or(String::new(), |status| units::size(status.size))
            )));
            if let (true, Some((part, whole))) = (self.bar_width() > 0, fetched) {
                let (full, empty) = bars::bar(part, whole, self.bar_width() - 2);
                spans.extend([
                    Span::raw("  "),
                    Span::styled(full, bar_filled()),
                    Span::styled(empty, hollow()),
                ]);
            }
        }
        let local = fetched.map_or(String::new(), |(part, whole)| {
            format!("{} %", units::whole_percent(part, whole))
        });
        spans.push(Span::raw(format!("{local:>8}")));
        if self.wide {
            for rate in [
                disk.rates.map(|rates| rates.read.bytes),
                disk.rates.map(|rates| rates.write.bytes),
            ] {
                spans.push(Span::raw(format!("{:>13}", rate.map_or("-".into(), per_second))));
            }
        }
        spans.push(Span::raw("  "));
        let (word, style) = state(disk);
        spans.push(Span::styled(word, style));
        Line::from(spans)
    }

    /// Adds the lines about the selected disk.
    fn details(&self, disk: &DiskView, lines: &mut Vec<Line<'static>>) {
        if self.wide && self.high {
            let text = format!(
                "{:LABEL$}{:>12}{:>9}{:>9}{:>9}{:>9}",
                "", "per second", "op/s", "mean", "p50", "p99"
            );
            lines.push(Line::from(Span::styled(text, dim())));
        }
        let most =
            disk.history.iter().fold(0.0, |most: f64, (read, write)| most.max(*read).max(*write));
        let rates = disk.rates.as_ref();
        let read = |width| bars::curve(disk.history.iter().map(|(read, _)| *read), most, width);
        let write = |width| bars::curve(disk.history.iter().map(|(_, write)| *write), most, width);
        lines.push(self.flow("read", rates.map(|rates| rates.read), read));
        lines.push(self.flow("write", rates.map(|rates| rates.write), write));
        if self.roomy {
            lines.push(self.flow("flush", rates.map(|rates| rates.flush), |_| String::new()));
        }
        lines.push(self.below(disk));
        lines.extend(self.sources(disk));
        lines.extend(self.failed(disk));
        lines.extend(self.job(disk));
        if self.roomy {
            lines.push(Line::default());
        }
    }

    fn flow(
        &self,
        name: &str,
        flow: Option<Flow>,
        curve: impl Fn(usize) -> String,
    ) -> Line<'static> {
        let rate = flow.map_or("-".into(), |flow| {
            if name == "flush" { String::new() } else { per_second(flow.bytes) }
        });
        let operations = flow.map_or(String::new(), |flow| count(flow.operations));
        let latency = flow.and_then(|flow| flow.latency);
        let time = |nanoseconds: Option<f64>| {
            nanoseconds.map_or("-".into(), |time| units::time(time, "µ"))
        };
        if !self.wide {
            let label = Span::styled(format!("  {name:<7}"), dim());
            return Line::from(vec![
                label,
                Span::raw(format!(
                    "{rate:>11}  p99 {:>8}",
                    time(latency.map(|latency| latency.p99))
                )),
            ]);
        }
        let times = [
            latency.map(|latency| latency.mean),
            latency.map(|latency| latency.median),
            latency.map(|latency| latency.p99),
        ];
        let times: String = times.into_iter().map(|value| format!("{:>9}", time(value))).collect();
        Line::from(vec![
            Span::styled(format!("  {name:<width$}", width = LABEL - 2), dim()),
            Span::raw(format!("{rate:>12}{operations:>9}{times}  ")),
            Span::styled(curve(self.width.saturating_sub(LABEL + 12 + 9 + 27 + 4)), filled()),
        ])
    }

    /// Returns the line with hits and with the data rates of the backing files.
    fn below(&self, disk: &DiskView) -> Line<'static> {
        let hits = disk.rates.and_then(|rates| rates.hit_ratio()).unwrap_or_else(|| "-".into());
        if !self.wide {
            return Line::from(vec![
                Span::styled("  hits   ", dim()),
                Span::raw(format!("{hits:>11}")),
            ]);
        }
        let rate = |value: fn(&Rates) -> f64| {
            disk.rates.as_ref().map_or("-".into(), |rates| per_second(value(rates)))
        };
        let spans = vec![
            Span::styled(format!("  {:<width$}", "hits", width = LABEL - 2), dim()),
            Span::raw(format!("{hits:>12}")),
            Span::styled("   from backing files ", dim()),
            Span::raw(rate(|rates| rates.backing)),
            Span::styled("   copied up ", dim()),
            Span::raw(rate(|rates| rates.copied_up)),
        ];
        Line::from(spans)
    }

    /// Returns a line for the server of each remote backing file, top first.
    fn sources(&self, disk: &DiskView) -> Vec<Line<'static>> {
        let count = disk.sources().count();
        let label = |index: usize| match count {
            1 => "source".to_owned(),
            _ => format!("source {}", index + 1),
        };
        let sources = disk.sources().filter(|_| disk.gone.is_none()).enumerate();
        sources.map(|(index, (of, rate))| self.source(&label(index), of, rate)).collect()
    }

    fn source(&self, label: &str, source: &SourceStatus, rate: Option<f64>) -> Line<'static> {
        let rate = rate.map_or("-".into(), per_second);
        let (label, value) = if self.wide {
            (format!("  {label:<width$}", width = LABEL - 2), 12)
        } else {
            (format!("  {label:<8}"), 10)
        };
        let mut spans = vec![Span::styled(label, dim())];
        if source.up {
            spans.push(Span::raw(format!("{:>value$}", "up")));
        } else {
            spans.push(Span::styled(format!("{:>value$}", "away"), alarm()));
        }
        match (source.up, self.wide) {
            (true, false) => spans.push(Span::raw(format!("  {rate}"))),
            (true, true) => {
                spans.extend([Span::styled("   fetched ", dim()), Span::raw(rate)]);
                let latency = units::time(source.latency_us as f64 * 1e3, "µ");
                spans.extend([Span::styled("   first byte ", dim()), Span::raw(latency)]);
            }
            (false, _) => {}
        }
        if self.wide {
            let retries = units::significant(source.retries as f64);
            spans.extend([Span::styled("   retries ", dim()), Span::raw(retries)]);
        }
        if !source.up {
            // The end of an error is its cause.
            let why = source.last_error.as_deref().unwrap_or("no answer");
            let taken: usize = spans.iter().map(Span::width).sum();
            let why = shortened(why, self.width.saturating_sub(taken + 3));
            spans.push(Span::styled(format!("   {why}"), alarm()));
        }
        Line::from(spans)
    }

    /// Returns the line with the number of failed requests, if there is one.
    fn failed(&self, disk: &DiskView) -> Option<Line<'static>> {
        let failed = disk.status().map(failed_since_start).filter(|&failed| failed > 0)?;
        let width = if self.wide { LABEL - 2 } else { 7 };
        Some(Line::from(vec![
            Span::styled(format!("  {:<width$}", "failed"), dim()),
            Span::styled(format!("{failed} requests since the start"), alarm()),
        ]))
    }

    /// Returns the line about the running job, or the last one.
    fn job(&self, disk: &DiskView) -> Vec<Line<'static>> {
        let label = |name: &str| {
            Span::styled(
                format!("  {name:<width$}", width = if self.wide { LABEL - 2 } else { 7 }),
                dim(),
            )
        };
        if let Some(why) = &disk.gone {
            return vec![Line::from(vec![label("gone"), Span::styled(one_line(why), alarm())])];
        }
        let Some(status) = disk.status() else {
            return vec![Line::from(vec![label("job"), Span::raw("-")])];
        };
        if status.has_failed() {
            return vec![Line::from(vec![label("failed"), Span::styled(FAILED, alarm())])];
        }
        let Some(job) = status.jobs.first() else {
            let text = status
                .last_job
                .as_ref()
                .map_or("none".into(), |last| format!("none; {}", last.in_words()));
            return vec![Line::from(vec![label("job"), Span::styled(one_line(&text), dim())])];
        };
        let numbers = self.job_numbers(status, job);
        let taken = numbers.chars().count() + if self.wide { LABEL } else { 9 } + 3;
        let bar = self.width.saturating_sub(taken).clamp(4, 40);
        let (full, empty) = bars::bar(job.offset, job.len, bar);
        vec![Line::from(vec![
            label(&job.kind),
            Span::styled(full, bar_filled()),
            Span::styled(empty, hollow()),
            Span::raw(format!("  {numbers}")),
        ])]
    }

    fn job_numbers(&self, status: &DiskStatus, job: &JobProgress) -> String {
        let mut parts = vec![units::percent(job.offset, job.len)];
        if job.is_paused() {
            parts.push("paused".into());
        } else {
            parts.extend(self.wide.then(|| units::rate(job.rate)));
            if let Some(seconds) = job.seconds_left {
                parts.push(format!("{} left", units::duration(Duration::from_secs(seconds))));
            }
        }
        if self.wide {
            let plan = status.plan.as_ref();
            match (plan.and_then(|plan| plan.finish_by.as_ref()), job.speed) {
                (Some(time), _) if plan.is_some_and(|plan| plan.feasible == Some(false)) => {
                    parts.push(format!("too late for {}", one_line(time)))
                }
                (Some(time), _) => parts.push(format!("by {}", one_line(time))),
                (None, 0) => {}
                (None, speed) => parts.push(format!("limit {}", units::rate(speed))),
            }
            if job.bytes_failed > 0 {
                parts.push(format!("{} failed", units::size(job.bytes_failed)));
            }
        }
        parts.join("  ")
    }

    fn map(&self, cells: &Cells, rows: usize, lines: &mut Vec<Line<'static>>) {
        let columns = self.width.saturating_sub(4);
        let looks: Vec<PictureStyle> =
            cells.stretched(columns * rows).iter().map(PictureStyle::of).collect();
        for row in looks.chunks(columns.max(1)) {
            let mut spans = vec![Span::raw("  ")];
            for run in row.chunk_by(|one, other| one.colours() == other.colours()) {
                spans.push(Span::styled(
                    run.iter().map(|look| look.block()).collect::<String>(),
                    painted(run[0]),
                ));
            }
            lines.push(Line::from(spans));
        }
    }

    fn legend(&self, sum: &Shares) -> Line<'static> {
        let mut spans = Vec::new();
        let parts = [
            (PictureStyle::Local, "local", sum.local),
            (PictureStyle::Zero, "zero", sum.zero),
            (PictureStyle::Remote { some_zero: false }, "remote", sum.remote),
        ];
        for ((look, name, bytes), percent) in parts.into_iter().zip(sum.percents()) {
            let numbers = if self.wide {
                format!(" {name} {} {percent}", units::size(bytes))
            } else {
                format!(" {name} {} %", units::whole_percent(bytes, sum.total().max(1)))
            };
            spans.extend([
                Span::raw(if self.wide { "  " } else { " " }),
                Span::styled(look.block().to_string(), painted(look)),
                Span::raw(numbers),
            ]);
        }
        Line::from(spans)
    }

    fn footer(&self, model: &Model) -> Vec<Line<'static>> {
        if model.help {
            return wrapped(&HELP, self.width)
                .into_iter()
                .map(|text| Line::from(Span::styled(text, dim())))
                .collect();
        }
        if let Some((message, _)) = &model.message {
            return vec![Line::from(Span::styled(format!("  {}", one_line(message)), bold()))];
        }
        let keys = wrapped(&KEYS, self.width).into_iter().next().unwrap_or_default();
        vec![Line::from(Span::styled(keys, dim()))]
    }
}

/// Returns the state of a disk in a word or two.
fn state(disk: &DiskView) -> (String, Style) {
    let Some(status) = disk.status().filter(|_| disk.gone.is_none()) else {
        return if disk.gone.is_some() { ("gone".into(), alarm()) } else { ("...".into(), dim()) };
    };
    if status.has_failed() {
        return ("failed".into(), alarm());
    }
    // A job says that it runs, also while it waits for the server.
    if status.sources.iter().any(|source| !source.up) {
        return ("source away".into(), alarm());
    }
    match status.jobs.first() {
        Some(job) if job.is_paused() => {
            (format!("paused {} %", units::whole_percent(job.offset, job.len)), bold())
        }
        Some(job) => (
            format!("{} {} %", one_line(&job.kind), units::whole_percent(job.offset, job.len)),
            plain(),
        ),
        None if status.last_job.as_ref().is_some_and(|last| last.result == "error") => {
            ("job failed".into(), alarm())
        }
        None => ("-".into(), dim()),
    }
}

fn painted(look: PictureStyle) -> Style {
    let (front, back) = look.colours();
    let style = plain().fg(colour(front));
    back.map_or(style, |back| style.bg(colour(back)))
}

pub(super) fn per_second(bytes: f64) -> String {
    units::rate(bytes.round() as u64)
}

fn count(number: f64) -> String {
    if number >= 10.0 {
        format!("{number:.0}")
    } else {
        units::significant((number * 10.0).round() / 10.0)
    }
}

/// Shortens a path or an error from the left, because its end matters more than its beginning.
fn shortened(name: &str, width: usize) -> String {
    let name = one_line(name);
    let length = name.chars().count();
    if length <= width {
        name
    } else {
        std::iter::once('…').chain(name.chars().skip(length + 1 - width)).collect()
    }
}

/// Joins the items into as few lines as fit `width`.
fn wrapped(items: &[&str], width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for item in items {
        let last = lines.last_mut().map_or(0, |line| line.chars().count());
        if last > 0 && last + 3 + item.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            line.push_str(if line.is_empty() { "  " } else { "   " });
            line.push_str(item);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::super::model::LastSeen;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn status(second: u64) -> DiskStatus {
        serde_json::from_value(json!({
            "pid": 1, "mountpoint": "/srv/vm.raw", "size": 1024 * MIB, "usable": true, "latency-bounds-ns": [1000, 1_000_000],
            "bytes": { "local": 512 * MIB, "zero": 256 * MIB, "remote": 256 * MIB },
            "requests": [
                { "kind": "read", "operations": 300 * second, "bytes": 12 * MIB * second, "total-time-ns": 300 * 120_000 * second,
                  "latency": [0, 300 * second, 0] },
                { "kind": "write", "operations": 8 * second, "bytes": MIB * second, "total-time-ns": 8 * 2_000_000 * second,
                  "latency": [0, 0, 8 * second] }],
            "hits": 290 * second, "misses": 10 * second, "backing-reads": { "bytes": 4 * MIB * second },
            "copied-up": { "bytes": 2 * MIB * second },
            "jobs": [{ "id": "drive0", "type": "stream", "status": "running", "speed": 50 * MIB, "offset": 460 * MIB, "len": 1024 * MIB,
                       "rate": 48 * MIB, "seconds-left": 130 }],
        }))
        .unwrap()
    }

    fn model() -> Model {
        let start = Instant::now();
        let mut disk = DiskView::new("x".into());
        for second in 0..5 {
            // The first half is local, the next quarter zero, the last quarter remote.
            let local = (0..1024).map(|cell| if cell < 512 { MIB } else { 0 }).collect();
            let zero =
                (0..1024).map(|cell| if (512..768).contains(&cell) { MIB } else { 0 }).collect();
            let cells = Cells::new(1024 * MIB, MIB, local, zero).unwrap();
            disk.see(Ok(LastSeen {
                status: status(second),
                cells: Some(cells),
                at: start + Duration::from_secs(second),
            }));
        }
        Model { disks: vec![disk], interval: 1.0, ..Model::default() }
    }

    fn text(model: &Model, width: usize, height: usize) -> Vec<String> {
        let lines = screen(model, width, height);
        assert_eq!(lines.len(), height);
        for line in &lines {
            assert!(
                line.width() <= width || line.to_string().starts_with("  no disk"),
                "{} of {width}: {line}",
                line.width()
            );
        }
        lines.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn everything_is_on_a_usual_screen() {
        let lines = text(&model(), 80, 24);
        let has = |what: &str| {
            assert!(lines.iter().any(|line| line.contains(what)), "{what:?}\n{}", lines.join("\n"))
        };
        has("cordisk top");
        has("every 1 s");
        has("/srv/vm.raw");
        has("12 MiB/s      300   120 µs   500 µs   990 µs");
        has("1 MiB/s        8     2 ms     1 ms     1 ms");
        has("hits          96.6 %   from backing files 4 MiB/s   copied up 2 MiB/s");
        has("44.9 %  48 MiB/s  2 min 10 s left  limit 50 MiB/s");
        has("█ local 512 MiB 50.0 %");
        has("· remote 256 MiB 25.0 %");
        has("q quit");
        // In the map, half of the characters are local, a quarter zero, and a quarter remote.
        let map: String = lines[12..22]
            .iter()
            .map(|line| format!("{:76}", line.chars().skip(2).collect::<String>()))
            .collect();
        let count = |c: char| map.chars().filter(|&other| other == c).count();
        assert_eq!((count('█'), count(' '), count('·')), (380, 190, 190), "{}", lines.join("\n"));
    }

    #[test]
    fn a_terminal_without_utf8_has_ascii() {
        for (width, height) in [(40, 10), (80, 24), (200, 60)] {
            let lines = screen(&model(), width, height);
            let plain = in_ascii(lines.clone());
            for (plain, line) in plain.iter().zip(&lines) {
                assert!(plain.to_string().is_ascii(), "{plain}");
                assert_eq!((plain.width(), plain.style), (line.width(), line.style));
            }
        }
        let mut model = model();
        model.help = true;
        assert!(in_ascii(screen(&model, 80, 24)).iter().all(|line| line.to_string().is_ascii()));
    }

    #[test]
    fn a_small_screen_has_what_matters() {
        let lines = text(&model(), 40, 10);
        let all = lines.join("\n");
        for what in [
            "/srv/vm.raw",
            "66 %",
            "12 MiB/s",
            "96.6 %",
            "44.9 %",
            "local 50 %",
            "remote 25 %",
            "q quit",
            "████",
        ] {
            assert!(all.contains(what), "{what:?}\n{all}");
        }
        for (width, height) in
            [(1, 1), (5, 3), (20, 6), (63, 19), (64, 20), (99, 13), (100, 14), (300, 100)]
        {
            screen(&model(), width, height);
        }
    }

    #[test]
    fn the_chosen_disk_is_in_the_list() {
        let mut model = model();
        model.disks.extend((0..30).map(|n| DiskView::new(format!("/srv/disk{n}"))));
        assert!(text(&model, 80, 24)[3].starts_with("▸ /srv/vm.raw"));
        model.selected = 20;
        let lines = text(&model, 80, 24);
        assert!(lines.iter().any(|line| line.starts_with("▸ /srv/disk19")), "{}", lines.join("\n"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut model = model();
        model.disks[0].see(Err("the daemon has ended".into()));
        let lines = text(&model, 80, 24).join("\n");
        assert!(lines.contains("gone") && lines.contains("the daemon has ended"), "{lines}");
        let mut failed = status(9);
        failed.requests[0].failed = 3;
        for _ in 0..2 {
            let (status, at) = (failed.clone(), Instant::now());
            model.disks[0].see(Ok(LastSeen { status, cells: None, at }));
            let lines = text(&model, 80, 24).join("\n");
            assert!(lines.contains("3 requests since the start"), "also if none is new: {lines}");
        }
        failed.usable = Some(false);
        model.disks[0].see(Ok(LastSeen { status: failed, cells: None, at: Instant::now() }));
        assert!(text(&model, 80, 24).join("\n").contains("cordisk check"));
        let mut paused = status(9);
        paused.jobs[0].status = "paused".into();
        model.disks[0].see(Ok(LastSeen { status: paused, cells: None, at: Instant::now() }));
        assert!(text(&model, 80, 24).join("\n").contains("44.9 %  paused  limit 50 MiB/s"));
        assert!(text(&Model::default(), 80, 24).join("\n").contains("cordisk mount"));
        model.help = true;
        assert!(text(&model, 40, 24).join("\n").contains("p: pause or resume its job"));
    }

    /// Protects: the line of a server fits the screen, and says why the server is away.
    #[test]
    fn the_servers_are_on_the_screen() {
        let mut model = model();
        let start = Instant::now();
        let mut now = status(9);
        let mut look = |model: &mut Model, sources: serde_json::Value, second: u64| {
            now.sources = serde_json::from_value(sources).unwrap();
            let at = start + Duration::from_secs(second);
            model.disks[0].see(Ok(LastSeen { status: now.clone(), cells: None, at }));
        };
        let up = |bytes: u64| json!({ "name": "s3://golden/1", "up": true, "fetched-bytes": bytes, "latency-us": 123_456, "retries": 123 });
        look(&mut model, json!([up(0)]), 0);
        look(&mut model, json!([up((0.977 * MIB as f64) as u64)]), 1);
        let lines = text(&model, 80, 24);
        let want = "  source            up   fetched 0.977 MiB/s   first byte 123 ms   retries 123";
        assert!(lines.iter().any(|line| line == want), "{}", lines.join("\n"));
        let lines = text(&model, 40, 10);
        assert!(
            lines.iter().any(|line| line == "  source          up  0.977 MiB/s"),
            "{}",
            lines.join("\n")
        );
        let away = json!({ "name": "s3://golden/2", "up": false, "retries": 7,
                           "last-error": "s3://golden/2: connect: connection refused by peer at 127.0.0.1:9000" });
        look(&mut model, json!([up(MIB), away]), 2);
        let lines = text(&model, 80, 24);
        for want in [
            "  source 1          up   fetched 23.6 KiB/s   first byte 123 ms   retries 123",
            "  source 2        away   retries 7   …nnection refused by peer at 127.0.0.1:9000",
        ] {
            assert!(lines.iter().any(|line| line == want), "{want}\n{}", lines.join("\n"));
        }
        assert!(lines[3].ends_with("source away"), "{}", lines[3]);
        assert!(
            text(&model, 40, 10).iter().any(|line| line.starts_with("  source 2      away   …"))
        );
        model.disks[0].see(Err("the daemon has ended".into()));
        assert!(!text(&model, 80, 24).join("\n").contains("source"));
    }

    #[test]
    fn long_names_lose_their_beginning() {
        assert_eq!(shortened("/srv/vm.raw", 11), "/srv/vm.raw");
        assert_eq!(shortened("/srv/images/vm.raw", 8), "…/vm.raw");
        assert_eq!(shortened("/a\u{1b}[31m", 40), "/a\\u{1b}[31m");
    }
}
