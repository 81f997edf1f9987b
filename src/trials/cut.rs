//! Loss of power: every state in which a workload could leave the file, and the checks on each
//! state.
//!
//! At any moment, the writes that no barrier has covered are on disk or not, sector by sector, in
//! any combination. The same holds for the new length of the file and for holes. A sector holds one
//! of the contents that it had in the page cache, never parts of two.

use std::collections::{HashMap, HashSet};
use std::process::Command;

use super::forgetful::restarts;
use super::workload::{Fact, Files, Op, Story, play, written};
use host::storage::WriteKind;
use sim::random::{Random, mix};
use sim::spec::{self, Layout};
use sim::{Recorded, SimStorage};

/// How many states are checked, and how thoroughly.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum number of states for one length of the record.
    pub per_prefix: usize,
    /// Every `reopen`-th state is opened by the engine, used, and cut again; 0 for none.
    pub reopen: u64,
    /// Every `qemu`-th state is checked by `qemu-img check`; 0 for none.
    pub qemu: u64,
    /// The first length of the record whose states are checked.
    pub from: usize,
}

/// Counts of what was checked.
#[derive(Debug, Default)]
pub struct Tally {
    pub workloads: u64,
    /// Number of states checked.
    pub states: u64,
    /// Hashes of the different files among them.
    pub distinct: HashSet<u64>,
    pub reopened: u64,
    pub qemu: u64,
    /// States that were already checked with the same expectations.
    known: HashSet<(u64, u64)>,
}

/// A change that a loss of power may keep or lose.
struct Piece {
    /// Index of the record that the change comes from.
    record: usize,
    /// The kind of the write; `None` for a hole and for a new length.
    kind: Option<WriteKind>,
    /// Whether a barrier that covered the piece failed. No later barrier makes it durable.
    lost: bool,
    change: Change,
}

enum Change {
    Length(u64),
    /// Number of the sector, its content, and a hash of both.
    Sector(usize, Box<[u8; 512]>, u64),
}

impl Change {
    /// Whether both change the same sector, or both the length.
    fn is_at(&self, other: &Change) -> bool {
        match (self, other) {
            (Change::Length(_), Change::Length(_)) => true,
            (Change::Sector(this, ..), Change::Sector(other, ..)) => this == other,
            _ => false,
        }
    }
}

/// Hashes a sector and its number; 0 for a sector of zeros.
fn hash(sector: usize, content: &[u8]) -> u64 {
    if content == [0; 512] {
        return 0;
    }
    let (words, _) = content.as_chunks::<8>();
    mix(words.iter().fold(sector as u64 + 1, |hash, word| {
        (hash.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }))
}

/// A walk through the record of a workload, one change after the other.
struct Cutter<'a> {
    story: &'a Story,
    label: &'a str,
    limits: Limits,
    /// The durable sectors, padded with zeros to the largest length that the file reaches.
    durable: Vec<u8>,
    durable_len: u64,
    durable_hash: u64,
    /// The content that readers see.
    cache: Vec<u8>,
    cache_len: u64,
    pending: Vec<Piece>,
    /// A copy of `durable`; `state` applies its pieces to it and reverts them.
    scratch: Vec<u8>,
    checked: HashSet<(u64, usize)>,
}

/// Checks the states at every length of the record of a workload. With `only`, checks one state: a
/// length of the record, and the pieces that are on disk.
///
/// # Panics
/// At the first state that is wrong, with the line that replays it.
pub fn cut(
    story: &Story,
    label: &str,
    limits: Limits,
    tally: &mut Tally,
    only: Option<(usize, &[usize])>,
) {
    let end = |record: &Recorded| match record {
        Recorded::Write { at, data, .. } => at + data.len() as u64,
        _ => 0,
    };
    let len = story.files.overlay.len() as u64;
    let longest = story.records.iter().map(end).max().unwrap_or(0).max(len).next_multiple_of(512);
    let mut durable = story.files.overlay.clone();
    durable.resize(longest as usize, 0);
    let durable_hash = durable
        .chunks(512)
        .enumerate()
        .fold(0, |sum, (sector, content)| sum ^ hash(sector, content));
    let (cache, scratch) = (durable.clone(), durable.clone());
    let (pending, checked) = (Vec::new(), HashSet::new());
    let mut cutter = Cutter {
        story,
        label,
        limits,
        durable,
        durable_len: len,
        durable_hash,
        cache,
        cache_len: len,
        pending,
        scratch,
        checked,
    };
    tally.workloads += 1;
    for prefix in 0..=story.records.len() {
        if let Some((wanted, pieces)) = only {
            if prefix == wanted {
                let chosen = (0..cutter.pending.len())
                    .map(|piece| pieces.contains(&piece))
                    .collect::<Vec<_>>();
                cutter.state(prefix, &chosen, tally, true);
            }
        } else if prefix >= limits.from {
            for chosen in cutter.choices(prefix) {
                cutter.state(prefix, &chosen, tally, false);
            }
        }
        if let Some(record) = story.records.get(prefix) {
            cutter.advance(prefix, record);
        }
    }
}

impl Cutter<'_> {
    fn advance(&mut self, index: usize, record: &Recorded) {
        match record {
            Recorded::Write { kind, at, data } => {
                let end = at + data.len() as u64;
                if end > self.cache_len {
                    self.cache_len = end;
                    self.pending.push(Piece {
                        record: index,
                        kind: None,
                        lost: false,
                        change: Change::Length(end),
                    });
                }
                self.cache[*at as usize..end as usize].copy_from_slice(data);
                self.changed(index, Some(*kind), *at, end);
            }
            Recorded::Punch { at, len } => {
                // A cluster that was counted and never written lies behind the end of the file.
                let end = (at + len).min(self.cache_len);
                let start = (*at).min(end);
                self.cache[start as usize..end as usize].fill(0);
                self.punched(index, start, end);
            }
            Recorded::Sync { covers } => {
                let pending = std::mem::take(&mut self.pending);
                let (done, rest): (Vec<_>, Vec<_>) =
                    pending.into_iter().partition(|piece| piece.record < *covers && !piece.lost);
                self.pending = rest;
                let any_lost = self.pending.iter().any(|piece| piece.lost);
                for piece in done {
                    if any_lost {
                        // A durable write replaces the earlier lost writes to the same place.
                        self.pending.retain(|older| {
                            !(older.lost
                                && older.record < piece.record
                                && older.change.is_at(&piece.change))
                        });
                    }
                    match piece.change {
                        Change::Length(len) => self.durable_len = len,
                        Change::Sector(sector, content, new) => {
                            let place = sector * 512..sector * 512 + 512;
                            self.durable_hash ^= hash(sector, &self.durable[place.clone()]) ^ new;
                            self.durable[place.clone()].copy_from_slice(&*content);
                            self.scratch[place].copy_from_slice(&*content);
                        }
                    }
                }
            }
            Recorded::SyncFailed { covers } => {
                self.pending
                    .iter_mut()
                    .filter(|piece| piece.record < *covers)
                    .for_each(|piece| piece.lost = true);
            }
        }
    }

    fn changed(&mut self, record: usize, kind: Option<WriteKind>, at: u64, end: u64) {
        for sector in (at / 512) as usize..end.div_ceil(512) as usize {
            let mut content = Box::new([0; 512]);
            content.copy_from_slice(&self.cache[sector * 512..][..512]);
            let hash = hash(sector, &*content);
            self.pending.push(Piece {
                record,
                kind,
                lost: false,
                change: Change::Sector(sector, content, hash),
            });
        }
    }

    /// Adds the sectors that a punched hole changes. A sector that holds zeros on disk,
    /// and that no pending piece changes, is the same in every state. A search for leaks
    /// punches up to 64 MiB of such sectors, since the allocator counts clusters ahead
    /// and a later one is written behind them; `choices` would need the square of their
    /// number in bytes.
    fn punched(&mut self, record: usize, start: u64, end: u64) {
        let written: HashSet<usize> = self
            .pending
            .iter()
            .filter_map(|piece| match piece.change {
                Change::Sector(sector, ..) => Some(sector),
                Change::Length(_) => None,
            })
            .collect();
        for sector in (start / 512) as usize..end.div_ceil(512) as usize {
            let at = sector as u64 * 512;
            let durable = &self.durable[sector * 512..][..512];
            if written.contains(&sector) || durable != [0; 512] {
                self.changed(record, None, at, at + 512);
            }
        }
    }

    /// Returns the sets of pieces to assume on disk. For few pieces these are all subsets. For many
    /// they are the sets in which one piece, record or kind is alone or alone missing, and random
    /// sets.
    fn choices(&self, prefix: usize) -> Vec<Vec<bool>> {
        let n = self.pending.len();
        if n < 16 && 1 << n <= self.limits.per_prefix.max(16) {
            return (0..1u32 << n)
                .map(|bits| (0..n).map(|piece| bits >> piece & 1 == 1).collect())
                .collect();
        }
        let chosen = |f: &dyn Fn(usize) -> bool| (0..n).map(f).collect::<Vec<bool>>();
        let mut choices = vec![chosen(&|_| false), chosen(&|_| true)];
        let mut kinds: Vec<_> = self.pending.iter().map(|piece| piece.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        for kind in kinds {
            choices.push(chosen(&|piece| self.pending[piece].kind != kind));
            choices.push(chosen(&|piece| self.pending[piece].kind == kind));
        }
        let mut records: Vec<_> = self.pending.iter().map(|piece| piece.record).collect();
        records.dedup();
        let mut more = Vec::new();
        for record in records {
            more.push(chosen(&|piece| self.pending[piece].record != record));
            more.push(chosen(&|piece| self.pending[piece].record == record));
        }
        for one in 0..n {
            more.push(chosen(&|piece| piece != one));
            more.push(chosen(&|piece| piece == one));
            more.push(chosen(&|piece| piece < one));
            more.push(chosen(&|piece| piece >= one));
        }
        let mut random = Random(hash(prefix, &label_block(self.label)));
        let room = self.limits.per_prefix.saturating_sub(choices.len());
        let systematic = if more.len() <= room { more.len() } else { room - room / 4 };
        while more.len() > systematic {
            more.swap_remove(random.below(more.len() as u64) as usize);
        }
        for _ in 0..room - systematic {
            let (density, mut bits) = (1 + random.below(7), 0);
            more.push(
                (0..n)
                    .map(|piece| {
                        bits = if piece % 16 == 0 { random.next() } else { bits >> 4 };
                        bits % 8 < density
                    })
                    .collect(),
            );
        }
        choices.extend(more);
        choices
    }

    /// Builds one state in `scratch` and checks it.
    fn state(&mut self, prefix: usize, chosen: &[bool], tally: &mut Tally, replay: bool) {
        let on_disk = || {
            self.pending
                .iter()
                .zip(chosen)
                .filter(|(_, chosen)| **chosen)
                .map(|(piece, _)| &piece.change)
        };
        let len = on_disk().fold(self.durable_len, |len, change| {
            if let Change::Length(new) = change { len.max(*new) } else { len }
        });
        let mut last: HashMap<usize, (&[u8; 512], u64)> = HashMap::new();
        for change in on_disk() {
            if let Change::Sector(sector, content, hash) = change
                && (*sector as u64) * 512 < len
            {
                last.insert(*sector, (content, *hash));
            }
        }
        let mut id = self.durable_hash;
        for (&sector, (_, new)) in &last {
            id ^= hash(sector, &self.durable[sector * 512..][..512]) ^ new;
        }
        let id = mix(id ^ mix(len));
        let expectations = self.story.floors.iter().filter(|(from, _)| *from <= prefix).count()
            + self.story.facts.iter().filter(|(from, _)| *from <= prefix).count();
        let begun = self.story.begun.iter().filter(|from| **from <= prefix).count();
        // Two workloads that begin with the same operations share states. A state that was checked
        // with the same expectations after the same operations is skipped.
        let (stem, ops) = self.label.rsplit_once('/').unwrap_or(("", self.label));
        let words = ops.split(',').take(begun).flat_map(str::bytes);
        let known = stem
            .bytes()
            .chain(words)
            .fold(expectations as u64, |sum, byte| mix(sum ^ u64::from(byte)));
        if !replay && (!self.checked.insert((id, expectations)) || !tally.known.insert((id, known)))
        {
            return;
        }
        tally.states += 1;
        tally.distinct.insert(id);
        let sectors: Vec<usize> = last.keys().copied().collect();
        for (sector, (content, _)) in last {
            self.scratch[sector * 512..][..512].copy_from_slice(content);
        }
        let bytes = &self.scratch[..len as usize];
        let mut result = self.look(bytes, prefix);
        if result.is_ok()
            && (replay || self.limits.qemu > 0 && tally.states.is_multiple_of(self.limits.qemu))
        {
            tally.qemu += 1;
            result = qemu_check(bytes, &self.story.files.base);
        }
        if let Err(what) = result {
            let pieces: Vec<_> = (0..chosen.len())
                .filter(|piece| chosen[*piece])
                .map(|piece| piece.to_string())
                .collect();
            panic!("{what}\nCORDISK_CRASH='{}/{prefix}/{}'", self.label, pieces.join(","));
        }
        if replay || self.limits.reopen > 0 && tally.states.is_multiple_of(self.limits.reopen) {
            tally.reopened += 1;
            let pieces: Vec<_> = (0..chosen.len())
                .filter(|piece| chosen[*piece])
                .map(|piece| piece.to_string())
                .collect();
            let place = format!("{}/{prefix}/{}", self.label, pieces.join(","));
            println!("after the cut CORDISK_CRASH='{place}'");
            let files = Files { overlay: bytes.to_vec(), ..self.story.files.clone() };
            // The same file after a failed write-back instead of a loss of power: the host still
            // shows everything that was written.
            let cached = &self.cache[..self.cache_len as usize];
            let guest = files.guest();
            restarts(cached, bytes, &files.base, &guest, id);
            use_again(&files, &place, id, tally);
        }
        for sector in sectors {
            let place = sector * 512..sector * 512 + 512;
            self.scratch[place.clone()].copy_from_slice(&self.durable[place]);
        }
    }

    /// Checks a state against P4 and R12.
    fn look(&self, bytes: &[u8], prefix: usize) -> Result<(), String> {
        let wrong = spec::check(bytes).all();
        if !wrong.is_empty() {
            return Err(wrong.join("; "));
        }
        let layout = Layout::of(bytes)?;
        if layout.features[0] & !16 != 0 {
            return Err(format!("incompatible features {:#x}", layout.features[0]));
        }
        for (_, fact) in self.story.facts.iter().filter(|(from, _)| *from <= prefix) {
            match *fact {
                Fact::SizeAtLeast(size) if layout.size < size => {
                    return Err(format!("the size is {}, it was {size}", layout.size));
                }
                Fact::Detached if layout.backing.0 != 0 => {
                    return Err("the backing link is back".into());
                }
                _ => {}
            }
        }
        let floors = self
            .story
            .floors
            .iter()
            .rev()
            .find(|(from, _)| *from <= prefix)
            .map(|(_, floors)| floors);
        for sector in 0..(layout.size / 512) as usize {
            let found = self.story.files.sector(&layout, bytes, sector as u64);
            let floor = floors.and_then(|floors| floors.get(sector)).copied().unwrap_or(0);
            let mut allowed =
                self.story.values[sector][floor..].iter().take_while(|(from, _)| *from <= prefix);
            if !allowed.any(|(_, value)| *value == found) {
                let which =
                    self.story.values[sector].iter().rposition(|(_, value)| *value == found);
                return Err(format!(
                    "sector {sector} reads {:02x?}…, value {which:?} of {}, values from {floor} on are allowed; {:?}",
                    &found[..8],
                    self.story.values[sector].len(),
                    layout.find(bytes, sector as u64 * 512)
                ));
            }
        }
        Ok(())
    }
}

/// Folds a label into a block that `hash` can take.
fn label_block(label: &str) -> [u8; 512] {
    let mut block = [0u8; 512];
    for (index, byte) in label.bytes().enumerate() {
        block[index % 512] = block[index % 512].wrapping_mul(31) ^ byte;
    }
    block
}

/// Opens the file that a loss of power left, reads and writes it, and cuts the power again.
fn use_again(files: &Files, place: &str, id: u64, tally: &mut Tally) {
    let layout = Layout::of(&files.overlay).expect("was checked");
    let whole = files.guest();
    let image = files
        .open(SimStorage::new(files.overlay.clone()))
        .unwrap_or_else(|error| panic!("{error}\nCORDISK_CRASH='{place}'"));
    let mut found = vec![0; whole.len()];
    image.read(0, &mut found).unwrap_or_else(|error| panic!("{error}\nCORDISK_CRASH='{place}'"));
    assert!(found == whole, "the engine reads something else\nCORDISK_CRASH='{place}'");
    let mut random = Random(id);
    let mut ops = Vec::new();
    for _ in 0..2 {
        let at = random.below(layout.size - 1);
        let len = 1 + random.below((layout.size - at).min(3 << layout.cluster_bits));
        ops.extend([
            Op::Write(at, len),
            if random.below(2) == 0 { Op::Flush } else { Op::Discard(at, len) },
        ]);
    }
    ops.extend([Op::Stream, Op::Close]);
    let story = play(files, &ops, None);
    let label = format!("{place}/{}", written(&ops));
    ended(&story, &label);
    cut(&story, &label, Limits { per_prefix: 6, reopen: 0, qemu: 0, from: 0 }, tally, None);
}

/// Checks the file after the last operation and the close: it has no errors, no more leaks than at
/// the start, and the content that the guest wrote.
pub fn ended(story: &Story, label: &str) {
    let after = spec::check(&story.end);
    assert!(after.all().is_empty(), "{}\nCORDISK_CRASH='{label}'", after.all().join("; "));
    let layout = Layout::of(&story.end).expect("was checked");
    for (sector, expected) in story.now.as_chunks::<512>().0.iter().enumerate() {
        let found = story.files.sector(&layout, &story.end, sector as u64);
        assert!(found == *expected, "sector {sector} at the end\nCORDISK_CRASH='{label}'");
    }
    let (before, after) = (spec::check(&story.files.overlay).all_leaks(), after.all_leaks());
    // After a failed header write it is unknown which of two L1 tables the header names, so both
    // stay allocated.
    assert!(
        after <= before || label.contains(":g"),
        "{after} leaks, {before} before\nCORDISK_CRASH='{label}'"
    );
}

fn qemu_check(bytes: &[u8], base: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("overlay.qcow2");
    std::fs::write(&path, bytes).expect("written");
    std::fs::write(dir.path().join("base.raw"), base).expect("written");
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(&path)
        .output()
        .expect("QEMU's tools are installed");
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(format!(
            "qemu-img: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}
