//! What a guest may read when requests overlap: who wrote what, from when until when.
//!
//! A read may find the value of a write that began before the read ended, unless another write lies wholly between the two. So each unit is a
//! register that keeps its old value or takes the new one while a write to it is under way, and nothing else. A durable state is judged as a read
//! that begins when the flush was called: what was complete by then, or something later (P1, P4).

use std::ops::Range;
use std::sync::Mutex;

/// Bytes that are written together or not at all: half of the smallest cluster, so that a cluster has two owners.
pub const UNIT: usize = 256;

/// A moment: every call of the ledger has its own.
pub type Moment = u64;

/// Not yet.
const RUNNING: Moment = Moment::MAX;

#[derive(Clone, Copy, Debug)]
struct Write {
    value: u8,
    began: Moment,
    ended: Moment,
    /// It failed: each unit has the old value or the new one.
    failed: bool,
}

/// All writes to all units.
#[derive(Debug)]
pub struct Ledger {
    // The standard library's: no scheduler is to see it.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    now: Moment,
    next_value: u8,
    units: Vec<Vec<Write>>,
}

impl Ledger {
    /// A disk that reads as these bytes.
    ///
    /// # Panics
    /// Where a unit is not made of one byte only.
    pub fn new(bytes: &[u8]) -> Ledger {
        let units = bytes.chunks(UNIT).map(|unit| vec![Write { value: value(unit).unwrap(), began: 0, ended: 0, failed: false }]).collect();
        Ledger { state: Mutex::new(State { now: 0, next_value: 0, units }) }
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap();
        state.now += 1;
        f(&mut state)
    }

    /// This moment.
    pub fn now(&self) -> Moment {
        self.with(|state| state.now)
    }

    /// A byte that nobody has written yet, from 1 on.
    pub fn fresh_value(&self) -> u8 {
        self.with(|state| {
            state.next_value = state.next_value.checked_add(1).expect("so many writes are not made");
            state.next_value
        })
    }

    /// Writes `value` to some units: `work` does it.
    ///
    /// # Errors
    /// What `work` says. Each of the units may have the old value or the new one then.
    pub fn write<E>(&self, units: Range<usize>, value: u8, work: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let began = self.with(|state| {
            let began = state.now;
            state.units[units.clone()].iter_mut().for_each(|unit| unit.push(Write { value, began, ended: RUNNING, failed: false }));
            began
        });
        let result = work();
        self.with(|state| {
            for unit in &mut state.units[units] {
                let mine = unit.iter_mut().find(|write| write.began == began).unwrap();
                (mine.ended, mine.failed) = (state.now, result.is_err());
            }
        });
        result
    }

    /// Asserts that `bytes`, read from unit `first` on between two moments, are what may be read.
    pub fn check(&self, first: usize, bytes: &[u8], began: Moment, ended: Moment, what: &str) {
        self.with(|state| {
            for (index, bytes) in bytes.chunks(UNIT).enumerate() {
                let unit = first + index;
                let allowed = allowed(&state.units[unit], began, ended);
                let found = value(bytes);
                assert!(
                    found.is_some_and(|value| allowed.contains(&value)),
                    "{what}: unit {unit} reads {found:?} between {began} and {ended}, allowed {allowed:?} of {:?}",
                    state.units[unit]
                );
            }
        });
    }
}

/// The values that may be read between two moments.
fn allowed(writes: &[Write], began: Moment, ended: Moment) -> Vec<u8> {
    let hidden = |write: &Write| writes.iter().any(|other| !other.failed && other.began > write.ended && other.ended < began);
    writes.iter().filter(|write| write.began < ended && !hidden(write)).map(|write| write.value).collect()
}

/// The byte that a unit is made of, if it is one byte.
fn value(unit: &[u8]) -> Option<u8> {
    unit.iter().all(|byte| *byte == unit[0]).then_some(unit[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_or_new_while_a_write_runs_and_new_afterwards() {
        let writes = [
            Write { value: 9, began: 0, ended: 0, failed: false },
            Write { value: 1, began: 10, ended: 20, failed: false },
            Write { value: 2, began: 15, ended: 30, failed: false },
            Write { value: 3, began: 40, ended: RUNNING, failed: true },
        ];
        assert_eq!(allowed(&writes, 5, 8), [9]);
        assert_eq!(allowed(&writes, 5, 12), [9, 1]);
        assert_eq!(allowed(&writes, 21, 25), [1, 2], "the first value is gone for good");
        assert_eq!(allowed(&writes, 31, 35), [1, 2], "two that overlap: either");
        assert_eq!(allowed(&writes, 41, 50), [1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "unit 1 reads Some(7)")]
    fn a_value_of_nobody_is_seen() {
        let ledger = Ledger::new(&[7; 2 * UNIT]);
        ledger.write(1..2, 8, || Ok::<(), ()>(())).unwrap();
        let now = ledger.now();
        ledger.check(0, &[7; 2 * UNIT], now, now + 1, "read");
    }
}
