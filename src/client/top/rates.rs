//! What has happened on a disk between two answers of its daemon.

use crate::client::facts::{Facts, Requests};
use crate::map::units;

/// What went on between two answers, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub read: Flow,
    pub write: Flow,
    pub flush: Flow,
    /// How many times the guest has read, in all.
    pub reads: u64,
    /// How many of these reads were answered from the overlay alone.
    pub hits: u64,
    /// Bytes per second from the backing chain.
    pub backing: f64,
    /// Bytes per second that reads have copied up.
    pub copied_up: f64,
    /// Requests of the guest that failed, in all.
    pub failed: u64,
}

/// Requests of one kind, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Flow {
    pub bytes: f64,
    pub operations: f64,
    /// `None` where there were none.
    pub latency: Option<Latency>,
}

/// How long requests took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Latency {
    pub mean: f64,
    pub median: f64,
    pub p99: f64,
}

impl Rates {
    /// Part of the reads that were hits; `None` where there were no reads.
    pub fn hit_ratio(&self) -> Option<String> {
        (self.reads > 0).then(|| units::percent(self.hits, self.reads))
    }

    /// What has happened in the `seconds` between two answers; `None` where the second one is not of the same process.
    pub fn between(before: &Facts, after: &Facts, seconds: f64) -> Option<Rates> {
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
        let (hits, misses) = (after.hits.saturating_sub(before.hits), after.misses.saturating_sub(before.misses));
        Some(Rates {
            read: flow("read"),
            write: flow("write"),
            flush: flow("flush"),
            reads: hits.saturating_add(misses),
            hits,
            backing: per_second(before.backing_reads.bytes, after.backing_reads.bytes),
            copied_up: per_second(before.copied_up.bytes, after.copied_up.bytes),
            failed: after.requests.iter().fold(0, |sum: u64, requests| sum.saturating_add(requests.failed)),
        })
    }
}

fn of_kind(status: &Facts, kind: &str) -> Requests {
    status.requests.iter().find(|requests| requests.kind == kind).cloned().unwrap_or_default()
}

fn latency(before: &Requests, after: &Requests, bounds: &[u64]) -> Option<Latency> {
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
    Some(Latency { mean, median: quantile(0.5, &counts, bounds).unwrap_or(mean), p99: quantile(0.99, &counts, bounds).unwrap_or(mean) })
}

/// The time that the given part of the requests stayed below, in nanoseconds: where in its class that lies is guessed as Prometheus guesses it, as if
/// the class were evenly filled. Beyond the last bound nothing is known but that.
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
            return Some(lower as f64 + (upper.saturating_sub(lower)) as f64 * ((wanted - below) / count));
        }
        below += count;
    }
    bounds.last().map(|&last| last as f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(value: serde_json::Value) -> Facts {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn rates_are_differences_by_time() {
        let before =
            status(json!({ "pid": 7, "latency-bounds-ns": [1000, 2000], "hits": 10, "misses": 5, "backing-reads": { "bytes": 100 },
            "requests": [{ "kind": "read", "operations": 100, "bytes": 1000, "total-time-ns": 5000, "latency": [90, 10, 0] }] }));
        let after =
            status(json!({ "pid": 7, "latency-bounds-ns": [1000, 2000], "hits": 13, "misses": 6, "backing-reads": { "bytes": 300 },
            "copied-up": { "bytes": 50 }, "requests": [
            { "kind": "read", "operations": 104, "bytes": 5000, "total-time-ns": 11000, "failed": 3, "latency": [92, 12, 0] },
            { "kind": "write", "operations": 2, "bytes": 10, "total-time-ns": 100000, "failed": 1, "latency": [0, 0, 2] }] }));
        let rates = Rates::between(&before, &after, 2.0).unwrap();
        assert_eq!((rates.read.bytes, rates.read.operations), (2000.0, 2.0));
        // Two below 1000 ns, two between 1000 and 2000: half of them below 1000, 99 % below 1980.
        let latency = rates.read.latency.unwrap();
        assert_eq!((latency.mean, latency.median), (1500.0, 1000.0));
        assert!((latency.p99 - 1980.0).abs() < 1e-6, "{latency:?}");
        assert_eq!(rates.write.latency.unwrap(), Latency { mean: 50_000.0, median: 2000.0, p99: 2000.0 }, "beyond the last bound");
        assert_eq!((rates.flush, rates.hits, rates.reads), (Flow::default(), 3, 4));
        assert_eq!((rates.backing, rates.copied_up, rates.failed), (100.0, 25.0, 4));
    }

    #[test]
    fn another_process_has_no_past() {
        let one = status(json!({ "pid": 7, "hits": 10 }));
        assert_eq!(Rates::between(&one, &status(json!({ "pid": 8, "hits": 20 })), 1.0), None);
        assert_eq!(Rates::between(&one, &one, 0.0), None);
        assert_eq!(Rates::between(&one, &one, 1.0).unwrap().reads, 0);
        assert_eq!(Rates::between(&one, &status(json!({ "pid": 7, "hits": 3 })), 1.0).unwrap().reads, 0, "never less than nothing");
    }
}
