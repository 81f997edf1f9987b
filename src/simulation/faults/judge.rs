//! One cell: the run, and what is demanded of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::model::{Change, Model};
use super::rig::{Files, PATIENCE, Rig, Step, Trouble, all_of};
use super::scenarios::Scenario;
use super::{Cell, Kind, Mapped, Side, Struck, Then, is_hint};
use crate::simulation::spec::{self, Seen};
use crate::simulation::{Action, Failure, Fault, Operation, Times};

/// The name of the thread that wants nothing of what hangs.
const BYSTANDER: &str = "bystander";

/// The cluster of the first refcount block in every image here: behind the header and the refcount table.
const FIRST_REFCOUNT_BLOCK: u64 = 2;

/// What came of a cell.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Outcome {
    /// Whether the n-th operation was there at all.
    pub reached: bool,
    /// How many operations failed or hung.
    pub struck: u64,
    /// How many operations there were, where any could fail.
    pub counted: u64,
}

/// A disk that is asked, and what is known of it.
struct Run<'a> {
    cell: &'a Cell,
    files: &'a Files,
    mapped: Mapped,
    rig: Rig,
    model: Model,
    struck: Struck,
    /// A barrier has failed since the disk was opened.
    sticky: bool,
    /// The image was left without a close at some time: what was counted then and not used stays counted until it is repaired.
    unclean: bool,
    /// What has to be tried again.
    failed: Vec<Step>,
}

/// Runs one cell. Panics where the disk does what it must not.
pub(super) fn run(scenario: &Scenario, files: &Files, cell: &Cell, mapped: Mapped) -> Outcome {
    let (rig, model) = (Rig::new(files, scenario.copy_on_read), Model::new(files.content.clone()));
    if scenario.clones {
        rig.overlay.allow_clones(512);
    }
    let mut run = Run { cell, files, mapped, rig, model, struck: Struck::default(), sticky: false, unclean: false, failed: Vec::new() };
    if !matches!(scenario.steps[0], Step::Open) {
        run.step(&Step::Open);
    }
    scenario.before.iter().for_each(|step| run.step(step));
    let outcome = match cell.error.kind {
        Kind::Fails(failure) => {
            run.struck = cell.inject(&run.rig, failure);
            scenario.steps.iter().for_each(|step| run.step(step));
            let struck = run.struck.operations.lock().len() as u64;
            Outcome { reached: struck > 0, struck, counted: run.struck.counted.load(Ordering::SeqCst) }
        }
        Kind::Hangs => run.hang(scenario),
    };
    run.judge();
    outcome
}

impl Run<'_> {
    /// Does one step, and holds its result against what failed meanwhile.
    fn step(&mut self, step: &Step) {
        if matches!(step, Step::Open) && self.rig.disk.is_some() {
            if self.cell.tears() {
                return; // what is torn in the middle of a sector is mended by whoever holds it in memory, and by nobody else
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
        self.sticky |= self.cell.side == Side::Overlay && struck.iter().any(|operation| operation.action == Action::Sync);
        match result {
            Ok(read) => {
                match step {
                    Step::Read(range) => self.model.assert_reads("read", range.start, &read),
                    Step::Write(..) | Step::Flush | Step::Grow(_) | Step::Stream { .. } | Step::Close => {
                        assert!(!was_sticky, "{step:?} went well after a failed barrier");
                    }
                    Step::Zero(_) | Step::Discard(_) => {}
                    Step::Open => self.opened(),
                }
                // A pass that cannot read the refcount block of what it has freed has made everything durable all the same.
                let flushes = matches!(step, Step::Flush | Step::Grow(_) | Step::Stream { .. });
                let cluster = self.files.shape.cluster();
                let is_release = |operation: &&Operation| flushes && operation.action == Action::Read && operation.len == cluster;
                // The bytes of an edge are looked at below before they are made zero: zeros need no copy. The edge is
                // written where that read fails; its content is compared like any other.
                let makes_zero = matches!(step, Step::Zero(_) | Step::Discard(_));
                let is_look_below = |op: &&Operation| makes_zero && self.cell.side != Side::Overlay && op.action == Action::Read;
                // Whether a cluster is its entry's alone is not known where the refcount block cannot be read as the table is
                // loaded: a write moves such a cluster, as if it were shared. What is read and flushed is compared like any other.
                let is_proof = |op: &&Operation| {
                    self.cell.side == Side::Overlay && op.action == Action::Read && op.at == FIRST_REFCOUNT_BLOCK * cluster
                };
                // A stream asks first what there is to copy, for the time that it will take. Where a table of a backing file (never
                // a whole cluster) cannot be read then, nothing is told of the time, and the copy reads the table again.
                let is_estimate = |op: &&Operation| {
                    matches!(step, Step::Stream { .. }) && self.cell.side == Side::Middle && op.action == Action::Read && op.len < cluster
                };
                let is_allowed = |op: &&Operation| is_hint(op) || is_release(op) || is_look_below(op) || is_proof(op) || is_estimate(op);
                let swallowed = struck.iter().find(|op| !is_allowed(op) && !matches!(step, Step::Read(_)));
                assert!(swallowed.is_none(), "{step:?} went well although this failed: {swallowed:?}");
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

    /// A new disk above what the last one left.
    fn opened(&mut self) {
        self.sticky = false;
        self.model.killed();
    }

    /// A request fails because of an operation that failed, with its errno, or because of a barrier before it.
    fn assert_explained(&self, step: &Step, trouble: &Trouble, struck: &[Operation], was_sticky: bool) {
        if self.sticky && trouble.is_sticky(self.mapped) {
            assert!(!matches!(step, Step::Read(_)), "reads go on: {trouble:?}");
            return;
        }
        assert!(!was_sticky || !struck.is_empty(), "{step:?} failed with {trouble:?} after a failed barrier");
        assert!(struck.iter().any(|operation| !is_hint(operation)), "{step:?} failed with {trouble:?} although nothing has");
        let Kind::Fails(Failure::Errno(errno) | Failure::Short(_, errno) | Failure::ShortBy(_, errno)) = self.cell.error.kind else {
            panic!("{step:?} failed with {trouble:?} for something that hung");
        };
        assert!(trouble.comes_from(errno, self.mapped), "{step:?} failed with {trouble:?} instead of errno {errno}");
        if matches!(step, Step::Read(_)) {
            // P5: what only the copy needs does not fail the read. (The first refcount block says whether what a table names is counted.)
            let only_copy = |at| self.cell.side == Side::Overlay && self.files.overlay.refblocks[1..].contains(&at);
            let needed = |operation: &Operation| operation.action == Action::Read && !only_copy(operation.at);
            assert!(struck.iter().any(needed), "the read failed because its copy did: {struck:?}");
        }
    }

    /// The steps, with the n-th operation (and, perhaps, all that follow) standing still until somebody else has been served.
    fn hang(&mut self, scenario: &Scenario) -> Outcome {
        let cluster = self.files.shape.cluster();
        let bystander = self.files.shape.bystander() * cluster;
        let wanted = self.files.content[bystander as usize..][..cluster.min(512) as usize].to_vec();
        let len = wanted.len() as u64;
        let other = self.rig.disk.clone();
        if other.is_some() {
            // Its table is in memory then: a table that hangs delays those who need it.
            self.step(&Step::Read(bystander..bystander + len));
        }
        let (sender, receiver) = crossbeam_channel::unbounded();
        let ended = sender.clone();
        let (count, n, how_often, stopped) = (AtomicU64::new(0), self.cell.n, self.cell.how_often, Arc::new(AtomicU64::new(0)));
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
                // Whatever becomes of the steps, nobody waits for an operation that does not come.
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
                Some(Ok(read)) => assert!(read.unwrap() == wanted, "the bystander read something else"),
                Some(Err(_)) => panic!("a read of something else waits for an operation that hangs"),
            }
        });
        let struck = stopped.load(Ordering::SeqCst);
        Outcome { reached: struck > 0, struck, counted: 0 }
    }

    /// What is demanded when the requests have been answered.
    fn judge(&mut self) {
        let killed = self.rig.overlay.bytes();
        [Some(&self.rig.overlay), Some(&self.rig.base), self.rig.middle.as_ref()].into_iter().flatten().for_each(|file| file.heal());
        // Sectors are whole on any disk; a fault in the middle of one leaves what only the next flush mends.
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
                // After a close nothing but an open is right, which has just been done.
                if !matches!(step, Step::Close | Step::Open) {
                    self.must(&step);
                }
            }
        }
        self.assert_whole("the host is well again");
        self.must(&Step::Flush);
        // What was flushed is there when the host needs its memory for something else.
        self.rig.overlay.drop_clean_pages();
        self.assert_whole("the host has dropped its cache");
        self.assert_left("flushed", &self.rig.overlay.bytes());
        self.must(&Step::Close);
        let bytes = self.rig.overlay.bytes();
        let leaks = self.assert_left("closed", &bytes);
        let before = spec::check(&self.files.overlay.bytes).all_leaks();
        assert!(leaks == before || self.unclean && leaks > before, "{leaks} leaks after a clean close, {before} before everything");
        self.must(&Step::Open);
        self.assert_whole("opened again");
    }

    /// P7: nothing is written until the disk is opened again; reads go on.
    fn judge_sticky(&mut self) {
        if let Some(disk) = self.rig.disk.clone() {
            self.assert_whole("after a failed barrier");
            let at = self.files.shape.bystander() * self.files.shape.cluster();
            let before = self.rig.overlay.bytes();
            for step in [Step::Write(at..at + 100, 0), Step::Flush, Step::Zero(at..at + 100), Step::Close] {
                let trouble = self.rig.perform(&step).expect_err("nothing is accepted after a failed barrier");
                assert!(trouble.is_sticky(self.mapped), "{step:?}: {trouble:?}");
            }
            assert!(before == self.rig.overlay.bytes(), "written after a failed barrier");
            drop(disk);
        }
        self.unclean |= self.rig.disk.take().is_some();
        self.failed.clear();
    }

    /// The next process fails at its m-th operation, and the one after that does not.
    fn reopen(&mut self, m: u64) {
        self.unclean |= self.rig.disk.take().is_some();
        self.failed.clear();
        if self.cell.tears() {
            return;
        }
        let Kind::Fails(failure) = self.cell.error.kind else { return };
        let count = AtomicU64::new(0);
        let matches = move |_: &Operation| count.fetch_add(1, Ordering::SeqCst) + 1 == m;
        self.rig.overlay.inject(Fault { matches: Box::new(matches), after: 0, failure, times: Times::ForEver });
        let failures = self.rig.overlay.failures();
        let opened = self.rig.perform(&Step::Open);
        assert_eq!(opened.is_err(), self.rig.overlay.failures() > failures, "opening: {opened:?}");
        self.rig.overlay.heal();
        self.rig.disk = None;
    }

    /// A step that has no reason to fail.
    fn must(&mut self, step: &Step) {
        let failed = self.failed.len();
        self.step(step);
        assert_eq!(self.failed.len(), failed, "{step:?} failed on a host that is well");
    }

    fn assert_whole(&self, what: &str) {
        let disk = self.rig.disk.as_ref().expect("open");
        self.model.assert_is(what, &all_of(disk).unwrap_or_else(|error| panic!("{what}: {error}")));
    }

    /// What stands in the file is without error, whoever reads it, and is what the guest may find. Gives the leaks.
    fn assert_left(&self, what: &str, bytes: &[u8]) -> u64 {
        let Seen { verdict, guest, .. } = self.files.look(bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(verdict.all().is_empty(), "{what}: {:?}", verdict.all().iter().take(5).collect::<Vec<_>>());
        self.model.assert_left(what, &guest);
        verdict.all_leaks()
    }
}

/// Tells of the end when it goes.
struct Ended(crossbeam_channel::Sender<bool>);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.send(false);
    }
}
