//! Checks of arbitrary bytes as the file of an order: for the fuzzer, and for tests.

use crate::{Order, OrderRange};

/// Checks `bytes` as a file, and once more with the version and the checksum of this program, which
/// a fuzzer does not find. What is accepted must be sound, must be exactly what is written again,
/// and must survive a merge. What is refused must be refused with one line.
///
/// # Panics
/// If one of that is not so.
pub fn fuzz_file(bytes: &[u8]) {
    check(bytes);
    let mut file = [&b"CORDORDR\0\0\0\x01"[..], bytes].concat();
    file.extend(crc32fast::hash(&file).to_be_bytes());
    check(&file);
}

fn check(bytes: &[u8]) {
    match Order::decode(bytes) {
        Ok(order) => {
            assert_sound(&order);
            assert_eq!(order.encode(), bytes);
            order.check_base(order.base()).expect("its own base");
            let twice = Order::merge(&[order.clone(), order.clone()]).expect("one base");
            assert_sound(&twice);
            let places = |order: &Order| order.ranges().iter().map(OrderRange::bytes).collect();
            let (once, twice): (Vec<_>, Vec<_>) = (places(&order), places(&twice));
            assert!(once == twice || order.records() > u32::MAX / 2, "saturated votes are equal");
        }
        Err(error) => {
            let line = error.to_string();
            assert!(!line.is_empty() && !line.contains('\n'), "{line}");
        }
    }
}

/// What holds for every order, whatever it was made from.
pub(crate) fn assert_sound(order: &Order) {
    let mut sorted = order.ranges().to_vec();
    sorted.sort_by_key(|range| range.offset);
    assert!(sorted.windows(2).all(|pair| pair[0].end() <= pair[1].offset), "an overlap");
    assert!(order.ranges().len() <= crate::MOST_RANGES && order.records() > 0);
    for range in order.ranges() {
        assert!(range.len > 0 && range.end() <= order.base().size, "{range:?}");
        assert!((1..=order.records()).contains(&range.votes), "{range:?}");
    }
    let is_one =
        |pair: &[OrderRange]| pair[0].end() == pair[1].offset && pair[0].votes == pair[1].votes;
    assert!(!order.ranges().windows(2).any(is_one), "two ranges are one");
    let mut wanted = order.wanted();
    wanted.sort_by_key(|range| range.start);
    let bytes: Vec<_> = sorted.iter().map(OrderRange::bytes).collect();
    assert_eq!(wanted, bytes, "each byte once");
}
