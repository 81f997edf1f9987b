//! Detaching layers from the backing chain at the end of a stream.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::Disk;
use super::runs::MappedRun;
use crate::chain::{Chain, Content};
use host::background::Unmarked;
use host::mutants::{Step, without};
use host::storage::Ask;
use host::{Error, ErrorKind, Result};
use qcow2::format::{BackingReference, Mapping};

/// Largest number of verification rounds before the disk is drained. Each round checks the tables
/// that changed during the round before. Rounds end early when at most [`LOOKED_AT_UNDER_DRAIN`]
/// tables have changed, because the rest is checked while the guest waits.
const MOST_LOOKS: u32 = 8;
/// Number of L2 tables that may be left to check under the drain, a few milliseconds if they must
/// be read again. See [`MOST_LOOKS`].
const LOOKED_AT_UNDER_DRAIN: usize = 16;

impl Disk {
    /// Length in bytes of a stream of the first `depth` backing layers: the virtual size, or 0 if
    /// there is nothing to copy.
    pub fn stream_len(&self, depth: usize) -> u64 {
        if depth > 0 && self.chain().is_some() { self.size() } else { 0 }
    }

    /// Detaches the first `depth` layers from the chain, durably (R12). If these are all layers,
    /// the backing link is removed from the header.
    ///
    /// Every cluster is checked first. Then the disk is drained and flushed, and the clusters that
    /// have changed since are checked again. One small write between two barriers changes the
    /// header. Finally the files of the layers are released.
    ///
    /// Everything that those layers hold must have been populated. `backing_file` is the name to
    /// write for the remaining chain instead of its current name; it is not checked (neither does
    /// QEMU check it).
    ///
    /// # Errors
    /// I/O errors; [`ErrorKind::InvalidArgument`] if something was not populated or the new name
    /// does not fit. The old link is then unchanged.
    pub fn detach_backing(&self, depth: usize, backing_file: Option<&str>) -> Result<()> {
        let image = self.image()?;
        let Some(chain) = self.chain() else { return Ok(()) };
        if depth == 0 && backing_file.is_none() {
            return Ok(());
        }
        self.is_about_to_detach(&chain);
        // Guests wait for the drain below, and for locks of the flush under it.
        let _unmarked = Unmarked::new();
        // Most of the work is done before the guest has to wait. This includes asking a file server
        // for the version of a layer, so that a server that hangs delays no guest request.
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
        let _drained = self.in_flight.exclusive(if without(Step::DrainBeforeDetach) {
            0..0
        } else {
            0..u64::MAX
        });
        if !without(Step::FlushBeforeDetach) && !without(Step::FlushUnderDrain) {
            image.flush()?;
        }
        if !without(Step::VerifyChangesBeforeDetach) {
            // The range that was added by growing has not been checked yet, whether it was changed
            // or not.
            let mut changed = changes.take();
            changed.push(looked_at..self.size());
            self.verify_covered(&chain, depth, changed)?;
        }
        if !without(Step::LayersUnchangedUnderDrain) {
            chain.unchanged(usize::MAX, Ask::AsStat)?;
        }
        let rest = chain.below(depth);
        let reference =
            rest.as_ref().map(|rest| self.reference_to(&chain, depth, rest, backing_file));
        image.set_backing(reference.as_ref())?;
        *self.backing.write() = rest.map(Arc::new);
        self.statistics_cache.forget();
        Ok(())
    }

    /// The backing reference for the layer at `depth`. Uses the name from the chain if it is
    /// absolute or relative to the overlay's directory, and the path or the URL of the layer's file
    /// otherwise.
    fn reference_to(
        &self,
        chain: &Chain,
        depth: usize,
        rest: &Chain,
        backing_file: Option<&str>,
    ) -> BackingReference {
        let layers = chain.layers();
        let base = &rest.layers()[0];
        let above = depth.checked_sub(1).map_or(&self.path, |above| &layers[above].path);
        let name = match backing_file {
            Some(name) => name.to_string(),
            None if above.parent() == self.path.parent()
                || Path::new(&base.reference.name).is_absolute() =>
            {
                base.reference.name.clone()
            }
            None => chain.full_name(depth).unwrap_or_else(|| base.reference.name.clone()),
        };
        BackingReference { name, format: Some(base.format) }
    }

    /// Checks that the overlay holds everything in `ranges` that the first `depth` layers hold. The
    /// parts of `ranges` beyond the end of the disk are ignored.
    fn verify_covered(
        &self,
        chain: &Chain,
        depth: usize,
        ranges: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<()> {
        for range in ranges {
            if let Some(missing) = self.first_missing(chain, depth, range)?
                && !without(Step::VerifyBeforeDetach)
            {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("offset {missing} still comes from the backing file"),
                ));
            }
        }
        Ok(())
    }

    /// The first guest offset of a range that the first `depth` layers hold and the overlay does
    /// not.
    fn first_missing(&self, chain: &Chain, depth: usize, range: Range<u64>) -> Result<Option<u64>> {
        let size = self.size();
        let size = size
            - if without(Step::VerifyTheLastCluster) {
                1 + (size - 1) % self.cluster_size()
            } else {
                0
            };
        let end = range.end.min(size);
        for run in self.runs(range.start..end) {
            let MappedRun { mut range, extent } = run?;
            // Whether the layers are unchanged is checked once, at the end.
            while extent.mapping == Mapping::Unallocated && !range.is_empty() {
                match chain.content_unproven(depth, range.start, range.end - range.start)? {
                    (Content::Unallocated, len) => range.start += len,
                    (Content::Data | Content::Zero, _) => return Ok(Some(range.start)),
                }
            }
        }
        Ok(None)
    }
}
