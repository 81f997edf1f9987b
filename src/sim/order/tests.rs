//! Tests that break each rule once by hand, and one sequence that breaks none.

use super::super::start::{Fill, Start, set_refcount};
use super::*;

/// Makes writes by hand. The clusters have 512 bytes: 0 is the header, 1 the refcount table, 2 a
/// refcount block, 3 the L1 table, 4 the L2 table of guest clusters 0 to 63, 5 the data of guest
/// cluster 0, 6 reserved for guest cluster 3. All others are free. Guest cluster 64 has no L2
/// table.
struct Hand {
    checker: OrderChecker,
    bytes: Vec<u8>,
}

impl Hand {
    fn new() -> Hand {
        let mut start = Start::new("by hand", 3, 9, 4, 64 << 10);
        start.clusters = vec![(0, Fill::Data(1)), (3, Fill::Reserved(2))];
        start.base = 4096;
        let mut bytes = start.bytes();
        let checker = OrderChecker::new(bytes.clone());
        bytes.resize(300 * 512, 0);
        Hand { checker, bytes }
    }

    fn write(&mut self, kind: WriteKind, at: u64, data: &[u8]) {
        self.checker.write(kind, at, data);
        self.bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
    }

    fn sync(&mut self) {
        let number = self.checker.sync_began();
        self.checker.sync_ended(number);
    }

    fn data(&mut self, cluster: u64) {
        self.write(WriteKind::NewCluster, cluster * 512, &[7; 512]);
    }

    fn count(&mut self, cluster: u64, refcount: u64) {
        let mut block = self.bytes[1024..1536].to_vec();
        set_refcount(&mut block, 4, cluster, refcount);
        self.write(WriteKind::RefcountBlock, 1024, &block);
    }

    fn entry(&mut self, guest: u64, raw: u64) {
        self.write(WriteKind::L2Table, 4 * 512 + guest * 8, &raw.to_be_bytes());
    }

    fn names(&mut self, guest: u64, cluster: u64) {
        self.entry(guest, COPIED | (cluster * 512));
    }

    fn l1(&mut self, index: u64, table: u64) {
        self.write(
            WriteKind::L1Table,
            3 * 512 + index * 8,
            &(COPIED | (table * 512)).to_be_bytes(),
        );
    }

    /// Writes an L2 table that names one cluster.
    fn table(&mut self, cluster: u64, names: u64) {
        let mut table = [0; 512];
        table[..8].copy_from_slice(&(COPIED | (names * 512)).to_be_bytes());
        self.write(WriteKind::L2Table, cluster * 512, &table);
    }

    fn header(&mut self, at: u64, data: &[u8]) {
        self.write(WriteKind::Header, at, data);
    }

    /// Maps guest cluster 1 to host cluster 7.
    fn publish(&mut self) {
        self.count(7, 1);
        self.data(7);
        self.sync();
        self.names(1, 7);
        self.sync();
    }
}

#[test]
fn nothing_is_wrong_with_the_right_order() {
    let mut hand = Hand::new();
    hand.publish();
    hand.write(WriteKind::Data, 7 * 512 + 3, &[1; 20]);
    // Adds an L2 table.
    hand.count(8, 1);
    hand.count(9, 1);
    hand.data(9);
    hand.table(8, 9);
    hand.sync();
    hand.l1(1, 8);
    hand.sync();
    // Makes the cluster zero, fills it again, frees it, punches it and uses it again.
    hand.entry(1, COPIED | (7 * 512) | 1);
    hand.sync();
    hand.write(WriteKind::Data, 7 * 512, &[2; 512]);
    hand.sync();
    hand.names(1, 7);
    hand.sync();
    hand.entry(1, 1);
    hand.sync();
    hand.checker.punch(7 * 512, 512);
    hand.count(7, 0);
    hand.count(7, 1);
    hand.data(7);
    hand.sync();
    hand.names(2, 7);
    hand.sync();
    // Writes a refcount block, then a refcount table, then an L1 table at new places; then the
    // backing link.
    hand.write(WriteKind::RefcountBlock, 256 * 512, &{
        let mut block = [0; 512];
        (0..1).for_each(|index| set_refcount(&mut block, 4, index, 1));
        block
    });
    hand.sync();
    hand.write(WriteKind::RefcountTable, 512 + 8, &(256u64 * 512).to_be_bytes());
    hand.count(10, 1);
    hand.count(11, 1);
    hand.sync();
    let table = hand.bytes[512..1024].to_vec();
    hand.write(WriteKind::RefcountTable, 10 * 512, &table);
    let table = hand.bytes[3 * 512..4 * 512].to_vec();
    hand.write(WriteKind::L1Table, 11 * 512, &table);
    hand.sync();
    hand.header(48, &(10u64 * 512).to_be_bytes());
    hand.sync();
    hand.header(40, &(11u64 * 512).to_be_bytes());
    hand.sync();
    hand.count(1, 0);
    hand.count(3, 0);
    hand.sync();
    hand.header(8, &[0; 12]);
    hand.sync();
}

#[test]
#[should_panic(expected = "R1: L2Table: Guest(1) names cluster 7")]
fn r1_data_that_no_barrier_covers() {
    let mut hand = Hand::new();
    hand.count(7, 1);
    hand.sync();
    hand.data(7);
    hand.names(1, 7);
}

#[test]
#[should_panic(expected = "R1")]
fn r1_data_written_while_the_barrier_was_under_way() {
    let mut hand = Hand::new();
    hand.count(7, 1);
    let number = hand.checker.sync_began();
    hand.data(7);
    hand.checker.sync_ended(number);
    hand.names(1, 7);
}

#[test]
#[should_panic(expected = "R1")]
fn r1_half_a_cluster() {
    let mut hand = Hand::new();
    hand.count(7, 1);
    hand.write(WriteKind::NewCluster, 7 * 512, &[7; 256]);
    hand.sync();
    hand.names(1, 7);
}

#[test]
#[should_panic(expected = "R1")]
fn r1_kept_cluster_that_was_not_written() {
    let mut hand = Hand::new();
    hand.sync();
    hand.names(3, 6);
}

#[test]
#[should_panic(expected = "R1")]
fn r1_cluster_that_was_zero_since_it_was_written() {
    let mut hand = Hand::new();
    hand.publish();
    hand.entry(1, COPIED | (7 * 512) | 1);
    hand.sync();
    hand.write(WriteKind::Data, 7 * 512, &[2; 512]);
    hand.names(1, 7);
}

#[test]
#[should_panic(expected = "R1")]
fn r1_does_not_count_an_earlier_life() {
    let mut hand = Hand::new();
    hand.publish();
    hand.entry(1, 0);
    hand.sync();
    hand.data(7);
    hand.names(2, 7);
}

#[test]
#[should_panic(expected = "R2: L2Table: 1 entries, one of them Guest(1), name cluster 7")]
fn r2_refcount_that_no_barrier_covers() {
    let mut hand = Hand::new();
    hand.data(7);
    hand.sync();
    hand.count(7, 1);
    hand.names(1, 7);
}

#[test]
#[should_panic(expected = "R2")]
fn r2_two_entries_and_one_reference() {
    let mut hand = Hand::new();
    hand.publish();
    hand.names(2, 7);
}

#[test]
#[should_panic(expected = "R3: the refcount of cluster 5 becomes 0")]
fn r3_before_the_removal_is_durable() {
    let mut hand = Hand::new();
    hand.entry(0, 0);
    hand.count(5, 0);
}

#[test]
#[should_panic(expected = "R4: L1Table: L2Table(1) names cluster 8")]
fn r4_table_that_no_barrier_covers() {
    let mut hand = Hand::new();
    hand.count(8, 1);
    hand.sync();
    hand.write(WriteKind::L2Table, 8 * 512, &[0; 512]);
    hand.l1(1, 8);
}

#[test]
#[should_panic(expected = "R4")]
fn r4_half_a_table() {
    let mut hand = Hand::new();
    hand.count(8, 1);
    hand.write(WriteKind::L2Table, 8 * 512, &[0; 64]);
    hand.sync();
    hand.l1(1, 8);
}

#[test]
#[should_panic(expected = "R1")]
fn r4_table_whose_data_is_not_durable() {
    let mut hand = Hand::new();
    hand.count(8, 1);
    hand.count(9, 1);
    hand.table(8, 9);
    hand.sync();
    hand.data(9);
    hand.l1(1, 8);
}

#[test]
#[should_panic(expected = "R4: Header: L1Table names cluster 11")]
fn r4_l1_table_that_no_barrier_covers() {
    let mut hand = Hand::new();
    hand.count(11, 1);
    hand.sync();
    let table = hand.bytes[3 * 512..4 * 512].to_vec();
    hand.write(WriteKind::L1Table, 11 * 512, &table);
    hand.header(40, &(11u64 * 512).to_be_bytes());
}

#[test]
#[should_panic(expected = "R5: RefcountTable: Block(1) names cluster 256")]
fn r5_block_that_no_barrier_covers() {
    let mut hand = Hand::new();
    hand.write(WriteKind::RefcountBlock, 256 * 512, &[1; 512]);
    hand.write(WriteKind::RefcountTable, 512 + 8, &(256u64 * 512).to_be_bytes());
}

#[test]
#[should_panic(expected = "R6: Header: RefcountTable names cluster 10")]
fn r6_table_that_no_barrier_covers() {
    let mut hand = Hand::new();
    hand.count(10, 1);
    hand.sync();
    let table = hand.bytes[512..1024].to_vec();
    hand.write(WriteKind::RefcountTable, 10 * 512, &table);
    hand.header(48, &(10u64 * 512).to_be_bytes());
}

#[test]
#[should_panic(expected = "R7: NewCluster of 512 bytes at 0xa00")]
fn r7_cluster_that_may_still_be_named() {
    let mut hand = Hand::new();
    hand.entry(0, 0);
    hand.data(5);
}

#[test]
#[should_panic(expected = "R7: L2Table")]
fn r7_table_where_data_may_be() {
    let mut hand = Hand::new();
    hand.entry(0, 0);
    hand.table(5, 0);
}

#[test]
#[should_panic(expected = "R8: a hole at 0xa00")]
fn r8_hole_where_data_may_be() {
    let mut hand = Hand::new();
    hand.entry(0, 0);
    hand.checker.punch(5 * 512, 512);
}

#[test]
#[should_panic(expected = "R9: L2Table: Guest(1) is not COPIED")]
fn r9_no_copied() {
    let mut hand = Hand::new();
    hand.count(7, 1);
    hand.data(7);
    hand.sync();
    hand.entry(1, 7 * 512);
}

#[test]
#[should_panic(expected = "R9: L2Table: Guest(1) is COPIED")]
fn r9_copied_with_refcount_two() {
    let mut hand = Hand::new();
    hand.count(7, 2);
    hand.data(7);
    hand.sync();
    hand.names(1, 7);
}

#[test]
#[should_panic(expected = "R9: the refcount of cluster 5 becomes 2")]
fn r9_refcount_two_under_copied() {
    Hand::new().count(5, 2);
}

#[test]
#[should_panic(expected = "R11: header bytes 8..520")]
fn r11_more_than_a_sector() {
    let mut hand = Hand::new();
    let bytes = hand.bytes[8..520].to_vec();
    hand.header(8, &bytes);
}

#[test]
#[should_panic(expected = "R11: NewCluster")]
fn r11_write_before_the_barrier() {
    let mut hand = Hand::new();
    hand.header(88, &1u64.to_be_bytes());
    hand.data(7);
}

#[test]
#[should_panic(expected = "R11: RefcountBlock")]
fn r11_metadata_before_the_barrier() {
    let mut hand = Hand::new();
    let size = hand.bytes[24..32].to_vec();
    hand.header(24, &size);
    hand.data(7);
    hand.count(7, 1);
}

#[test]
#[should_panic(expected = "R11: NewCluster at 0xe00 while autoclear bits may still be set")]
fn r11_autoclear_bits_that_still_stand() {
    let start = Start { autoclear: 1 << 40, ..Start::new("by hand", 3, 9, 4, 64 << 10) };
    OrderChecker::new(start.bytes()).write(WriteKind::NewCluster, 7 * 512, &[7; 512]);
}

#[test]
#[should_panic(expected = "R12: the backing link changes while 1 sectors, the first at 0xa00")]
fn r12_data_that_no_barrier_covers() {
    let mut hand = Hand::new();
    hand.write(WriteKind::Data, 5 * 512, &[1; 512]);
    hand.header(8, &[0; 12]);
}

#[test]
#[should_panic(expected = "R16: Data of 512 bytes at 0x800")]
fn r16_data_where_a_table_is() {
    Hand::new().write(WriteKind::Data, 4 * 512, &[1; 512]);
}

#[test]
#[should_panic(expected = "R16: NewCluster of 512 bytes at 0x0")]
fn r16_data_over_the_header() {
    Hand::new().data(0);
}

#[test]
#[should_panic(expected = "R7: RefcountBlock")]
fn r16_block_where_the_l1_table_is() {
    Hand::new().write(WriteKind::RefcountBlock, 3 * 512, &[1; 512]);
}

/// Protects: the data of a failed barrier is not durable after the next barrier that succeeds. It
/// is durable after it was written again, or after the host has dropped its cache and shows the
/// data.
#[test]
fn a_failed_barrier_is_not_made_good_by_the_next_one() {
    let lost = || {
        let mut hand = Hand::new();
        hand.count(7, 1);
        hand.sync();
        hand.data(7);
        let number = hand.checker.sync_began();
        hand.checker.sync_failed(number);
        hand.sync();
        hand
    };
    let names = |mut hand: Hand| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hand.names(1, 7)))
    };
    let panic = names(lost()).unwrap_err();
    assert!(panic.downcast_ref::<String>().is_some_and(|text| text.starts_with("R1")));

    let mut hand = lost();
    hand.data(7);
    hand.sync();
    names(hand).unwrap();

    let mut hand = lost();
    hand.checker.dropped(&hand.bytes);
    // The content is now that of the disk, but no entry names the cluster, so it is written like
    // any new cluster.
    hand.data(7);
    hand.sync();
    names(hand).unwrap();
}

/// R3: while an entry that a failed barrier was to remove may still be on disk, its cluster stays
/// counted.
#[test]
fn a_name_that_may_come_back_keeps_its_count() {
    let removed = |fails: bool| {
        let mut hand = Hand::new();
        hand.entry(0, 0);
        let number = hand.checker.sync_began();
        if fails {
            hand.checker.sync_failed(number)
        } else {
            hand.checker.sync_ended(number)
        }
        hand.sync();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hand.count(5, 0)))
    };
    removed(false).unwrap();
    let panic = removed(true).unwrap_err();
    assert!(panic.downcast_ref::<String>().is_some_and(|text| text.starts_with("R3")));
}
