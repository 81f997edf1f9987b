//! The matrix, in the size of every run and in full, and single cells by name.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::judge::{Outcome, run};
use super::scenarios::{PAGE, SMALL, SMALL_V2, Scenario, USUAL, WIDE, all};
use super::*;

/// No scenario does so many operations: what goes on like that never ends.
const OPERATIONS: u64 = 5000;

/// Failing cells that are told before the rest is only counted.
const TOLD: usize = 25;

fn mapped(error: &Error) -> i32 {
    crate::fuse::errno(error).raw_os_error()
}

/// All that was run.
#[derive(Default)]
struct Sum {
    scenarios: BTreeSet<&'static str>,
    cells: u64,
    struck: u64,
    wrong: Vec<String>,
}

impl Sum {
    /// Runs one cell, and goes on whatever comes of it.
    fn cell(&mut self, scenario: &Scenario, files: &rig::Files, cell: Cell) -> Outcome {
        self.scenarios.insert(scenario.name);
        self.cells += 1;
        match catch_unwind(AssertUnwindSafe(|| run(scenario, files, &cell, mapped))) {
            Ok(outcome) => {
                self.struck += outcome.struck;
                outcome
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
                self.wrong.push(format!("CORDISK_FAULT={cell}\n    {}", text.unwrap_or_default()));
                // What is wrong was reached.
                Outcome { reached: true, struck: 1 }
            }
        }
    }

    /// n = 1, 2, … until the scenario passes without reaching it.
    fn every_n(&mut self, scenario: &Scenario, files: &rig::Files, cell: Cell) {
        for n in 1..=OPERATIONS {
            if !self.cell(scenario, files, Cell { n, ..cell }).reached {
                return;
            }
            assert!(n < OPERATIONS, "{cell} never ends");
        }
    }

    fn end(self, what: &str, began: Instant) {
        let Sum { scenarios, cells, struck, wrong } = self;
        let names = scenarios.len();
        println!("{what}: {names} scenarios, {cells} cells, {struck} failures of the host, {:.1} s", began.elapsed().as_secs_f64());
        let told = wrong.iter().take(TOLD).cloned().collect::<Vec<_>>().join("\n");
        assert!(wrong.is_empty(), "{} of {cells} cells are wrong, among them\n{told}", wrong.len());
    }
}

fn sides(scenario: &Scenario) -> Vec<Side> {
    let middle = scenario.middle.as_ref().map(|_| Side::Middle);
    [Side::Overlay, Side::Base].into_iter().chain(middle).collect()
}

fn is_full() -> bool {
    std::env::var("CORDISK_FAULTS").is_ok_and(|value| value == "full")
}

/// Whether `name` is the cell that is asked for; all are where none is.
fn is_wanted(cell: &Cell) -> bool {
    std::env::var("CORDISK_FAULT").map_or(true, |name| cell.to_string() == name)
}

fn named_cell() -> Option<String> {
    std::env::var("CORDISK_FAULT").ok()
}

/// All scenarios of all shapes; those that are about the growth of refcounts alone for the shape that is made for it.
fn scenarios() -> Vec<Scenario> {
    let growth = |scenario: &Scenario| scenario.name.contains("refcount") || scenario.name.contains("grow");
    let wide = all(WIDE).into_iter().filter(growth);
    [SMALL, SMALL_V2, PAGE, USUAL].into_iter().flat_map(all).chain(wide).collect()
}

/// Runs `work` on a thread of its own; a hang is a failure after a time that nothing takes.
fn watched(work: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let worker = std::thread::Builder::new().name("faults".into()).spawn(move || {
        work();
        let _ = sender.send(());
    });
    let worker = worker.unwrap();
    let limit = if is_full() { Duration::from_secs(24 * 3600) } else { Duration::from_secs(1200) };
    if receiver.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("the matrix hangs: a lock was kept, or an operation that was let go did not end");
    }
    if let Err(panic) = worker.join() {
        std::panic::resume_unwind(panic);
    }
}

/// P5 to P8, P16, H12 to H14, H21: whatever fails on the host, once or for ever, costs the guest nothing but the requests that failed.
#[test]
fn every_operation_of_every_scenario_fails_once_and_for_ever() {
    watched(|| {
        let began = Instant::now();
        let mut sum = Sum::default();
        let only = std::env::var("CORDISK_FAULTS_ONLY").ok();
        for scenario in scenarios() {
            if only.as_ref().is_some_and(|only| !scenario.name.contains(only.as_str())) {
                continue;
            }
            let at = Instant::now();
            let cells = sum.cells;
            let files = scenario.files();
            let errors = USUAL_ERRORS.into_iter().chain(is_full().then_some(MORE_ERRORS).into_iter().flatten());
            for error in errors {
                for side in sides(&scenario) {
                    for how_often in [HowOften::Once, HowOften::ForEver] {
                        for then in [Then::Retry, Then::Close] {
                            sum.every_n(&scenario, &files, Cell { scenario: scenario.name, shape: scenario.shape.name, side, n: 0, error, how_often, then });
                        }
                    }
                }
            }
            if std::env::var_os("CORDISK_FAULTS_TIMES").is_some() {
                println!("{}/{}: {} cells, {:?}", scenario.name, scenario.shape.name, sum.cells - cells, at.elapsed());
            }
        }
        sum.end("fault matrix", began);
    });
}
