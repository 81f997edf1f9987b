//! The files of the boot loader: GRUB, systemd-boot, extlinux.

use std::collections::HashSet;

use crate::failure::Step;
use crate::stage::Stage;
use crate::walk::{Walk, join};

/// Longest file of a boot loader that is taken without being named in its configuration.
const LONGEST: u64 = 4 << 20;
/// Modules of GRUB that are followed.
const MOST_MODULES: usize = 500;
/// Platforms of GRUB.
const PLATFORMS: &[&str] = &["i386-pc", "x86_64-efi", "arm64-efi", "powerpc-ieee1275"];
/// Indexes and modules that GRUB reads in `normal` mode without being told.
const ALWAYS: &[&str] = &["command.lst", "fs.lst", "crypto.lst", "terminal.lst", "moddep.lst"];

/// A configuration file of a boot loader.
#[derive(Clone, Debug)]
pub(super) struct Configuration {
    /// The directory that its relative paths belong to.
    pub(super) directory: String,
    pub(super) text: String,
}

/// Takes the files of the boot loader below `prefix`, and returns its configuration files in the
/// order in which they decide about the kernel.
pub(super) fn take(walk: &mut Walk, prefix: &str) -> Step<Vec<Configuration>> {
    walk.stage(Stage::Loader);
    let mut configurations = Vec::new();
    for name in ["grub", "grub2"] {
        let directory = format!("{prefix}/{name}");
        if walk.has(&directory)? {
            configurations.extend(grub(walk, &directory)?);
        }
    }
    for name in ["extlinux", "syslinux"] {
        let directory = format!("{prefix}/{name}");
        if !walk.has(&directory)? {
            continue;
        }
        walk.take_tree(&directory, 0, LONGEST)?;
        for name in ["extlinux.conf", "syslinux.cfg"] {
            if let Some(text) = walk.text(&join(&directory, name))? {
                configurations.push(Configuration { directory: directory.clone(), text });
            }
        }
    }
    // Entries of the Boot Loader Specification: the newest comes first. With them, a grub.cfg names
    // no kernel.
    let entries = format!("{prefix}/loader/entries");
    let mut names = walk.names(&entries)?;
    names.retain(|name| name.ends_with(".conf"));
    names.sort_by(|a, b| super::kernel::compare_versions(b, a));
    let directory = if prefix.is_empty() { "/" } else { prefix };
    for name in names.iter().take(16) {
        if let Some(text) = walk.text(&join(&entries, name))? {
            configurations.push(Configuration { directory: directory.to_owned(), text });
        }
    }
    walk.take(&format!("{prefix}/loader/loader.conf"))?;
    Ok(configurations)
}

fn grub(walk: &mut Walk, directory: &str) -> Step<Option<Configuration>> {
    let text = walk.text(&join(directory, "grub.cfg"))?;
    for name in ["grubenv", "custom.cfg", "unicode.pf2", "fonts/unicode.pf2"] {
        walk.take(&join(directory, name))?;
    }
    for platform in PLATFORMS {
        let platform = join(directory, platform);
        if walk.has(&platform)? {
            grub_modules(walk, &platform, text.as_deref().unwrap_or_default())?;
        }
    }
    Ok(text.map(|text| Configuration { directory: directory.to_owned(), text }))
}

/// Takes `normal` and the modules that the configuration inserts, with what they depend on.
fn grub_modules(walk: &mut Walk, platform: &str, configuration: &str) -> Step<()> {
    let dependencies = walk.text(&join(platform, "moddep.lst"))?.unwrap_or_default();
    for name in ALWAYS {
        walk.take(&join(platform, name))?;
    }
    let mut waiting: Vec<&str> = configuration
        .lines()
        .filter_map(|line| line.trim().strip_prefix("insmod "))
        .map(str::trim)
        .filter(|name| !name.contains(['/', '$']))
        .collect();
    // The commands of a menu entry are modules of their own names.
    waiting.extend(["linux", "search_fs_uuid", "test", "gfxterm", "loadenv"]);
    waiting.reverse();
    waiting.push("normal");
    let mut taken = HashSet::new();
    while let Some(name) = waiting.pop() {
        if taken.len() >= MOST_MODULES || !taken.insert(name) {
            continue;
        }
        walk.take(&join(platform, &format!("{name}.mod")))?;
        let of = dependencies
            .lines()
            .find_map(|line| line.split_once(':').filter(|(module, _)| *module == name));
        waiting.extend(of.map(|(_, needs)| needs.split_whitespace()).into_iter().flatten());
    }
    Ok(())
}
