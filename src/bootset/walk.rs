//! The walk over one file system: which files are taken, and what becomes of failures.
//!
//! **Touches:** the file system, through [`Ext4`]. **Never:** reads the data of a file that it
//! only takes. **Invariants:** what a lookup has read is recorded before the data of the file.

use std::collections::HashSet;
use std::ops::Range;

use crate::elf::{self, ElfNeeds};
use crate::ext4::{Ext4, FileKind, Inode, Resolved};
use crate::failure::{Failure, Step};
use crate::glob;
use crate::stage::Stage;

/// Bytes of a text that is read: configuration, units, lists of modules.
const LONGEST_TEXT: u64 = 4 << 20;
/// Notes about damaged files of one file system; the rest is counted.
const MOST_NOTES: usize = 16;
/// Paths that one pattern may stand for.
const MOST_MATCHES: usize = 10_000;

/// A walk over one file system.
#[derive(Debug)]
pub(crate) struct Walk {
    pub(crate) ext4: Ext4,
    /// What is found, in order, with the stage.
    pub(crate) found: Vec<(Stage, Range<u64>)>,
    pub(crate) notes: Vec<String>,
    /// Damaged files that have no note.
    unnoted: usize,
    pub(crate) is_complete: bool,
    stage: Stage,
    /// Bytes of the disk, aligned, that the reader of this stage reads at once; a power of two.
    unit: u64,
    seen: HashSet<Range<u64>>,
    bytes: u64,
    /// Inodes of which the data was taken.
    taken: HashSet<u32>,
}

impl Walk {
    pub(crate) fn new(ext4: Ext4) -> Walk {
        Walk {
            ext4,
            found: Vec::new(),
            notes: Vec::new(),
            unnoted: 0,
            is_complete: true,
            stage: Stage::Firmware,
            unit: 1,
            seen: HashSet::new(),
            bytes: 0,
            taken: HashSet::new(),
        }
    }

    /// What is taken from now on is first needed in this stage.
    pub(crate) fn stage(&mut self, stage: Stage) {
        self.stage = stage;
    }

    /// What is taken from now on is read in units of `unit` bytes of the disk, a power of two.
    pub(crate) fn read_in_units(&mut self, unit: u64) {
        self.unit = unit;
    }

    /// Adds a range of the disk, rounded to whole units within the partition.
    pub(crate) fn add(&mut self, range: Range<u64>) -> Step<()> {
        let range = self.ext4.within(
            range.start - range.start % self.unit
                ..range.end.checked_next_multiple_of(self.unit).unwrap_or(range.end),
        );
        let limits = &self.ext4.disk.budget.limits;
        if self.found.len() >= limits.most_ranges.saturating_mul(4) {
            return Err(Failure::Limit("the number of ranges"));
        }
        // The list of all file systems holds the exact bound; here the walk is only ended.
        if self.bytes > limits.most_bytes_found {
            return Err(Failure::Limit("bytes found"));
        }
        if self.seen.insert(range.clone()) {
            self.bytes = self.bytes.saturating_add(range.end - range.start);
            self.found.push((self.stage, range));
        }
        Ok(())
    }

    /// Adds what lookups have read.
    fn add_touched(&mut self) -> Step<()> {
        for range in self.ext4.take_touched() {
            self.add(range)?;
        }
        Ok(())
    }

    /// Records what a lookup has read, and turns what is wrong with one file into a note.
    pub(crate) fn judge<T>(&mut self, what: &str, step: Step<T>) -> Step<Option<T>> {
        let touched = self.add_touched();
        let found = match step {
            Ok(found) => Some(found),
            Err(Failure::Absent) => None,
            Err(Failure::Damaged(why)) => {
                self.is_complete = false;
                if self.notes.len() < MOST_NOTES {
                    self.notes.push(format!("{what}: {why}"));
                } else {
                    self.unnoted += 1;
                }
                None
            }
            Err(failure) => return Err(failure),
        };
        touched?;
        Ok(found)
    }

    /// How many damaged files have no note of their own.
    pub(crate) fn unnoted(&self) -> usize {
        self.unnoted
    }

    /// Finds a file through all links. Its directories and inodes are recorded.
    pub(crate) fn find(&mut self, path: &str) -> Step<Option<Resolved>> {
        self.ext4.disk.budget.file()?;
        let found = self.ext4.resolve(path);
        self.judge(path, found)
    }

    /// Whether there is a file at the path.
    pub(crate) fn has(&mut self, path: &str) -> Step<bool> {
        Ok(self.find(path)?.is_some())
    }

    /// Takes a file with its data. A directory is taken without what is in it.
    pub(crate) fn take(&mut self, path: &str) -> Step<Option<Resolved>> {
        let Some(found) = self.find(path)? else { return Ok(None) };
        self.take_data(path, &found.inode, u64::MAX)?;
        Ok(Some(found))
    }

    /// Takes the first `bytes` bytes of a file.
    pub(crate) fn take_head(&mut self, path: &str, bytes: u64) -> Step<()> {
        let Some(found) = self.find(path)? else { return Ok(()) };
        self.take_data(path, &found.inode, bytes)
    }

    /// Takes the first `bytes` bytes of an inode's data.
    pub(crate) fn take_data(&mut self, path: &str, inode: &Inode, bytes: u64) -> Step<()> {
        if inode.kind == FileKind::Directory {
            let directory = self.ext4.directory(inode);
            self.judge(path, directory)?;
            return Ok(());
        }
        if inode.kind != FileKind::Regular || !self.taken.insert(inode.number) {
            return Ok(());
        }
        let most = self.ext4.disk.budget.limits.most_bytes_of_a_file;
        if inode.size.min(bytes) > most {
            self.is_complete = false;
            self.notes.push(format!("{path}: only the first {most} of {} bytes", inode.size));
        }
        let extents = self.ext4.extents(inode, bytes.min(most));
        for extent in self.judge(path, extents)?.unwrap_or_default() {
            match self.ext4.bytes_of(extent.physical, extent.count) {
                Some(range) if extent.physical > 0 => self.add(range)?,
                _ => {
                    let damaged = Failure::damaged("its blocks lie behind the end");
                    self.judge::<()>(path, Err(damaged))?;
                }
            }
        }
        Ok(())
    }

    /// Takes a text, and returns it. Bytes that are not UTF-8 are replaced.
    pub(crate) fn text(&mut self, path: &str) -> Step<Option<String>> {
        let Some(found) = self.take(path)? else { return Ok(None) };
        if found.inode.kind != FileKind::Regular {
            return Ok(None);
        }
        self.content(path, &found.inode)
    }

    /// Returns the text of a file that a boot does not read.
    pub(crate) fn look_into(&mut self, path: &str) -> Step<Option<String>> {
        let Some(found) = self.find(path)? else { return Ok(None) };
        if found.inode.kind != FileKind::Regular {
            return Ok(None);
        }
        self.content(path, &found.inode)
    }

    fn content(&mut self, path: &str, inode: &Inode) -> Step<Option<String>> {
        let content = self.ext4.content(inode, LONGEST_TEXT);
        let content = self.judge(path, content)?;
        Ok(content.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Returns the names in a directory, sorted. None, if there is no directory.
    pub(crate) fn names(&mut self, path: &str) -> Step<Vec<String>> {
        let Some(found) = self.find(path)? else { return Ok(Vec::new()) };
        let directory = self.ext4.directory(&found.inode);
        let Some(directory) = self.judge(path, directory)? else { return Ok(Vec::new()) };
        if directory.is_damaged {
            self.judge::<()>(path, Err(Failure::damaged("the directory is damaged or too long")))?;
        }
        let mut names: Vec<_> = directory.entries.iter().map(|entry| entry.name.clone()).collect();
        names.sort();
        Ok(names)
    }

    /// Takes a directory with the files in it that have up to `longest` bytes, and the directories
    /// in it `depth` deep. Links to directories are not followed. Returns whether there is more.
    pub(crate) fn take_tree(&mut self, path: &str, depth: usize, longest: u64) -> Step<bool> {
        let mut waiting = vec![(path.to_owned(), 0)];
        // Directories are entered once: a damaged file system can have circles.
        let mut entered = HashSet::new();
        let mut is_cut = false;
        while let Some((path, level)) = waiting.pop() {
            let Some(found) = self.find(&path)? else { continue };
            match found.inode.kind {
                FileKind::Directory if level > depth => is_cut = true,
                FileKind::Directory if !entered.insert(found.inode.number) => {}
                FileKind::Directory => {
                    // The first name is taken first.
                    for name in self.names(&found.path)?.into_iter().rev() {
                        let child = join(&found.path, &name);
                        if !self.leads_to_a_directory(&child)? {
                            waiting.push((child, level + 1));
                        }
                    }
                }
                _ if found.inode.size > longest => is_cut = true,
                _ => self.take_data(&path, &found.inode, u64::MAX)?,
            }
        }
        Ok(is_cut)
    }

    /// Whether the path is a symbolic link to a directory.
    fn leads_to_a_directory(&mut self, path: &str) -> Step<bool> {
        let own = self.ext4.resolve_link(path);
        let own = self.judge(path, own)?;
        if own.is_none_or(|own| own.inode.kind != FileKind::Link) {
            return Ok(false);
        }
        let target = self.find(path)?;
        Ok(target.is_some_and(|target| target.inode.kind == FileKind::Directory))
    }

    /// Returns the paths that a pattern stands for, sorted: `*` and `?` within each name.
    pub(crate) fn expand(&mut self, pattern: &str) -> Step<Vec<String>> {
        let mut paths = vec![String::new()];
        for name in pattern.split('/').filter(|name| !name.is_empty()) {
            if !glob::is_pattern(name) {
                paths.iter_mut().for_each(|path| *path = format!("{path}/{name}"));
                continue;
            }
            let mut longer = Vec::new();
            for path in paths {
                let directory = if path.is_empty() { "/" } else { &path };
                for entry in self.names(directory)? {
                    self.ext4.disk.budget.step()?;
                    if longer.len() < MOST_MATCHES && glob::matches(name, &entry) {
                        longer.push(format!("{path}/{entry}"));
                    }
                }
            }
            paths = longer;
        }
        Ok(paths)
    }

    /// Returns what an ELF file needs.
    pub(crate) fn elf(&mut self, path: &str, inode: &Inode) -> Step<Option<ElfNeeds>> {
        let ext4 = &mut self.ext4;
        let needs = ext4.content(inode, elf::HEAD).and_then(|head| {
            let mut read = |offset: u64, len: u64| ext4.content_at(inode, offset, len);
            elf::needs(&head, &mut read)
        });
        Ok(self.judge(path, needs)?.flatten())
    }

    /// Returns the first line of a script without `#!`, if the file is one.
    pub(crate) fn interpreter(&mut self, path: &str, inode: &Inode) -> Step<Option<String>> {
        let head = self.ext4.content(inode, 256);
        let Some(head) = self.judge(path, head)? else { return Ok(None) };
        let line = head.split(|&byte| byte == b'\n').next().unwrap_or_default();
        Ok(line.strip_prefix(b"#!").map(|line| String::from_utf8_lossy(line).into_owned()))
    }
}

/// The path of a name in a directory.
pub(crate) fn join(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

/// The directory of a path.
pub(crate) fn parent(path: &str) -> &str {
    match path.rsplit_once('/') {
        None | Some(("", _)) => "/",
        Some((directory, _)) => directory,
    }
}

/// The last name of a path.
pub(crate) fn base_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}
