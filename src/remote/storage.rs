//! A remote file as the engine reads it: a file of the cache for the bytes that are there, and the
//! line to the fetcher for the others.
//!
//! **Touches:** the file of the cache, the line. **Never:** returns bytes that the map of the cache
//! does not say to be there.
//! **Locks:** one leaf lock, `reader`, held to copy one pointer.
//! **Invariants:** each byte is that of the pinned content, or zero beyond its end.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use host::storage::{BlockStatus, Need, ReadAt};
use host::{Error, ErrorKind, Result};

use crate::cache::CacheReader;
use crate::line::FetcherLine;
use crate::pin::Pin;
use crate::sums::CHUNK;
use crate::url::SourceUrl;
use crate::wire::{FetchReply, FetchRequest};

/// How much longer than the fetcher itself this side waits for it.
const GRACE: Duration = Duration::from_secs(5);

/// How often a range is wanted again that the fetcher says to be in the cache and that is not. Some
/// times are normal: a new fetcher has another file of the cache, or write-back has failed.
const TURNS: u32 = 64;

/// From this turn on a thread rests before the next one.
const RESTS: u32 = 4;

/// How long it rests.
const REST: Duration = Duration::from_millis(20);

/// How the user wants remote files to be read.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// `--source-timeout` with `--on-source-error error`; `None` waits for as long as the source is
    /// away.
    pub patience: Option<Duration>,
    /// `--unpinned`: accept a file without a strong validator.
    pub unpinned: bool,
    /// `--base-digest` of the first backing file: 64 hexadecimal digits.
    pub digest: Option<String>,
}

/// An open remote file.
#[derive(Debug)]
pub struct RemoteFile {
    name: SourceUrl,
    pin: Pin,
    number: u32,
    line: Arc<FetcherLine>,
    patience: Option<Duration>,
    reader: Arc<RwLock<Arc<CacheReader>>>,
    confirmed: Option<Confirmed>,
}

/// The chunks that the fetcher has compared with the chunk list. The map of the cache says only
/// that bytes were written at some time, and those on the disk may be damaged since.
#[derive(Debug)]
struct Confirmed(Vec<AtomicU64>);

impl Confirmed {
    fn new(size: u64) -> Confirmed {
        Confirmed((0..size.div_ceil(CHUNK * 64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn bits(&self, range: &Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        (range.start / CHUNK..range.end.div_ceil(CHUNK)).filter_map(|chunk| {
            Some((self.0.get(usize::try_from(chunk / 64).ok()?)?, 1 << (chunk % 64)))
        })
    }

    fn holds(&self, range: &Range<u64>) -> bool {
        self.bits(range).all(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// How many bytes at `offset`, at most `max`, lie in confirmed chunks.
    fn run(&self, offset: u64, max: u64) -> u64 {
        let (mut at, end) = (offset, offset.saturating_add(max));
        while at < end {
            let chunk_end = (at / CHUNK * CHUNK).saturating_add(CHUNK).min(end);
            if !self.holds(&(at..chunk_end)) {
                break;
            }
            at = chunk_end;
        }
        at - offset
    }

    fn add(&self, range: &Range<u64>) {
        for (word, bit) in self.bits(range) {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }
}

impl RemoteFile {
    /// Opens a remote file. With a pin, no server has to answer.
    ///
    /// # Errors
    /// The failure that the fetcher reports, among them: the file does not exist, it is not the one
    /// that it is pinned to, it has no strong validator; the fetcher cannot be started. The digest
    /// of `options` is not that of the pin.
    pub fn open(
        line: &Arc<FetcherLine>,
        name: &SourceUrl,
        pin: Option<Pin>,
        options: &RemoteOptions,
    ) -> Result<RemoteFile> {
        let pinned = pin.as_ref().and_then(|pin| pin.digest.as_ref());
        if let Some((pinned, given)) = pinned.zip(options.digest.as_ref())
            && pinned != given
        {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{name}: --base-digest contradicts the disk, which was made with sha256:{pinned}: leave it out, or make a new overlay"
                ),
            ));
        }
        let (number, reply, descriptors) =
            line.open(options.patience.map(deadline), |id, file| FetchRequest::Open {
                id,
                file,
                url: name.as_str().to_owned(),
                pin: pin.clone(),
                unpinned: options.unpinned,
                digest: options.digest.clone(),
                patience: options.patience.map(|patience| patience.as_millis() as u64),
            })?;
        let FetchReply::Opened { pin, .. } = reply else {
            return Err(Error::new(
                ErrorKind::Io,
                format!("{name}: the fetcher answered {reply:?}"),
            ));
        };
        let reader = Arc::new(RwLock::new(Arc::new(reader_of(descriptors, &pin)?)));
        let (slot, again) = (Arc::clone(&reader), pin.clone());
        line.on_reopened(
            number,
            Box::new(move |descriptors| {
                *slot.write() = Arc::new(reader_of(descriptors, &again)?);
                Ok(())
            }),
        );
        let confirmed = pin.digest.is_some().then(|| Confirmed::new(pin.size));
        let (name, line, patience) = (name.clone(), Arc::clone(line), options.patience);
        Ok(RemoteFile { name, pin, number, line, patience, reader, confirmed })
    }

    /// The name.
    pub fn name(&self) -> &SourceUrl {
        &self.name
    }

    /// What the file is pinned to.
    pub fn pin(&self) -> &Pin {
        &self.pin
    }

    /// Waits until a range is in the cache; the part beyond the end of the file counts as there.
    ///
    /// # Errors
    /// The failure that the fetcher reports.
    pub fn bring_in(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.inside(offset, len) {
            0 => Ok(()),
            inside => self.bring(offset, inside).map(drop),
        }
    }

    fn reader(&self) -> Arc<CacheReader> {
        Arc::clone(&self.reader.read())
    }

    /// The part of a range that lies inside the file.
    fn inside(&self, offset: u64, len: u64) -> u64 {
        self.pin.size.saturating_sub(offset).min(len)
    }

    /// Makes sure that a range, which lies inside the file, is in the cache.
    /// Returns the file of the cache, with its mark from before the look at the map.
    fn bring(&self, offset: u64, len: u64) -> io::Result<(Arc<CacheReader>, u64)> {
        let range = offset..offset + len;
        for turn in 0..TURNS {
            let reader = self.reader();
            let mark = reader.mark();
            if self.is_confirmed(&range) && reader.is_present(&range)? {
                return Ok((reader, mark));
            }
            rest(turn);
            self.line
                .want(self.number, (offset, len), self.patience, self.patience.map(deadline))
                .map_err(|error| io::Error::other(error.to_string()))?;
            self.confirmed.iter().for_each(|confirmed| confirmed.add(&range));
        }
        Err(self.out_of_turns())
    }

    fn out_of_turns(&self) -> io::Error {
        io::Error::other(format!(
            "{}: the file of the cache has not what the fetcher says that it has",
            self.name
        ))
    }

    fn is_confirmed(&self, range: &Range<u64>) -> bool {
        self.confirmed.as_ref().is_none_or(|confirmed| confirmed.holds(range))
    }
}

/// The time when this side gives up.
pub(crate) fn deadline(patience: Duration) -> Instant {
    Instant::now() + patience + GRACE
}

fn rest(turn: u32) {
    if turn >= RESTS {
        std::thread::sleep(REST);
    }
}

fn reader_of(descriptors: Vec<OwnedFd>, pin: &Pin) -> Result<CacheReader> {
    let mut descriptors = descriptors.into_iter();
    let (Some(data), Some(map)) = (descriptors.next(), descriptors.next()) else {
        return Err(Error::new(ErrorKind::Io, "the fetcher has sent no file of the cache"));
    };
    CacheReader::new(data, map, pin.size)
        .map_err(|error| Error::io("the file of the cache that the fetcher has sent", error))
}

impl ReadAt for RemoteFile {
    fn size(&self) -> u64 {
        self.pin.size
    }

    fn allocated_size(&self) -> io::Result<u64> {
        Ok(self.pin.size)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = self.inside(offset, buf.len() as u64);
        let (file, beyond) = buf.split_at_mut(inside as usize);
        beyond.fill(0);
        if file.is_empty() {
            return Ok(());
        }
        for turn in 0..TURNS {
            let (reader, mark) = self.bring(offset, inside)?;
            reader.read_at(offset, file)?;
            // The blocks may have gone while they were read: a failed write-back, damage, or space
            // that was freed.
            if reader.none_has_gone(mark)? {
                return Ok(());
            }
            rest(turn);
        }
        Err(self.out_of_turns())
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        let range = offset..offset.saturating_add(buf.len() as u64);
        let reader = self.reader();
        let mark = reader.mark();
        // As in `read_at`, the blocks may have gone while they were read.
        self.is_confirmed(&range)
            && reader.is_known(&range)
            && reader.read_cached(offset, buf)
            && reader.none_has_gone(mark).unwrap_or(false)
    }

    fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
        let inside = self.inside(offset, max);
        if inside == 0 {
            return Ok((BlockStatus::Hole, max));
        }
        // The zeros of the cache are those of the file only if they were compared with the list
        // before: damaged blocks that look like a hole can be replaced and confirmed meanwhile.
        let confirmed = self.confirmed.as_ref().map_or(inside, |chunks| chunks.run(offset, inside));
        if confirmed > 0 {
            return self.reader().status(offset, confirmed);
        }
        let (_, len) = self.reader().status(offset, inside)?;
        Ok((BlockStatus::Data, len))
    }

    fn file_for_clone(&self, offset: u64, len: u64) -> io::Result<Arc<File>> {
        let inside = self.inside(offset, len);
        if inside < len {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let reader = if len == 0 { self.reader() } else { self.bring(offset, len)?.0 };
        Ok(Arc::clone(reader.data()))
    }

    fn clone_with(
        &self,
        offset: u64,
        len: u64,
        clone: &mut dyn FnMut(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        let file = self.file_for_clone(offset, len)?;
        if len == 0 {
            return clone(&file);
        }
        match self.reader().clone_with(&(offset..offset + len), clone)? {
            true => Ok(()),
            false => Err(rustix::io::Errno::AGAIN.into()),
        }
    }

    fn will_need(&self, offset: u64, len: u64, need: Need) {
        let len = self.inside(offset, len);
        if len > 0 {
            let file = self.number;
            self.line.tell(&FetchRequest::WillNeed { file, offset, len, need });
        }
    }

    fn need_no_more(&self) {
        self.line.tell(&FetchRequest::Enough { file: self.number });
    }

    fn done(&self, offset: u64, len: u64) {
        let reader = self.reader();
        let len = self.inside(offset, len);
        if reader.is_anonymous() && len > 0 {
            // Reads that see the blocks as present before they go look again afterwards.
            reader.forget(&(offset..offset + len));
            let file = self.number;
            self.line.tell(&FetchRequest::Done { file, offset, len });
        }
    }
}

#[cfg(test)]
mod tests;
