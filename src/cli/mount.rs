//! `cordisk mount`: its options, and what they mean.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::ValueEnum;

use super::values::{
    FormatArg, OnErrorArg, absolute, parse_device, parse_minute, parse_mode, parse_shell_command, parse_size, parse_speed,
};
use crate::format::BackingFormat;
use crate::fuse::Transport;
use crate::job::OnError;
use crate::metrics::Address;
use crate::sandbox;
use crate::stream::{Minute, Plan, Priority, Speed};
use crate::{Error, ErrorKind, Result};

/// Device id, and job id of the stream it starts, where none is given: QEMU's name for the first drive.
const DEFAULT_DEVICE: &str = "drive0";

#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The qcow2 image
    image: PathBuf,
    /// Where the disk appears: a regular file, or a name that does not exist, which is created and removed again at the end
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
    /// Tell metrics for Prometheus at this TCP address, over HTTP: PORT alone is 127.0.0.1, port 0 any that is free (the log says which)
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Address>,
    /// Copy everything up in the background, then drop the backing file (as block-stream does)
    #[arg(long, conflicts_with = "read_only")]
    stream: bool,
    /// Limit of --stream in bytes per second, such as 20M or 1.5GiB/s; 0 is unlimited. Or by the local time of day, such as
    /// 08:00=20M,20:00=0
    #[arg(long, value_name = "RATE|SCHEDULE", requires = "stream", default_value = "0", value_parser = parse_speed)]
    speed: Speed,
    /// Give --stream the speed that it needs to be finished by this local time, and say in the log when it cannot
    #[arg(long, value_name = "HH:MM", requires = "stream", conflicts_with = "speed", value_parser = parse_minute)]
    finish_by: Option<Minute>,
    /// What an error of reading or writing does to --stream
    #[arg(long, value_name = "ACTION", requires = "stream", default_value = "report")]
    on_error: OnErrorArg,
    /// Do not start the stream again that was running when the last daemon of this image ended; it is not forgotten
    #[arg(long)]
    no_resume: bool,
    /// Run this with /bin/sh when a stream has completed, outside of the sandbox, as the user that the daemon becomes. It has CORDISK_IMAGE,
    /// CORDISK_MOUNTPOINT, CORDISK_DEVICE and CORDISK_QMP in its environment
    #[arg(long, value_name = "CMD", value_parser = parse_shell_command())]
    on_complete: Option<OsString>,
    /// What streams without a speed do while the guest reads, writes or syncs: `low` gives way to it, `normal` does not
    #[arg(long, value_name = "PRIORITY", default_value = "low")]
    stream_priority: PriorityArg,
    /// Write nothing: neither what the guest writes nor copies of what it reads
    #[arg(short, long)]
    read_only: bool,
    /// Do not copy up what is read from the backing file
    #[arg(long)]
    no_copy_on_read: bool,
    /// Do not copy up what is read while less than this is free where IMAGE lies; 0 is no limit. Writes and --stream are not affected
    /// [default: the smaller of 1G and 5 % of the file system]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    reserve: Option<u64>,
    /// Let other users open the disk, as far as its mode and owner allow (/etc/fuse.conf must permit it for whoever is not root)
    #[arg(long)]
    allow_other: bool,
    /// Owner of the disk's file: USER[:GROUP] by name or number [default: the user who mounts, or --user]
    #[arg(long, value_name = "USER[:GROUP]", requires = "allow_other")]
    owner: Option<String>,
    /// Permissions of the disk's file, in octal, such as 0660; those of other users need --allow-other [default: 0600]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    mode: Option<u16>,
    /// Make every write durable before it returns, as a mount with the option `sync`. Slow: each one waits for the host's disk
    #[arg(long)]
    sync: bool,
    /// How requests come from the kernel: over io_uring where it offers that, over /dev/fuse otherwise
    #[arg(long, value_name = "TRANSPORT", default_value = "auto")]
    transport: TransportArg,
    /// Format of the first backing file, where the image does not say; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<FormatArg>,
    /// Open backing files below this directory only, whatever names the images have in them; may be given several times [default: anywhere]
    #[arg(long = "backing-root", value_name = "DIR")]
    backing_roots: Vec<PathBuf>,
    /// Before writing, count all references in the image and refuse it if its refcounts do not add up, for images you do not trust
    #[arg(long, conflicts_with = "read_only")]
    full_check: bool,
    /// Write the daemon's process id to this file; locked while it runs, removed at the end
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// As root: become this user once everything is open and mounted; open backing files with the rights of this user. The disk and the QMP
    /// socket are that user's; without GROUP, the user's own
    #[arg(long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// What the daemon may still do once it serves. `try`: with Landlock and seccomp, as far as the kernel has them, open, remove, execute and
    /// connect to nothing. `require`: refuse to start without both. `off`: whatever its user may
    #[arg(long, value_name = "MODE", default_value = "try")]
    sandbox: SandboxArg,
    /// Set by `mount` when it starts itself again as the background process.
    #[arg(long, hide = true)]
    background_child: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TransportArg {
    /// io_uring if the kernel offers it (echo Y > /sys/module/fuse/parameters/enable_uring), otherwise /dev/fuse
    Auto,
    /// /dev/fuse
    Dev,
    /// io_uring, or an error
    Uring,
}

impl From<TransportArg> for Transport {
    fn from(transport: TransportArg) -> Self {
        match transport {
            TransportArg::Auto => Transport::Auto,
            TransportArg::Dev => Transport::Dev,
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

/// Which of the processes of `cordisk mount` this one is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Serves in the foreground (`-f`).
    Foreground,
    /// Started by the user without `-f`: starts a [`Role::Child`], waits until it is ready, ends.
    Parent,
    /// Serves in the background; says "ready" on standard output once the disk is mounted.
    Child,
}

/// How fast the stream of `--stream` is to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StreamSpeed {
    /// Bytes per second; 0 is unlimited.
    Fixed(u64),
    /// As the time of day or a deadline want it.
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

/// `cordisk mount`, checked. All paths are absolute.
#[derive(Debug)]
pub struct MountConfig {
    /// The qcow2 image.
    pub image: PathBuf,
    /// Where the disk appears.
    pub mountpoint: PathBuf,
    /// Which process this is.
    pub role: Role,
    /// Where the log goes, if not to standard error or to the log of the system.
    pub log: Option<PathBuf>,
    /// Device id and default job id.
    pub device: String,
    /// Where QMP clients connect.
    pub qmp: Option<PathBuf>,
    /// Where metrics are told.
    pub metrics: Option<Address>,
    /// Speed of the stream job to start at once, if one is to be started.
    pub stream: Option<StreamSpeed>,
    /// What an error does to that stream.
    pub on_error: OnError,
    /// A stream that was interrupted is started again.
    pub resume: bool,
    /// Run when a stream has completed.
    pub on_complete: Option<OsString>,
    /// Whether streams give way to the guest.
    pub stream_priority: Priority,
    /// Nothing is written.
    pub read_only: bool,
    /// Reads copy up.
    pub copy_on_read: bool,
    /// Free bytes of the overlay's file system below which reads do not copy up, where given.
    pub reserve: Option<u64>,
    /// Other users may open the disk.
    pub allow_other: bool,
    /// Who the disk's file belongs to, as typed, where that is somebody else.
    pub owner: Option<String>,
    /// Its permissions, where they were given.
    pub mode: Option<u16>,
    /// Every write is durable when it returns.
    pub sync: bool,
    /// How requests come from the kernel.
    pub transport: Transport,
    /// Format of the first backing file, where the image does not say.
    pub backing_format: Option<BackingFormat>,
    /// The image is checked in full before it is written.
    pub full_check: bool,
    /// Where the process id goes.
    pub pidfile: Option<PathBuf>,
    /// Directories that backing files must lie in, if there are any.
    pub backing_roots: Vec<PathBuf>,
    /// Who to become, as typed: looked up by the process that serves.
    pub user: Option<String>,
    /// How much of a sandbox there has to be.
    pub sandbox: sandbox::Mode,
}

impl MountArgs {
    pub(super) fn check(self) -> Result<MountConfig> {
        if let Some(mode) = self.mode.filter(|mode| mode & 0o077 != 0 && !self.allow_other) {
            let text =
                format!("--mode {mode:04o}: permissions of other users need --allow-other; without it nobody else can open the disk");
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        Ok(MountConfig {
            image: absolute(&self.image)?,
            mountpoint: absolute(&self.mountpoint)?,
            role: match (self.background_child, self.foreground) {
                (true, _) => Role::Child,
                (false, true) => Role::Foreground,
                (false, false) => Role::Parent,
            },
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
            copy_on_read: !self.no_copy_on_read && !self.read_only,
            read_only: self.read_only,
            full_check: self.full_check,
            reserve: self.reserve,
            allow_other: self.allow_other,
            owner: self.owner,
            mode: self.mode,
            sync: self.sync,
            transport: self.transport.into(),
            backing_format: self.backing_format.map(BackingFormat::from),
            pidfile: self.pidfile.as_deref().map(absolute).transpose()?,
            backing_roots: self.backing_roots.iter().map(|root| absolute(root)).collect::<Result<_>>()?,
            user: self.user,
            sandbox: self.sandbox.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::super::{Args, Command};
    use super::*;

    fn mount(line: &[&str]) -> MountConfig {
        match Args::try_parse_from([&["cordisk", "mount"], line].concat()).unwrap().check().unwrap() {
            Command::Mount(config) => *config,
            other => panic!("not mount: {other:?}"),
        }
    }

    #[test]
    fn mount_defaults() {
        let config = mount(&["/i", "/m"]);
        assert_eq!(config.role, Role::Parent);
        assert_eq!((config.image.as_path(), config.mountpoint.as_path()), (Path::new("/i"), Path::new("/m")));
        assert_eq!(config.device, "drive0");
        assert!(config.copy_on_read && !config.read_only && !config.allow_other);
        assert_eq!((config.qmp, config.stream, config.backing_format, config.pidfile), (None, None, None, None));
        assert_eq!((config.user, config.sandbox, config.backing_roots), (None, sandbox::Mode::Try, vec![]));
        assert_eq!(config.stream_priority, Priority::Low);
    }

    #[test]
    fn mount_options_mean_what_they_say() {
        let config = mount(&["-f", "--stream", "--speed", "10M", "--qmp", "s", "--device", "d", "/i", "/m"]);
        assert_eq!(config.metrics, None);
        assert_eq!(
            (config.role, config.stream.clone(), config.device.as_str()),
            (Role::Foreground, Some(StreamSpeed::Fixed(10 << 20)), "d")
        );
        assert!(config.qmp.unwrap().is_absolute());
        let config = mount(&["-r", "--backing-format", "raw", "/i", "/m"]);
        assert!(config.read_only && !config.copy_on_read);
        assert_eq!(config.backing_format, Some(BackingFormat::Raw));
        let config = mount(&["--user", "u:g", "--sandbox", "require", "--backing-root", "a", "--backing-root=/b", "/i", "/m"]);
        assert_eq!((config.user.as_deref(), config.sandbox), (Some("u:g"), sandbox::Mode::Require));
        assert!(config.backing_roots.len() == 2 && config.backing_roots.iter().all(|root| root.is_absolute()));
        assert_eq!(mount(&["--background-child", "/i", "/m"]).role, Role::Child);
        assert_eq!(mount(&["--log", "/var/log/vm", "/i", "/m"]).log.as_deref(), Some(Path::new("/var/log/vm")));
        assert_eq!(mount(&["--metrics", "9184", "/i", "/m"]).metrics.unwrap().to_string(), "127.0.0.1:9184");
        assert!(Args::try_parse_from(["cordisk", "mount", "--metrics", "nowhere", "/i", "/m"]).is_err());
        assert_eq!(config.reserve, None);
        assert_eq!(mount(&["--stream-priority", "normal", "/i", "/m"]).stream_priority, Priority::Normal);
        assert_eq!(mount(&["--reserve", "2G", "/i", "/m"]).reserve, Some(2 << 30));
        assert!(!mount(&["--no-copy-on-read", "/i", "/m"]).copy_on_read);
        let config = mount(&["--allow-other", "--owner", "jo:kvm", "--mode", "0660", "--sync", "/i", "/m"]);
        assert_eq!((config.owner.as_deref(), config.mode, config.sync), (Some("jo:kvm"), Some(0o660), true));
        assert_eq!(mount(&["--mode", "400", "/i", "/m"]).mode, Some(0o400));
        let alone = Args::try_parse_from(["cordisk", "mount", "--mode", "0640", "/i", "/m"]).unwrap().check();
        assert!(format!("{alone:?}").contains("--allow-other"), "{alone:?}");
        assert!(Args::try_parse_from(["cordisk", "mount", "--owner", "jo", "/i", "/m"]).is_err(), "nobody else could open it");
        for wrong in ["", "8", "0o600", "1777", "rw", "+600"] {
            assert!(Args::try_parse_from(["cordisk", "mount", &format!("--mode={wrong}"), "/i", "/m"]).is_err(), "{wrong:?}");
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
        assert_eq!(speed(&["--stream", "--speed", "08:00=20M,20:00=0"]), Some(StreamSpeed::Planned(schedule)));
        let six: Minute = "06:00".parse().unwrap();
        assert_eq!(speed(&["--stream", "--finish-by", "06:00"]), Some(StreamSpeed::Planned(six.into())));
        let refused = |line: &[&str]| Args::try_parse_from([&["cordisk", "mount"], line, &["/i", "/m"]].concat()).unwrap_err().to_string();
        assert!(refused(&["--stream", "--speed", "1M", "--finish-by", "06:00"]).contains("cannot be used with"));
        assert!(refused(&["--finish-by", "06:00"]).contains("--stream"));
        assert!(refused(&["--stream", "--finish-by", "24:00"]).contains("HH:MM"));
        assert!(refused(&["--stream", "--speed", "08:00=20X"]).contains("08:00=20M,20:00=0"));
    }
}
