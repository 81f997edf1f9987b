//! A first cluster of arbitrary bytes: the engine refuses it, or it is within the bounds of V2 to
//! V21, and nothing beyond the end of the file is read.

use super::Input;
use super::image::FIELDS;
use super::template::{Kind, Shape, build};
use qcow2::format::Header;
use qcow2::image::{Image, ImageReader};
use sim::SimStorage;

/// Lengths of the file that begins with the bytes of the case.
const SIZES: [u64; 8] = [0, 512, 512, 4096, 4096, 65536, 65536, 3 << 20];

/// The fuzz target: the first two bytes choose how the others are used.
///
/// # Panics
/// If a check fails.
pub fn any_bytes(data: &[u8]) {
    let mut input = Input(data);
    let (what, size) = (input.byte(), input.pick(&SIZES));
    let mut bytes = match what % 2 {
        0 => input.rest()[..input.rest().len().min(4096)].to_vec(),
        _ => edited(&mut input),
    };
    bytes.resize(bytes.len().max(size as usize), 0);
    judge(bytes);
}

/// Returns a valid header with changed fields.
fn edited(input: &mut Input<'_>) -> Vec<u8> {
    let shape = Shape {
        version: input.pick(&[3, 3, 2]),
        bits: input.pick(&[9, 12, 16]),
        order: 4,
        zstd: input.one_in(4),
        extended: false,
        size: input.below(1 << 20) / 512 * 512,
        l1_slack: input.below(4),
        backing: input
            .one_in(2)
            .then(|| (b"base.raw".to_vec(), input.one_in(2).then(|| b"qcow2".to_vec()))),
    };
    let shape = if shape.version == 2 { Shape { zstd: false, ..shape } } else { shape };
    let mut bytes = build(&shape, &[Kind::Data(1)], [0, 0]);
    while !input.is_over() {
        let (at, len) = match input.byte() % 4 {
            0 => (input.below(200), input.pick(&[1, 4, 8])),
            _ => input.pick(&FIELDS),
        };
        let at = at as usize;
        let value = match input.byte() % 8 {
            0 => 0,
            1 => u64::MAX >> (input.byte() % 64),
            2 => 1 << (input.byte() % 64),
            3 => bytes.len() as u64 + input.below(3) - 1,
            4 => input.below(16) << shape.bits,
            5 => [0x5346_4c43, 0xe279_2aca, 0x6803_f857, 0x2385_2875, 0x0537_be77, 0x4441_5441]
                [input.below(6) as usize],
            6 => input.below(64),
            _ => input.number(len),
        };
        bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
    bytes
}

fn judge(bytes: Vec<u8>) {
    let size = bytes.len() as u64;
    match Header::parse(&bytes[..bytes.len().min(2 << 20)], size) {
        Ok(header) => {
            check_bounds(&bytes);
            let backing = header.backing.map(|backing| backing.name);
            assert!(
                backing
                    .is_none_or(|name| (1..=1023).contains(&name.len())
                        && !name.chars().any(char::is_control)),
                "V6"
            );
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!text.chars().any(char::is_control) && text.len() < 4096, "one line: {text:?}");
        }
    }
    for writable in [false, true] {
        let parse = if writable { Header::parse } else { Header::parse_to_read };
        let parses = parse(&bytes[..bytes.len().min(2 << 20)], size).is_ok();
        let file = SimStorage::new(bytes.clone());
        file.record();
        let storage = file.clone();
        let opened = if writable {
            Image::open(storage).map(|_| ())
        } else {
            ImageReader::open(storage).map(|_| ())
        };
        assert!(parses || opened.is_err(), "opened without a header");
        // Opening for writing reads the header, the refcount table and the L1 table once each, and
        // none of them beyond the end of the file. Opening for reading needs none of the tables
        // yet.
        assert!(
            file.operations() <= if writable { 3 } else { 1 },
            "{} operations to open",
            file.operations()
        );
        assert!(file.recorded().is_empty(), "opening changes nothing");
    }
}

/// Checks V2 to V14 and V20 to V21 on the bytes themselves.
fn check_bounds(bytes: &[u8]) {
    let field = |at: usize, len: usize| {
        bytes[at..at + len].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
    };
    let file = bytes.len() as u64;
    let (version, bits, size) = (field(4, 4), field(20, 4), field(24, 8));
    assert!(field(0, 4) == 0x5146_49fb && (2..=3).contains(&version), "V2");
    assert!((9..=21).contains(&bits), "V3");
    let cluster = 1u64 << bits;
    assert!(file >= cluster && size <= 1 << 61, "V13");
    assert!(field(32, 4) == 0, "encryption");
    let mut header_end = 72;
    if version == 3 {
        header_end = field(100, 4);
        assert!((104..=cluster).contains(&header_end) && header_end.is_multiple_of(8), "V4");
        assert!(
            field(72, 8) & !0b1011 == 0,
            "V7: dirty, corrupt and the compression type are all that is let pass"
        );
        assert!(field(96, 4) <= 6, "V8");
        let compression = if header_end > 104 { field(104, 1) } else { 0 };
        assert!(compression <= 1 && compression == field(72, 8) >> 3 & 1, "V20");
        assert!(field(88, 8) & 2 == 0, "a raw external data file");
    }
    let (name_at, name_len) = (field(8, 8), field(16, 4));
    if name_at == 0 {
        assert!(name_len == 0, "V6");
    } else {
        assert!(name_at >= header_end && name_len <= 1023 && name_at + name_len <= cluster, "V5");
    }
    let end = file.next_multiple_of(cluster);
    let (table, table_clusters, l1, l1_size) =
        (field(48, 8), field(56, 4), field(40, 8), field(36, 4));
    let mut ranges = vec![(0, cluster), (table, table_clusters * cluster)];
    assert!(table_clusters >= 1 && table_clusters * cluster <= 8 << 20, "V9");
    assert!(l1_size * 8 <= 32 << 20 && l1_size >= size.div_ceil(cluster * cluster / 8), "V11");
    if l1_size > 0 {
        ranges.push((l1, (l1_size * 8).next_multiple_of(cluster)));
    }
    assert!(field(60, 4) <= 65536, "V14");
    for (index, &(at, len)) in ranges.iter().enumerate() {
        assert!(
            at.is_multiple_of(cluster) && at.checked_add(len).is_some_and(|to| to <= end),
            "V10, V12: {at:#x} {len}"
        );
        assert!(
            ranges[index + 1..]
                .iter()
                .all(|&(other, other_len)| other >= at + len || at >= other + other_len),
            "V21"
        );
    }
}
