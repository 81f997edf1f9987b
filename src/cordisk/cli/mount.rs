//! `cordisk mount`: its options and their checked values.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::sources::SourceArgs;
use super::values::{
    FormatArg, OnErrorArg, absolute, parse_device, parse_minute, parse_mode, parse_shell_command,
    parse_size, parse_speed,
};
use crate::fetching::SourceConfig;
use crate::metrics::Address;
use crate::sandbox;
use engine::job::OnError;
use engine::stream::{Minute, Plan, Priority, Speed};
use export::Transport;
use host::{Error, ErrorKind, Result};
use qcow2::format::BackingFormat;
use remote::url::SourceUrl;

/// Default device id, and default id of the stream job: QEMU's name for the first drive.
const DEFAULT_DEVICE: &str = "drive0";

#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The qcow2 image
    image: PathBuf,
    /// Where the disk appears: a regular file, or a name that does not exist, which is created and
    /// removed again at the end
    mountpoint: PathBuf,
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    foreground: bool,
    /// Write the log to this file instead of standard error (with -f) or the system's journal or
    /// syslog (without). It is appended to, and opened anew at SIGHUP, for logrotate
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Name of the disk on the QMP socket, and of the job of --stream
    #[arg(long, value_name = "ID", default_value = DEFAULT_DEVICE, value_parser = parse_device)]
    device: String,
    /// Listen for QMP clients on this Unix socket
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// Serve metrics for Prometheus over HTTP on this TCP address. PORT alone means 127.0.0.1; port
    /// 0 takes any free port (the log names it)
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Address>,
    /// Copy everything up in the background, then drop the backing file (as block-stream does)
    #[arg(long, conflicts_with = "read_only")]
    stream: bool,
    /// Limit of --stream in bytes per second, such as 20M or 1.5GiB/s; 0 is unlimited. Or by the
    /// local time of day, such as 08:00=20M,20:00=0
    #[arg(long, value_name = "RATE|SCHEDULE", requires = "stream", default_value = "0", value_parser = parse_speed)]
    speed: Speed,
    /// Give --stream the speed that it needs to be finished by this local time, and say in the log
    /// when it cannot
    #[arg(long, value_name = "HH:MM", requires = "stream", conflicts_with = "speed", value_parser = parse_minute)]
    finish_by: Option<Minute>,
    /// How an error of reading or writing affects --stream
    #[arg(long, value_name = "ACTION", requires = "stream", default_value = "report")]
    on_error: OnErrorArg,
    /// Do not resume the stream that was running when the last daemon of this image ended. A later
    /// mount without this option resumes it
    #[arg(long)]
    no_resume: bool,
    /// Run this with /bin/sh when a stream has completed, outside of the sandbox, as the user that
    /// the daemon becomes. It has CORDISK_IMAGE, CORDISK_MOUNTPOINT, CORDISK_DEVICE and CORDISK_QMP
    /// in its environment
    #[arg(long, value_name = "CMD", value_parser = parse_shell_command())]
    on_complete: Option<OsString>,
    /// How streams without a speed behave while the guest reads, writes or syncs: `low` gives way
    /// to the guest, `normal` does not
    #[arg(long, value_name = "PRIORITY", default_value = "low")]
    stream_priority: PriorityArg,
    /// The order in which streams bring what guests need first: a file that `cordisk order` has
    /// made, on this host or on a server; `auto` takes BASE.order beside the first backing file or,
    /// if there is none, what Linux needs to boot from the file systems of the base; `none` follows
    /// only what this guest reads; `linear` goes from the start of the disk to its end [default:
    /// BASE.order, if it exists]
    #[arg(long, value_name = "FILE|URL|auto|none|linear")]
    order: Option<String>,
    /// When the disk is unmounted, write what its machine has read first as BASE.order beside the
    /// first backing file, also on a server, merged with the order that is there. Only the first
    /// five minutes count
    #[arg(long, conflicts_with = "read_only")]
    learn: bool,
    /// Write nothing: neither what the guest writes nor copies of what it reads
    #[arg(short, long)]
    read_only: bool,
    /// Do not copy up what is read from the backing file
    #[arg(long)]
    no_copy_on_read: bool,
    /// Do not copy up what is read while the file system of IMAGE has less free space than this; 0
    /// is no limit. Writes and --stream are not affected [default: the smaller of 1G and 5 % of the
    /// file system]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    reserve: Option<u64>,
    /// Let other users open the disk, as far as its mode and owner allow (/etc/fuse.conf must
    /// permit it for users other than root)
    #[arg(long)]
    allow_other: bool,
    /// Owner of the disk's file: USER[:GROUP] by name or number [default: the user that mounts, or
    /// --user]
    #[arg(long, value_name = "USER[:GROUP]", requires = "allow_other")]
    owner: Option<String>,
    /// Permissions of the disk's file, in octal, such as 0660; those of other users need
    /// --allow-other [default: 0600]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    mode: Option<u16>,
    /// Make every write durable before it returns, as a mount with the option `sync`. Slow: each
    /// one waits for the host's disk
    #[arg(long)]
    sync: bool,
    /// How requests come from the kernel: over /dev/fuse or over io_uring; `auto` does what
    /// --prefer says
    #[arg(long, value_name = "TRANSPORT", default_value = "auto")]
    transport: TransportArg,
    /// What `--transport auto` prefers: `survival` takes /dev/fuse, with which no program notices
    /// when the serving process is killed; `speed` takes io_uring where the kernel offers it, with
    /// which a write can fail then, though rarely
    #[arg(long, value_name = "WHAT", default_value = "survival")]
    prefer: PreferArg,
    /// Format of the first backing file, where the image does not say; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<FormatArg>,
    /// Open backing files below this directory only, whatever names the images have in them; may be
    /// given several times [default: anywhere]
    #[arg(long = "backing-root", value_name = "DIR")]
    backing_roots: Vec<PathBuf>,
    /// Let the images of the chain name remote backing files below this prefix, such as
    /// s3://golden/ or https://images.example/linux/; may be given several times [default: none,
    /// and a remote backing file is refused]
    #[arg(long = "backing-url", value_name = "PREFIX")]
    backing_urls: Vec<String>,
    /// Before writing, count all references in the image and refuse it if its refcounts do not add
    /// up, for images you do not trust
    #[arg(long, conflicts_with = "read_only")]
    full_check: bool,
    /// Write the process id of the daemon's main process to this file; locked while it runs,
    /// removed at the end
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// As root: become this user once everything is open and mounted; open backing files with the
    /// rights of this user. The disk and the QMP socket are that user's; without GROUP, the user's
    /// own
    #[arg(long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// The restrictions of the serving daemon. `try`: use Landlock and seccomp, as far as the
    /// kernel has them, so that the daemon can open, remove and execute no file and connect to
    /// nothing. `require`: refuse to start without both. `off`: no restrictions beyond those of its
    /// user
    #[arg(long, value_name = "MODE", default_value = "try")]
    sandbox: SandboxArg,
    /// Set by `mount` when it starts itself again as the background process.
    #[arg(long, hide = true)]
    background_child: bool,
    /// Set by `mount` when it executes itself without the credentials of its environment: the
    /// descriptor of a file that has them.
    #[arg(long, hide = true, value_name = "DESCRIPTOR")]
    credentials_from: Option<RawFd>,
    /// Set by `upgrade` when it starts a keeper for a disk whose keeper has died: the socket on
    /// which that one has listened.
    #[arg(long, hide = true, value_name = "SOCKET")]
    keeper_of: Option<PathBuf>,
    /// Set by the mount keeper when it starts the serving process.
    #[arg(long, hide = true)]
    serving_process: bool,
    #[command(flatten)]
    sources: SourceArgs,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum PreferArg {
    /// /dev/fuse
    Survival,
    /// io_uring if the kernel offers it (echo Y > /sys/module/fuse/parameters/enable_uring),
    /// otherwise /dev/fuse
    Speed,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TransportArg {
    /// What --prefer says
    Auto,
    /// /dev/fuse
    Dev,
    /// io_uring, or an error
    Uring,
}

impl TransportArg {
    fn with(self, prefer: PreferArg) -> Transport {
        match self {
            TransportArg::Auto if prefer == PreferArg::Speed => Transport::Auto,
            TransportArg::Auto | TransportArg::Dev => Transport::Dev,
            TransportArg::Uring => Transport::Uring,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PriorityArg {
    Low,
    Normal,
}

impl From<PriorityArg> for Priority {
    fn from(priority: PriorityArg) -> Self {
        match priority {
            PriorityArg::Low => Priority::Low,
            PriorityArg::Normal => Priority::Normal,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SandboxArg {
    Try,
    Require,
    Off,
}

impl From<SandboxArg> for sandbox::Mode {
    fn from(mode: SandboxArg) -> Self {
        match mode {
            SandboxArg::Try => sandbox::Mode::Try,
            SandboxArg::Require => sandbox::Mode::Require,
            SandboxArg::Off => sandbox::Mode::Off,
        }
    }
}

/// The role of this process among those of `cordisk mount`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Started by the user without `-f`: starts a keeper in the background, waits until the disk is
    /// served, and ends.
    Parent,
    /// The mount keeper, which the user has started with `-f`, or a [`Role::Parent`]: starts a
    /// serving process.
    Keeper(Ground),
    /// Serves the disk.
    Server(Ground),
}

/// Whether the processes of a disk stay with the user that has started them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ground {
    /// They do (`-f`).
    Foreground,
    /// The serving process writes "ready" to standard output once the disk is mounted.
    Background,
}

impl Role {
    /// Whether the processes of the disk leave the user that has started them.
    pub fn is_in_background(self) -> bool {
        !matches!(self, Role::Keeper(Ground::Foreground) | Role::Server(Ground::Foreground))
    }
}

/// The speed of the stream of `--stream`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StreamSpeed {
    /// Bytes per second; 0 is unlimited.
    Fixed(u64),
    /// Set by a schedule or by a deadline.
    Planned(Plan),
}

impl From<Speed> for StreamSpeed {
    fn from(speed: Speed) -> Self {
        match speed {
            Speed::Fixed(speed) => StreamSpeed::Fixed(speed),
            Speed::Schedule(schedule) => StreamSpeed::Planned(Plan::Schedule(schedule)),
        }
    }
}

/// The order of the streams of a disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum OrderSource {
    /// The file beside the first backing file, if it exists, and what the guest reads.
    BesideBase,
    /// The same; without that file, what the file systems of the base say.
    FromFiles,
    /// What the guest reads.
    Nothing,
    /// From the start of the disk to its end.
    Ascending,
    /// This file, and what the guest reads.
    File(PathBuf),
    /// This file on a server, and what the guest reads.
    Url(SourceUrl),
}

impl OrderSource {
    fn parse(text: Option<&str>) -> Result<OrderSource> {
        Ok(match text {
            None => OrderSource::BesideBase,
            Some("auto") => OrderSource::FromFiles,
            Some("none") => OrderSource::Nothing,
            Some("linear") => OrderSource::Ascending,
            Some(name) if SourceUrl::is_source(name) => {
                let url = SourceUrl::parse(name).map_err(|error| error.context("--order"))?;
                OrderSource::Url(url)
            }
            Some(path) => OrderSource::File(absolute(Path::new(path))?),
        })
    }
}

/// The checked options of `cordisk mount`. All paths are absolute.
#[derive(Debug)]
pub struct MountConfig {
    /// The qcow2 image.
    pub image: PathBuf,
    /// The path where the disk appears.
    pub mountpoint: PathBuf,
    /// The role of this process.
    pub role: Role,
    /// The descriptor of a file with the credentials that were in the environment.
    pub credentials: Option<RawFd>,
    /// The socket of a keeper that has died, whose disk this one goes on with.
    pub keeper_of: Option<PathBuf>,
    /// The log file; if `None`, the log goes to standard error or to the log of the system.
    pub log: Option<PathBuf>,
    /// Device id and default job id.
    pub device: String,
    /// The path of the control socket.
    pub qmp: Option<PathBuf>,
    /// The address of the metrics server.
    pub metrics: Option<Address>,
    /// Speed of the stream job that is started with the mount; `None` starts none.
    pub stream: Option<StreamSpeed>,
    /// The action of that stream on an error.
    pub on_error: OnError,
    /// An interrupted stream is started again.
    pub resume: bool,
    /// The command to run when a stream has completed.
    pub on_complete: Option<OsString>,
    /// Whether streams give way to the guest.
    pub stream_priority: Priority,
    /// The order of streams.
    pub order: OrderSource,
    /// The order of the guest is written beside the first backing file at the end.
    pub learn: bool,
    /// Nothing is written.
    pub read_only: bool,
    /// Reads copy up data from the backing file.
    pub copy_on_read: bool,
    /// Free bytes of the overlay's file system below which reads do not copy up, if given.
    pub reserve: Option<u64>,
    /// Other users may open the disk.
    pub allow_other: bool,
    /// Owner of the disk's file, as typed, if given.
    pub owner: Option<String>,
    /// Permissions of the disk's file, if given.
    pub mode: Option<u16>,
    /// Every write is durable when it returns.
    pub sync: bool,
    /// How requests are received from the kernel.
    pub transport: Transport,
    /// Format of the first backing file, if the image does not name it.
    pub backing_format: Option<BackingFormat>,
    /// The image is checked completely before it is written to.
    pub full_check: bool,
    /// The path of the pidfile.
    pub pidfile: Option<PathBuf>,
    /// Directories that must contain all backing files; empty for no restriction.
    pub backing_roots: Vec<PathBuf>,
    /// The user to become, as typed. The serving process looks it up.
    pub user: Option<String>,
    /// How much of the sandbox is required.
    pub sandbox: sandbox::Mode,
    /// How remote backing files are read.
    pub sources: SourceConfig,
}

impl MountArgs {
    pub(super) fn check(self) -> Result<MountConfig> {
        if let Some(mode) = self.mode.filter(|mode| mode & 0o077 != 0 && !self.allow_other) {
            let text = format!(
                "--mode {mode:04o}: permissions of other users need --allow-other; without it no other user can open the disk"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let order = OrderSource::parse(self.order.as_deref())?;
        let mut sources = self.sources.check(&self.backing_urls)?;
        sources.writes_orders = self.learn;
        if let OrderSource::Url(url) = &order {
            sources = sources.also(url.as_str());
        }
        Ok(MountConfig {
            image: absolute(&self.image)?,
            mountpoint: absolute(&self.mountpoint)?,
            role: {
                let ground =
                    if self.background_child { Ground::Background } else { Ground::Foreground };
                match (self.serving_process, self.background_child || self.foreground) {
                    (true, _) => Role::Server(ground),
                    (false, true) => Role::Keeper(ground),
                    (false, false) => Role::Parent,
                }
            },
            credentials: self.credentials_from,
            keeper_of: self.keeper_of,
            log: self.log.as_deref().map(absolute).transpose()?,
            device: self.device,
            qmp: self.qmp.as_deref().map(absolute).transpose()?,
            metrics: self.metrics,
            stream: self.stream.then(|| match self.finish_by {
                Some(at) => StreamSpeed::Planned(at.into()),
                None => self.speed.into(),
            }),
            on_error: self.on_error.into(),
            resume: !self.no_resume,
            on_complete: self.on_complete,
            stream_priority: self.stream_priority.into(),
            order,
            learn: self.learn,
            copy_on_read: !self.no_copy_on_read && !self.read_only,
            read_only: self.read_only,
            full_check: self.full_check,
            reserve: self.reserve,
            allow_other: self.allow_other,
            owner: self.owner,
            mode: self.mode,
            sync: self.sync,
            transport: self.transport.with(self.prefer),
            backing_format: self.backing_format.map(BackingFormat::from),
            pidfile: self.pidfile.as_deref().map(absolute).transpose()?,
            backing_roots: self
                .backing_roots
                .iter()
                .map(|root| absolute(root))
                .collect::<Result<_>>()?,
            user: self.user,
            sandbox: self.sandbox.into(),
            sources,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Args, Command};
    use super::*;

    fn mount(line: &[&str]) -> MountConfig {
        match Args::try_parse_from([&["cordisk", "mount"], line].concat()).unwrap().check().unwrap()
        {
            Command::Mount(config) => *config,
            other => panic!("not mount: {other:?}"),
        }
    }

    #[test]
    fn mount_defaults() {
        let config = mount(&["/i", "/m"]);
        assert_eq!(config.role, Role::Parent);
        assert_eq!(
            (config.image.as_path(), config.mountpoint.as_path()),
            (Path::new("/i"), Path::new("/m"))
        );
        assert_eq!(config.device, "drive0");
        assert!(config.copy_on_read && !config.read_only && !config.allow_other);
        assert_eq!(
            (config.qmp, config.stream, config.backing_format, config.pidfile),
            (None, None, None, None)
        );
        assert_eq!(
            (config.user, config.sandbox, config.backing_roots),
            (None, sandbox::Mode::Try, vec![])
        );
        assert_eq!(config.stream_priority, Priority::Low);
        assert_eq!(config.order, OrderSource::BesideBase);
    }

    #[test]
    fn an_order_is_a_word_a_file_or_a_url() {
        let order = |value: &str| mount(&["--order", value, "/i", "/m"]);
        assert_eq!(order("auto").order, OrderSource::FromFiles);
        assert_eq!(order("none").order, OrderSource::Nothing);
        assert_eq!(order("linear").order, OrderSource::Ascending);
        assert_eq!(order("/o/none").order, OrderSource::File("/o/none".into()));
        assert!(matches!(order("./none").order, OrderSource::File(path) if path.is_absolute()));
        let config = order("https://images.example/a.order");
        let url = SourceUrl::parse("https://images.example/a.order").unwrap();
        assert!(config.sources.allowed.contains(&url));
        assert_eq!(config.order, OrderSource::Url(url));
    }

    #[test]
    fn mount_options_mean_what_they_say() {
        let config =
            mount(&["-f", "--stream", "--speed", "10M", "--qmp", "s", "--device", "d", "/i", "/m"]);
        assert_eq!(config.metrics, None);
        assert_eq!(
            (config.role, config.stream.clone(), config.device.as_str()),
            (Role::Keeper(Ground::Foreground), Some(StreamSpeed::Fixed(10 << 20)), "d")
        );
        assert!(config.qmp.unwrap().is_absolute());
        let config = mount(&["-r", "--backing-format", "raw", "/i", "/m"]);
        assert!(config.read_only && !config.copy_on_read);
        assert_eq!(config.backing_format, Some(BackingFormat::Raw));
        let config = mount(&[
            "--user",
            "u:g",
            "--sandbox",
            "require",
            "--backing-root",
            "a",
            "--backing-root=/b",
            "/i",
            "/m",
        ]);
        assert_eq!((config.user.as_deref(), config.sandbox), (Some("u:g"), sandbox::Mode::Require));
        assert!(
            config.backing_roots.len() == 2
                && config.backing_roots.iter().all(|root| root.is_absolute())
        );
        for (words, role) in [
            (&["--background-child"][..], Role::Keeper(Ground::Background)),
            (&["--serving-process", "--background-child"], Role::Server(Ground::Background)),
            (&["--serving-process", "-f"], Role::Server(Ground::Foreground)),
        ] {
            assert_eq!(mount(&[words, &["/i", "/m"]].concat()).role, role, "{words:?}");
        }
        assert_eq!(mount(&["--credentials-from=7", "/i", "/m"]).credentials, Some(7));
        assert_eq!(mount(&["/i", "/m"]).credentials, None);
        assert_eq!(
            mount(&["--log", "/var/log/vm", "/i", "/m"]).log.as_deref(),
            Some(Path::new("/var/log/vm"))
        );
        assert_eq!(
            mount(&["--metrics", "9184", "/i", "/m"]).metrics.unwrap().to_string(),
            "127.0.0.1:9184"
        );
        assert!(
            Args::try_parse_from(["cordisk", "mount", "--metrics", "nowhere", "/i", "/m"]).is_err()
        );
        assert_eq!(config.reserve, None);
        assert_eq!(
            mount(&["--stream-priority", "normal", "/i", "/m"]).stream_priority,
            Priority::Normal
        );
        assert_eq!(mount(&["--reserve", "2G", "/i", "/m"]).reserve, Some(2 << 30));
        assert!(!mount(&["--no-copy-on-read", "/i", "/m"]).copy_on_read);
        let config =
            mount(&["--allow-other", "--owner", "jo:kvm", "--mode", "0660", "--sync", "/i", "/m"]);
        assert_eq!(
            (config.owner.as_deref(), config.mode, config.sync),
            (Some("jo:kvm"), Some(0o660), true)
        );
        assert_eq!(mount(&["--mode", "400", "/i", "/m"]).mode, Some(0o400));
        let alone = Args::try_parse_from(["cordisk", "mount", "--mode", "0640", "/i", "/m"])
            .unwrap()
            .check();
        assert!(format!("{alone:?}").contains("--allow-other"), "{alone:?}");
        assert!(
            Args::try_parse_from(["cordisk", "mount", "--owner", "jo", "/i", "/m"]).is_err(),
            "nobody else could open it"
        );
        for wrong in ["", "8", "0o600", "1777", "rw", "+600"] {
            assert!(
                Args::try_parse_from(["cordisk", "mount", &format!("--mode={wrong}"), "/i", "/m"])
                    .is_err(),
                "{wrong:?}"
            );
        }
        assert_eq!(mount(&["--stream", "--on-error", "stop", "/i", "/m"]).on_error, OnError::Stop);
        assert_eq!(mount(&["--stream", "/i", "/m"]).on_error, OnError::Report);
    }

    #[test]
    fn what_becomes_of_streams_is_said_on_the_command_line() {
        let config = mount(&["/i", "/m"]);
        assert_eq!((config.resume, config.on_complete), (true, None));
        let config = mount(&["--no-resume", "--on-complete", "true", "/i", "/m"]);
        assert_eq!((config.resume, config.on_complete), (false, Some("true".into())));
        let speed = |line: &[&str]| mount(&[line, &["/i", "/m"]].concat()).stream;
        assert_eq!(speed(&["--stream"]), Some(StreamSpeed::Fixed(0)));
        let schedule = Plan::Schedule("08:00=20M,20:00=0".parse().unwrap());
        assert_eq!(
            speed(&["--stream", "--speed", "08:00=20M,20:00=0"]),
            Some(StreamSpeed::Planned(schedule))
        );
        let six: Minute = "06:00".parse().unwrap();
        assert_eq!(
            speed(&["--stream", "--finish-by", "06:00"]),
            Some(StreamSpeed::Planned(six.into()))
        );
        let refused = |line: &[&str]| {
            Args::try_parse_from([&["cordisk", "mount"], line, &["/i", "/m"]].concat())
                .unwrap_err()
                .to_string()
        };
        assert!(
            refused(&["--stream", "--speed", "1M", "--finish-by", "06:00"])
                .contains("cannot be used with")
        );
        assert!(refused(&["--finish-by", "06:00"]).contains("--stream"));
        assert!(refused(&["--stream", "--finish-by", "24:00"]).contains("HH:MM"));
        assert!(refused(&["--stream", "--speed", "08:00=20X"]).contains("08:00=20M,20:00=0"));
    }
}
