//! Manual pages, generated from the definition of the command line.
//!
//! Options and their texts come from the definition alone. The other sections of a page (exit
//! status, files, see also) are written here.

use std::io::Write;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::{Args, helper};
use host::Result;
use host::error::Context;

/// The manual that the pages belong to.
const MANUAL: &str = "Cordisk Manual";

/// The headings of examples in a help text.
const EXAMPLE_HEADINGS: [&str; 2] = ["Examples:", "Example:"];

/// Returns a copy of `command` without hidden items, for shell completion.
pub(super) fn without_hidden(command: &Command) -> Command {
    let mut shown = Command::new(command.get_name().to_string()).disable_help_subcommand(true);
    if let Some(version) = command.get_version() {
        shown = shown.version(version.to_string());
    }
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    shown = shown.visible_aliases(command.get_visible_aliases().map(String::from));
    let below = command.get_subcommands().filter(|below| !below.is_hide_set()).map(without_hidden);
    shown
        .args(command.get_arguments().filter(|argument| !argument.is_hide_set()))
        .subcommands(below)
}

/// Writes the manual pages into `directory`, which is created if missing: one for the program, one
/// for each command that is not hidden, and the one for fstab(5).
///
/// # Errors
/// Those of the file system.
pub fn manual_pages(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).context(|| directory.display().to_string())?;
    for (name, page) in pages() {
        let path = directory.join(name);
        std::fs::write(&path, page).context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Returns all pages, with the names of their files.
fn pages() -> Vec<(String, Vec<u8>)> {
    let mut program = Args::command();
    program.build();
    let mut commands = Vec::new();
    collect(&program, &mut commands);
    let names: Vec<String> = commands.iter().map(|command| name_of(command)).collect();
    let mut pages: Vec<_> = commands
        .iter()
        .map(|command| (format!("{}.1", name_of(command)), page_of(command, &names)))
        .collect();
    pages.push((format!("{}.8", helper::NAMES[0]), fstab_page()));
    pages
}

/// Collects `command` and its subcommands, except hidden ones.
fn collect<'a>(command: &'a Command, found: &mut Vec<&'a Command>) {
    found.push(command);
    for below in
        command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help")
    {
        collect(below, found);
    }
}

fn name_of(command: &Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_string()
}

fn page_of(command: &Command, names: &[String]) -> Vec<u8> {
    let name = name_of(command);
    let man = Man::new(command.clone()).title(name.to_uppercase()).manual(MANUAL).source(source());
    let mut page = Vec::new();
    let mut write =
        |render: &dyn Fn(&mut dyn Write) -> std::io::Result<()>| render(&mut page).is_ok();
    let mut all = write(&|out| man.render_title(out))
        && write(&|out| man.render_name_section(out))
        && write(&|out| man.render_synopsis_section(out))
        && write(&|out| man.render_description_section(out));
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        all &= write(&|out| man.render_options_section(out));
    }
    if command.get_subcommands().any(|below| !below.is_hide_set()) {
        all &= write(&|out| man.render_subcommands_section(out));
    }
    let more = more_sections(command, &name, names);
    all &= write(&|out| more.to_writer(out));
    assert!(all, "writing to memory does not fail");
    page
}

fn source() -> String {
    format!("cordisk {}", env!("CARGO_PKG_VERSION"))
}

/// Returns the lines of a help text that are examples.
fn examples(command: &Command) -> Vec<String> {
    let text = command
        .get_after_long_help()
        .or_else(|| command.get_after_help())
        .map(ToString::to_string)
        .unwrap_or_default();
    let lines = text.lines().map(|line| {
        EXAMPLE_HEADINGS
            .iter()
            .find_map(|heading| line.trim().strip_prefix(heading))
            .unwrap_or(line)
    });
    lines.map(|line| line.trim().to_string()).filter(|line| !line.is_empty()).collect()
}

/// Returns the sections that the definition does not contain.
fn more_sections(command: &Command, name: &str, names: &[String]) -> Roff {
    let mut roff = Roff::new();
    let examples = examples(command);
    if !examples.is_empty() {
        roff.control("SH", ["EXAMPLES"]);
        literal(&mut roff, &examples);
    }
    roff.control("SH", ["EXIT STATUS"]);
    let check = name == "cordisk-check";
    let failed = match name {
        "cordisk-check" => "The check could not be done.",
        "cordisk-status" => {
            "It has failed, and one line on standard error says why; or the disk that was asked for is dead."
        }
        _ => "It has failed; one line on standard error says why.",
    };
    define(&mut roff, "0", if check { "All is well, or is now." } else { "Success." });
    define(&mut roff, "1", failed);
    define(&mut roff, "2", if check { "There are corruptions." } else { "Wrong usage." });
    if check {
        define(&mut roff, "3", "Clusters are leaked, and nothing else is wrong.");
    }
    if name == "cordisk-stream" {
        define(&mut roff, "130", "With --wait: interrupted by Ctrl-C.");
    }
    if name == "cordisk" || name == "cordisk-mount" {
        roff.control("SH", ["ENVIRONMENT"]);
        define(
            &mut roff,
            "RUST_LOG",
            "What is logged to standard error: error, warn, info, debug or trace.",
        );
        define(
            &mut roff,
            "CORDISK_RUNTIME_DIR",
            "Where running daemons are registered, in place of the directories below.",
        );
        let notify = "Set by a service manager for its services: with -f, systemd(1) is told when the disk is there and what is being done, and its \
                      watchdog is answered as long as reads and commits go on.";
        define(&mut roff, "NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID", notify);
        roff.control("SH", ["FILES"]);
        define(&mut roff, "/run/cordisk", "Running daemons of root.");
        define(
            &mut roff,
            "$XDG_RUNTIME_DIR/cordisk, /tmp/cordisk-UID",
            "Running daemons of other users.",
        );
        define(&mut roff, "/etc/cordisk/NAME.conf", "What the service cordisk@NAME mounts.");
        define(
            &mut roff,
            "/etc/fuse.conf",
            "user_allow_other there permits --allow-other to users other than root.",
        );
    }
    roff.control("SH", ["SEE ALSO"]);
    let mut others: Vec<String> =
        names.iter().filter(|other| *other != name).map(|other| format!("{other}(1)")).collect();
    others.extend([
        format!("{}(8)", helper::NAMES[0]),
        "qemu-img(1)".to_string(),
        "fusermount3(1)".to_string(),
        "systemd.service(5)".to_string(),
    ]);
    roff.text([roman(others.join(", "))]);
    roff
}

/// Adds a term and its meaning.
fn define(roff: &mut Roff, term: &str, meaning: &str) {
    roff.control("TP", []);
    roff.text([bold(term)]);
    roff.text([roman(meaning)]);
}

/// Adds lines of commands, without filling.
fn literal(roff: &mut Roff, lines: &[impl AsRef<str>]) {
    roff.control("PP", []);
    roff.control("RS", ["4"]);
    roff.control("nf", []);
    for line in lines {
        roff.text([roman(line.as_ref())]);
    }
    roff.control("fi", []);
    roff.control("RE", []);
}

fn paragraph(roff: &mut Roff, text: &str) {
    roff.control("PP", []);
    roff.text([roman(text)]);
}

/// Returns mount.fuse.cordisk(8), about the disk as a line of /etc/fstab.
fn fstab_page() -> Vec<u8> {
    let mount = helper::mount_definition();
    let mut roff = Roff::new();
    let source = source();
    roff.control("TH", ["MOUNT.FUSE.CORDISK", "8", "", source.as_str(), MANUAL]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("mount.fuse.cordisk, mount.cordisk - mount a qcow2 image as a raw disk file, from fstab(5) or by mount(8)")]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([
        bold("mount"),
        roman(" "),
        bold("-t fuse.cordisk"),
        roman(" [-o "),
        italic("OPTIONS"),
        roman("] "),
        italic("IMAGE MOUNTPOINT"),
    ]);
    roff.control("PP", []);
    let rest = " [-sfnv] [-o OPTIONS] [-t TYPE]";
    roff.text([bold("mount.fuse.cordisk"), roman(" "), italic("IMAGE MOUNTPOINT"), roman(rest)]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([roman(
        "The helper that mount(8) calls for file systems of the type fuse.cordisk. It starts cordisk-mount(1) in the background, and returns when \
         the disk is there. umount(8) ends it: the daemon writes everything back and goes.",
    )]);
    paragraph(
        &mut roff,
        "MOUNTPOINT is a file, not a directory. Create it once (touch /srv/vm.raw): at boot, systemd(1) makes a directory of a mountpoint that does \
         not exist, and a disk cannot be mounted there.",
    );
    paragraph(
        &mut roff,
        "IMAGE is to be an absolute path in fstab(5). On a command line it may be relative to the current directory. Its backing files must be \
         there when it is mounted: name what they need with x-systemd.requires-mounts-for=, and say _netdev where they lie on the network. \
         Backing files on servers (https://, s3:// and others) need backing_url=PREFIX as well.",
    );
    roff.control("SH", ["OPTIONS"]);
    roff.text([roman(
        "Those of cordisk-mount(1) without the dashes in front, separated by commas. An underscore stands for a dash as well. Of an option that is \
         given twice the last one counts.",
    )]);
    for (name, arg) in helper::options(&mount) {
        let shown =
            if name == "user" { helper::RUN_AS.to_string() } else { name.replace('-', "_") };
        let value = arg
            .get_value_names()
            .and_then(|names| names.first())
            .filter(|_| helper::takes_value(arg));
        let help = arg
            .get_long_help()
            .or_else(|| arg.get_help())
            .map(ToString::to_string)
            .unwrap_or_default();
        roff.control("TP", []);
        match value {
            Some(value) => roff.text([bold(shown), roman("="), italic(value.as_str())]),
            None => roff.text([bold(shown)]),
        };
        roff.text([roman(help)]);
    }
    define(&mut roff, "ro, rw", "ro is read_only; rw takes that back.");
    define(
        &mut roff,
        "sync, async",
        "sync makes every write durable before it returns, as --sync; async takes that back.",
    );
    let users = "With user, users, owner or group in fstab(5) a user who is not root may mount: mount(8) checks that, and calls this helper as that \
                 user, whose rights must do for the image, the backing files and the mountpoint.";
    paragraph(&mut roff, users);
    let ignored = "defaults, auto, noauto, user, users, owner (without a value), group, nofail, _netdev, comment=, x-*, exec, suid, dev, atime and their \
                   opposites are for others, and ignored; so are context= and the other options about labels where the kernel has no SELinux. The mount is nosuid, nodev and noexec in any case. Who cordisk is to become is run_as here, because user \
                   says in fstab(5) who may mount. Any other option is an error; with -s (sloppy) it is ignored.";
    paragraph(&mut roff, ignored);
    paragraph(
        &mut roff,
        "A value with commas in it, such as a schedule of speeds, stands between double quotes, as mount(8) has it, or has a backslash before each \
         comma; in a schedule a plus may stand for the comma, where some program on the way takes the quotes away. In a shell the quotes need quotes.",
    );
    roff.control("SH", ["EXAMPLES"]);
    roff.text([roman("A line of /etc/fstab:")]);
    literal(
        &mut roff,
        &["/vm/overlay.qcow2  /srv/vm.raw  fuse.cordisk  qmp=/run/vm.sock,stream,speed=50M  0 0"],
    );
    paragraph(&mut roff, "Mount and unmount it:");
    literal(&mut roff, &["touch /srv/vm.raw", "mount /srv/vm.raw", "umount /srv/vm.raw"]);
    paragraph(&mut roff, "A schedule:");
    literal(
        &mut roff,
        &[
            "mount -t fuse.cordisk -o 'stream,speed=\"08:00=20M,20:00=0\"' /vm/overlay.qcow2 /srv/vm.raw",
            "mount -t fuse.cordisk -o stream,speed=08:00=20M+20:00=0 /vm/overlay.qcow2 /srv/vm.raw",
        ],
    );
    roff.control("SH", ["EXIT STATUS"]);
    define(&mut roff, "0", "The disk is mounted.");
    define(&mut roff, "1", "Wrong usage; an option that is unknown or contradicts another.");
    define(&mut roff, "32", "The mount has failed; one line on standard error says why.");
    roff.control("SH", ["FILES"]);
    define(&mut roff, "/etc/fstab", "File systems to be mounted at boot.");
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(
        "cordisk-mount(1), cordisk(1), mount(8), umount(8), fstab(5), systemd.mount(5)",
    )]);
    roff.render().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible() -> Vec<Command> {
        let mut program = Args::command();
        program.build();
        let mut commands = Vec::new();
        collect(&program, &mut commands);
        commands.into_iter().cloned().collect()
    }

    /// Protects: each command has an example in its own help, or in that of the command above it.
    #[test]
    fn the_help_of_every_command_has_an_example() {
        let all = visible();
        assert!(all.len() > 4);
        for command in &all[1..] {
            let name = name_of(command);
            // cordisk-order-from-files: the name of a subcommand can have hyphens.
            let parts: Vec<&str> = name.splitn(3, '-').collect();
            let words = parts.join(" ");
            let above = parts.get(..2).filter(|_| parts.len() > 2).map(|above| above.join("-"));
            let with_it = || {
                all.iter()
                    .filter(|other| Some(name_of(other)) == above)
                    .flat_map(examples)
                    .any(|line| line.contains(&words))
            };
            let mut own = examples(command).into_iter();
            assert!(
                own.any(|line| line.contains(&words)) || with_it(),
                "{name}: #[command(after_help = \"Example: {words} …\")] is missing"
            );
        }
    }

    /// Splits the first command of a line into words, as a shell does.
    fn words(line: &str) -> Vec<String> {
        let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
        for c in line.chars().chain([' ']) {
            match (quote, c) {
                (None, '\'' | '"') => quote = Some(c),
                (Some(open), _) if open == c => quote = None,
                (None, '>' | '|' | '#' | ';' | '&') => break,
                (None, ' ') => {
                    words.extend(Some(std::mem::take(&mut word)).filter(|word| !word.is_empty()))
                }
                _ => word.push(c),
            }
        }
        words
    }

    #[test]
    fn examples_parse() {
        use clap::Parser;
        assert_eq!(words("a 'b c' --d=\"e f\" > g"), ["a", "b c", "--d=e f"]);
        let lines: Vec<String> = visible()
            .iter()
            .flat_map(examples)
            .filter(|line| line.starts_with("cordisk "))
            .collect();
        assert!(lines.len() > 3, "{lines:?}");
        for line in lines {
            if let Err(error) = Args::try_parse_from(words(&line)) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn there_is_a_page_for_every_command_that_is_shown() {
        let names: Vec<String> = pages().into_iter().map(|(name, _)| name).collect();
        for name in [
            "cordisk.1",
            "cordisk-mount.1",
            "cordisk-create.1",
            "cordisk-check.1",
            "cordisk-completions.1",
            "mount.fuse.cordisk.8",
        ] {
            assert!(names.iter().any(|page| page == name), "{name} is not among {names:?}");
        }
        for hidden in ["keep", "man.1", "help"] {
            assert!(!names.iter().any(|page| page.contains(hidden)), "{names:?}");
        }
    }

    #[test]
    fn pages_have_the_sections_that_readers_expect() {
        for (name, page) in pages() {
            let text = String::from_utf8(page).unwrap();
            for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"]
            {
                assert!(
                    text.lines().any(|line| line == format!(".SH {section}")
                        || line == format!(".SH \"{section}\"")),
                    "{name}: no {section}"
                );
            }
        }
    }
}
