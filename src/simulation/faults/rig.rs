//! A disk in memory above files that can fail, and the requests that scenarios are made of.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::model::Change;
use super::sketch::{Built, Shape, Sketch};
use crate::chain::Chain;
use crate::disk::Disk;
use crate::error::os_text;
use crate::image::Image;
use crate::job::{JobEvent, Jobs, Status};
use crate::simulation::SimStorage;
use crate::simulation::spec::{self, Layout, Seen};
use crate::stream::{StreamOptions, start};
use crate::{Error, ErrorKind, Result};

/// Longer than anything takes; only turns a hang into a failure.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// One request of a guest, or one thing done with the disk. Ranges are bytes.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Read(Range<u64>),
    /// The byte makes the data of different writes different.
    Write(Range<u64>, u8),
    Zero(Range<u64>),
    Discard(Range<u64>),
    Flush,
    Grow(u64),
    /// `depth` layers; with a pause before the first chunk.
    Stream {
        depth: Option<usize>,
        pause: bool,
    },
    Close,
    /// Whatever is open is left as a killed process leaves it.
    Open,
}

impl Step {
    /// What it does to the guest's bytes.
    pub fn change(&self) -> Option<Change> {
        match self {
            Step::Write(range, byte) => Some(Change::Write(range.start, pattern(range, *byte))),
            Step::Zero(range) | Step::Discard(range) => Some(Change::Zero(range.clone())),
            Step::Grow(size) => Some(Change::Size(*size)),
            Step::Read(_) | Step::Flush | Step::Stream { .. } | Step::Close | Step::Open => None,
        }
    }

    /// Whether everything before it is durable when it is done.
    pub fn flushes(&self) -> bool {
        matches!(self, Step::Flush | Step::Close | Step::Grow(_))
    }
}

fn pattern(range: &Range<u64>, byte: u8) -> Vec<u8> {
    range.clone().map(|at| (at * 3 + at / 512) as u8 ^ byte).collect()
}

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The error that the layer above makes a number of.
    Request(Error),
    /// What the users of a job are told.
    Job(String),
    /// The disk could not be opened before.
    NotOpen,
}

/// What is needed to make the files of one scenario again and again.
#[derive(Debug)]
pub(super) struct Files {
    pub shape: Shape,
    pub overlay: Built,
    pub middle: Option<Vec<u8>>,
    pub base: Vec<u8>,
    /// What `middle` shows above `base`.
    pub above_base: Vec<u8>,
    /// What the guest reads.
    pub content: Vec<u8>,
}

impl Files {
    pub fn new(overlay: &Sketch, middle: Option<&Sketch>, base: Vec<u8>) -> Files {
        let above_base = middle.map_or_else(|| base.clone(), |middle| middle.content(&base));
        let content = overlay.content(if overlay.backing.is_some() { &above_base } else { &[] });
        let middle = middle.map(|middle| middle.build().bytes);
        Files { shape: overlay.shape, overlay: overlay.build(), middle, base, above_base, content }
    }

    /// Checks and reads an overlay of this scenario, above the backing file that its header names now. The other name of a cluster that was
    /// shared does not learn that it is the last: those clusters may do without COPIED.
    ///
    /// # Errors
    /// What makes it unreadable, and features that say that it needs care.
    pub fn look(&self, overlay: &[u8]) -> Result<Seen, String> {
        let layout = Layout::of(overlay)?;
        if layout.features[0] != 0 {
            return Err(format!("incompatible features {:#x}", layout.features[0]));
        }
        let below = match layout.backing_name(overlay).as_deref() {
            None => &[],
            Some("base.raw") => &self.base[..],
            Some("middle.qcow2") => &self.above_base[..],
            Some(name) => return Err(format!("backing file {name}")),
        };
        let mut seen = spec::look(overlay, below)?;
        seen.verdict.not_copied.retain(|cluster| !self.overlay.shared.contains(cluster));
        Ok(seen)
    }
}

/// The files, and the disk above them while it is open.
#[derive(Debug)]
pub(super) struct Rig {
    pub overlay: Arc<SimStorage>,
    pub base: Arc<SimStorage>,
    pub middle: Option<Arc<SimStorage>>,
    pub disk: Option<Arc<Disk>>,
    copy_on_read: bool,
}

impl Rig {
    pub fn new(files: &Files, copy_on_read: bool) -> Rig {
        let overlay = SimStorage::new(files.overlay.bytes.clone());
        // One of three sectors reaches the disk where a barrier fails.
        overlay.forget_after_failed_barriers(|sector| sector % 3 == 0);
        let middle = files.middle.clone().map(SimStorage::new);
        Rig { overlay, base: SimStorage::new(files.base.clone()), middle, disk: None, copy_on_read }
    }

    /// In the order of [`Disk::open`]: nothing is changed unless everything opens.
    fn open(&mut self) -> Result<()> {
        self.disk = None;
        let image = Image::open(self.overlay.clone())?;
        let chain = match image.reader().backing() {
            None => None,
            Some(reference) => match &self.middle {
                Some(middle) if reference.name == "middle.qcow2" => Some(Chain::of_two(middle.clone(), self.base.clone())?),
                _ => Some(Chain::of_raw(self.base.clone())),
            },
        };
        image.begin_writing()?;
        self.disk = Some(Arc::new(Disk::for_tests(image, chain).copying_up(self.copy_on_read)));
        Ok(())
    }

    /// Does one step. Gives what was read.
    pub fn perform(&mut self, step: &Step) -> Result<Vec<u8>, Trouble> {
        if matches!(step, Step::Open) {
            return self.open().map(|()| Vec::new()).map_err(Trouble::Request);
        }
        let Some(disk) = self.disk.clone() else { return Err(Trouble::NotOpen) };
        let mut read = Vec::new();
        let done = match step {
            Step::Read(range) => {
                read.resize((range.end - range.start) as usize, 0xa5);
                disk.read(range.start, &mut read)
            }
            Step::Write(range, byte) => disk.write(range.start, &pattern(range, *byte)),
            Step::Zero(range) => disk.write_zeroes(range.clone()),
            Step::Discard(range) => disk.discard(range.clone()),
            Step::Flush => disk.flush(),
            Step::Grow(size) => disk.grow(*size),
            Step::Close => disk.close().inspect(|()| self.disk = None),
            Step::Stream { depth, pause } => return stream(&disk, *depth, *pause).map(|()| read),
            Step::Open => unreachable!("done above"),
        };
        done.map(|()| read).map_err(Trouble::Request)
    }
}

/// Streams, and waits for the end of it.
fn stream(disk: &Arc<Disk>, depth: Option<usize>, pause: bool) -> Result<(), Trouble> {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    let told = |what: &dyn Fn(&JobEvent) -> bool| {
        loop {
            let batch = events.recv_timeout(PATIENCE).expect("the job goes on");
            if let Some(event) = batch.events.iter().find(|event| what(event)) {
                return event.clone();
            }
        }
    };
    let options = StreamOptions { depth, auto_dismiss: false, ..StreamOptions::new("job") };
    let held = jobs.hold();
    start(disk, &jobs, options).map_err(Trouble::Request)?;
    if pause {
        jobs.pause("job").map_err(|error| Trouble::Request(Error::new(ErrorKind::Busy, error.to_string())))?;
    }
    drop(held);
    if pause {
        told(&|event| matches!(event, JobEvent::StatusChange { status: Status::Paused, .. }));
        // What was copied and written before may be flushed while the job stands still; that a host fails then is not the job's affair.
        jobs.resume("job").map_err(|error| Trouble::Request(Error::new(ErrorKind::Busy, error.to_string())))?;
    }
    let JobEvent::Completed { error, .. } = told(&|event| matches!(event, JobEvent::Completed { .. })) else { unreachable!() };
    jobs.settle("job", PATIENCE);
    error.map_or(Ok(()), |text| Err(Trouble::Job(text)))
}

impl Trouble {
    /// Whether this is what an operation that failed with `errno` must become; `mapped` is what a client of the mount sees of an error.
    pub fn comes_from(&self, errno: i32, mapped: fn(&Error) -> i32) -> bool {
        let alike = |errno| Error::io("", std::io::Error::from_raw_os_error(errno));
        match self {
            Trouble::Request(error) => error.errno() == Some(errno) && mapped(error) == mapped(&alike(errno)),
            Trouble::Job(text) => *text == os_text(&std::io::Error::from_raw_os_error(errno)),
            Trouble::NotOpen => true,
        }
    }

    /// Whether this is what every request becomes that would write after a failed barrier.
    pub fn is_sticky(&self, mapped: fn(&Error) -> i32) -> bool {
        match self {
            Trouble::Request(error) => error.to_string().contains("failed earlier") && mapped(error) == 5,
            Trouble::Job(text) => text == "Input/output error",
            Trouble::NotOpen => false,
        }
    }
}

/// The whole disk as the guest reads it.
pub(super) fn all_of(disk: &Disk) -> Result<Vec<u8>> {
    let mut bytes = vec![0xa5; disk.size() as usize];
    disk.read(0, &mut bytes)?;
    Ok(bytes)
}
