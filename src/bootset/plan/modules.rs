//! Kernel modules, and the indexes in which udev and modprobe find them.

use std::collections::{HashMap, HashSet};

use super::kernel::compare_versions;
use crate::failure::Step;
use crate::stage::Stage;
use crate::walk::{Walk, base_name, join};

/// Indexes that libkmod opens.
const INDEXES: &[&str] = &[
    "modules.softdep",
    "modules.dep.bin",
    "modules.alias.bin",
    "modules.symbols.bin",
    "modules.builtin.alias.bin",
    "modules.builtin.bin",
    "modules.devname",
];
/// Modules that virtual machines load from their root file system: the drivers of the disk, and the
/// file system itself, are in the initrd.
const TYPICAL: &[&str] = &[
    "fuse",
    "configfs",
    "efi_pstore",
    "loop",
    "dm_mod",
    "binfmt_misc",
    "autofs4",
    "ip_tables",
    "x_tables",
    "af_packet",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "qemu_fw_cfg",
    "evdev",
    "button",
    "serio_raw",
    "psmouse",
    "pcspkr",
    "i6300esb",
    "acpi_cpufreq",
    "pcc_cpufreq",
    "intel_rapl_msr",
    "ghash_clmulni_intel",
    "aesni_intel",
    "sg",
    "kvm_intel",
    "kvm_amd",
];
/// Modules for an EFI system partition that is mounted.
const FOR_EFI: &[&str] = &["vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1"];
/// Modules that are taken.
const MOST_MODULES: usize = 500;

/// Takes the indexes and the modules of one kernel version, or of the newest.
pub(super) fn take(walk: &mut Walk, version: Option<&str>) -> Step<()> {
    walk.stage(Stage::Modules);
    let mut names = walk.names("/lib/modules")?;
    names.sort_by(|a, b| compare_versions(a, b));
    let version = match version {
        Some(version) if names.iter().any(|name| name == version) => version.to_owned(),
        _ => match names.pop() {
            Some(newest) => newest,
            None => return Ok(()),
        },
    };
    let directory = join("/lib/modules", &version);
    for index in INDEXES {
        walk.take(&join(&directory, index))?;
    }
    let mut wanted = Vec::new();
    for directory in ["/etc/modules-load.d", "/usr/lib/modules-load.d", "/lib/modules-load.d"] {
        for name in walk.names(directory)? {
            wanted.extend(lines(walk.text(&join(directory, &name))?));
        }
    }
    wanted.extend(lines(walk.text("/etc/modules")?));
    wanted.extend(TYPICAL.iter().map(|&name| name.to_owned()));
    if walk.look_into("/etc/fstab")?.is_some_and(|fstab| fstab.contains("vfat")) {
        wanted.extend(FOR_EFI.iter().map(|&name| name.to_owned()));
    }
    for directory in ["/etc/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d"] {
        walk.take_tree(directory, 0, 1 << 20)?;
    }
    // modules.dep has the same as modules.dep.bin, as lines: module: modules it depends on.
    let text = walk.look_into(&join(&directory, "modules.dep"))?.unwrap_or_default();
    let mut files = HashMap::new();
    for line in text.lines() {
        walk.ext4.disk.budget.step()?;
        if let Some((file, needs)) = line.split_once(':') {
            files.insert(module_name(file), (file, needs));
        }
    }
    let mut taken = HashSet::new();
    for name in wanted {
        let Some((file, needs)) = files.get(&module_name(&name)) else { continue };
        // modprobe inserts what a module depends on first, from the end of the line on.
        for file in needs.split_whitespace().rev().chain([*file]) {
            if taken.len() < MOST_MODULES && taken.insert(file.to_owned()) {
                walk.take(&join(&directory, file))?;
            }
        }
    }
    Ok(())
}

/// The name of a module in a path: hyphens and underscores are the same.
fn module_name(path: &str) -> String {
    let name = base_name(path);
    name.split_once(".ko").map_or(name, |(name, _)| name).replace('-', "_")
}

/// The lines of a configuration without comments.
fn lines(text: Option<String>) -> Vec<String> {
    let text = text.unwrap_or_default();
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with(['#', ';']));
    lines.filter_map(|line| line.split_whitespace().next()).take(500).map(str::to_owned).collect()
}
