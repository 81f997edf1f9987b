//! The life of a job as two tables (QEMU `job.c`: `JobSTT` and `JobVerbTable`).

use std::fmt;

/// Where a job is in its life. Names are QEMU's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// Exists, its worker has not started.
    Created,
    /// At work, or asleep because of its speed.
    Running,
    /// Stopped by a user or by an error that asked for one.
    Paused,
    /// Waits for the order to complete (no job of ours does).
    Ready,
    /// Paused while ready.
    Standby,
    /// Its work is done; waits for the others of its transaction, which we never have.
    Waiting,
    /// Waits for the order to finalize, or finalizes.
    Pending,
    /// Failed or cancelled, cleaning up.
    Aborting,
    /// Over; its result can be looked at until it is dismissed.
    Concluded,
    /// Gone.
    Null,
}

/// What a user can ask of a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verb {
    /// Give up, keeping what was done.
    Cancel,
    /// Stop until resumed.
    Pause,
    /// Go on.
    Resume,
    /// Change the rate limit.
    SetSpeed,
    /// End a job that is ready.
    Complete,
    /// Make the result of a pending job take effect.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
    /// Change other options of a running job.
    Change,
}

use Status::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting};

/// Which status may follow which.
const TRANSITIONS: [(Status, &[Status]); 10] = [
    (Created, &[Running, Aborting, Null]),
    (Running, &[Paused, Ready, Waiting, Aborting]),
    (Paused, &[Running]),
    (Ready, &[Standby, Waiting, Aborting]),
    (Standby, &[Ready]),
    (Waiting, &[Pending, Aborting]),
    (Pending, &[Aborting, Concluded]),
    (Aborting, &[Aborting, Concluded]),
    (Concluded, &[Null]),
    (Null, &[]),
];

/// In which status a verb is accepted.
const VERBS: [(Verb, &[Status]); 8] = [
    (Verb::Cancel, &[Created, Running, Paused, Ready, Standby, Waiting, Pending]),
    (Verb::Pause, &[Created, Running, Paused, Ready, Standby]),
    (Verb::Resume, &[Created, Running, Paused, Ready, Standby]),
    (Verb::SetSpeed, &[Created, Running, Paused, Ready, Standby]),
    (Verb::Complete, &[Ready, Standby]),
    (Verb::Finalize, &[Pending]),
    (Verb::Dismiss, &[Concluded]),
    (Verb::Change, &[Created, Running, Paused, Ready, Standby]),
];

impl Status {
    /// Whether `next` may follow.
    pub fn may_become(self, next: Status) -> bool {
        TRANSITIONS.iter().any(|(from, to)| *from == self && to.contains(&next))
    }

    /// Whether a job in this status accepts `verb`.
    pub fn accepts(self, verb: Verb) -> bool {
        VERBS.iter().any(|(asked, statuses)| *asked == verb && statuses.contains(&self))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Created => "created",
            Running => "running",
            Paused => "paused",
            Ready => "ready",
            Standby => "standby",
            Waiting => "waiting",
            Pending => "pending",
            Aborting => "aborting",
            Concluded => "concluded",
            Null => "null",
        })
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
            Verb::Change => "change",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Status; 10] = [Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null];

    /// The matrix as QEMU's source prints it, row by row.
    #[test]
    fn transitions_are_those_of_qemu() {
        //           C  R  P  Y  S  W  D  X  E  N
        let rows = [
            [0, 1, 0, 0, 0, 0, 0, 1, 0, 1], // created
            [0, 0, 1, 1, 0, 1, 0, 1, 0, 0], // running
            [0, 1, 0, 0, 0, 0, 0, 0, 0, 0], // paused
            [0, 0, 0, 0, 1, 1, 0, 1, 0, 0], // ready
            [0, 0, 0, 1, 0, 0, 0, 0, 0, 0], // standby
            [0, 0, 0, 0, 0, 0, 1, 1, 0, 0], // waiting
            [0, 0, 0, 0, 0, 0, 0, 1, 1, 0], // pending
            [0, 0, 0, 0, 0, 0, 0, 1, 1, 0], // aborting
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 1], // concluded
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // null
        ];
        for (from, row) in ALL.into_iter().zip(rows) {
            for (to, allowed) in ALL.into_iter().zip(row) {
                assert_eq!(from.may_become(to), allowed == 1, "{from} -> {to}");
            }
        }
    }

    #[test]
    fn verbs_are_those_of_qemu() {
        //                              C  R  P  Y  S  W  D  X  E  N
        let rows = [
            (Verb::Cancel, [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]),
            (Verb::Pause, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]),
            (Verb::Resume, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]),
            (Verb::SetSpeed, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]),
            (Verb::Complete, [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]),
            (Verb::Finalize, [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
            (Verb::Dismiss, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]),
            (Verb::Change, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]),
        ];
        for (verb, row) in rows {
            for (status, allowed) in ALL.into_iter().zip(row) {
                assert_eq!(status.accepts(verb), allowed == 1, "{verb} while {status}");
            }
        }
    }
}
