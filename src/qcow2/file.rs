//! A qcow2 image as a disk: bytes at guest offsets, for a virtual machine monitor or a tool.
//!
//! ```text
//! read   shared(range); per run: data, zeros, or the content below
//! write  shared(range): overwrite while the clusters belong to this image alone
//!        else exclusive(cluster or run of clusters); map again; allocate, fill, publish
//! zero, discard   partial clusters by writing; whole clusters by their mapping, exclusive
//! ```
//! **Touches:** [`crate::image`], [`crate::range_lock`]. **Never:** opens a backing file, copies up
//! what it reads, starts a thread.
//! **Locks:** one guard of rank [`host::sync::rank::RANGE`] at a time, and the locks of lower rank
//! that `image` takes.
//! **Invariants:** I1, I3: each change of a mapping is allocate, fill, publish under an exclusive
//! guard of its clusters.

use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::Receiver;

use crate::format::{BackingReference, FormatError, Geometry, GuestOffset, Mapping, NewImage};
use crate::image::{CheckReport, Image, ImageReader, LeakSearch, check, distrust};
use crate::range_lock::{Exclusive, RangeLock};
use host::storage::{Sidecar, Storage, WriteKind};
use host::zeros::resident_zeros;
use host::{Error, ErrorKind, Result};

/// Version of new images. Version 3 has zero clusters.
const VERSION: u32 = 3;
/// log2 of the refcount width: 16 bits, QEMU's default.
const REFCOUNT_ORDER: u32 = 4;
/// Disk sizes are multiples of this many bytes; others are rounded up, as qemu-img does.
const GUEST_SECTOR: u64 = 512;
/// Most bytes that an allocating write, or zeroing by writing, locks at a time, unless one cluster
/// is larger. The limit bounds how long other requests wait.
const PIECE: u64 = 1 << 20;
/// Most bytes that zeroing or discarding by mapping locks at a time.
const ZERO_HOLD: u64 = 1 << 30;

/// The content of the backing file, which a disk shows where its image has no cluster. The trait
/// has no write method.
pub trait Below: Send + Sync + std::fmt::Debug {
    /// Returns the length in bytes. Beyond it the disk reads as zero. It must not change while the
    /// disk is open.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`. The caller asks for no bytes beyond [`Below::size`].
    ///
    /// The caller holds a range guard of the disk. During a read, writes to the same bytes wait for
    /// this call; during a write that completes a cluster, all requests for that cluster wait. The
    /// method must not take a range guard itself, so [`Qcow2`] does not implement this trait. For a
    /// qcow2 image below, which no program may write meanwhile, use [`ImageReader`].
    ///
    /// # Errors
    /// Any; the request that needs the bytes fails with it.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
}

/// For an image without a backing file. If the image has one and a cluster is unallocated, the read
/// fails with [`ErrorKind::UnsupportedFeature`].
impl Below for ImageReader {
    fn size(&self) -> u64 {
        self.geometry().size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = GuestOffset(offset + done as u64);
            let extent = self.map(at, (buf.len() - done) as u64)?;
            if extent.mapping == Mapping::Unallocated
                && let Some(BackingReference { name, .. }) = self.backing()
            {
                return Err(Error::new(
                    ErrorKind::UnsupportedFeature,
                    format!("the image below needs its backing file \"{name}\""),
                ));
            }
            self.read_extent(at, &extent, &mut buf[done..done + extent.len as usize])?;
            done += extent.len as usize;
        }
        Ok(())
    }
}

/// A qcow2 image that is open for reading and writing. All offsets and lengths are bytes of the
/// guest's disk and need no alignment. Ranges must lie inside [`Qcow2::size`]
/// ([`ErrorKind::InvalidArgument`] otherwise). Every method may be called from any thread.
///
/// * A change is durable when a later [`Qcow2::flush`] has returned, and not before, as on a disk
///   with a volatile write cache.
/// * After a crash or a loss of power the image has no corruption. It holds everything that was
///   flushed, and any part or nothing of each later write. Host clusters may be leaked. The next
///   [`Qcow2::open`] finds and frees them if the storage keeps the mark of an open image, as files
///   do.
/// * A value that is dropped without [`Qcow2::close`] leaves the image as a crash does.
/// * After a failed barrier, or once a table is found to be corrupt, nothing is written any more:
///   see [`Qcow2::is_usable`].
#[derive(Debug)]
pub struct Qcow2 {
    image: Image,
    below: Option<Box<dyn Below>>,
    ranges: RangeLock,
    commit_wanted: Receiver<()>,
}

/// What happens to the host clusters of a range that is made to read as zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum ClusterRelease {
    Keep,
    GiveBack,
}

impl Qcow2 {
    /// Creates an empty image of `size` bytes (rounded up to 512) in an empty storage, durably, and
    /// opens it. The image has version 3 and no backing file; `cluster_size` is a power of two from
    /// 512 to 2 MiB, QEMU's default is 65536. The header is written last, so that a crash leaves a
    /// complete image or none.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a storage that is not empty, and for sizes that the
    /// format does not allow; I/O.
    pub fn create<F: Storage + Sidecar>(
        storage: Arc<F>,
        size: u64,
        cluster_size: u64,
    ) -> Result<Qcow2> {
        Qcow2::create_as(storage, size, cluster_size, Ok)
    }

    /// Creates an image as [`Qcow2::create`] does, with extended L2 entries: each of the 32
    /// subclusters of a cluster has a mapping of its own. QEMU reads such images since version 5.2.
    ///
    /// # Errors
    /// As [`Qcow2::create`]; [`ErrorKind::InvalidArgument`] for clusters of less than 16 KiB.
    pub fn create_with_subclusters<F: Storage + Sidecar>(
        storage: Arc<F>,
        size: u64,
        cluster_size: u64,
    ) -> Result<Qcow2> {
        Qcow2::create_as(storage, size, cluster_size, Geometry::with_extended_l2)
    }

    fn create_as<F: Storage + Sidecar>(
        storage: Arc<F>,
        size: u64,
        cluster_size: u64,
        kind: impl FnOnce(Geometry) -> std::result::Result<Geometry, FormatError>,
    ) -> Result<Qcow2> {
        let refused = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
        if storage.size() != 0 {
            return refused(format!(
                "a new image needs an empty file, this one has {} bytes",
                storage.size()
            ));
        }
        if !cluster_size.is_power_of_two() {
            return refused(format!(
                "cluster size {cluster_size} is no power of two from 512 to 2097152 bytes"
            ));
        }
        let Some(size) = size.checked_next_multiple_of(GUEST_SECTOR) else {
            return refused("virtual size is too large".into());
        };
        let layout = Geometry::new(VERSION, cluster_size.ilog2(), REFCOUNT_ORDER, size)
            .and_then(kind)
            .and_then(|geometry| NewImage { geometry, backing: None }.layout())
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "new image", error))?;
        let write = |(at, bytes): &(u64, Vec<u8>)| {
            storage
                .write_at(WriteKind::Header, *at, bytes)
                .map_err(|error| Error::io("new image", error))
        };
        let sync = || storage.sync().map_err(|error| Error::io("new image", error));
        layout.iter().skip(1).try_for_each(write)?;
        sync()?;
        layout.first().map_or(Ok(()), write)?;
        sync()?;
        Qcow2::open(storage)
    }

    /// Opens an image that has no backing file. The caller has locked the storage against other
    /// programs ([`host::storage::FileStorage::open`] does so with QEMU's locks). Frees clusters
    /// that an earlier crash has leaked.
    ///
    /// # Errors
    /// [`ErrorKind::UnsupportedFeature`] if the image names a backing file (see
    /// [`Qcow2::open_above`]), and for images that cannot be written correctly: internal snapshots,
    /// persistent bitmaps, encryption, external data files; [`ErrorKind::InvalidImage`],
    /// [`ErrorKind::Corrupt`]; I/O. An image that is refused is not changed.
    pub fn open<F: Storage + Sidecar>(storage: Arc<F>) -> Result<Qcow2> {
        let image = Image::open(storage)?;
        match image.reader().backing() {
            None => Qcow2::start(image, None),
            Some(BackingReference { name, .. }) => Err(Error::new(
                ErrorKind::UnsupportedFeature,
                format!("the image needs its backing file \"{name}\""),
            )),
        }
    }

    /// Opens an image that names a backing file, as [`Qcow2::open`] does. This crate opens no
    /// backing file: `find` gets the reference from the header, which is only as trustworthy as the
    /// image, and returns the content. Data that is read from below is not copied up.
    ///
    /// # Errors
    /// As [`Qcow2::open`]; the error of `find`; [`ErrorKind::InvalidArgument`] if the image has no
    /// backing file.
    pub fn open_above<F: Storage + Sidecar>(
        storage: Arc<F>,
        find: impl FnOnce(&BackingReference) -> Result<Box<dyn Below>>,
    ) -> Result<Qcow2> {
        let image = Image::open(storage)?;
        let Some(backing) = image.reader().backing() else {
            return Err(Error::new(ErrorKind::InvalidArgument, "the image has no backing file"));
        };
        let below = find(&backing)?;
        Qcow2::start(image, Some(below))
    }

    fn start(image: Image, below: Option<Box<dyn Below>>) -> Result<Qcow2> {
        image.start_writing(LeakSearch::AfterCrash)?;
        let (ranges, commit_wanted) =
            (RangeLock::new(image.reader().geometry().cluster_size()), image.commit_wanted());
        Ok(Qcow2 { image, below, ranges, commit_wanted })
    }

    /// Returns the size of the guest's disk in bytes.
    pub fn size(&self) -> u64 {
        self.geometry().size()
    }

    /// Returns the cluster size in bytes. It is the unit of allocation and the best alignment for
    /// discards.
    pub fn cluster_size(&self) -> u64 {
        self.geometry().cluster_size()
    }

    /// Returns whether the image still accepts writes. Once it is false, all writes and flushes
    /// fail; reads go on.
    pub fn is_usable(&self) -> bool {
        self.image.is_usable()
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// I/O; corrupt tables or compressed data; errors of [`Below`].
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = self.checked(offset, buf.len() as u64)?;
        let _held = self.ranges.shared(range);
        self.read_held(offset, buf)
    }

    /// Writes all of `data` at `offset`. If two overlapping writes run at the same time, each
    /// sector holds the data of either, as on any disk.
    ///
    /// # Errors
    /// I/O, corruption, [`ErrorKind::NoSpace`]; part of the data may be written then.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.checked(offset, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            let (at, rest) = (offset + done as u64, &data[done..]);
            let overwritten = self.overwrite(at, rest)?;
            done += if overwritten > 0 { overwritten } else { self.allocating_write(at, rest)? };
        }
        self.commit_if_wanted()
    }

    /// Makes a range read as zero. In version 3 the host clusters stay reserved for later writes.
    ///
    /// # Errors
    /// As [`Qcow2::write_at`].
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        self.make_zero(range, ClusterRelease::Keep)
    }

    /// Makes a range read as zero, whatever the backing file holds. The host gets the space of
    /// whole clusters back after the next [`Qcow2::flush`].
    ///
    /// # Errors
    /// As [`Qcow2::write_at`].
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        self.make_zero(range, ClusterRelease::GiveBack)
    }

    /// Makes every change durable that had returned before this call. Concurrent calls share the
    /// work.
    ///
    /// # Errors
    /// I/O and [`ErrorKind::NoSpace`]: the next flush writes again what was not written. After a
    /// failed barrier every later flush fails.
    pub fn flush(&self) -> Result<()> {
        self.image.flush()
    }

    /// Makes everything durable, gives unused clusters back, and removes the mark of an open image.
    ///
    /// # Errors
    /// As [`Qcow2::flush`]; data that was flushed before is safe.
    pub fn close(self) -> Result<()> {
        self.image.close()?;
        self.image.end_writing();
        Ok(())
    }

    /// Checks an image that no program has open, as `qemu-img check` does, and returns its
    /// corruptions and leaks. Reads only. The host's cached pages of the file are dropped first, so
    /// that the result describes the bytes on the disk.
    ///
    /// # Errors
    /// I/O; a header that is not that of a qcow2 image; images that are too large to be checked.
    pub fn check(storage: &dyn Storage) -> Result<CheckReport> {
        distrust(storage)?;
        check(storage)
    }

    fn geometry(&self) -> Geometry {
        self.image.reader().geometry()
    }

    fn checked(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(offset..end),
            _ => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{len} bytes at {offset} reach beyond the end of the disk, {size}"),
            )),
        }
    }

    /// Reads bytes; the caller holds a guard of the range.
    fn read_held(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let extent = self.image.map(GuestOffset(at), (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + extent.len as usize];
            done += part.len();
            match (&self.below, extent.mapping) {
                (Some(below), Mapping::Unallocated) => {
                    let here = below.size().saturating_sub(at).min(extent.len) as usize;
                    let (inside, beyond) = part.split_at_mut(here);
                    beyond.fill(0);
                    if here > 0 {
                        below.read_at(at, inside)?;
                    }
                }
                _ => self.image.read_extent(GuestOffset(at), &extent, part)?,
            }
        }
        Ok(())
    }

    /// Overwrites bytes from the start of `data` up to the first cluster whose mapping would have
    /// to change. Returns the number of bytes written.
    fn overwrite(&self, offset: u64, data: &[u8]) -> Result<usize> {
        let _held = self.ranges.shared(offset..offset + data.len() as u64);
        let mut done = 0;
        while done < data.len() {
            let at = GuestOffset(offset + done as u64);
            let extent = self.image.map(at, (data.len() - done) as u64)?;
            if !matches!(extent.mapping, Mapping::Data { in_place: true, .. }) {
                break;
            }
            self.image.write_in_place(at, &extent, &data[done..done + extent.len as usize])?;
            done += extent.len as usize;
        }
        Ok(done)
    }

    /// Writes the start of `data`, at most [`PIECE`] or one cluster, whatever the mapping is.
    /// Returns the number of bytes written.
    fn allocating_write(&self, offset: u64, data: &[u8]) -> Result<usize> {
        let cluster_size = self.cluster_size();
        let in_cluster = offset % cluster_size;
        let whole = (data.len() as u64).min(PIECE.max(cluster_size)) / cluster_size * cluster_size;
        let len = if in_cluster == 0 && whole > 0 {
            whole
        } else {
            (cluster_size - in_cluster).min(data.len() as u64)
        };
        let held = self.ranges.exclusive(self.geometry().aligned(&(offset..offset + len)));
        self.write_held(&held, offset, &data[..len as usize])
    }

    /// Writes the first run of equal mapping of `data`, which is whole clusters or lies inside one.
    /// Returns the number of bytes written.
    fn write_held(&self, held: &Exclusive<'_>, offset: u64, data: &[u8]) -> Result<usize> {
        let at = GuestOffset(offset);
        // Mapped again under the guard: another request may have changed the mapping before the
        // guard was taken.
        let extent = self.image.map(at, data.len() as u64)?;
        let data = &data[..extent.len as usize];
        self.image.write_run(held, at, &extent, data, |offset, buf| self.read_held(offset, buf))?;
        Ok(data.len())
    }

    /// Makes whole subclusters zero by their mapping, and partial ones at the edges by writing. The
    /// range is never rounded outward, except past the end of the disk.
    fn make_zero(&self, range: Range<u64>, hosts: ClusterRelease) -> Result<()> {
        self.checked(range.start, range.end.saturating_sub(range.start))?;
        let last = self.geometry().whole_end(range.end);
        let first = range.start.next_multiple_of(self.geometry().subcluster_size());
        self.write_zero_bytes(range.start..first.min(range.end))?;
        let mut at = first;
        while at < last {
            let end = last.min(at + ZERO_HOLD);
            let held = self.ranges.exclusive(self.geometry().aligned(&(at..end)));
            self.make_subclusters_zero(&held, at..end, hosts)?;
            at = end;
        }
        self.write_zero_bytes(last.max(first).min(range.end)..range.end)?;
        self.commit_if_wanted()
    }

    fn make_subclusters_zero(
        &self,
        held: &Exclusive<'_>,
        aligned: Range<u64>,
        hosts: ClusterRelease,
    ) -> Result<()> {
        let geometry = self.geometry();
        let (version, end) = (geometry.version(), aligned.end.min(geometry.size()));
        let mut at = aligned.start;
        while at < end {
            let extent = self.image.map(GuestOffset(at), end - at)?;
            let run = at..at + extent.len;
            let subclusters = geometry.mapped_with(extent.mapping, &run);
            at = run.end;
            match (extent.mapping, &self.below) {
                // A compressed cluster has one mapping: its other bytes are stored again.
                (Mapping::Compressed { .. }, _) if !geometry.is_whole_clusters(&run) => {
                    self.write_zero_clusters(held, run)?
                }
                // There is no cluster here and no backing file: the run reads as zero already.
                (Mapping::Unallocated, None) => {}
                (_, None) if version < 3 || hosts == ClusterRelease::GiveBack => {
                    self.image.unmap(held, subclusters)?
                }
                _ if version >= 3 && hosts == ClusterRelease::GiveBack => {
                    self.image.discard(held, subclusters)?
                }
                _ if version >= 3 => self.image.zero(held, subclusters)?,
                // Version 2 has no zero clusters: only written zeros hide the content of the
                // backing file.
                _ => self.write_zero_clusters(held, run)?,
            }
        }
        Ok(())
    }

    /// Writes zeros to whole clusters, of which the last may end beyond the end of the disk. The
    /// caller holds an exclusive guard of the range.
    fn write_zero_clusters(&self, held: &Exclusive<'_>, run: Range<u64>) -> Result<()> {
        let cluster_size = self.cluster_size();
        let zeros = resident_zeros(PIECE.max(cluster_size).min(run.end - run.start) as usize);
        let mut at = run.start;
        while at < run.end {
            let len = (run.end - at).min(zeros.len() as u64);
            let len = if len < cluster_size { len } else { len / cluster_size * cluster_size };
            at += self.write_held(held, at, &zeros[..len as usize])? as u64;
        }
        Ok(())
    }

    /// Writes zeros to a part of one subcluster. Writes nothing if the bytes are known to be zero.
    fn write_zero_bytes(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let is_zero = {
            let _held = self.ranges.shared(range.clone());
            match self.image.map(GuestOffset(range.start), 1)?.mapping {
                Mapping::Zero { .. } => true,
                Mapping::Unallocated => {
                    self.below.as_ref().is_none_or(|below| range.start >= below.size())
                }
                _ => false,
            }
        };
        if is_zero {
            Ok(())
        } else {
            self.write_at(range.start, &resident_zeros((range.end - range.start) as usize))
        }
    }

    /// Flushes if a commit is wanted. Without it, a caller that never flushes would let dirty
    /// tables grow without bound, and so the clusters that a crash leaks.
    fn commit_if_wanted(&self) -> Result<()> {
        if self.commit_wanted.try_recv().is_ok() { self.image.flush_if_dirty() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
