//! Tests that force every known race: the test stops one operation of the host where the race
//! begins, starts the other request, and only then releases the operation.
//!
//! Besides the outcome, each test asserts that the race took place: the operation is still stopped,
//! and the other request either waits for it or has completed beside it, as the rule demands. If
//! another module tests a hazard, the table names that test. If a hazard cannot arise, the table
//! says why.
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
//! | H22 | None: the engine never sets the dirty bit, so it cannot clear it too early; an image that has the bit is refused (`features_that_we_do_not_do`) |
//! | H23 | `h23_new_refcount_blocks_beside_every_step_of_a_pass` |
//! | H24 | None: tables are private to their lock; `L2Table` is lent to a closure under it (`Tables::with`), entries are atomics |
//! | H25 | `many_threads_read_what_they_wrote`: many threads share one descriptor; a seek between their calls would change the bytes read |
//! | H26 | None: images are not read or written through io_uring; each read and write is a system call that returns before its buffer is dropped |
//! | H27 | `a_hung_base_stops_only_those_who_need_it` |
//! | H28 | `random_ranges_never_overlap_wrongly`, `schedules_of_the_range_lock` |
//! | H29 | `h29_the_daemon_keeps_away_from_its_own_mountpoint` |
//! | H30 | None: the daemon creates no loop device, and `PR_SET_IO_FLUSHER` needs CAP_SYS_RESOURCE, which the daemon does not request; swap must not lie on the disk |
//! | H31 | `h31_quit_signal_and_unmount_at_once`, `a_cancel_that_comes_too_late_does_nothing` |
//! | H32 | `h32_clients_killed_in_the_middle_of_a_write` |
//! | H33 | `resize_is_seen_at_once`, `two_openers_see_each_other_at_once` |
//! | H34 | `h34_a_renamed_base_stays_the_base` |

use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use sim::spec::{self, Seen, halves};
use sim::{Action, Fault, HostFailure, Operation, Repeat, SimStorage, Stop};

use engine::chain::Chain;
use engine::disk::Disk;
use host::storage::{ReadAt, WriteKind};
use qcow2::format::{BackingFormat, NewImage};
use qcow2::image::Image;

mod commit;
mod copy_up;
mod lifecycle;
mod reuse;
mod table;

const CLUSTER: u64 = 4096;
/// Clusters of the disk.
const CLUSTERS: u64 = 16;

/// A disk of [`CLUSTERS`] clusters above a raw base, both in memory.
struct Rig {
    disk: Disk,
    overlay: Arc<SimStorage>,
    base: Arc<SimStorage>,
}

/// The byte that fills cluster `cluster` of the base.
fn from_base(cluster: u64) -> u8 {
    100_u8.wrapping_add(cluster as u8)
}

impl Rig {
    /// Creates a disk whose reads copy up.
    fn new() -> Rig {
        let rig = Rig::without_copy_on_read();
        Rig { disk: rig.disk.copying_up(true), ..rig }
    }

    fn without_copy_on_read() -> Rig {
        Rig::build(12, CLUSTERS * CLUSTER, CLUSTERS, usize::MAX)
    }

    /// Creates a disk of `size` bytes with clusters of 2^`bits` bytes, above a base of
    /// `base_clusters` clusters. `tables` limits the memory for L2 tables, in bytes.
    fn build(bits: u32, size: u64, base_clusters: u64, tables: usize) -> Rig {
        let base = SimStorage::new(
            (0..base_clusters).flat_map(|cluster| vec![from_base(cluster); 1 << bits]).collect(),
        );
        let overlay = SimStorage::new(NewImage::file_for_tests(
            bits,
            size,
            Some(("base.raw", BackingFormat::Raw)),
        ));
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

    /// Writes one half of a cluster: the first for `half` 0, the second for `half` 1.
    fn write_half(&self, cluster: u64, half: u64, byte: u8) {
        let len = self.cluster() / 2;
        self.disk.write(cluster * self.cluster() + half * len, &vec![byte; len as usize]).unwrap();
    }

    fn discard(&self, cluster: u64) {
        self.disk.discard(cluster * self.cluster()..(cluster + 1) * self.cluster()).unwrap();
    }

    /// Reads a cluster and returns the byte of each half; fails if a half mixes bytes.
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

    /// Checks and reads the image that a kill at this moment leaves.
    fn killed(&self) -> Seen {
        spec::look(&self.overlay.bytes(), &self.base.bytes()).and_then(Seen::sole).unwrap()
    }

    /// Closes the disk and asserts that the image has no leaked clusters.
    fn closed(&self) -> Seen {
        self.disk.close().unwrap();
        let seen = self.killed();
        assert_eq!(seen.verdict.all_leaks(), 0, "leaked clusters");
        seen
    }

    /// Host offset of a cluster that was flushed, in bytes.
    fn host(&self, cluster: u64) -> u64 {
        self.killed().hosts[&cluster] * self.cluster()
    }

    /// Waits until a request of the thread `other` waits for a range that the stopped operation of
    /// `held` uses. Fails if `other` finishes, or if it reaches an operation that `held` stops as
    /// well.
    fn blocked<T>(&self, other: &ScopedJoinHandle<'_, T>, held: &Stop) {
        while self.disk.waiting() == 0 {
            assert!(!other.is_finished() && held.stopped() == 1, "it should have waited");
            thread::yield_now();
        }
    }
}

/// Stops the reads of any part of a cluster of the base.
fn hold_base(rig: &Rig, cluster: u64) -> Stop {
    let (start, end) = (cluster * rig.cluster(), (cluster + 1) * rig.cluster());
    rig.base.hold(move |operation| {
        operation.action == Action::Read
            && operation.at < end
            && start < operation.at + operation.len
    })
}

/// Stops the operations of one kind on the overlay, from host offset `at` on.
fn hold_overlay(rig: &Rig, action: Action, at: u64) -> Stop {
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
