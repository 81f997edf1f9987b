//! The system calls that the serving process may make, and the result of all others.
//!
//! There are three filters; for each call the strictest result counts:
//!
//! 1. *Calls by path* (open, stat by path and the like) fail with `EACCES`. The C library makes
//!    such calls by itself and copes with the failure. For example, the allocator of glibc 2.36
//!    counts processors in `/sys/devices/system/cpu/online` and `/proc/stat` when many threads need
//!    memory, and that must not kill the process. Landlock would refuse these calls as well. No
//!    filter can see a path, so /dev/fuse is an exception: if the kernel has Landlock, this filter
//!    lets one kind of open(2) pass, for reading and writing and with no other flag, and Landlock
//!    alone decides. /dev/fuse is opened in this way.
//! 2. `clone3` fails with `ENOSYS`: its arguments are behind a pointer, where no filter can see
//!    them. The C library then uses `clone`, which may only start threads.
//! 3. A call that is not on the list ends the process with SIGSYS. The kernel logs it (`type=1326`
//!    in the audit or kernel log).
//!
//! The list includes calls on open descriptors that have no caller in `storage` yet, because they
//! give access to nothing new.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use host::error::Context;
use host::{Error, ErrorKind, Result};

/// Numbers of calls, each with the rules for its arguments. One of the rules must hold; an empty
/// list permits any arguments.
type SyscallTable = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls allowed with any arguments: they concern open files, our own memory and threads, and time.
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
    // Threads, signals, end of the process.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Identity of this process.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    // The second filter answers this call; this filter must not kill the process first.
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

/// Calls that fail with `EACCES`. None of them changes a file. [`libc::SYS_newfstatat`] and
/// [`libc::SYS_statx`] fail only if they name a path.
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

/// Whether the filter lets the open(2) of /dev/fuse pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum OpensDevice {
    /// It does; Landlock refuses every other path.
    Yes,
    No,
}

/// Permitted requests of ioctl(2): share clusters between files (`FICLONERANGE`), add a descriptor
/// to a FUSE connection (`FUSE_DEV_IOC_CLONE`), set non-blocking mode as the standard library does
/// (`FIONBIO`), and test for a terminal (`TCGETS`).
const IOCTLS: &[u64] = &[0x4020_940d, 0x8004_e500, 0x5421, 0x5401];

/// `IORING_REGISTER_ENABLE_RINGS` of io_uring_register(2).
const ENABLE_RINGS: u64 = 12;

/// Permitted commands of fcntl(2): flags, duplicates, and locks of open file descriptions.
/// `F_SETOWN` is not permitted, because it sends signals.
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

/// Checks that the kernel accepts filters, on a thread that ends at once.
///
/// # Errors
/// The kernel accepts none, or the thread cannot be started.
pub(super) fn check() -> Result<()> {
    let program = compile(
        SyscallTable::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let tried = std::thread::Builder::new()
        .spawn(move || seccompiler::apply_filter(&program))
        .context(|| "starting a thread")?;
    match tried.join() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(Error::new(ErrorKind::Io, "seccomp")),
    }
}

/// Installs the filters for all threads, and for threads that they start later.
///
/// # Errors
/// The kernel does not offer seccomp, or this processor architecture is not supported.
pub(super) fn restrict(device: OpensDevice) -> Result<()> {
    let refused = |table, errno: i32| {
        compile(table, SeccompAction::Allow, SeccompAction::Errno(errno.cast_unsigned()))
    };
    let programs = [
        refused(by_path(device)?, libc::EACCES)?,
        refused(SyscallTable::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)?,
        // Installed last, because it forbids to install further filters.
        compile(allowed()?, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ];
    programs
        .iter()
        .try_for_each(|program| seccompiler::apply_filter_all_threads(program).map_err(failed))
}

fn compile(table: SyscallTable, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram> {
    let processor = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
    SeccompFilter::new(table, others, these, processor)
        .and_then(BpfProgram::try_from)
        .map_err(failed)
}

fn allowed() -> Result<SyscallTable> {
    let mut table: SyscallTable = ALLOWED.iter().map(|&number| (number, Vec::new())).collect();
    // These calls fail in the first filter, so they must not end the process here.
    table.extend(BY_PATH.iter().map(|&number| (number, Vec::new())));
    table.insert(libc::SYS_newfstatat, Vec::new());
    table.insert(libc::SYS_statx, Vec::new());

    let mut limit = |number: i64, rules: Vec<SeccompRule>| table.insert(number, rules);
    // No executable memory, so that no code can be loaded.
    let executable = libc::PROT_EXEC as u64;
    limit(libc::SYS_mmap, vec![rule(2, MaskedEq(executable), 0)?]);
    limit(libc::SYS_mprotect, vec![rule(2, MaskedEq(executable), 0)?]);
    // Threads, but no processes.
    let thread = libc::CLONE_THREAD as u64;
    limit(libc::SYS_clone, vec![rule(0, MaskedEq(thread), thread)?]);
    // abort(3) needs tgkill(2), which may signal only this process.
    let process = u64::from(std::process::id());
    limit(libc::SYS_tgkill, vec![rule(0, Eq, process)?]);
    // Sets names of threads, and of anonymous memory (which the allocator of the C library does if
    // configured so).
    limit(
        libc::SYS_prctl,
        vec![rule(0, Eq, libc::PR_SET_NAME as u64)?, rule(0, Eq, libc::PR_SET_VMA as u64)?],
    );
    limit(
        libc::SYS_ioctl,
        IOCTLS.iter().map(|&request| rule(1, Eq, request)).collect::<Result<_>>()?,
    );
    limit(
        libc::SYS_fcntl,
        FCNTLS
            .iter()
            .map(|&command| rule(1, Eq, u64::from(command.cast_unsigned())))
            .collect::<Result<_>>()?,
    );
    // A thread enables the ring that it serves; the ring was created and restricted before. No ring
    // can be created, and nothing else registered.
    limit(libc::SYS_io_uring_register, vec![rule(1, Eq, ENABLE_RINGS)?]);
    // A thread may lower its own priority.
    for number in [libc::SYS_getpriority, libc::SYS_setpriority] {
        limit(
            number,
            vec![conditions(&[(0, Dword, Eq, u64::from(libc::PRIO_PROCESS)), (1, Dword, Eq, 0)])?],
        );
    }
    // Reads the limits of this process, but does not set them.
    limit(libc::SYS_prlimit64, vec![conditions(&[(0, Dword, Eq, 0), (2, Qword, Eq, 0)])?]);
    Ok(table)
}

fn by_path(device: OpensDevice) -> Result<SyscallTable> {
    let mut table: SyscallTable = BY_PATH.iter().map(|&number| (number, Vec::new())).collect();
    if device == OpensDevice::Yes {
        let read_and_write = libc::O_RDWR | libc::O_CLOEXEC;
        table.insert(
            libc::SYS_openat,
            vec![rule(2, Ne, u64::from(read_and_write.cast_unsigned()))?],
        );
    }
    // With AT_EMPTY_PATH these calls concern a descriptor. The standard library reads the size of a
    // file in this way.
    let empty_path = libc::AT_EMPTY_PATH as u64;
    table.insert(libc::SYS_newfstatat, vec![rule(3, MaskedEq(empty_path), 0)?]);
    table.insert(libc::SYS_statx, vec![rule(2, MaskedEq(empty_path), 0)?]);
    Ok(table)
}

/// Makes a rule of one condition on an argument of 32 bits.
fn rule(argument: u8, operator: seccompiler::SeccompCmpOp, value: u64) -> Result<SeccompRule> {
    conditions(&[(argument, Dword, operator, value)])
}

fn conditions(
    all: &[(u8, seccompiler::SeccompCmpArgLen, seccompiler::SeccompCmpOp, u64)],
) -> Result<SeccompRule> {
    let each = all.iter().map(|(argument, length, operator, value)| {
        SeccompCondition::new(*argument, length.clone(), operator.clone(), *value).map_err(failed)
    });
    SeccompRule::new(each.collect::<Result<_>>()?).map_err(failed)
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(ErrorKind::Io, "seccomp", error)
}
