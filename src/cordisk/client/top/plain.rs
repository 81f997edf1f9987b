//! The output of `top` without a terminal: the same numbers, one snapshot, ASCII.

use std::fmt::Write;
use std::time::Duration;

use super::model::{DiskView, FAILED};
use super::rates::{Flow, failed_since_start};
use super::screen::per_second;
use crate::client::facts::{self, InWords};
use crate::map::units;
use control::facts::{DiskStatus, SourceStatus};
use host::error::one_line;

/// Formats one disk.
pub(super) fn snapshot(disk: &DiskView) -> String {
    let mut text = format!("{}\n", one_line(&disk.name));
    let mut line = |name: &str, words: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {name:<8}{}", one_line(&words));
    };
    if let Some(why) = &disk.gone {
        line("gone", why.clone());
        return text;
    }
    let Some(status) = disk.status() else { return text };
    line("image", status.image.clone());
    line("size", format!("{} ({} bytes)", units::size(status.size), status.size));
    if let Some(sum) = facts::shares(status) {
        for ((name, bytes), percent) in
            [("local", sum.local), ("zero", sum.zero), ("remote", sum.remote)]
                .into_iter()
                .zip(sum.percents())
        {
            line(name, format!("{} ({percent})", units::size(bytes)));
        }
    }
    if let Some(rates) = &disk.rates {
        line("read", flow(&rates.read));
        line("write", flow(&rates.write));
        line(
            "flush",
            format!("{} op/s{}", units::significant(rates.flush.operations), latency(&rates.flush)),
        );
        let hits = rates.hit_ratio().unwrap_or_else(|| "no reads".into());
        line(
            "hits",
            format!(
                "{hits}, from backing files {}, copied up {}",
                per_second(rates.backing),
                per_second(rates.copied_up)
            ),
        );
    }
    for (of, rate) in disk.sources() {
        line("source", source(of, rate));
    }
    match failed_since_start(status) {
        0 => {}
        failed => line("failed", format!("{failed} requests since the start")),
    }
    for (name, words) in jobs(status) {
        line(&name, words);
    }
    text
}

fn flow(flow: &Flow) -> String {
    format!(
        "{}, {} op/s{}",
        per_second(flow.bytes),
        units::significant(flow.operations),
        latency(flow)
    )
}

fn latency(flow: &Flow) -> String {
    flow.latency.map_or(String::new(), |latency| {
        let time = |value| units::time(value, "u");
        format!(
            ", mean {}, p50 {}, p99 {}",
            time(latency.mean),
            time(latency.median),
            time(latency.p99)
        )
    })
}

/// What the server of a remote backing file does.
fn source(source: &SourceStatus, rate: Option<f64>) -> String {
    let retries = units::number(source.retries);
    if !source.up {
        let why = source.last_error.as_deref().unwrap_or("no answer");
        return format!("away, {retries} retries: {why}");
    }
    format!(
        "up, fetched {}{}, first byte after {}, {retries} retries",
        units::size(source.fetched_bytes),
        rate.map_or(String::new(), |rate| format!(" ({})", per_second(rate))),
        units::time(source.latency_us as f64 * 1e3, "u"),
    )
}

fn jobs(status: &DiskStatus) -> Vec<(String, String)> {
    if status.has_failed() {
        return vec![("failed".into(), FAILED.into())];
    }
    if let Some(job) = status.jobs.first() {
        let mut words = units::percent(job.offset, job.len);
        if job.is_paused() {
            words += ", paused";
        } else {
            words += &format!(", {}", units::rate(job.rate));
            words += &job.seconds_left.map_or(String::new(), |seconds| {
                format!(", {} left", units::duration(Duration::from_secs(seconds)))
            });
        }
        if job.speed > 0 {
            words += &format!(", limit {}", units::rate(job.speed));
        }
        if let Some(plan) = &status.plan {
            words += &plan
                .finish_by
                .as_ref()
                .map_or(String::new(), |time| format!(", to be done by {time}"));
            words += if plan.feasible == Some(false) { " (which it cannot)" } else { "" };
        }
        return vec![(job.kind.clone(), words)];
    }
    vec![(
        "job".into(),
        status.last_job.as_ref().map_or("none".into(), |last| format!("none; {}", last.in_words())),
    )]
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::super::model::LastSeen;
    use super::*;

    #[test]
    fn a_snapshot_has_the_numbers_in_ascii() {
        let start = Instant::now();
        let mut disk = DiskView::new("x".into());
        for second in 0..2 {
            let status = serde_json::from_value(json!({
                "pid": 1, "mountpoint": "/srv/vm.raw", "image": "/srv/vm\u{1b}.qcow2", "size": 4096, "usable": true,
                "bytes": { "local": 1024, "zero": 0, "remote": 3072 }, "latency-bounds-ns": [1000, 2000], "hits": second,
                "requests": [{ "kind": "read", "operations": 4 * second, "bytes": 2048 * second, "total-time-ns": 6000 * second,
                               "latency": [0, 4 * second, 0] }],
                "jobs": [{ "type": "stream", "status": "running", "offset": 1, "len": 3, "rate": 1024, "seconds-left": 75, "speed": 2048 }],
            }))
            .unwrap();
            disk.see(Ok(LastSeen { status, cells: None, at: start + Duration::from_secs(second) }));
        }
        let text = snapshot(&disk);
        assert_eq!(
            text,
            "/srv/vm.raw\n  image   /srv/vm\\u{1b}.qcow2\n  size    4 KiB (4096 bytes)\n  local   1 KiB (25.0 %)\n  zero    0 B (0.0 %)\n  \
             remote  3 KiB (75.0 %)\n  read    2 KiB/s, 4 op/s, mean 1.5 us, p50 1.5 us, p99 1.99 us\n  write   0 B/s, 0 op/s\n  \
             flush   0 op/s\n  hits    100 %, from backing files 0 B/s, copied up 0 B/s\n  \
             stream  33.3 %, 1 KiB/s, 1 min 15 s left, limit 2 KiB/s\n"
        );
        assert!(text.is_ascii());
        let mut status = disk.status().unwrap().clone();
        status.sources = serde_json::from_value(json!([
            { "name": "s3://a/1", "up": true, "fetched-bytes": 3 << 20, "latency-us": 12_300, "retries": 2 },
            { "name": "s3://a/2", "last-error": "s3://a/2: connection\u{1b} refused", "retries": 1234 },
        ]))
        .unwrap();
        for second in 2..4 {
            status.sources[0].fetched_bytes += 1 << 20;
            let (status, at) = (status.clone(), start + Duration::from_secs(second));
            disk.see(Ok(LastSeen { status, cells: None, at }));
        }
        let text = snapshot(&disk);
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("  source")).collect();
        assert_eq!(
            lines,
            [
                "  source  up, fetched 5 MiB (1 MiB/s), first byte after 12.3 ms, 2 retries",
                "  source  away, 1 234 retries: s3://a/2: connection\\u{1b} refused",
            ]
        );
        assert!(text.is_ascii());
        disk.see(Err("the daemon has ended".into()));
        assert_eq!(snapshot(&disk), "/srv/vm.raw\n  gone    the daemon has ended\n");
    }
}
