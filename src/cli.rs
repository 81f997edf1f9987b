//! The command line, in two steps: what was typed ([`Args`], by clap) and what it means ([`Command`], checked).
//!
//! **Touches:** `format`, `create` and `check` for their option types, the current directory (paths are made absolute here, because the daemon
//! moves to `/`). **Never:** opens a file. Wrong usage is reported by clap and ends with exit status 2 (1 for `check`).

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand, ValueEnum};

use crate::check::{CheckOptions, Output, Repair};
use crate::create::CreateOptions;
use crate::error::Context;
use crate::format::BackingFormat;
use crate::fuse::Transport;
use crate::sandbox;
use crate::stream::Priority;
use crate::{Error, ErrorKind, Result};

/// Device id, and job id of the stream it starts, where none is given: QEMU's name for the first drive.
const DEFAULT_DEVICE: &str = "drive0";

/// Longest device id. QMP job ids are bounded to the same length.
const DEVICE_ID_MAX: usize = 128;

/// A copy-on-read virtual disk: mounts a qcow2 overlay as a raw file, fills it from its backing file as it is read,
/// streams the rest in the background, and is controlled over QMP.
#[derive(Debug, Parser)]
#[command(name = "cordisk", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Args {
    #[command(subcommand)]
    command: Typed,
}

#[derive(Debug, Subcommand)]
enum Typed {
    /// Create a qcow2 overlay above a backing file
    Create(CreateArgs),
    /// Mount a qcow2 image as a raw disk file
    ///
    /// The guest's disk appears as one regular file at MOUNTPOINT. The command returns when the disk is mounted (and the QMP socket
    /// accepts), and a daemon stays in the background until the file is unmounted: `umount MOUNTPOINT`, or `fusermount3 -u MOUNTPOINT`
    /// for whoever is not root. SIGTERM unmounts as well; while the file is in use the daemon writes everything back and goes on serving,
    /// until a second SIGTERM.
    ///
    /// After a daemon was killed, the same command mounts again: it replaces the dead mount of this image at MOUNTPOINT, and gives back the
    /// clusters that were leaked.
    #[command(after_help = "Example: cordisk mount --qmp qmp.sock overlay.qcow2 disk")]
    Mount(MountArgs),
    /// Check a qcow2 image, and give back what a crash has leaked in it
    ///
    /// Counts all references inside the image and holds its refcounts against them, with the output and the exit status of qemu-img check:
    /// 0 all is well, 1 the check could not be done, 2 there are corruptions, 3 clusters are leaked and nothing else. Backing files are not
    /// opened. An image that is mounted cannot be checked. A read-write mount after a crash gives leaks back by itself.
    #[command(after_help = "Example: cordisk check --repair leaks overlay.qcow2")]
    Check(CheckArgs),
    /// The process that `mount` starts to mount and unmount.
    #[command(hide = true)]
    KeepMount,
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The qcow2 image
    image: PathBuf,
    /// Repair what is wrong: "leaks" lowers the refcounts of leaked clusters, if there are no corruptions; nothing else is repaired
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<RepairArg>,
    /// For people, or as one JSON object with the members of qemu-img check
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    output: OutputArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RepairArg {
    Leaks,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OutputArg {
    Human,
    Json,
}

#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// The file to create; it must not exist
    overlay: PathBuf,
    /// Backing file. A relative name is relative to the directory of OVERLAY and is stored as given
    #[arg(short, long = "backing", value_name = "BASE")]
    base: String,
    /// Format of the backing file; it is never guessed
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT")]
    format: FormatArg,
    /// Size of the disk in bytes; K, M, G and T mean powers of 1024 [default: that of the backing file]
    #[arg(value_parser = parse_size)]
    size: Option<u64>,
    /// Unit of allocation and of copying up, a power of two from 512 to 2M
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = parse_cluster_size)]
    cluster_size: u64,
}

#[derive(Debug, clap::Args)]
struct MountArgs {
    /// The qcow2 image
    image: PathBuf,
    /// Where the disk appears: a regular file, or a name that does not exist, which is created and removed again at the end
    mountpoint: PathBuf,
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    foreground: bool,
    /// Name of the disk on the QMP socket, and of the job of --stream
    #[arg(long, value_name = "ID", default_value = DEFAULT_DEVICE, value_parser = parse_device)]
    device: String,
    /// Listen for QMP clients on this Unix socket
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// Copy everything up in the background, then drop the backing file (as block-stream does)
    #[arg(long, conflicts_with = "read_only")]
    stream: bool,
    /// Limit of --stream in bytes per second; K, M, G and T mean powers of 1024, 0 is unlimited
    #[arg(long, value_name = "RATE", requires = "stream", default_value = "0", value_parser = parse_size)]
    speed: u64,
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
    /// As root: become this user once everything is open and mounted. The disk and the QMP socket are that user's; without GROUP, the user's own
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
enum FormatArg {
    Raw,
    Qcow2,
}

impl From<FormatArg> for BackingFormat {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => BackingFormat::Raw,
            FormatArg::Qcow2 => BackingFormat::Qcow2,
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

/// What the program is asked to do, checked.
#[derive(Debug)]
pub enum Command {
    /// `cordisk create`.
    Create(CreateOptions),
    /// `cordisk mount`.
    Mount(MountConfig),
    /// `cordisk check`.
    Check(CheckOptions),
    /// What `cordisk mount` runs as its mount keeper.
    KeepMount,
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

/// `cordisk mount`, checked. All paths are absolute.
#[derive(Debug)]
pub struct MountConfig {
    /// The qcow2 image.
    pub image: PathBuf,
    /// Where the disk appears.
    pub mountpoint: PathBuf,
    /// Which process this is.
    pub role: Role,
    /// Device id and default job id.
    pub device: String,
    /// Where QMP clients connect.
    pub qmp: Option<PathBuf>,
    /// Speed of the stream job to start at once, in bytes per second (0: unlimited), if one is to be started.
    pub stream: Option<u64>,
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

/// Parses the command line of this process. Prints help or usage errors itself and ends the process then.
///
/// # Errors
/// The current directory, to which relative paths refer, is gone.
pub fn parse() -> Result<Command> {
    match Args::try_parse() {
        Ok(args) => args.check(),
        Err(error) => {
            // Where this fails nobody listens.
            let _ = error.print();
            std::process::exit(usage_status(&error, std::env::args_os().nth(1).as_deref()));
        }
    }
}

/// The exit status of help and of wrong usage. That of `check` must not be taken for corruptions, so there it is 1, as with qemu-img.
fn usage_status(error: &clap::Error, command: Option<&OsStr>) -> i32 {
    match error.exit_code() {
        0 => 0,
        _ if command == Some(OsStr::new("check")) => 1,
        status => status,
    }
}

impl Args {
    /// The second step: from what was typed to what it means.
    fn check(self) -> Result<Command> {
        Ok(match self.command {
            Typed::Create(args) => Command::Create(CreateOptions {
                overlay: args.overlay,
                base: args.base,
                format: args.format.into(),
                size: args.size,
                cluster_size: args.cluster_size,
            }),
            Typed::Mount(args) => Command::Mount(args.check()?),
            Typed::Check(args) => Command::Check(CheckOptions {
                image: args.image,
                repair: args.repair.map(|RepairArg::Leaks| Repair::Leaks),
                output: match args.output {
                    OutputArg::Human => Output::Human,
                    OutputArg::Json => Output::Json,
                },
            }),
            Typed::KeepMount => Command::KeepMount,
        })
    }
}

impl MountArgs {
    fn check(self) -> Result<MountConfig> {
        Ok(MountConfig {
            image: absolute(&self.image)?,
            mountpoint: absolute(&self.mountpoint)?,
            role: match (self.background_child, self.foreground) {
                (true, _) => Role::Child,
                (false, true) => Role::Foreground,
                (false, false) => Role::Parent,
            },
            device: self.device,
            qmp: self.qmp.as_deref().map(absolute).transpose()?,
            stream: self.stream.then_some(self.speed),
            stream_priority: self.stream_priority.into(),
            copy_on_read: !self.no_copy_on_read && !self.read_only,
            read_only: self.read_only,
            full_check: self.full_check,
            reserve: self.reserve,
            allow_other: self.allow_other,
            transport: self.transport.into(),
            backing_format: self.backing_format.map(BackingFormat::from),
            pidfile: self.pidfile.as_deref().map(absolute).transpose()?,
            backing_roots: self.backing_roots.iter().map(|root| absolute(root)).collect::<Result<_>>()?,
            user: self.user,
            sandbox: self.sandbox.into(),
        })
    }
}

/// Relative to the current directory as it is now; symbolic links stay as they are.
fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Error::new(ErrorKind::InvalidArgument, "an empty file name names no file"));
    }
    std::path::absolute(path).context(|| format!("{}: the current directory", path.display()))
}

/// Bytes, or bytes per second: a decimal number and at most one of K, M, G, T (powers of 1024, either case).
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.bytes().last().map(|unit| unit.to_ascii_uppercase()) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err("expected a number of bytes, such as 65536, 64K or 10G".to_string());
    }
    // Sizes and QMP speeds are signed 64-bit numbers in every interface that they pass through.
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| "number too large".to_string())
}

/// A cluster size that qcow2 knows and QEMU opens.
fn parse_cluster_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size.is_power_of_two() && (512..=2 << 20).contains(&size) {
        Ok(size)
    } else {
        Err("expected a power of two from 512 to 2M".to_string())
    }
}

/// A QMP id: a letter, then letters, digits, `-`, `.`, `_` (QEMU's `id_wellformed()`).
fn parse_device(text: &str) -> Result<String, String> {
    let wellformed = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
        && text.len() <= DEVICE_ID_MAX;
    if wellformed {
        Ok(text.to_string())
    } else {
        Err(format!("expected a letter, then letters, digits, '-', '.' or '_', at most {DEVICE_ID_MAX} in all"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &[&str]) -> Command {
        Args::try_parse_from(line).unwrap().check().unwrap()
    }

    fn mount(line: &[&str]) -> MountConfig {
        match command(line) {
            Command::Mount(config) => config,
            Command::Create(_) | Command::Check(_) | Command::KeepMount => panic!("not mount"),
        }
    }

    fn usage_error(line: &[&str]) -> i32 {
        Args::try_parse_from(line).unwrap_err().exit_code()
    }

    #[test]
    fn clap_finds_no_contradiction_in_the_definition() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn sizes_have_binary_suffixes() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("64K"), Ok(65536));
        assert_eq!(parse_size("64k"), Ok(65536));
        assert_eq!(parse_size("3M"), Ok(3 << 20));
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
        for wrong in ["", "K", "-1", "+1", "1.5G", "1KB", "1 K", "0x10", "٣", "1é", "8388608T", "99999999999999999999"] {
            assert!(parse_size(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(parse_size("8388607T"), Ok(8_388_607 << 40));
    }

    #[test]
    fn cluster_sizes_are_those_of_qcow2() {
        assert_eq!(parse_cluster_size("512"), Ok(512));
        assert_eq!(parse_cluster_size("2M"), Ok(2 << 20));
        for wrong in ["0", "256", "1000", "4M"] {
            assert!(parse_cluster_size(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn device_ids_are_those_of_qmp() {
        assert!(parse_device("drive0").is_ok());
        assert!(parse_device("a-b.c_9").is_ok());
        for wrong in ["", "0a", "-a", "a b", "a,b", "é", &"a".repeat(129)] {
            assert!(parse_device(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn mount_defaults() {
        let config = mount(&["cordisk", "mount", "/i", "/m"]);
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
        let config = mount(&["cordisk", "mount", "-f", "--stream", "--speed", "10M", "--qmp", "s", "--device", "d", "/i", "/m"]);
        assert_eq!((config.role, config.stream, config.device.as_str()), (Role::Foreground, Some(10 << 20), "d"));
        assert!(config.qmp.unwrap().is_absolute());
        let config = mount(&["cordisk", "mount", "-r", "--backing-format", "raw", "/i", "/m"]);
        assert!(config.read_only && !config.copy_on_read);
        assert_eq!(config.backing_format, Some(BackingFormat::Raw));
        let config =
            mount(&["cordisk", "mount", "--user", "u:g", "--sandbox", "require", "--backing-root", "a", "--backing-root=/b", "/i", "/m"]);
        assert_eq!((config.user.as_deref(), config.sandbox), (Some("u:g"), sandbox::Mode::Require));
        assert!(config.backing_roots.len() == 2 && config.backing_roots.iter().all(|root| root.is_absolute()));
        assert_eq!(mount(&["cordisk", "mount", "--background-child", "/i", "/m"]).role, Role::Child);
        assert_eq!(config.reserve, None);
        assert_eq!(mount(&["cordisk", "mount", "--stream-priority", "normal", "/i", "/m"]).stream_priority, Priority::Normal);
        assert_eq!(mount(&["cordisk", "mount", "--reserve", "2G", "/i", "/m"]).reserve, Some(2 << 30));
        assert!(!mount(&["cordisk", "mount", "--no-copy-on-read", "/i", "/m"]).copy_on_read);
    }

    #[test]
    fn create_takes_the_size_as_an_option() {
        let Command::Create(options) = command(&["cordisk", "create", "o", "-b", "base", "-F", "raw"]) else { panic!("not create") };
        assert_eq!((options.size, options.cluster_size, options.base.as_str()), (None, 65536, "base"));
        let Command::Create(options) = command(&["cordisk", "create", "o", "-b", "base", "-F", "qcow2", "1G", "--cluster-size", "4K"])
        else {
            panic!("not create")
        };
        assert_eq!((options.size, options.cluster_size, options.format), (Some(1 << 30), 4096, BackingFormat::Qcow2));
    }

    #[test]
    fn check_takes_what_qemu_img_takes() {
        let Command::Check(options) = command(&["cordisk", "check", "--repair", "leaks", "--output", "json", "i"]) else {
            panic!("not check")
        };
        assert_eq!((options.image.as_path(), options.repair, options.output), (Path::new("i"), Some(Repair::Leaks), Output::Json));
        let Command::Check(options) = command(&["cordisk", "check", "i"]) else { panic!("not check") };
        assert_eq!((options.repair, options.output), (None, Output::Human));
        let error = Args::try_parse_from(["cordisk", "check", "--repair", "all", "i"]).unwrap_err();
        assert_eq!(usage_status(&error, Some(OsStr::new("check"))), 1, "2 means corruptions");
        assert_eq!(usage_status(&error, Some(OsStr::new("mount"))), 2);
        let help = Args::try_parse_from(["cordisk", "check", "--help"]).unwrap_err();
        assert_eq!(usage_status(&help, Some(OsStr::new("check"))), 0);
    }

    #[test]
    fn wrong_usage_is_status_2() {
        for line in [
            &["cordisk"][..],
            &["cordisk", "mount", "/i"],
            &["cordisk", "mount", "--speed", "1", "/i", "/m"],
            &["cordisk", "mount", "--stream", "--read-only", "/i", "/m"],
            &["cordisk", "mount", "--device", "0", "/i", "/m"],
            &["cordisk", "mount", "--stream-priority", "high", "/i", "/m"],
            &["cordisk", "mount", "--reserve", "5%", "/i", "/m"],
            &["cordisk", "mount", "--sandbox", "maybe", "/i", "/m"],
            &["cordisk", "create", "o", "-b", "base"],
            &["cordisk", "create", "o", "-b", "base", "-F", "vmdk"],
        ] {
            assert_eq!(usage_error(line), 2, "{line:?}");
        }
    }
}
