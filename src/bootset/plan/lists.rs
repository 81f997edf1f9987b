//! Names of files that a boot of Linux reads, by their stages. A name that is not there costs a
//! look into a directory that the boot reads as well.

use super::libraries::Libraries;
use crate::failure::Step;
use crate::stage::Stage;
use crate::walk::{Walk, join};

/// Longest configuration file that is taken.
const LONGEST_CONFIGURATION: u64 = 256 << 10;
/// Bytes of the beginning of a file that is mapped and searched, or appended to.
const HEAD: u64 = 256 << 10;

/// The first process and its surroundings.
pub(super) fn init(walk: &mut Walk, libraries: &mut Libraries) -> Step<()> {
    walk.stage(Stage::Init);
    walk.take("/etc/ld.so.cache")?;
    let mut is_found = false;
    for path in ["/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init"] {
        is_found |= libraries.program(walk, path)?;
    }
    if !is_found {
        walk.notes.push("no /sbin/init was found in it".to_owned());
    }
    // Since version 255 each program of a unit is started by this one.
    libraries.program(walk, "/usr/lib/systemd/systemd-executor")?;
    // What the first process opens with dlopen(3).
    for name in ["libkmod.so.2", "libselinux.so.1", "libpam.so.0", "libseccomp.so.2"] {
        for directory in ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"] {
            libraries.program(walk, &join(directory, name))?;
        }
    }
    Ok(())
}

/// Files that the first process and early services read.
pub(super) fn configuration(walk: &mut Walk) -> Step<()> {
    walk.stage(Stage::Configuration);
    for path in [
        "/etc/machine-id",
        "/etc/os-release",
        "/etc/fstab",
        "/etc/hostname",
        "/etc/locale.conf",
        "/etc/default/locale",
        "/etc/vconsole.conf",
        "/etc/localtime",
        "/etc/timezone",
        "/etc/crypttab",
        "/etc/passwd",
        "/etc/group",
        "/etc/shadow",
        "/etc/gshadow",
        "/etc/nsswitch.conf",
        "/etc/host.conf",
        "/etc/hosts",
        "/etc/gai.conf",
        "/etc/resolv.conf",
        "/etc/sysctl.conf",
        "/etc/environment",
        "/usr/lib/locale/C.utf8/LC_CTYPE",
        "/usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache",
        "/usr/share/dbus-1/system.conf",
    ] {
        walk.take(path)?;
    }
    walk.take_head("/usr/lib/locale/locale-archive", HEAD)?;
    for (path, depth) in [
        // Not the units, which are taken in their order.
        ("/etc/systemd", 0),
        ("/etc/tmpfiles.d", 0),
        ("/usr/lib/tmpfiles.d", 0),
        ("/etc/sysctl.d", 0),
        ("/usr/lib/sysctl.d", 0),
        ("/etc/sysusers.d", 0),
        ("/usr/lib/sysusers.d", 0),
        ("/usr/lib/environment.d", 0),
        ("/usr/lib/systemd/system-preset", 0),
        ("/usr/lib/systemd/journald.conf.d", 0),
        ("/usr/lib/systemd/logind.conf.d", 0),
        ("/usr/lib/systemd/network", 0),
        ("/etc/default", 1),
        ("/etc/network", 2),
        ("/etc/netplan", 0),
        ("/etc/cloud", 1),
        ("/etc/dbus-1", 1),
        ("/usr/share/dbus-1/system.d", 0),
        ("/etc/apparmor.d", 2),
    ] {
        walk.take_tree(path, depth, LONGEST_CONFIGURATION)?;
    }
    Ok(())
}

/// Rules and helpers of udev.
pub(super) fn devices(walk: &mut Walk, libraries: &mut Libraries) -> Step<()> {
    walk.stage(Stage::Devices);
    for program in ["/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd", "udevadm"] {
        libraries.program(walk, program)?;
    }
    walk.take_tree("/etc/udev", 1, LONGEST_CONFIGURATION)?;
    for directory in ["/usr/lib/udev/rules.d", "/lib/udev/rules.d"] {
        walk.take_tree(directory, 0, LONGEST_CONFIGURATION)?;
    }
    for name in ["ata_id", "cdrom_id", "dmi_memory_id"] {
        libraries.program(walk, &join("/usr/lib/udev", name))?;
    }
    for program in ["kmod", "mount", "fsck", "fsck.ext4", "sh", "systemctl"] {
        libraries.program(walk, program)?;
    }
    // What the scripts of networks run.
    for program in ["ifup", "ip", "run-parts", "readlink"] {
        libraries.program(walk, program)?;
    }
    // The database of hardware is mapped and searched for each device: a quarter of its 12 MiB is
    // read in all, a page here and there, each of which would be a round trip.
    for path in ["/etc/udev/hwdb.bin", "/usr/lib/udev/hwdb.bin"] {
        if walk.take(path)?.is_some() {
            break;
        }
    }
    Ok(())
}

/// A login on the console, and over SSH.
pub(super) fn login(walk: &mut Walk, libraries: &mut Libraries) -> Step<()> {
    walk.stage(Stage::Login);
    for path in ["/etc/issue", "/etc/login.defs", "/etc/securetty", "/etc/shells", "/etc/motd"] {
        walk.take(path)?;
    }
    for program in ["agetty", "getty", "login", "bash", "sh", "sshd"] {
        libraries.program(walk, program)?;
    }
    walk.take_tree("/etc/pam.d", 0, LONGEST_CONFIGURATION)?;
    walk.take_tree("/etc/security", 1, LONGEST_CONFIGURATION)?;
    pam_modules(walk, libraries)?;
    for directory in ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"] {
        for name in ["libnss_files.so.2", "libnss_systemd.so.2", "libnss_dns.so.2"] {
            libraries.program(walk, &join(directory, name))?;
        }
    }
    for path in ["/etc/profile", "/etc/bash.bashrc", "/etc/bashrc", "/etc/inputrc"] {
        walk.take(path)?;
    }
    for (path, depth) in [
        ("/etc/profile.d", 0),
        ("/etc/ssh", 1),
        ("/etc/update-motd.d", 0),
        ("/usr/share/terminfo/l", 0),
        ("/usr/lib/terminfo/l", 0),
        ("/usr/lib/terminfo/v", 0),
    ] {
        walk.take_tree(path, depth, LONGEST_CONFIGURATION)?;
    }
    for path in ["/root/.bashrc", "/root/.profile", "/root/.bash_profile"] {
        walk.take(path)?;
    }
    Ok(())
}

/// Modules of PAM that the files in /etc/pam.d name.
fn pam_modules(walk: &mut Walk, libraries: &mut Libraries) -> Step<()> {
    let mut modules = Vec::new();
    for name in walk.names("/etc/pam.d")?.into_iter().take(200) {
        let text = walk.text(&join("/etc/pam.d", &name))?.unwrap_or_default();
        for word in
            text.lines().filter(|line| !line.starts_with('#')).flat_map(str::split_whitespace)
        {
            if word.ends_with(".so") && modules.len() < 200 && !modules.iter().any(|m| m == word) {
                modules.push(word.to_owned());
            }
        }
    }
    for module in modules {
        if module.starts_with('/') {
            libraries.program(walk, &module)?;
            continue;
        }
        for directory in [
            "/usr/lib/x86_64-linux-gnu/security",
            "/usr/lib/aarch64-linux-gnu/security",
            "/usr/lib64/security",
            "/lib/security",
        ] {
            libraries.program(walk, &join(directory, &module))?;
        }
    }
    Ok(())
}

/// State that services read and append to: the beginning of each file, because the rest of a
/// journal or a log is not read.
pub(super) fn state(walk: &mut Walk) -> Step<()> {
    walk.stage(Stage::State);
    for path in ["/var/log/wtmp", "/var/log/btmp", "/var/log/lastlog", "/var/lib/dbus/machine-id"] {
        walk.take_head(path, HEAD)?;
    }
    for path in ["/var/log/journal/*/*.journal", "/var/lib/systemd/*", "/var/lib/systemd/*/*"] {
        // The catalog is read by journalctl.
        let paths = walk.expand(path)?.into_iter().filter(|path| !path.contains("/catalog/"));
        for path in paths.take(200) {
            walk.take_head(&path, HEAD)?;
        }
    }
    for path in ["/var/log", "/var/tmp", "/tmp", "/var/cache", "/var/spool", "/run", "/home"] {
        walk.take(path)?;
    }
    Ok(())
}
