//! A stream over remote layers has a scout: a thread that goes ahead of it in the tables. It says
//! early what the stream will read, so that many ranges are on their way at the same time, and it
//! makes the forecast. Reading ahead (`ahead.rs`) is too close to the stream for the first task: at
//! a latency of 100 ms, a link of 100 MiB/s has 10 MiB on their way.
//!
//! A stream that is paused needs nothing: its scout takes back what it has said, and begins again
//! when the stream goes on.
//!
//! The tables of a remote image come from its server, and a lookup in them waits for it. Therefore
//! the job's thread, which obeys a pause or a cancel, makes none of these lookups.
//!
//! **Touches:** `disk`. **Never:** the job. **Locks:** none of its own.
//! **Invariants:** the last thing that the thread does is to take back what it has said. The job's
//! thread does not wait for it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, RecvError, Sender, bounded, never, select, unbounded};

use super::course::Course;
use super::forecast::Forecaster;
use crate::disk::Disk;
use crate::job::Forecast;
use host::storage::Need;

/// How far ahead of a stream without a speed, in bytes: what the fetcher has in flight at most
/// (16 requests of 8 MiB), and as much again that waits.
const WINDOW: u64 = 256 << 20;

/// How far ahead of a stream with a speed, in seconds of that speed.
const SECONDS: u64 = 2;

/// The least that is said at once, in bytes.
const LEAST: u64 = 1 << 20;

/// The most that is said at once, in bytes.
const STEP: u64 = 8 << 20;

/// Where a stream is, in bytes, and its speed in bytes per second (0: no limit).
#[derive(Clone, Copy, Debug)]
pub(super) struct Position {
    pub offset: u64,
    pub speed: u64,
}

/// What the job's thread tells the scout.
#[derive(Clone, Debug)]
enum News {
    At(Position),
    Paused,
    /// The channel that is readable when the guest has read something.
    Follow(Receiver<()>),
}

/// The way to the scout of a stream. The scout ends some time after this value is dropped.
#[derive(Debug)]
pub(super) struct Scout {
    news: Sender<News>,
    forecast: Receiver<Forecast>,
    is_over: Arc<AtomicBool>,
}

impl Scout {
    /// Starts the scout of a stream of `range` over the first `depth` layers. `None` if none of the
    /// disk's layers is remote, or if no thread can be started: the stream is slow then.
    pub(super) fn start(
        disk: &Arc<Disk>,
        depth: usize,
        range: Range<u64>,
        course: &Arc<Course>,
    ) -> Option<Scout> {
        if !disk.has_remote_layer() {
            return None;
        }
        let (news, received) = unbounded();
        let (to_job, forecast) = bounded(1);
        let is_over = Arc::new(AtomicBool::new(false));
        let mut walk = Walk {
            disk: Arc::clone(disk),
            depth,
            said: None,
            end: range.end,
            course: Arc::clone(course),
            forecaster: Forecaster::new(range.end),
            is_over: Arc::clone(&is_over),
            is_paused: false,
        };
        let started = std::thread::Builder::new().name("stream-scout".into()).spawn(move || {
            host::background::mark_thread();
            let mut reads = never();
            while let Ok(news) = wait(&received, &reads) {
                walk.hear();
                // Only the last of the news that came meanwhile counts.
                let mut last = None;
                for news in news.into_iter().chain(received.try_iter()) {
                    match news {
                        News::Follow(woken) => reads = woken,
                        other => last = Some(other),
                    }
                }
                match last {
                    None => {}
                    Some(News::Paused | News::Follow(_)) => {
                        walk.disk.need_no_more();
                        walk.course.unsay();
                        (walk.said, walk.is_paused) = (None, true);
                    }
                    Some(News::At(position)) => {
                        walk.is_paused = false;
                        walk.say(position);
                        let speed = position.speed;
                        if let Some(forecast) =
                            walk.forecaster.turn(&walk.disk, depth, walk.end, speed)
                        {
                            // Sending fails if the job has ended.
                            let _ = to_job.send(forecast);
                        }
                    }
                }
            }
            walk.disk.need_no_more();
        });
        match started {
            Ok(_) => Some(Scout { news, forecast, is_over }),
            Err(error) => {
                log::warn!("a thread that goes ahead of the stream could not be started: {error}");
                None
            }
        }
    }

    /// Says where the stream is. Returns the forecast of the whole stream once it is known.
    pub(super) fn advance(&self, position: Position) -> Option<Forecast> {
        // A scout that waits for a server hears of the position when it has read its last news.
        if self.news.is_empty() {
            // Sending cannot fail: the thread receives until this value is dropped.
            let _ = self.news.send(News::At(position));
        }
        self.forecast.try_recv().ok()
    }

    /// Says that the stream is paused.
    pub(super) fn pause(&self) {
        let _ = self.news.send(News::Paused);
    }

    /// Makes the scout hear of the guest's reads as soon as `woken` is readable.
    pub(super) fn follow(&self, woken: Receiver<()>) {
        let _ = self.news.send(News::Follow(woken));
    }
}

/// Waits for news of the job, or for a read of the guest (`None`).
///
/// # Errors
/// The job has ended.
fn wait(news: &Receiver<News>, reads: &Receiver<()>) -> Result<Option<News>, RecvError> {
    select! {
        recv(news) -> news => news.map(Some),
        // The sender of the reads lives as long as the listener of the disk, which another stream
        // may replace: then only the job's news are left.
        recv(reads) -> read => match read {
            Ok(()) => Ok(None),
            Err(_) => news.recv().map(Some),
        },
    }
}

impl Drop for Scout {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
    }
}

/// What a stream has said so far.
struct Walk {
    disk: Arc<Disk>,
    depth: usize,
    /// Everything from the position of the stream up to here was said; `None`: nothing.
    said: Option<u64>,
    end: u64,
    course: Arc<Course>,
    forecaster: Forecaster,
    is_over: Arc<AtomicBool>,
    /// The job is paused, and needs nothing.
    is_paused: bool,
}

impl Walk {
    /// Says what lies beside the guest's new reads.
    fn hear(&self) {
        let promoted = self.course.hear(&self.disk.news_of_reads());
        // What was said last is fetched first.
        for piece in promoted.into_iter().rev().filter(|_| !self.is_paused) {
            self.disk.will_need(piece, self.depth, Need::Soon);
        }
    }

    fn say(&mut self, position: Position) {
        for piece in self.course.to_say() {
            self.disk.will_need(piece, self.depth, Need::Next);
        }
        if self.course.has_order() {
            return; // the walk waits until the order is handed out
        }
        let window = match position.speed {
            0 => WINDOW,
            speed => speed.saturating_mul(SECONDS).clamp(LEAST, WINDOW),
        };
        let to = position.offset.saturating_add(window).min(self.end);
        let mut next = self.said.unwrap_or(position.offset);
        while next < to && !self.is_over.load(Ordering::Acquire) {
            let end = next.saturating_add(window.min(STEP)).min(self.end);
            self.disk.will_need(next..end, self.depth, Need::Later);
            next = end;
        }
        self.said = Some(next);
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use parking_lot::Mutex;

    use super::super::StreamOrder;
    use super::*;
    use crate::chain::Chain;
    use host::storage::{BlockStatus, ReadAt};
    use qcow2::format::{BackingFormat, NewImage};
    use qcow2::image::Image;
    use sim::SimStorage;

    const MIB: u64 = 1 << 20;

    /// A file that notes what it is told.
    #[derive(Debug, Default)]
    struct Told(Mutex<Vec<(Need, Range<u64>)>>);

    impl ReadAt for Told {
        fn size(&self) -> u64 {
            64 * MIB
        }

        fn allocated_size(&self) -> io::Result<u64> {
            Ok(self.size())
        }

        fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
            buf.fill(1);
            Ok(())
        }

        fn status(&self, _: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
            Ok((BlockStatus::Data, max))
        }

        fn will_need(&self, offset: u64, len: u64, need: Need) {
            self.0.lock().push((need, offset..offset + len));
        }
    }

    /// Protects: a guest's miss makes the scout say what lies beside it, unless the job is paused.
    #[test]
    fn a_paused_stream_says_nothing_of_the_guests_reads() {
        let file = Arc::new(Told::default());
        let overlay =
            NewImage::file_for_tests(16, 64 * MIB, Some(("base.raw", BackingFormat::Raw)));
        let image = Image::open(SimStorage::new(overlay)).unwrap();
        let disk = Arc::new(Disk::for_tests(image, Some(Chain::of_raw(file.clone()))));
        let _woken = disk.listen_to_reads();
        let mut walk = Walk {
            course: Arc::new(Course::new(&StreamOrder::default(), 64 * MIB)),
            disk: Arc::clone(&disk),
            depth: 1,
            said: None,
            end: 64 * MIB,
            forecaster: Forecaster::new(64 * MIB),
            is_over: Arc::default(),
            is_paused: true,
        };
        disk.read(9 * MIB, &mut [0; 512]).unwrap();
        walk.hear();
        assert!(file.0.lock().is_empty(), "{file:?}");
        walk.is_paused = false;
        disk.read(40 * MIB, &mut [0; 512]).unwrap();
        walk.hear();
        let half = MIB / 2;
        let expected = [40 * MIB + half..41 * MIB, 40 * MIB..40 * MIB + half];
        assert_eq!(*file.0.lock(), expected.map(|range| (Need::Soon, range)));
    }
}
