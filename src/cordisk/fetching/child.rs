//! The fetcher as its parent sees it: how it is started, what it prints, and how it ends.
//!
//! A thread waits for each fetcher, reads its standard error to the end, and takes its exit status,
//! so that none stays a zombie. What the fetcher prints is what it cannot send over its socket: the
//! error of its start, a panic, a message of the dynamic loader.
//!
//! **Touches:** the fetcher process, its standard error. **Never:** waits longer than
//! [`END_PATIENCE`] for a fetcher. **Locks:** none.
//! **Invariants:** the log gets at most [`MOST_LINES`] lines of each fetcher, without what has the
//! form of a secret.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use super::{Credentials, FetcherPlan};
use host::error::{Context, one_line, os_text};
use host::{Error, ErrorKind, Result};
use remote::line::StartedFetcher;
use remote::url::redacted_text;

/// How long the start of a fetcher waits for the end of the one before, whose socket is closed: the
/// kernel closes the descriptors of a process a moment before its parent can wait for it.
const END_PATIENCE: Duration = Duration::from_millis(250);

/// The longest line that is read from a fetcher, in bytes; the rest of it counts as another line.
const LONGEST_LINE: u64 = 1024;

/// The most lines of a fetcher that are logged.
const MOST_LINES: usize = 50;

/// The fetchers that one process has started.
#[derive(Debug, Default)]
pub struct Fetchers {
    /// One channel for each fetcher that is not known to have ended. It gives the reason of an end
    /// that was not in order, and is closed by the end.
    running: Vec<Receiver<String>>,
    /// Variables of this process that a fetcher does not get.
    hidden: &'static [&'static str],
}

impl Fetchers {
    /// No fetcher yet; none will get the variables in `hidden`.
    pub fn hiding(hidden: &'static [&'static str]) -> Fetchers {
        Fetchers { hidden, ..Fetchers::default() }
    }

    /// Starts a fetcher with these variables added to its environment. The one before has ended, or
    /// its line was given up, and it ends with its socket. Returns the socket, and how the one
    /// before has ended if it was not in order.
    ///
    /// # Errors
    /// The program is not installed; the process or its thread cannot be started.
    pub fn start(
        &mut self,
        plan: &FetcherPlan,
        credentials: &Credentials,
    ) -> Result<StartedFetcher> {
        let mut before = None;
        let last = self.running.len().saturating_sub(1);
        let mut index = 0..;
        self.running.retain(|end| {
            let patience = if index.next() == Some(last) { END_PATIENCE } else { Duration::ZERO };
            let ended = end.recv_timeout(patience);
            before = ended.clone().ok().or(before.take());
            ended == Err(RecvTimeoutError::Timeout)
        });
        let (socket, end) = start(plan, credentials, self.hidden)?;
        self.running.push(end);
        Ok(StartedFetcher { socket, before })
    }
}

/// Starts a fetcher, and a thread that waits for its end.
fn start(
    plan: &FetcherPlan,
    credentials: &Credentials,
    hidden: &[&str],
) -> Result<(OwnedFd, Receiver<String>)> {
    let (ours, theirs) = host::packet::pair().context(|| "starting the fetcher")?;
    let mut command = Command::new(&plan.program);
    for name in hidden {
        command.env_remove(name);
    }
    command
        .args(&plan.arguments)
        .envs(credentials.variables())
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let (started, is_started) = bounded(1);
    let (ended, end) = bounded(1);
    // The thread is started before the fetcher: without it the fetcher would stay a zombie.
    let body = move || {
        let spawned = command.spawn();
        // This process must not hold the fetcher's end of the socket.
        drop(command);
        let (told, child) = match spawned {
            Ok(child) => (Ok(()), Some(child)),
            Err(error) => (Err(error), None),
        };
        let _ = started.send(told);
        if let Some(reason) = child.and_then(wait) {
            let _ = ended.send(reason);
        }
    };
    std::thread::Builder::new()
        .name("fetcher-end".into())
        .spawn(body)
        .context(|| "starting the fetcher: a thread")?;
    let told = is_started.recv().unwrap_or_else(|_| Err(io::Error::other("no answer")));
    told.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::new(
            ErrorKind::UnsupportedFeature,
            format!(
                "{}: not installed, so remote backing files cannot be read: install it beside cordisk, or build with the feature `remote`",
                plan.program.display()
            ),
        ),
        _ => Error::io(format!("starting {}", plan.program.display()), error),
    })?;
    Ok((ours, end))
}

/// Waits until a fetcher has ended, and logs what it prints and its status, unless that is 0.
/// Returns why it has ended; `None` if that was in order.
fn wait(mut child: Child) -> Option<String> {
    let last = child.stderr.take().and_then(log_lines);
    let status = match child.wait() {
        Ok(status) if status.success() => return None,
        Ok(status) => status.to_string(),
        Err(error) => os_text(&error),
    };
    log::warn!("fetcher: {status}");
    Some(last.map_or(status.clone(), |last| format!("{last} ({status})")))
}

/// Logs each line until the end. Returns the last one.
fn log_lines(messages: impl Read) -> Option<String> {
    let mut messages = BufReader::new(messages);
    let (mut last, mut count) = (None, 0);
    loop {
        let mut line = Vec::new();
        match (&mut messages).take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return last,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line);
        let line = one_line(&redacted_text(line.trim_end()));
        if line.is_empty() {
            continue;
        }
        count += 1;
        match count {
            ..=MOST_LINES => log::warn!("fetcher: {line}"),
            _ if count == MOST_LINES + 1 => log::warn!("fetcher: further lines are left out"),
            _ => {}
        }
        last = Some(line);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A plan that runs a shell instead of a fetcher.
    fn shell(script: &str) -> FetcherPlan {
        FetcherPlan { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] }
    }

    /// Protects: the next start says why the fetcher before has ended, without secrets, and no
    /// fetcher stays a zombie, also if none is started after it.
    #[test]
    fn the_end_of_a_fetcher_is_told_and_no_zombie_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let mut fetchers = Fetchers::default();
        for (script, want) in [
            ("exit 0", None),
            (
                "echo first >&2; echo 'no https://h/lib?sig=abc here' >&2; exit 3",
                Some("no https://h/lib?… here (exit status: 3)"),
            ),
            ("kill -9 $$", Some("signal: 9 (SIGKILL)")),
        ] {
            let script = format!("echo $$ >{}; {script}", file.display());
            let started = fetchers.start(&shell(&script), &Credentials::default()).unwrap();
            let end = fetchers.running.last().unwrap().clone();
            let reason = end.recv_timeout(Duration::from_secs(20));
            assert_ne!(reason, Err(RecvTimeoutError::Timeout), "{script}: has not ended");
            let reason = reason.ok();
            assert_eq!(reason.as_deref(), want, "{script}");
            let pid = std::fs::read_to_string(&file).unwrap();
            assert!(!Path::new(&format!("/proc/{}", pid.trim())).exists(), "{script}: a zombie");
            drop(started);
        }
        let first =
            fetchers.start(&shell("echo why >&2; exit 1"), &Credentials::default()).unwrap();
        assert_eq!(first.before, None);
        // The reason waits until it is asked for.
        let end = fetchers.running.last().unwrap().clone();
        while end.is_empty() {
            std::thread::yield_now();
        }
        let second =
            fetchers.start(&shell("exec cat >/dev/null"), &Credentials::default()).unwrap();
        assert_eq!(second.before.as_deref(), Some("why (exit status: 1)"));
        assert_eq!(fetchers.running.len(), 1);
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let plan = FetcherPlan { program: "/nowhere/cordisk-fetcher".into(), ..shell("") };
        let error = Fetchers::default().start(&plan, &Credentials::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
        assert!(
            error.to_string().starts_with("/nowhere/cordisk-fetcher: not installed"),
            "{error}"
        );
    }

    #[test]
    fn a_fetcher_that_prints_without_end_fills_no_log() {
        let text = format!("{}\n\nlast", "x".repeat(3 * LONGEST_LINE as usize));
        assert_eq!(log_lines(text.as_bytes()).as_deref(), Some("last"));
        let many = "line\n".repeat(10_000);
        assert_eq!(log_lines(many.as_bytes()).as_deref(), Some("line"));
    }
}
