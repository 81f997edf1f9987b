//! The activity of a disk between two answers of its daemon.

use crate::map::units;
use control::facts::{DiskStatus, RequestFacts, SourceStatus};

/// The activity between two answers; rates are per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub read: Flow,
    pub write: Flow,
    pub flush: Flow,
    /// Number of reads of the guest between the answers.
    pub reads: u64,
    /// How many of these reads the overlay answered alone.
    pub hits: u64,
    /// Bytes per second read from the backing chain.
    pub backing: f64,
    /// Bytes per second copied up by reads.
    pub copied_up: f64,
}

/// The requests of one kind, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Flow {
    pub bytes: f64,
    pub operations: f64,
    /// `None` if there were no such requests.
    pub latency: Option<LatencyRate>,
}

/// Duration of requests, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct LatencyRate {
    pub mean: f64,
    pub median: f64,
    pub p99: f64,
}

impl Rates {
    /// Returns the percentage of reads that were hits; `None` if there were no reads.
    pub fn hit_ratio(&self) -> Option<String> {
        (self.reads > 0).then(|| units::percent(self.hits, self.reads))
    }

    /// Returns the activity in the `seconds` between two answers; `None` if the second answer is
    /// from another process.
    pub fn between(before: &DiskStatus, after: &DiskStatus, seconds: f64) -> Option<Rates> {
        if before.pid != after.pid || seconds <= 0.0 {
            return None;
        }
        let per_second = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
        let kinds = |kind: &str| (of_kind(before, kind), of_kind(after, kind));
        let flow = |kind: &str| {
            let (before, now) = kinds(kind);
            Flow {
                bytes: per_second(before.bytes, now.bytes),
                operations: per_second(before.operations, now.operations),
                latency: latency(&before, &now, &after.latency_bounds_ns),
            }
        };
        let (hits, misses) =
            (after.hits.saturating_sub(before.hits), after.misses.saturating_sub(before.misses));
        Some(Rates {
            read: flow("read"),
            write: flow("write"),
            flush: flow("flush"),
            reads: hits.saturating_add(misses),
            hits,
            backing: per_second(before.backing_reads.bytes, after.backing_reads.bytes),
            copied_up: per_second(before.copied_up.bytes, after.copied_up.bytes),
        })
    }
}

/// Returns the bytes per second that the server of each remote backing file has sent between two
/// answers, in the order of `after`. `None` if it is not known: the file was not there before, or
/// the fetcher was started anew and counts from 0.
pub(super) fn fetched(before: &DiskStatus, after: &DiskStatus, seconds: f64) -> Vec<Option<f64>> {
    let past = |index: usize, name: &str| {
        before.sources.get(index).filter(|source| source.name == name && before.pid == after.pid)
    };
    let rate = |(index, now): (usize, &SourceStatus)| {
        let bytes = now.fetched_bytes.checked_sub(past(index, &now.name)?.fetched_bytes)?;
        (seconds > 0.0).then(|| bytes as f64 / seconds)
    };
    after.sources.iter().enumerate().map(rate).collect()
}

/// Returns the number of failed requests of the guest since the daemon's start. It is not a number
/// of one interval, because a failure must not be missed between two looks.
pub(super) fn failed_since_start(status: &DiskStatus) -> u64 {
    status.requests.iter().fold(0, |sum, requests| sum.saturating_add(requests.failed))
}

fn of_kind(status: &DiskStatus, kind: &str) -> RequestFacts {
    status.requests.iter().find(|requests| requests.kind == kind).cloned().unwrap_or_default()
}

fn latency(before: &RequestFacts, after: &RequestFacts, bounds: &[u64]) -> Option<LatencyRate> {
    let operations = after.operations.saturating_sub(before.operations);
    if operations == 0 {
        return None;
    }
    let counts: Vec<u64> = after
        .latency
        .iter()
        .enumerate()
        .map(|(index, count)| count.saturating_sub(before.latency.get(index).copied().unwrap_or(0)))
        .collect();
    let mean = after.total_time_ns.saturating_sub(before.total_time_ns) as f64 / operations as f64;
    Some(LatencyRate {
        mean,
        median: quantile(0.5, &counts, bounds).unwrap_or(mean),
        p99: quantile(0.99, &counts, bounds).unwrap_or(mean),
    })
}

/// Returns the duration, in nanoseconds, below which the given part of the requests stayed. Within
/// a class of the histogram it interpolates as Prometheus does, as if durations were evenly
/// distributed. Beyond the last bound it returns that bound.
fn quantile(part: f64, counts: &[u64], bounds: &[u64]) -> Option<f64> {
    let total: u64 = counts.iter().fold(0, |sum, count| sum.saturating_add(*count));
    if total == 0 || bounds.is_empty() {
        return None;
    }
    let wanted = part * total as f64;
    let mut below = 0.0;
    for (index, &count) in counts.iter().enumerate() {
        let count = count as f64;
        if below + count >= wanted && count > 0.0 {
            let Some(&upper) = bounds.get(index) else { break };
            let lower = index.checked_sub(1).map_or(0, |index| bounds[index]);
            return Some(
                lower as f64 + (upper.saturating_sub(lower)) as f64 * ((wanted - below) / count),
            );
        }
        below += count;
    }
    bounds.last().map(|&last| last as f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(value: serde_json::Value) -> DiskStatus {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn rates_are_differences_by_time() {
        let before = status(
            json!({ "pid": 7, "latency-bounds-ns": [1000, 2000], "hits": 10, "misses": 5, "backing-reads": { "bytes": 100 },
            "requests": [{ "kind": "read", "operations": 100, "bytes": 1000, "total-time-ns": 5000, "latency": [90, 10, 0] }] }),
        );
        let after = status(
            json!({ "pid": 7, "latency-bounds-ns": [1000, 2000], "hits": 13, "misses": 6, "backing-reads": { "bytes": 300 },
            "copied-up": { "bytes": 50 }, "requests": [
            { "kind": "read", "operations": 104, "bytes": 5000, "total-time-ns": 11000, "failed": 3, "latency": [92, 12, 0] },
            { "kind": "write", "operations": 2, "bytes": 10, "total-time-ns": 100000, "failed": 1, "latency": [0, 0, 2] }] }),
        );
        let rates = Rates::between(&before, &after, 2.0).unwrap();
        assert_eq!((rates.read.bytes, rates.read.operations), (2000.0, 2.0));
        // Two below 1000 ns, two between 1000 and 2000: half of them below 1000, 99 % below 1980.
        let latency = rates.read.latency.unwrap();
        assert_eq!((latency.mean, latency.median), (1500.0, 1000.0));
        assert!((latency.p99 - 1980.0).abs() < 1e-6, "{latency:?}");
        assert_eq!(
            rates.write.latency.unwrap(),
            LatencyRate { mean: 50_000.0, median: 2000.0, p99: 2000.0 },
            "beyond the last bound"
        );
        assert_eq!((rates.flush, rates.hits, rates.reads), (Flow::default(), 3, 4));
        assert_eq!((rates.backing, rates.copied_up), (100.0, 25.0));
        assert_eq!(failed_since_start(&after), 4);
    }

    #[test]
    fn each_source_has_a_rate_of_its_own() {
        let sources = |pid: u32, list: &[(&str, u64)]| {
            let list: Vec<_> = list
                .iter()
                .map(|(name, bytes)| json!({ "name": name, "fetched-bytes": bytes }))
                .collect();
            status(json!({ "pid": pid, "sources": list }))
        };
        let before = sources(7, &[("s3://a/1", 100), ("s3://a/2", 900), ("s3://a/3", 5)]);
        let after = sources(7, &[("s3://a/1", 300), ("s3://a/2", 10), ("s3://a/x", 9)]);
        assert_eq!(
            fetched(&before, &after, 2.0),
            [Some(100.0), None, None],
            "one goes on, one was started anew, one is another file"
        );
        assert_eq!(fetched(&before, &after, 0.0), [None; 3]);
        assert_eq!(fetched(&before, &sources(8, &[("s3://a/1", 300)]), 2.0), [None]);
        assert_eq!(fetched(&before, &sources(7, &[]), 2.0), []);
    }

    #[test]
    fn another_process_has_no_past() {
        let one = status(json!({ "pid": 7, "hits": 10 }));
        assert_eq!(Rates::between(&one, &status(json!({ "pid": 8, "hits": 20 })), 1.0), None);
        assert_eq!(Rates::between(&one, &one, 0.0), None);
        assert_eq!(Rates::between(&one, &one, 1.0).unwrap().reads, 0);
        assert_eq!(
            Rates::between(&one, &status(json!({ "pid": 7, "hits": 3 })), 1.0).unwrap().reads,
            0,
            "never less than nothing"
        );
    }
}
