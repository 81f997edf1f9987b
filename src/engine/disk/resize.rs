//! Growing a disk.

use std::ops::Range;

use super::Disk;
use super::write::ZERO_PIECE;
use host::Result;
use host::mutants::{Step, without};
use qcow2::format::{GuestOffset, Mapping};
use qcow2::image::Image;
use qcow2::range_lock::Exclusive;

impl Disk {
    /// Grows the virtual size to `size` bytes, durably. The new range reads as zero even where a
    /// backing file is longer (H18).
    ///
    /// The new range is made zero before the size changes, so that no request ever sees other
    /// bytes, not even after a crash.
    ///
    /// # Errors
    /// [`host::ErrorKind::InvalidArgument`] for a size that is smaller, too large, or no multiple
    /// of 512; a read-only disk; I/O errors.
    pub fn grow(&self, size: u64) -> Result<()> {
        let image = self.image()?;
        let drained = self.in_flight.exclusive(0..u64::MAX);
        let before = self.size();
        image.make_room(&drained, size)?;
        if size > before {
            if !without(Step::CleanEndBeforeGrow) {
                self.clean_end(image, &drained)?;
            }
            let shown = self.chain().map_or(0, |chain| chain.size()).min(size);
            let shown = if without(Step::HideBelowBeforeGrow) { before } else { shown };
            let geometry = self.geometry();
            let beyond = self.aligned(&(before.next_multiple_of(self.cluster_size())..size));
            // The subclusters of the last cluster that lie beyond the end.
            let last = before.next_multiple_of(geometry.subcluster_size())..beyond.start;
            if !last.is_empty() {
                self.hide(image, &drained, last)?;
            }
            self.hide(image, &drained, self.aligned(&(beyond.start..shown)))?;
            // Clusters that another program left beyond the end must not become visible either.
            let mut rest =
                geometry.clusters(&(beyond.start.max(self.aligned(&(0..shown)).end)..beyond.end));
            while let Some(mapped) = image.first_mapped(rest.clone())? {
                let hidden = geometry.guest_range(&geometry.subclusters_in(&mapped));
                self.hide(image, &drained, hidden)?;
                rest.start = mapped.end;
            }
        }
        image.set_size(&drained, size)
    }

    /// Makes the part of the last subcluster beyond the end of the disk zero. A compressed cluster
    /// is stored again as a whole.
    ///
    /// Another program may have left data there (H19): QEMU copies up whole clusters, and keeps the
    /// bytes that it cuts off when it shrinks a disk. The layers below may also hold more bytes
    /// than the guest has seen.
    fn clean_end(&self, image: &Image, drained: &Exclusive<'_>) -> Result<()> {
        let (size, geometry) = (self.size(), self.geometry());
        if size.is_multiple_of(geometry.cluster_size()) {
            return Ok(());
        }
        let unit = match image.map(GuestOffset(size - 1), 1)?.mapping {
            Mapping::Compressed { .. } => geometry.cluster_size(),
            _ => geometry.subcluster_size(),
        };
        let start = size - size % unit;
        if start == size {
            return Ok(());
        }
        match image.map(GuestOffset(start), 1)?.mapping {
            Mapping::Zero { .. } => return Ok(()),
            Mapping::Unallocated if self.chain_below(start).is_none() => return Ok(()),
            _ => {}
        }
        let mut bytes = vec![0; unit as usize];
        self.read_through(start, &mut bytes[..(size - start) as usize])?;
        image.store(drained, geometry.guest_subcluster(GuestOffset(start)), &bytes, |_| {})
    }

    /// Makes whole subclusters beyond the end of the disk read as zero.
    fn hide(&self, image: &Image, drained: &Exclusive<'_>, aligned: Range<u64>) -> Result<()> {
        if self.geometry().version() >= 3 {
            return image.discard(drained, self.subclusters(&aligned));
        }
        // Version 2 has no zero clusters: only written zeros hide the layers below.
        let mut at = aligned.start;
        while at < aligned.end {
            let len = ZERO_PIECE.max(self.cluster_size()).min(aligned.end - at);
            image.store(
                drained,
                self.geometry().guest_subcluster(GuestOffset(at)),
                &vec![0; len as usize],
                |_| {},
            )?;
            at += len;
        }
        Ok(())
    }
}
