//! systemd: generators, the units of the default target, and what they run.

use std::collections::{HashSet, VecDeque};

use super::libraries::Libraries;
use crate::failure::Step;
use crate::stage::Stage;
use crate::walk::{Walk, base_name, join};

/// Directories of units, the first one wins.
const UNITS: &[&str] = &[
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
/// Directories of programs that all run before the first unit.
const GENERATORS: &[&str] = &[
    "/etc/systemd/system-generators",
    "/usr/lib/systemd/system-generators",
    "/lib/systemd/system-generators",
    "/usr/lib/systemd/system-environment-generators",
];
/// Units that are followed.
const MOST_UNITS: usize = 2000;
/// Keys that name units which are started with this one.
const STARTED: &[&str] = &["Wants", "Requires", "BindsTo", "Requisite", "Upholds"];
/// Keys that name what is run.
const RUN: &[&str] = &["ExecStart", "ExecStartPre", "ExecStartPost", "ExecCondition", "ExecReload"];

/// Takes the generators, the units of the default target, and their programs.
pub(super) fn take(walk: &mut Walk, libraries: &mut Libraries) -> Step<()> {
    walk.stage(Stage::Services);
    for directory in GENERATORS {
        for name in walk.names(directory)? {
            libraries.program(walk, &join(directory, &name))?;
        }
    }
    let mut default = None;
    for directory in UNITS {
        let path = join(directory, "default.target");
        if default.is_none()
            && let Some(found) = walk.find(&path)?
        {
            default = Some(base_name(&found.path).to_owned());
        }
    }
    let Some(default) = default else { return system_v(walk, libraries) };
    walk.notes.push(format!("the default target is {default}"));
    // A unit has these two before it, unless it says otherwise. Generators start the check of the
    // root file system and a getty on the console, and services start the bus that they need.
    let mut waiting: VecDeque<String> = ["sysinit.target", "basic.target", &default]
        .into_iter()
        .chain(["systemd-remount-fs.service", "systemd-fsck-root.service"])
        .chain(["systemd-fsckd.service", "dbus.service", "dbus-broker.service"])
        .chain(["serial-getty@ttyS0.service"])
        .map(str::to_owned)
        .collect();
    let mut done = HashSet::new();
    while let Some(unit) = waiting.pop_front() {
        if done.len() >= MOST_UNITS || !done.insert(unit.clone()) {
            continue;
        }
        take_unit(walk, libraries, &unit, &mut waiting)?;
    }
    // Modules of rsyslog, which its configuration names.
    for name in ["imuxsock.so", "imklog.so", "lmnet.so"] {
        for path in walk.expand(&format!("/usr/lib/*/rsyslog/{name}"))? {
            libraries.program(walk, &path)?;
        }
    }
    Ok(())
}

/// Takes one unit: its file, its drop-ins, its links, and what it runs.
fn take_unit(
    walk: &mut Walk,
    libraries: &mut Libraries,
    unit: &str,
    waiting: &mut VecDeque<String>,
) -> Step<()> {
    // getty@tty1.service is the template getty@.service.
    let template = unit.split_once('@').and_then(|(name, instance)| {
        let (_, kind) = instance.rsplit_once('.')?;
        Some(format!("{name}@.{kind}"))
    });
    let names = [Some(unit.to_owned()), template];
    let mut texts = Vec::new();
    for name in names.iter().flatten() {
        for directory in UNITS {
            if texts.is_empty()
                && let Some(text) = walk.text(&join(directory, name))?
            {
                texts.push(text);
            }
        }
    }
    for directory in UNITS {
        for name in names.iter().flatten() {
            for kind in ["wants", "requires", "upholds"] {
                let links = join(directory, &format!("{name}.{kind}"));
                waiting.extend(walk.names(&links)?.into_iter().take(MOST_UNITS));
            }
            let drop_ins = join(directory, &format!("{name}.d"));
            for drop_in in walk.names(&drop_ins)?.into_iter().take(100) {
                texts.extend(walk.text(&join(&drop_ins, &drop_in))?);
            }
        }
    }
    for text in texts {
        for line in text.lines() {
            walk.ext4.disk.budget.step()?;
            let Some((key, value)) = line.split_once('=') else { continue };
            let (key, value) = (key.trim(), value.trim());
            if STARTED.contains(&key) {
                let instance = unit.split_once('@').and_then(|(_, rest)| rest.rsplit_once('.'));
                let instance = instance.map_or("", |(instance, _)| instance);
                let names = value.split_whitespace().take(MOST_UNITS);
                waiting.extend(names.map(|name| name.replace("%i", instance)));
            } else if RUN.contains(&key) {
                run(walk, libraries, value)?;
            } else if key == "EnvironmentFile" {
                walk.take(value.trim_start_matches('-'))?;
            }
        }
        if waiting.len() > MOST_UNITS {
            waiting.truncate(MOST_UNITS);
        }
    }
    Ok(())
}

/// Takes the program of a line, and the files that its arguments name.
fn run(walk: &mut Walk, libraries: &mut Libraries, line: &str) -> Step<()> {
    let line = line.trim_start_matches(['-', '@', ':', '+', '!', '|']);
    let mut words = line.split_whitespace().map(|word| word.trim_matches(['"', '\'']));
    let Some(program) = words.next() else { return Ok(()) };
    libraries.program(walk, program)?;
    for word in words.take(32) {
        // A program that a shell or a wrapper runs.
        if ["/usr/", "/bin/", "/sbin/", "/lib/", "/etc/", "/opt/"]
            .iter()
            .any(|directory| word.starts_with(directory))
        {
            libraries.program(walk, word.trim_end_matches(';'))?;
        }
    }
    Ok(())
}

/// A guest without systemd: inittab, and the scripts of System V, OpenRC and BusyBox.
fn system_v(walk: &mut Walk, libraries: &mut Libraries) -> Step<()> {
    walk.notes.push("no systemd: inittab and the scripts in /etc".to_owned());
    let inittab = walk.text("/etc/inittab")?.unwrap_or_default();
    for line in inittab.lines().take(1000) {
        let command = line.rsplit(':').next().unwrap_or_default();
        if !line.trim_start().starts_with('#') {
            run(walk, libraries, command)?;
        }
    }
    for directory in ["/etc/init.d", "/etc/rc.d", "/etc/rcS.d", "/etc/rc2.d", "/etc/conf.d"] {
        walk.take_tree(directory, 1, 1 << 20)?;
    }
    for directory in ["/etc/runlevels", "/lib/rc", "/usr/libexec/rc"] {
        walk.take_tree(directory, 3, 1 << 20)?;
    }
    for program in ["sh", "mount", "modprobe", "getty", "openrc", "rc", "start-stop-daemon"] {
        libraries.program(walk, program)?;
    }
    Ok(())
}
