//! `cordisk status`: one disk in a few lines, or all disks in one line each.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use serde_json::{Value, json};

use super::facts::{self, InWords, JobFacts};
use super::find::{self, DiskHandle, FoundDisk};
use super::several::Targets;
use super::show::{self, Paint};
use super::stream::say;
use super::table::{Row, table};
use crate::map::{Shares, units};
use crate::mount::SeenMount;
use control::connection::Connection;
use control::facts::{DiskStatus, JobProgress, SourceStatus, TakeoverFacts};
use host::error::{Context, one_line};
use host::{Error, ErrorKind, Result};

/// The options of `cordisk status`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StatusOptions {
    /// The disks.
    pub targets: Targets,
    /// Print JSON for programs.
    pub json: bool,
}

/// Runs the command. The exit status is 1 if a named disk is dead.
///
/// # Errors
/// There is no such disk, or its daemon does not answer.
pub fn run(options: &StatusOptions) -> Result<ExitCode> {
    if options.targets == Targets::All {
        return all(options.json).map(|()| ExitCode::SUCCESS);
    }
    // The JSON is printed once at the end as one complete array, even if some of the disks fail.
    let (mut values, mut is_first) = (Vec::new(), true);
    let status = options.targets.each(|target| {
        let (shown, code) = one(target, options.json)?;
        match shown {
            ShownDisk::Json(value) => values.push(value),
            ShownDisk::Text(text) => {
                say(&if std::mem::take(&mut is_first) { text } else { format!("\n{text}") })?
            }
        }
        Ok(code)
    })?;
    if options.json {
        print_json(values)?;
    }
    Ok(status)
}

/// The output for one disk.
enum ShownDisk {
    Json(Value),
    Text(String),
}

fn one(target: &Path, json: bool) -> Result<(ShownDisk, ExitCode)> {
    match find::find(target)? {
        FoundDisk::Running(disk) => {
            let mut connection = disk.connect()?;
            let value = facts::query(&mut connection)?;
            if json {
                return Ok((ShownDisk::Json(with_place(value, &disk)), ExitCode::SUCCESS));
            }
            let facts: DiskStatus = facts::read(value, &disk.name)?;
            let paused = paused(&mut connection, &facts)?;
            Ok((
                ShownDisk::Text(block(&facts, &disk, paused.as_ref(), Paint::stdout())),
                ExitCode::SUCCESS,
            ))
        }
        FoundDisk::Dead(mount) => {
            let shown = if json {
                ShownDisk::Json(dead_value(&mount))
            } else {
                ShownDisk::Text(dead_block(&mount, Paint::stdout()))
            };
            Ok((shown, ExitCode::FAILURE))
        }
        FoundDisk::Unregistered(_) => Err(find::unregistered(target)),
    }
}

/// Returns the job from `query-block-jobs` if a job is paused, because that answer has the reason.
fn paused(connection: &mut Connection, facts: &DiskStatus) -> Result<Option<JobFacts>> {
    if facts.jobs.iter().any(JobProgress::is_paused) { facts::job(connection) } else { Ok(None) }
}

fn all(json: bool) -> Result<()> {
    let mut targets = find::find_all()?;
    targets.sort_by_key(place);
    // Each daemon is asked on its own thread, so that one that does not answer delays no other.
    let answers: Vec<Option<Result<Value>>> = thread::scope(|scope| {
        let asked: Vec<_> = targets
            .iter()
            .map(|target| match target {
                FoundDisk::Running(disk) => {
                    let ask = || facts::query(&mut disk.connect()?);
                    Some(
                        thread::Builder::new()
                            .spawn_scoped(scope, ask)
                            .context(|| "starting a thread"),
                    )
                }
                FoundDisk::Dead(_) | FoundDisk::Unregistered(_) => None,
            })
            .collect();
        let join = |thread: Result<thread::ScopedJoinHandle<'_, Result<Value>>>| match thread {
            Ok(thread) => thread
                .join()
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "asking has failed"))),
            Err(error) => Err(error.explain_limit()),
        };
        asked.into_iter().map(|thread| thread.map(join)).collect()
    });
    let disks = targets.iter().zip(answers);
    if json {
        return print_json(disks.map(|(target, answer)| value_of(target, answer)).collect());
    }
    let rows: Vec<Row> = disks.map(|(target, answer)| row_of(target, answer)).collect();
    if rows.is_empty() {
        return say("No disk is mounted.");
    }
    say(&table(&rows, Paint::stdout()))
}

/// Returns the key by which the list is sorted: the mountpoint, as ls(1) sorts files.
fn place(target: &FoundDisk) -> PathBuf {
    match target {
        FoundDisk::Running(DiskHandle { mountpoint: Some(mountpoint), .. }) => mountpoint.clone(),
        FoundDisk::Running(disk) => disk.socket.clone(),
        FoundDisk::Dead(mount) | FoundDisk::Unregistered(mount) => mount.mountpoint.clone(),
    }
}

/// Adds members to the daemon's own facts.
fn with_place(mut value: Value, disk: &DiskHandle) -> Value {
    value["qmp"] = disk.socket.to_string_lossy().into();
    value["state"] = "running".into();
    // The current mountpoint; the daemon reports the original one.
    if let Some(mountpoint) = &disk.mountpoint {
        value["mountpoint"] = mountpoint.to_string_lossy().into();
    }
    // An older daemon does not report this member.
    if let Some(found) = disk.found.as_ref().filter(|_| value["pid"].is_null()) {
        value["pid"] = found.entry.pid.into();
    }
    value
}

fn dead_value(mount: &SeenMount) -> Value {
    json!({ "state": "dead", "mountpoint": mount.mountpoint.to_string_lossy(), "image": mount.image.to_string_lossy() })
}

fn value_of(target: &FoundDisk, answer: Option<Result<Value>>) -> Value {
    match (target, answer) {
        (FoundDisk::Running(disk), Some(Ok(value))) => with_place(value, disk),
        (FoundDisk::Running(disk), answer) => {
            let mut value = match &disk.found {
                Some(found) => {
                    json!({ "device": found.entry.device, "image": found.entry.image.to_string_lossy() })
                }
                None => json!({}),
            };
            if let Some(Err(error)) = answer {
                value["error"] = error.to_string().into();
            }
            with_place(value, disk)
        }
        (FoundDisk::Dead(mount), _) => dead_value(mount),
        (FoundDisk::Unregistered(mount), _) => {
            let mut value = dead_value(mount);
            value["state"] = "running".into();
            value["error"] = "no entry that this user can read".into();
            value
        }
    }
}

fn row_of(target: &FoundDisk, answer: Option<Result<Value>>) -> Row {
    let facts = match (target, answer) {
        (FoundDisk::Running(disk), Some(answer)) => {
            answer.and_then(|value| facts::read::<DiskStatus>(value, &disk.name))
        }
        (FoundDisk::Dead(mount), _) => return Row::new(&mount.mountpoint, "dead", &mount.image),
        (FoundDisk::Unregistered(mount), _) => {
            return Row {
                job: "(no entry)".to_owned(),
                ..Row::new(&mount.mountpoint, "running", &mount.image)
            };
        }
        (FoundDisk::Running(disk), None) => Err(Error::new(ErrorKind::Io, disk.name.clone())),
    };
    let FoundDisk::Running(disk) = target else { return Row::default() };
    let (mountpoint, image) = match &disk.found {
        Some(found) => (
            disk.mountpoint.clone().unwrap_or_else(|| found.entry.mountpoint.clone()),
            found.entry.image.clone(),
        ),
        None => (disk.socket.clone(), PathBuf::new()),
    };
    match facts {
        Ok(facts) => Row {
            size: units::size(facts.size),
            local: facts::shares(&facts)
                .as_ref()
                .map(Shares::fetched)
                .map_or(String::new(), |(part, whole)| units::percent(part, whole)),
            job: facts.jobs.first().map_or(String::new(), short_job),
            ..Row::new(&mountpoint, state(&facts), &image)
        },
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Row { job: "(another user's)".to_owned(), ..Row::new(&mountpoint, "running", &image) }
        }
        Err(_) => Row { job: "(no answer)".to_owned(), ..Row::new(&mountpoint, "running", &image) },
    }
}

fn state(facts: &DiskStatus) -> &'static str {
    match facts {
        facts if facts.has_failed() => "failed",
        facts if facts.is_hung() => "hung",
        _ => "running",
    }
}

/// Describes a job briefly: `stream 45 %, 50 MiB/s`.
fn short_job(job: &JobProgress) -> String {
    let percent = units::whole_percent(job.offset, job.len);
    match job {
        job if job.is_paused() => format!("stream {percent} %, paused"),
        job if job.rate > 0 => format!("stream {percent} %, {}", units::rate(job.rate)),
        _ => format!("stream {percent} %"),
    }
}

fn print_json(disks: Vec<Value>) -> Result<()> {
    let text = serde_json::to_string_pretty(&Value::from(disks));
    say(&text.map_err(|error| Error::wrap(ErrorKind::Io, "JSON", error))?)
}

fn dead_block(mount: &SeenMount, paint: Paint) -> String {
    let mut lines = Lines::new(paint);
    lines.heading(
        &mount.mountpoint.display().to_string(),
        &paint.red("dead"),
        &paint.red(paint.mark()),
    );
    lines.add("image", &mount.image.display().to_string());
    let target = show::quoted(&mount.mountpoint);
    lines.add("", &format!("Its daemon was killed. Mount it again with the same `cordisk mount`, or remove it: cordisk umount {target}"));
    lines.text
}

/// Lines with a label on the left.
struct Lines {
    text: String,
    paint: Paint,
}

impl Lines {
    fn new(paint: Paint) -> Lines {
        Lines { text: String::new(), paint }
    }

    fn heading(&mut self, name: &str, state: &str, mark: &str) {
        self.text = format!("{mark} {}  {state}", self.paint.bold(&one_line(name)));
    }

    /// Adds a line. `value` may hold any text of a daemon; it is printed on one line.
    fn add(&mut self, name: &str, value: &str) {
        self.add_painted(name, &one_line(value));
    }

    fn add_painted(&mut self, name: &str, value: &str) {
        self.text += &format!("\n  {}  {value}", self.paint.dim(&format!("{name:>8}")));
    }
}

fn block(facts: &DiskStatus, disk: &DiskHandle, paused: Option<&JobFacts>, paint: Paint) -> String {
    let mut lines = Lines::new(paint);
    let mountpoint = disk.mountpoint.as_ref().map(|path| path.display().to_string());
    let name = mountpoint.or_else(|| facts.mountpoint.clone()).unwrap_or_else(|| disk.name.clone());
    if facts.has_failed() {
        lines.heading(&name, &paint.red("failed"), &paint.red(paint.mark()));
        let why = "Writing to the image has failed, and nothing more is written. What was not flushed before may be lost: \
                   unmount it, look at the daemon's log and at the host's disk, then run cordisk check.";
        lines.add_painted("", &paint.red(why));
    } else if facts.is_hung() {
        lines.heading(&name, &paint.red("not answering"), &paint.red(paint.mark()));
        let why = "Requests for the disk are not answered. Look at the daemon's log; \
                   cordisk umount --lazy takes the disk away from the programs that wait for it.";
        lines.add_painted("", &paint.red(why));
    } else {
        lines.heading(&name, &paint.green("running"), &paint.green(paint.mark()));
    }
    lines.add("image", &image(facts));
    let chain: Vec<String> = facts
        .chain
        .iter()
        .map(|layer| {
            format!(
                "{}{} ({}, {})",
                layer.filename,
                deleted(layer.deleted),
                layer.format,
                units::size(layer.size)
            )
        })
        .collect();
    lines.add(
        "chain",
        &if chain.is_empty() {
            "none: the image stands alone".to_owned()
        } else {
            chain.join(paint.arrow())
        },
    );
    for layer in facts.chain.iter().filter(|layer| layer.changed) {
        let why = format!(
            "{} was changed while it is in use as a backing file: what was not copied up before cannot be read. Bring its old \
             content back, then unmount and mount again",
            layer.filename
        );
        lines.add_painted("", &paint.red(&one_line(&why)));
    }
    for source in &facts.sources {
        add_source(&mut lines, source);
    }
    if let Some(bytes) = facts::shares(facts) {
        let parts = [("local", bytes.local), ("zero", bytes.zero), ("remote", bytes.remote)];
        for ((name, count), percent) in parts.into_iter().zip(bytes.percents()) {
            lines.add_painted(name, &format!("{percent:>7}  {}", units::size(count)));
        }
    }
    for job in &facts.jobs {
        let why =
            job.is_paused().then(|| why_paused(job, paused, &show::quoted(Path::new(&disk.name))));
        lines.add("job", &long_job(job, why));
    }
    if let Some(plan) = &facts.plan {
        let rules = [
            plan.schedule.clone(),
            plan.finish_by.as_ref().map(|time| format!("finish by {time}")),
        ];
        let mut text = rules.into_iter().flatten().collect::<Vec<_>>().join(", ");
        if let Some(needed) = plan.needed {
            text += &format!(", needs {}", units::rate(needed));
        }
        match plan.feasible {
            Some(false) => lines.add_painted(
                "plan",
                &paint
                    .yellow(&one_line(&format!("{text}: too fast for this disk, it will be late"))),
            ),
            _ => lines.add("plan", &text),
        }
    }
    if let Some(last) = &facts.last_job {
        lines.add("last job", &last.in_words());
    }
    if let Some(kept) = facts.stream_kept_back {
        let text = format!(
            "interrupted at {}, goes on at a mount without --no-resume",
            units::percent(kept.offset, kept.len)
        );
        lines.add("stream", &text);
    }
    add_requests(&mut lines, facts);
    add_troubles(&mut lines, facts);
    if let Some(takeover) = &facts.takeover {
        lines.add("a kill", &after_a_kill(takeover));
    }
    lines.add("daemon", &daemon(facts, disk));
    lines.text
}

/// Tells whether the disk survives a kill, and how often it has, as the end of a sentence.
fn after_a_kill(takeover: &TakeoverFacts) -> String {
    let mut text = match (takeover.possible, takeover.reason.as_deref()) {
        (true, _) => "of the serving process is survived".to_owned(),
        (false, None) => "is not survived".to_owned(),
        (false, Some(why)) => format!("is not survived: {why}"),
    };
    text += &match takeover.count {
        0 => return text,
        1 => "; one was".to_owned(),
        count => format!("; {} were", units::number(count)),
    };
    match takeover.last.filter(|_| takeover.possible) {
        Some(last) => text + &format!(", last {}", facts::ago(last)),
        None => text,
    }
}

/// Explains why `job` is paused. `paused` is the answer to a later query for the reason.
fn why_paused(job: &JobProgress, paused: Option<&JobFacts>, target: &str) -> String {
    match paused {
        Some(paused) => paused.why_paused(target),
        None => JobFacts { progress: job.clone(), ..JobFacts::default() }.why_paused(target),
    }
}

/// Adds a line about the server of a remote backing file.
fn add_source(lines: &mut Lines, source: &SourceStatus) {
    let latency = units::time(source.latency_us as f64 * 1e3, "µ");
    let fetched = format!(
        "{} fetched in {} requests, first byte after {latency}, {} in the cache",
        units::size(source.fetched_bytes),
        units::number(source.requests),
        units::size(source.cached_bytes),
    );
    if source.up {
        lines.add("source", &one_line(&format!("answers: {fetched}")));
    } else {
        let why = source.last_error.as_deref().unwrap_or("no answer");
        let text = one_line(&format!(
            "{} does not answer ({why}): reads of what is not in the cache wait for it; {fetched}",
            source.name
        ));
        lines.add_painted("source", &lines.paint.red(&text));
    }
}

/// Adds the last error and the last warning, even if their causes have gone.
fn add_troubles(lines: &mut Lines, facts: &DiskStatus) {
    if let Some(error) = &facts.last_error {
        let text = one_line(&format!("{}: {}", facts::ago(error.time), error.in_words()));
        lines.add_painted("error", &lines.paint.red(&text));
    }
    if let Some(warning) = &facts.last_warning {
        let text = one_line(&format!("{}: {}", facts::ago(warning.time), warning.message));
        lines.add_painted("warning", &lines.paint.yellow(&text));
    }
}

/// Returns the mark for a file that was deleted.
fn deleted(is: bool) -> &'static str {
    if is { " (deleted)" } else { "" }
}

fn image(facts: &DiskStatus) -> String {
    let mut text =
        format!("{}{}, {}", facts.image, deleted(facts.image_deleted), units::size(facts.size));
    if let Some(cluster) = facts.cluster_size {
        text += &format!(" in clusters of {}", units::size(cluster));
    }
    if let Some(allocated) = facts.allocated_size {
        text += &format!(", {} on the host", units::size(allocated));
    }
    if facts.read_only {
        text += ", read-only";
    } else if facts.copy_on_read == Some(false) {
        text += ", no copy-on-read";
    }
    text += match facts.copy_on_read_paused.as_deref() {
        Some("reserve") => ", copy-on-read paused: too little free space (--reserve)",
        Some(_) => ", copy-on-read paused after an error",
        None => "",
    };
    text
}

fn long_job(job: &JobProgress, paused: Option<String>) -> String {
    let limit =
        if job.speed > 0 { format!(", limit {}", units::rate(job.speed)) } else { String::new() };
    let state = match paused {
        Some(why) => why,
        None if job.is_concluded() => "has ended, and waits to be dismissed".to_owned(),
        None => {
            return format!(
                "stream {}: {}{limit}",
                units::percent(job.offset, job.len),
                super::progress::amounts(job)
            );
        }
    };
    format!(
        "stream {}: {} of {}{limit}, {state}",
        units::percent(job.offset, job.len),
        units::size(job.offset),
        units::size(job.len)
    )
}

fn add_requests(lines: &mut Lines, facts: &DiskStatus) {
    if !facts.requests.is_empty() {
        let text: Vec<String> = facts
            .requests
            .iter()
            .map(|requests| {
                let plural = match (requests.operations, requests.kind.as_str()) {
                    (1, kind) => kind.to_owned(),
                    (_, "flush") => "flushes".to_owned(),
                    (_, kind) => format!("{kind}s"),
                };
                let mut text = format!("{} {plural}", units::number(requests.operations));
                if requests.bytes > 0 {
                    text += &format!(" ({})", units::size(requests.bytes));
                }
                if requests.failed > 0 {
                    text += &format!(" {} failed!", units::number(requests.failed));
                }
                text
            })
            .collect();
        lines.add("requests", &text.join(", "));
    }
    let reads = facts.hits.saturating_add(facts.misses);
    if reads > 0 {
        let (hits, below) =
            (units::percent(facts.hits, reads), units::size(facts.backing_reads.bytes));
        lines.add(
            "hits",
            &format!(
                "{hits} of reads were answered without what is below, {below} read from below"
            ),
        );
    }
    let control::facts::BroughtFacts { bytes, used, overwritten } = facts.brought;
    if bytes > 0 {
        let text = format!(
            "{} by streams before the guest touched it, {} of it read since, {} overwritten",
            units::size(bytes),
            units::size(used),
            units::size(overwritten)
        );
        lines.add("brought", &text);
    }
}

fn daemon(facts: &DiskStatus, disk: &DiskHandle) -> String {
    let mut parts = Vec::new();
    if let Some(pid) = facts.pid.or(disk.found.as_ref().map(|found| found.entry.pid)) {
        parts.push(format!("process {pid}"));
    }
    if let Some(start) = facts.start_time {
        parts.push(format!("up {}", units::duration(facts::age(start))));
    }
    if let Some(version) = &facts.version {
        parts.push(format!("version {version}"));
    }
    parts.push(format!("device {}", facts.device));
    parts.push(format!("socket {}", disk.socket.display()));
    if let Some(address) = &facts.metrics {
        parts.push(format!("metrics http://{address}/metrics"));
    }
    if let Some(log) = &facts.log {
        parts.push(format!("log {log}"));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> DiskHandle {
        DiskHandle {
            name: "vm.raw".into(),
            socket: "/run/x.sock".into(),
            mountpoint: Some("/srv/vm.raw".into()),
            found: None,
        }
    }

    fn facts(more: &Value) -> DiskStatus {
        let mut value = json!({
            "device": "drive0", "image": "/srv/vm.qcow2", "mountpoint": "/srv/vm.raw", "pid": 7, "version": "0.1.0", "size": 1 << 30,
            "cluster-size": 65536, "allocated-size": 300 << 20, "read-only": false, "copy-on-read": true, "usable": true,
            "chain": [{ "filename": "/srv/golden.qcow2", "format": "qcow2", "size": 1 << 30 }, { "filename": "/srv/base.raw", "format": "raw", "size": 1 << 30 }],
            "bytes": { "local": 256 << 20, "zero": 512 << 20, "remote": 256 << 20, "age-ms": 3 },
            "requests": [{ "kind": "read", "operations": 1234, "bytes": 12 << 20, "failed": 0, "total-time-ns": 1, "latency": [1] },
                         { "kind": "flush", "operations": 1, "bytes": 0, "failed": 2 }],
            "backing-reads": { "operations": 1, "bytes": 1 << 20, "failed": 0, "total-time-ns": 1 }, "hits": 98, "misses": 2, "jobs": [],
        });
        for (name, member) in more.as_object().unwrap() {
            value[name] = member.clone();
        }
        facts::read(value, "x").unwrap()
    }

    fn shown(more: &Value) -> String {
        block(&facts(more), &disk(), None, Paint::none())
    }

    #[test]
    fn a_disk_in_a_few_lines() {
        let want = "● /srv/vm.raw  running
     image  /srv/vm.qcow2, 1 GiB in clusters of 64 KiB, 300 MiB on the host
     chain  /srv/golden.qcow2 (qcow2, 1 GiB) ← /srv/base.raw (raw, 1 GiB)
     local   25.0 %  256 MiB
      zero   50.0 %  512 MiB
    remote   25.0 %  256 MiB
  requests  1 234 reads (12 MiB), 1 flush 2 failed!
      hits  98.0 % of reads were answered without what is below, 1 MiB read from below
    daemon  process 7, version 0.1.0, device drive0, socket /run/x.sock";
        assert_eq!(shown(&json!({})), want);
    }

    #[test]
    fn a_locale_without_utf8_has_ascii() {
        let text = block(&facts(&json!({})), &disk(), None, Paint::ascii());
        assert!(text.is_ascii() && text.starts_with("* /srv/vm.raw  running\n"), "{text}");
        assert!(text.contains("/srv/golden.qcow2 (qcow2, 1 GiB) <- /srv/base.raw"), "{text}");
    }

    #[test]
    fn jobs_are_told_with_what_matters() {
        let job = json!({ "id": "drive0", "status": "running", "offset": 512 << 20, "len": 1 << 30, "speed": 50 << 20, "rate": 49 << 20, "seconds-left": 10 });
        let text = shown(&json!({ "jobs": [job] }));
        assert!(
            text.contains(
                "job  stream 50.0 %: 512 MiB of 1 GiB, 49 MiB/s, 10 s left, limit 50 MiB/s\n"
            ),
            "{text}"
        );
        let job = json!({ "id": "drive0", "status": "paused", "offset": 0, "len": 1 << 30 });
        let paused = JobFacts { io_status: "nospace".into(), ..JobFacts::default() };
        let text = block(&facts(&json!({ "jobs": [job] })), &disk(), Some(&paused), Paint::none());
        assert!(text.contains("stream 0.0 %: 0 B of 1 GiB, paused: no space left where the image lies; make room, then `cordisk job resume vm.raw` goes on"), "{text}");
        let last = json!({ "id": "drive0", "result": "error", "error": "Input/output\nerror", "offset": 1, "len": 4 });
        let text = shown(&json!({ "last-job": last }));
        assert!(
            text.contains("last job  stream failed ")
                && text.contains(" ago at 25.0 %: Input/output\\nerror\n"),
            "{text}"
        );
        let text = shown(
            &json!({ "plan": { "id": "drive0", "finish-by": "06:00", "needed": 1 << 20, "feasible": false } }),
        );
        assert!(text.contains("plan  finish by 06:00, needs 1 MiB/s: too fast"), "{text}");
    }

    #[test]
    fn what_went_wrong_is_told_with_the_file_and_the_place() {
        let time = json!({ "seconds": 1, "microseconds": 0 });
        let text = shown(&json!({
            "image-deleted": true, "copy-on-read-paused": "reserve", "metrics": "127.0.0.1:40001", "log": "journal",
            "chain": [{ "filename": "/srv/b.raw", "format": "raw", "size": 1 << 20, "deleted": true }],
            "stream-kept-back": { "offset": 1, "len": 4 },
            "last-error": { "time": time, "operation": "read", "offset": 65536, "length": 4096, "message": "/srv/b.raw: gone\nfor good" },
            "last-warning": { "time": time, "level": "warning", "message": "no room" },
        }));
        for part in [
            "image  /srv/vm.qcow2 (deleted), 1 GiB",
            ", copy-on-read paused: too little free space (--reserve)\n",
            "chain  /srv/b.raw (deleted) (raw, 1 MiB)\n",
            "stream  interrupted at 25.0 %, goes on at a mount without --no-resume\n",
            " ago: read of 4096 bytes at 65536: /srv/b.raw: gone\\nfor good\n",
            " ago: no room\n",
            ", metrics http://127.0.0.1:40001/metrics, log journal",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
        let progress = JobProgress {
            error_detail: Some("bytes 0..5: b.raw: gone".into()),
            ..JobProgress::default()
        };
        let job = JobFacts { io_status: "failed".into(), progress };
        assert_eq!(
            job.why_paused("vm"),
            "paused by an error of reading or writing (bytes 0..5: b.raw: gone); `cordisk job resume vm` goes on"
        );
    }

    /// Protects: one line of at most 80 columns tells whether a kill is survived, why not, and how
    /// many were.
    #[test]
    fn a_kill_is_told_of() {
        let last = json!({ "seconds": 1, "microseconds": 0 });
        for (takeover, want) in [
            (json!({ "possible": true }), "of the serving process is survived"),
            (
                json!({ "possible": true, "count": 1, "last": last }),
                "of the serving process is survived; one was, last ",
            ),
            (
                json!({ "possible": false, "count": 12, "reason": "the mount keeper has died", "last": last }),
                "is not survived: the mount keeper has died; 12 were",
            ),
            (
                json!({ "possible": false, "reason": "the kernel is older than Linux 6.9" }),
                "is not survived: the kernel is older than Linux 6.9",
            ),
            (json!({ "possible": false, "reason": "a\nb" }), "is not survived: a\\nb"),
        ] {
            let text = shown(&json!({ "takeover": takeover }));
            let line =
                text.lines().find(|line| line.starts_with("    a kill  ")).unwrap_or_default();
            assert!(line.contains(want) && line.chars().count() <= 80, "{want:?} in {text}");
        }
        assert!(!shown(&json!({})).contains("a kill"), "an older daemon");
    }

    #[test]
    fn a_failure_is_not_overlooked() {
        let text = shown(&json!({ "answering": false }));
        assert!(
            text.starts_with("● /srv/vm.raw  not answering\n") && text.contains("umount --lazy"),
            "{text}"
        );
        let text = shown(&json!({ "usable": false }));
        assert!(
            text.starts_with("● /srv/vm.raw  failed\n            Writing to the image has failed"),
            "{text}"
        );
    }

    /// Protects: a text from an image or a daemon cannot move the cursor of a terminal.
    #[test]
    fn nothing_that_a_daemon_says_leaves_its_line() {
        let evil = "a\u{1b}[31m\nb";
        let text = shown(
            &json!({ "image": evil, "device": evil, "version": evil, "chain": [{ "filename": evil }],
            "requests": [{ "kind": evil, "operations": 2 }], "plan": { "schedule": evil } }),
        );
        assert!(!text.contains('\u{1b}') && !text.contains("\nb"), "{text}");
    }

    /// Protects: the few facts of an older daemon suffice.
    #[test]
    fn little_is_known_of_an_older_daemon() {
        let value = json!({ "device": "drive0", "image": "/i", "size": 1 << 20, "cluster-size": 65536, "read-only": true, "chain": [], "jobs": [] });
        let text = block(&facts::read(value, "x").unwrap(), &disk(), None, Paint::none());
        assert!(
            text.contains("/i, 1 MiB in clusters of 64 KiB, read-only\n     chain  none: the image stands alone\n    daemon"),
            "{text}"
        );
        assert!(facts::read::<DiskStatus>(json!([1]), "x").is_err());
    }
}
