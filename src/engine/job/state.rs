//! Status transitions and verbs of a job as two tables (QEMU `job.c`: `JobSTT` and `JobVerbTable`).

use std::fmt;

/// Status of a job. The names are QEMU's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// The job exists, but its worker has not started.
    Created,
    /// The worker runs, or sleeps because of the rate limit.
    Running,
    /// Paused by a user, or by an error whose policy is to stop.
    Paused,
    /// Waits for [`Verb::Complete`] (no job of this program does).
    Ready,
    /// Paused while ready.
    Standby,
    /// The work is done; waits for the other jobs of its transaction (there are no transactions
    /// here).
    Waiting,
    /// Waits for [`Verb::Finalize`], or makes its result take effect.
    Pending,
    /// Failed or cancelled, and cleaning up.
    Aborting,
    /// Ended; its result can be queried until it is dismissed.
    Concluded,
    /// Removed from the registry.
    Null,
}

/// A command that a user can give a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verb {
    /// End the job, and keep the work that was done.
    Cancel,
    /// Stop until the job is resumed.
    Pause,
    /// Go on after a pause.
    Resume,
    /// Change the rate limit.
    SetSpeed,
    /// End a job that is ready.
    Complete,
    /// Make the result of a pending job take effect.
    Finalize,
    /// Remove a concluded job.
    Dismiss,
    /// Change other options of a running job.
    Change,
}

use Status::{
    Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
};

/// For each status, the statuses that may follow it.
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

/// For each verb, the statuses in which it is accepted.
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
    /// Whether `next` may follow this status.
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

    const ALL: [Status; 10] =
        [Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null];

    /// Protects: the transitions are those of the matrix in QEMU's source, row by row.
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
