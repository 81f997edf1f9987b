//! Estimate of the bytes that a stream has to copy, computed while the stream runs.
//!
//! The offset of a stream is a poor measure of the time it takes, because most of a sparse disk
//! needs no copy. Between chunks, the job's thread (the scout, if there is one: `scout.rs`) walks
//! tables and block status ahead of the stream, for a small part of its time. It adds the bytes to
//! copy into a fixed number of slices, so that memory does not depend on the size of the disk. The
//! job has no forecast until the walk is complete, because a partial sum is no estimate.
//!
//! **Never:** reads data; waits for a file that the stream itself would not wait for next; goes on
//! beyond [`LONGEST`], or after an error.

use std::time::{Duration, Instant};

use crate::disk::{Disk, ToDo};
use crate::job::Forecast;

/// The walk takes at most one part in `PART` of the stream's time.
const PART: u32 = 10;
/// Longest turn of the walk, so that the job obeys a pause or a cancel soon.
const TURN_MOST: Duration = Duration::from_millis(50);
/// Shortest turn of the walk: long enough for the whole walk on nearly every disk.
const TURN_LEAST: Duration = Duration::from_millis(2);
/// Longest turn of a stream with a speed. Such a stream sleeps between chunks anyway, perhaps for
/// long.
const TURN_LIMITED: Duration = Duration::from_millis(500);
/// Longest time of all turns together. The walk of a 1 TiB image of single clusters takes about 20
/// s.
const LONGEST: Duration = Duration::from_secs(60);
/// Steps of the walk between two looks at the clock.
const STEPS: usize = 256;

/// State of an unfinished walk.
#[derive(Debug)]
struct ForecastWalk {
    at: u64,
    slice: u64,
    to_copy: Vec<u64>,
    spent: Duration,
    /// When the last turn ended.
    last: Instant,
}

/// Computes the forecast of a stream. `None` once the walk is complete or was given up.
#[derive(Debug)]
pub(super) struct Forecaster(Option<ForecastWalk>);

impl Forecaster {
    /// Creates the forecaster of a stream of `len` bytes that starts now.
    pub fn new(len: u64) -> Forecaster {
        let slice = Forecast::slice_of(len);
        let to_copy = vec![0; usize::try_from(len.div_ceil(slice)).unwrap_or_default()];
        Forecaster(Some(ForecastWalk {
            at: 0,
            slice,
            to_copy,
            spent: Duration::ZERO,
            last: Instant::now(),
        }))
    }

    /// Continues the walk for one turn of a stream with `speed` bytes per second (0: no limit).
    /// Returns the forecast when the walk reaches `len`.
    pub fn turn(&mut self, disk: &Disk, depth: usize, len: u64, speed: u64) -> Option<Forecast> {
        let walk = self.0.as_mut()?;
        let begun = Instant::now();
        let turn = match speed {
            0 => (begun.saturating_duration_since(walk.last) / PART).clamp(TURN_LEAST, TURN_MOST),
            _ => TURN_LIMITED,
        };
        while walk.at < len {
            for _ in 0..STEPS {
                if walk.at >= len {
                    break;
                }
                match disk.to_do(walk.at, len - walk.at, depth) {
                    Ok((to_do, bytes)) => {
                        walk.add(matches!(to_do, ToDo::Copy | ToDo::Clone), bytes);
                    }
                    Err(error) => {
                        log::debug!("how much the stream has to copy cannot be told: {error}");
                        self.0 = None;
                        return None;
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
            let forecast = Forecast::new(walk.slice, &walk.to_copy);
            self.0 = None;
            return Some(forecast);
        }
        if walk.spent > LONGEST {
            log::debug!("the tables are too many for a forecast of the stream");
            self.0 = None;
        }
        None
    }
}

impl ForecastWalk {
    /// Moves past the next `bytes`, and counts them if they have to be copied.
    fn add(&mut self, is_to_copy: bool, bytes: u64) {
        let end = self.at.saturating_add(bytes);
        while is_to_copy && self.at < end {
            let len = (end - self.at).min(self.slice - self.at % self.slice);
            if let Some(slice) = usize::try_from(self.at / self.slice)
                .ok()
                .and_then(|index| self.to_copy.get_mut(index))
            {
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
    use crate::job::{JobInfo, Jobs};
    use host::storage::{BlockStatus, ReadAt, Sidecar, Storage, WriteKind};
    use qcow2::format::{BackingFormat, NewImage};
    use qcow2::image::Image;
    use sim::SimStorage;

    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 64 * MIB;
    const CLUSTER: u64 = 65536;
    /// As the start of a range of data: every block status request of the file fails.
    const UNKNOWN: u64 = u64::MAX;

    /// A file of 64 MiB with data in the given ranges only.
    #[derive(Debug)]
    struct Sparse(Vec<Range<u64>>);

    impl ReadAt for Sparse {
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

        fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
            if self.0.iter().any(|data| data.start == UNKNOWN) {
                return Err(io::ErrorKind::Other.into());
            }
            let inside = self.0.iter().find(|data| data.contains(&offset));
            let next = self
                .0
                .iter()
                .map(|data| data.start)
                .filter(|&start| start > offset)
                .min()
                .unwrap_or(SIZE);
            Ok(match inside {
                Some(data) => (BlockStatus::Data, (data.end - offset).min(max)),
                None => (BlockStatus::Hole, (next - offset).min(max)),
            })
        }
    }

    impl Storage for Sparse {
        fn write_at(&self, _kind: WriteKind, _offset: u64, _data: &[u8]) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn punch_hole(&self, _offset: u64, _len: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sidecar for Sparse {}

    fn disk(data: Vec<Range<u64>>) -> Arc<Disk> {
        let overlay = SimStorage::new(NewImage::file_for_tests(
            16,
            SIZE,
            Some(("base.raw", BackingFormat::Raw)),
        ));
        Arc::new(Disk::for_tests(
            Image::open(overlay).unwrap(),
            Some(Chain::of_raw(Arc::new(Sparse(data)))),
        ))
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

    /// Protects: the bytes left are the bytes that have to be copied, whatever the size of the
    /// disk. Holes, zeros and local clusters are not counted.
    #[test]
    fn only_what_is_copied_counts() {
        let disk = disk(vec![0..4 * MIB, 32 * MIB..33 * MIB]);
        disk.write(MIB, &vec![9; MIB as usize]).unwrap();
        disk.write_zeroes(32 * MIB..32 * MIB + CLUSTER).unwrap();
        let jobs = Jobs::new();
        // At one byte per second the job copies the first chunk, then sleeps.
        start(&disk, &jobs, StreamOptions { speed: 1, ..StreamOptions::new("job0") }).unwrap();
        let info = wait_for(&jobs, |info| info.progress.offset > 0 && !info.busy);
        let to_copy = 4 * MIB - info.progress.offset - MIB + MIB - CLUSTER;
        assert_eq!((info.progress.len, info.left), (SIZE, Some(to_copy)), "{info:?}");
        jobs.cancel("job0", crate::job::Force::Yes).unwrap();
    }

    /// Protects: a walk that fails yields no estimate, and an error of the walk does not stop the
    /// stream.
    #[test]
    fn half_a_walk_is_no_forecast() {
        let disk = disk(vec![0..MIB, MIB..SIZE]);
        let mut forecast = Forecaster::new(SIZE);
        forecast.0.as_mut().unwrap().spent = 2 * LONGEST;
        forecast.0.as_mut().unwrap().at = SIZE;
        let told = forecast.turn(&disk, usize::MAX, SIZE, 0).expect("it had come to the end");
        assert_eq!(told.left(0), 0);
        // If block status fails, there is no forecast; the stream itself meets the error later.
        let broken = self::disk(vec![0..MIB, UNKNOWN..UNKNOWN]);
        forecast = Forecaster::new(SIZE);
        assert!(forecast.turn(&broken, usize::MAX, SIZE, 0).is_none());
        assert!(forecast.0.is_none(), "the walk goes on");
    }

    /// Protects: a stream that starts paused, because it was paused when its daemon ended, shows
    /// its progress and copies nothing; when it is resumed it skips no data.
    #[test]
    fn a_paused_stream_stands_where_it_was() {
        let disk = disk(vec![0..MIB, MIB..8 * MIB]);
        disk.populate(0..2 * MIB + CLUSTER, usize::MAX).unwrap();
        let jobs = Jobs::new();
        start(&disk, &jobs, StreamOptions { paused: true, ..StreamOptions::new("job0") }).unwrap();
        let info = wait_for(&jobs, |info| info.status == crate::job::Status::Paused);
        assert_eq!(
            (info.progress.offset, info.work),
            (2 * MIB + CLUSTER, crate::job::Work::default())
        );
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
