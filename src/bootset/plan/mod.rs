//! Which parts of a disk, and which files of its file systems, a boot needs, and in which order.
//!
//! **Touches:** the disk, through [`Walk`]. **Never:** ends a search because of one partition.
//! **Invariants:** each file system is walked by a thread of its own, one after the other: a panic
//! there is a note where a program unwinds. A program that is built with `panic = "abort"` ends, so
//! that a caller with an untrusted image runs the search in a process that may end.

mod kernel;
mod libraries;
mod lists;
mod loader;
mod modules;
mod mount;
mod named;
mod units;

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use host::error::one_line;

use crate::budget::Budget;
use crate::disk::Disk;
use crate::ext4::Ext4;
use crate::failure::Failure;
use crate::partitions::{Partition, Purpose, Table, partitions};
use crate::ranges::RangeList;
use crate::recognise::{Content, recognise};
use crate::stage::Stage;
use crate::walk::Walk;
use crate::{BlockSource, BootSet, BootSetLimits};

/// Bytes of the beginning of an EFI system partition: two tables of FAT32 on 512 MiB (1 MiB), and
/// shim and GRUB of a distribution (5 MiB), with a margin. A kernel in it is cut.
pub(crate) const EFI_HEAD: u64 = 16 << 20;
/// Bytes before the first partition that are taken: GRUB's core is at most that long.
const GAP: u64 = 1 << 20;
/// Bytes of a BIOS boot partition, likewise.
const BIOS_BOOT_HEAD: u64 = 1 << 20;
/// Bytes that GRUB reads at once (GRUB_DISK_CACHE_SIZE), aligned on the disk.
const LOADER_UNIT: u64 = 32 << 10;
/// Bytes of the beginning and of the end of each disk and partition where blkid(8) looks for
/// signatures: up to the second label of ZFS, and from its third one on. Measured with a boot of
/// Debian 12.
const PROBED_HEAD: u64 = (512 << 10) + 4096;
const PROBED_TAIL: u64 = 512 << 10;
/// Bytes of a boot sector, with which a boot begins.
const BOOT_SECTOR: u64 = 512;
/// Notes of one search.
const MOST_NOTES: usize = 200;

/// What a file system is to the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    /// It is mounted at /boot.
    Boot,
    /// It is mounted at /.
    Root,
    /// Another one.
    Other,
}

/// What the walk of one file system tells that of the next one.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// Version of the kernel that is started, as in the name of its directory of modules.
    kernel: Option<String>,
}

/// What is known so far.
struct Search {
    source: Arc<dyn BlockSource>,
    budget: Arc<Budget>,
    found: Vec<(Stage, Range<u64>)>,
    notes: Vec<String>,
    is_complete: bool,
    /// The search is at a limit: nothing more is begun.
    is_over: bool,
    facts: Facts,
}

/// What the thread of one walk gives back.
struct Walked {
    found: Vec<(Stage, Range<u64>)>,
    notes: Vec<String>,
    is_complete: bool,
    facts: Facts,
    role: Option<Role>,
    ended: Result<(), Failure>,
}

/// Searches the disk. See [`crate::boot_set`].
pub(crate) fn search(
    source: Arc<dyn BlockSource>,
    paths: &[String],
    limits: &BootSetLimits,
) -> BootSet {
    let budget = Arc::new(Budget::new(limits.clone()));
    let mut search = Search {
        source,
        budget,
        found: Vec::new(),
        notes: Vec::new(),
        is_complete: true,
        is_over: false,
        facts: Facts::default(),
    };
    search.disk(paths);
    search.result(limits)
}

impl Search {
    fn disk(&mut self, paths: &[String]) {
        let mut disk = Disk::new(Arc::clone(&self.source), Arc::clone(&self.budget));
        let read = catch(move || {
            let mut notes = Vec::new();
            let table = partitions(&mut disk, &mut notes);
            (table, disk, notes)
        });
        let (table, mut disk) = match read {
            Ok((Ok(table), disk, notes)) => {
                self.notes.extend(notes);
                (table, disk)
            }
            Ok((Err(failure), ..)) => return self.failed("the partition table", &failure),
            Err(panic) => return self.panicked("the partition table", &panic),
        };
        let count = table.partitions.len();
        self.notes.push(format!("{} bytes, {}, partitions: {count}", disk.size(), table.kind));
        self.firmware(&table, disk.size());
        if paths.is_empty() {
            self.probes(&table, disk.size());
        }
        let mut systems = Vec::new();
        for partition in &table.partitions {
            if self.is_over {
                return;
            }
            if partition.purpose == Purpose::BiosBoot {
                self.head(partition, BIOS_BOOT_HEAD, "BIOS boot partition");
                continue;
            }
            match recognise(&mut disk, &partition.range) {
                Ok(Content::Ext) => systems.push(partition.clone()),
                Ok(Content::Fat) => self.head(partition, EFI_HEAD, "FAT"),
                Ok(Content::Unknown) if partition.purpose == Purpose::Efi => {
                    self.head(partition, EFI_HEAD, "EFI");
                }
                Ok(Content::Other(name)) => {
                    // Swap is not read by a boot.
                    self.is_complete &= name == "swap";
                    self.notes.push(format!("{}: {name}, which is not read", title(partition)));
                }
                Ok(Content::Unknown) => {
                    self.notes.push(format!("{}: nothing that is known", title(partition)));
                }
                Err(failure) => self.failed(&title(partition), &failure),
            }
        }
        self.file_systems(systems, paths);
    }

    /// Boot code, partition table, and the gap before the first partition.
    fn firmware(&mut self, table: &Table, size: u64) {
        let first = table.partitions.iter().map(|partition| partition.range.start).min();
        self.found.push((Stage::Firmware, 0..BOOT_SECTOR.min(size)));
        self.found.push((Stage::Firmware, 0..first.unwrap_or(size).min(GAP).min(size)));
        self.found.extend(table.metadata.iter().map(|range| (Stage::Firmware, range.clone())));
    }

    /// Where signatures are looked for, on the disk and on its partitions.
    fn probes(&mut self, table: &Table, size: u64) {
        let partitions = table.partitions.iter().map(|partition| &partition.range);
        for range in [&(0..size)].into_iter().chain(partitions) {
            let head = range.end.min(range.start.saturating_add(PROBED_HEAD));
            let tail = range.start.max(range.end.saturating_sub(PROBED_TAIL));
            self.found.push((Stage::Probe, range.start..head));
            self.found.push((Stage::Probe, tail..range.end));
        }
    }

    /// Takes the beginning of a partition.
    fn head(&mut self, partition: &Partition, most: u64, what: &str) {
        let Range { start, end } = partition.range;
        let taken = end.min(start.saturating_add(most));
        self.found.push((Stage::Firmware, start..taken));
        let note = if taken < end { "its first" } else { "all its" };
        self.notes.push(format!("{}: {what}, {note} {} bytes", title(partition), taken - start));
    }

    /// Walks the file systems: first those that are mounted at /boot, which know the kernel.
    fn file_systems(&mut self, systems: Vec<Partition>, paths: &[String]) {
        let mut waiting = Vec::new();
        for only_boot in [true, false] {
            let round = if only_boot { systems.clone() } else { std::mem::take(&mut waiting) };
            for partition in round {
                if self.is_over {
                    self.notes.push(format!("{}: left out", title(&partition)));
                    continue;
                }
                let disk = Disk::new(Arc::clone(&self.source), Arc::clone(&self.budget));
                let range = partition.range.clone();
                let facts = self.facts.clone();
                let paths = paths.to_vec();
                match catch(move || walk(disk, range, &paths, facts, only_boot)) {
                    Ok(None) => waiting.push(partition),
                    Ok(Some(walked)) => self.walked(&partition, walked),
                    Err(panic) => self.panicked(&title(&partition), &panic),
                }
            }
        }
    }

    fn walked(&mut self, partition: &Partition, walked: Walked) {
        let title = title(partition);
        self.is_complete &= walked.is_complete;
        self.facts = walked.facts;
        let bytes: u64 = walked.found.iter().map(|(_, range)| range.end - range.start).sum();
        self.found.extend(walked.found);
        let place = match walked.role {
            Some(Role::Boot) => " for /boot",
            Some(Role::Root) => " for /",
            Some(Role::Other) => ", neither / nor /boot: its metadata",
            None => "",
        };
        self.notes.push(format!("{title}: ext4{place}, {bytes} bytes"));
        self.notes.extend(walked.notes.into_iter().map(|note| format!("{title}: {note}")));
        if let Err(failure) = walked.ended {
            self.failed(&title, &failure);
        }
    }

    fn failed(&mut self, what: &str, failure: &Failure) {
        self.is_complete = false;
        self.is_over |= matches!(failure, Failure::Limit(_));
        self.notes.push(format!("{what}: {failure}"));
    }

    fn panicked(&mut self, what: &str, panic: &str) {
        self.is_complete = false;
        self.notes.push(format!("{what}: the search has a fault: {panic}"));
    }

    /// Puts the ranges in the order of their stages.
    fn result(mut self, limits: &BootSetLimits) -> BootSet {
        let mut list = RangeList::new(limits.most_ranges, limits.most_bytes_found);
        self.found.sort_by_key(|(stage, _)| *stage);
        for (_, range) in std::mem::take(&mut self.found) {
            if let Err(failure) = list.add(range) {
                self.failed("the list", &failure);
                break;
            }
        }
        self.notes.push(format!(
            "{} bytes found, {} bytes read to find them",
            list.bytes(),
            self.budget.bytes_read()
        ));
        let rest = self.notes.len().saturating_sub(MOST_NOTES);
        self.notes.truncate(MOST_NOTES);
        if rest > 0 {
            self.notes.push(format!("{rest} more notes"));
        }
        // What a name of the disk contains must not become a line or a control sequence.
        let notes = self.notes.iter().map(|note| one_line(note)).collect();
        BootSet { ranges: list.into_ranges(), notes, is_complete: self.is_complete }
    }
}

/// Walks one file system. `None`: it is not mounted at /boot, and only such ones are wanted.
fn walk(
    disk: Disk,
    range: Range<u64>,
    paths: &[String],
    mut facts: Facts,
    only_boot: bool,
) -> Option<Walked> {
    let empty = |ended| Walked {
        found: Vec::new(),
        notes: Vec::new(),
        is_complete: true,
        facts: Facts::default(),
        role: None,
        ended,
    };
    let mut walk = match Ext4::open(disk, range) {
        Ok(ext4) => Walk::new(ext4),
        Err(_) if only_boot => return None,
        Err(failure) => return Some(Walked { facts, ..empty(Err(failure)) }),
    };
    let role = match role(&mut walk) {
        Ok(Role::Boot) => Role::Boot,
        _ if only_boot => return None,
        Ok(role) => role,
        Err(failure) => return Some(Walked { facts, ..empty(Err(failure)) }),
    };
    let ended = if paths.is_empty() {
        match role {
            Role::Boot => boot(&mut walk, &mut facts),
            Role::Root => root(&mut walk, &mut facts),
            Role::Other => mount::take(&mut walk),
        }
    } else {
        named::take(&mut walk, paths, role == Role::Boot)
    };
    let mut notes = walk.notes.clone();
    if walk.unnoted() > 0 {
        notes.push(format!("{} more damaged files", walk.unnoted()));
    }
    let label = &walk.ext4.superblock.label;
    if !label.is_empty() {
        notes.insert(0, format!("its label is {label}"));
    }
    let is_complete = walk.is_complete;
    Some(Walked { found: walk.found, notes, is_complete, facts, role: Some(role), ended })
}

/// Finds out where the file system is mounted, from what is in its root directory.
fn role(walk: &mut Walk) -> Result<Role, Failure> {
    let names = walk.names("/")?;
    let has = |name: &str| names.iter().any(|other| other == name);
    let is_boot = ["grub", "grub2", "loader", "extlinux", "syslinux"].into_iter().any(has)
        || names.iter().any(|name| name.starts_with("vmlinuz"));
    if has("etc") || has("usr") {
        Ok(Role::Root)
    } else if is_boot {
        Ok(Role::Boot)
    } else {
        Ok(Role::Other)
    }
}

fn boot(walk: &mut Walk, facts: &mut Facts) -> Result<(), Failure> {
    walk.read_in_units(LOADER_UNIT);
    let configuration = loader::take(walk, "")?;
    kernel::take(walk, "", &configuration, facts)?;
    walk.read_in_units(1);
    mount::take(walk)
}

fn root(walk: &mut Walk, facts: &mut Facts) -> Result<(), Failure> {
    walk.read_in_units(LOADER_UNIT);
    let configuration = loader::take(walk, "/boot")?;
    kernel::take(walk, "/boot", &configuration, facts)?;
    walk.read_in_units(1);
    walk.ext4.inode_window = mount::INODE_WINDOW;
    mount::take(walk)?;
    let mut libraries = libraries::Libraries::new(walk)?;
    lists::init(walk, &mut libraries)?;
    lists::configuration(walk)?;
    modules::take(walk, facts.kernel.as_deref())?;
    units::take(walk, &mut libraries)?;
    lists::devices(walk, &mut libraries)?;
    lists::login(walk, &mut libraries)?;
    lists::state(walk)
}

fn title(partition: &Partition) -> String {
    match partition.number {
        0 => "the disk".to_owned(),
        number => format!("partition {number}"),
    }
}

/// Calls `work` in a thread, so that a panic in it is an error with its message.
fn catch<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let thread = thread::Builder::new().name("boot-set".to_owned()).spawn(work);
    let thread = thread.map_err(|error| format!("no thread could be started: {error}"))?;
    thread.join().map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
    })
}
