//! The sandbox of the fetcher. It may connect to servers, read the files that name resolution, TLS
//! and credentials need, and write the cache. It cannot run a program, start a process, listen,
//! trace, mount, or open any other file.
//!
//! 1. `PR_SET_NO_NEW_PRIVS`; not dumpable; no core file, because it would hold credentials.
//! 2. Landlock: reading below the directories in `READABLE`, and in those of the files that the
//!    configuration and the environment name; reading and writing below the cache directory; no
//!    other file, no port to listen on.
//! 3. seccomp: calls in `REFUSED` fail with EPERM, and so do sockets of other families than those
//!    of the Internet, Unix sockets (of NBD servers and of resolvers) and netlink (getaddrinfo(3)
//!    asks for addresses of this host).
//!
//! A list of calls that are allowed, as the serving process has it, would have to follow each
//! change of the C library's resolver and of tokio. So this filter refuses what gives access to
//! other processes, and leaves files to Landlock.
//!
//! **Touches:** the rights of this process. **Invariants:** [`enter`] is called after the threads
//! of the network are started: seccomp covers all threads, and Landlock those that this thread
//! starts later; the threads before only move bytes of sockets.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr,
};
use nix::libc;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{MaskedEq, Ne};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use host::error::Context;
use host::{Error, ErrorKind, Result};

use crate::config::SourcesConfig;

/// The newest Landlock version whose rights are requested.
const LANDLOCK: ABI = ABI::V10;

/// What name resolution and TLS read: configuration, libraries of name services, authorities.
const READABLE: [&str; 8] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/run/systemd/resolve",
    "/run/nscd",
    "/proc/self",
    "/proc/sys",
];

/// Files below those directories that some distributions make links to other places:
/// NetworkManager and resolvconf, openSUSE and Arch Linux.
const LINKED: [&str; 6] = [
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
];

/// Variables of the environment that name files which the crates object_store and
/// rustls-platform-verifier read.
const NAMED_BY_ENVIRONMENT: [&str; 7] = [
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AZURE_FEDERATED_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "SSL_CERT_FILE",
];

/// Where the crate object_store looks for credentials of Google, below the home directory.
const OF_GOOGLE: &str = ".config/gcloud/application_default_credentials.json";

/// System calls that fail with EPERM, whatever their arguments are.
const REFUSED: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_send_signal,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_open_tree,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
];

/// The families of sockets that may be made.
const FAMILIES: [i32; 4] = [libc::AF_INET, libc::AF_INET6, libc::AF_UNIX, libc::AF_NETLINK];

/// Enters the sandbox, as far as the kernel offers it.
///
/// # Errors
/// The process cannot give up its rights, although the kernel offers it.
pub fn enter(config: &SourcesConfig, cache: &Path) -> Result<()> {
    rustix::thread::set_no_new_privs(true)
        .map_err(io::Error::from)
        .context(|| "sandbox of the fetcher: no_new_privs")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .context(|| "sandbox of the fetcher: dumpable")?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(io::Error::from)
        .context(|| "sandbox of the fetcher: core files")?;
    // A container's own filter may refuse these calls.
    for part in [restrict_files(config, cache), restrict_calls()] {
        if let Err(error) = part {
            log::warn!("{error}; the fetcher goes on without this part of its sandbox");
        }
    }
    Ok(())
}

fn restrict_files(config: &SourcesConfig, cache: &Path) -> Result<()> {
    let wrap = |error| Error::wrap(ErrorKind::Io, "sandbox of the fetcher: Landlock", error);
    let readable = AccessFs::ReadFile | AccessFs::ReadDir;
    let writable = readable
        | AccessFs::WriteFile
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::Truncate;
    let of_environment = |name: &&str| std::env::var_os(name).map(PathBuf::from);
    let files = config
        .files()
        .into_iter()
        .chain(LINKED.iter().map(PathBuf::from))
        .chain(NAMED_BY_ENVIRONMENT.iter().filter_map(of_environment))
        .chain(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(OF_GOOGLE)));
    let authorities = std::env::var_os("SSL_CERT_DIR").unwrap_or_default();
    let directories = files.flat_map(|file| readable_for(&file));
    let directories = directories.chain(std::env::split_paths(&authorities));
    // The sockets of NBD servers and of resolvers may be anywhere.
    let restricted = AccessFs::from_all(LANDLOCK) & !AccessFs::ResolveUnix;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(restricted)
        .and_then(|rules| rules.handle_access(AccessNet::BindTcp))
        .and_then(Ruleset::create)
        .map_err(wrap)?;
    for path in READABLE.iter().map(PathBuf::from).chain(directories) {
        // A directory that does not exist needs no rule.
        if let Ok(opened) = PathFd::new(&path) {
            rules = rules.add_rule(PathBeneath::new(opened, readable)).map_err(wrap)?;
        }
    }
    let opened = PathFd::new(cache)
        .map_err(|error| Error::wrap(ErrorKind::Io, cache.display().to_string(), error))?;
    rules = rules.add_rule(PathBeneath::new(opened, writable)).map_err(wrap)?;
    rules.restrict_self().map_err(wrap)?;
    Ok(())
}

/// What must be readable for `file` to be read: its directory, because files of credentials are
/// replaced by renames, and the directory of what it is a link to. Of a file in the root directory
/// the file alone, because below that directory is everything.
fn readable_for(file: &Path) -> Vec<PathBuf> {
    let of = |file: &Path| match file.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) if parent.parent().is_some() || parent.is_relative() => parent.to_path_buf(),
        _ => file.to_path_buf(),
    };
    let linked = std::fs::canonicalize(file).ok();
    std::iter::once(of(file)).chain(linked.map(|linked| of(&linked))).collect()
}

fn restrict_calls() -> Result<()> {
    let mut table: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().map(|&number| (number, Vec::new())).collect();
    let condition = |argument, operator, value| {
        SeccompCondition::new(argument, Dword, operator, value).map_err(failed)
    };
    // A socket is refused if its family is none of the four.
    let others = FAMILIES
        .iter()
        .map(|family| condition(0, Ne, u64::from(family.cast_unsigned())))
        .collect::<Result<Vec<_>>>()?;
    table.insert(libc::SYS_socket, vec![SeccompRule::new(others).map_err(failed)?]);
    // Threads, but no processes.
    let thread = condition(0, MaskedEq(libc::CLONE_THREAD as u64), 0)?;
    table.insert(libc::SYS_clone, vec![SeccompRule::new(vec![thread]).map_err(failed)?]);
    let clone3 = std::collections::BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    // The arguments of clone3 are behind a pointer; the C library then uses clone.
    for (table, errno) in [(clone3, libc::ENOSYS), (table, libc::EPERM)] {
        let program = compile(table, errno)?;
        seccompiler::apply_filter_all_threads(&program).map_err(failed)?;
    }
    Ok(())
}

fn compile(
    table: std::collections::BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
) -> Result<BpfProgram> {
    let processor = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
    SeccompFilter::new(
        table,
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        processor,
    )
    .and_then(BpfProgram::try_from)
    .map_err(failed)
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(ErrorKind::Io, "sandbox of the fetcher: seccomp", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: files that are links, as secrets of Kubernetes and the configuration of resolvers
    /// are, and files with relative names can be read in the sandbox.
    #[test]
    fn links_are_readable_where_they_lead() {
        let dir = tempfile::tempdir().unwrap();
        let dir = std::fs::canonicalize(dir.path()).unwrap();
        let (near, far) = (dir.join("near"), dir.join("far"));
        std::fs::create_dir(&near).unwrap();
        std::fs::create_dir(&far).unwrap();
        std::fs::write(far.join("secret"), "x").unwrap();
        std::os::unix::fs::symlink("../far/secret", near.join("key")).unwrap();
        assert_eq!(readable_for(&near.join("key")), [near.clone(), far]);
        assert_eq!(readable_for(&near.join("none")), [near]);
        assert_eq!(readable_for(Path::new("key")), [Path::new(".")]);
        assert_eq!(readable_for(Path::new("keys/key")), [Path::new("keys")]);
        assert_eq!(readable_for(Path::new("/no-such-file")), [Path::new("/no-such-file")]);
    }
}
