//! Images, damaged or not, and guest requests on them, through the whole [`Disk`].
//!
//! The engine refuses a damaged image with an error or works with it. It does so without a panic,
//! in a bounded number of operations on the file. The file grows no more than the writes need, and
//! data is never written to the place of a table (`watch.rs`). If a checker that shares no code
//! with the engine calls the image consistent, then every byte must equal a model in memory, and
//! the image must be consistent again after it is closed.

use std::sync::Arc;

use super::Input;
use super::pattern;
use super::template::{COMPRESSED, COPIED, Template, template};
use super::watch::Watch;
use engine::chain::Chain;
use engine::disk::{Disk, Seek};
use engine::stream::STREAM_CHUNK;
use host::storage::ReadAt;
use host::{Error, ErrorKind, Result};
use qcow2::image::Image;
use sim::SimStorage;
use sim::spec::{self, Layout, Verdict};

/// Largest disk that is compared byte for byte, and the part of a hostile disk that is streamed, in
/// bytes.
const LARGEST: u64 = 4 << 20;
/// Files that claim more bytes than this are opened but not written, because the file in memory has
/// no holes.
const LARGEST_FILE: u64 = 64 << 20;
/// Maximum length of one operation, in bytes.
const LONGEST: u64 = 128 << 10;
/// Maximum number of operations of one case.
const MOST_OPERATIONS: usize = 40;

/// Checks a valid image that was damaged in one to eight places.
///
/// # Panics
/// If a check fails.
pub fn damaged(data: &[u8]) {
    let mut input = Input(data);
    let mut case = template(&mut input);
    let places = Places::of(&case.image);
    for _ in 0..=input.below(8) {
        damage(&mut case.image, &places, &mut input);
    }
    judge(case, &mut input, false);
}

/// Checks a valid image.
///
/// # Panics
/// If a check fails.
pub fn valid(data: &[u8]) {
    let mut input = Input(data);
    let case = template(&mut input);
    judge(case, &mut input, true);
}

/// Host offsets of the parts of an image before it was damaged.
struct Places {
    cluster: u64,
    l1: u64,
    table: u64,
    blocks: Vec<u64>,
    l2: Vec<u64>,
    /// Offsets of all L2 entries that are not zero.
    entries: Vec<u64>,
}

impl Places {
    fn of(image: &[u8]) -> Places {
        let layout = Layout::of(image).expect("the image is valid");
        let l2: Vec<u64> = layout.l2_tables(image).map(|(_, at)| at).collect();
        Places {
            cluster: layout.cluster_size(),
            l1: layout.l1.0,
            table: layout.refcount_table.0,
            blocks: layout.blocks(image).map(|(_, at)| at).collect(),
            entries: l2
                .iter()
                .flat_map(|&at| layout.l2_entries(image, at))
                .map(|(_, entry)| entry.raw)
                .collect(),
            l2,
        }
    }
}

/// Header fields: offset and length in bytes.
pub(super) const FIELDS: [(u64, usize); 19] = [
    (4, 4),   // version
    (8, 8),   // backing file offset
    (16, 4),  // backing file size
    (20, 4),  // cluster bits
    (24, 8),  // size
    (32, 4),  // encryption
    (36, 4),  // L1 size
    (40, 8),  // L1 table
    (48, 8),  // refcount table
    (56, 4),  // refcount table clusters
    (60, 4),  // snapshots
    (64, 8),  // snapshot table
    (72, 8),  // incompatible features
    (80, 8),  // compatible features
    (88, 8),  // autoclear features
    (96, 4),  // refcount width
    (100, 4), // header length
    (104, 1), // compression
    (112, 8), // first extension
];

fn damage(image: &mut Vec<u8>, places: &Places, input: &mut Input<'_>) {
    let entry = |table: u64, input: &mut Input<'_>| {
        (table + input.below(places.cluster / 8).min(input.below(8)) * 8, 8)
    };
    let (at, len) = match input.byte() % 16 {
        0 | 1 => input.pick(&FIELDS),
        2 | 3 => entry(places.l1, input),
        4 | 5 => entry(places.table, input),
        6 | 7 if !places.blocks.is_empty() => {
            (input.pick(&places.blocks) + input.below(places.cluster.min(256)), 1)
        }
        8..=12 if !places.l2.is_empty() => {
            (input.pick(&places.l2) + input.below(places.cluster / 8) * 8, 8)
        }
        13 => (input.below(image.len() as u64), 1),
        14 => {
            image.truncate(input.below(image.len() as u64 + 1) as usize);
            return;
        }
        _ => {
            let more = input.below(3 * places.cluster) as usize;
            image.resize(image.len() + more, 0);
            return;
        }
    };
    let Some(field) = image.get_mut(at as usize..at as usize + len) else { return };
    let before = field.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
    let value = interesting(before, places, input).to_be_bytes();
    field.copy_from_slice(&value[8 - len..]);
}

/// Returns a number that may break arithmetic, or one that points into the image.
fn interesting(before: u64, places: &Places, input: &mut Input<'_>) -> u64 {
    let end = (places.blocks.last().copied().unwrap_or(places.l1)) + places.cluster;
    match input.byte() % 20 {
        0 => 0,
        1 => 1,
        2 => before ^ COPIED,
        3 => before ^ 1,
        4 => before ^ 1 << (input.byte() % 64),
        5 => before.wrapping_add(1),
        6 => before.wrapping_sub(1),
        7 => end - 1 + input.below(3),
        8 => (end - places.cluster * input.below(2)) | COPIED,
        9 => COMPRESSED | (end - input.below(1024)),
        10 => COMPRESSED | input.number(8),
        11 => u64::MAX >> (input.byte() % 64),
        12 => 1 << (input.byte() % 64),
        13 => [places.l1, places.table][input.below(2) as usize] | input.pick(&[0, COPIED]),
        14 => {
            places.l2.get(input.below(4) as usize).copied().unwrap_or(places.cluster)
                | input.pick(&[0, COPIED])
        }
        15 => {
            places.blocks.get(input.below(4) as usize).copied().unwrap_or(places.cluster)
                | input.pick(&[0, COPIED])
        }
        16 | 17 if !places.entries.is_empty() => input.pick(&places.entries),
        18 => (input.below(end / places.cluster + 2) * places.cluster) | input.pick(&[0, COPIED]),
        _ => input.number(8),
    }
}

/// An image under test.
struct Case {
    file: Arc<SimStorage>,
    backing: Option<Vec<u8>>,
    bits: u32,
    /// The content that a guest reads; `None` if it cannot be predicted.
    model: Option<Vec<u8>>,
    /// Number of leaked clusters at the start.
    leaks: u64,
    /// Maximum number of clusters of the file.
    most_clusters: u64,
    copies_up: bool,
}

fn judge(template: Template, input: &mut Input<'_>, valid: bool) {
    let Template { image, backing } = template;
    let Some(layout) = Layout::rough(&image) else {
        assert!(!valid);
        assert!(Image::open(SimStorage::new(image)).is_err(), "an image without a header");
        return;
    };
    let file = SimStorage::new(image.clone());
    let opened = match Image::open(file.clone()) {
        Ok(opened) => opened,
        Err(error) => return refused(&error, valid),
    };
    let bits = layout.cluster_bits;
    let verdict = spec::check(&image);
    assert!(!valid || verdict.all().is_empty(), "the template is not valid: {:?}", verdict.all());
    compare(&**opened.reader().storage(), bits, &verdict);
    let backing = opened.reader().backing().map(|_| backing.unwrap_or_default());
    drop(opened);
    let clusters = verdict.counted_end.max((image.len() as u64).div_ceil(layout.cluster_size()));
    if clusters.saturating_mul(layout.cluster_size()) > LARGEST_FILE {
        return;
    }
    let consistent = is_consistent(&verdict) && layout.size <= LARGEST;
    let mut case = Case {
        model: consistent.then(|| content(&layout, &image, backing.as_deref())).flatten(),
        file,
        backing,
        bits,
        leaks: verdict.all_leaks(),
        most_clusters: clusters + 64,
        copies_up: input.one_in(2),
    };
    assert!(!valid || case.model.is_some());
    while let Ok(disk) = case.open().inspect_err(|error| refused(error, case.model.is_some())) {
        let again = case.work(&disk, input);
        let closed = disk.close();
        drop(disk);
        case.check_closed(closed);
        if !again {
            break;
        }
    }
}

/// Whether writes cannot destroy data. Entries without COPIED are allowed.
fn is_consistent(verdict: &Verdict) -> bool {
    verdict.errors.is_empty() && verdict.tolerated.is_empty()
}

/// Returns the content that a guest reads, without half a sector at the end. `None` if a compressed
/// cluster is broken.
fn content(layout: &Layout, bytes: &[u8], backing: Option<&[u8]>) -> Option<Vec<u8>> {
    let mut content = layout.content(bytes, backing.unwrap_or_default()).ok()?;
    content.truncate(content.len() / 512 * 512);
    Some(content)
}

fn refused(error: &Error, must_open: bool) {
    assert!(!must_open, "a consistent image was refused: {error}");
    let text = error.to_string();
    assert!(!text.contains('\n') && text.len() < 1000, "one line: {text:?}");
}

/// Compares the full check with an independent count (V28).
fn compare(file: &dyn ReadAt, bits: u32, verdict: &Verdict) {
    let not_copied = verdict.not_copied.len() as u64;
    match qcow2::image::check(file) {
        Ok(report) if verdict.errors.is_empty() => {
            // Like `qemu-img check`, the full check does not report clusters that are counted
            // beyond the end of the file.
            let inside = verdict.counted_end << bits <= file.size();
            let agrees = if inside {
                report.leaks == verdict.leaks
            } else {
                report.leaks <= verdict.all_leaks()
            };
            assert!(
                report.corruptions == not_copied && agrees,
                "full check: {report:?}, {verdict:?}"
            );
        }
        Ok(report) => {
            assert!(report.corruptions > 0, "not found by the full check: {:?}", verdict.errors)
        }
        Err(error) => assert!(!verdict.errors.is_empty(), "full check: {error}"),
    }
}

impl Case {
    fn open(&self) -> Result<Disk> {
        let watch = Watch::new(self.file.bytes()).expect("the engine keeps the header readable");
        self.file.observe(Box::new(watch));
        let image = Image::open(self.file.clone())?;
        image.begin_writing()?;
        let chain = image
            .reader()
            .backing()
            .map(|_| Chain::of_raw(SimStorage::new(self.backing.clone().unwrap_or_default())));
        Ok(Disk::for_tests(image, chain).copying_up(self.copies_up))
    }

    /// Performs the operations that the input encodes. Returns whether the disk is to be opened
    /// again.
    fn work(&mut self, disk: &Disk, input: &mut Input<'_>) -> bool {
        for _ in 0..MOST_OPERATIONS {
            if input.is_over() {
                return false;
            }
            let code = input.byte() % 20;
            if code == 19 {
                return true;
            }
            let before = self.file.operations();
            let touched = self.operation(disk, code, input);
            let done = self.file.operations() - before;
            let clusters = self.file.size() >> self.bits;
            let most = 200 + 20 * touched + 6 * clusters;
            assert!(
                done <= most,
                "operation {code} on {touched} clusters took {done} operations on a file of {clusters}"
            );
            self.most_clusters += 2 * touched + 8;
            assert!(
                clusters <= self.most_clusters,
                "operation {code} made the file {clusters} clusters long"
            );
        }
        false
    }

    /// Performs one operation. Returns the maximum number of guest clusters that it touches.
    fn operation(&mut self, disk: &Disk, code: u8, input: &mut Input<'_>) -> u64 {
        let size = disk.size();
        let (offset, len) = self.range(size, input);
        let range = offset..offset + len;
        let mut touched = (len >> self.bits) + 2;
        let result = match code {
            0..=3 => {
                let mut buf = vec![0xa5; len as usize];
                let result = disk.read(offset, &mut buf);
                if let (Ok(()), Some(model)) = (&result, &self.model) {
                    let model = &model[offset as usize..range.end as usize];
                    let differs = buf.iter().zip(model).position(|(read, written)| read != written);
                    assert!(
                        differs.is_none(),
                        "read of {len} at {offset}: byte {differs:?} differs"
                    );
                }
                result
            }
            4..=8 => {
                let data = pattern(input.byte(), len as usize);
                let result = disk.write(offset, &data);
                self.change(offset, &data);
                result
            }
            9 => {
                self.change(offset, &vec![0; len as usize]);
                disk.write_zeroes(range)
            }
            10 | 11 => {
                self.change(offset, &vec![0; len as usize]);
                disk.discard(range)
            }
            12 | 13 => disk.flush(),
            14 => disk.populate(range, usize::MAX).map(|_| ()),
            15 => {
                touched = (size.min(LARGEST) >> self.bits) + 2;
                self.stream(disk)
            }
            16 | 17 => self.seek(disk, offset),
            _ => self.grow(disk, input, &mut touched),
        };
        if let Err(error) = result {
            refused(&error, self.model.is_some());
        }
        touched
    }

    /// Returns an offset and a length, often at a border of clusters or at the end of the disk.
    fn range(&self, size: u64, input: &mut Input<'_>) -> (u64, u64) {
        let near = size.min(LARGEST);
        let offset = match input.byte() % 6 {
            0 => 0,
            1 | 2 => input.below(near + 1) >> self.bits << self.bits,
            3 => size - input.below(near + 1),
            4 => ((input.below(8) + 1) << (2 * self.bits - 3)).saturating_sub(input.below(3) * 512),
            _ => input.below(near + 1),
        };
        let offset = offset.min(size);
        let cluster = 1 << self.bits;
        let len = match input.byte() % 4 {
            0 => input.below(cluster),
            1 => cluster * input.below(4),
            2 => input.below(8 * cluster),
            _ => input.below(LONGEST),
        };
        (offset, len.clamp(1, LONGEST).min(size - offset))
    }

    fn change(&mut self, offset: u64, data: &[u8]) {
        if let Some(model) = &mut self.model {
            model[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        }
    }

    /// Streams like the stream job, but not beyond [`LARGEST`].
    fn stream(&self, disk: &Disk) -> Result<()> {
        let len = disk.stream_len(usize::MAX);
        let mut at = 0;
        while at < len.min(LARGEST) {
            let end = len.min(at + STREAM_CHUNK);
            disk.populate(at..end, usize::MAX)?;
            at = end;
        }
        disk.detach_backing(usize::MAX, None)
    }

    fn seek(&self, disk: &Disk, from: u64) -> Result<()> {
        let (data, hole) = (disk.seek(from, Seek::Data)?, disk.seek(from, Seek::Hole)?);
        if let Some(model) = &self.model {
            let zero = |from: u64, to: u64| {
                model[from as usize..to as usize].iter().all(|byte| *byte == 0)
            };
            assert!(
                data.is_none_or(|data| data >= from)
                    && zero(from, data.unwrap_or(model.len() as u64)),
                "data at {data:?} from {from}"
            );
            let hole = hole.expect("there is a hole at the end");
            assert!(
                hole >= from && (hole == model.len() as u64 || model[hole as usize] == 0),
                "a hole at {hole} from {from}"
            );
        }
        Ok(())
    }

    fn grow(&mut self, disk: &Disk, input: &mut Input<'_>, touched: &mut u64) -> Result<()> {
        let before = disk.size();
        let size = before.saturating_add(input.below(256) * 512);
        if self.model.is_some() && size > LARGEST {
            return Ok(());
        }
        // The clusters behind the old end are covered with zeros, and a larger L1 table replaces
        // the old one, whose clusters are not free yet.
        *touched += ((size - before) >> self.bits)
            + 2 * (size >> (2 * self.bits - 3) >> (self.bits - 3))
            + 4;
        match disk.grow(size) {
            Ok(()) => {
                if let Some(model) = &mut self.model {
                    model.resize(size as usize, 0);
                }
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::InvalidArgument => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Checks the image after a close.
    fn check_closed(&self, closed: Result<()>) {
        if let Err(error) = closed {
            return refused(&error, self.model.is_some());
        }
        let Some(model) = &self.model else { return };
        let bytes = self.file.bytes();
        let layout = Layout::of(&bytes).expect("the engine keeps the header readable");
        let verdict = spec::check(&bytes);
        assert!(is_consistent(&verdict), "after it was closed: {:?}", verdict.all());
        assert!(
            verdict.all_leaks() <= self.leaks,
            "{} leaks, {} before",
            verdict.all_leaks(),
            self.leaks
        );
        assert_eq!(layout.size / 512 * 512, model.len() as u64);
        let content = content(&layout, &bytes, self.backing.as_deref());
        assert!(
            content.is_some_and(|content| content == *model),
            "what is in the file is not what was written"
        );
    }
}
