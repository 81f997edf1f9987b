//! The command line, in two steps: the arguments as typed ([`Args`], by clap) and their checked
//! meaning ([`Command`]).
//!
//! **Touches:** `format`, `create`, `check` and `client` for their option types; the current
//! directory, because paths are made absolute here before the daemon changes to `/`; the directory
//! given to `man`. **Never:** opens any other file. Wrong usage prints one line here and ends with
//! exit status 2 (1 for `check`).

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind as Wrong};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::client::{
    CacheOptions, InfoOptions, JobOptions, MapOptions, OrderOptions, StatusOptions,
    StreamArguments, SumsOptions, TopOptions, UmountOptions, UpgradeOptions,
};
use crate::fetching::SourceConfig;
use engine::create::CreateOptions;
use host::error::one_line;
use host::{Error, Result};
use qcow2::check::{CheckOptions, Output, Repair};

mod cache;
mod completion;
mod control;
mod create;
mod helper;
mod manual;
mod mount;
mod order;
mod sources;
mod values;
mod views;

pub use completion::completions;
pub use control::changed_mount;
pub use helper::HelperMount;
pub use manual::manual_pages;
pub use mount::{Ground, MountConfig, OrderSource, Role, StreamSpeed};

use cache::{CacheArgs, SumsArgs};
use control::{JobArgs, StatusArgs, StreamArgs, UmountArgs, UpgradeArgs};
use create::CreateArgs;
use mount::MountArgs;
use order::OrderArgs;
use values::OutputArgs;
use views::{InfoArgs, MapArgs, TopArgs};

/// The commands of a first session.
const EXAMPLE: &str = "Example:
  cordisk create overlay.qcow2 -b base.raw -F raw
  cordisk mount overlay.qcow2 disk
  cordisk stream disk --speed 50M --wait
  cordisk umount disk";

/// A copy-on-read virtual disk: mounts a qcow2 overlay as a raw file, fills it from its backing
/// file as it is read, streams the rest in the background, and is controlled over QMP.
#[derive(Debug, Parser)]
#[command(name = "cordisk", version, max_term_width = 100, disable_help_subcommand = true, after_help = EXAMPLE)]
pub struct Args {
    #[command(subcommand)]
    command: Typed,
}

#[derive(Debug, Subcommand)]
enum Typed {
    /// Create a qcow2 overlay above a backing file
    #[command(
        after_help = "Example: cordisk create --backing golden.raw --backing-format raw overlay.qcow2"
    )]
    Create(CreateArgs),
    /// Mount a qcow2 image as a raw disk file
    ///
    /// The guest's disk appears as one regular file at MOUNTPOINT. The command returns when the
    /// disk is mounted (and the QMP socket accepts), and a daemon stays in the background until the
    /// file is unmounted: `umount MOUNTPOINT`, or `fusermount3 -u MOUNTPOINT` as a user other than
    /// root. SIGTERM unmounts as well; while the file is in use the daemon writes everything back
    /// and goes on serving, until a second SIGTERM.
    ///
    /// The disk is written like a block device: its size is fixed, and truncating it is refused, as
    /// `cp image disk` and `> disk` try. Write an image to it with `qemu-img convert -n -O raw
    /// image disk` or `dd conv=notrunc if=image of=disk`.
    ///
    /// After a daemon was killed, the same command mounts again: it replaces the dead mount of this
    /// image at MOUNTPOINT, and gives back the clusters that were leaked.
    ///
    /// A backing file on a server needs --backing-url. It is read over the network as it is needed,
    /// by a process of its own, which has the credentials and opens no image.
    // Of an option that is given twice the last one counts: `upgrade` appends those that change.
    #[command(
        args_override_self = true,
        after_help = "Example: cordisk mount --qmp qmp.sock overlay.qcow2 disk"
    )]
    Mount(Box<MountArgs>),
    /// Check a qcow2 image, and give back what a crash has leaked in it
    ///
    /// Counts all references inside the image and compares its refcounts with them, with the output
    /// and the exit status of qemu-img check: 0 the image is correct, 1 the check could not be
    /// done, 2 there are corruptions, 3 clusters are leaked and nothing else. Backing files are not
    /// opened. An image that is mounted cannot be checked. A read-write mount after a crash gives
    /// leaks back by itself.
    #[command(after_help = "Example: cordisk check --repair leaks overlay.qcow2")]
    Check(CheckArgs),
    /// Copy everything up from the backing file, and show how far it is
    ///
    /// Starts a stream on a mounted disk: everything that is still in the backing file is copied
    /// into the image in the background, then the image stands alone. The disk can be used
    /// meanwhile. With --wait the command stays until the stream is complete; Ctrl-C then leaves it
    /// running, and the exit status is 130.
    #[command(after_help = "Example: cordisk stream disk --speed 50M --wait")]
    Stream(StreamArgs),
    /// Pause, resume or cancel the job of a disk, or change its speed
    #[command(after_help = "Example: cordisk job speed disk 20M")]
    Job(JobArgs),
    /// Show a disk, or all that are mounted
    ///
    /// For one disk: its image and chain, how much of it is local, its job and the last one,
    /// requests, its daemon. For all disks: one line each. Mounts that a killed daemon has left are
    /// shown as dead; the exit status is 1 if a disk named on the command line is dead.
    #[command(visible_aliases = ["list", "ls"], after_help = "Example: cordisk status disk")]
    Status(StatusArgs),
    /// Unmount a disk, and wait until its image is free
    ///
    /// Unlike umount(8) it returns when everything is written back and the daemon has ended, so
    /// that the image may be used by others at once. A disk that is in use stays mounted. What a
    /// killed daemon has left is removed as well.
    #[command(visible_alias = "unmount", after_help = "Example: cordisk umount disk")]
    Umount(UmountArgs),
    /// Let this program go on with disks that another version serves
    ///
    /// The disk stays mounted, and programs that use it only wait for a moment: the serving process
    /// writes back and ends, and one of this program takes the disk over, with the options of the
    /// mount. QMP clients are disconnected and find the same socket again. If the new process
    /// cannot serve the disk, the previous program goes on. The mount keeper stays until the disk
    /// is mounted anew.
    #[command(after_help = "Example: cordisk upgrade --all")]
    Upgrade(UpgradeArgs),
    /// Show which parts of a disk are local, zero, or still in the backing files
    ///
    /// Draws the disk as rows of characters, in blocks and colours on a terminal, in ASCII
    /// elsewhere, with a legend in bytes and percent. What is not in the image itself counts as
    /// remote, even where the backing file has only zeros; --json also shows these zeros.
    #[command(after_help = "Example: cordisk map --png disk.png /srv/vm.raw")]
    Map(MapArgs),
    /// Show facts of an image or of a mounted disk
    ///
    /// Reads only headers, so the image may be in use. The facts of a mounted image come from its
    /// daemon if its mountpoint or its control socket is named. A file that does not begin like a
    /// qcow2 image is a raw one; formats of backing files are never guessed.
    #[command(after_help = "Example: cordisk info --backing-chain overlay.qcow2")]
    Info(InfoArgs),
    /// Watch disks live: throughput, latencies, hits, jobs, and the map filling
    ///
    /// Keys: q, Esc or Ctrl-C quit, up and down choose a disk, p pauses or resumes its job, ? shows
    /// help. If standard output is not a terminal, the activity during one interval is printed.
    #[command(after_help = "Example: cordisk top --interval 0.5 /srv/vm.raw")]
    Top(TopArgs),
    /// Show, fill or shrink the cache of remote backing files
    ///
    /// The cache holds what was read from servers. All disks of a user on this host share it: each
    /// part of a remote file is fetched once, whichever disk needs it first. Files that a disk uses
    /// are never dropped.
    #[command(subcommand, after_help = "Example: cordisk cache fill s3://golden/debian.raw")]
    Cache(CacheArgs),
    /// Write the chunk list of an image, whose digest names its content
    ///
    /// Publish the list beside the image, and give the digest to `cordisk create --base-digest`:
    /// each chunk of 1 MiB is then compared before it is used, whatever server, proxy or cache it
    /// comes from.
    #[command(after_help = "Example: cordisk sums debian.raw")]
    Sums(SumsArgs),
    /// Merge or show orders: what guests touch first on a disk
    ///
    /// An order lists the ranges of a disk in the order in which guests touched them first. A
    /// stream that follows it brings what the next guest needs before the rest.
    #[command(subcommand, after_help = "Example: cordisk order show debian.order")]
    Order(OrderArgs),
    /// Print the completions of a shell
    ///
    /// For this shell only: source <(cordisk completions bash). The Debian package has them for
    /// bash, zsh and fish.
    #[command(after_help = "Example: cordisk completions bash > /etc/bash_completion.d/cordisk")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory; it is made if it is not there
        directory: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The qcow2 image
    image: PathBuf,
    /// Repair what is wrong: "leaks" lowers the refcounts of leaked clusters, if there are no
    /// corruptions; nothing else is repaired
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<RepairArg>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RepairArg {
    Leaks,
}

/// A checked command.
#[derive(Debug)]
pub enum Command {
    /// `cordisk create`.
    Create(CreateOptions, Box<SourceConfig>),
    /// `cordisk mount`.
    Mount(Box<MountConfig>),
    /// `cordisk check`.
    Check(CheckOptions),
    /// `cordisk stream`.
    Stream(StreamArguments),
    /// `cordisk job`.
    Job(JobOptions),
    /// `cordisk status`.
    Status(StatusOptions),
    /// `cordisk umount`.
    Umount(UmountOptions),
    /// `cordisk upgrade`.
    Upgrade(UpgradeOptions),
    /// `cordisk map`.
    Map(MapOptions),
    /// `cordisk info`.
    Info(InfoOptions),
    /// `cordisk top`.
    Top(TopOptions),
    /// `cordisk cache`.
    Cache(CacheOptions),
    /// `cordisk sums`.
    Sums(SumsOptions),
    /// `cordisk order`.
    Order(OrderOptions),
    /// A call of mount(8), under the name of its helper.
    Helper(HelperMount),
    /// `cordisk completions`.
    Completions(Shell),
    /// `cordisk man`, with the directory.
    Man(PathBuf),
}

/// Parses the command line of this process, or that of mount(8)'s helper if the program was called
/// by that name. For help and usage errors it prints the text and ends the process.
///
/// # Errors
/// The current directory, to which relative paths refer, does not exist any more.
pub fn parse() -> Result<Command> {
    if helper::is_helper(std::env::args_os().next().as_deref()) {
        return Ok(Command::Helper(helper::parse(std::env::args_os()).unwrap_or_else(
            |(text, is_help)| {
                // An error is ignored: the output has no reader. mount(8) defines 1 as wrong usage.
                let _ = if is_help {
                    std::io::stdout().write_all(text.as_bytes())
                } else {
                    std::io::stderr().write_all(text.as_bytes())
                };
                std::process::exit(i32::from(!is_help))
            },
        )));
    }
    completion::answer();
    let line = with_help_last(std::env::args_os().collect());
    match Args::try_parse_from(&line).map_err(Refused::Usage).and_then(Args::check) {
        Ok(command) => Ok(command),
        Err(Refused::Failed(error)) => Err(error),
        Err(Refused::Usage(error)) => {
            // An error is ignored: the output has no reader.
            let _ = match wrong_usage(&error) {
                Some(text) => writeln!(
                    std::io::stderr(),
                    "cordisk: {text}; see {} --help",
                    named_command(line.iter().skip(1).cloned())
                ),
                None => error.print(),
            };
            std::process::exit(usage_status(&error, line.get(1).map(OsString::as_os_str)));
        }
    }
}

/// Turns `cordisk help job speed` into `cordisk job speed --help`. clap's own `help` command would
/// appear in every list of commands, and below every command that has subcommands.
fn with_help_last(mut line: Vec<OsString>) -> Vec<OsString> {
    if line.get(1).is_some_and(|word| word == "help") {
        line.remove(1);
        line.push("--help".into());
    }
    line
}

/// Returns the error of a command line on one line; `None` if help or the version is to be printed
/// instead.
fn wrong_usage(error: &clap::Error) -> Option<String> {
    if matches!(
        error.kind(),
        Wrong::DisplayHelp
            | Wrong::DisplayVersion
            | Wrong::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        return None;
    }
    let text = error.to_string();
    // The first paragraph is the error. Tips, usage and a pointer to the help follow.
    let what = text
        .split("\n\n")
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    Some(one_line(
        &similar(error).map_or(what.to_owned(), |names| format!("{what}; did you mean {names}?")),
    ))
}

/// Returns the names that the user probably meant, in quotes. Of clap's suggestions only those
/// shown in the help are kept, because hidden commands and options are for cordisk itself. Clap's
/// tip to put `--` before a value is left out, because it does not help.
fn similar(error: &clap::Error) -> Option<String> {
    let definition = Args::command();
    let is_hidden = |name: &str| {
        let commands = || definition.get_subcommands();
        let hidden_option =
            |arg: &clap::Arg| arg.is_hide_set() && arg.get_long() == name.strip_prefix("--");
        commands().any(|command| command.get_name() == name && command.is_hide_set())
            || commands().flat_map(clap::Command::get_arguments).any(hidden_option)
    };
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(name)) => vec![name.clone()],
        Some(ContextValue::Strings(names)) => names.clone(),
        _ => Vec::new(),
    };
    let kinds =
        [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg, ContextKind::SuggestedValue];
    // clap puts the best suggestion last.
    let names = kinds.into_iter().flat_map(context).rev().filter(|name| !is_hidden(name));
    let names: Vec<String> = names.map(|name| format!("'{name}'")).collect();
    (!names.is_empty()).then(|| names.join(" or "))
}

/// Returns the command whose help is relevant, such as `cordisk job speed`.
fn named_command(arguments: impl Iterator<Item = OsString>) -> String {
    let mut definition = Args::command();
    let mut path = definition.get_name().to_owned();
    for argument in arguments {
        let Some(next) =
            definition.find_subcommand(&argument).filter(|next| !next.is_hide_set()).cloned()
        else {
            break;
        };
        path = format!("{path} {}", next.get_name());
        definition = next;
    }
    path
}

/// Returns the exit status of help and of wrong usage. For `check` it is 1, as with qemu-img, since
/// 2 would mean corruptions.
fn usage_status(error: &clap::Error, command: Option<&OsStr>) -> i32 {
    match error.exit_code() {
        0 => 0,
        _ if command == Some(OsStr::new("check")) => 1,
        status => status,
    }
}

/// Why a command line is not executed.
#[derive(Debug)]
enum Refused {
    /// Wrong usage, or a request for help.
    Usage(clap::Error),
    /// The usage is correct, but another error occurred.
    Failed(Error),
}

impl From<clap::Error> for Refused {
    fn from(error: clap::Error) -> Self {
        Refused::Usage(error)
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Refused::Failed(error)
    }
}

impl Args {
    /// The second step: turns the typed arguments into a checked command.
    fn check(self) -> std::result::Result<Command, Refused> {
        Ok(match self.command {
            Typed::Create(args) => args.check()?,
            Typed::Cache(args) => Command::Cache(args.check()?),
            Typed::Sums(args) => Command::Sums(args.into()),
            Typed::Order(args) => Command::Order(args.check()?),
            Typed::Mount(args) => Command::Mount(Box::new(args.check()?)),
            Typed::Check(args) => Command::Check(CheckOptions {
                image: args.image,
                repair: args.repair.map(|RepairArg::Leaks| Repair::Leaks),
                output: if args.output.is_json() { Output::Json } else { Output::Human },
            }),
            Typed::Stream(args) => Command::Stream(args.into()),
            Typed::Job(args) => Command::Job(args.options()?),
            Typed::Status(args) => Command::Status(args.into()),
            Typed::Umount(args) => Command::Umount(args.into()),
            Typed::Upgrade(args) => Command::Upgrade(args.options()?),
            Typed::Map(args) => Command::Map(args.into()),
            Typed::Info(args) => Command::Info(args.into()),
            Typed::Top(args) => Command::Top(args.into()),
            Typed::Completions { shell } => Command::Completions(shell),
            Typed::Man { directory } => Command::Man(directory),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn command(line: &[&str]) -> Command {
        Args::try_parse_from(line).unwrap().check().unwrap()
    }

    fn usage_error(line: &[&str]) -> i32 {
        Args::try_parse_from(line).unwrap_err().exit_code()
    }

    #[test]
    fn clap_finds_no_contradiction_in_the_definition() {
        Args::command().debug_assert();
    }

    #[test]
    fn check_takes_what_qemu_img_takes() {
        let Command::Check(options) =
            command(&["cordisk", "check", "--repair", "leaks", "--output", "json", "i"])
        else {
            panic!("not check")
        };
        assert_eq!(
            (options.image.as_path(), options.repair, options.output),
            (Path::new("i"), Some(Repair::Leaks), Output::Json)
        );
        let Command::Check(options) = command(&["cordisk", "check", "i"]) else {
            panic!("not check")
        };
        assert_eq!((options.repair, options.output), (None, Output::Human));
        let error = Args::try_parse_from(["cordisk", "check", "--repair", "all", "i"]).unwrap_err();
        assert_eq!(usage_status(&error, Some(OsStr::new("check"))), 1, "2 means corruptions");
        assert_eq!(usage_status(&error, Some(OsStr::new("mount"))), 2);
        let help = Args::try_parse_from(["cordisk", "check", "--help"]).unwrap_err();
        assert_eq!(usage_status(&help, Some(OsStr::new("check"))), 0);
    }

    #[test]
    fn wrong_usage_is_one_line_that_says_what_was_meant() {
        let said = |line: &[&str]| wrong_usage(&Args::try_parse_from(line).unwrap_err());
        let missing = said(&["cordisk", "mount", "i"]).unwrap();
        assert_eq!(missing, "the following required arguments were not provided: <MOUNTPOINT>");
        let format = said(&["cordisk", "create", "o", "-b", "base", "-F", "vmdk"]).unwrap();
        assert_eq!(
            format,
            "invalid value 'vmdk' for '--backing-format <FORMAT>' [possible values: raw, qcow2]"
        );
        let option = said(&["cordisk", "stream", "--spede", "1", "d"]).unwrap();
        assert_eq!(option, "unexpected argument '--spede' found; did you mean '--speed'?");
        assert_eq!(
            said(&["cordisk", "statsu"]).unwrap(),
            "unrecognized subcommand 'statsu'; did you mean 'status'?"
        );
        let value = said(&["cordisk", "mount", "--sandbox", "requir", "i", "m"]).unwrap();
        assert!(value.ends_with("; did you mean 'require'?"), "{value}");
        assert_eq!(
            said(&["cordisk", "stream", "--speed", "-1", "d"]).unwrap(),
            "unexpected argument '-1' found"
        );
        let strange = said(&["cordisk", "top", "--interval", "\u{1b}[31m\n\nerror: x"]).unwrap();
        assert!(!strange.contains(char::is_control), "{strange:?}");
        for help in [
            &["cordisk", "--help"][..],
            &["cordisk", "--version"],
            &["cordisk"],
            &["cordisk", "job"],
        ] {
            assert_eq!(said(help), None, "{help:?}");
        }
        let named = |line: &[&str]| named_command(line.iter().map(OsString::from));
        assert_eq!(named(&["job", "speed", "disk"]), "cordisk job speed");
        assert_eq!(named(&["mount", "stream"]), "cordisk mount");
        assert_eq!(named(&["frobnicate"]), "cordisk");
    }

    /// Protects: hidden commands and options, which only cordisk itself uses, are never suggested
    /// to a user.
    #[test]
    fn what_is_hidden_is_never_suggested() {
        let said = |line: &[&str]| wrong_usage(&Args::try_parse_from(line).unwrap_err()).unwrap();
        for line in [
            &["cordisk", "mna"][..],
            &["cordisk", "unmonut"],
            &["cordisk", "mount", "--background", "i", "m"],
            &["cordisk", "mount", "--background-chil", "i", "m"],
            &["cordisk", "mount", "--credentials", "3", "i", "m"],
            &["cordisk", "mount", "--serving-proces", "i", "m"],
        ] {
            let text = said(line);
            assert!(
                !text.contains("serving-process")
                    && !text.contains("background-child")
                    && !text.contains("credentials-from")
                    && !text.contains("'man'"),
                "{text}"
            );
        }
        assert!(
            said(&["cordisk", "umonut"]).contains("did you mean 'umount'"),
            "{}",
            said(&["cordisk", "umonut"])
        );
    }

    #[test]
    fn other_words_for_a_command_are_understood() {
        for word in ["list", "ls"] {
            assert!(matches!(command(&["cordisk", word]), Command::Status(_)), "{word}");
        }
        assert!(matches!(command(&["cordisk", "unmount", "d"]), Command::Umount(_)));
        let helped = |line: &[&str]| with_help_last(line.iter().map(OsString::from).collect());
        assert_eq!(helped(&["cordisk", "help"]), ["cordisk", "--help"]);
        assert_eq!(
            helped(&["cordisk", "help", "job", "speed"]),
            ["cordisk", "job", "speed", "--help"]
        );
        assert_eq!(helped(&["cordisk", "status", "help"]), ["cordisk", "status", "help"]);
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
