//! The output of `top --json`: the activity during one interval, in numbers for programs.

use control::facts::SourceStatus;
use serde_json::{Value, json};

use super::model::DiskView;
use super::rates::{Flow, failed_since_start};

/// Returns an array with an object for each disk.
pub(super) fn snapshot<'a>(disks: impl Iterator<Item = &'a DiskView>) -> Value {
    disks.map(disk).collect()
}

fn disk(disk: &DiskView) -> Value {
    let mut value = json!({ "mountpoint": disk.name });
    if let Some(why) = &disk.gone {
        value["error"] = why.as_str().into();
        return value;
    }
    if let Some(status) = disk.status() {
        value["image"] = status.image.as_str().into();
        value["size"] = status.size.into();
        value["failed-since-start"] = failed_since_start(status).into();
        if let Some(sum) = status.bytes {
            value["bytes"] = json!({ "local": sum.local, "zero": sum.zero, "remote": sum.remote });
        }
        let sources: Vec<Value> = disk.sources().map(|(of, rate)| source(of, rate)).collect();
        if !sources.is_empty() {
            value["sources"] = sources.into();
        }
        if let Some(job) = status.jobs.first() {
            value["job"] = json!({
                "id": job.id, "type": job.kind, "status": job.status, "speed": job.speed, "offset": job.offset, "len": job.len,
                "rate": job.rate,
            });
            if let Some(seconds) = job.seconds_left {
                value["job"]["seconds-left"] = seconds.into();
            }
        }
    }
    if let Some(rates) = &disk.rates {
        for (name, of_kind) in
            [("read", &rates.read), ("write", &rates.write), ("flush", &rates.flush)]
        {
            value[name] = flow(of_kind);
        }
        value["reads"] = rates.reads.into();
        value["hits"] = rates.hits.into();
        value["backing-bytes-per-second"] = rates.backing.into();
        value["copied-up-bytes-per-second"] = rates.copied_up.into();
    }
    value
}

/// The members of `sources` of `x-query-status`, and the rate.
fn source(source: &SourceStatus, rate: Option<f64>) -> Value {
    let mut value = json!(source);
    if let Some(rate) = rate {
        value["fetched-bytes-per-second"] = rate.into();
    }
    value
}

fn flow(flow: &Flow) -> Value {
    let mut value =
        json!({ "bytes-per-second": flow.bytes, "operations-per-second": flow.operations });
    if let Some(latency) = flow.latency {
        value["latency-ns"] =
            json!({ "mean": latency.mean, "p50": latency.median, "p99": latency.p99 });
    }
    value
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::model::LastSeen;
    use super::*;

    #[test]
    fn a_snapshot_has_what_went_on() {
        let start = Instant::now();
        let mut view = DiskView::new("x".into());
        for second in 0..2 {
            let status = serde_json::from_value(json!({
                "pid": 1, "mountpoint": "/srv/vm.raw", "image": "/srv/vm.qcow2", "size": 4096,
                "bytes": { "local": 1024, "zero": 0, "remote": 3072 }, "latency-bounds-ns": [1000, 2000], "hits": second,
                "requests": [{ "kind": "read", "operations": 4 * second, "bytes": 2048 * second, "total-time-ns": 6000 * second,
                               "failed": 3, "latency": [0, 4 * second, 0] }],
                "sources": [{ "name": "s3://a/1", "up": true, "fetched-bytes": 512 * second, "retries": 2 }],
                "jobs": [{ "id": "d", "type": "stream", "status": "running", "offset": 1, "len": 3, "seconds-left": 75 }],
            }))
            .unwrap();
            view.see(Ok(LastSeen { status, cells: None, at: start + Duration::from_secs(second) }));
        }
        let shown = snapshot([&view].into_iter());
        assert_eq!(
            (&shown[0]["mountpoint"], &shown[0]["size"]),
            (&json!("/srv/vm.raw"), &json!(4096))
        );
        assert_eq!(
            (&shown[0]["read"]["bytes-per-second"], &shown[0]["read"]["latency-ns"]["mean"]),
            (&json!(2048.0), &json!(1500.0))
        );
        assert_eq!(
            (&shown[0]["job"]["seconds-left"], &shown[0]["bytes"]["remote"]),
            (&json!(75), &json!(3072))
        );
        assert_eq!(
            shown[0]["sources"],
            json!([{
                "name": "s3://a/1", "up": true, "fetched-bytes": 512, "requests": 0, "retries": 2, "latency-us": 0,
                "cached-bytes": 0, "fetched-bytes-per-second": 512.0,
            }])
        );
        assert_eq!(shown[0]["failed-since-start"], json!(3), "although none has failed meanwhile");
        assert!(shown[0]["write"]["latency-ns"].is_null(), "there were no writes: {shown}");
        view.see(Err("the daemon has ended".into()));
        assert_eq!(
            snapshot([&view].into_iter()),
            json!([{ "mountpoint": "/srv/vm.raw", "error": "the daemon has ended" }])
        );
        assert_eq!(snapshot(std::iter::empty()), json!([]));
    }
}
