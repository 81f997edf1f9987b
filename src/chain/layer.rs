//! One layer of the chain.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::io::Errno;

use super::{Content, LayerInfo, Namer};
use crate::error::Context;
use crate::format::{BackingFormat, BackingReference, GuestOffset, Mapping, feature};
use crate::image::{Extent, Holes, ImageReader, Place};
use crate::storage::{Ask, CannotClone, CloneSource, FileStorage, Holding, Storage, Version, cannot_clone};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, rank};
use crate::{Error, ErrorKind, Result};

/// What QEMU counts sizes in, bytes.
const SECTOR: u64 = 512;

/// The kinds of layers: a closed set. Neither can be written by type or, opened read-only, at all.
#[derive(Debug)]
enum Body {
    /// Plain bytes. Its first ones may look like anything: they belong to a guest and are never interpreted.
    Raw(Arc<dyn Storage>),
    /// A qcow2 image.
    Qcow2(Box<ImageReader>),
}

/// A backing file, open.
#[derive(Debug)]
pub(super) struct Layer {
    reference: BackingReference,
    path: PathBuf,
    /// The user who owns the file.
    owner: u32,
    /// Virtual size in bytes; a raw file's is its length, whatever that is a multiple of.
    size: u64,
    /// Bytes it occupied on the host when it was opened. Nothing writes it, and asking again could hang with its file system, and with it
    /// whoever only wants to know what there is.
    allocated_size: u64,
    /// Device and inode of a layer that was opened by name.
    identity: Option<(u64, u64)>,
    /// Of the file, before anything was read of it.
    version: Version,
    /// The file has been seen to have another version since. For good: what is cached of it may be
    /// of either.
    changed: AtomicBool,
    /// The run of data of a raw file that was found last. To find the end of one can take a file system as long as the run has pages (tmpfs), and
    /// a stream asks every few of them.
    data: Mutex<{ rank::LEAF }, Range<u64>>,
    /// Whether the host shares its blocks with the overlay: [`UNKNOWN`], [`POSSIBLE`] as far as it has said until now, or [`NEVER`], for good.
    sharing: AtomicU64,
    /// Whether holes inside the data of a qcow2 image are told of; found out by the first who asks where bytes are.
    holes: OnceLock<Holes>,
    body: Body,
}

/// Values of [`Layer::sharing`]; it only rises.
const UNKNOWN: u64 = 0;
const POSSIBLE: u64 = 1;
const NEVER: u64 = 2;

/// A raw layer as the place that blocks are shared with.
#[derive(Clone, Copy, Debug)]
pub struct Cloneable<'a>(&'a Layer, &'a dyn Storage);

impl<'a> Cloneable<'a> {
    /// The file.
    pub fn source(self) -> CloneSource<'a> {
        CloneSource::new(self.1)
    }

    /// Whether it is worth trying to share blocks with this file, always the same one. The host is asked once.
    pub fn is_possible(self, overlay: &dyn Storage) -> bool {
        let sharing = &self.0.sharing;
        if sharing.load(Ordering::Relaxed) == UNKNOWN {
            match overlay.can_clone(self.source()) {
                Ok(()) => drop(sharing.fetch_max(POSSIBLE, Ordering::Relaxed)),
                Err(error) => self.refused(&error),
            }
        }
        sharing.load(Ordering::Relaxed) == POSSIBLE
    }

    /// Blocks of it could not be shared, for this reason. Unless another try may go better there is none: whoever asks for this layer copies.
    pub fn refused(self, error: &io::Error) {
        let layer = self.0;
        let sorted = cannot_clone(error);
        if sorted == CannotClone::Now || layer.sharing.fetch_max(NEVER, Ordering::Relaxed) == NEVER {
            return;
        }
        let (path, why) = (layer.path.display(), crate::error::os_text(error));
        if sorted == CannotClone::Ever {
            log::debug!("{path}: its blocks cannot be shared with the overlay ({why}): they are copied");
        } else {
            log::warn!("{path}: its blocks could not be shared with the overlay ({why}): they are copied from now on");
        }
    }
}

/// What one layer says of a run: that it holds it (or knows it to be zero), or that the layer below decides.
pub(super) enum Answer<T> {
    /// This layer decides.
    Here(T),
    /// For so many bytes, the layer below decides.
    Below(u64),
}

impl Layer {
    pub(super) fn open(reference: &BackingReference, file: FileStorage, format: BackingFormat) -> Result<Layer> {
        let path = file.path().to_path_buf();
        let identity = Some(file.identity());
        let owner = file.owner();
        let version = file.settle().context(|| path.display().to_string())?;
        let storage: Arc<dyn Storage> = Arc::new(file);
        let allocated_size = storage.allocated_size().context(|| path.display().to_string())?;
        let (size, body) = match format {
            BackingFormat::Raw => (storage.size(), Body::Raw(storage)),
            BackingFormat::Qcow2 => {
                let reader = ImageReader::open_locked(storage, &path).context(|| path.display().to_string())?;
                if reader.header().incompatible & feature::CORRUPT != 0 {
                    log::warn!("{}: is marked corrupt; what can be read of it is used", path.display());
                }
                (reader.geometry().size(), Body::Qcow2(Box::new(reader)))
            }
        };
        if size > i64::MAX as u64 {
            return Err(Error::new(ErrorKind::InvalidImage, format!("{}: {size} bytes are too many", path.display())));
        }
        Ok(Layer {
            reference: reference.clone(),
            path,
            owner,
            size,
            allocated_size,
            version,
            identity,
            changed: AtomicBool::new(false),
            data: Mutex::default(),
            sharing: AtomicU64::new(UNKNOWN),
            holes: OnceLock::new(),
            body,
        })
    }

    /// A raw layer that was not opened by name.
    #[cfg(any(test, fuzzing))]
    pub(super) fn of_raw(storage: Arc<dyn Storage>) -> Layer {
        let reference = BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let version = version_for_tests(&*storage);
        Layer {
            reference,
            path: "/base.raw".into(),
            owner: 0,
            size: storage.size(),
            allocated_size: 0,
            identity: None,
            version,
            changed: AtomicBool::new(false),
            data: Mutex::default(),
            sharing: AtomicU64::new(UNKNOWN),
            holes: OnceLock::new(),
            body: Body::Raw(storage),
        }
    }

    /// A qcow2 layer that was not opened by name.
    #[cfg(test)]
    pub(super) fn of_qcow2(storage: Arc<dyn Storage>) -> Result<Layer> {
        let reference = BackingReference { name: "middle.qcow2".into(), format: Some(BackingFormat::Qcow2) };
        let version = version_for_tests(&*storage);
        let reader = ImageReader::open(storage)?;
        let size = reader.geometry().size();
        let body = Body::Qcow2(Box::new(reader));
        Ok(Layer {
            reference,
            path: "/middle.qcow2".into(),
            owner: 0,
            size,
            allocated_size: 0,
            identity: None,
            version,
            changed: AtomicBool::new(false),
            data: Mutex::default(),
            sharing: AtomicU64::new(UNKNOWN),
            holes: OnceLock::new(),
            body,
        })
    }

    /// Virtual size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// What the file was like when it was opened.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    fn storage(&self) -> &dyn Storage {
        match &self.body {
            Body::Raw(storage) => &**storage,
            Body::Qcow2(reader) => &**reader.storage(),
        }
    }

    /// That the file is still what it was when it was opened: asked after something was read of it,
    /// this says that what was read is of that file (P9, P10). [`Storage::version`] says why the
    /// order matters.
    pub(super) fn unchanged(&self, ask: Ask) -> Result<()> {
        if !self.changed.load(Ordering::Relaxed) {
            let now = self.storage().version(ask).context(|| self.path.display().to_string())?;
            if now == self.version {
                return Ok(());
            }
            if !self.changed.swap(true, Ordering::Relaxed) {
                let (path, then) = (self.path.display(), self.version);
                log::error!(
                    "{path}: was changed while it is in use as a backing file (size and time of change were {then}, are {now}): what was \
                     not copied up before cannot be read any more, and no stream completes; bring the old content back, then mount again"
                );
            }
        }
        let path = self.path.display();
        Err(Error::io(format!("{path}: was changed while it is in use as a backing file"), Errno::IO.into()))
    }

    /// Size of its L1 table in bytes.
    pub(super) fn l1_bytes(&self) -> u64 {
        match &self.body {
            Body::Raw(_) => 0,
            Body::Qcow2(reader) => u64::from(reader.header().l1_size) * 8,
        }
    }

    /// This layer as that which names the next one.
    pub(super) fn namer(&self) -> Namer<'_> {
        Namer::Above { path: &self.path, owner: self.owner }
    }

    /// What this layer names as its own backing file.
    pub(super) fn backing(&self) -> Option<BackingReference> {
        match &self.body {
            Body::Raw(_) => None,
            Body::Qcow2(reader) => reader.backing(),
        }
    }

    /// (device, inode) of its file.
    pub(super) fn identity(&self) -> Option<(u64, u64)> {
        self.identity
    }

    pub(super) fn info(&self) -> LayerInfo {
        let (format, storage, header) = match &self.body {
            Body::Raw(storage) => (BackingFormat::Raw, storage, None),
            Body::Qcow2(reader) => (BackingFormat::Qcow2, reader.storage(), Some(reader.header())),
        };
        LayerInfo {
            reference: self.reference.clone(),
            path: self.path.clone(),
            format,
            size: self.size,
            allocated_size: self.allocated_size,
            cluster_size: header.as_ref().map(|header| header.geometry.cluster_size()),
            qcow2: header.map(|header| header.facts()),
            identity: self.identity,
            file_size: storage.size(),
            block_device: storage.is_block_device(),
            deleted: storage.is_deleted(),
            // Where the file system is another machine's, no one waits for it here.
            changed: self.unchanged(Ask::Known).is_err() && self.changed.load(Ordering::Relaxed),
        }
    }

    /// Whether it is plain bytes.
    pub fn is_raw(&self) -> bool {
        matches!(self.body, Body::Raw(_))
    }

    /// Fills `buf` if this is a raw file that is long enough and nobody has to be waited for; says whether it has.
    pub fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        match &self.body {
            Body::Raw(storage) => storage.read_cached(offset, buf),
            Body::Qcow2(_) => false,
        }
    }

    /// Reads the run at `at`, as much of it as `buf` takes: `Here` with how many bytes. The range lies inside the layer.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<Answer<usize>> {
        match &self.body {
            Body::Raw(storage) => {
                let len = buf.len();
                storage.read_at(at, buf).context(|| format!("{}: reading {len} bytes at {at}", self.path.display()))?;
                Ok(Answer::Here(len))
            }
            Body::Qcow2(reader) => {
                let at = GuestOffset(at);
                let extent = run(reader, at, buf.len() as u64).context(|| self.path.display().to_string())?;
                if extent.mapping == Mapping::Unallocated {
                    return Ok(Answer::Below(extent.len));
                }
                let len = extent.len as usize;
                reader.read_extent(at, &extent, &mut buf[..len]).context(|| self.path.display().to_string())?;
                Ok(Answer::Here(len))
            }
        }
    }

    /// Whose blocks hold what is at `at`, for at most `max` bytes: `Here` with how many bytes. `None` where they are nobody's that could be shared
    /// as they are: compressed, zero, or of a qcow2 image, where they lie at another offset and may be anybody's. The range lies inside the layer.
    pub(super) fn cloneable(&self, at: u64, max: u64) -> Result<Answer<(Option<Cloneable<'_>>, u64)>> {
        match &self.body {
            Body::Raw(storage) => {
                let possible = self.sharing.load(Ordering::Relaxed) < NEVER;
                Ok(Answer::Here((possible.then_some(Cloneable(self, &**storage)), max)))
            }
            Body::Qcow2(reader) => {
                let (mapping, len) = reader.look(GuestOffset(at), max);
                // As in `content`: a bad place belongs to this layer, and reading it is the error.
                Ok(if matches!(mapping, Ok(Mapping::Unallocated)) { Answer::Below(len) } else { Answer::Here((None, len)) })
            }
        }
    }

    /// What is at `at`, for at most `max` bytes, without reading it: `Here` with how many bytes. The range lies inside the layer.
    pub(super) fn content(&self, at: u64, max: u64) -> Result<Answer<(Content, u64)>> {
        match &self.body {
            Body::Raw(storage) => {
                // That it is data is never wrong: reading decides.
                let known = self.data.lock().clone();
                if known.contains(&at) {
                    return Ok(Answer::Here((Content::Data, max.min(known.end - at))));
                }
                let (holding, len) = storage.holding(at, self.size - at).context(|| self.path.display().to_string())?;
                let content = match holding {
                    Holding::Data => {
                        *self.data.lock() = at..at + len;
                        Content::Data
                    }
                    Holding::Hole => Content::Zero,
                };
                Ok(Answer::Here((content, len.min(max))))
            }
            Body::Qcow2(reader) => {
                let (mapping, len) = reader.look(GuestOffset(at), max);
                Ok(match mapping {
                    Ok(Mapping::Unallocated) => Answer::Below(len),
                    Ok(Mapping::Zero { .. }) => Answer::Here((Content::Zero, len)),
                    // A bad place is data of this layer: reading it is the error.
                    Ok(Mapping::Data { .. } | Mapping::Compressed { .. }) | Err(_) => Answer::Here((Content::Data, len)),
                })
            }
        }
    }
}

impl Layer {
    /// Size in bytes as QEMU counts it: in whole sectors, the last of which may end with zeros that are not in the file.
    pub(super) fn whole_sectors(&self) -> u64 {
        self.size.next_multiple_of(SECTOR)
    }

    /// Where the bytes at `at` are, and for how many that is so, at most `max`. `at` lies inside [`Layer::whole_sectors`].
    pub(super) fn place(&self, at: u64, max: u64, deadline: Instant) -> Result<(Place, u64)> {
        let max = max.min(self.whole_sectors() - at);
        match &self.body {
            Body::Raw(_) if at >= self.size => Ok((Place::Zero { offset: Some(at) }, max)),
            Body::Raw(_) => match self.content(at, max.min(self.size - at))? {
                Answer::Here((Content::Data, len)) => Ok((Place::Data { offset: at, hole: false }, len)),
                Answer::Here((Content::Zero | Content::Unallocated, len)) => Ok((Place::Zero { offset: Some(at) }, len)),
                Answer::Below(len) => Ok((Place::Below, len)),
            },
            Body::Qcow2(reader) => {
                let holes = *self.holes.get_or_init(|| reader.holes(deadline));
                reader.place(GuestOffset(at), max, holes).context(|| self.path.display().to_string())
            }
        }
    }
}

/// The version of a file in memory, which has one.
#[cfg(any(test, fuzzing))]
fn version_for_tests(storage: &dyn Storage) -> Version {
    storage.version(Ask::Anew).unwrap_or(Version { size: storage.size(), modified: None })
}

/// The run at `at`; its length is what the loops above advance by, so it is checked here.
fn run(reader: &ImageReader, at: GuestOffset, max: u64) -> Result<Extent> {
    let extent = reader.map(at, max)?;
    assert!((1..=max).contains(&extent.len), "run of {} bytes at {} of at most {max}", extent.len, at.0);
    Ok(extent)
}
