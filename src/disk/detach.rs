//! The end of a stream: layers are cut off the chain.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::Disk;
use crate::chain::{Chain, Content};
use crate::format::{BackingReference, Mapping};
use crate::mutants::{Step, without};
use crate::storage::Ask;
use crate::{Error, ErrorKind, Result};

/// Before a chain is cut, tables that have changed while all were looked at are looked at again at most so often, and until no more
/// than [`LOOKED_AT_UNDER_DRAIN`] are left for the time in which the guest waits.
const MOST_LOOKS: u32 = 8;
/// See [`MOST_LOOKS`]. L2 tables: a few milliseconds where they must be read again.
const LOOKED_AT_UNDER_DRAIN: usize = 16;

impl Disk {
    /// How long a stream of the first `depth` backing layers is, in bytes: the virtual size, or 0 where there is nothing to copy.
    pub fn stream_len(&self, depth: usize) -> u64 {
        if depth > 0 && self.chain().is_some() { self.size() } else { 0 }
    }

    /// Cuts the first `depth` layers off the chain (all of them: the backing link goes), durably (R12): every cluster is looked at, then the disk is
    /// drained and flushed, what has changed since is looked at again, one small header write between barriers; then the files are released.
    /// Everything those layers held must have been populated.
    /// `backing_file` is the name to write for what remains, in place of the one that the chain uses; it is not looked at (QEMU likewise).
    ///
    /// # Errors
    /// I/O; [`ErrorKind::InvalidArgument`] where something was not populated or the new name does not fit. The old link then still stands.
    pub fn detach_backing(&self, depth: usize, backing_file: Option<&str>) -> Result<()> {
        let image = self.image()?;
        let Some(chain) = self.chain() else { return Ok(()) };
        if depth == 0 && backing_file.is_none() {
            return Ok(());
        }
        // Most of the work before the guest has to wait. To ask a server is part of it: one that
        // hangs should hang nobody else.
        if !without(Step::LayersAskedBeforeDetach) {
            chain.unchanged(usize::MAX, Ask::Anew)?;
        }
        if !without(Step::FlushBeforeDetach) {
            image.flush()?;
        }
        let changes = image.watch_changes();
        let looked_at = self.size();
        self.verify_covered(&chain, depth, std::iter::once(0..looked_at))?;
        for _ in 0..MOST_LOOKS {
            let changed = changes.take();
            let few = changed.len() <= LOOKED_AT_UNDER_DRAIN;
            self.verify_covered(&chain, depth, changed)?;
            if few {
                break;
            }
        }
        let _drained = self.in_flight.exclusive(if without(Step::DrainBeforeDetach) { 0..0 } else { 0..u64::MAX });
        if !without(Step::FlushBeforeDetach) && !without(Step::FlushUnderDrain) {
            image.flush()?;
        }
        if !without(Step::VerifyChangesBeforeDetach) {
            // What was added by growing has not been looked at, changed or not.
            let mut changed = changes.take();
            changed.push(looked_at..self.size());
            self.verify_covered(&chain, depth, changed)?;
        }
        if !without(Step::LayersUnchangedUnderDrain) {
            chain.unchanged(usize::MAX, Ask::AsStat)?;
        }
        let rest = chain.below(depth);
        let reference = rest.as_ref().map(|rest| self.reference_to(&chain, depth, rest, backing_file));
        image.set_backing(reference.as_ref())?;
        *self.backing.write() = rest.map(Arc::new);
        self.surveys.forget();
        Ok(())
    }

    /// What the header is to say of the layer at `depth`: the name that the chain itself uses, as long as that is relative to the same directory.
    fn reference_to(&self, chain: &Chain, depth: usize, rest: &Chain, backing_file: Option<&str>) -> BackingReference {
        let layers = chain.layers();
        let base = &rest.layers()[0];
        let above = depth.checked_sub(1).map_or(&self.path, |above| &layers[above].path);
        let name = match backing_file {
            Some(name) => name.to_string(),
            None if above.parent() == self.path.parent() || Path::new(&base.reference.name).is_absolute() => base.reference.name.clone(),
            None => base.path.display().to_string(),
        };
        BackingReference { name, format: Some(base.format) }
    }

    /// That the overlay holds everything in `ranges`, as far as they are inside the disk, that the first `depth` layers hold.
    fn verify_covered(&self, chain: &Chain, depth: usize, ranges: impl IntoIterator<Item = Range<u64>>) -> Result<()> {
        for range in ranges {
            if let Some(missing) = self.first_missing(chain, depth, range)?
                && !without(Step::VerifyBeforeDetach)
            {
                return Err(Error::new(ErrorKind::InvalidArgument, format!("offset {missing} still comes from the backing file")));
            }
        }
        Ok(())
    }

    /// The first guest offset of a range that the first `depth` layers hold and the overlay does not.
    fn first_missing(&self, chain: &Chain, depth: usize, range: Range<u64>) -> Result<Option<u64>> {
        let size = self.size();
        let size = size - if without(Step::VerifyTheLastCluster) { 1 + (size - 1) % self.cluster_size() } else { 0 };
        let end = range.end.min(size);
        let mut at = range.start;
        while at < end {
            let extent = self.map(at, end - at)?;
            if extent.mapping != Mapping::Unallocated {
                at += extent.len;
                continue;
            }
            // That the layers are unchanged is asked once, at the end.
            match chain.content_unproven(depth, at, extent.len)? {
                (Content::Unallocated, len) => at += len,
                (Content::Data | Content::Zero, _) => return Ok(Some(at)),
            }
        }
        Ok(None)
    }
}
