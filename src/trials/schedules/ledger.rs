//! The values that a guest may read when requests overlap, from the begin and end of each write.
//!
//! A read may return the value of a write that began before the read ended, unless another write
//! lies wholly between the two. Each unit is therefore a register: while a write to it is in flight
//! it has its old value or the new one. A durable state is checked like a read that begins when the
//! flush was called: it has what was complete by then, or a later value (P1, P4).

use std::ops::Range;
use std::sync::Mutex;

/// Bytes that each request writes as a whole: half of the smallest cluster, so that two different
/// writes can share a cluster.
pub const UNIT: usize = 256;

/// A logical time; each call of the ledger increments it.
pub type Moment = u64;

/// The end of a write that has not ended.
const RUNNING: Moment = Moment::MAX;

#[derive(Clone, Copy, Debug)]
struct Write {
    value: u8,
    began: Moment,
    ended: Moment,
    /// The write failed: each of its units has the old value or the new one.
    failed: bool,
}

/// The values that were written to each unit, with their times.
#[derive(Debug)]
pub struct Ledger {
    // A mutex of the standard library, so that the scheduler does not see it.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    now: Moment,
    next_value: u8,
    units: Vec<Vec<Write>>,
}

impl Ledger {
    /// Creates the ledger of a disk that reads as `bytes`.
    ///
    /// # Panics
    /// If the bytes of a unit differ from each other.
    pub fn new(bytes: &[u8]) -> Ledger {
        let units = bytes
            .chunks(UNIT)
            .map(|unit| {
                vec![Write { value: value(unit).unwrap(), began: 0, ended: 0, failed: false }]
            })
            .collect();
        Ledger { state: Mutex::new(State { now: 0, next_value: 0, units }) }
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap();
        state.now += 1;
        f(&mut state)
    }

    /// Returns the current moment.
    pub fn now(&self) -> Moment {
        self.with(|state| state.now)
    }

    /// Returns a byte that no write has used yet, counting from 1.
    pub fn fresh_value(&self) -> u8 {
        self.with(|state| {
            state.next_value =
                state.next_value.checked_add(1).expect("so many writes are not made");
            state.next_value
        })
    }

    /// Records a write of `value` to `units`, which `work` performs.
    ///
    /// # Errors
    /// Returns the error of `work`. Each unit may then have the old value or the new one.
    pub fn write<E>(
        &self,
        units: Range<usize>,
        value: u8,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let began = self.with(|state| {
            let began = state.now;
            state.units[units.clone()]
                .iter_mut()
                .for_each(|unit| unit.push(Write { value, began, ended: RUNNING, failed: false }));
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

    /// Asserts that `bytes`, read from unit `first` on between two moments, are allowed values.
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

/// Returns the values that a read between two moments may return.
fn allowed(writes: &[Write], began: Moment, ended: Moment) -> Vec<u8> {
    let hidden = |write: &Write| {
        writes.iter().any(|other| !other.failed && other.began > write.ended && other.ended < began)
    };
    writes
        .iter()
        .filter(|write| write.began < ended && !hidden(write))
        .map(|write| write.value)
        .collect()
}

/// Returns the byte of a unit whose bytes are all equal.
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
