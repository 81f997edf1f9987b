//! The sandbox of the process that serves, and the user it becomes.
//!
//! It is entered once, after everything is open and mounted, and before any other thread exists: Landlock binds the calling thread and those it
//! starts later, and what does not exist yet cannot have been forgotten. From then on a process that has been taken over (by an image that
//! found a hole in a parser, say) has the files that are open, and nothing else: it can open (but for /dev/fuse, which shows nothing to who may not
//! mount), create, remove and execute nothing, connect to nothing, mount and trace nothing. What still has to be done with paths is done by the [`crate::keeper`].
//!
//! 1. `PR_SET_NO_NEW_PRIVS`, not dumpable (nobody but root attaches or reads the memory), no core file: it would hold the guest's data.
//! 2. Landlock: every right that the kernel knows is taken away, for every file, port and process. One rule gives something back: /dev/fuse may be
//!    opened, since each thread that serves it has a descriptor of its own (measured: a tenth more requests than with one for all).
//! 3. seccomp: the list in `syscalls.rs`. What is not on it kills the process, and the kernel logs the number of the call.
//!
//! **Touches:** the rights of this process; the user database, before. **Never:** gives another right back.
//! **Locks:** none. **Invariants:** [`enter`] is called while there is one thread. Filters are inherited, so there is no thread without them.

use std::io::{self, Write};

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope};
use rustix::process::{DumpableBehavior, Resource, Rlimit};

use crate::error::{Context, one_line};
use crate::{Error, ErrorKind, Result};

mod identity;
mod syscalls;

#[cfg(test)]
mod tests;

pub use identity::Identity;

use syscalls::OpensDevice;

/// The newest rights that are asked for; of a kernel that does not know them all, those that it knows.
const LANDLOCK: ABI = ABI::V10;

/// What may still be opened.
const FUSE_DEVICE: &str = "/dev/fuse";

/// How much of a sandbox there has to be.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// As much as the kernel offers.
    #[default]
    Try,
    /// Landlock and seccomp, or an error.
    Require,
    /// None.
    Off,
}

/// Whether a part of the sandbox is on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Part {
    On,
    /// The kernel knows some of it.
    Partly,
    Missing,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::On => "on",
            Part::Partly => "on as far as this kernel knows it",
            Part::Missing => "not offered by this kernel",
        })
    }
}

/// Refuses to go on where [`Mode::Require`] asks for what the kernel does not offer: before anything is opened or mounted.
///
/// # Errors
/// [`ErrorKind::UnsupportedFeature`], with what is missing.
pub fn check(mode: Mode) -> Result<()> {
    if mode != Mode::Require {
        return Ok(());
    }
    // A ruleset that is made and thrown away; it restricts nobody.
    let made = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::from_all(ABI::V1));
    if made.and_then(Ruleset::create).is_err() {
        return Err(missing("Landlock"));
    }
    syscalls::check().map_err(|_| missing("seccomp"))
}

/// Enters the sandbox.
///
/// # Errors
/// [`ErrorKind::UnsupportedFeature`] where [`Mode::Require`] asks for what the kernel does not offer. Parts of the sandbox may be on then.
pub fn enter(mode: Mode) -> Result<()> {
    if mode == Mode::Off {
        log::info!("sandbox: off");
        log_panics();
        return Ok(());
    }
    panic_in_one_line();
    rustix::thread::set_no_new_privs(true).map_err(io::Error::from).context(|| "sandbox: no_new_privs")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(io::Error::from).context(|| "sandbox: dumpable")?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(io::Error::from).context(|| "sandbox: core files")?;

    // A container's own filter may answer these calls as it likes: in `try` no answer is a reason not to serve.
    let landlock = restrict_files().unwrap_or_else(|error| {
        log::debug!("{error}");
        Part::Missing
    });
    if landlock == Part::Missing && mode == Mode::Require {
        return Err(missing("Landlock"));
    }
    // Without Landlock there is nobody who tells one path from another.
    let device = if landlock == Part::Missing { OpensDevice::No } else { OpensDevice::Yes };
    let seccomp = match syscalls::restrict(device) {
        Ok(()) => Part::On,
        Err(_) if mode == Mode::Require => return Err(missing("seccomp")),
        Err(error) => {
            log::debug!("sandbox: {error}");
            Part::Missing
        }
    };
    log::info!("sandbox: Landlock {landlock}, seccomp {seccomp}");
    Ok(())
}

fn restrict_files() -> Result<Part> {
    let wrap = |error| Error::wrap(ErrorKind::Io, "sandbox: Landlock", error);
    let serving = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(LANDLOCK)))
        .and_then(|rules| rules.scope(Scope::from_all(LANDLOCK)))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rules(landlock::path_beneath_rules([FUSE_DEVICE], serving)))
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(wrap)?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Part::On,
        RulesetStatus::PartiallyEnforced => Part::Partly,
        RulesetStatus::NotEnforced => Part::Missing,
    })
}

/// A panic is a broken invariant and ends the process; its message must get out first. The standard library's hook reads the program's own file
/// for the names of functions where `RUST_BACKTRACE` asks for them, which is no longer allowed.
fn panic_in_one_line() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?");
        let line = one_line(&format!("thread {name} panicked: {panic}"));
        let _ = writeln!(io::stderr(), "cordisk: {line}");
        log_panic(&line);
    }));
}

/// Outside of the sandbox the standard library's hook may do its work; its message goes to the log
/// as well.
fn log_panics() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        let thread = std::thread::current();
        log_panic(&format!("thread {} panicked: {panic}", thread.name().unwrap_or("?")));
    }));
}

/// For a process in the background, whose standard error leads nowhere. The process may be about to
/// end: the line is written when this returns. The target keeps it from standard error
/// (`logging::PANIC`).
fn log_panic(line: &str) {
    log::error!(target: "cordisk::panic", "{line}");
    log::logger().flush();
}

fn missing(what: &str) -> Error {
    Error::new(
        ErrorKind::UnsupportedFeature,
        format!("--sandbox require: this kernel offers no {what}; use another kernel, or --sandbox try to do without"),
    )
}
