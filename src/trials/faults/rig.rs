//! A disk in memory above files that can fail, and the requests of which scenarios consist.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::model::Change;
use super::sketch::{Built, Shape, Sketch};
use engine::chain::Chain;
use engine::disk::Disk;
use engine::job::{JobEvent, Jobs, Status};
use engine::stream::{StreamOptions, start};
use host::error::os_text;
use host::{Error, ErrorKind, Result};
use qcow2::image::Image;
use sim::SimStorage;
use sim::spec::{self, Layout, Seen};

/// Longer than any step takes; it only turns a hang into a failure.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// A request of a guest, or another operation on the disk. Ranges are in bytes.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Read(Range<u64>),
    /// The byte makes the data of each write different.
    Write(Range<u64>, u8),
    Zero(Range<u64>),
    Discard(Range<u64>),
    Flush,
    Grow(u64),
    /// Streams `depth` layers; with `pause`, pauses before the first chunk.
    Stream {
        depth: Option<usize>,
        pause: bool,
    },
    Close,
    /// Opens the image; an open disk is left as a killed process leaves it.
    Open,
}

impl Step {
    /// Returns the change that the step makes to the guest's bytes.
    pub fn change(&self) -> Option<Change> {
        match self {
            Step::Write(range, byte) => Some(Change::Write(range.start, pattern(range, *byte))),
            Step::Zero(range) | Step::Discard(range) => Some(Change::Zero(range.clone())),
            Step::Grow(size) => Some(Change::Size(*size)),
            Step::Read(_) | Step::Flush | Step::Stream { .. } | Step::Close | Step::Open => None,
        }
    }

    /// Whether everything before the step is durable when it has succeeded.
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
    /// The error that `export` converts to an errno.
    Request(Error),
    /// The error text that clients of a job see.
    Job(String),
    /// The disk could not be opened earlier.
    NotOpen,
}

/// The contents from which the files of a scenario are made for each cell.
#[derive(Debug)]
pub(super) struct Files {
    pub shape: Shape,
    pub overlay: Built,
    pub middle: Option<Vec<u8>>,
    pub base: Vec<u8>,
    /// The content of `middle` above `base`.
    pub above_base: Vec<u8>,
    /// The bytes that the guest reads.
    pub content: Vec<u8>,
}

impl Files {
    pub fn new(overlay: &Sketch, middle: Option<&Sketch>, base: Vec<u8>) -> Files {
        let above_base = middle.map_or_else(|| base.clone(), |middle| middle.content(&base));
        let content = overlay.content(if overlay.backing.is_some() { &above_base } else { &[] });
        let middle = middle.map(|middle| middle.build().bytes);
        Files { shape: overlay.shape, overlay: overlay.build(), middle, base, above_base, content }
    }

    /// Checks and reads an overlay of this scenario, above the backing file that its header now
    /// names. When one of two references to a shared cluster is dropped, the entry of the other
    /// does not get COPIED, so these clusters may lack it.
    ///
    /// # Errors
    /// If the image cannot be read, or if an incompatible feature bit is set.
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
        // If a barrier fails, one of three sectors reaches the disk.
        overlay.forget_after_failed_barriers(|sector| sector % 3 == 0);
        let middle = files.middle.clone().map(SimStorage::new);
        Rig { overlay, base: SimStorage::new(files.base.clone()), middle, disk: None, copy_on_read }
    }

    /// Opens in the order of [`Disk::open`]: the image is not changed unless the whole chain opens.
    fn open(&mut self) -> Result<()> {
        self.disk = None;
        let image = Image::open(self.overlay.clone())?;
        let chain = match image.reader().backing() {
            None => None,
            Some(reference) => match &self.middle {
                Some(middle) if reference.name == "middle.qcow2" => {
                    Some(Chain::of_two(middle.clone(), self.base.clone())?)
                }
                _ => Some(Chain::of_raw(self.base.clone())),
            },
        };
        image.begin_writing()?;
        self.disk = Some(Arc::new(Disk::for_tests(image, chain).copying_up(self.copy_on_read)));
        Ok(())
    }

    /// Performs one step and returns the bytes that it read.
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

/// Starts a stream and waits for its end.
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
        jobs.pause("job")
            .map_err(|error| Trouble::Request(Error::new(ErrorKind::Busy, error.to_string())))?;
    }
    drop(held);
    if pause {
        told(&|event| matches!(event, JobEvent::StatusChange { status: Status::Paused, .. }));
        // A flush of what was written before may run while the job is paused. If the host fails
        // then, the job does not report it.
        jobs.resume("job")
            .map_err(|error| Trouble::Request(Error::new(ErrorKind::Busy, error.to_string())))?;
    }
    let JobEvent::Completed { error, .. } =
        told(&|event| matches!(event, JobEvent::Completed { .. }))
    else {
        unreachable!()
    };
    jobs.settle("job", PATIENCE);
    error.map_or(Ok(()), |text| Err(Trouble::Job(text)))
}

impl Trouble {
    /// Whether this is the right result of an operation that failed with `errno`. `mapped` converts
    /// an error to the errno that a client of the mount sees.
    pub fn comes_from(&self, errno: i32, mapped: fn(&Error) -> i32) -> bool {
        let alike = |errno| Error::io("", std::io::Error::from_raw_os_error(errno));
        match self {
            Trouble::Request(error) => {
                error.errno() == Some(errno) && mapped(error) == mapped(&alike(errno))
            }
            Trouble::Job(text) => *text == os_text(&std::io::Error::from_raw_os_error(errno)),
            Trouble::NotOpen => true,
        }
    }

    /// Whether this is the error of a write or flush after a failed barrier.
    pub fn is_sticky(&self, mapped: fn(&Error) -> i32) -> bool {
        match self {
            Trouble::Request(error) => {
                error.to_string().contains("failed earlier") && mapped(error) == 5
            }
            Trouble::Job(text) => text == "Input/output error",
            Trouble::NotOpen => false,
        }
    }
}

/// Reads the whole disk as the guest sees it.
pub(super) fn all_of(disk: &Disk) -> Result<Vec<u8>> {
    let mut bytes = vec![0xa5; disk.size() as usize];
    disk.read(0, &mut bytes)?;
    Ok(bytes)
}
