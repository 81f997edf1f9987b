//! The matrix, in the size of an ordinary run and in full; single cells by name; and the tests of
//! the checker itself.
//!
//! `CORDISK_FAULTS=full` runs every cell. `CORDISK_FAULT=<name>` runs the one cell whose name a
//! failure printed.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::judge::{Outcome, run};
use super::rig::Files;
use super::scenarios::{PAGE, SMALL, SMALL_V2, Scenario, USUAL, WIDE, all};
use super::sketch::{Sketch, base};
use super::*;

/// Upper bound for the operations of a scenario. A scenario that reaches it never ends.
const OPERATIONS: u64 = 5000;

/// Number of failing cells that the last message lists.
const TOLD: usize = 25;

fn mapped(error: &Error) -> i32 {
    export::errno(error).raw_os_error()
}

/// Totals of a run.
#[derive(Default)]
struct Sum {
    scenarios: BTreeSet<&'static str>,
    cells: u64,
    struck: u64,
    wrong: Vec<String>,
}

impl Sum {
    /// Runs one cell, and continues if it panics.
    fn cell(&mut self, scenario: &Scenario, files: &Files, cell: Cell) -> Outcome {
        self.scenarios.insert(scenario.name);
        self.cells += 1;
        match catch_unwind(AssertUnwindSafe(|| run(scenario, files, &cell, mapped))) {
            Ok(outcome) => {
                self.struck += outcome.struck;
                outcome
            }
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
                let wrong = format!("CORDISK_FAULT='{cell}'\n    {}", text.unwrap_or_default());
                println!("{wrong}");
                self.wrong.push(wrong);
                // A cell that panicked did reach its n-th operation.
                Outcome { reached: true, struck: 1, counted: 0 }
            }
        }
    }

    /// Runs n = 1, 2, … until the scenario ends before its n-th operation.
    fn every_n(&mut self, scenario: &Scenario, files: &Files, cell: Cell) {
        for n in 1.. {
            assert!(n < OPERATIONS, "{cell} never ends");
            // A full run uses both ends for every n; an ordinary run alternates.
            let ends = if is_full() {
                vec![Then::Retry, Then::Close]
            } else {
                vec![[Then::Retry, Then::Close][n as usize % 2]]
            };
            for then in ends {
                if !self.cell(scenario, files, Cell { n, then, ..cell }).reached {
                    return;
                }
            }
        }
    }

    fn end(self, what: &str, began: Instant) {
        let Sum { scenarios, cells, struck, wrong } = self;
        let names = scenarios.len();
        println!(
            "{what}: {names} scenarios, {cells} cells, {struck} failures of the host, {:.1} s",
            began.elapsed().as_secs_f64()
        );
        let told = wrong.iter().take(TOLD).cloned().collect::<Vec<_>>().join("\n");
        assert!(wrong.is_empty(), "{} of {cells} cells are wrong, among them\n{told}", wrong.len());
    }
}

fn is_full() -> bool {
    std::env::var("CORDISK_FAULTS").is_ok_and(|value| value == "full")
}

/// Name of the cell in `CORDISK_FAULT`, if it is set.
fn wanted() -> Option<String> {
    std::env::var("CORDISK_FAULT").ok()
}

fn seed() -> u64 {
    let seed = std::env::var("CORDISK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("CORDISK_SEED={seed}");
    seed
}

/// Returns the scenarios of all shapes. The shape `WIDE` gets only those about the growth of
/// refcounts, for which it is made.
fn scenarios() -> Vec<Scenario> {
    let growth =
        |scenario: &Scenario| scenario.name.contains("refcount") || scenario.name.contains("grow");
    let wide = all(WIDE).into_iter().filter(growth);
    [SMALL, SMALL_V2, PAGE, USUAL].into_iter().flat_map(all).chain(wide).collect()
}

impl Scenario {
    fn sides(&self) -> Vec<Side> {
        let middle = self.middle.as_ref().map(|_| Side::Middle);
        [Side::Overlay, Side::Base].into_iter().chain(middle).collect()
    }

    /// Returns a cell of the scenario with n so large that no operation fails.
    fn cell(&self, side: Side, error: Named, how_often: HowOften, then: Then) -> Cell {
        Cell {
            scenario: self.name,
            shape: self.shape.name,
            side,
            n: u64::MAX,
            error,
            how_often,
            then,
        }
    }

    /// Returns s if one of s cells runs, unless the whole matrix does. Shapes that are expensive,
    /// or differ from others only in numbers, have a larger s.
    fn share(&self) -> u64 {
        match self.shape.name {
            _ if is_full() => 1,
            "v3-512" => 1,
            "v2-512" => 4,
            "v3-512-64" => 24,
            _ => 48,
        }
    }
}

/// Returns how many operations on a file a scenario performs while nothing fails.
fn operations(scenario: &Scenario, files: &Files, side: Side) -> u64 {
    run(scenario, files, &scenario.cell(side, USUAL_ERRORS[0], HowOften::Once, Then::Close), mapped)
        .counted
}

fn is_sampled(cell: &Cell, share: u64) -> bool {
    mix(cell.to_string().bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte))))
        .is_multiple_of(share)
}

/// Runs `work` on a thread, and panics if it takes longer than any run does.
fn watched(work: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        work();
        let _ = sender.send(());
    });
    let limit = Duration::from_secs(if is_full() { 24 * 3600 } else { 1200 });
    if receiver.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("the matrix hangs: a lock was kept, or an operation that was let go did not end");
    }
    if let Err(panic) = worker.join() {
        std::panic::resume_unwind(panic);
    }
}

/// P5 to P8, P16, H12 to H14, H21: an operation that fails on the host, once or for ever, fails
/// only the requests that needed it.
#[test]
fn every_operation_of_every_scenario_fails_once_and_for_ever() {
    if let Some(name) = wanted() {
        return one_cell(&name);
    }
    watched(|| {
        let began = Instant::now();
        let mut sum = Sum::default();
        for scenario in scenarios() {
            let at = (Instant::now(), sum.cells);
            let files = scenario.files();
            for side in scenario.sides() {
                let last = operations(&scenario, &files, side);
                for error in
                    USUAL_ERRORS.into_iter().chain(MORE_ERRORS.into_iter().filter(|_| is_full()))
                {
                    for how_often in
                        [HowOften::Once, HowOften::ForEver, HowOften::EverySecond, HowOften::Random]
                    {
                        let cell = scenario.cell(side, error, how_often, Then::Close);
                        match (how_often, scenario.share()) {
                            (HowOften::Random | HowOften::EverySecond, _) if !is_full() => {}
                            (HowOften::Random, _) => {
                                for n in 1..=20 {
                                    sum.cell(&scenario, &files, Cell { n, ..cell });
                                }
                            }
                            (_, 1) => sum.every_n(&scenario, &files, cell),
                            (_, share) => {
                                let cells = (1..=last).flat_map(|n| {
                                    [Then::Retry, Then::Close].map(|then| Cell { n, then, ..cell })
                                });
                                for cell in cells.filter(|cell| is_sampled(cell, 2 * share)) {
                                    sum.cell(&scenario, &files, cell);
                                }
                            }
                        }
                    }
                }
            }
            if std::env::var_os("CORDISK_FAULTS_TIMES").is_some() {
                println!(
                    "{}/{}: {} cells in {:?}",
                    scenario.name,
                    scenario.shape.name,
                    sum.cells - at.1,
                    at.0.elapsed()
                );
            }
        }
        sum.end("fault matrix", began);
    });
}

/// Two failures: the second one during the handling of the first, or while the image is opened
/// again after it.
#[test]
fn a_second_failure_while_the_first_is_dealt_with() {
    if wanted().is_some() {
        return;
    }
    watched(|| {
        let (began, seed) = (Instant::now(), seed());
        let mut sum = Sum::default();
        let errors: Vec<Named> = USUAL_ERRORS
            .into_iter()
            .chain(MORE_ERRORS)
            .filter(|error| error.kind != Kind::Hangs)
            .collect();
        for (index, scenario) in [SMALL, SMALL_V2].into_iter().flat_map(all).enumerate() {
            let files = scenario.files();
            let last = operations(&scenario, &files, Side::Overlay);
            for round in 0..if is_full() { 400 } else { 16 } {
                let random = |what: u64, below: u64| {
                    mix(seed << 48 ^ (index as u64) << 32 ^ round << 8 ^ what) % below
                };
                if last == 0 {
                    break;
                }
                let then = [Then::Retry, Then::Close, Then::Reopen(1 + random(1, 6))]
                    [random(2, 3) as usize];
                let error = errors[random(3, errors.len() as u64) as usize];
                let cell =
                    scenario.cell(Side::Overlay, error, HowOften::Twice(1 + random(4, 8)), then);
                sum.cell(&scenario, &files, Cell { n: 1 + random(5, last), ..cell });
            }
        }
        sum.end("compound faults", began);
    });
}

/// Runs the cell of a name that a failure printed.
fn one_cell(name: &str) {
    let parts: Vec<&str> = name.split('/').collect();
    let [scenario, shape, side, n, error, how_often, then] = parts[..] else {
        panic!("{name} is no name of a cell")
    };
    let scenarios = scenarios();
    let scenario = scenarios
        .iter()
        .find(|known| known.name == scenario && known.shape.name == shape)
        .expect("a scenario");
    let side =
        scenario.sides().into_iter().find(|known| format!("{known:?}") == side).expect("a file");
    let error = USUAL_ERRORS
        .into_iter()
        .chain(MORE_ERRORS)
        .find(|known| known.name == error)
        .expect("an error");
    let often = [HowOften::Once, HowOften::ForEver, HowOften::EverySecond, HowOften::Random];
    let twice = (1..100).map(HowOften::Twice);
    let how_often = often
        .into_iter()
        .chain(twice)
        .find(|known| format!("{known:?}") == how_often)
        .expect("how often");
    let thens = [Then::Retry, Then::Close].into_iter().chain((1..100).map(Then::Reopen));
    let then = thens.into_iter().find(|known| format!("{known:?}") == then).expect("what then");
    let cell =
        Cell { n: n.parse().expect("a number"), ..scenario.cell(side, error, how_often, then) };
    println!("{cell}: {:?}", run(scenario, &scenario.files(), &cell, mapped));
}

/// The images that the scenarios start from are valid and have the intended content, also according
/// to QEMU.
#[test]
fn images_made_by_hand_are_right() {
    let dir = tempfile::tempdir().unwrap();
    for scenario in scenarios().into_iter().filter(|scenario| scenario.middle.is_none()) {
        let what = format!("{}/{}", scenario.name, scenario.shape.name);
        let files = scenario.files();
        let seen = files.look(&files.overlay.bytes).unwrap();
        assert_eq!(seen.verdict.all(), Vec::<String>::new(), "{what}");
        assert!(seen.guest == files.content, "{what}");
        if ![
            "discard",
            "discard-without-backing",
            "write-new-refcount-block",
            "discard-shared-table",
        ]
        .contains(&scenario.name)
        {
            continue;
        }
        std::fs::write(dir.path().join("base.raw"), &files.base).unwrap();
        let overlay = dir.path().join("overlay.qcow2");
        std::fs::write(&overlay, &files.overlay.bytes).unwrap();
        let check = std::process::Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2"])
            .arg(&overlay)
            .output()
            .unwrap();
        // Status 3 means leaks and no errors.
        assert_eq!(
            check.status.code(),
            Some(if seen.verdict.leaks > 0 { 3 } else { 0 }),
            "{what}: {}",
            String::from_utf8_lossy(&check.stderr)
        );
        let raw = dir.path().join("out");
        let args = ["convert", "-f", "qcow2", "-O", "raw"];
        let convert = std::process::Command::new("qemu-img")
            .args(args)
            .args([&overlay, &raw])
            .output()
            .unwrap();
        assert!(convert.status.success(), "{what}: {}", String::from_utf8_lossy(&convert.stderr));
        assert!(std::fs::read(raw).unwrap() == files.content, "{what}: QEMU reads something else");
    }
}

/// The checker finds errors in an image that a cell leaves.
#[test]
fn the_reader_finds_what_is_wrong() {
    let sketch = Sketch::usual(SMALL);
    let files = Files::new(&sketch, None, base(&SMALL));
    let bytes = &files.overlay.bytes;
    let number = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
    let l1 = number(40);
    let l2 = number(l1) & !(1 << 63);
    let refblock = number(number(48));
    let data = (number(l2 + 2 * 8) & !(1 << 63)) / 512;
    let looks = |at: u64, value: &[u8]| {
        let mut changed = bytes.clone();
        changed[at as usize..][..value.len()].copy_from_slice(value);
        let seen = files.look(&changed).unwrap();
        (seen.verdict.all().len(), seen.verdict.all_leaks(), seen.guest == files.content)
    };
    assert_eq!(looks(0, b"Q"), (0, 0, true));
    assert_eq!(looks(refblock + data * 2, &[0, 0]), (2, 0, true), "not counted, and COPIED");
    assert_eq!(looks(refblock + data * 2, &[0, 2]), (1, 1, true), "counted twice, and COPIED");
    assert_eq!(looks(refblock + 400, &[0, 1]), (0, 1, true), "a leak");
    assert_eq!(looks(l2 + 2 * 8, &[0]), (1, 0, true), "not COPIED");
    assert_eq!(looks(l2 + 2 * 8, &[0; 8]), (0, 1, false), "unlinked");
    assert_eq!(looks(l2 + 2 * 8, &number(l2 + 3 * 8).to_be_bytes()), (1, 1, false), "two names");
    assert_eq!(looks(l1, &(1u64 << 40).to_be_bytes()).0, 1, "outside the file");
}
