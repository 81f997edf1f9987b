//! The stages of a boot, in their order.

/// The stage in which a boot first needs a range.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Stage {
    /// Boot code, partition tables, the gap with the core of the boot loader.
    Firmware,
    /// The boot loader in a file system.
    Loader,
    /// The kernel and its first file system.
    Kernel,
    /// Where blkid(8) and udev look for signatures, on each disk and partition.
    Probe,
    /// What the kernel reads when it mounts: superblock, group descriptors, journal.
    Mount,
    /// The first process with its libraries.
    Init,
    /// Files that the first process reads before it starts others.
    Configuration,
    /// Kernel modules and their indexes.
    Modules,
    /// Units, generators, programs of services.
    Services,
    /// Rules and helpers of udev.
    Devices,
    /// A login: console, PAM, shell, names of users.
    Login,
    /// State that services read and append to.
    State,
    /// Paths that the user has named, in place of the stages above from [`Stage::Loader`] on,
    /// without [`Stage::Mount`].
    Named,
}
