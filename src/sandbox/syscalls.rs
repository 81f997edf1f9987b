//! The system calls that the serving process may make, and what happens to the others.
//!
//! Three filters, of which the strictest answer counts:
//!
//! 1. *Looking at paths* (open, stat by path and the like) is answered `EACCES`. The C library does this of its own accord and knows what to do
//!    without: the allocator of glibc 2.36, for one, counts processors in `/sys/devices/system/cpu/online` and `/proc/stat` when many threads
//!    want memory. A disk is not to vanish for that. Landlock would refuse it as well, and where there is Landlock, it alone decides about one kind
//!    of open(2), for reading and writing and with no other flag: that is how /dev/fuse is opened, and no filter sees a path.
//! 2. `clone3` is answered `ENOSYS`: its arguments are behind a pointer, where no filter sees them. The C library takes `clone` then, which may
//!    start threads and nothing else.
//! 3. Everything that is not on the list ends the process with SIGSYS. The kernel logs it (`type=1326` in the audit or kernel log).
//!
//! What may be done with descriptors that are open is on the list although some of it has no caller yet in `storage`: it reaches nothing new.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

use crate::{Error, ErrorKind, Result};

/// Numbers of calls, each with the rules for its arguments: one of them must hold; none means any arguments.
type Table = BTreeMap<i64, Vec<SeccompRule>>;

/// Allowed whatever the arguments: they concern open files, our own memory and threads, and time.
const ALLOWED: &[i64] = &[
    // Open files: the images, /dev/fuse, sockets that are connected, pipes.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_copy_file_range,
    libc::SYS_splice,
    libc::SYS_fadvise64,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fgetxattr,
    libc::SYS_flock,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_getdents64,
    // Sockets that listen or are connected. There is no socket(2), bind(2) or connect(2).
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_io_uring_enter,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // Threads, signals, ends.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // What this process is.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    // Answered by the second filter, which this one must not forestall.
    libc::SYS_clone3,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// Answered `EACCES`. None of them changes anything; [`libc::SYS_newfstatat`] and [`libc::SYS_statx`] are here where they name a path.
const BY_PATH: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_statfs,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Whether /dev/fuse may be opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum OpensDevice {
    /// Something else sees to it that nothing else is.
    Yes,
    No,
}

/// Requests of ioctl(2): share clusters between files (`FICLONERANGE`), one more descriptor of a FUSE connection (`FUSE_DEV_IOC_CLONE`), do not
/// block (`FIONBIO`, as the standard library does it), is it a terminal (`TCGETS`).
const IOCTLS: &[u64] = &[0x4020_940d, 0x8004_e500, 0x5421, 0x5401];

/// Commands of fcntl(2): flags, duplicates, locks of open files. Not `F_SETOWN`, which sends signals.
const FCNTLS: &[i32] = &[
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
];

/// Whether the kernel takes filters at all. Tried on a thread that ends at once.
///
/// # Errors
/// It does not.
pub(super) fn check() -> Result<()> {
    let program = compile(Table::from([(libc::SYS_clone3, Vec::new())]), SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    let tried = std::thread::spawn(move || seccompiler::apply_filter(&program));
    match tried.join() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(Error::new(ErrorKind::Io, "seccomp")),
    }
}

/// Binds all threads, and those they start.
///
/// # Errors
/// The kernel does not offer seccomp, or this processor is not known here.
pub(super) fn restrict(device: OpensDevice) -> Result<()> {
    let refused = |table, errno: i32| compile(table, SeccompAction::Allow, SeccompAction::Errno(errno.cast_unsigned()));
    let programs = [
        refused(by_path(device)?, libc::EACCES)?,
        refused(Table::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)?,
        // Last: it does not allow to install others.
        compile(allowed()?, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ];
    programs.iter().try_for_each(|program| seccompiler::apply_filter_all_threads(program).map_err(failed))
}

fn compile(table: Table, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram> {
    let processor = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
    SeccompFilter::new(table, others, these, processor).and_then(BpfProgram::try_from).map_err(failed)
}

fn allowed() -> Result<Table> {
    let mut table: Table = ALLOWED.iter().map(|&number| (number, Vec::new())).collect();
    // What the first filter answers must not end the process here.
    table.extend(BY_PATH.iter().map(|&number| (number, Vec::new())));
    table.insert(libc::SYS_newfstatat, Vec::new());
    table.insert(libc::SYS_statx, Vec::new());

    let mut limit = |number: i64, rules: Vec<SeccompRule>| table.insert(number, rules);
    // No memory that can be executed: code cannot be brought in.
    let executable = libc::PROT_EXEC as u64;
    limit(libc::SYS_mmap, vec![rule(2, MaskedEq(executable), 0)?]);
    limit(libc::SYS_mprotect, vec![rule(2, MaskedEq(executable), 0)?]);
    // Threads, no processes.
    let thread = libc::CLONE_THREAD as u64;
    limit(libc::SYS_clone, vec![rule(0, MaskedEq(thread), thread)?]);
    // abort(3): no signal to anybody else.
    let process = u64::from(std::process::id());
    limit(libc::SYS_tgkill, vec![rule(0, Eq, process)?]);
    // Names of threads, and of anonymous memory (the allocator of the C library, if told to).
    limit(libc::SYS_prctl, vec![rule(0, Eq, libc::PR_SET_NAME as u64)?, rule(0, Eq, libc::PR_SET_VMA as u64)?]);
    limit(libc::SYS_ioctl, IOCTLS.iter().map(|&request| rule(1, Eq, request)).collect::<Result<_>>()?);
    limit(libc::SYS_fcntl, FCNTLS.iter().map(|&command| rule(1, Eq, u64::from(command.cast_unsigned()))).collect::<Result<_>>()?);
    // A lower priority for the thread that asks for it.
    for number in [libc::SYS_getpriority, libc::SYS_setpriority] {
        limit(number, vec![conditions(&[(0, Dword, Eq, u64::from(libc::PRIO_PROCESS)), (1, Dword, Eq, 0)])?]);
    }
    // Asking for limits of this process, not setting them.
    limit(libc::SYS_prlimit64, vec![conditions(&[(0, Dword, Eq, 0), (2, Qword, Eq, 0)])?]);
    Ok(table)
}

fn by_path(device: OpensDevice) -> Result<Table> {
    let mut table: Table = BY_PATH.iter().map(|&number| (number, Vec::new())).collect();
    if device == OpensDevice::Yes {
        let read_and_write = libc::O_RDWR | libc::O_CLOEXEC;
        table.insert(libc::SYS_openat, vec![rule(2, Ne, u64::from(read_and_write.cast_unsigned()))?]);
    }
    // With AT_EMPTY_PATH they ask about a descriptor: how the standard library asks for the size of a file.
    let empty_path = libc::AT_EMPTY_PATH as u64;
    table.insert(libc::SYS_newfstatat, vec![rule(3, MaskedEq(empty_path), 0)?]);
    table.insert(libc::SYS_statx, vec![rule(2, MaskedEq(empty_path), 0)?]);
    Ok(table)
}

/// One condition on an argument of 32 bits.
fn rule(argument: u8, operator: seccompiler::SeccompCmpOp, value: u64) -> Result<SeccompRule> {
    conditions(&[(argument, Dword, operator, value)])
}

fn conditions(all: &[(u8, seccompiler::SeccompCmpArgLen, seccompiler::SeccompCmpOp, u64)]) -> Result<SeccompRule> {
    let each = all.iter().map(|(argument, length, operator, value)| {
        SeccompCondition::new(*argument, length.clone(), operator.clone(), *value).map_err(failed)
    });
    SeccompRule::new(each.collect::<Result<_>>()?).map_err(failed)
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(ErrorKind::Io, "seccomp", error)
}
