//! One layer of the chain.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::io::Errno;

use super::gate::Admitted;
use super::unopened::UnopenedFile;
use super::{Content, LayerInfo, Namer};
use host::error::Context;
use host::storage::{
    Ask, BlockStatus, CannotClone, CloneSource, FileStorage, Need, ReadAt, Storage, Version,
    cannot_clone,
};
use host::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use host::sync::{Mutex, rank};
use host::{Error, ErrorKind, Result};
use qcow2::format::{BackingFormat, BackingReference, GuestOffset, Mapping, feature};
use qcow2::image::{Extent, Holes, ImageReader, Location};
use remote::RemoteFile;
use remote::pin::{NamedPin, url_digest};
use remote::url::SourceUrl;

/// QEMU's unit of sizes, in bytes.
const SECTOR: u64 = 512;

/// The formats of layers. A [`ReadAt`] and an [`ImageReader`] cannot write, by type, and the files
/// are opened read-only.
#[derive(Debug)]
enum Body {
    /// Plain bytes. The first ones may look like an image header, but they belong to a guest and
    /// are never interpreted.
    Raw(Arc<dyn ReadAt>),
    /// A qcow2 image.
    Qcow2(Box<ImageReader>),
}

/// What a layer's file is, apart from its bytes.
#[derive(Debug)]
struct Origin {
    /// Device and inode of a layer that was opened by name.
    identity: Option<(u64, u64)>,
    /// User id of the file's owner.
    owner: u32,
    /// Version of the file, taken before anything was read from it.
    version: Version,
    /// Name and pin of a remote file.
    remote: Option<(SourceUrl, NamedPin)>,
    /// Format of a remote file that was not opened.
    unopened: Option<BackingFormat>,
}

#[cfg(any(test, feature = "testing"))]
impl Origin {
    /// That of a layer that was not opened by name.
    fn of(version: Version) -> Origin {
        Origin { identity: None, owner: 0, version, remote: None, unopened: None }
    }
}

/// An open backing file.
#[derive(Debug)]
pub(super) struct Layer {
    reference: BackingReference,
    path: PathBuf,
    /// Virtual size in bytes. For a raw file this is its length, which need not be a multiple of a
    /// sector.
    size: u64,
    /// Bytes that the file occupied on the host when it was opened. The file is not written, so the
    /// value stays right; a new query could hang with its file system, and a status query with it.
    allocated_size: u64,
    origin: Origin,
    /// Whether the file was seen to have another version since. Never reset, because cached bytes
    /// may be of either version.
    changed: AtomicBool,
    /// The run of data of a raw file that was found last. A file system may walk over all pages of
    /// a run to find its end (tmpfs), and a stream asks about a few pages at a time.
    data: Mutex<{ rank::LEAF }, Range<u64>>,
    /// Whether the host can share blocks of this file with the overlay: [`UNKNOWN`]; [`POSSIBLE`]
    /// as far as the host has said; or [`NEVER`], which is final.
    sharing: AtomicU64,
    /// Whether holes inside the data of a qcow2 image are reported. Determined by the first call of
    /// [`Layer::place`].
    holes: OnceLock<Holes>,
    body: Body,
}

/// Values of [`Layer::sharing`], which only rises.
const UNKNOWN: u64 = 0;
const POSSIBLE: u64 = 1;
const NEVER: u64 = 2;

/// A raw layer as a source of shared blocks.
#[derive(Clone, Copy, Debug)]
pub struct Cloneable<'a>(&'a Layer, &'a dyn ReadAt);

impl<'a> Cloneable<'a> {
    /// The file to clone from.
    pub fn source(self) -> CloneSource<'a> {
        CloneSource::new(self.1)
    }

    /// Waits until the cache of a remote file has the range.
    ///
    /// # Errors
    /// Those of [`ReadAt::file_for_clone`].
    pub fn bring(self, range: Range<u64>) -> Result<()> {
        let Cloneable(layer, file) = self;
        if layer.origin.remote.is_none() {
            return Ok(());
        }
        file.file_for_clone(range.start, range.end - range.start)
            .map(drop)
            .context(|| layer.path.display().to_string())
    }

    /// Whether it is worth trying to share blocks with this file. The host is asked once, so
    /// callers must always pass the same overlay.
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

    /// Records that blocks of the layer could not be shared, and why. Unless the error applies to
    /// this attempt only, blocks of this layer are copied from now on.
    pub fn refused(self, error: &io::Error) {
        let layer = self.0;
        let sorted = cannot_clone(error);
        if sorted == CannotClone::Now || layer.sharing.fetch_max(NEVER, Ordering::Relaxed) == NEVER
        {
            return;
        }
        let (path, why) = (layer.path.display(), host::error::os_text(error));
        if sorted == CannotClone::Ever {
            log::debug!(
                "{path}: its blocks cannot be shared with the overlay ({why}): they are copied"
            );
        } else {
            log::warn!(
                "{path}: its blocks could not be shared with the overlay ({why}): they are copied from now on"
            );
        }
    }
}

/// The answer of one layer for a run: the layer decides it (as data or known zeros), or leaves it
/// to the layer below.
pub(super) enum LayerAnswer<T> {
    /// This layer decides this number of bytes.
    Here(T, u64),
    /// The layer below decides this number of bytes.
    Below(u64),
}

impl Layer {
    pub(super) fn open(
        reference: &BackingReference,
        file: Admitted,
        format: BackingFormat,
    ) -> Result<Layer> {
        match file {
            Admitted::Local(file) => Layer::open_local(reference, file, format),
            Admitted::Remote(file) => Layer::open_remote(reference, file, format),
            Admitted::Unopened(file) => Layer::stand_in(reference, file),
        }
    }

    fn open_local(
        reference: &BackingReference,
        file: FileStorage,
        format: BackingFormat,
    ) -> Result<Layer> {
        let path = file.path().to_path_buf();
        let version = file.settle().context(|| path.display().to_string())?;
        let (identity, owner) = (Some(file.identity()), file.owner());
        let origin = Origin { identity, owner, version, remote: None, unopened: None };
        let storage = Arc::new(file);
        let body = match format {
            BackingFormat::Raw => Body::Raw(storage),
            BackingFormat::Qcow2 => Body::Qcow2(Box::new(
                ImageReader::open_locked(storage, &path).context(|| path.display().to_string())?,
            )),
        };
        Layer::assemble(reference, path, origin, body)
    }

    fn open_remote(
        reference: &BackingReference,
        file: RemoteFile,
        format: BackingFormat,
    ) -> Result<Layer> {
        let path = PathBuf::from(file.name().to_string());
        let version = Version { size: file.size(), modified: None };
        let pin = NamedPin { url: url_digest(file.name()), pin: file.pin().clone() };
        let remote = Some((file.name().clone(), pin));
        let origin = Origin { identity: None, owner: 0, version, remote, unopened: None };
        let storage: Arc<dyn ReadAt> = Arc::new(file);
        let body = match format {
            BackingFormat::Raw => Body::Raw(storage),
            BackingFormat::Qcow2 => Body::Qcow2(Box::new(
                ImageReader::open(storage).context(|| path.display().to_string())?,
            )),
        };
        Layer::assemble(reference, path, origin, body)
    }

    /// A layer that stands for a remote file without opening it. Nothing is known about the layers
    /// below it, so the chain ends here.
    fn stand_in(reference: &BackingReference, file: UnopenedFile) -> Result<Layer> {
        let path = PathBuf::from(file.name.to_string());
        let version = Version { size: file.size(), modified: None };
        let unopened = Some(file.format);
        let origin = Origin { identity: None, owner: 0, version, remote: None, unopened };
        Layer::assemble(reference, path, origin, Body::Raw(Arc::new(file)))
    }

    fn assemble(
        reference: &BackingReference,
        path: PathBuf,
        origin: Origin,
        body: Body,
    ) -> Result<Layer> {
        let (size, allocated_size) = match &body {
            Body::Raw(storage) => (storage.size(), storage.allocated_size()),
            Body::Qcow2(reader) => {
                if reader.header().incompatible & feature::CORRUPT != 0 {
                    log::warn!(
                        "{}: is marked corrupt; what can be read of it is used",
                        path.display()
                    );
                }
                (reader.geometry().size(), reader.storage().allocated_size())
            }
        };
        let allocated_size = allocated_size.context(|| path.display().to_string())?;
        if size > i64::MAX as u64 {
            return Err(Error::new(
                ErrorKind::InvalidImage,
                format!("{}: {size} bytes are too many", path.display()),
            ));
        }
        Ok(Layer { allocated_size, ..Layer::new(reference.clone(), path, size, origin, body) })
    }

    /// A layer of which nothing has been asked yet.
    fn new(
        reference: BackingReference,
        path: PathBuf,
        size: u64,
        origin: Origin,
        body: Body,
    ) -> Layer {
        Layer {
            reference,
            path,
            size,
            allocated_size: 0,
            origin,
            changed: AtomicBool::new(false),
            data: Mutex::default(),
            sharing: AtomicU64::new(UNKNOWN),
            holes: OnceLock::new(),
            body,
        }
    }

    /// A raw layer that was not opened by name.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn of_raw(storage: Arc<dyn ReadAt>) -> Layer {
        let reference =
            BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let (size, version) = (storage.size(), version_for_tests(&*storage));
        Layer::new(reference, "/base.raw".into(), size, Origin::of(version), Body::Raw(storage))
    }

    /// A qcow2 layer that was not opened by name.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn of_qcow2(storage: Arc<dyn ReadAt>) -> Result<Layer> {
        let reference =
            BackingReference { name: "middle.qcow2".into(), format: Some(BackingFormat::Qcow2) };
        let version = version_for_tests(&*storage);
        let reader = ImageReader::open(storage)?;
        let size = reader.geometry().size();
        let body = Body::Qcow2(Box::new(reader));
        Ok(Layer::new(reference, "/middle.qcow2".into(), size, Origin::of(version), body))
    }

    /// Virtual size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Version of the file when it was opened.
    pub(super) fn version(&self) -> Version {
        self.origin.version
    }

    /// See [`ReadAt::need_no_more`].
    pub(super) fn need_no_more(&self) {
        self.storage().need_no_more();
    }

    /// See [`ReadAt::done`]. A cluster of a qcow2 file that several guest ranges share is fetched
    /// again for the others.
    pub(super) fn done(&self, at: u64, len: u64) {
        match &self.body {
            Body::Raw(storage) => storage.done(at, len),
            Body::Qcow2(reader) if self.origin.remote.is_some() => {
                reader.done(GuestOffset(at), len)
            }
            Body::Qcow2(_) => {}
        }
    }

    fn storage(&self) -> &dyn ReadAt {
        match &self.body {
            Body::Raw(storage) => &**storage,
            Body::Qcow2(reader) => &**reader.storage(),
        }
    }

    /// Checks that the file is still what it was when it was opened. A check after a read proves
    /// that the bytes read are of that file (P9, P10); [`host::storage::ReadAt::version`] says why
    /// the order matters.
    pub(super) fn unchanged(&self, ask: Ask) -> Result<()> {
        if !self.changed.load(Ordering::Relaxed) {
            let now = self.storage().version(ask).context(|| self.path.display().to_string())?;
            if now == self.origin.version {
                return Ok(());
            }
            if !self.changed.swap(true, Ordering::Relaxed) {
                let (path, then) = (self.path.display(), self.origin.version);
                log::error!(
                    "{path}: was changed while it is in use as a backing file (size and time of change were {then}, are {now}): what was \
                     not copied up before cannot be read any more, and no stream completes; bring the old content back, then mount again"
                );
            }
        }
        let path = self.path.display();
        Err(Error::io(
            format!("{path}: was changed while it is in use as a backing file"),
            Errno::IO.into(),
        ))
    }

    /// Size of the layer's L1 table in bytes.
    pub(super) fn l1_bytes(&self) -> u64 {
        match &self.body {
            Body::Raw(_) => 0,
            Body::Qcow2(reader) => u64::from(reader.header().l1_size) * 8,
        }
    }

    /// This layer as the namer of the next one.
    pub(super) fn namer(&self) -> Namer<'_> {
        match &self.origin.remote {
            Some((name, _)) => Namer::Remote(name),
            None => Namer::Above { path: &self.path, owner: self.origin.owner },
        }
    }

    /// The backing file that this layer names.
    pub(super) fn backing(&self) -> Option<BackingReference> {
        match &self.body {
            Body::Raw(_) => None,
            Body::Qcow2(reader) => reader.backing(),
        }
    }

    /// (device, inode) of the layer's file.
    pub(super) fn identity(&self) -> Option<(u64, u64)> {
        self.origin.identity
    }

    /// The path of the file, or the whole URL with what may be a secret.
    pub(super) fn full_name(&self) -> String {
        match &self.origin.remote {
            Some((name, _)) => name.as_str().to_owned(),
            None => self.path.display().to_string(),
        }
    }

    /// What a remote layer is pinned to.
    pub(super) fn pin(&self) -> Option<&NamedPin> {
        self.origin.remote.as_ref().map(|(_, pin)| pin)
    }

    /// The header extension of this layer that says what remote layers below it are pinned to.
    pub(super) fn pins_below(&self) -> Option<Vec<u8>> {
        match &self.body {
            Body::Raw(_) => None,
            Body::Qcow2(reader) => reader.header().pins(),
        }
    }

    /// Says that the run at `at`, up to `max` bytes, will be read soon. Returns for how many bytes
    /// that is settled.
    pub(super) fn will_need(&self, at: u64, max: u64, need: Need) -> Result<LayerAnswer<()>> {
        match &self.body {
            Body::Raw(storage) => {
                storage.will_need(at, max, need);
                Ok(LayerAnswer::Here((), max))
            }
            Body::Qcow2(reader) => {
                let extent = run(reader, GuestOffset(at), max)
                    .context(|| self.path.display().to_string())?;
                if extent.mapping == Mapping::Unallocated {
                    return Ok(LayerAnswer::Below(extent.len));
                }
                if self.origin.remote.is_some() {
                    reader.will_need(GuestOffset(at), &extent, need);
                }
                Ok(LayerAnswer::Here((), extent.len))
            }
        }
    }

    pub(super) fn info(&self) -> LayerInfo {
        let (format, storage, header) = match &self.body {
            Body::Raw(storage) => (BackingFormat::Raw, storage, None),
            Body::Qcow2(reader) => (BackingFormat::Qcow2, reader.storage(), Some(reader.header())),
        };
        LayerInfo {
            reference: self.reference.clone(),
            path: self.path.clone(),
            format: self.origin.unopened.unwrap_or(format),
            size: self.size,
            allocated_size: self.allocated_size,
            cluster_size: header.as_ref().map(|header| header.geometry.cluster_size()),
            qcow2: header.map(|header| header.facts()),
            identity: self.origin.identity,
            is_remote: self.origin.remote.is_some() || self.origin.unopened.is_some(),
            file_size: storage.size(),
            block_device: storage.is_block_device(),
            deleted: storage.is_deleted(),
            // `Ask::Known` does not wait for the server of a network file system.
            changed: self.unchanged(Ask::Known).is_err() && self.changed.load(Ordering::Relaxed),
        }
    }

    /// Whether the layer is a raw file.
    pub fn is_raw(&self) -> bool {
        matches!(self.body, Body::Raw(_))
    }

    /// As [`Layer::read`], but waits for no I/O. The answer is false if the bytes, or the table
    /// that maps them, are not in memory.
    pub(super) fn read_cached(&self, at: u64, buf: &mut [u8]) -> LayerAnswer<bool> {
        let len = buf.len() as u64;
        match &self.body {
            Body::Raw(storage) => LayerAnswer::Here(storage.read_cached(at, buf), len),
            Body::Qcow2(reader) => {
                let at = GuestOffset(at);
                match reader.map_resident(at, len) {
                    Some(Extent { mapping: Mapping::Unallocated, len }) => LayerAnswer::Below(len),
                    Some(extent) => {
                        let part = &mut buf[..extent.len as usize];
                        LayerAnswer::Here(reader.read_cached(at, &extent, part), extent.len)
                    }
                    None => LayerAnswer::Here(false, len),
                }
            }
        }
    }

    /// Reads the run at `at`, up to the length of `buf`. The range lies inside the layer.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<LayerAnswer<()>> {
        match &self.body {
            Body::Raw(storage) => {
                let len = buf.len();
                storage
                    .read_at(at, buf)
                    .context(|| format!("{}: reading {len} bytes at {at}", self.path.display()))?;
                Ok(LayerAnswer::Here((), len as u64))
            }
            Body::Qcow2(reader) => {
                let at = GuestOffset(at);
                let extent = run(reader, at, buf.len() as u64)
                    .context(|| self.path.display().to_string())?;
                if extent.mapping == Mapping::Unallocated {
                    return Ok(LayerAnswer::Below(extent.len));
                }
                let len = reader
                    .read_run(at, &extent, buf)
                    .context(|| self.path.display().to_string())?;
                Ok(LayerAnswer::Here((), len))
            }
        }
    }

    /// The layer whose blocks hold the bytes at `at`, for at most `max` bytes. The range lies
    /// inside the layer.
    ///
    /// `None` if there are no blocks that could be shared unchanged: the bytes are compressed,
    /// zero, or in a qcow2 image, where they have another offset and the blocks may hold other data
    /// as well.
    pub(super) fn cloneable(
        &self,
        at: u64,
        max: u64,
    ) -> Result<LayerAnswer<Option<Cloneable<'_>>>> {
        match &self.body {
            Body::Raw(storage) => {
                let possible = self.sharing.load(Ordering::Relaxed) < NEVER;
                Ok(LayerAnswer::Here(possible.then_some(Cloneable(self, &**storage)), max))
            }
            Body::Qcow2(reader) => {
                let (mapping, len) = reader.look(GuestOffset(at), max);
                // As in `content`: a bad entry is decided by this layer, and reading it returns the
                // error.
                Ok(if matches!(mapping, Ok(Mapping::Unallocated)) {
                    LayerAnswer::Below(len)
                } else {
                    LayerAnswer::Here(None, len)
                })
            }
        }
    }

    /// What the layer holds at `at`, for at most `max` bytes, without reading it. The range lies
    /// inside the layer.
    pub(super) fn content(&self, at: u64, max: u64) -> Result<LayerAnswer<Content>> {
        match &self.body {
            Body::Raw(storage) => {
                // Reporting data is always safe: it only makes the caller read.
                let known = self.data.lock().clone();
                if known.contains(&at) {
                    return Ok(LayerAnswer::Here(Content::Data, max.min(known.end - at)));
                }
                let (holding, len) = storage
                    .status(at, self.size - at)
                    .context(|| self.path.display().to_string())?;
                let content = match holding {
                    BlockStatus::Data => {
                        *self.data.lock() = at..at + len;
                        Content::Data
                    }
                    BlockStatus::Hole => Content::Zero,
                };
                Ok(LayerAnswer::Here(content, len.min(max)))
            }
            Body::Qcow2(reader) => {
                let (mapping, len) = reader.look(GuestOffset(at), max);
                Ok(match mapping {
                    Ok(Mapping::Unallocated) => LayerAnswer::Below(len),
                    Ok(Mapping::Zero { .. }) => LayerAnswer::Here(Content::Zero, len),
                    // A bad entry counts as data of this layer: reading it returns the error.
                    Ok(Mapping::Data { .. } | Mapping::Compressed { .. }) | Err(_) => {
                        LayerAnswer::Here(Content::Data, len)
                    }
                })
            }
        }
    }
}

impl Layer {
    /// Size in bytes as QEMU counts it: in whole sectors. The last sector may end with zeros that
    /// are not in the file.
    pub(super) fn whole_sectors(&self) -> u64 {
        self.size.next_multiple_of(SECTOR)
    }

    /// Finds the bytes at `at`, which is inside [`Layer::whole_sectors`]. Returns where they are,
    /// and for how many bytes, at most `max`, that holds.
    pub(super) fn place(&self, at: u64, max: u64, deadline: Instant) -> Result<(Location, u64)> {
        let max = max.min(self.whole_sectors() - at);
        match &self.body {
            // Data at a place in the file that is not known.
            Body::Raw(_) if self.origin.unopened == Some(BackingFormat::Qcow2) => {
                Ok((Location::Unreadable, max))
            }
            Body::Raw(_) if at >= self.size => Ok((Location::Zero { offset: Some(at) }, max)),
            Body::Raw(_) => match self.content(at, max.min(self.size - at))? {
                LayerAnswer::Here(Content::Data, len) => {
                    Ok((Location::Data { offset: at, hole: false }, len))
                }
                LayerAnswer::Here(Content::Zero | Content::Unallocated, len) => {
                    Ok((Location::Zero { offset: Some(at) }, len))
                }
                LayerAnswer::Below(len) => Ok((Location::Below { offset: None }, len)),
            },
            Body::Qcow2(reader) => {
                let holes = *self.holes.get_or_init(|| reader.holes(deadline));
                reader
                    .place(GuestOffset(at), max, holes)
                    .context(|| self.path.display().to_string())
            }
        }
    }
}

/// Version of a file in memory; these always have one.
#[cfg(any(test, feature = "testing"))]
fn version_for_tests(storage: &dyn ReadAt) -> Version {
    storage.version(Ask::Anew).unwrap_or(Version { size: storage.size(), modified: None })
}

/// Maps the run at `at`. The length is checked here, because the loops of the callers advance by
/// it.
fn run(reader: &ImageReader, at: GuestOffset, max: u64) -> Result<Extent> {
    let extent = reader.map(at, max)?;
    assert!(
        (1..=max).contains(&extent.len),
        "run of {} bytes at {} of at most {max}",
        extent.len,
        at.0
    );
    Ok(extent)
}
