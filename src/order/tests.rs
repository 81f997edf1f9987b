//! Orders beside models of single bytes: first touches, files, merges.

use std::collections::{BTreeMap, BTreeSet};

use host::ErrorKind;
use proptest::collection::vec;
use proptest::prelude::*;

use super::fuzzing::assert_sound;
use super::*;

/// Size of the disk of most tests in bytes: small enough for models of single bytes.
const SIZE: u64 = 400;
const GIB: u64 = 1 << 30;

fn base(size: u64) -> BaseIdentity {
    BaseIdentity { size, head: [7; 32], pin: None }
}

fn touch(offset: u64, len: u64, at_ms: u32) -> Touch {
    Touch { offset, len, at_ms }
}

fn order(touches: &[(u64, u64, u32)]) -> Order {
    let touches = touches.iter().map(|&(offset, len, at_ms)| touch(offset, len, at_ms));
    Order::from_touches(base(64 * GIB), touches)
}

/// Offset, length, milliseconds, votes of each range.
fn rows(order: &Order) -> Vec<(u64, u64, u32, u32)> {
    let row = |range: &OrderRange| (range.offset, range.len, range.at_ms, range.votes);
    order.ranges().iter().map(row).collect()
}

/// Votes, rank and time of each byte.
fn by_byte(order: &Order) -> BTreeMap<u64, (u64, u64, u64)> {
    let each = |range: &OrderRange| {
        let (votes, at_ms) = (range.votes.into(), range.at_ms.into());
        range.bytes().map(move |byte| (byte, votes, at_ms))
    };
    let bytes = order.ranges().iter().flat_map(each);
    bytes.zip(0..).map(|((byte, votes, at_ms), rank)| (byte, (votes, rank, at_ms))).collect()
}

fn touches() -> impl Strategy<Value = Vec<Touch>> {
    // Some begin beyond the disk, some are empty, some overlap everything.
    vec((0..SIZE + 20, 0..60_u64, 0..5000_u32), 0..40).prop_map(|all| {
        all.into_iter().map(|(offset, len, at_ms)| touch(offset, len, at_ms)).collect()
    })
}

fn one_record() -> impl Strategy<Value = Order> {
    touches().prop_map(|touches| Order::from_touches(base(SIZE), touches))
}

/// Orders of one record, and merged ones.
fn orders() -> impl Strategy<Value = Vec<Order>> {
    let merged =
        vec(one_record(), 1..4).prop_map(|orders| Order::merge(&orders).expect("one base"));
    vec(prop_oneof![one_record(), merged], 1..5)
}

/// Orders of large disks, with every number that a file can have.
fn any_order() -> impl Strategy<Value = Order> {
    let touches = vec((any::<u64>(), any::<u64>(), any::<u32>(), 0..64_u32), 0..20);
    let pin = proptest::option::of(".{1,40}");
    let bases = (any::<u64>(), any::<[u8; 32]>(), pin);
    (bases, touches, 1..4_u32, any::<u32>()).prop_map(
        |((size, head, pin), touches, copies, votes)| {
            let touches = touches.into_iter().map(|(offset, len, at_ms, shift)| Touch {
                offset: offset >> shift,
                len: len >> shift >> 8,
                at_ms,
            });
            let mut order = Order::from_touches(BaseIdentity { size, head, pin }, touches);
            order.records = votes.max(copies);
            for (range, vote) in order.ranges.iter_mut().zip((1..=copies).cycle()) {
                range.votes = if vote == copies { order.records } else { vote };
            }
            join_consecutive(&mut order.ranges);
            order
        },
    )
}

proptest! {
    /// Protects: the first touch of each byte counts, and nothing beyond the disk.
    #[test]
    fn the_first_touch_of_each_byte_counts(touches in touches()) {
        let order = Order::from_touches(base(SIZE), touches.clone());
        assert_sound(&order);
        let mut seen = BTreeSet::new();
        let mut expected = Vec::new();
        for touch in &touches {
            let bytes = touch.offset..(touch.offset + touch.len).min(SIZE);
            expected.extend(bytes.filter(|&byte| seen.insert(byte)));
        }
        let bytes: Vec<u64> = order.ranges().iter().flat_map(OrderRange::bytes).collect();
        prop_assert_eq!(bytes, expected);
        prop_assert_eq!(order.records(), 1);
        prop_assert_eq!(order.bytes(), seen.len() as u64);
    }

    /// Protects: a file has the whole order, and an order has one file.
    #[test]
    fn a_file_is_read_as_it_was_written(order in any_order()) {
        assert_sound(&order);
        let bytes = order.encode();
        prop_assert!(bytes.len() as u64 <= LONGEST_FILE);
        let decoded = Order::decode(&bytes).expect("our own file");
        prop_assert_eq!(&decoded, &order);
        prop_assert_eq!(decoded.encode(), bytes);
    }

    /// Protects: arbitrary bytes are refused with one line, or are exactly a file.
    #[test]
    fn arbitrary_bytes_are_no_harm(bytes in vec(any::<u8>(), 0..200)) {
        fuzz_file(&bytes);
    }

    /// Protects: a file with some bytes changed, whose checksum is right, is refused with one line,
    /// or is exactly a file.
    #[test]
    fn damaged_files_are_no_harm(
        order in any_order(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = order.encode();
        bytes.truncate(bytes.len() - 4); // the checksum, and below the 12 bytes up to the version
        for (place, value) in changes {
            let place = 12 + place.index(bytes.len() - 12);
            bytes[place] = value;
        }
        fuzz_file(&bytes[12..]);
        bytes.truncate(12 + cut.index(bytes.len() - 11));
        fuzz_file(&bytes[12..]);
    }

    /// Protects: every byte that is wrong is noticed, and so is every byte that is missing or that
    /// follows.
    #[test]
    fn damage_is_noticed(order in any_order(), place in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let mut bytes = order.encode();
        let place = place.index(bytes.len());
        prop_assert!(Order::decode(&bytes[..place]).is_err());
        bytes[place] ^= 1 << bit;
        prop_assert!(Order::decode(&bytes).is_err());
        bytes[place] ^= 1 << bit;
        bytes.push(0);
        prop_assert!(Order::decode(&bytes).is_err());
    }

    /// Protects: a merge has the bytes and the votes of all, whichever comes first.
    #[test]
    fn a_merge_has_the_bytes_and_the_votes_of_all(orders in orders(), turn in any::<prop::sample::Index>()) {
        let merged = Order::merge(&orders).expect("one base");
        assert_sound(&merged);
        let mut turned = orders.clone();
        turned.rotate_left(turn.index(orders.len()));
        prop_assert_eq!(&Order::merge(&turned).expect("one base"), &merged);
        turned.reverse();
        prop_assert_eq!(&Order::merge(&turned).expect("one base"), &merged);
        let mut votes = BTreeMap::new();
        for (byte, (more, _, _)) in orders.iter().flat_map(by_byte) {
            *votes.entry(byte).or_insert(0) += more;
        }
        let of_merged: BTreeMap<u64, u64> =
            by_byte(&merged).into_iter().map(|(byte, (votes, _, _))| (byte, votes)).collect();
        prop_assert_eq!(of_merged, votes);
        prop_assert_eq!(merged.records(), orders.iter().map(Order::records).sum::<u32>());
        prop_assert_eq!(Order::decode(&merged.encode()).expect("our own file"), merged);
    }

    /// Protects: the mean rank of its first byte decides the place of a range, beside a model of
    /// single units that are longer than what a joined piece may be off.
    #[test]
    fn the_mean_rank_decides(orders in vec(touches(), 2..4)) {
        const UNIT: u64 = 4 << 20;
        let scaled = |touches: Vec<Touch>| {
            let touches = touches.into_iter();
            let scale = |t: Touch| touch(t.offset * UNIT, t.len * UNIT, t.at_ms);
            Order::from_touches(base(SIZE * UNIT), touches.map(scale))
        };
        let large = Order::merge(&orders.iter().cloned().map(scaled).collect::<Vec<_>>()).expect("one base");
        let small = orders.into_iter().map(|touches| Order::from_touches(base(SIZE), touches));
        let mut sums: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        for (byte, (_, rank, _)) in small.flat_map(|order| by_byte(&order)) {
            let sum = sums.entry(byte).or_default();
            *sum = (sum.0 + rank * UNIT, sum.1 + 1);
        }
        let mean = |unit: u64| { let (rank, votes) = sums[&unit]; rank / votes };
        let begins: Vec<u64> = large.ranges().iter().map(|range| mean(range.offset / UNIT)).collect();
        prop_assert!(begins.is_sorted(), "{begins:?}");
    }

    /// Protects: the merge of one order is that order, and the merge with itself has its ranges.
    #[test]
    fn a_merge_with_itself_changes_only_votes(order in one_record(), times in 1..5_usize) {
        let merged = Order::merge(&vec![order.clone(); times]).expect("one base");
        let mut expected = order;
        expected.records = times as u32;
        expected.ranges.iter_mut().for_each(|range| range.votes = times as u32);
        prop_assert_eq!(merged, expected);
    }
}

fn with_checksum(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
    bytes
}

fn refusal(bytes: &[u8]) -> (ErrorKind, String) {
    let error = Order::decode(bytes).expect_err("refused");
    (error.kind(), error.to_string())
}

#[test]
fn a_touch_is_cut_at_earlier_ones_and_at_the_end_of_the_disk() {
    let touches = [
        touch(100, 10, 1),
        touch(120, 10, 2),
        touch(90, 60, 3),        // around both
        touch(150, 10, 4),       // continues what is left of it
        touch(0, 0, 5),          // nothing
        touch(1000, 1, 6),       // beyond the disk
        touch(990, u64::MAX, 7), // cut
        touch(100, 20, 8),       // known
    ];
    let order = Order::from_touches(base(1000), touches);
    assert_eq!(
        rows(&order),
        [
            (100, 10, 1, 1),
            (120, 10, 2, 1),
            (90, 10, 3, 1),
            (110, 10, 3, 1),
            (130, 30, 3, 1),
            (990, 10, 7, 1)
        ]
    );
    assert_eq!((order.bytes(), order.records()), (80, 1));
}

#[test]
fn an_order_without_ranges_is_an_order() {
    let order = Order::from_touches(base(0), [touch(0, 1, 0)]);
    assert_eq!((order.ranges().len(), order.wanted()), (0, Vec::new()));
    assert_eq!(Order::decode(&order.encode()).expect("our own file"), order);
    let merged = Order::merge(&[order.clone(), order]).expect("one base");
    assert_eq!((merged.records(), merged.ranges().len()), (2, 0));
}

/// Protects: the bytes of version 1. Other programs and later versions read them.
#[test]
fn the_file_is_as_described() {
    let mut order = Order::from_touches(
        BaseIdentity { size: 1 << 20, head: [0xab; 32], pin: Some("\"e1\"".to_owned()) },
        [touch(8192, 4096, 5), touch(0, 8192, 3), touch(1 << 19, 512 << 10, 300)],
    );
    order.records = 3;
    order.ranges[1].votes = 3;
    let mut expected = b"CORDORDR\0\0\0\x01\0\0\0\0\0\x10\0\0".to_vec();
    expected.extend([0xab; 32]);
    expected.extend(b"\0\0\0\x03\0\0\0\x03\x0c\0\x04\"e1\"");
    expected.extend([4, 2, 10]); // offset 2 units, 1 unit, 5 ms
    expected.extend([5, 5, 3, 4]); // 3 units back, 2 units and other votes, 2 ms earlier, 2 more
    // 126 units on, 128 units, 297 ms, 2 votes less
    expected.extend([0xfc, 1, 0x81, 2, 0xd2, 4, 3]);
    assert_eq!(order.encode(), with_checksum(expected));
}

#[test]
fn what_is_wrong_with_a_file_is_said() {
    let order = Order::from_touches(
        BaseIdentity { size: 1 << 20, head: [1; 32], pin: Some("p".to_owned()) },
        [touch(0, 512, 0), touch(4096, 512, 1)],
    );
    let good = order.encode();
    let body = &good[..good.len() - 4];
    let changed = |place: usize, values: &[u8]| {
        let mut bytes = body.to_vec();
        bytes[place..place + values.len()].copy_from_slice(values);
        with_checksum(bytes)
    };
    let at = 63 + 1; // the first range
    let corrupt = |bytes: &[u8], why: &str| {
        let (kind, text) = refusal(bytes);
        assert!(kind == ErrorKind::Corrupt && text.contains(why), "{text}, not {why}");
    };
    assert_eq!(refusal(b""), (ErrorKind::InvalidArgument, "it is empty".to_owned()));
    let (kind, text) = refusal(b"QFI\xfb 1234567890");
    assert_eq!((kind, text.contains("not an order")), (ErrorKind::InvalidArgument, true), "{text}");
    corrupt(&good[..40], "cut off");
    corrupt(&good[..good.len() - 1], "checksum");
    corrupt(&[&good[..], &[0]].concat(), "checksum");
    corrupt(&changed(8, &[0, 0, 0, 0]), "version 0");
    corrupt(&changed(52, &[0, 0, 0, 0]), "no record");
    corrupt(&changed(56, &[0, 0x10, 0, 1]), "1048577 ranges");
    corrupt(&changed(56, &[0, 0, 0, 3]), "6 bytes of ranges are not 3");
    corrupt(&changed(56, &[0, 0, 0, 1]), "3 bytes follow");
    corrupt(&changed(60, &[63]), "larger than any disk");
    corrupt(&changed(60, &[255]), "larger than any disk");
    corrupt(&changed(61, &[0x04, 0x01]), "cut off");
    corrupt(&changed(63, &[0xff]), "UTF-8");
    corrupt(&changed(at, &[1]), "range 1 is not"); // begins below 0
    corrupt(&changed(at + 1, &[0]), "range 1 is not"); // empty
    corrupt(&changed(at + 2, &[1]), "range 1 is not"); // before the disk was opened
    corrupt(&changed(at + 3, &[0]), "range 2 is a part"); // continues the first
    corrupt(&changed(at + 3, &[1]), "overlap");
    corrupt(&changed(at, &[0, 3, 0, 1, 14, 2]), "range 1 has more or fewer votes"); // 0
    corrupt(&changed(at, &[0, 3, 0, 2, 14, 2]), "range 1 has more or fewer votes"); // 2 of 1
    corrupt(&changed(at, &[0, 4, 0, 12, 4, 2]), "unit"); // all even
    // beyond the disk
    corrupt(&changed(12, &[0, 0, 0, 0, 0, 0, 0x11, 0xff]), "range 2 lies outside");
    corrupt(&vec![0; LONGEST_FILE as usize + 1], "longer than");
    let long_pin = [&changed(61, &[0x04, 0x01])[..64], &[b'p'; 1030]].concat();
    corrupt(&with_checksum(long_pin), "1025 bytes");
    // The checksum of a later version may be another one.
    let mut later = good.clone();
    later[11] = 2;
    let (kind, text) = refusal(&later);
    assert_eq!(kind, ErrorKind::UnsupportedFeature);
    assert!(text.contains("version 2") && text.contains("knows 1"), "{text}");
}

#[test]
fn a_number_has_one_form() {
    let order = order(&[(0, 1, 0)]);
    let good = order.encode();
    let body = &good[..good.len() - 4];
    let (header, range) = body.split_at(body.len() - 3);
    assert_eq!(range, [0, 2, 0]);
    for longer in [&[0x80, 0, 2, 0][..], &[0, 0x82, 0, 0], &[0, 2, 0x80, 0x80, 0]] {
        assert!(refusal(&with_checksum([header, longer].concat())).1.contains("range 1"));
    }
    // Votes that are said to differ, and do not.
    assert!(refusal(&with_checksum([header, &[0, 3, 0, 0]].concat())).1.contains("range 1"));
    let endless = [header, &[0xff; 30]].concat();
    assert!(refusal(&with_checksum(endless)).1.contains("range 1"));
}

/// Protects: a million ranges in an order that no difference makes small stay below the length that
/// a reader accepts, and are read again.
#[test]
fn the_longest_order_can_be_read() {
    let size = i64::MAX as u64;
    let step = size / MOST_RANGES as u64;
    // From both ends by turns.
    let touches = (0..MOST_RANGES as u64).map(|n| {
        let place = if n % 2 == 0 { n / 2 } else { MOST_RANGES as u64 - 1 - n / 2 };
        touch(place * step + 1, step - 1 - n % 2, if n % 2 == 0 { 0 } else { u32::MAX })
    });
    let pin = Some("p".repeat(MOST_PIN));
    let order = Order::from_touches(BaseIdentity { size, head: [0; 32], pin }, touches);
    assert_eq!(order.ranges().len(), MOST_RANGES);
    let bytes = order.encode();
    assert!(bytes.len() > 20 << 20 && bytes.len() as u64 <= LONGEST_FILE, "{}", bytes.len());
    assert!(Order::decode(&bytes).expect("our own file") == order);
}

/// Protects: touches that a hostile guest can make. More ranges than an order has: the first ones
/// count. Then one that goes over all of them.
#[test]
fn a_million_tiny_touches_are_bounded() {
    let scattered = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (64 * GIB);
    let touches = (0..1_200_000).map(|n| touch(scattered(n), 1 + n % 3, n as u32));
    let overlapping = (0..1_000_000).map(|n| touch(n, 1000, 0));
    let outside = (0..1_000_000).map(|n| touch(64 * GIB + n, u64::MAX, 0));
    let all = outside.chain(overlapping).chain(touches).chain([touch(0, u64::MAX, 9)]);
    let order = Order::from_touches(base(64 * GIB), all);
    assert_sound(&order);
    assert_eq!(order.ranges().len(), MOST_RANGES);
    assert_eq!(order.ranges()[0], OrderRange { offset: 0, len: 1_000_999, at_ms: 0, votes: 1 });
    let between = (0..1000).map(|n| touch(2 * n, 1, 0)).chain([touch(0, u64::MAX, 9)]);
    let order = Order::from_touches(base(64 * GIB), between);
    assert_eq!((order.ranges().len(), order.bytes()), (2000, 64 * GIB));
}

/// Protects: a merge of two orders with the most ranges has no more, and what most records have
/// stays.
#[test]
fn the_merge_of_the_longest_orders_is_bounded() {
    let many = |shift: u64| {
        let touches = (0..MOST_RANGES as u64).rev().map(|n| touch(n * 1000 + shift, 100, 7));
        Order::from_touches(base(64 * GIB), touches)
    };
    let (one, another) = (many(0), many(50));
    let merged = Order::merge(&[one, another]).expect("one base");
    assert_sound(&merged);
    // Of 3 pieces each: the middle one has the votes of both.
    assert_eq!(merged.ranges().len(), MOST_RANGES);
    assert!(merged.ranges().iter().all(|range| range.votes == 2 && range.len == 50));
    // With single votes only, the last ones are left out.
    let merged = Order::merge(&[many(0), many(500)]).expect("one base");
    assert_eq!(merged.ranges().len(), MOST_RANGES);
    assert!(merged.ranges().iter().all(|range| range.offset >= MOST_RANGES as u64 / 2 * 1000));
}

/// Protects: where a range is left out that stood between two parts of a run, these become one.
#[test]
fn the_neighbours_of_what_is_left_out_are_joined() {
    let own = |first: &[Touch]| {
        let common = (1..MOST_RANGES as u64 - 2).rev().map(|n| touch(n * 1000, 100, 7));
        Order::from_touches(base(64 * GIB), first.iter().copied().chain(common))
    };
    let (one, two, other) = (touch(0, 10, 0), touch(10, 10, 0), 60 * GIB);
    let orders =
        [own(&[one, touch(other, 10, 0), two]), own(&[touch(other + 50, 10, 0), two, one])];
    assert_eq!(orders.each_ref().map(|order| order.ranges().len()), [MOST_RANGES; 2]);
    let merged = Order::merge(&orders).expect("one base");
    assert_sound(&merged);
    let begin: Vec<_> = rows(&merged).into_iter().take(3).collect();
    let last = (MOST_RANGES as u64 - 3) * 1000;
    assert_eq!(begin, [(other + 50, 10, 0, 1), (0, 20, 0, 2), (last, 100, 7, 2)]);
}

/// Protects: an order does not depend on how fast the machine was.
#[test]
fn a_slow_and_a_fast_machine_agree() {
    let fast = order(&[(0, 4096, 0), (GIB, 4096, 10), (2 * GIB, 4096, 20), (3 * GIB, 4096, 30)]);
    let slow = order(&[(0, 4096, 0), (GIB, 4096, 9000), (2 * GIB, 4096, 60_000)]);
    let merged = Order::merge(&[slow, fast]).expect("one base");
    assert_eq!(
        rows(&merged),
        [(0, 4096, 0, 2), (GIB, 4096, 4505, 2), (2 * GIB, 4096, 30_010, 2), (3 * GIB, 4096, 30, 1)]
    );
}

#[test]
fn pieces_of_one_run_are_joined_where_a_record_has_touched_them_in_one() {
    let whole = order(&[(0, 1 << 20, 0), (GIB, 4096, 3)]);
    let parts = order(&[
        (0, 65536, 0),
        (GIB, 4096, 1),
        (65536, 65536, 2),
        (131_072, (1 << 20) - 131_072, 4),
    ]);
    let merged = Order::merge(&[whole.clone(), parts]).expect("one base");
    assert_eq!(rows(&merged), [(0, 1 << 20, 0, 2), (GIB, 4096, 2, 2)]);
    // One machine has touched something else between them. A stream asks for both at once.
    let with_other = order(&[(0, 65536, 0), (2 * GIB, 4096, 1), (65536, (1 << 20) - 65536, 2)]);
    let merged = Order::merge(&[whole.clone(), with_other]).expect("one base");
    assert_eq!(rows(&merged), [(0, 1 << 20, 0, 2), (2 * GIB, 4096, 1, 1), (GIB, 4096, 3, 1)]);
    // Far apart in one of them: the second part has its own place.
    let far = order(&[(0, 65536, 0), (2 * GIB, 8 << 20, 1), (65536, (1 << 20) - 65536, 2)]);
    let merged = Order::merge(&[whole, far]).expect("one base");
    assert_eq!(
        rows(&merged),
        [
            (0, 65536, 0, 2),
            (2 * GIB, 8 << 20, 1, 1),
            (GIB, 4096, 3, 1),
            (65536, (1 << 20) - 65536, 1, 2)
        ]
    );
}

#[test]
fn what_few_records_have_is_wanted_at_the_end() {
    let common = order(&[(0, 4096, 0), (GIB, 4096, 1)]);
    let own = order(&[(5 * GIB, 4096, 0), (0, 4096, 1), (GIB, 4096, 2)]);
    let merged = Order::merge(&[common.clone(), own.clone(), common.clone()]).expect("one base");
    assert_eq!(rows(&merged)[0].0, 5 * GIB, "its rank is 0");
    // One of three is not fewer than a third; one of four is.
    assert_eq!(merged.wanted()[0].start, 5 * GIB);
    let merged = Order::merge(&[merged, common]).expect("one base");
    let starts: Vec<u64> = merged.wanted().iter().map(|range| range.start).collect();
    assert_eq!(starts, [0, GIB, 5 * GIB]);
}

#[test]
fn votes_do_not_overflow() {
    let mut many = order(&[(0, 4096, u32::MAX), (GIB, 4096, u32::MAX)]);
    many.records = u32::MAX;
    many.ranges.iter_mut().for_each(|range| range.votes = u32::MAX);
    let merged =
        Order::merge(&[many.clone(), many.clone(), order(&[(GIB, 8192, 0)])]).expect("one");
    assert_eq!(merged.records(), u32::MAX);
    assert_eq!(merged.ranges()[0], many.ranges[0]);
    assert_eq!(merged.ranges()[1].votes, u32::MAX);
    assert_sound(&merged);
}

#[test]
fn the_identity_of_a_base_is_its_size_its_head_and_its_pin() {
    let read = |content: &'static [u8]| {
        move |head: &mut [u8]| {
            head.copy_from_slice(&content[..head.len()]);
            Ok(())
        }
    };
    let small = BaseIdentity::of(3, read(b"abcdef"), None).expect("read");
    // sha256sum of "abc" (FIPS 180-2, appendix B.1)
    assert_eq!(
        small.head_text(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
    let large = BaseIdentity::of(
        GIB,
        |head| {
            assert_eq!(head.len(), 65536);
            Ok(())
        },
        Some(String::new()),
    )
    .expect("read");
    assert_eq!((large.size, large.pin), (GIB, None));
    let none = |_: &mut [u8]| panic!("nothing is read of an empty disk");
    assert_eq!(BaseIdentity::of(0, none, None).expect("empty").size, 0);
    let fails = |_: &mut [u8]| Err(host::Error::new(ErrorKind::Io, "read"));
    assert_eq!(BaseIdentity::of(1, fails, None).expect_err("fails").kind(), ErrorKind::Io);
    for (size, pin) in [(1 << 63, None), (0, Some("p".repeat(MOST_PIN + 1)))] {
        let error = BaseIdentity::of(size, |_| Ok(()), pin).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    let long = BaseIdentity { pin: Some("p".repeat(MOST_PIN + 1)), ..base(5) };
    assert_eq!(Order::from_touches(long, []).base(), &base(5));
}

#[test]
fn orders_of_other_disks_are_refused_with_what_differs() {
    let with = |size, head, pin: Option<&str>| {
        let base = BaseIdentity { size, head: [head; 32], pin: pin.map(str::to_owned) };
        Order::from_touches(base, [touch(0, 1, 0)])
    };
    let refused = |one: &Order, another: &Order| {
        let error = one.check_base(another.base()).expect_err("another disk");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let merged = Order::merge(&[one.clone(), another.clone()]).expect_err("another disk");
        assert_eq!(merged.to_string(), error.to_string());
        error.to_string()
    };
    let order = with(1000, 1, Some("\"v1\""));
    let size = refused(&order, &with(2000, 1, Some("\"v1\"")));
    assert!(size.contains("1000 bytes") && size.contains("2000"), "{size}");
    let head = refused(&order, &with(1000, 0x2f, None));
    assert!(head.contains("first 1000 bytes") && head.contains("2f2f2f2f"), "{head}");
    let pin = refused(&order, &with(1000, 1, Some("\"v2\"")));
    assert!(pin.contains("v1") && pin.contains("v2"), "{pin}");
    // Without a pin there is nothing to compare, and the merge keeps the pin that there is.
    let without = with(1000, 1, None);
    order.check_base(without.base()).expect("the same");
    for orders in [[order.clone(), without.clone()], [without, order.clone()]] {
        assert_eq!(Order::merge(&orders).expect("one base").base(), order.base());
    }
    assert_eq!(Order::merge(&[]).expect_err("none").kind(), ErrorKind::InvalidArgument);
}

/// Protects: an order that is too long for its place keeps what most records have, and of that what
/// comes first.
#[test]
fn an_order_is_shortened_to_what_is_wanted_most() {
    let all: Vec<_> = (0..1000_u64).map(|at| touch((at * 7919 % 1000) * 8192, 4096, 0)).collect();
    let one = Order::from_touches(base(1 << 30), all.clone());
    let even =
        all.iter().copied().enumerate().filter(|(at, _)| at % 2 == 0).map(|(_, touch)| touch);
    let both = Order::merge(&[one.clone(), Order::from_touches(base(1 << 30), even)]).unwrap();
    let whole = both.encode();
    assert_eq!(both.encode_at_most(whole.len() as u64), whole);
    let half = Order::decode(&both.encode_at_most(whole.len() as u64 / 2)).unwrap();
    assert!(half.ranges().len() > 300 && half.encode().len() <= whole.len() / 2);
    let votes = |wanted| half.ranges().iter().filter(|range| range.votes == wanted).count();
    assert!(votes(2) == 500 || votes(1) == 0, "{} and {}", votes(2), votes(1));
    for longest in [0, 63, 67, 68, 100, 1000] {
        let bytes = one.encode_at_most(longest);
        let short = Order::decode(&bytes).unwrap();
        assert!(bytes.len() as u64 <= longest || short.ranges().is_empty(), "{longest}");
        let count = short.ranges().len();
        assert_eq!(short.ranges(), &one.ranges()[..count], "the first ones are kept");
    }
}

/// The size of a file: a boot has about 10,000 ranges of a few 4 KiB blocks, most of them near the
/// one before.
#[test]
fn the_file_of_a_boot_is_small() {
    let mut at = 0;
    let touches = (0..10_000_u64).map(|n| {
        let random = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // One in four is anywhere, the others are within some MiB.
        let near = (at + (random >> 40 & 0xfff) * 4096) % (64 * GIB);
        at = if n % 4 == 0 { random % (16 << 20) * 4096 } else { near };
        touch(at, 4096 * (1 + (random >> 20) % 32), (n * 2) as u32)
    });
    let order = Order::from_touches(base(64 * GIB), touches);
    let length = order.encode().len();
    assert!(order.ranges().len() > 9000 && length < 64 << 10, "{length} bytes");
    println!("{} ranges: {length} bytes", order.ranges().len());
}

/// Protects: what the fuzz target checks, for the inputs of its corpus. Some of them are files, so
/// that the fuzzer begins with what is accepted.
#[test]
fn the_inputs_of_the_fuzzer_break_nothing() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/corpus/order_file");
    let mut accepted = 0;
    for input in std::fs::read_dir(corpus).expect(corpus) {
        let input = std::fs::read(input.expect("an entry").path()).expect("an input");
        fuzz_file(&input);
        let file = with_checksum([&b"CORDORDR\0\0\0\x01"[..], &input].concat());
        accepted += u32::from(Order::decode(&file).is_ok());
    }
    assert_eq!(accepted, 5);
}
