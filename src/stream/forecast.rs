//! How many bytes a stream has to copy, found out while it runs.
//!
//! The offset of a stream says little of the time it takes: most of a sparse disk needs no copy.
//! Between chunks the stream's own thread walks on through tables and block status, ahead of the
//! stream, for a small part of the time; the sums go into slices, so that memory does not depend on
//! the disk. The job has a forecast when the walk is done, and none before: half a sum is no
//! estimate.
//!
//! **Never:** reads data; waits for a file that the stream itself would not wait for next; goes on
//! beyond [`LONGEST`], or after an error.

use std::time::{Duration, Instant};

use crate::disk::{Disk, ToDo};
use crate::job::{Control, Forecast};

/// The walk takes at most one part in so many of the stream's time.
const PART: u32 = 10;
/// One turn of the walk takes no longer, so that a pause or a cancel is obeyed at once …
const TURN_MOST: Duration = Duration::from_millis(50);
/// … and has at least so much time: the whole walk, for nearly every disk.
const TURN_LEAST: Duration = Duration::from_millis(2);
/// A turn of a stream with a speed, which sleeps between chunks anyway, perhaps for long.
const TURN_LIMITED: Duration = Duration::from_millis(500);
/// All turns together. A 1 TiB image of single clusters takes about 20 s.
const LONGEST: Duration = Duration::from_secs(60);
/// Steps of the walk between two looks at the clock.
const STEPS: usize = 256;

/// A walk that goes on.
#[derive(Debug)]
struct Walk {
    at: u64,
    slice: u64,
    to_copy: Vec<u64>,
    spent: Duration,
    /// The end of the last turn.
    last: Instant,
}

/// The forecast of a stream in the making. Empty once the walk is done, or given up.
#[derive(Debug)]
pub(super) struct Forecaster(Option<Walk>);

impl Forecaster {
    /// For a stream of `len` bytes that begins now.
    pub fn new(len: u64) -> Forecaster {
        let slice = Forecast::slice_of(len);
        let to_copy = vec![0; usize::try_from(len.div_ceil(slice)).unwrap_or_default()];
        Forecaster(Some(Walk { at: 0, slice, to_copy, spent: Duration::ZERO, last: Instant::now() }))
    }

    /// Walks on for a moment; the job has its forecast when the walk has come to `len`.
    pub fn turn(&mut self, disk: &Disk, depth: usize, len: u64, control: &Control) {
        let Some(walk) = &mut self.0 else { return };
        let begun = Instant::now();
        let turn = match control.is_unlimited() {
            true => (begun.saturating_duration_since(walk.last) / PART).clamp(TURN_LEAST, TURN_MOST),
            false => TURN_LIMITED,
        };
        while walk.at < len {
            for _ in 0..STEPS {
                if walk.at >= len {
                    break;
                }
                match disk.to_do(walk.at, len - walk.at, depth) {
                    Ok((to_do, bytes)) => walk.add(to_do == ToDo::Copy, bytes),
                    Err(error) => {
                        log::debug!("how much the stream has to copy cannot be told: {error}");
                        self.0 = None;
                        return;
                    }
                }
            }
            if begun.elapsed() >= turn {
                break;
            }
        }
        walk.last = Instant::now();
        walk.spent += walk.last.saturating_duration_since(begun);
        if walk.at >= len {
            control.forecast(Forecast::new(walk.slice, &walk.to_copy));
            self.0 = None;
        } else if walk.spent > LONGEST {
            log::debug!("the tables are too many for a forecast of the stream");
            self.0 = None;
        }
    }
}

impl Walk {
    /// The next `bytes` are looked at.
    fn add(&mut self, is_to_copy: bool, bytes: u64) {
        let end = self.at.saturating_add(bytes);
        while is_to_copy && self.at < end {
            let len = (end - self.at).min(self.slice - self.at % self.slice);
            if let Some(slice) = usize::try_from(self.at / self.slice).ok().and_then(|index| self.to_copy.get_mut(index)) {
                *slice += len;
            }
            self.at += len;
        }
        self.at = end;
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::ops::Range;
    use std::sync::Arc;

    use super::super::{StreamOptions, start};
    use super::*;
    use crate::chain::Chain;
    use crate::format::{BackingFormat, BackingReference, Geometry, NewImage};
    use crate::image::Image;
    use crate::job::{JobInfo, Jobs};
    use crate::simulation::SimStorage;
    use crate::storage::{Holding, Storage, WriteKind};

    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 64 * MIB;
    const CLUSTER: u64 = 65536;
    /// Among the places of data: where it is cannot be told.
    const UNKNOWN: u64 = u64::MAX;

    /// A file of 64 MiB that has data in some places only.
    #[derive(Debug)]
    struct Sparse(Vec<Range<u64>>);

    impl Storage for Sparse {
        fn size(&self) -> u64 {
            SIZE
        }
        fn allocated_size(&self) -> io::Result<u64> {
            Ok(0)
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            for (at, byte) in (offset..).zip(buf) {
                *byte = u8::from(self.0.iter().any(|data| data.contains(&at)));
            }
            Ok(())
        }
        fn write_at(&self, _kind: WriteKind, _offset: u64, _data: &[u8]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn punch_hole(&self, _offset: u64, _len: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
        fn holding(&self, offset: u64, max: u64) -> io::Result<(Holding, u64)> {
            if self.0.iter().any(|data| data.start == UNKNOWN) {
                return Err(io::ErrorKind::Other.into());
            }
            let inside = self.0.iter().find(|data| data.contains(&offset));
            let next = self.0.iter().map(|data| data.start).filter(|&start| start > offset).min().unwrap_or(SIZE);
            Ok(match inside {
                Some(data) => (Holding::Data, (data.end - offset).min(max)),
                None => (Holding::Hole, (next - offset).min(max)),
            })
        }
    }

    fn disk(data: Vec<Range<u64>>) -> Arc<Disk> {
        let backing = BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let new = NewImage { geometry: Geometry::new(3, 16, 4, SIZE).unwrap(), backing: Some(backing) };
        let overlay = SimStorage::new(Vec::new());
        for (at, bytes) in new.layout().unwrap() {
            overlay.write_at(WriteKind::Header, at, &bytes).unwrap();
        }
        Arc::new(Disk::for_tests(Image::open(overlay).unwrap(), Some(Chain::of_raw(Arc::new(Sparse(data))))))
    }

    fn wait_for(jobs: &Jobs, what: impl Fn(&JobInfo) -> bool) -> JobInfo {
        let give_up = Instant::now() + Duration::from_secs(30);
        loop {
            let jobs = jobs.query();
            if let Some(info) = jobs.first().filter(|info| what(info)) {
                return info.clone();
            }
            assert!(Instant::now() < give_up, "{jobs:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Protects: what is left is what has to be copied, whatever the size of the disk; holes, zeros and what is local need nothing.
    #[test]
    fn only_what_is_copied_counts() {
        let disk = disk(vec![0..4 * MIB, 32 * MIB..33 * MIB]);
        disk.write(MIB, &vec![9; MIB as usize]).unwrap();
        disk.write_zeroes(32 * MIB..32 * MIB + CLUSTER).unwrap();
        let jobs = Jobs::new();
        // One byte per second: a first step, then the job sleeps.
        start(&disk, &jobs, StreamOptions { speed: 1, ..StreamOptions::new("job0") }).unwrap();
        let info = wait_for(&jobs, |info| info.progress.offset > 0 && !info.busy);
        let to_copy = 4 * MIB - info.progress.offset - MIB + MIB - CLUSTER;
        assert_eq!((info.progress.len, info.left), (SIZE, Some(to_copy)), "{info:?}");
        jobs.cancel("job0", crate::job::Force::Yes).unwrap();
    }

    /// Protects: no estimate is told that is none, and a table that cannot be read is no reason for the stream to stop.
    #[test]
    fn half_a_walk_is_no_forecast() {
        let disk = disk(vec![0..MIB, MIB..SIZE]);
        let jobs = Jobs::new();
        let control = jobs
            .create(crate::job::JobSpec {
                id: "j".into(),
                kind: "stream",
                len: SIZE,
                speed: 0,
                auto_finalize: true,
                auto_dismiss: true,
                on_error: crate::job::OnError::Report,
                request: String::new(),
            })
            .unwrap();
        let mut forecast = Forecaster::new(SIZE);
        forecast.0.as_mut().unwrap().spent = 2 * LONGEST;
        forecast.0.as_mut().unwrap().at = SIZE;
        forecast.turn(&disk, usize::MAX, SIZE, &control);
        assert_eq!(jobs.query()[0].left, Some(0), "it had come to the end");
        // Where block status fails there is none, and the stream comes to the place in its turn.
        let broken = self::disk(vec![0..MIB, UNKNOWN..UNKNOWN]);
        forecast = Forecaster::new(SIZE);
        forecast.turn(&broken, usize::MAX, SIZE, &control);
        assert!(forecast.0.is_none());
        assert_eq!(jobs.query()[0].left, Some(0), "as before");
    }

    /// Protects: a stream that is paused when it begins, as one that was paused when its daemon ended, shows how far it is, copies nothing,
    /// and leaves out nothing when it goes on.
    #[test]
    fn a_paused_stream_stands_where_it_was() {
        let disk = disk(vec![0..MIB, MIB..8 * MIB]);
        disk.populate(0..2 * MIB + CLUSTER, usize::MAX).unwrap();
        let jobs = Jobs::new();
        start(&disk, &jobs, StreamOptions { paused: true, ..StreamOptions::new("job0") }).unwrap();
        let info = wait_for(&jobs, |info| info.status == crate::job::Status::Paused);
        assert_eq!((info.progress.offset, info.work), (2 * MIB + CLUSTER, crate::job::Work::default()));
        jobs.resume("job0").unwrap();
        let give_up = Instant::now() + Duration::from_secs(30);
        while jobs.is_busy() {
            assert!(Instant::now() < give_up);
            std::thread::sleep(Duration::from_millis(1));
        }
        let last = jobs.last().unwrap();
        assert_eq!((last.error.as_deref(), last.progress.offset), (None, SIZE));
        assert!(disk.info().unwrap().backing.is_empty());
        let mut byte = [0; 2];
        disk.read(8 * MIB - 1, &mut byte).unwrap();
        assert_eq!(byte, [1, 0]);
    }
}
