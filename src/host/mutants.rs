//! Steps of the engine that keep data safe. A test run can leave out each of them; if no test then
//! fails, the suite does not test that step.
//!
//! Outside of tests, [`without`] is `false` at compile time, and none of this is in the program. In
//! tests, the environment names one step: `CORDISK_MUTANT=barrier-before-l2`. `scripts/mutants.sh`
//! runs the suite once for each step, and prints which steps were noticed.
//!
//! Locks around data cannot be left out, because without the guard there is no access to the data
//! (H24). The locks in this list serialize a sequence of steps.

macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// A step that can be left out.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Step {
            $($(#[doc = $doc])+ $name,)+
        }

        /// All steps: each with its name for the environment and its purpose.
        #[cfg(any(test, feature = "testing"))]
        pub const ALL: &[(Step, &str, &str)] = &[$((Step::$name, $text, concat!($($doc),+)),)+];
    };
}

mutants! {
    /// R6: the refcount blocks are durable before the moved refcount table is written.
    BarrierBeforeRefcountTable = "barrier-before-refcount-table",
    /// R6: the moved refcount table is durable before the header names it.
    BarrierBeforeTableSwitch = "barrier-before-table-switch",
    /// R5: a new refcount block is durable before the refcount table names it.
    BarrierBeforeRefcountEntry = "barrier-before-refcount-entry",
    /// R2, R5: of several new refcount blocks, one that counts another is named first.
    BarrierBetweenRefcountEntries = "barrier-between-refcount-entries",
    /// R1, R2: data and refcounts are durable before L2 entries name clusters.
    BarrierBeforeL2 = "barrier-before-l2",
    /// I6: both words of an extended L2 entry change under the write lock of the table's slot.
    EntryChangesWhole = "entry-changes-whole",
    /// R4: an L2 table is durable before the L1 table names it.
    BarrierBeforeL1 = "barrier-before-l1",
    /// R3: the new mapping is durable before a refcount is lowered, and before a flush returns
    /// (P1).
    BarrierBeforeFrees = "barrier-before-frees",
    /// R7: the writes of a killed process are durable before the clusters that it leaked are
    /// allocated.
    BarrierBeforeGiveBack = "barrier-before-give-back",
    /// R11, R12: a change of the header is durable before any step relies on it.
    BarrierAfterHeader = "barrier-after-header",
    /// P17: a successor knows each change of the mapping that was acknowledged: the change is in
    /// the journal before the request that made it returns.
    ChangeIsJournaled = "change-is-journaled",
    /// P17: a successor knows which clusters of a change read as zeros.
    ZeroFlagIsJournaled = "zero-flag-is-journaled",
    /// P17: the journal keeps a change until a pass has made it durable.
    JournalIsCutAfterPass = "journal-is-cut-after-pass",
    /// P17: a pass cuts from the journal only what was in it before the pass took its copies.
    CutStopsWherePassBegan = "cut-stops-where-pass-began",
    /// P17: of two changes of one cluster, a successor applies the later one.
    LastChangeWins = "last-change-wins",
    /// I2: a successor counts the clusters that the journal names before it allocates any.
    NamedClustersAreClaimed = "named-clusters-are-claimed",
    /// I2: the late search for leaks leaves alone what was allocated or freed since the takeover.
    LateSearchKeepsChanged = "late-search-keeps-changed",
    /// I2: the late search for leaks counts the entries of every L2 table before it frees.
    LateSearchReadsEveryTable = "late-search-reads-every-table",
    /// P7: a successor of a process whose barrier failed accepts no write.
    LatchIsJournaled = "latch-is-journaled",
    /// P7: a successor of a process that died in a barrier asks what became of that barrier.
    BarrierIsJournaled = "barrier-is-journaled",
    /// R12: all writes are durable before the backing file is detached.
    FlushBeforeDetach = "flush-before-detach",
    /// R12: a last flush runs under the drain, so that no write comes between it and the detach.
    FlushUnderDrain = "flush-under-drain",
    /// H16: no request reads from the backing file while it is detached.
    DrainBeforeDetach = "drain-before-detach",
    /// R12, H17: every cluster is checked before the backing file is detached.
    VerifyBeforeDetach = "verify-before-detach",
    /// R12: clusters whose mapping has changed since are checked again under the drain.
    VerifyChangesBeforeDetach = "verify-changes-before-detach",
    /// H1, H3, H4: a copy from below looks again at the mapping that it replaces.
    LookAgainBeforeCopyUp = "look-again-before-copy-up",
    /// H1, H2, H3: the copy of a read that waits looks again at the mapping before it fills.
    LookAgainBeforeFill = "look-again-before-fill",
    /// H5: a reader holds the range that it reads.
    ReadersHoldTheirRange = "readers-hold-their-range",
    /// H6: a write in place holds the range that it writes.
    WritersHoldTheirRange = "writers-hold-their-range",
    /// I1: a request that changes a mapping waits for the requests that use it.
    ExclusiveWaits = "exclusive-waits",
    /// H28: requests for overlapping ranges proceed in order of arrival.
    ArrivalOrder = "arrival-order",
    /// R3, R7: a freed cluster is not allocated until its removal is durable.
    Quarantine = "quarantine",
    /// R7, R8, H7: a freed cluster is punched before it is allocated again.
    PunchBeforeReuse = "punch-before-reuse",
    /// R3: a pass takes the pending frees before it copies tables.
    FreesBeforeTables = "frees-before-tables",
    /// R2: a pass copies the L2 tables before it copies the refcounts.
    TablesBeforeRefcounts = "tables-before-refcounts",
    /// P1: tables that a failed pass did not write stay dirty for the next pass.
    FailedTablesStayDirty = "failed-tables-stay-dirty",
    /// R2: refcounts that a failed pass did not write stay dirty for the next pass.
    FailedRefcountsStayDirty = "failed-refcounts-stay-dirty",
    /// H13: frees of a failed pass stay queued for the next pass.
    FailedFreesStayQueued = "failed-frees-stay-queued",
    /// H13: a cluster that was not published is given back.
    UnpublishedIsGivenBack = "unpublished-is-given-back",
    /// R2: a cluster is counted before it is returned to the caller.
    CountedBeforeHandedOut = "counted-before-handed-out",
    /// R16, V24: guest data is not written where metadata lies.
    DataIsNoMetadata = "data-is-no-metadata",
    /// V27: guest data is not written to clusters that count as free.
    DataIsCounted = "data-is-counted",
    /// V24: a table that is loaded again is checked again if its bytes are others.
    ReloadsAreCompared = "reloads-are-compared",
    /// V24: a cluster that becomes metadata is no longer known as one that an entry may name.
    MetadataIsNotKnownAsData = "metadata-is-not-known-as-data",
    /// R15: a reference that is not counted cannot be dropped.
    FreesAreCounted = "frees-are-counted",
    /// P7: after a failed barrier no write and no flush succeeds.
    FailedBarrierLatches = "failed-barrier-latches",
    /// P7, H21: one barrier runs at a time, so that its failure latches before the next one starts.
    OneBarrierAtATime = "one-barrier-at-a-time",
    /// R13, H10: one write-back pass runs at a time.
    OnePassAtATime = "one-pass-at-a-time",
    /// P1: a flush waits for a pass that began after the flush was called.
    FlushWaitsForNextPass = "flush-waits-for-next-pass",
    /// I2: what an entry may name after a failure of the journal is not given back.
    NamedIsNotGivenBack = "named-is-not-given-back",
    /// P2: the commit timer hears of the first table that becomes dirty.
    FirstDirtyTableIsSignalled = "first-dirty-table-is-signalled",
    /// R13: one thread loads a given table into memory.
    OneLoaderPerTable = "one-loader-per-table",
    /// H11: a dirty table is not evicted from memory.
    DirtyTablesStay = "dirty-tables-stay",
    /// H11: no table is evicted between the moments when a pass copies it and writes it.
    NoEvictionDuringPass = "no-eviction-during-pass",
    /// P9: a file that shrank is an error.
    ShrunkFileIsAnError = "shrunk-file-is-an-error",
    /// P9, P10: a copy is published only if the backing files are still unchanged.
    LayersUnchangedBeforePublish = "layers-unchanged-before-publish",
    /// P10: the server of the backing files is asked whether they were changed before they are
    /// detached.
    LayersAskedBeforeDetach = "layers-asked-before-detach",
    /// P10: the backing files are checked once more under the drain, when no request reads them.
    LayersUnchangedUnderDrain = "layers-unchanged-under-drain",
    /// P5: a copy that fails does not fail the read.
    CopyUpNeverFailsTheRead = "copy-up-never-fails-the-read",
    /// H19: the part of the last cluster behind the end of the disk is zeroed before the disk
    /// grows.
    CleanEndBeforeGrow = "clean-end-before-grow",
    /// H18: the content of a longer backing file is hidden before the disk grows.
    HideBelowBeforeGrow = "hide-below-before-grow",
    /// H17: a discarded cluster never shows the data of the backing file.
    DiscardHidesBelow = "discard-hides-below",
    /// P11: corruption stops all writing.
    CorruptionLatches = "corruption-latches",
    /// P1: a write with O_DSYNC is durable when it is answered.
    SyncedWritesFlush = "synced-writes-flush",
    /// P1: a flush that is requested while another one runs waits for the next one.
    LateFlushesWait = "late-flushes-wait",
    /// P1: a write that returns during a flush is not counted as covered by it.
    WritesCountedBeforeFlush = "writes-counted-before-flush",
    /// R12: the check before the backing file is detached covers the last cluster of the disk.
    VerifyTheLastCluster = "verify-the-last-cluster",
    /// R11: the possible effects of a failed header write are undone before the next header write.
    HeaderIsPutBack = "header-is-put-back",
    /// P4, P7: before an image that was not closed is read, pages that the host's cache holds and
    /// the disk may not are dropped.
    SettleBeforeFirstRead = "settle-before-first-read",
    /// P7: an image whose last writes cannot be written back is not opened for writing.
    FailedWriteBackRefusesImage = "failed-write-back-refuses-image",
    /// P7: an image whose last barrier failed keeps its open mark.
    FailedImageKeepsItsMark = "failed-image-keeps-its-mark",
    /// H1: a read from the host's page cache that is short is a miss.
    ShortCachedReadIsAMiss = "short-cached-read-is-a-miss",
    /// P7: an error of fdatasync(2) is an error of the barrier.
    SyncErrorsAreErrors = "sync-errors-are-errors",
}

/// Returns whether this step is left out: never, outside of tests.
#[cfg(not(any(test, feature = "testing")))]
#[inline(always)]
pub const fn without(_step: Step) -> bool {
    false
}

/// Returns whether this step is left out, because the environment names it.
#[cfg(any(test, feature = "testing"))]
pub fn without(step: Step) -> bool {
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
