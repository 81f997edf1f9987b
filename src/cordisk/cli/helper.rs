//! `mount.fuse.cordisk`: the helper that mount(8) calls for `mount -t fuse.cordisk` and for lines
//! of /etc/fstab. It translates such a call into a `cordisk mount`.
//!
//! Under this name (or as `mount.cordisk`) the program takes `SOURCE MOUNTPOINT [-sfnv] [-N
//! NAMESPACE] [-o OPTIONS] [-t TYPE]`, as every helper of mount(8) does. The options are those of
//! `cordisk mount` without their dashes. They are read from its definition, so that none can be
//! missing here.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, CommandFactory, Parser};

use super::Args;

/// The program names that make it a helper of mount(8).
pub(super) const NAMES: [&str; 2] = ["mount.fuse.cordisk", "mount.cordisk"];

/// The name of `--user` of `cordisk mount` in this syntax, because `user` in fstab(5) states which
/// users may mount.
pub(super) const RUN_AS: &str = "run_as";

/// Options that are ignored: they are for mount(8) or systemd, or they concern properties that our
/// mounts always have (nosuid, nodev, noexec).
const IGNORED: &[&str] = &[
    "_netdev",
    "atime",
    "auto",
    "default_permissions",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "group",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "nouser",
    "owner",
    "relatime",
    "silent",
    "strictatime",
    "suid",
    "symfollow",
    "user",
    "users",
];

/// Mounts a qcow2 image as a raw disk file: called by mount(8) for file systems of type
/// fuse.cordisk.
#[derive(Debug, Parser)]
#[command(name = "mount.fuse.cordisk", version, max_term_width = 100)]
#[command(
    after_help = "Example: mount -t fuse.cordisk -o stream,speed=50M /vm/overlay.qcow2 /srv/vm.raw"
)]
struct HelperArgs {
    /// The qcow2 image
    source: PathBuf,
    /// Where the disk appears: a regular file
    mountpoint: PathBuf,
    /// Ignore unknown options
    #[arg(short)]
    sloppy: bool,
    /// Check the options and do nothing
    #[arg(short)]
    fake: bool,
    /// No entry in /etc/mtab: there is none anyway
    #[arg(short)]
    no_mtab: bool,
    /// Show what is started, and more messages until it is mounted
    #[arg(short)]
    verbose: bool,
    /// Options of `cordisk mount` without dashes in front, and those of fstab(5), separated by
    /// commas
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Type of the file system
    #[arg(short = 't', value_name = "TYPE")]
    fs_type: Option<String>,
    /// Mount namespace
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<String>,
}

/// A checked call of mount(8).
#[derive(Debug)]
pub struct HelperMount {
    /// The arguments to start `cordisk` with: `mount` and its arguments.
    pub arguments: Vec<OsString>,
    /// Only check the options.
    pub fake: bool,
    /// Print the command that is started.
    pub verbose: bool,
}

/// Tells whether the program was called as a helper of mount(8).
pub(super) fn is_helper(program: Option<&OsStr>) -> bool {
    let name = program.and_then(|program| Path::new(program).file_name());
    name.is_some_and(|name| NAMES.iter().any(|ours| name == *ours))
}

/// Parses the arguments of a helper, the program's name first. Help and wrong usage are `Err`, with
/// the text to print, and true for help.
pub(super) fn parse(
    line: impl IntoIterator<Item = OsString>,
) -> Result<HelperMount, (String, bool)> {
    let args =
        HelperArgs::try_parse_from(line).map_err(|error| match super::wrong_usage(&error) {
            Some(text) => (format!("{}: {text}; see {0} --help\n", NAMES[0]), false),
            None => (error.to_string(), error.exit_code() == 0),
        })?;
    translate(args).map_err(|message| (format!("{}: {message}\n", NAMES[0]), false))
}

fn translate(args: HelperArgs) -> Result<HelperMount, String> {
    if let Some(namespace) = args.namespace {
        return Err(format!(
            "-N: not supported; mount from inside: nsenter --mount={namespace} mount ..."
        ));
    }
    let definition = mount_definition();
    let mut arguments: Vec<OsString> = vec!["mount".into()];
    let mut chosen: Vec<Chosen> = Vec::new();
    for text in args.options.iter().flat_map(|options| split(options)) {
        let Some(option) = read_option(&text, &definition, args.sloppy)? else { continue };
        // The last of several options counts: mount(8) puts the options of its command line after
        // those of fstab.
        if !option.repeatable {
            chosen.retain(|earlier| earlier.name != option.name);
        }
        chosen.push(option);
    }
    arguments.extend(chosen.into_iter().filter(|option| option.wanted).map(|option| {
        match option.value {
            Some(value) => format!("--{}={value}", option.name).into(),
            None => format!("--{}", option.name).into(),
        }
    }));
    arguments.extend(["--".into(), args.source.into_os_string(), args.mountpoint.into_os_string()]);
    // The definition of `cordisk mount` checks values and conflicts.
    let parsed = Args::try_parse_from(
        std::iter::once(OsStr::new("cordisk")).chain(arguments.iter().map(OsString::as_os_str)),
    );
    parsed.map_err(|error| {
        let text = super::wrong_usage(&error).unwrap_or_else(|| error.to_string());
        text.replace("'--", "'").replace(" --", " ")
    })?;
    Ok(HelperMount { arguments, fake: args.fake, verbose: args.verbose })
}

/// Returns the definition of `cordisk mount`.
pub(super) fn mount_definition() -> clap::Command {
    let mut program = Args::command();
    program.build();
    program.find_subcommand("mount").cloned().unwrap_or_default()
}

/// Returns the options of `cordisk mount` that are useful here, as name and definition.
pub(super) fn options(mount: &clap::Command) -> impl Iterator<Item = (&str, &Arg)> {
    let named = mount.get_arguments().filter(|arg| !arg.is_hide_set() && !arg.is_positional());
    // `foreground` is left out, because such a call would never return to mount(8).
    named
        .filter_map(|arg| Some((arg.get_long()?, arg)))
        .filter(|(name, _)| !["help", "version", "foreground"].contains(name))
}

/// Tells whether an option has a value.
pub(super) fn takes_value(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
}

/// A chosen option of `cordisk mount`.
#[derive(Debug)]
struct Chosen {
    name: String,
    value: Option<String>,
    repeatable: bool,
    /// False for an option that only cancels an earlier one, such as `rw` after `ro`.
    wanted: bool,
}

/// The error for `loop`: mount(8) would create a loop device of the image, and pass its name
/// instead of the file.
const LOOP: &str = "loop: leave it out, the image itself is mounted; a file system inside of the disk is mounted with \
                    mount -o loop MOUNTPOINT DIRECTORY";

/// Tells whether the kernel labels files. Without SELinux, mount(8) ignores all options about
/// labels.
fn has_selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// Parses one option; returns `None` for an option that is ignored here.
fn read_option(
    text: &str,
    definition: &clap::Command,
    sloppy: bool,
) -> Result<Option<Chosen>, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let plain = |wanted| {
        Ok(Some(Chosen { name: "read-only".to_string(), value: None, repeatable: false, wanted }))
    };
    match (name, value) {
        ("ro", None) => return plain(true),
        ("rw", None) => return plain(false),
        ("sync" | "async", None) => {
            return Ok(Some(Chosen {
                name: "sync".to_string(),
                value: None,
                repeatable: false,
                wanted: name == "sync",
            }));
        }
        ("loop", _) => return Err(LOOP.to_string()),
        ("context" | "fscontext" | "defcontext" | "rootcontext", Some(_)) if !has_selinux() => {
            return Ok(None);
        }
        ("remount", None) => {
            return Err("remount: not supported; unmount, and mount again".to_string());
        }
        // mount(8) changes `user` into `user=NAME`.
        ("", None) | ("comment" | "user" | "helper" | "uhelper", Some(_)) => return Ok(None),
        _ if name.starts_with("x-") || name.starts_with("X-") => return Ok(None),
        (name, None) if IGNORED.contains(&name) => return Ok(None),
        _ => {}
    }
    let wanted = match name {
        RUN_AS | "run-as" => "user".to_string(),
        // The form without a value was ignored above.
        "user" => return Ok(None),
        name => name.replace('_', "-"),
    };
    let Some((long, arg)) = options(definition).find(|(long, _)| *long == wanted) else {
        if sloppy {
            return Ok(None);
        }
        let hint = if name.contains(':') {
            "; a value with commas in it needs double quotes: speed=\"08:00=20M,20:00=0\""
        } else {
            ""
        };
        return Err(format!(
            "unknown option '{text}'{hint} (cordisk mount --help has all of them)"
        ));
    };
    match (takes_value(arg), value) {
        (true, None) => Err(format!("option '{name}' needs a value: {name}=...")),
        (false, Some(_)) => Err(format!("option '{name}' takes no value")),
        (_, value) => Ok(Some(Chosen {
            name: long.to_string(),
            value: value.map(|value| {
                if long == "speed" { value.replace('+', ",") } else { value.to_string() }
            }),
            repeatable: matches!(arg.get_action(), ArgAction::Append),
            wanted: true,
        })),
    }
}

/// Splits a list of options at its commas. Commas between double quotes, as mount(8) defines them,
/// or after a backslash do not split. The quotes and backslashes are removed.
fn split(options: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut quoted, mut rest) = (false, options.chars().peekable());
    while let Some(c) = rest.next() {
        let part = parts.last_mut();
        match (c, part) {
            ('"', _) => quoted = !quoted,
            (',', _) if !quoted => parts.push(String::new()),
            ('\\', Some(part))
                if rest.peek().is_some_and(|next| [',', '"', '\\'].contains(next)) =>
            {
                part.extend(rest.next())
            }
            (c, Some(part)) => part.push(c),
            (_, None) => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(options: &str) -> Result<Vec<String>, String> {
        let line = ["mount.fuse.cordisk", "i", "/m", "-o", options].map(OsString::from);
        let translated = parse(line).map_err(|(message, _)| message)?;
        let mut all: Vec<String> = translated
            .arguments
            .into_iter()
            .map(|argument| argument.into_string().unwrap())
            .collect();
        assert_eq!(all.remove(0), "mount");
        assert_eq!(all.split_off(all.len() - 3), ["--", "i", "/m"]);
        Ok(all)
    }

    #[test]
    fn it_is_a_helper_by_its_name() {
        for name in ["mount.cordisk", "/sbin/mount.fuse.cordisk", "./mount.fuse.cordisk"] {
            assert!(is_helper(Some(OsStr::new(name))), "{name}");
        }
        for name in ["cordisk", "/usr/bin/cordisk", "mount.fuse", "mount.cordisk/cordisk", ""] {
            assert!(!is_helper(Some(OsStr::new(name))), "{name}");
        }
    }

    #[test]
    fn options_are_those_of_the_command() {
        assert_eq!(
            arguments("qmp=/run/vm.sock,stream,speed=50M").unwrap(),
            ["--qmp=/run/vm.sock", "--stream", "--speed=50M"]
        );
        assert_eq!(
            arguments("allow_other,no_copy_on_read,backing-format=raw").unwrap(),
            ["--allow-other", "--no-copy-on-read", "--backing-format=raw"]
        );
        assert_eq!(
            arguments("backing_root=/a,backing_root=/b").unwrap(),
            ["--backing-root=/a", "--backing-root=/b"]
        );
        assert_eq!(arguments("run_as=nobody:nogroup").unwrap(), ["--user=nobody:nogroup"]);
        // `owner` without a value states which users may mount; with a value it names the owner of
        // the disk's file.
        assert_eq!(
            arguments("allow_other,owner,owner=jo,mode=0660").unwrap(),
            ["--allow-other", "--owner=jo", "--mode=0660"]
        );
    }

    /// Protects: an option that is added to the command later is accepted here too.
    #[test]
    fn every_option_of_the_command_is_taken() {
        let mount = mount_definition();
        let mut count = 0;
        for (name, arg) in options(&mount) {
            let spelled = if name == "user" { RUN_AS.to_string() } else { name.replace('-', "_") };
            let (text, value) = if takes_value(arg) {
                (format!("{spelled}=x"), Some("x".to_string()))
            } else {
                (spelled, None)
            };
            let chosen = read_option(&text, &mount, false).unwrap().unwrap();
            assert_eq!((chosen.name.as_str(), chosen.value, chosen.wanted), (name, value, true));
            count += 1;
        }
        assert!(count > 14, "{count}");
    }

    #[test]
    fn what_is_for_others_is_ignored() {
        let others = "defaults,auto,noauto,user,nouser,users,user=jo,owner,group,nofail,_netdev,x-systemd.automount,X-mount.mkdir,comment=a=b,\
                      exec,noexec,suid,nosuid,dev,nodev,relatime,noatime,rw,async,dirsync,nosymfollow,iversion,mand";
        assert_eq!(arguments(others).unwrap(), [""; 0]);
    }

    #[test]
    fn the_last_word_counts() {
        assert_eq!(arguments("ro").unwrap(), ["--read-only"]);
        assert_eq!(arguments("ro,rw").unwrap(), [""; 0]);
        assert_eq!(arguments("sync").unwrap(), ["--sync"]);
        assert_eq!(arguments("sync,async").unwrap(), [""; 0]);
        assert_eq!(arguments("async,sync").unwrap(), ["--sync"]);
        assert_eq!(arguments("rw,device=a,ro,device=b").unwrap(), ["--read-only", "--device=b"]);
    }

    #[test]
    fn a_value_may_have_commas() {
        assert_eq!(split("a,b=\"c,d\",e"), ["a", "b=c,d", "e"]);
        assert_eq!(split(r#"a=b\,c,"d,e",f\g,,h="#), ["a=b,c", "d,e", r"f\g", "h="]);
        assert_eq!(arguments(r#"qmp="/run/a,b""#).unwrap(), ["--qmp=/run/a,b"]);
        let definition = mount_definition();
        let speed =
            |text: &str| read_option(text, &definition, false).unwrap().unwrap().value.unwrap();
        assert_eq!(speed("speed=08:00=20M+20:00=0"), "08:00=20M,20:00=0");
        assert_eq!(speed("speed=08:00=20M,20:00=0"), "08:00=20M,20:00=0");
    }

    #[test]
    fn wrong_options_are_named() {
        let wrong = |options: &str| arguments(options).unwrap_err();
        assert!(
            wrong("stream,spede=1").contains("unknown option 'spede=1'"),
            "{}",
            wrong("stream,spede=1")
        );
        assert!(wrong("stream,speed=08:00=20M,20:00=0").contains("double quotes"));
        assert!(wrong("stream=1").contains("'stream' takes no value"));
        assert!(wrong("qmp").contains("'qmp' needs a value"));
        assert!(wrong("foreground").contains("unknown option"));
        assert!(wrong("background_child").contains("unknown option"));
        assert!(wrong("serving_process").contains("unknown option"));
        assert!(wrong("credentials_from=3").contains("unknown option"));
        assert!(wrong("remount").contains("unmount"));
        for text in ["loop", "loop=/dev/loop7"] {
            assert!(wrong(text).contains("leave it out"), "{}", wrong(text));
        }
        let message = wrong("stream,speed=fast");
        assert!(message.contains("'speed") && message.lines().count() == 1, "{message:?}");
        assert!(wrong("stream,ro").contains("read-only"), "{}", wrong("stream,ro"));
        assert!(
            wrong("speed=5M").ends_with("were not provided: stream\n"),
            "{:?}",
            wrong("speed=5M")
        );
    }

    #[test]
    fn flags_of_mount_are_understood() {
        let parsed = |line: &[&str]| parse(line.iter().map(OsString::from));
        let call = parsed(&[
            "mount.fuse.cordisk",
            "i",
            "m",
            "-sfnv",
            "-t",
            "fuse.cordisk",
            "-o",
            "rw,nonsense",
        ])
        .unwrap();
        assert!(call.fake && call.verbose);
        let call = parsed(&["mount.cordisk", "i", "m", "-o", "rw", "-o", "device=x"]).unwrap();
        assert!(!call.fake && !call.verbose && call.arguments.contains(&"--device=x".into()));
        assert!(
            parsed(&["mount.cordisk", "i", "m", "-N", "/proc/1/ns/mnt"])
                .unwrap_err()
                .0
                .contains("nsenter")
        );
        assert!(!parsed(&["mount.cordisk", "i"]).unwrap_err().1);
        assert!(parsed(&["mount.cordisk", "--help"]).unwrap_err().1);
    }
}
