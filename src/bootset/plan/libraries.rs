//! Programs and what they are run with: the dynamic loader, libraries, interpreters of scripts.

use std::collections::HashSet;

use crate::elf::ElfNeeds;
use crate::ext4::{FileKind, Resolved};
use crate::failure::Step;
use crate::walk::{Walk, join, parent};

/// Files of one program, with all its libraries.
const MOST_FILES: usize = 1000;
/// Directories in which a name without a slash is searched.
const PROGRAMS: &[&str] =
    &["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Finds libraries as the dynamic loader does, without its cache: DT_RUNPATH, the directories of
/// ld.so.conf, the directories of the platform.
#[derive(Debug)]
pub(super) struct Libraries {
    configured: Vec<String>,
    /// Inodes whose needs were taken.
    done: HashSet<u32>,
}

impl Libraries {
    /// Reads ld.so.conf. It is not taken: a boot reads the cache that was made from it.
    pub(super) fn new(walk: &mut Walk) -> Step<Libraries> {
        let mut configured = Vec::new();
        let mut files = vec!["/etc/ld.so.conf".to_owned()];
        let names = walk.names("/etc/ld.so.conf.d")?;
        files.extend(names.iter().take(100).map(|name| join("/etc/ld.so.conf.d", name)));
        for file in files {
            let text = walk.look_into(&file)?.unwrap_or_default();
            let lines = text.lines().map(str::trim).filter(|line| line.starts_with('/'));
            configured.extend(lines.take(100).map(str::to_owned));
        }
        Ok(Libraries { configured, done: HashSet::new() })
    }

    /// Takes a program, and what it needs to run. Returns whether there is one.
    pub(super) fn program(&mut self, walk: &mut Walk, path: &str) -> Step<bool> {
        let mut paths = Vec::new();
        if path.starts_with('/') {
            paths.push(path.to_owned());
        } else if !path.contains('/') {
            paths.extend(PROGRAMS.iter().map(|directory| join(directory, path)));
        }
        for path in paths {
            let Some(found) = walk.take(&path)? else { continue };
            if found.inode.kind == FileKind::Regular {
                self.needs(walk, found)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes what a file needs, and what that needs, the nearest first.
    fn needs(&mut self, walk: &mut Walk, first: Resolved) -> Step<()> {
        let mut waiting = std::collections::VecDeque::from([first]);
        let mut count = 0;
        while let Some(file) = waiting.pop_front() {
            count += 1;
            if count > MOST_FILES || !self.done.insert(file.inode.number) {
                continue;
            }
            if let Some(needs) = walk.elf(&file.path, &file.inode)? {
                if let Some(interpreter) = &needs.interpreter {
                    waiting.extend(walk.take(interpreter)?);
                }
                for library in &needs.libraries {
                    waiting.extend(self.library(walk, &file.path, &needs, library)?);
                }
            } else if let Some(line) = walk.interpreter(&file.path, &file.inode)? {
                let mut words = line.split_whitespace();
                let interpreter = words.next().unwrap_or_default().to_owned();
                waiting.extend(walk.take(&interpreter)?);
                // `#!/usr/bin/env python3`
                if interpreter.ends_with("/env")
                    && let Some(name) = words.next()
                {
                    for directory in PROGRAMS {
                        waiting.extend(walk.take(&join(directory, name))?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Finds and takes one library of a file.
    fn library(
        &self,
        walk: &mut Walk,
        of: &str,
        needs: &ElfNeeds,
        name: &str,
    ) -> Step<Option<Resolved>> {
        if name.contains('/') {
            return walk.take(name);
        }
        let origin = parent(of);
        let own = needs
            .search
            .iter()
            .map(|directory| directory.replace("$ORIGIN", origin).replace("${ORIGIN}", origin));
        let triplet = triplet(needs.machine);
        let platform = [
            format!("/lib/{triplet}"),
            format!("/usr/lib/{triplet}"),
            if needs.is_64bit { "/lib64".to_owned() } else { "/lib32".to_owned() },
            if needs.is_64bit { "/usr/lib64".to_owned() } else { "/usr/lib32".to_owned() },
            "/lib".to_owned(),
            "/usr/lib".to_owned(),
            "/usr/local/lib".to_owned(),
        ];
        let directories = own.chain(self.configured.iter().cloned()).chain(platform);
        for directory in directories.filter(|directory| directory.starts_with('/')).take(100) {
            if let Some(found) = walk.take(&join(&directory, name))? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// The name of the directory of a machine's libraries on Debian and its relatives.
fn triplet(machine: u16) -> &'static str {
    match machine {
        3 => "i386-linux-gnu",
        21 => "powerpc64le-linux-gnu",
        22 => "s390x-linux-gnu",
        40 => "arm-linux-gnueabihf",
        62 => "x86_64-linux-gnu",
        183 => "aarch64-linux-gnu",
        243 => "riscv64-linux-gnu",
        _ => "unknown",
    }
}
