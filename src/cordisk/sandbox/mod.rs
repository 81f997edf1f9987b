//! The sandbox of the serving process, and the user that the process becomes.
//!
//! The process enters the sandbox once, after everything is open and mounted, and before any other
//! thread exists. Landlock binds the calling thread and the threads that it starts later, so no
//! thread can be missed. Suppose that an attacker takes over the process afterwards, for example by
//! an image that exploits a parser. The process then has the files that are open, and no others. It
//! cannot open, create, remove or execute a file, connect to a socket, mount, or trace another
//! process. The one exception is open(2) of /dev/fuse, which reveals nothing to a process that may
//! not mount. Operations on paths are left to the [`crate::keeper`].
//!
//! 1. `PR_SET_NO_NEW_PRIVS`; not dumpable, so that only root can attach or read the memory; no core
//!    file, because it would hold data of the guest.
//! 2. Landlock: every right that the kernel knows is removed, for every file, port and process. One
//!    rule gives a right back: /dev/fuse may be opened. Each thread that serves it has a descriptor
//!    of its own (measured: a tenth more requests than with one shared descriptor).
//! 3. seccomp: the list in `syscalls.rs`. A call that is not on the list kills the process, and the
//!    kernel logs the number of the call.
//!
//! **Touches:** the rights of this process; before the sandbox, the user database. **Never:** gives
//! any other right back.
//! **Locks:** none. **Invariants:** [`enter`] is called while there is one thread. Threads inherit
//! filters, so no thread lacks them.

use std::io::{self, Write};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit};

use host::error::{Context, one_line};
use host::{Error, ErrorKind, Result};

mod identity;
mod syscalls;

#[cfg(test)]
mod tests;

pub use identity::Identity;

use syscalls::OpensDevice;

/// The newest Landlock version whose rights are requested. A kernel that does not know them all
/// enforces those that it knows.
const LANDLOCK: ABI = ABI::V10;

/// The only path that may still be opened.
const FUSE_DEVICE: &str = "/dev/fuse";

/// How much of the sandbox is required.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    /// As much as the kernel offers.
    #[default]
    Try,
    /// Landlock and seccomp, or an error.
    Require,
    /// No sandbox.
    Off,
}

/// Whether a part of the sandbox is on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Part {
    On,
    /// The kernel enforces some of the rights.
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

/// Checks that the kernel offers everything that [`Mode::Require`] asks for, before any file is
/// opened or mounted.
///
/// # Errors
/// [`ErrorKind::UnsupportedFeature`], with the missing part.
pub fn check(mode: Mode) -> Result<()> {
    if mode != Mode::Require {
        return Ok(());
    }
    // The ruleset is created and dropped; it restricts no thread.
    let made = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1));
    if made.and_then(Ruleset::create).is_err() {
        return Err(missing("Landlock"));
    }
    // A thread that cannot be started is no evidence about the kernel.
    syscalls::check().map_err(|error| {
        if error.errno() == Some(rustix::io::Errno::AGAIN.raw_os_error()) {
            error
        } else {
            missing("seccomp")
        }
    })
}

/// Enters the sandbox.
///
/// # Errors
/// [`ErrorKind::UnsupportedFeature`] if [`Mode::Require`] asks for a part that the kernel does not
/// offer. Other parts of the sandbox may be on then.
pub fn enter(mode: Mode) -> Result<()> {
    if mode == Mode::Off {
        log::info!("sandbox: off");
        log_panics();
        return Ok(());
    }
    panic_in_one_line();
    rustix::thread::set_no_new_privs(true)
        .map_err(io::Error::from)
        .context(|| "sandbox: no_new_privs")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .context(|| "sandbox: dumpable")?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none)
        .map_err(io::Error::from)
        .context(|| "sandbox: core files")?;

    // A container's own filter may fail these calls with any error. With [`Mode::Try`] no such
    // error prevents serving.
    let landlock = restrict_files().unwrap_or_else(|error| {
        log::debug!("{error}");
        Part::Missing
    });
    if landlock == Part::Missing && mode == Mode::Require {
        return Err(missing("Landlock"));
    }
    // Without Landlock, the seccomp filter cannot tell one path from another.
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

/// Installs a panic hook that writes one line. A panic is a broken invariant and ends the process,
/// so its message must be written first. The standard library's hook would read the program's own
/// file for function names if `RUST_BACKTRACE` is set, which the sandbox forbids.
fn panic_in_one_line() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?");
        let line = one_line(&format!("thread {name} panicked: {panic}"));
        let _ = writeln!(io::stderr(), "cordisk: {line}");
        log_panic(&line);
    }));
}

/// Keeps the standard library's panic hook, which works outside the sandbox, and also writes its
/// message to the log.
fn log_panics() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        let thread = std::thread::current();
        log_panic(&format!("thread {} panicked: {panic}", thread.name().unwrap_or("?")));
    }));
}

/// Writes a panic's message to the log, for a background process whose standard error is /dev/null.
/// The process may be about to end, so the line is written when this returns. The log target keeps
/// the line off standard error (`logging::PANIC`).
fn log_panic(line: &str) {
    log::error!(target: "cordisk::panic", "{line}");
    log::logger().flush();
}

fn missing(what: &str) -> Error {
    Error::new(
        ErrorKind::UnsupportedFeature,
        format!(
            "--sandbox require: this kernel offers no {what}; use another kernel, or --sandbox try to do without"
        ),
    )
}
