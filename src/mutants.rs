//! Steps of the engine that keep data safe, each of which a test run can leave out: a suite that does not fail then has not tested the step.
//!
//! Outside of tests [`without`] is `false` at compile time and nothing of this is in the program. In tests the environment names one step,
//! `CORDISK_MUTANT=barrier-before-l2`; `scripts/mutants.sh` runs the suite once for each and prints which ones were noticed.
//!
//! Locks around data cannot be left out: without the guard there is no way to the data (H24). Those that are here guard a sequence of steps.

macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// A step that can be left out.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub(crate) enum Step {
            $($(#[doc = $doc])+ $name,)+
        }

        /// All of them: name for the environment, and what the step is for.
        #[cfg(test)]
        pub(crate) const ALL: &[(Step, &str, &str)] = &[$((Step::$name, $text, concat!($($doc),+)),)+];
    };
}

mutants! {
    /// R6: the blocks are durable before the moved refcount table is written.
    BarrierBeforeRefcountTable = "barrier-before-refcount-table",
    /// R6: the moved refcount table is durable before the header names it.
    BarrierBeforeTableSwitch = "barrier-before-table-switch",
    /// R5: a new refcount block is durable before the table names it.
    BarrierBeforeRefcountEntry = "barrier-before-refcount-entry",
    /// R2, R5: where several blocks are new, one that counts another is named first.
    BarrierBetweenRefcountEntries = "barrier-between-refcount-entries",
    /// R1, R2: data and refcounts are durable before L2 entries name clusters.
    BarrierBeforeL2 = "barrier-before-l2",
    /// R4: an L2 table is durable before the L1 table names it.
    BarrierBeforeL1 = "barrier-before-l1",
    /// R3: the new mapping is durable before a refcount is lowered, and before a flush returns (P1).
    BarrierBeforeFrees = "barrier-before-frees",
    /// R7: what a killed process wrote is durable before what it leaked is handed out.
    BarrierBeforeGiveBack = "barrier-before-give-back",
    /// R11, R12: a change of the header is durable before anything relies on it.
    BarrierAfterHeader = "barrier-after-header",
    /// R12: everything is durable before the backing file is cut off.
    FlushBeforeDetach = "flush-before-detach",
    /// R12: and nothing comes in between.
    FlushUnderDrain = "flush-under-drain",
    /// H16: nobody reads from the backing file while it is cut off.
    DrainBeforeDetach = "drain-before-detach",
    /// R12, H17: every cluster is looked at before the backing file is cut off.
    VerifyBeforeDetach = "verify-before-detach",
    /// R12: and once more, where its mapping has changed since, when nothing can change any more.
    VerifyChangesBeforeDetach = "verify-changes-before-detach",
    /// H1, H3, H4: a copy from below looks again at the mapping that it replaces.
    LookAgainBeforeCopyUp = "look-again-before-copy-up",
    /// H1, H2, H3: so does the copy of a read that waits.
    LookAgainBeforeFill = "look-again-before-fill",
    /// H5: a reader holds the range that it reads.
    ReadersHoldTheirRange = "readers-hold-their-range",
    /// H6: a write in place holds the range that it writes.
    WritersHoldTheirRange = "writers-hold-their-range",
    /// I1: who changes a mapping waits for those who use it.
    ExclusiveWaits = "exclusive-waits",
    /// H28: who came first goes first.
    ArrivalOrder = "arrival-order",
    /// R3, R7: a freed cluster waits until its removal is durable.
    Quarantine = "quarantine",
    /// R7, R8, H7: a freed cluster is punched before it is handed out.
    PunchBeforeReuse = "punch-before-reuse",
    /// R3: a pass takes the frees before it copies tables.
    FreesBeforeTables = "frees-before-tables",
    /// R2: a pass copies the tables before the refcounts.
    TablesBeforeRefcounts = "tables-before-refcounts",
    /// P1: tables that a failed pass did not write are written by the next one.
    FailedTablesStayDirty = "failed-tables-stay-dirty",
    /// R2: so are refcounts.
    FailedRefcountsStayDirty = "failed-refcounts-stay-dirty",
    /// H13: and so are frees.
    FailedFreesStayQueued = "failed-frees-stay-queued",
    /// H13: a cluster that was not published is given back.
    UnpublishedIsGivenBack = "unpublished-is-given-back",
    /// R2: a cluster is counted before it is handed out.
    CountedBeforeHandedOut = "counted-before-handed-out",
    /// R16, V24: no guest data where metadata lies.
    DataIsNoMetadata = "data-is-no-metadata",
    /// V27: no guest data in clusters that count as free.
    DataIsCounted = "data-is-counted",
    /// R15: a reference that is not counted cannot be dropped.
    FreesAreCounted = "frees-are-counted",
    /// P7: after a failed barrier nothing succeeds any more.
    FailedBarrierLatches = "failed-barrier-latches",
    /// P7, H21: one barrier at a time, so that the one that fails is the one that is told.
    OneBarrierAtATime = "one-barrier-at-a-time",
    /// R13, H10: one pass at a time.
    OnePassAtATime = "one-pass-at-a-time",
    /// P1: a flush waits for a pass that began after it came.
    FlushWaitsForNextPass = "flush-waits-for-next-pass",
    /// R13: one thread brings a table into memory.
    OneLoaderPerTable = "one-loader-per-table",
    /// H11: a table that is not on disk is not dropped from memory.
    DirtyTablesStay = "dirty-tables-stay",
    /// H11: nor is any while a pass is between copying and writing it.
    NoEvictionDuringPass = "no-eviction-during-pass",
    /// P9: a file that shrank is an error.
    ShrunkFileIsAnError = "shrunk-file-is-an-error",
    /// P9, P10: what was read of backing files is of the files that were opened.
    LayersUnchangedBeforePublish = "layers-unchanged-before-publish",
    /// P10: the server of the backing files is asked whether they were changed before they are cut
    /// off.
    LayersAskedBeforeDetach = "layers-asked-before-detach",
    /// P10: nor were they changed until nobody reads them any more.
    LayersUnchangedUnderDrain = "layers-unchanged-under-drain",
    /// P5: a copy that fails does not fail the read.
    CopyUpNeverFailsTheRead = "copy-up-never-fails-the-read",
    /// H19: what lies behind the end of the disk is zero before the disk grows.
    CleanEndBeforeGrow = "clean-end-before-grow",
    /// H18: what a longer backing file holds is hidden before the disk grows.
    HideBelowBeforeGrow = "hide-below-before-grow",
    /// H17: a discarded cluster never shows what is below.
    DiscardHidesBelow = "discard-hides-below",
    /// P11: corruption stops all writing.
    CorruptionLatches = "corruption-latches",
    /// P1: a write with O_DSYNC is durable when it is answered.
    SyncedWritesFlush = "synced-writes-flush",
    /// P1: a flush that is asked for while another one runs waits for the next one.
    LateFlushesWait = "late-flushes-wait",
    /// P1: a write that returns during a flush is not counted as covered by it.
    WritesCountedBeforeFlush = "writes-counted-before-flush",
    /// R12: the check before the backing file is cut off goes up to the last cluster of the disk.
    VerifyTheLastCluster = "verify-the-last-cluster",
    /// R11: what a failed header write may have done is undone before the next header write.
    HeaderIsPutBack = "header-is-put-back",
    /// P4, P7: what the host's cache holds and the disk may not is dropped before an image is read that was not closed.
    SettleBeforeFirstRead = "settle-before-first-read",
    /// P7: an image whose last writes cannot be written back is not opened for writing.
    FailedWriteBackRefusesImage = "failed-write-back-refuses-image",
    /// P7: the mark stays on an image whose last barrier has failed.
    FailedImageKeepsItsMark = "failed-image-keeps-its-mark",
    /// H1: a read from the host's memory that is short is a miss.
    ShortCachedReadIsAMiss = "short-cached-read-is-a-miss",
    /// P7: an error of fdatasync(2) is an error of the barrier.
    SyncErrorsAreErrors = "sync-errors-are-errors",
}

/// Whether this step is left out: never, outside of tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn without(_step: Step) -> bool {
    false
}

/// Whether this step is left out, because the environment says so.
#[cfg(test)]
pub(crate) fn without(step: Step) -> bool {
    use std::sync::OnceLock;
    static CHOSEN: OnceLock<Option<Step>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| {
        let name = std::env::var("CORDISK_MUTANT").ok()?;
        let found = ALL.iter().find(|(_, text, _)| *text == name);
        Some(found.unwrap_or_else(|| panic!("CORDISK_MUTANT={name}: there is no such step")).0)
    });
    *chosen == Some(step)
}

/// Prints the list, for `scripts/mutants.sh`.
#[cfg(test)]
#[test]
fn list() {
    for (_, name, what) in ALL {
        println!("mutant {name}\t{}", what.trim());
    }
    let names: std::collections::HashSet<_> = ALL.iter().map(|(_, name, _)| name).collect();
    assert_eq!(names.len(), ALL.len());
}
