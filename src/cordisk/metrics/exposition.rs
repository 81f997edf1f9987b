//! The metrics and their names. The names are an interface, because dashboards and alerts use them.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, MetricEncoder, NoLabelSet, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use control::facts::SourceStatus;
use control::{SourceStatuses, TakeoverSource};
use engine::disk::{Disk, DiskStats, LATENCY_BOUNDS, RequestCount};
use engine::job::{Completed, JobInfo, Jobs, Status};

/// Sources of the metrics.
#[derive(Clone)]
pub struct Source {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Jobs of the disk.
    pub jobs: Jobs,
    /// Name of the disk: a label of all metrics.
    pub device: String,
    /// Path at which the disk is mounted.
    pub mountpoint: PathBuf,
    /// When the disk was mounted.
    pub started: SystemTime,
    /// The servers of remote backing files.
    pub remote: SourceStatuses,
    /// What happens if this process is killed.
    pub takeover: TakeoverSource,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Source {
    /// Returns all metrics in the text format of OpenMetrics.
    pub(super) fn exposition(&self) -> Result<String, fmt::Error> {
        let mut registry =
            Registry::with_labels([("device".into(), self.device.clone().into())].into_iter());
        registry.register_collector(Box::new(self.clone()));
        let mut out = String::new();
        text::encode(&mut out, &registry)?;
        Ok(out)
    }
}

impl Collector for Source {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let stats = self.disk.stats();
        let mut page = MetricsPage(encoder);
        self.what_it_is(&mut page)?;
        requests(&mut page, &stats)?;
        copies(&mut page, &stats)?;
        self.contents(&mut page)?;
        page.counter(
            "cordisk_commits",
            "Passes that wrote metadata back to the image",
            None,
            &[(NONE, stats.commits)],
        )?;
        page.gauge(
            "cordisk_storage_failed",
            "Whether the image failed for good, 0 or 1: nothing is written any more until it is mounted again",
            None,
            &[(NONE, u64::from(!self.disk.is_usable()))],
        )?;
        self.takeovers(&mut page)?;
        self.servers(&mut page)?;
        self.jobs(&mut page)
    }
}

/// Labels of one sample, in addition to the common ones.
type Labels<'a> = [(&'a str, &'a str); 1];

/// Marks a sample without labels.
const NONE: Labels<'static> = [("", "")];

impl Source {
    fn what_it_is(&self, page: &mut MetricsPage<'_>) -> fmt::Result {
        page.info("cordisk_build", "The program", &[("version", env!("CARGO_PKG_VERSION"))])?;
        // Asks for the size of an open file. If that fails, the other metrics are still reported.
        if let Ok(info) = self.disk.info() {
            let (image, mountpoint) =
                (info.path.to_string_lossy(), self.mountpoint.to_string_lossy());
            page.info(
                "cordisk_disk",
                "The disk",
                &[("image", &image), ("mountpoint", &mountpoint)],
            )?;
            page.gauge(
                "cordisk_disk_size",
                "Virtual size of the disk",
                Some(&Unit::Bytes),
                &[(NONE, info.size)],
            )?;
            let allocated = [(NONE, info.allocated_size)];
            page.gauge(
                "cordisk_image_allocated",
                "Space that the image takes on the host",
                Some(&Unit::Bytes),
                &allocated,
            )?;
        }
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        page.gauge(
            "cordisk_start_time",
            "When the disk was mounted, in Unix time",
            Some(&Unit::Seconds),
            &[(NONE, started)],
        )
    }

    /// Allocation of the disk, from the tables of the overlay alone.
    fn contents(&self, page: &mut MetricsPage<'_>) -> fmt::Result {
        let Ok(totals) = self.disk.totals() else { return Ok(()) };
        let states = [
            ([("state", "local")], totals.local),
            ([("state", "zero")], totals.zero),
            ([("state", "remote")], totals.remote),
        ];
        page.gauge(
            "cordisk_disk",
            "What the disk is made of: here, zero, or still in the backing file",
            Some(&Unit::Bytes),
            &states,
        )
    }

    fn takeovers(&self, page: &mut MetricsPage<'_>) -> fmt::Result {
        let facts = (self.takeover)();
        page.counter(
            "cordisk_takeovers",
            "How often another process took the disk over after a kill, since it was mounted",
            None,
            &[(NONE, facts.count)],
        )?;
        page.gauge(
            "cordisk_survives_kill",
            "Whether another process takes the disk over if its process is killed, 0 or 1",
            None,
            &[(NONE, u64::from(facts.possible))],
        )?;
        let Some(last) = facts.last else { return Ok(()) };
        let last = last.time().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        page.gauge(
            "cordisk_last_takeover_time",
            "When the disk was taken over the last time, in Unix time",
            Some(&Unit::Seconds),
            &[(NONE, last)],
        )
    }

    /// The servers of remote backing files; none without such files.
    fn servers(&self, page: &mut MetricsPage<'_>) -> fmt::Result {
        let sources = (self.remote)();
        if sources.is_empty() {
            return Ok(());
        }
        let each = |number: fn(&SourceStatus) -> u64| -> Vec<(Labels<'_>, u64)> {
            sources.iter().map(|source| ([("source", &*source.name)], number(source))).collect()
        };
        page.gauge(
            "cordisk_source_up",
            "Whether the server of a remote backing file answers, 0 or 1",
            None,
            &each(|source| u64::from(source.up)),
        )?;
        page.counter(
            "cordisk_source_fetched",
            "What the server has sent",
            Some(&Unit::Bytes),
            &each(|source| source.fetched_bytes),
        )?;
        page.counter(
            "cordisk_source_requests",
            "Requests to the server",
            None,
            &each(|source| source.requests),
        )?;
        page.counter(
            "cordisk_source_retries",
            "Requests that were made again after a failure",
            None,
            &each(|source| source.retries),
        )?;
        page.gauge(
            "cordisk_source_cached",
            "What the cache holds of the file",
            Some(&Unit::Bytes),
            &each(|source| source.cached_bytes),
        )
    }

    fn jobs(&self, page: &mut MetricsPage<'_>) -> fmt::Result {
        let running = self.jobs.query();
        let is_running = running.iter().any(|job| job.status != Status::Concluded);
        let is_paused = running.iter().any(|job| job.paused);
        page.gauge(
            "cordisk_job_running",
            "Whether there is a job, 0 or 1",
            None,
            &[(NONE, u64::from(is_running))],
        )?;
        page.gauge(
            "cordisk_job_paused",
            "Whether it is paused, 0 or 1",
            None,
            &[(NONE, u64::from(is_paused))],
        )?;
        // The newest job; if there is none, the last job that ended.
        if let Some(job) = running.into_iter().next().or_else(|| self.jobs.last()) {
            of_job(page, &job)?;
        }
        let Completed { successful, failed, cancelled } = self.jobs.completed();
        let results = [
            ([("result", "success")], successful),
            ([("result", "error")], failed),
            ([("result", "cancelled")], cancelled),
        ];
        page.counter("cordisk_jobs_completed", "Jobs that have ended", None, &results)
    }
}

fn of_job(page: &mut MetricsPage<'_>, job: &JobInfo) -> fmt::Result {
    let id = [("id", job.progress.id.as_str())];
    let per_second = Unit::Other("bytes_per_second".to_owned());
    page.gauge(
        "cordisk_job_offset",
        "How far the job has come",
        Some(&Unit::Bytes),
        &[(id, job.progress.offset)],
    )?;
    page.gauge(
        "cordisk_job_length",
        "Where it ends",
        Some(&Unit::Bytes),
        &[(id, job.progress.len)],
    )?;
    page.gauge(
        "cordisk_job_speed_limit",
        "Its limit; 0 is none",
        Some(&per_second),
        &[(id, job.progress.speed)],
    )?;
    page.gauge(
        "cordisk_job_rate",
        "What it has read in the last few seconds",
        Some(&per_second),
        &[(id, job.rate)],
    )
}

fn requests(page: &mut MetricsPage<'_>, stats: &DiskStats) -> fmt::Result {
    let kinds = [
        ("read", &stats.reads),
        ("write", &stats.writes),
        ("flush", &stats.flushes),
        ("discard", &stats.discards),
    ];
    let each = |number: fn(&RequestCount) -> u64| {
        kinds.map(|(kind, count)| ([("kind", kind)], number(count)))
    };
    page.counter(
        "cordisk_requests",
        "Requests of the guest that succeeded",
        None,
        &each(|count| count.operations),
    )?;
    page.counter(
        "cordisk_request",
        "Bytes of those requests",
        Some(&Unit::Bytes),
        &each(|count| count.bytes),
    )?;
    page.counter(
        "cordisk_request_errors",
        "Requests of the guest that failed",
        None,
        &each(|count| count.failed),
    )?;
    let latencies = kinds.map(|(kind, count)| ([("kind", kind)], count));
    page.histogram(
        "cordisk_request_duration",
        "How long requests of the guest took that succeeded",
        &latencies,
    )
}

fn copies(page: &mut MetricsPage<'_>, stats: &DiskStats) -> fmt::Result {
    let hits = [(NONE, stats.hits())];
    page.counter(
        "cordisk_copy_on_read_hits",
        "Reads of the guest that the image alone could answer",
        None,
        &hits,
    )?;
    let misses = [(NONE, stats.misses)];
    page.counter(
        "cordisk_copy_on_read_misses",
        "Reads of the guest that needed the backing file",
        None,
        &misses,
    )?;
    let failed = [(NONE, stats.copied_up.failed)];
    page.counter(
        "cordisk_copy_on_read_errors",
        "Copies of what was read that could not be stored",
        None,
        &failed,
    )?;
    let copied = [([("by", "read")], stats.copied_up.bytes), ([("by", "stream")], stats.streamed)];
    page.counter(
        "cordisk_copied_up",
        "Data that was copied from the backing file into the image",
        Some(&Unit::Bytes),
        &copied,
    )?;
    let brought = stats.brought;
    page.counter(
        "cordisk_brought",
        "Data that streams have copied up before the guest has touched it",
        Some(&Unit::Bytes),
        &[(NONE, brought.bytes)],
    )?;
    let outcomes = [
        ([("outcome", "used")], brought.used),
        ([("outcome", "overwritten")], brought.overwritten),
    ];
    page.counter(
        "cordisk_brought_outcome",
        "What became of that data: the guest has read it, or has overwritten it unread",
        Some(&Unit::Bytes),
        &outcomes,
    )?;
    page.counter(
        "cordisk_waiting_reads",
        "Reads of the guest that were not answered at once",
        None,
        &[(NONE, stats.waited.operations)],
    )?;
    let below = &stats.backing_reads;
    page.counter(
        "cordisk_backing_reads",
        "Reads from the backing file",
        None,
        &[(NONE, below.operations)],
    )?;
    page.counter(
        "cordisk_backing_read",
        "Bytes of those reads",
        Some(&Unit::Bytes),
        &[(NONE, below.bytes)],
    )?;
    page.counter(
        "cordisk_backing_read_errors",
        "Reads from the backing file that failed",
        None,
        &[(NONE, below.failed)],
    )?;
    page.histogram(
        "cordisk_backing_read_duration",
        "How long reads from the backing file took",
        &[(NONE, below)],
    )
}

/// The encoder of the crate, for whole families of metrics.
struct MetricsPage<'a>(DescriptorEncoder<'a>);

impl MetricsPage<'_> {
    fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        samples: &[(Labels<'_>, u64)],
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        each(&mut family, samples, |metric, value| {
            metric.encode_counter::<NoLabelSet, _, u64>(value, None)
        })
    }

    fn gauge<T: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        samples: &[(Labels<'_>, T)],
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        each(&mut family, samples, |metric, value| metric.encode_gauge(value))
    }

    /// Writes a histogram in seconds, the base unit of Prometheus.
    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        samples: &[(Labels<'_>, &RequestCount)],
    ) -> fmt::Result {
        let mut family =
            self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let bounds = LATENCY_BOUNDS.iter().map(|&bound| bound as f64 / 1e9).chain([f64::INFINITY]);
        let bounds: Vec<f64> = bounds.collect();
        each(&mut family, samples, |metric, count| {
            let buckets: Vec<(f64, u64)> = bounds.iter().copied().zip(count.latency).collect();
            metric.encode_histogram::<NoLabelSet>(
                count.time.as_secs_f64(),
                count.operations,
                &buckets,
                None,
            )
        })
    }

    fn info<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        labels: &[(&str, &str); N],
    ) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(labels)
    }
}

fn each<T>(
    family: &mut MetricEncoder<'_>,
    samples: &[(Labels<'_>, T)],
    encode: impl Fn(&mut MetricEncoder<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    for (labels, value) in samples {
        match *labels == NONE {
            true => encode(family, value)?,
            false => encode(&mut of_family(family, labels)?, value)?,
        }
    }
    Ok(())
}

fn of_family<'a, S: EncodeLabelSet>(
    family: &'a mut MetricEncoder<'_>,
    labels: &'a S,
) -> Result<MetricEncoder<'a>, fmt::Error> {
    family.encode_family(labels)
}
