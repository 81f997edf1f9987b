//! Remote backing files from outside: `create`, `mount` and `stream` against real servers.
//!
//! Each test has a server, a cache directory and a runtime directory of its own. What the disk
//! returns is always compared with what the server was given.

mod away;
mod cache;
mod clones;
mod digest;
mod emulators;
mod fetcher;
mod full_cache;
mod hung;
mod killed;
mod load;
mod names;
mod options;
mod order;
mod pins;
mod policy;
mod secrets;
mod servers;
mod stress;

use std::fs::{self, File};
use std::net::TcpStream;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use test_servers::{Ceph, NbdServer, Nginx};

use crate::support::{
    Daemon, Finished, Guest, KIB, MIB, Mount, Ours, Pattern, Rng, Scratch, assert_same, header,
    mounts, qemu, run_ok, run_within, wait_until,
};

/// The type of the header extension that keeps the pins.
const EXT_PINS: u32 = u32::from_be_bytes(*b"cPIN");

/// Time for a command that does not wait for a server.
const PROMPT: Duration = Duration::from_secs(60);

/// Content without a zero byte, except for 2 MiB of zeros after a quarter of it.
fn content(size: u64) -> Vec<u8> {
    let mut content = Pattern::new(0x4E37, 1).bytes(0, size);
    let start = usize::try_from(size / 4).expect("small");
    content[start..start + 2 * MIB as usize].fill(0);
    content
}

/// A remote base, and an overlay above it.
struct Remote {
    scratch: Scratch,
    overlay: PathBuf,
    url: String,
    format: &'static str,
    /// The content of the base, and so of the new disk.
    content: Vec<u8>,
    /// The options of all commands that read the base.
    options: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Remote {
    fn new(url: &str, content: Vec<u8>) -> Remote {
        let scratch = Scratch::new();
        let cache = scratch.dir("cache").display().to_string();
        let overlay = scratch.join("overlay.qcow2");
        Remote {
            scratch,
            overlay,
            url: url.to_owned(),
            format: "raw",
            content,
            options: vec!["--cache".into(), cache],
            environment: Vec::new(),
        }
    }

    fn option(mut self, name: &str, value: &str) -> Remote {
        self.options.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// With this text as the configuration of sources.
    fn sources(self, text: &str) -> Remote {
        let file = self.scratch.write("sources.toml", text.as_bytes()).display().to_string();
        self.option("--sources", &file)
    }

    /// Writes the content into a file of the scratch directory, for a server to serve.
    fn base_file(&self) -> PathBuf {
        self.scratch.write("base.raw", &self.content)
    }

    fn environment(mut self, name: &str, value: &str) -> Remote {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn cache(&self) -> PathBuf {
        self.scratch.join("cache")
    }

    /// What `--backing-url` takes to allow the base: its directory, or the name of an export.
    fn prefix(&self) -> &str {
        if self.url.starts_with("nbd") {
            return &self.url;
        }
        let path = self.url.split('?').next().unwrap_or_default();
        &self.url[..=path.rfind('/').expect("a directory")]
    }

    /// A command with the options and the environment.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.scratch.cordisk();
        command.args(arguments).args(&self.options);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    fn create_at(&self, overlay: &Path) {
        let overlay = overlay.to_str().expect("UTF-8");
        run_ok(&mut self.command(&["create", "-b", &self.url, "-F", self.format, overlay]));
    }

    fn create(self) -> Remote {
        self.create_at(&self.overlay);
        self
    }

    fn mount_as(&self, overlay: &Path, name: &str) -> Mount {
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        let mount = Mount::named(&self.scratch, overlay, name).args(&options);
        let mount = mount.args(&["--backing-url", self.prefix()]);
        self.environment.iter().fold(mount, |mount, (name, value)| mount.env(name, value))
    }

    fn mount(&self) -> Mount {
        self.mount_as(&self.overlay, "drive0")
    }

    /// A guest whose reads bring the kernel to read nothing ahead.
    fn guest(&self, disk: &Daemon) -> Guest {
        let file = disk.open();
        no_read_ahead(&file);
        Guest::new(file, self.content.clone(), 0x6E57)
    }

    /// A mount that has to be refused: exit status 1, nothing mounted. Returns what it printed.
    fn refused(&self, more: &[&str]) -> String {
        let mountpoint = self.scratch.join("refused.disk");
        let mut command = self.command(&["mount"]);
        command.args(more).arg(&self.overlay).arg(&mountpoint);
        let done = run_within(&mut command, PROMPT);
        assert_refused(&done);
        assert!(mounts::at(&mountpoint).is_none(), "it is mounted: {done:?}");
        assert!(!mountpoint.exists(), "{} is left behind", mountpoint.display());
        done.stderr
    }

    /// Streams everything up, and returns when it is complete.
    fn stream(&self, disk: &Daemon) {
        run_ok(self.scratch.cordisk().args(["stream", "--wait"]).arg(disk.path()));
    }

    /// Asserts that QEMU finds an image without errors, without a base and without pins, that reads
    /// as `want`.
    fn assert_standalone(&self, want: &[u8]) {
        qemu::assert_independent(&self.overlay);
        let extensions = header::Header::load(&self.overlay).extensions;
        assert!(
            extensions
                .iter()
                .all(|(kind, _)| ![EXT_PINS, header::EXT_BACKING_FORMAT].contains(kind)),
            "the header still has {extensions:x?}"
        );
        qemu::assert_clean(&self.overlay);
        assert_same("the overlay as QEMU reads it", &qemu::read_all(&self.overlay), want);
    }

    /// Whether the overlay is pinned.
    fn is_pinned(&self) -> bool {
        let extensions = header::Header::load(&self.overlay).extensions;
        extensions.iter().any(|(kind, _)| *kind == EXT_PINS)
    }
}

/// Asserts that QEMU finds no error in an overlay whose base it cannot open.
fn assert_clean(overlay: &Path) {
    let status = check_alone(overlay);
    assert_eq!(status, Some(0), "qemu-img check {}", overlay.display());
}

/// The exit status of `qemu-img check` without the base: 3 is for leaks and nothing else.
fn check_alone(overlay: &Path) -> Option<i32> {
    let file = json!({"driver": "file", "filename": overlay});
    let node = json!({"driver": "qcow2", "file": file, "backing": null});
    let done = qemu::img_any(&["check".to_owned(), format!("json:{node}")]);
    if done.status.code() != Some(0) {
        eprintln!("qemu-img check: {done:?}");
    }
    done.status.code()
}

fn assert_refused(done: &Finished) {
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let messages = done.stderr.lines().filter(|line| line.starts_with("cordisk: ")).count();
    assert_eq!(messages, 1, "one line says why: {done:?}");
}

fn no_read_ahead(file: &File) {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random).expect("fadvise");
}

/// Random reads, each compared with what the guest expects.
fn random_reads(guest: &mut Guest, rng: &mut Rng, count: usize) {
    let size = guest.shadow.len() as u64;
    for _ in 0..count {
        guest.check(rng.range(size, 300 * KIB));
    }
}

/// nginx with `content` as `/golden/base.raw`, and an overlay that is not created yet.
fn on_nginx(size: u64, locations: &str) -> Option<(Nginx, Remote)> {
    let server = test_servers::nginx(locations)?;
    let content = content(size);
    fs::create_dir(server.root().join("golden")).expect("directory on the server");
    fs::write(server.root().join("golden/base.raw"), &content).expect("base on the server");
    let url = format!("http://127.0.0.1:{}/golden/base.raw", server.http);
    let remote = Remote::new(&url, content);
    Some((server, remote))
}

/// nbdkit with `content`, and an overlay that is not created yet.
fn on_nbdkit(size: u64) -> Option<(NbdServer, Remote)> {
    let mut remote = Remote::new("nbd:", content(size));
    let server =
        test_servers::nbdkit(&["-r", "file", remote.base_file().to_str().expect("UTF-8")])?;
    remote.url = server.url("");
    Some((server, remote))
}

/// `content` as the object `key` of the bucket `golden`, with the credentials in the environment,
/// and an overlay that is not created yet.
fn on_s3(ceph: &Ceph, key: &str, content: Vec<u8>) -> Remote {
    ceph.request("PUT", "/golden", b"");
    ceph.request("PUT", &format!("/golden/{key}"), &content);
    Remote::new(&format!("s3://golden/{key}"), content)
        .environment("AWS_ACCESS_KEY_ID", &ceph.access_key)
        .environment("AWS_SECRET_ACCESS_KEY", &ceph.secret_key)
}

/// The process of an nginx.
fn nginx_pid(server: &Nginx) -> Pid {
    let file = server.root().with_file_name("nginx.pid");
    let text = fs::read_to_string(file).expect("nginx.pid");
    text.trim().parse().ok().and_then(Pid::from_raw).expect("a process id")
}

/// Starts an nginx that was killed again, and returns when it answers.
fn start_again(server: &Nginx) -> Ours {
    let directory = server.root().with_file_name("");
    let mut nginx = Command::new("nginx");
    let path = std::env::var("PATH").unwrap_or_default();
    nginx.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    nginx.arg("-p").arg(&directory).arg("-c").arg(directory.join("nginx.conf"));
    let started = Ours(nginx.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("nginx"));
    wait_until("nginx listens again", || TcpStream::connect(("127.0.0.1", server.http)).is_ok());
    started
}

fn nbd_pid(server: &NbdServer) -> Pid {
    i32::try_from(server.pid).ok().and_then(Pid::from_raw).expect("a process id")
}

/// Sends SIGKILL, and waits until the process has ended.
fn kill_server(pid: Pid) {
    kill_process(pid, Signal::KILL).expect("kill");
    wait_until("the server ends", || !is_running(pid));
}

fn is_running(pid: Pid) -> bool {
    let state = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    state.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| !rest.starts_with('Z')))
}

/// The bytes of base files that nginx was asked for and has sent, and whole ranges count.
fn asked_bytes(server: &Nginx) -> u64 {
    asked_ranges(server).iter().map(|range| range.end - range.start).sum()
}

fn asked_ranges(server: &Nginx) -> Vec<Range<u64>> {
    let range = |line: &String| {
        let (first, last) = line.split("bytes=").nth(1)?.split('"').next()?.split_once('-')?;
        let is_sent = line.contains("/base.raw 206");
        is_sent.then_some(first.parse().ok()?..last.parse::<u64>().ok()? + 1)
    };
    server.requests(1).iter().filter_map(range).collect()
}

/// The processes that `pid` has started, and those that they have started.
fn descendants(pid: Pid) -> Vec<Pid> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        found.extend(children(parent));
    }
    found.split_off(1)
}

fn children(parent: Pid) -> Vec<Pid> {
    let parent_of = |pid: Pid| -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
        stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()
    };
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .filter(|pid| parent_of(*pid) == Some(parent.as_raw_nonzero().get()))
        .collect()
}

/// The fetcher of a disk.
fn fetcher_of(disk: &Daemon) -> Pid {
    let name = |pid: &Pid| {
        fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default()
    };
    let running = descendants(disk.pid()).into_iter().filter(|pid| is_running(*pid));
    let found: Vec<Pid> = running.filter(|pid| name(pid).trim() == "cordisk-fetcher").collect();
    assert_eq!(found.len(), 1, "one fetcher below {:?}", disk.pid());
    found[0]
}
