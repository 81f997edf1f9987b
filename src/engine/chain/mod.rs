//! The backing chain below the overlay, read-only by type.
//!
//! ```text
//! overlay ──▶ layer 0 (qcow2) ──▶ layer 1 (qcow2) ──▶ … ──▶ layer n-1 (qcow2 or raw)
//!             asked first          asked for runs that layer 0 leaves unallocated
//! ```
//! A layer that is shorter than the disk reads as zeros beyond its end. The layers below it are
//! *not* visible there.
//!
//! **Touches:** `image::ImageReader`, `storage`. **Never:** writes anything; guesses a format;
//! opens a file except through the [`Gate`].
//! **Locks:** one leaf per layer, never held across I/O (`storage` takes the host's file locks).
//! **Invariants:** the list of layers does not change after [`Chain::open`]. No file is in it
//! twice. It has at most [`MAX_LAYERS`]. Walks over the layers are loops, so the depth of a chain
//! uses no stack. No byte and no block status of a layer leaves [`Chain`] unless the file's size
//! and change time, queried after the read, are those of the open (P9, P10). A base that is
//! overwritten in place is therefore an error, and never a mix of two files.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use host::mutants::{Step, without};
use host::storage::{Ask, Need};
use host::{Error, ErrorKind, Result};
use qcow2::format::{BackingFormat, BackingReference, Qcow2Facts, printable};
use remote::pin::{NamedPin, Pin};

mod gate;
mod layer;
mod located;
mod roots;
#[cfg(test)]
mod tests;
mod unopened;

pub use gate::{Gate, Namer, explain};
pub use layer::Cloneable;
use layer::Layer;
use layer::LayerAnswer;
pub use located::MapEntry;
pub use roots::Roots;

/// Largest number of layers. QEMU has no limit, cloud-hypervisor allows 10; a longer chain is a
/// loop or a mistake.
pub const MAX_LAYERS: usize = 16;

/// Limit of the L1 tables of all layers together, in bytes. They stay in memory, and the sparse
/// files of a hostile chain could claim any size.
const MAX_L1_BYTES: u64 = 256 << 20;

/// What a range of the chain holds, for the decision whether to read or copy it. This is not a
/// [`MapEntry`] without its offset: it is exact to the byte, where QEMU's map counts whole sectors,
/// it may count the first layers only, and a shorter layer above another one is zero here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Content {
    /// Data that must be read.
    Data,
    /// Zeros, known without reading, that hide what the layers below those asked hold.
    Zero,
    /// The range reads the same when the layers asked are gone: none of them holds it, and the next
    /// layer decides; or they are all layers, and it reads as zeros.
    Unallocated,
}

/// Properties of one layer, for users and for QMP.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// The backing file name and format in the header of the image above.
    pub reference: BackingReference,
    /// Path of the file that was opened.
    pub path: PathBuf,
    /// Format of the file.
    pub format: BackingFormat,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes that the file occupied on the host when it was opened.
    pub allocated_size: u64,
    /// Cluster size in bytes of a qcow2 layer.
    pub cluster_size: Option<u64>,
    /// Properties that only qcow2 images have.
    pub qcow2: Option<Qcow2Facts>,
    /// Device and inode of a file that was opened by name.
    pub identity: Option<(u64, u64)>,
    /// Whether the file is remote; its path is then a name without what may be a secret.
    pub is_remote: bool,
    /// Length of the file in bytes, including metadata.
    pub file_size: u64,
    /// Whether the file is a block device.
    pub block_device: bool,
    /// Whether the file has no name any more. Its bytes are then freed when the last process closes
    /// it.
    pub deleted: bool,
    /// Whether the file was changed since it was opened. Reads that this layer decides are then
    /// errors.
    pub changed: bool,
}

/// The backing files, top first. Immutable after open; at most [`MAX_LAYERS`].
#[derive(Debug)]
pub struct Chain {
    /// The layers are shared with the shorter chain that [`Chain::below`] returns.
    layers: Vec<Arc<Layer>>,
}

/// The layer that decides a run of bytes.
enum Decision<T> {
    /// The layer at this index, counted from the top, and its answer.
    By(usize, T),
    /// The layer at this index ends before the run, and the layers above leave the run to it.
    PastEnd(usize),
    /// All layers asked leave the run to the next one.
    Nobody,
}

/// Returns the virtual size of `base` in bytes and the pins of remote files, for a new overlay in
/// `directory`. Opens `base` and all layers below it as a mount of that overlay would, and closes
/// them again.
///
/// # Errors
/// As [`Chain::open`].
pub fn examine_base(
    base: &BackingReference,
    directory: &Path,
    gate: &Gate,
) -> Result<(u64, Vec<NamedPin>)> {
    let chain = Chain::open(base, Namer::User { directory }, gate)?;
    Ok((chain.size(), chain.pins()))
}

impl Chain {
    /// Opens the whole chain that `namer` names. Every file is opened read-only and locked against
    /// writers.
    ///
    /// # Errors
    /// [`ErrorKind::UnsupportedFeature`] and [`ErrorKind::InvalidArgument`] for names and formats
    /// that the [`Gate`] refuses. [`ErrorKind::InvalidArgument`] for a file that is in the chain
    /// twice, and for more than [`MAX_LAYERS`] layers. The errors of `storage` and `image` for the
    /// files.
    pub fn open(first: &BackingReference, namer: Namer<'_>, gate: &Gate) -> Result<Chain> {
        let mut gate = gate.clone();
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        let mut next = Some(first.clone());
        let mut l1_bytes = 0;
        while let Some(reference) = next {
            if layers.len() == MAX_LAYERS {
                let name = printable(&reference.name);
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("backing chain is longer than {MAX_LAYERS} layers at \"{name}\""),
                ));
            }
            let namer = layers.last().map_or(namer, |layer| layer.namer());
            let (file, format) = gate.admit(&reference, namer)?;
            let layer = Layer::open(&reference, file, format)?;
            l1_bytes += layer.l1_bytes();
            if l1_bytes > MAX_L1_BYTES {
                let name = printable(&reference.name);
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("backing chain needs more than 256 MiB of L1 tables at \"{name}\""),
                ));
            }
            layer.pins_below().iter().for_each(|pins| gate.add_pins(pins));
            next = layer.backing();
            layers.push(Arc::new(layer));
        }
        Ok(Chain { layers })
    }

    /// A chain of one raw layer above any storage.
    #[cfg(any(test, feature = "testing"))]
    pub fn of_raw(storage: Arc<dyn host::storage::ReadAt>) -> Chain {
        Chain { layers: vec![Arc::new(Layer::of_raw(storage))] }
    }

    /// A chain of a qcow2 layer above a raw one.
    #[cfg(any(test, feature = "testing"))]
    pub fn of_two(
        qcow2: Arc<dyn host::storage::ReadAt>,
        raw: Arc<dyn host::storage::ReadAt>,
    ) -> Result<Chain> {
        Ok(Chain { layers: vec![Arc::new(Layer::of_qcow2(qcow2)?), Arc::new(Layer::of_raw(raw))] })
    }

    /// Virtual size in bytes of the first layer.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.size())
    }

    /// Properties of the layers, top first.
    pub fn layers(&self) -> Vec<LayerInfo> {
        self.layers.iter().map(|layer| layer.info()).collect()
    }

    /// (device, inode) of the file of the layer at `depth`. `None` if there is no such layer, or if
    /// it was not opened by name.
    pub fn identity(&self, depth: usize) -> Option<(u64, u64)> {
        self.layers.get(depth)?.identity()
    }

    /// The name by which an image in any directory can name the layer at `depth`: the path of its
    /// file, or the whole URL, which [`LayerInfo::path`] shows without what may be a secret.
    pub(crate) fn full_name(&self, depth: usize) -> Option<String> {
        self.layers.get(depth).map(|layer| layer.full_name())
    }

    /// What the remote layers are pinned to.
    pub fn pins(&self) -> Vec<NamedPin> {
        self.layers.iter().filter_map(|layer| layer.pin().cloned()).collect()
    }

    /// What the first layer is pinned to, if it is remote.
    pub(crate) fn pin_of_first(&self) -> Option<Pin> {
        self.layers.first()?.pin().map(|named| named.pin.clone())
    }

    /// Versions of the files when they were opened, top first, each in brackets. The string changes
    /// with every change of any file.
    pub fn versions(&self) -> String {
        self.layers.iter().map(|layer| format!("[{}]", layer.version())).collect()
    }

    /// The chain that remains without the first `depth` layers; `None` if none remains. The files
    /// stay open.
    pub fn below(&self, depth: usize) -> Option<Chain> {
        let rest = self.layers.get(depth..).filter(|rest| !rest.is_empty())?;
        Some(Chain { layers: rest.to_vec() })
    }

    /// Checks that the files of the first `depth` layers are unchanged since they were opened.
    ///
    /// # Errors
    /// EIO, with the name of the first file that was changed.
    pub fn unchanged(&self, depth: usize, ask: Ask) -> Result<()> {
        self.layers.iter().take(depth).try_for_each(|layer| layer.unchanged(ask))
    }

    /// The last step of every query: returns `found` if none of the first `asked` layers, on which
    /// it is based, was changed meanwhile.
    fn proven<T>(&self, asked: usize, found: Result<T>) -> Result<T> {
        if !without(Step::LayersUnchangedBeforePublish) {
            // Checked before the error is returned: if a file was changed, that is the cause to
            // report.
            self.unchanged(asked, Ask::AsStat)?;
        }
        found
    }

    /// Fills `buf` from `offset`. Beyond the end of a layer it reads as zeros, and the layers below
    /// are not visible.
    ///
    /// # Errors
    /// I/O errors, corruption; EIO if a layer that was asked has changed since it was opened.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (mut done, mut asked) = (0, 0);
        let mut read = Ok(());
        while done < buf.len() && read.is_ok() {
            read = self
                .read_run(offset + done as u64, &mut buf[done..], &mut asked)
                .map(|len| done += len);
        }
        self.proven(asked, read)
    }

    /// As [`Chain::read`], but only if the bytes, and the tables that map them, are in memory.
    /// Returns whether `buf` was filled.
    pub fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        let (mut done, mut asked) = (0, 0);
        while done < buf.len() {
            let at = offset + done as u64;
            let rest = &mut buf[done..];
            let most = rest.len() as u64;
            let decided =
                self.decide(usize::MAX, (at, most), Layer::size, &mut asked, |layer, len| {
                    Ok(layer.read_cached(at, &mut rest[..len as usize]))
                });
            let run = match decided {
                Ok((Decision::By(_, true), run)) => run as usize,
                Ok((Decision::PastEnd(_) | Decision::Nobody, run)) => {
                    rest[..run as usize].fill(0);
                    run as usize
                }
                Ok((Decision::By(_, false), _)) | Err(_) => return false,
            };
            done += run;
        }
        without(Step::LayersUnchangedBeforePublish) || self.unchanged(asked, Ask::Known).is_ok()
    }

    /// Walks over the layers and determines which of the first `depth` decides the run at `offset`.
    /// Returns the decision and the number of bytes, at most `max` (> 0), to which it applies.
    ///
    /// `end` returns the end of a layer in bytes. `ask` gets a layer and a number of bytes that lie
    /// inside it. Raises `asked` to the number of layers on which the decision is based.
    fn decide<'a, T>(
        &'a self,
        depth: usize,
        (offset, max): (u64, u64),
        end: fn(&Layer) -> u64,
        asked: &mut usize,
        mut ask: impl FnMut(&'a Layer, u64) -> Result<LayerAnswer<T>>,
    ) -> Result<(Decision<T>, u64)> {
        let mut len = max;
        for (index, layer) in self.layers.iter().enumerate().take(depth) {
            *asked = index.saturating_add(1).max(*asked);
            let end = end(layer);
            if offset >= end {
                return Ok((Decision::PastEnd(index), len));
            }
            match ask(layer, len.min(end - offset))? {
                LayerAnswer::Here(answer, run) => return Ok((Decision::By(index, answer), run)),
                LayerAnswer::Below(run) => len = run,
            }
        }
        Ok((Decision::Nobody, len))
    }

    /// Fills the beginning of `buf`, as far as one layer decides it. Returns the number of bytes
    /// (at least one). For `asked` see [`Chain::decide`].
    fn read_run(&self, at: u64, buf: &mut [u8], asked: &mut usize) -> Result<usize> {
        let run = (at, buf.len() as u64);
        let (decision, len) = self.decide(usize::MAX, run, Layer::size, asked, |layer, len| {
            layer.read(at, &mut buf[..len as usize])
        })?;
        let len = len as usize;
        if !matches!(decision, Decision::By(..)) {
            buf[..len].fill(0);
        }
        Ok(len)
    }

    /// Whether a layer is a remote file.
    pub(crate) fn has_remote(&self) -> bool {
        self.layers.iter().any(|layer| layer.pin().is_some())
    }

    /// Whether a remote layer has tables.
    pub(crate) fn has_remote_tables(&self) -> bool {
        self.layers.iter().any(|layer| layer.pin().is_some() && !layer.is_raw())
    }

    /// Takes back what [`Chain::will_need`] has said.
    pub(crate) fn need_no_more(&self) {
        self.layers.iter().for_each(|layer| layer.need_no_more());
    }

    /// Says that the overlay holds the range. Layers that are kept nowhere free it.
    pub(crate) fn done(&self, offset: u64, len: u64) {
        self.layers.iter().for_each(|layer| layer.done(offset, len));
    }

    /// Says that a stream over the first `depth` layers will soon read the range. Remote layers
    /// begin to fetch it. Errors are left to the read.
    pub(crate) fn will_need(&self, depth: usize, range: Range<u64>, need: Need) {
        let (mut offset, mut len) = (range.start, range.end.saturating_sub(range.start));
        while len > 0 {
            let decided = self.decide(depth, (offset, len), Layer::size, &mut 0, |layer, len| {
                layer.will_need(offset, len, need)
            });
            let Ok((_, run)) = decided else { return };
            offset += run;
            len -= run;
        }
    }

    /// What the first `depth` layers hold at `offset`, and for how many bytes, at most `max` (> 0).
    ///
    /// Where these are all layers, zeros and ranges that no layer holds are one answer,
    /// [`Content::Unallocated`]: no lower layer can become visible. The same holds beyond the end
    /// of the last layer of the chain. Beyond the end of another layer the answer is
    /// [`Content::Zero`]: the guest sees zeros there, and an overlay that left them unallocated
    /// would show the lower layer once a stream has removed the shorter one.
    ///
    /// # Errors
    /// I/O errors, corruption; EIO if a layer that was asked has changed since it was opened.
    pub fn content(&self, depth: usize, offset: u64, max: u64) -> Result<(Content, u64)> {
        let mut asked = 0;
        let content = self.content_asking(depth, offset, max, &mut asked);
        self.proven(asked, content)
    }

    /// As [`Chain::content`], without the check for changed layers. The caller calls
    /// [`Chain::unchanged`] once, at the end of its walk.
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub(crate) fn content_unproven(
        &self,
        depth: usize,
        offset: u64,
        max: u64,
    ) -> Result<(Content, u64)> {
        self.content_asking(depth, offset, max, &mut 0)
    }

    fn content_asking(
        &self,
        depth: usize,
        offset: u64,
        max: u64,
        asked: &mut usize,
    ) -> Result<(Content, u64)> {
        let (decision, len) =
            self.decide(depth, (offset, max), Layer::size, asked, |layer, len| {
                layer.content(offset, len)
            })?;
        let content = match decision {
            Decision::By(_, Content::Zero) if depth >= self.layers.len() => Content::Unallocated,
            Decision::By(_, content) => content,
            Decision::PastEnd(index)
                if index + 1 < self.layers.len() && depth < self.layers.len() =>
            {
                Content::Zero
            }
            Decision::PastEnd(_) | Decision::Nobody => Content::Unallocated,
        };
        Ok((content, len))
    }

    /// Finds the raw layer whose blocks can be shared: at the same offset of its file, they are
    /// what the first `depth` layers hold at `offset`. Returns it with the number of bytes, at most
    /// `max` (> 0), to which that applies.
    ///
    /// `None` if the bytes must be read. Blocks of a qcow2 image are not shared, and there are no
    /// blocks beyond the end of a file. A layer that has refused once is not asked again. The
    /// caller checks after the clone that the layers are unchanged ([`Chain::unchanged`]).
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub(crate) fn cloneable(
        &self,
        depth: usize,
        offset: u64,
        max: u64,
    ) -> Result<(Option<Cloneable<'_>>, u64)> {
        let (decision, len) =
            self.decide(depth, (offset, max), Layer::size, &mut 0, |layer, len| {
                layer.cloneable(offset, len)
            })?;
        Ok((if let Decision::By(_, cloneable) = decision { cloneable } else { None }, len))
    }
}
