//! The run of one cell, and the checks on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::model::{Change, Model};
use super::rig::{Files, PATIENCE, Rig, Step, Trouble, all_of};
use super::scenarios::Scenario;
use super::{Cell, Kind, Mapped, Side, Struck, Then, is_hint};
use sim::spec::{self, Seen};
use sim::{Action, Fault, HostFailure, Operation, Repeat};

/// Name of the thread that reads a cluster other than the one whose operation hangs.
const BYSTANDER: &str = "bystander";

/// Cluster of the first refcount block in every image here: behind the header and the refcount
/// table.
const FIRST_REFCOUNT_BLOCK: u64 = 2;

/// Result of a cell.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Outcome {
    /// Whether the n-th operation took place.
    pub reached: bool,
    /// Number of operations that failed or hung.
    pub struck: u64,
    /// Number of operations on the failing file; 0 for a cell that hangs.
    pub counted: u64,
}

/// A disk under test, and what is known about it.
struct Run<'a> {
    cell: &'a Cell,
    files: &'a Files,
    mapped: Mapped,
    rig: Rig,
    model: Model,
    struck: Struck,
    /// Whether a barrier has failed since the disk was opened.
    sticky: bool,
    /// Whether the image was once left without a close. Clusters that were counted then and not
    /// used stay leaked until a repair.
    unclean: bool,
    /// Steps that failed and have to be repeated.
    failed: Vec<Step>,
}

/// Runs one cell. Panics if the disk breaks a rule.
pub(super) fn run(scenario: &Scenario, files: &Files, cell: &Cell, mapped: Mapped) -> Outcome {
    let (rig, model) = (Rig::new(files, scenario.copy_on_read), Model::new(files.content.clone()));
    if scenario.clones {
        rig.overlay.allow_clones(512);
    }
    let mut run = Run {
        cell,
        files,
        mapped,
        rig,
        model,
        struck: Struck::default(),
        sticky: false,
        unclean: false,
        failed: Vec::new(),
    };
    if !matches!(scenario.steps[0], Step::Open) {
        run.step(&Step::Open);
    }
    scenario.before.iter().for_each(|step| run.step(step));
    let outcome = match cell.error.kind {
        Kind::Fails(failure) => {
            run.struck = cell.inject(&run.rig, failure);
            scenario.steps.iter().for_each(|step| run.step(step));
            let struck = run.struck.operations.lock().len() as u64;
            Outcome {
                reached: struck > 0,
                struck,
                counted: run.struck.counted.load(Ordering::SeqCst),
            }
        }
        Kind::Hangs => run.hang(scenario),
    };
    run.judge();
    outcome
}

impl Run<'_> {
    /// Performs one step, and compares its result with the operations that failed meanwhile.
    fn step(&mut self, step: &Step) {
        if matches!(step, Step::Open) && self.rig.disk.is_some() {
            if self.cell.tears() {
                // Only the disk that is open has the whole content of a torn sector in memory, so
                // it must stay open to write the sector again.
                return;
            }
            self.unclean = true;
        }
        if let (Some(disk), Some(Change::Write(at, data))) = (&self.rig.disk, step.change())
            && at + data.len() as u64 > disk.size()
        {
            return; // the disk did not grow
        }
        let before = self.struck.operations.lock().len();
        let result = self.rig.perform(step);
        let struck = self.struck.operations.lock()[before..].to_vec();
        let was_sticky = self.sticky;
        self.sticky |= self.cell.side == Side::Overlay
            && struck.iter().any(|operation| operation.action == Action::Sync);
        match result {
            Ok(read) => {
                match step {
                    Step::Read(range) => self.model.assert_reads("read", range.start, &read),
                    Step::Write(..)
                    | Step::Flush
                    | Step::Grow(_)
                    | Step::Stream { .. }
                    | Step::Close => {
                        assert!(!was_sticky, "{step:?} went well after a failed barrier");
                    }
                    Step::Zero(_) | Step::Discard(_) => {}
                    Step::Open => self.opened(),
                }
                // After its last barrier, a pass reads the refcount blocks of the clusters that it
                // frees. If such a read fails, everything is durable nevertheless, so the flush may
                // succeed.
                let flushes = matches!(step, Step::Flush | Step::Grow(_) | Step::Stream { .. });
                let cluster = self.files.shape.cluster();
                let is_release = |operation: &&Operation| {
                    flushes && operation.action == Action::Read && operation.len == cluster
                };
                // A zeroing or discard that ends inside a cluster first reads the affected bytes
                // from below, because bytes that are zero need no copy. If that read fails, the
                // disk writes the zeros instead; the model checks the content as usual.
                let makes_zero = matches!(step, Step::Zero(_) | Step::Discard(_));
                let is_look_below = |op: &&Operation| {
                    makes_zero && self.cell.side != Side::Overlay && op.action == Action::Read
                };
                // When a table is loaded, the first refcount block tells whether a cluster has only
                // one reference. If the block cannot be read, a write moves the cluster as if it
                // were shared. The model checks reads and flushes as usual.
                let is_proof = |op: &&Operation| {
                    self.cell.side == Side::Overlay
                        && op.action == Action::Read
                        && op.at == FIRST_REFCOUNT_BLOCK * cluster
                };
                // A stream first estimates how much there is to copy, to report the time it will
                // take. If a table of a backing file cannot be read then, the stream reports no
                // estimate, and the copy reads the table again. Such a read is shorter than a
                // cluster.
                let is_estimate = |op: &&Operation| {
                    matches!(step, Step::Stream { .. })
                        && self.cell.side == Side::Middle
                        && op.action == Action::Read
                        && op.len < cluster
                };
                let is_allowed = |op: &&Operation| {
                    is_hint(op)
                        || is_release(op)
                        || is_look_below(op)
                        || is_proof(op)
                        || is_estimate(op)
                };
                let swallowed =
                    struck.iter().find(|op| !is_allowed(op) && !matches!(step, Step::Read(_)));
                assert!(
                    swallowed.is_none(),
                    "{step:?} went well although this failed: {swallowed:?}"
                );
                if let Some(change) = step.change() {
                    self.model.done(&change);
                }
                if step.flushes() {
                    self.model.flushed();
                }
            }
            Err(Trouble::NotOpen) => assert!(self.rig.disk.is_none()),
            Err(trouble) => {
                self.assert_explained(step, &trouble, &struck, was_sticky);
                if let Some(change) = step.change() {
                    self.model.perhaps(&change);
                }
                self.failed.push(step.clone());
            }
        }
    }

    /// Records that a new disk was opened above the files of the last one.
    fn opened(&mut self) {
        self.sticky = false;
        self.model.killed();
    }

    /// Asserts that a request failed because of an operation that failed, with the errno of that
    /// operation, or because of an earlier failed barrier.
    fn assert_explained(
        &self,
        step: &Step,
        trouble: &Trouble,
        struck: &[Operation],
        was_sticky: bool,
    ) {
        if self.sticky && trouble.is_sticky(self.mapped) {
            assert!(!matches!(step, Step::Read(_)), "reads go on: {trouble:?}");
            return;
        }
        assert!(
            !was_sticky || !struck.is_empty(),
            "{step:?} failed with {trouble:?} after a failed barrier"
        );
        assert!(
            struck.iter().any(|operation| !is_hint(operation)),
            "{step:?} failed with {trouble:?} although nothing has"
        );
        let Kind::Fails(
            HostFailure::Errno(errno)
            | HostFailure::Short(_, errno)
            | HostFailure::ShortBy(_, errno),
        ) = self.cell.error.kind
        else {
            panic!("{step:?} failed with {trouble:?} for something that hung");
        };
        assert!(
            trouble.comes_from(errno, self.mapped),
            "{step:?} failed with {trouble:?} instead of errno {errno}"
        );
        if matches!(step, Step::Read(_)) {
            // P5: an operation that only the copy needs does not fail the read. The first refcount
            // block does not count as such: it tells whether the clusters of a table are counted.
            let only_copy = |at| {
                self.cell.side == Side::Overlay && self.files.overlay.refblocks[1..].contains(&at)
            };
            let needed = |operation: &Operation| {
                operation.action == Action::Read && !only_copy(operation.at)
            };
            assert!(struck.iter().any(needed), "the read failed because its copy did: {struck:?}");
        }
    }

    /// Performs the steps while the n-th operation (and, depending on `how_often`, later ones)
    /// hangs. Meanwhile the thread `BYSTANDER` must be able to read its own cluster; then the
    /// operations are released.
    fn hang(&mut self, scenario: &Scenario) -> Outcome {
        let cluster = self.files.shape.cluster();
        let bystander = self.files.shape.bystander() * cluster;
        let wanted = self.files.content[bystander as usize..][..cluster.min(512) as usize].to_vec();
        let len = wanted.len() as u64;
        let other = self.rig.disk.clone();
        if other.is_some() {
            // This read loads the bystander's table into memory: a table whose read hangs delays
            // all requests that need the table.
            self.step(&Step::Read(bystander..bystander + len));
        }
        let (sender, receiver) = crossbeam_channel::unbounded();
        let ended = sender.clone();
        let (count, n, how_often, stopped) =
            (AtomicU64::new(0), self.cell.n, self.cell.how_often, Arc::new(AtomicU64::new(0)));
        let seen = Arc::clone(&stopped);
        let hold = self.cell.storage(&self.rig).hold(move |_| {
            if thread::current().name() == Some(BYSTANDER) {
                return false;
            }
            let stops = how_often.strikes(n, 1 + count.fetch_add(1, Ordering::SeqCst));
            if stops {
                seen.fetch_add(1, Ordering::SeqCst);
                let _ = sender.send(true);
            }
            stops
        });
        thread::scope(|scope| {
            let actor = scope.spawn(|| {
                // Dropping this value ends the wait for a hanging operation, also if a step panics.
                let ended = Ended(ended);
                scenario.steps.iter().for_each(|step| self.step(step));
                drop(ended);
            });
            let hangs = receiver.recv() == Ok(true);
            let served = match &other {
                Some(disk) if hangs && !scenario.drains => {
                    let (answer, answered) = crossbeam_channel::bounded(1);
                    let disk = Arc::clone(disk);
                    let read = move || {
                        let mut bytes = vec![0xa5; len as usize];
                        let result = disk.read(bystander, &mut bytes).map(|()| bytes);
                        let _ = answer.send(result);
                    };
                    thread::Builder::new().name(BYSTANDER.into()).spawn(read).unwrap();
                    Some(answered.recv_timeout(PATIENCE / 4))
                }
                _ => None,
            };
            drop(hold);
            if let Err(panic) = actor.join() {
                std::panic::resume_unwind(panic);
            }
            match served {
                None => {}
                Some(Ok(read)) => {
                    assert!(read.unwrap() == wanted, "the bystander read something else")
                }
                Some(Err(_)) => {
                    panic!("a read of something else waits for an operation that hangs")
                }
            }
        });
        let struck = stopped.load(Ordering::SeqCst);
        Outcome { reached: struck > 0, struck, counted: 0 }
    }

    /// Checks the disk after all requests have returned.
    fn judge(&mut self) {
        let killed = self.rig.overlay.bytes();
        [Some(&self.rig.overlay), Some(&self.rig.base), self.rig.middle.as_ref()]
            .into_iter()
            .flatten()
            .for_each(|file| file.heal());
        // Every disk writes whole sectors. A torn sector stays damaged until the next flush, so
        // there is nothing to check.
        if !self.cell.tears() {
            self.assert_left("killed", &killed);
        }
        match self.cell.then {
            _ if self.sticky => self.judge_sticky(),
            Then::Reopen(m) => self.reopen(m),
            Then::Retry | Then::Close => {}
        }
        if self.unclean && self.cell.tears() {
            return;
        }
        if self.rig.disk.is_none() {
            self.step(&Step::Open);
        }
        if self.cell.then == Then::Retry {
            for step in std::mem::take(&mut self.failed) {
                // After a close only an open is valid, and the disk has just been opened.
                if !matches!(step, Step::Close | Step::Open) {
                    self.must(&step);
                }
            }
        }
        self.assert_whole("the host is well again");
        self.must(&Step::Flush);
        // The flushed data must still be there after the host has evicted its page cache.
        self.rig.overlay.drop_clean_pages();
        self.assert_whole("the host has dropped its cache");
        self.assert_left("flushed", &self.rig.overlay.bytes());
        self.must(&Step::Close);
        let bytes = self.rig.overlay.bytes();
        let leaks = self.assert_left("closed", &bytes);
        let before = spec::check(&self.files.overlay.bytes).all_leaks();
        assert!(
            leaks == before || self.unclean && leaks > before,
            "{leaks} leaks after a clean close, {before} before everything"
        );
        self.must(&Step::Open);
        self.assert_whole("opened again");
    }

    /// P7: nothing is written until the disk is opened again; reads continue.
    fn judge_sticky(&mut self) {
        if let Some(disk) = self.rig.disk.clone() {
            self.assert_whole("after a failed barrier");
            let at = self.files.shape.bystander() * self.files.shape.cluster();
            let before = self.rig.overlay.bytes();
            for step in
                [Step::Write(at..at + 100, 0), Step::Flush, Step::Zero(at..at + 100), Step::Close]
            {
                let trouble = self
                    .rig
                    .perform(&step)
                    .expect_err("nothing is accepted after a failed barrier");
                assert!(trouble.is_sticky(self.mapped), "{step:?}: {trouble:?}");
            }
            assert!(before == self.rig.overlay.bytes(), "written after a failed barrier");
            drop(disk);
        }
        self.unclean |= self.rig.disk.take().is_some();
        self.failed.clear();
    }

    /// Lets the m-th operation of the next process fail; the process after that one must succeed.
    fn reopen(&mut self, m: u64) {
        self.unclean |= self.rig.disk.take().is_some();
        self.failed.clear();
        if self.cell.tears() {
            return;
        }
        let Kind::Fails(failure) = self.cell.error.kind else { return };
        let count = AtomicU64::new(0);
        let matches = move |_: &Operation| count.fetch_add(1, Ordering::SeqCst) + 1 == m;
        self.rig.overlay.inject(Fault {
            matches: Box::new(matches),
            after: 0,
            failure,
            times: Repeat::ForEver,
        });
        let failures = self.rig.overlay.failures();
        let opened = self.rig.perform(&Step::Open);
        assert_eq!(opened.is_err(), self.rig.overlay.failures() > failures, "opening: {opened:?}");
        self.rig.overlay.heal();
        self.rig.disk = None;
    }

    /// Performs a step that has no reason to fail.
    fn must(&mut self, step: &Step) {
        let failed = self.failed.len();
        self.step(step);
        assert_eq!(self.failed.len(), failed, "{step:?} failed on a host that is well");
    }

    fn assert_whole(&self, what: &str) {
        let disk = self.rig.disk.as_ref().expect("open");
        self.model.assert_is(what, &all_of(disk).unwrap_or_else(|error| panic!("{what}: {error}")));
    }

    /// Asserts that the image in `bytes` is consistent and that its content is allowed. Returns the
    /// number of leaked clusters.
    fn assert_left(&self, what: &str, bytes: &[u8]) -> u64 {
        let Seen { verdict, guest, .. } =
            self.files.look(bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(
            verdict.all().is_empty(),
            "{what}: {:?}",
            verdict.all().iter().take(5).collect::<Vec<_>>()
        );
        self.model.assert_left(what, &guest);
        verdict.all_leaks()
    }
}

/// Sends `false` when it is dropped.
struct Ended(crossbeam_channel::Sender<bool>);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.send(false);
    }
}
