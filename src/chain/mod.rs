//! What lies below the overlay, read-only by type.
//!
//! ```text
//! overlay ──▶ layer 0 (qcow2) ──▶ layer 1 (qcow2) ──▶ … ──▶ layer n-1 (qcow2 or raw)
//!             first asked          asked for what layer 0 leaves unallocated
//! ```
//! A layer that is shorter than the disk reads as zeros past its end, and what lies below it there is *not* seen.
//!
//! **Touches:** `image::ImageReader`, `storage`. **Never:** writes anything; guesses a format; opens a file but through the [`Gate`].
//! **Locks:** a leaf for each layer, never across I/O (host file locks are taken by `storage`).
//! **Invariants:** the list of layers does not change after [`Chain::open`]; no file is in it twice; at most
//! [`MAX_LAYERS`]; walks are loops, so depth costs no stack. No byte and no fact of a layer leaves
//! [`Chain`] unless the file's size and time of change, asked after the read, are those of the open
//! (P9, P10): a base that is overwritten in place is an error, not a mix of two files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::{BackingFormat, BackingReference, Qcow2Facts, printable};
use crate::mutants::{Step, without};
use crate::storage::Ask;
use crate::{Error, ErrorKind, Result};

mod gate;
mod layer;
mod located;
mod roots;
#[cfg(test)]
mod tests;

pub use gate::{Gate, Namer, explain};
use layer::Answer;
pub use layer::Cloneable;
use layer::Layer;
pub use located::Located;
pub use roots::Roots;

/// The longest chain that is opened. QEMU has no limit, cloud-hypervisor 10; longer ones are a loop or an accident.
pub const MAX_LAYERS: usize = 16;

/// L1 tables of all layers together, bytes: they stay in memory, whatever the sparse files of a hostile chain claim (data-safety 3.4).
const MAX_L1_BYTES: u64 = 256 << 20;

/// What a range of the chain holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Content {
    /// Bytes that must be read.
    Data,
    /// Zeros, known without reading.
    Zero,
    /// No layer that was looked at holds anything: the layer below those decides, or it is zeros where there is none.
    Unallocated,
}

/// Facts of one layer, for people and for QMP.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// Name as it stands in the header of the image above.
    pub reference: BackingReference,
    /// The file that was opened.
    pub path: PathBuf,
    /// Its format.
    pub format: BackingFormat,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes it occupies on the host.
    pub allocated_size: u64,
    /// Cluster size in bytes, for qcow2.
    pub cluster_size: Option<u64>,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Facts>,
    /// Device and inode of a file that was opened by name.
    pub identity: Option<(u64, u64)>,
    /// Bytes of the file, with whatever is not the guest's.
    pub file_size: u64,
    /// It is a block device.
    pub block_device: bool,
    /// The file has no name any more: its bytes go when the last process closes it.
    pub deleted: bool,
    /// The file was changed since it was opened: what is decided by it is an error.
    pub changed: bool,
}

/// The backing files, top first; immutable after open, at most [`MAX_LAYERS`].
#[derive(Debug)]
pub struct Chain {
    /// Shared with the shorter chain that [`Chain::below`] makes.
    layers: Vec<Arc<Layer>>,
}

/// Opens `base` as an image in `directory` would have it opened, with all that lies below it, tells its virtual size in bytes, and closes
/// everything again: for a new overlay.
///
/// # Errors
/// As [`Chain::open`].
pub fn base_size(base: &BackingReference, directory: &Path) -> Result<u64> {
    Ok(Chain::open(base, Namer::User { directory }, &Gate::default())?.size())
}

impl Chain {
    /// Opens the whole chain that `namer` names: every file read-only and locked against writers.
    ///
    /// # Errors
    /// [`ErrorKind::UnsupportedFeature`] and [`ErrorKind::InvalidArgument`] for names and formats that the [`Gate`] does not let pass,
    /// files that are in the chain already, and more than [`MAX_LAYERS`] layers; whatever `storage` and `image` say of the files.
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
            next = layer.backing();
            layers.push(Arc::new(layer));
        }
        Ok(Chain { layers })
    }

    /// A chain of one raw layer, whatever that is made of.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn of_raw(storage: Arc<dyn crate::storage::Storage>) -> Chain {
        Chain { layers: vec![Arc::new(Layer::of_raw(storage))] }
    }

    /// A chain of a qcow2 layer above a raw one.
    #[cfg(test)]
    pub(crate) fn of_two(qcow2: Arc<dyn crate::storage::Storage>, raw: Arc<dyn crate::storage::Storage>) -> Result<Chain> {
        Ok(Chain { layers: vec![Arc::new(Layer::of_qcow2(qcow2)?), Arc::new(Layer::of_raw(raw))] })
    }

    /// Virtual size in bytes of the first layer.
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.size())
    }

    /// The layers, top first.
    pub fn layers(&self) -> Vec<LayerInfo> {
        self.layers.iter().map(|layer| layer.info()).collect()
    }

    /// (device, inode) of the file of the layer at `depth`; `None` where there is none.
    pub fn identity(&self, depth: usize) -> Option<(u64, u64)> {
        self.layers.get(depth)?.identity()
    }

    /// What the files were like when they were opened, top first, each in brackets: changes with every change of any of them.
    pub fn versions(&self) -> String {
        self.layers.iter().map(|layer| format!("[{}]", layer.version())).collect()
    }

    /// The chain that is left when the first `depth` layers go; `None` where nothing is left. The files stay open as they are.
    pub fn below(&self, depth: usize) -> Option<Chain> {
        let rest = self.layers.get(depth..).filter(|rest| !rest.is_empty())?;
        Some(Chain { layers: rest.to_vec() })
    }

    /// That the files of the first `depth` layers are what they were when they were opened.
    ///
    /// # Errors
    /// EIO, with the name of the first file that was changed.
    pub fn unchanged(&self, depth: usize, ask: Ask) -> Result<()> {
        self.layers.iter().take(depth).try_for_each(|layer| layer.unchanged(ask))
    }

    /// The last step of everything that is found out here: it is what the first `asked` layers say,
    /// and none of them was changed meanwhile.
    fn proven<T>(&self, asked: usize, found: Result<T>) -> Result<T> {
        if !without(Step::LayersUnchangedBeforePublish) {
            // Before the error: where a file was changed, that is what is wrong.
            self.unchanged(asked, Ask::AsStat)?;
        }
        found
    }

    /// Fills `buf` from `offset`; zeros past the end of a layer (and then not what lies below it).
    ///
    /// # Errors
    /// I/O, corruption; EIO where a layer that was asked has been changed since it was opened.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (mut done, mut asked) = (0, 0);
        let mut read = Ok(());
        while done < buf.len() && read.is_ok() {
            read = self.read_run(offset + done as u64, &mut buf[done..], &mut asked).map(|len| done += len);
        }
        self.proven(asked, read)
    }

    /// Whether [`Chain::read_cached`] may ever fill anything: nobody else should go to the trouble of asking.
    pub fn has_cached(&self) -> bool {
        self.layers.first().is_some_and(|layer| layer.is_raw())
    }

    /// As [`Chain::read`], if that takes no waiting: the uppermost layer is a raw file, and the host has the bytes in memory. Says whether `buf` is filled.
    pub fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        let unchanged = |layer: &Layer| without(Step::LayersUnchangedBeforePublish) || layer.unchanged(Ask::Known).is_ok();
        self.layers.first().is_some_and(|layer| layer.read_cached(offset, buf) && unchanged(layer))
    }

    /// Fills the beginning of `buf`, as far as one layer decides; says how far (at least one byte).
    /// Raises `asked` to the number of layers that had a part in that.
    fn read_run(&self, at: u64, buf: &mut [u8], asked: &mut usize) -> Result<usize> {
        let mut len = buf.len();
        for (index, layer) in self.layers.iter().enumerate() {
            *asked = index.saturating_add(1).max(*asked);
            if at >= layer.size() {
                break;
            }
            len = (layer.size() - at).min(len as u64) as usize;
            match layer.read(at, &mut buf[..len])? {
                Answer::Here(read) => return Ok(read),
                Answer::Below(run) => len = run as usize,
            }
        }
        buf[..len].fill(0);
        Ok(len)
    }

    /// What the first `depth` layers hold at `offset`, and for how many bytes, at most `max` (> 0).
    ///
    /// Past the end of a layer there are two answers. Where another layer lies below it, within `depth` or not, it is [`Content::Zero`]:
    /// the guest sees zeros there, and an overlay that left them unallocated would show the lower layer once a stream has cut the shorter
    /// one out. Past the end of the last layer of the chain it is [`Content::Unallocated`]: nothing can ever shine through.
    ///
    /// # Errors
    /// I/O, corruption; EIO where a layer that was asked has been changed since it was opened.
    pub fn content(&self, depth: usize, offset: u64, max: u64) -> Result<(Content, u64)> {
        let mut asked = 0;
        let content = self.content_asking(depth, offset, max, &mut asked);
        self.proven(asked, content)
    }

    /// As [`Chain::content`], for a walk that asks [`Chain::unchanged`] once, at its end.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn content_unproven(&self, depth: usize, offset: u64, max: u64) -> Result<(Content, u64)> {
        self.content_asking(depth, offset, max, &mut 0)
    }

    fn content_asking(&self, depth: usize, offset: u64, max: u64, asked: &mut usize) -> Result<(Content, u64)> {
        let mut len = max;
        for (index, layer) in self.layers.iter().enumerate().take(depth) {
            *asked = index + 1;
            if offset >= layer.size() {
                let last = index + 1 == self.layers.len();
                return Ok((if last { Content::Unallocated } else { Content::Zero }, len));
            }
            match layer.content(offset, len.min(layer.size() - offset))? {
                Answer::Here(answer) => return Ok(answer),
                Answer::Below(run) => len = run,
            }
        }
        Ok((Content::Unallocated, len))
    }

    /// Whose blocks, at the same offset of a raw file, are what the first `depth` layers hold at
    /// `offset`, and for how many bytes, at most `max` (> 0). `None` where the bytes have to be
    /// read: blocks of a qcow2 image are not shared, those past the end of a file are not there,
    /// and a layer that has refused once is not asked again. Whether the layers are unchanged is
    /// asked after the clone ([`Chain::unchanged`]).
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn cloneable(&self, depth: usize, offset: u64, max: u64) -> Result<(Option<Cloneable<'_>>, u64)> {
        let mut len = max;
        for layer in self.layers.iter().take(depth) {
            if offset >= layer.size() {
                break;
            }
            match layer.cloneable(offset, len.min(layer.size() - offset))? {
                Answer::Here(answer) => return Ok(answer),
                Answer::Below(run) => len = run,
            }
        }
        Ok((None, len))
    }
}
