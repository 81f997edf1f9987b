//! Iteration over the mapping of a range, run by run.

use std::ops::Range;

use super::Disk;
use host::Result;
use qcow2::format::Mapping;
use qcow2::image::Extent;

/// A run of guest bytes with one mapping.
#[derive(Debug)]
pub(super) struct MappedRun {
    /// Guest byte range, not empty.
    pub range: Range<u64>,
    /// The overlay's mapping of the run.
    pub extent: Extent,
}

impl MappedRun {
    /// The kind of the overlay's mapping.
    pub fn mapping(&self) -> Mapping {
        self.extent.mapping
    }

    /// The bytes of the run in `data`, which begins at guest offset `offset`.
    pub fn of<'a>(&self, data: &'a [u8], offset: u64) -> &'a [u8] {
        &data[(self.range.start - offset) as usize..(self.range.end - offset) as usize]
    }

    /// The bytes of the run in `buf`, which begins at guest offset `offset`.
    pub fn of_mut<'a>(&self, buf: &'a mut [u8], offset: u64) -> &'a mut [u8] {
        &mut buf[(self.range.start - offset) as usize..(self.range.end - offset) as usize]
    }
}

/// Iterator of [`Disk::runs`].
#[derive(Debug)]
pub(super) struct Runs<'a> {
    disk: &'a Disk,
    rest: Range<u64>,
}

impl Disk {
    /// Iterates over the runs of `range`, in guest order and without gaps. The range must lie
    /// inside the disk.
    ///
    /// Each run is mapped when the iterator reaches it. The mapping is valid as long as the range
    /// is held, and a hint otherwise. The iterator ends after an error.
    pub(super) fn runs(&self, range: Range<u64>) -> Runs<'_> {
        Runs { disk: self, rest: range }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<MappedRun>;

    fn next(&mut self) -> Option<Result<MappedRun>> {
        if self.rest.is_empty() {
            return None;
        }
        let at = self.rest.start;
        let run = self
            .disk
            .map(at, self.rest.end - at)
            .map(|extent| MappedRun { range: at..at + extent.len, extent });
        self.rest.start = run.as_ref().map_or(self.rest.end, |run| run.range.end);
        Some(run)
    }
}
