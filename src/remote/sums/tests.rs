use std::io::Cursor;

use super::*;

fn list_of(bytes: &[u8]) -> ChunkList {
    ChunkList::make(&mut Cursor::new(bytes), bytes.len() as u64).unwrap()
}

/// Three chunks: bytes, zeros, and an end of 5 bytes.
fn content() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..CHUNK).map(|at| (at % 253) as u8).collect();
    bytes.resize(2 * CHUNK as usize, 0);
    bytes.extend(b"the e");
    bytes
}

/// Protects: the format, byte by byte, as another program would make it.
#[test]
fn the_format_is_what_the_module_says() {
    let bytes = content();
    let list = list_of(&bytes);
    let mut wanted = b"CORDSUMS\0\0\0\x01\0\x10\0\0\0\0\0\0\0\x20\0\x05".to_vec();
    for chunk in bytes.chunks(CHUNK as usize) {
        wanted.extend(Sha256::digest(chunk));
    }
    assert_eq!(list.to_bytes(), wanted);
    assert_eq!(list.digest(), hex(&Sha256::digest(&wanted)));
    assert_eq!(ChunkList::parse(&wanted).unwrap(), list);
    assert_eq!((list.size(), list.chunks()), (2 * CHUNK + 5, 3));
    // The example of FIPS 180-4.
    assert_eq!(
        hex(&hash(b"abc")),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(ChunkList::of_file(&path).unwrap(), list);
    let error = ChunkList::of_file(&dir.path().join("none")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

/// Protects: a chunk is accepted only whole, unchanged and in its place.
#[test]
fn a_chunk_is_verified_whole_and_in_its_place() {
    let bytes = content();
    let list = list_of(&bytes);
    let chunks: Vec<&[u8]> = bytes.chunks(CHUNK as usize).collect();
    for index in 0..5 {
        for (place, chunk) in (0..).zip(&chunks) {
            assert_eq!(list.verify(index, chunk), index == place, "{index} {place}");
        }
        assert_eq!(list.is_zero(index), index == 1, "{index}");
        assert!(!list.verify(index, b""));
    }
    assert!(!list.verify(2, b"the E") && !list.verify(2, b"the en") && !list.verify(2, b"the "));
    assert!(!list.verify(1, &vec![0; CHUNK as usize + 1]));
    assert_eq!(list.range(2), 2 * CHUNK..2 * CHUNK + 5);
    assert!(list.range(3).is_empty() && list.range(u64::MAX).is_empty());
    assert!(!list.verify(u64::MAX, b""));
}

/// Protects: zeros at the end of a file, of any length, are known as zeros.
#[test]
fn zeros_at_the_end_are_zeros() {
    for len in [1, 7, CHUNK, CHUNK + 1, 2 * CHUNK] {
        let list = list_of(&vec![0; len as usize]);
        assert!((0..list.chunks()).all(|index| list.is_zero(index)), "{len}");
        assert!(!list.is_zero(list.chunks()));
    }
    let empty = list_of(b"");
    assert_eq!((empty.size(), empty.chunks(), empty.to_bytes().len()), (0, 0, HEADER));
    assert!(!empty.is_zero(0) && !empty.verify(0, b""));
    assert_eq!(ChunkList::parse(&empty.to_bytes()).unwrap(), empty);
}

/// Protects: nothing but a list is parsed, and a size from a list allocates nothing.
#[test]
fn other_bytes_are_no_list() {
    let good = list_of(&content()).to_bytes();
    let changed = |at: usize, bytes: &[u8]| {
        let mut list = good.clone();
        list[at..at + bytes.len()].copy_from_slice(bytes);
        list
    };
    let mut longer = good.clone();
    longer.push(0);
    for (what, bytes) in [
        ("nothing", Vec::new()),
        ("magic", changed(0, b"X")),
        ("version", changed(11, &[2])),
        ("chunk size", changed(13, &[0x20])),
        ("size", changed(16, &(2 * CHUNK).to_be_bytes())),
        ("more chunks", changed(16, &(3 * CHUNK + 1).to_be_bytes())),
        ("largest size", changed(16, &u64::MAX.to_be_bytes())),
        ("longer", longer),
    ] {
        assert_eq!(ChunkList::parse(&bytes).unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
    }
    for len in 0..good.len() {
        assert!(ChunkList::parse(&good[..len]).is_err(), "{len}");
    }
}

/// Protects: a file that changes its size while it is read has no list.
#[test]
fn a_file_of_another_size_has_no_list() {
    let bytes = content();
    for size in [0, 1, bytes.len() as u64 - 1, bytes.len() as u64 + 1, 9 * CHUNK] {
        let error = ChunkList::make(&mut Cursor::new(&bytes), size).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{size}: {error}");
    }
    assert!(ChunkList::make(&mut Cursor::new(&bytes), u64::MAX).is_err());
}

/// Protects: only a digest of the one algorithm names content.
#[test]
fn digests_are_written_in_one_way() {
    let digits = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    for good in [format!("sha256:{digits}"), format!("sha256:{}", digits.to_uppercase())] {
        assert_eq!(parse_digest(&good).unwrap(), digits);
    }
    for bad in [
        digits.to_owned(),
        format!("sha512:{digits}"),
        format!("sha256:{}", &digits[1..]),
        format!("sha256:{digits}0"),
        format!("sha256:{}g", &digits[1..]),
        format!(" sha256:{digits}"),
        String::new(),
    ] {
        assert!(parse_digest(&bad).is_err(), "{bad}");
    }
}

proptest::proptest! {
    /// Protects: any bytes are a list or none, and a list has one form.
    #[test]
    fn a_list_has_one_form(
        size in 0..=9 * CHUNK,
        rest in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..9 * DIGEST),
        at: proptest::sample::Index,
        flip in 1..=u8::MAX,
    ) {
        let mut bytes = [&MAGIC[..], &VERSION.to_be_bytes(), &(CHUNK as u32).to_be_bytes()].concat();
        bytes.extend(size.to_be_bytes());
        bytes.extend(&rest);
        bytes.resize(HEADER + rest.len() / DIGEST * DIGEST, 0);
        let fits = (rest.len() / DIGEST) as u64 == size.div_ceil(CHUNK);
        let list = ChunkList::parse(&bytes);
        proptest::prop_assert_eq!(list.is_ok(), fits);
        if let Ok(list) = &list {
            proptest::prop_assert_eq!(list.to_bytes(), &bytes[..]);
            proptest::prop_assert_eq!(list.size(), size);
        }
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let (Ok(other), Ok(list)) = (ChunkList::parse(&bytes), list) {
            proptest::prop_assert_ne!(other.digest(), list.digest());
        }
    }
}
