//! Every known race, forced: an operation of the host is held where the race begins, the other side comes, and only then it goes on.
//!
//! What is asserted besides the outcome is that the race was there: the held operation stands, and the other request waits for it, or has gone
//! through beside it, whichever is right. Where a hazard is at home elsewhere, the table names its test there; where it cannot arise, it says why.
//!
//! | hazard | test, or why there is none |
//! |---|---|
//! | H1 | `h01_a_guest_write_waits_for_the_copy_and_wins`, `h01_a_copy_waits_for_the_guest_write_and_gives_way` |
//! | H2 | `h02_two_readers_of_one_cluster_read_the_base_once` |
//! | H3 | `h03_a_discard_waits_for_the_copy_and_wins` |
//! | H4 | `h04_a_stream_keeps_what_a_guest_wrote_into_its_chunk` |
//! | H5 | `h05_a_cluster_is_not_reused_under_its_reader` |
//! | H6 | `h06_a_cluster_is_not_reused_under_its_writer` |
//! | H7 | `h07_a_cluster_is_not_reused_before_it_is_punched` |
//! | H8 | `h08_a_flush_persists_only_what_is_linked` |
//! | H9 | `h09_changes_beside_every_step_of_a_pass` |
//! | H10 | `h10_passes_follow_one_another` |
//! | H11 | `h11_nothing_is_dropped_from_memory_before_it_is_written` |
//! | H12 | `h12_a_failed_move_of_a_table_frees_nothing` |
//! | H13 | `h13_a_failed_fill_gives_its_cluster_back_once`, `dropped_allocation_gives_itself_back` |
//! | H14 | `h14_a_copy_that_fails_does_not_fail_the_read` |
//! | H15 | `h15_a_read_returns_after_its_copy_is_written` |
//! | H16 | `h16_the_base_stays_until_its_last_reader_has_gone` |
//! | H17 | `h17_a_discard_before_the_cut_hides_the_base_for_good`, `h17_what_changes_between_the_check_and_the_cut_is_checked_again`, `h17_the_guest_does_not_wait_while_all_tables_are_looked_at` |
//! | H18 | `h18_a_resize_waits_for_the_copy_and_hides_the_longer_base`, `growing_never_shows_the_base_even_when_killed` |
//! | H19 | `h19_the_end_of_the_last_cluster_is_zeros` |
//! | H20 | `h20_two_halves_of_one_new_cluster` |
//! | H21 | `h21_a_failed_barrier_fails_the_flush_behind_it`, `failed_barrier_is_seen_by_the_one_next_to_it` |
//! | H22 | None: no dirty bit is ever set, so none can be cleared too early; an image that has one is refused (`features_that_we_do_not_do`) |
//! | H23 | `h23_new_refcount_blocks_beside_every_step_of_a_pass` |
//! | H24 | None: tables are private to their lock; `L2Table` is lent to a closure under it (`Tables::with`), entries are atomics |
//! | H25 | `many_threads_read_what_they_wrote`: one descriptor, many threads; a seek between them would be seen |
//! | H26 | None: no io_uring; every read and write is a system call that has returned before its buffer goes |
//! | H27 | `a_hung_base_stops_only_those_who_need_it` |
//! | H28 | `random_ranges_never_overlap_wrongly`, `schedules_of_the_range_lock` |
//! | H29 | `h29_the_daemon_keeps_away_from_its_own_mountpoint` |
//! | H30 | None: no loop device belongs to the daemon, and `PR_SET_IO_FLUSHER` needs CAP_SYS_RESOURCE, which it does not ask for; swap must not lie on the disk |
//! | H31 | `h31_quit_signal_and_unmount_at_once`, `a_cancel_that_comes_too_late_does_nothing` |
//! | H32 | `h32_clients_killed_in_the_middle_of_a_write` |
//! | H33 | `resize_is_seen_at_once`, `two_openers_see_each_other_at_once` |
//! | H34 | `h34_a_renamed_base_stays_the_base` |

use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use super::spec::{self, Seen};
use super::{Action, Failure, Fault, Hold, Operation, SimStorage, Times};
use crate::chain::Chain;
use crate::disk::Disk;
use crate::format::{BackingFormat, BackingReference, Geometry, NewImage};
use crate::image::Image;
use crate::storage::{Storage, WriteKind};

mod commit;
mod copy_up;
mod lifecycle;
mod reuse;
mod table;

const CLUSTER: u64 = 4096;
/// Clusters of the disk.
const CLUSTERS: u64 = 16;

/// A disk of [`CLUSTERS`] above a base, both in memory.
struct Rig {
    disk: Disk,
    overlay: Arc<SimStorage>,
    base: Arc<SimStorage>,
}

/// What the base has in a cluster.
fn from_base(cluster: u64) -> u8 {
    100_u8.wrapping_add(cluster as u8)
}

impl Rig {
    /// Reads copy up.
    fn new() -> Rig {
        let rig = Rig::without_copy_on_read();
        Rig { disk: rig.disk.copying_up(true), ..rig }
    }

    fn without_copy_on_read() -> Rig {
        Rig::build(12, CLUSTERS * CLUSTER, CLUSTERS, usize::MAX)
    }

    /// `size` bytes above a base of so many clusters of 2^`bits` bytes.
    fn build(bits: u32, size: u64, base_clusters: u64, tables: usize) -> Rig {
        let base = SimStorage::new((0..base_clusters).flat_map(|cluster| vec![from_base(cluster); 1 << bits]).collect());
        let backing = BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let new = NewImage { geometry: Geometry::new(3, bits, 4, size).unwrap(), backing: Some(backing) };
        let overlay = SimStorage::new(Vec::new());
        for (at, bytes) in new.layout().unwrap() {
            overlay.write_at(WriteKind::Header, at, &bytes).unwrap();
        }
        let mut image = Image::open(overlay.clone()).unwrap();
        image.limit_table_memory(tables);
        Rig { disk: Disk::for_tests(image, Some(Chain::of_raw(base.clone()))), overlay, base }
    }

    fn cluster(&self) -> u64 {
        self.disk.cluster_size()
    }

    fn write(&self, cluster: u64, byte: u8) {
        self.disk.write(cluster * self.cluster(), &vec![byte; self.cluster() as usize]).unwrap();
    }

    /// Half a cluster, its second one for `half` 1.
    fn write_half(&self, cluster: u64, half: u64, byte: u8) {
        let len = self.cluster() / 2;
        self.disk.write(cluster * self.cluster() + half * len, &vec![byte; len as usize]).unwrap();
    }

    fn discard(&self, cluster: u64) {
        self.disk.discard(cluster * self.cluster()..(cluster + 1) * self.cluster()).unwrap();
    }

    /// What a cluster reads as: the same byte in each of its halves.
    fn halves(&self, cluster: u64) -> (u8, u8) {
        let mut buf = vec![0xa5; self.cluster() as usize];
        self.disk.read(cluster * self.cluster(), &mut buf).unwrap();
        halves(&buf)
    }

    fn read(&self, cluster: u64) -> u8 {
        let (first, second) = self.halves(cluster);
        assert_eq!(first, second, "cluster {cluster} is not of one piece");
        first
    }

    /// The image that a kill leaves now.
    fn killed(&self) -> Seen {
        spec::look(&self.overlay.bytes(), &self.base.bytes()).and_then(Seen::sole).unwrap()
    }

    /// The image after an orderly end: nothing is leaked.
    fn closed(&self) -> Seen {
        self.disk.close().unwrap();
        let seen = self.killed();
        assert_eq!(seen.verdict.all_leaks(), 0, "leaked clusters");
        seen
    }

    /// Host offset of a cluster that was flushed, bytes.
    fn host(&self, cluster: u64) -> u64 {
        self.killed().hosts[&cluster] * self.cluster()
    }

    /// Waits until the other side stands before a range that is in use by the one operation that is held: the rule is at work. Fails where it goes
    /// through instead, or as far as that operation.
    fn blocked<T>(&self, other: &ScopedJoinHandle<'_, T>, held: &Hold) {
        while self.disk.waiting() == 0 {
            assert!(!other.is_finished() && held.stopped() == 1, "it should have waited");
            thread::yield_now();
        }
    }
}

fn halves(cluster: &[u8]) -> (u8, u8) {
    let (first, second) = cluster.split_at(cluster.len() / 2);
    assert!(first.iter().all(|byte| *byte == first[0]) && second.iter().all(|byte| *byte == second[0]), "torn");
    (first[0], second[0])
}

impl Seen {
    fn at(&self, cluster: u64, size: u64) -> (u8, u8) {
        halves(&self.guest[(cluster * size) as usize..((cluster + 1) * size) as usize])
    }
}

/// Stops the reads of any part of a cluster of the base.
fn hold_base(rig: &Rig, cluster: u64) -> Hold {
    let (start, end) = (cluster * rig.cluster(), (cluster + 1) * rig.cluster());
    rig.base.hold(move |operation| operation.action == Action::Read && operation.at < end && start < operation.at + operation.len)
}

/// Stops what is done to the overlay, of one kind, from a host offset on.
fn hold_overlay(rig: &Rig, action: Action, at: u64) -> Hold {
    rig.overlay.hold(move |operation| operation.action == action && operation.at >= at)
}

/// Whether an operation belongs to a write-back pass.
fn is_of_a_pass(operation: &Operation) -> bool {
    match operation.action {
        Action::Sync => true,
        Action::Write(kind) => !matches!(kind, WriteKind::Data | WriteKind::NewCluster),
        Action::Read | Action::CloneFrom | Action::Punch => false,
    }
}
