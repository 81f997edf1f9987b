//! The engine under a scheduler that decides, at every lock, condition variable and atomic of
//! [`host::sync`], which thread continues.
//!
//! ```text
//! cargo test -p cordisk-trials --features schedules schedules       some ten thousand schedules
//! CORDISK_SCHEDULES=1000000 cargo test --features …                 a million of each program
//! CORDISK_SEED=7 cargo test --features …                            the same schedules again
//! CORDISK_SCHEDULE=91… cargo test --features … schedules_of_guests  one that a failure printed
//! ```
//! Each run of a program creates its own small disk of 512-byte clusters, and draws its requests
//! from the scheduler's random numbers, so that the printed schedule repeats the whole run. Half of
//! the schedules choose the next thread at random. The other half follow PCT: thread priorities
//! with few changes, which finds any race that needs at most [`DEPTH`] steps in a certain order.
//! The scheduler treats all orderings of atomics as sequentially consistent.
//!
//! Each run checks that every read returns a value that overlapping requests allow ([`Ledger`]);
//! that at every flush and at random moments, after a kill and after any loss of power, the image
//! is consistent and holds what was flushed (P1, P4); that a clean close leaks nothing; and that no
//! thread waits for ever.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler};
use shuttle::{Config, Runner, thread};

use engine::chain::Chain;
use engine::disk::{Disk, Local};
use host::storage::WriteKind;
use qcow2::format::{BackingFormat, BackingReference, Geometry, NewImage};
use qcow2::image::Image;
use qcow2::range_lock::RangeLock;
use sim::spec::{self, Seen};
use sim::{Action, Fault, HostFailure, Recorded, Repeat, SimStorage};

mod ledger;
mod locks;
mod lookups;

use ledger::{Ledger, Moment, UNIT};

/// Default number of schedules of each program; `explore` multiplies it by `share`.
const SCHEDULES: usize = 1500;
/// Number of priority changes in a PCT schedule.
const DEPTH: usize = 4;
/// Size of a cluster, or of a subcluster where there are some, in bytes.
const CLUSTER: u64 = 512;
/// Guest clusters that one L2 table maps.
const PER_TABLE: u64 = CLUSTER / 8;

/// Runs `program` under many schedules, half at random, half by PCT. Their number is `SCHEDULES *
/// share`, or the value of `CORDISK_SCHEDULES`. `CORDISK_SCHEDULE` replays one schedule instead.
fn explore(share: usize, program: fn()) {
    let mut config = Config::new();
    config.stack_size = 512 << 10;
    config.silence_warnings = true;
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Ok(schedule) = std::env::var("CORDISK_SCHEDULE") {
        Runner::new(ReplayScheduler::new_from_encoded(schedule.trim()), config).run(program);
        return;
    }
    let seed = number("CORDISK_SEED").unwrap_or(1);
    let schedules = number("CORDISK_SCHEDULES")
        .map_or(SCHEDULES * share, |schedules| schedules as usize)
        .max(2);
    println!(
        "CORDISK_SEED={seed} CORDISK_SCHEDULES={schedules}; a failure prints its schedule: CORDISK_SCHEDULE=… repeats it"
    );
    let random = Runner::new(RandomScheduler::new_from_seed(seed, schedules / 2), config.clone())
        .run(program);
    let pct =
        Runner::new(PctScheduler::new_from_seed(seed, DEPTH, schedules / 2), config).run(program);
    println!("{random} random schedules, {pct} by priorities");
}

/// Returns a number below `n`, chosen by the scheduler.
fn below(n: u64) -> u64 {
    thread_rng().gen_range(0..n)
}

/// A flush that has succeeded.
#[derive(Clone, Copy, Debug)]
struct Flushed {
    began: Moment,
    ended: Moment,
    /// Number of changes recorded when the flush returned.
    recorded: usize,
}

/// A disk, its files, and the ledger of its content.
struct World {
    disk: Disk,
    overlay: Arc<SimStorage>,
    /// The overlay's bytes when recording began.
    start: Vec<u8>,
    base: Vec<u8>,
    /// Values of the units of `window`.
    ledger: Ledger,
    /// Guest bytes that requests touch. The bytes before this range read as zero.
    window: Range<u64>,
    // A mutex of the standard library, so that the scheduler does not see it.
    flushes: Mutex<Vec<Flushed>>,
    /// Whether writes and barriers of the overlay may fail.
    faulty: bool,
}

/// Parameters of a [`World`].
struct Shape {
    version: u32,
    window: Range<u64>,
    based: bool,
    /// Memory for L2 tables, bytes.
    tables: usize,
    faulty: bool,
    /// Whether L2 entries are extended. What counts as a cluster elsewhere is a subcluster then.
    extended: bool,
}

impl Shape {
    /// Eight clusters under one L2 table.
    fn small() -> Shape {
        Shape {
            version: 3,
            window: 0..8,
            based: true,
            tables: usize::MAX,
            faulty: false,
            extended: false,
        }
    }

    /// Eight subclusters, half of them in either of two clusters.
    fn of_subclusters() -> Shape {
        Shape { window: 28..36, extended: true, ..Shape::small() }
    }

    /// Six clusters around the end of an L2 table, with memory for one.
    fn of_two_tables() -> Shape {
        Shape { window: PER_TABLE - 3..PER_TABLE + 3, tables: CLUSTER as usize, ..Shape::small() }
    }

    fn build(&self) -> Arc<World> {
        let window = self.window.start * CLUSTER..self.window.end * CLUSTER;
        // The base ends inside a cluster and inside a unit.
        let mut base = vec![0; window.end as usize - 300];
        for (index, unit) in base.chunks_mut(UNIT).enumerate() {
            // Some clusters are all zeros, some have one zero unit, some have none.
            unit.fill([201, 202, 0, 0, 203, 0][index % 6]);
        }
        base.truncate((window.end as usize - 300) / UNIT * UNIT);
        let backing = self.based.then(|| BackingReference {
            name: "base.raw".into(),
            format: Some(BackingFormat::Raw),
        });
        let geometry = if self.extended {
            Geometry::new(3, 14, 4, window.end).and_then(Geometry::with_extended_l2).unwrap()
        } else {
            Geometry::new(3, 9, 4, window.end).unwrap()
        };
        let overlay = SimStorage::new(Vec::new());
        let mut bytes = Vec::new();
        for (at, piece) in (NewImage { geometry, backing }).layout().unwrap() {
            bytes.resize(bytes.len().max(at as usize), 0);
            bytes.extend_from_slice(&piece);
        }
        if self.version == 2 {
            // The fields from byte 72 on become the end of the header extensions.
            bytes[7] = 2;
            bytes[72..112].fill(0);
        }
        host::storage::Storage::write_at(&*overlay, WriteKind::Header, 0, &bytes).unwrap();
        let mut image = Image::open(overlay.clone()).unwrap();
        image.limit_table_memory(self.tables);
        let chain = self.based.then(|| {
            let file = SimStorage::new(base.clone());
            file.keep_in_memory(below(2) == 0);
            Chain::of_raw(file)
        });
        let disk = Disk::for_tests(image, chain).copying_up(true);
        if window.start > 0 {
            disk.discard(0..window.start).unwrap();
            disk.close().unwrap();
        }
        let start = overlay.bytes();
        overlay.record();
        let mut shown = if self.based { base.clone() } else { Vec::new() };
        shown.resize(window.end as usize, 0);
        let ledger = Ledger::new(&shown[window.start as usize..]);
        let world = World {
            disk,
            overlay,
            start,
            base,
            ledger,
            window,
            flushes: Mutex::default(),
            faulty: false,
        };
        // The disk starts with a few requests done, in memory or on disk.
        for _ in 0..below(4) {
            world.request();
        }
        if below(2) == 0 {
            world.flush();
        }
        let world = World { faulty: self.faulty, ..world };
        if self.faulty {
            let writes_only = below(3) > 0;
            let matches = move |action| {
                matches!(action, Action::Write(_)) || (action == Action::Sync && !writes_only)
            };
            world.overlay.inject(Fault {
                matches: Box::new(move |operation| matches(operation.action)),
                after: below(12),
                failure: HostFailure::Errno(if writes_only { 28 } else { 5 }),
                times: if below(2) == 0 { Repeat::Once } else { Repeat::ForEver },
            });
        }
        Arc::new(world)
    }
}

impl World {
    fn units(&self) -> u64 {
        (self.window.end - self.window.start) / UNIT as u64
    }

    fn bytes(&self, units: &Range<usize>) -> Range<u64> {
        self.window.start + (units.start * UNIT) as u64
            ..self.window.start + (units.end * UNIT) as u64
    }

    /// Unwraps a result; an error is allowed only if failures are injected.
    fn expect<T>(&self, result: host::Result<T>) -> Option<T> {
        match result {
            Err(error) if !self.faulty => panic!("{error}"),
            result => result.ok(),
        }
    }

    /// Does one random request of a guest.
    fn request(&self) {
        let first = below(self.units()) as usize;
        let units = first..(first + 1 + below(5) as usize).min(self.units() as usize);
        let bytes = self.bytes(&units);
        match below(10) {
            0..=3 => self.write(units),
            4..=6 => self.read(units),
            7 => drop(self.expect(self.ledger.write(units, 0, || {
                match self.disk.write_zeroes_without_base(bytes.clone())? {
                    Local::Done => Ok(()),
                    Local::Miss | Local::Below => self.disk.write_zeroes(bytes),
                }
            }))),
            8 => drop(self.expect(self.ledger.write(units, 0, || {
                match self.disk.discard_without_base(bytes.clone())? {
                    Local::Done => Ok(()),
                    Local::Miss | Local::Below => self.disk.discard(bytes),
                }
            }))),
            _ => self.flush(),
        }
    }

    /// Writes like a server thread: locally if possible, otherwise like a worker.
    fn write(&self, units: Range<usize>) {
        let (at, value) = (self.bytes(&units).start, self.ledger.fresh_value());
        let data = vec![value; units.len() * UNIT];
        self.expect(self.ledger.write(units, value, || match self.disk.write_local(at, &data)? {
            Local::Done => Ok(()),
            Local::Miss if self.disk.write_without_base(at, &data)? == Local::Done => Ok(()),
            Local::Miss | Local::Below => self.disk.write(at, &data),
        }));
    }

    /// Reads like a server thread, and like a worker if that is not possible. Reads must succeed
    /// even if copies fail (P5).
    fn read(&self, units: Range<usize>) {
        let at = self.bytes(&units).start;
        let mut buf = vec![0xa5; units.len() * UNIT];
        let began = self.ledger.now();
        let check = |bytes: &[u8]| {
            self.ledger.check(units.start, bytes, began, self.ledger.now(), "read");
        };
        match self.disk.read_local(at, &mut buf).unwrap() {
            Local::Done => check(&buf),
            Local::Miss if self.disk.read_without_base(at, &mut buf).unwrap() == Local::Done => {
                check(&buf);
            }
            Local::Miss | Local::Below => {
                let mut answer = |bytes: &[u8]| check(bytes);
                if self.disk.read_cached(at, &mut buf, &mut answer).unwrap() != Local::Done {
                    self.disk.read_and_answer(at, &mut buf, &mut answer).unwrap();
                }
            }
        }
    }

    fn flush(&self) {
        let began = self.ledger.now();
        if self.expect(self.disk.flush()).is_some() {
            let recorded = self.overlay.recorded_len();
            self.flushes.lock().unwrap().push(Flushed {
                began,
                ended: self.ledger.now(),
                recorded,
            });
        }
    }

    /// Streams as a job does: populates the disk chunk by chunk, then detaches the backing file.
    fn stream(&self) {
        let size = self.disk.size();
        let step = (1 + below(4)) * CLUSTER;
        let report = self.disk.walk_report();
        let mut at = 0;
        while at < size {
            report.is_at(Some(at));
            if self.expect(self.disk.populate(at..size.min(at + step), usize::MAX)).is_none() {
                return;
            }
            at += step;
        }
        self.expect(self.disk.detach_backing(usize::MAX, None));
    }

    /// Returns the overlay after the first `recorded` changes. A change that no barrier covers is
    /// applied sector by sector, only where `kept` returns true.
    fn overlay_at(
        &self,
        changes: &[Recorded],
        recorded: usize,
        mut kept: impl FnMut() -> bool,
    ) -> Vec<u8> {
        let changes = &changes[..recorded];
        let durable = changes
            .iter()
            .map(|change| if let Recorded::Sync { covers } = change { *covers } else { 0 })
            .max()
            .unwrap_or(0);
        let mut bytes = self.start.clone();
        for (index, change) in changes.iter().enumerate() {
            let (at, data) = match change {
                Recorded::Write { at, data, .. } => (*at as usize, data.to_vec()),
                Recorded::Punch { at, len } => (*at as usize, vec![0; *len as usize]),
                Recorded::Sync { .. } | Recorded::SyncFailed { .. } => continue,
            };
            for (sector, data) in data.chunks(512).enumerate() {
                if index < durable || kept() {
                    let at = at + sector * 512;
                    bytes.resize(bytes.len().max(at + data.len()), 0);
                    bytes[at..at + data.len()].copy_from_slice(data);
                }
            }
        }
        bytes
    }

    fn check(&self, bytes: &[u8], began: Moment, ended: Moment, what: &str) -> Seen {
        let seen = spec::look(bytes, &self.base)
            .and_then(Seen::sole)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        self.ledger.check(0, &seen.guest[self.window.start as usize..], began, ended, what);
        seen
    }

    /// Runs when all tasks have ended. Checks the image that each flush left, images that a loss of
    /// power would leave, and the closed image.
    fn judge_all(&self) {
        self.read(0..self.units() as usize);
        let closed = self.expect(self.disk.close()).is_some();
        let end = self.ledger.now();
        let changes = self.overlay.recorded();
        let flushes = self.flushes.lock().unwrap().clone();
        for flush in &flushes {
            let (began, ended) = (flush.began, flush.ended);
            self.check(
                &self.overlay_at(&changes, flush.recorded, || true),
                began,
                ended,
                "killed after a flush",
            );
            self.check(
                &self.overlay_at(&changes, flush.recorded, || false),
                began,
                ended,
                "power lost after a flush",
            );
        }
        for _ in 0..3 {
            let cut = below(changes.len() as u64 + 1) as usize;
            let began = flushes
                .iter()
                .filter(|flush| flush.recorded <= cut)
                .map(|flush| flush.began)
                .max()
                .unwrap_or(0);
            let chance = below(5);
            self.check(
                &self.overlay_at(&changes, cut, || below(4) < chance),
                began,
                end,
                "power lost at any time",
            );
        }
        if closed {
            let seen = self.check(&self.overlay.bytes(), end, end + 1, "closed");
            // Clusters that failed writes had allocated are free again as well.
            assert_eq!(seen.verdict.all_leaks(), 0, "leaked");
            let names_backing = self.disk.info().unwrap().backing.len() == 1;
            assert_eq!(
                seen.has_backing(),
                names_backing,
                "header and memory agree about the backing file"
            );
        }
    }
}

/// Runs the tasks at the same time on one world, then checks what they leave.
fn together(world: &Arc<World>, tasks: &[fn(&World)]) {
    let tasks: Vec<_> = tasks
        .iter()
        .map(|&task| {
            let world = Arc::clone(world);
            thread::spawn(move || task(&world))
        })
        .collect();
    tasks.into_iter().for_each(|task| task.join().unwrap());
    world.judge_all();
}

fn guest(world: &World) {
    for _ in 0..1 + below(3) {
        world.request();
    }
}

fn flusher(world: &World) {
    for _ in 0..2 {
        world.flush();
    }
}

fn writer_who_flushes(world: &World) {
    for _ in 0..2 {
        let first = below(world.units()) as usize;
        world.write(first..first + 1);
        world.flush();
    }
}

fn commit_timer(world: &World) {
    for _ in 0..2 {
        world.expect(world.disk.flush_if_dirty());
    }
}

/// Allocates, frees and flushes at one place, so that every freed cluster is needed again at once
/// (R7).
fn recycler(world: &World) {
    for _ in 0..3 {
        let first = below(2) as usize * 2;
        match below(3) {
            0 => drop(world.expect(world.ledger.write(first..first + 2, 0, || {
                world.disk.discard(world.bytes(&(first..first + 2)))
            }))),
            1 => world.write(first..first + 2),
            _ => world.read(0..4),
        }
    }
}

fn streamer(world: &World) {
    world.stream();
}

/// Requests of three guests, copy-on-read and flushes (H1 to H6, H8, H20).
#[test]
fn schedules_of_guests() {
    explore(2, || together(&Shape::small().build(), &[guest, guest, guest]));
}

/// A stream that detaches the chain while requests are in flight (H1 to H4, H16, H17).
#[test]
fn schedules_of_a_stream_and_guests() {
    explore(1, || together(&Shape::small().build(), &[streamer, guest, guest]));
}

/// Flushes share passes, and a flush returns only when the writes before it are durable (P1, H9 to
/// H11, H21).
#[test]
fn schedules_of_shared_flushes() {
    explore(1, || {
        together(&Shape::small().build(), &[writer_who_flushes, writer_who_flushes, flusher])
    });
}

/// Freed clusters are reused while readers, writers and passes of their previous guest clusters may
/// be in flight (H5 to H7).
#[test]
fn schedules_of_reuse() {
    explore(2, || {
        together(
            &Shape { based: false, ..Shape::small() }.build(),
            &[recycler, recycler, commit_timer, flusher],
        )
    });
}

/// Two L2 tables and memory for one: an evicted table is loaded again unchanged (H9 to H11).
#[test]
fn schedules_of_evicted_tables() {
    explore(1, || together(&Shape::of_two_tables().build(), &[guest, guest, commit_timer]));
}

/// Subclusters of one cluster are used at the same time, and passes copy their entry meanwhile: no
/// thread sees words of two different entries (I6, H1 to H8).
#[test]
fn schedules_of_subclusters() {
    explore(1, || together(&Shape::of_subclusters().build(), &[guest, guest, commit_timer]));
}

/// A stream and guests in the same clusters (H1 to H4, H16, H17, I6).
#[test]
fn schedules_of_a_stream_of_subclusters() {
    explore(1, || together(&Shape::of_subclusters().build(), &[guest, guest, streamer]));
}

/// Freed subclusters and clusters are used again, without a backing file (H5 to H7, I6).
#[test]
fn schedules_of_reuse_of_subclusters() {
    explore(1, || {
        together(
            &Shape { based: false, ..Shape::of_subclusters() }.build(),
            &[recycler, guest, commit_timer],
        )
    });
}

/// Version 2 has no zero clusters (H3, H17).
#[test]
fn schedules_of_version_2() {
    explore(1, || {
        together(&Shape { version: 2, ..Shape::small() }.build(), &[guest, guest, streamer])
    });
}

/// On a host that fails, data whose request reported success is kept, and reads continue (P5 to P7,
/// H12 to H14, H21).
#[test]
fn schedules_of_a_failing_host() {
    explore(2, || {
        together(
            &Shape { faulty: true, ..Shape::small() }.build(),
            &[guest, guest, writer_who_flushes],
        )
    });
}

/// R11: a header write takes effect but reports an error, while another thread flushes. The
/// clusters of the new L1 table must not be freed before the old header is restored.
#[test]
fn schedules_of_a_failed_switch_of_the_l1_table() {
    explore(8, || {
        let geometry = Geometry::new(3, 9, 4, 64 * 64 * CLUSTER).unwrap();
        let overlay = SimStorage::new(Vec::new());
        for (at, piece) in (NewImage { geometry, backing: None }).layout().unwrap() {
            host::storage::Storage::write_at(&*overlay, WriteKind::Header, at, &piece).unwrap();
        }
        let disk = Arc::new(Disk::for_tests(Image::open(overlay.clone()).unwrap(), None));
        disk.write(0, &[7; CLUSTER as usize]).unwrap();
        disk.flush().unwrap();
        overlay.inject(Fault {
            matches: Box::new(|operation| operation.action == Action::Write(WriteKind::Header)),
            after: 0,
            failure: HostFailure::ShortBy(0, 28),
            times: Repeat::Once,
        });
        let grower = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || drop(disk.grow(65 * 64 * CLUSTER).unwrap_err()))
        };
        let flusher = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                disk.flush().unwrap();
            })
        };
        grower.join().unwrap();
        flusher.join().unwrap();
        let judged = spec::look(&overlay.bytes(), &[])
            .and_then(Seen::sole)
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(judged.guest[0], 7, "killed now: what was flushed is gone");
    });
}

/// R12: the chain is detached while a simulated mistake uncovers a cluster that the detach has
/// already checked. The detach notices it, or the mistake comes after the detach and has no effect.
#[test]
fn schedules_of_a_cut_that_must_look_again() {
    explore(2, || {
        let (clusters, base) = (4, vec![7; 4 * CLUSTER as usize]);
        let backing =
            BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let geometry = Geometry::new(3, 9, 4, clusters * CLUSTER).unwrap();
        let overlay = SimStorage::new(Vec::new());
        for (at, piece) in (NewImage { geometry, backing: Some(backing) }).layout().unwrap() {
            host::storage::Storage::write_at(&*overlay, WriteKind::Header, at, &piece).unwrap();
        }
        let chain = Chain::of_raw(SimStorage::new(base.clone()));
        let disk = Arc::new(Disk::for_tests(Image::open(overlay).unwrap(), Some(chain)));
        disk.populate(0..clusters * CLUSTER, usize::MAX).unwrap();
        let cutter = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.detach_backing(usize::MAX, None).is_ok())
        };
        let mistake = {
            let disk = Arc::clone(&disk);
            thread::spawn(move || {
                let (range, held) = disk.hold_for_tests(CLUSTER..2 * CLUSTER);
                if !disk.info().unwrap().backing.is_empty() {
                    disk.uncover_for_tests(&held, range);
                }
            })
        };
        let cut = cutter.join().unwrap();
        mistake.join().unwrap();
        assert_eq!(cut, disk.info().unwrap().backing.is_empty());
        let mut buf = vec![0; base.len()];
        disk.read(0, &mut buf).unwrap();
        assert!(buf == base, "the cluster that was uncovered reads as zero");
    });
}
