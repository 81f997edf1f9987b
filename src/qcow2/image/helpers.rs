//! Helper threads, which compute beside the thread that needs the result.
//!
//! ```text
//! caller    takes piece 0, 2, 3 … ──────────► writes each into its place of the buffer
//!             │ job: numbers of the pieces, and what fills one
//! helper      └─► takes piece 1, 4 … ───────► fills memory of its own ─► the caller copies it
//! ```
//! A job goes only to helpers that are idle at that moment, and the caller takes part in it. No job
//! is queued, so no caller waits for a helper to become free, and without helpers it does all the
//! work itself. A helper starts with the first job that finds none idle, and ends after [`REST`]
//! without a job.
//!
//! **Touches:** threads. **Never:** does I/O, takes a lock: a helper computes and cannot hang.
//! **Locks:** none. **Invariants:** a job that is done is held by no thread.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use host::{Error, Result};

/// Most helpers of one image. A guest reads at most 1 MiB at a time, which is 16 clusters of the
/// default size.
const MOST: usize = 15;
/// How long a helper stays idle before it ends. Reads of a disk under load follow each other much
/// faster, and an idle disk has no helpers.
const REST: Duration = Duration::from_secs(5);

/// Fills one piece of a buffer, given the number of the piece. It waits for nothing.
pub(super) type Fill = Arc<dyn Fn(usize, &mut [u8]) -> Result<()> + Send + Sync>;

/// The number of a piece, and its bytes or the error of filling it.
type Filled = (usize, Result<Vec<u8>>);

/// The helpers of one image. Those that are left end when this value is dropped.
pub(super) struct Helpers {
    /// Has no capacity: a send succeeds only if an idle helper receives.
    jobs: Sender<Job>,
    idle: Receiver<Job>,
    /// One entry for each helper that may still be started.
    permits: Receiver<()>,
    returned: Sender<()>,
}

/// What a helper gets of a buffer that is to be filled.
struct Job {
    pieces: Receiver<usize>,
    fill: Fill,
    /// Lengths in bytes of the buffer, and of each piece but the last.
    len: usize,
    piece: usize,
    answers: Sender<Filled>,
}

/// Gives a permit back when its helper ends, also by a panic.
struct Permit(Sender<()>);

impl Drop for Permit {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

impl Default for Helpers {
    /// As many helpers as there are CPUs beside that of the caller.
    fn default() -> Helpers {
        let others = thread::available_parallelism().map_or(0, |count| count.get() - 1);
        Helpers::of(others.min(MOST))
    }
}

impl fmt::Debug for Helpers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Helpers").field("startable", &self.permits.len()).finish_non_exhaustive()
    }
}

impl Helpers {
    /// At most `most` helpers.
    pub(super) fn of(most: usize) -> Helpers {
        let (jobs, idle) = bounded(0);
        let (returned, permits) = bounded(most);
        (0..most).for_each(|_| drop(Permit(returned.clone())));
        Helpers { jobs, idle, permits, returned }
    }

    /// Fills `buf`, which consists of pieces of `piece` bytes (the last one may be shorter), on
    /// this thread and on idle helpers. Pieces are taken in order.
    ///
    /// A thread of lowered priority gets no help: helpers would do its work at the priority of the
    /// process.
    ///
    /// # Errors
    /// Of the pieces that fail, the error of the first one in the buffer. The content of `buf` is
    /// then undefined.
    pub fn fill(&self, buf: &mut [u8], piece: usize, fill: &Fill) -> Result<()> {
        let len = buf.len();
        let count = len.div_ceil(piece);
        let (numbers, pieces) = bounded(count);
        for number in 0..count {
            let _ = numbers.try_send(number); // the channel can hold all
        }
        drop(numbers);
        let (answers, filled) = unbounded();
        if !host::background::has_lower_priority() {
            self.hand_out(count.saturating_sub(1), || Job {
                pieces: pieces.clone(),
                fill: Arc::clone(fill),
                len,
                piece,
                answers: answers.clone(),
            });
        }
        // The helpers hold the other senders.
        drop(answers);
        let mut missing = count;
        let mut failed: Option<(usize, Error)> = None;
        let mut note = |number: usize, result: Result<()>| match result {
            Ok(()) => missing -= 1,
            Err(error) => {
                skip(&pieces);
                if failed.as_ref().is_none_or(|(first, _)| number < *first) {
                    failed = Some((number, error));
                }
            }
        };
        while let Ok(number) = pieces.try_recv() {
            note(number, fill(number, part(buf, number, piece)));
        }
        for (number, bytes) in filled {
            note(number, bytes.map(|bytes| part(buf, number, piece).copy_from_slice(&bytes)));
        }
        match failed {
            Some((_, error)) => Err(error),
            None => {
                assert_eq!(missing, 0, "a helper has panicked");
                Ok(())
            }
        }
    }

    /// Gives a job to idle or new helpers, at most `most` of them.
    fn hand_out(&self, most: usize, job: impl Fn() -> Job) {
        for _ in 0..most {
            if let Err(refused) = self.jobs.try_send(job())
                && !self.start(refused.into_inner())
            {
                return;
            }
        }
    }

    /// Starts a helper, unless there are as many as there may be. Returns whether it did.
    fn start(&self, job: Job) -> bool {
        if self.permits.try_recv().is_err() {
            return false;
        }
        let (permit, idle) = (Permit(self.returned.clone()), self.idle.clone());
        let started = thread::Builder::new().name("inflate".into()).spawn(move || {
            let _permit = permit;
            job.take_part();
            while let Ok(job) = idle.recv_timeout(REST) {
                job.take_part();
            }
        });
        if let Err(error) = &started {
            log::debug!("a thread that decompresses could not be started: {error}");
        }
        started.is_ok()
    }
}

impl Job {
    /// Fills pieces until all are taken.
    fn take_part(self) {
        while let Ok(number) = self.pieces.try_recv() {
            let mut bytes = vec![0; self.piece.min(self.len - number * self.piece)];
            let filled = (self.fill)(number, &mut bytes).map(|()| bytes);
            if filled.is_err() {
                skip(&self.pieces);
            }
            let _ = self.answers.send((number, filled));
        }
    }
}

/// Takes all pieces that are left after one has failed. All pieces before the failed one were taken
/// by threads that fill them, or fail at one that is still earlier.
fn skip(pieces: &Receiver<usize>) {
    while pieces.try_recv().is_ok() {}
}

/// The piece of this number.
fn part(buf: &mut [u8], number: usize, piece: usize) -> &mut [u8] {
    let rest = &mut buf[number * piece..];
    let len = rest.len().min(piece);
    &mut rest[..len]
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use host::ErrorKind;

    /// Fills each piece with its number plus one.
    fn numbered(buf: &mut [u8], number: usize) {
        buf.fill(number as u8 + 1);
    }

    fn assert_numbered(buf: &[u8], piece: usize) {
        for (at, &byte) in buf.iter().enumerate() {
            assert_eq!(usize::from(byte), at / piece + 1, "byte {at}");
        }
    }

    /// Protects: all helpers and the caller fill pieces at the same time, and each piece lands in
    /// its place, the short one at the end included. Each piece waits for three others, so the test
    /// ends only if four threads take part.
    #[test]
    fn pieces_are_filled_at_the_same_time_and_land_in_their_places() {
        for _ in 0..50 {
            let barrier = Barrier::new(4);
            let fill: Fill = Arc::new(move |number, buf: &mut [u8]| {
                barrier.wait();
                numbered(buf, number);
                Ok(())
            });
            let mut buf = vec![0; 7 * 100 + 30];
            let helpers = Helpers::of(3);
            helpers.fill(&mut buf, 100, &fill).unwrap();
            assert_numbered(&buf, 100);
            // What the job holds is free, although the helpers are still there.
            assert_eq!(Arc::strong_count(&fill), 1);
            assert!(helpers.permits.is_empty());
        }
    }

    /// Protects: concurrent callers share helpers that come to rest and start again, and none waits
    /// for ever.
    #[test]
    fn callers_share_the_helpers() {
        for most in [0, 1, 3] {
            let helpers = Helpers::of(most);
            thread::scope(|scope| {
                for caller in 0..4 {
                    let helpers = &helpers;
                    scope.spawn(move || {
                        for round in 0..200 {
                            let fill: Fill = Arc::new(|number, buf: &mut [u8]| {
                                numbered(buf, number);
                                Ok(())
                            });
                            let mut buf = vec![0; 1 + (caller * 200 + round) % 77];
                            helpers.fill(&mut buf, 5, &fill).unwrap();
                            assert_numbered(&buf, 5);
                        }
                    });
                }
            });
            // The helpers end with the value.
            let permits = helpers.permits.clone();
            drop(helpers);
            (0..most).for_each(|_| permits.recv().unwrap());
        }
    }

    /// Protects: of several errors, the first one in the buffer is returned, whichever thread meets
    /// it. With three helpers, the threads of pieces 3 and 5 wait for each other before they fail.
    #[test]
    fn the_first_error_in_the_buffer_is_returned() {
        for (most, failing_together) in [(0, 1), (1, 1), (3, 2)] {
            for _ in 0..50 {
                let barrier = Barrier::new(failing_together);
                let fill: Fill = Arc::new(move |number, buf: &mut [u8]| {
                    if number == 3 || number == 5 {
                        barrier.wait();
                        return Err(Error::new(ErrorKind::Corrupt, format!("piece {number}")));
                    }
                    numbered(buf, number);
                    Ok(())
                });
                let error = Helpers::of(most).fill(&mut [0; 40], 4, &fill).unwrap_err();
                assert_eq!(error.to_string(), "piece 3");
            }
        }
    }

    /// Protects: a thread of lowered priority does all its work itself.
    #[test]
    fn a_thread_of_low_priority_gets_no_help() {
        let low = thread::spawn(|| {
            host::background::lower_priority(1);
            let helpers = Helpers::of(2);
            let this = thread::current().id();
            let fill: Fill = Arc::new(move |number, buf: &mut [u8]| {
                assert_eq!(thread::current().id(), this);
                numbered(buf, number);
                Ok(())
            });
            let mut buf = [0; 100];
            helpers.fill(&mut buf, 10, &fill).unwrap();
            assert_numbered(&buf, 10);
            assert_eq!(helpers.permits.len(), 2, "none was started");
        });
        low.join().unwrap();
    }
}
