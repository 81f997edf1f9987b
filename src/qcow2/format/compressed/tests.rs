//! Tests that clusters of both compression types are restored, that all other input is an error,
//! and that nothing panics.

use super::*;
use crate::format::{Geometry, Header, Mapping};
use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use std::process::Command;

fn deflated(data: &[u8]) -> Vec<u8> {
    let mut stream = flate2::Compress::new(flate2::Compression::default(), false);
    let mut output = Vec::with_capacity(data.len() + 1024);
    stream.compress_vec(data, &mut output, flate2::FlushCompress::Finish).unwrap();
    output
}

/// A deflate stream that does not mark its end: an encoder that is only flushed writes it.
fn endless(data: &[u8]) -> Vec<u8> {
    let mut stream = flate2::Compress::new(flate2::Compression::default(), false);
    let mut output = Vec::with_capacity(data.len() + 1024);
    stream.compress_vec(data, &mut output, flate2::FlushCompress::Sync).unwrap();
    output
}

fn zstd_frame(data: &[u8]) -> Vec<u8> {
    compress_to_vec(data, CompressionLevel::Fastest)
}

/// Makes text that compresses, but not trivially.
fn text(len: usize) -> Vec<u8> {
    (0..)
        .flat_map(|n: u32| format!("line {}\n", n.wrapping_mul(2_654_435_761) % 9973).into_bytes())
        .take(len)
        .collect()
}

type Compress = fn(&[u8]) -> Vec<u8>;

fn both() -> [(CompressionType, Compress); 2] {
    [(CompressionType::Zlib, deflated), (CompressionType::Zstd, zstd_frame)]
}

#[test]
fn a_cluster_comes_back_whatever_follows_it() {
    for (kind, compress) in both() {
        for len in [512, 4096, 65536, 2 << 20] {
            let data = text(len);
            let mut input = compress(&data);
            let mut output = vec![0xee; len];
            decompress(kind, &input, &mut output).unwrap();
            assert_eq!(output, data);
            for garbage in [0, 0xff] {
                input.resize(input.len().next_multiple_of(512) + 512, garbage);
                output.fill(0xee);
                decompress(kind, &input, &mut output).unwrap();
                assert_eq!(output, data, "{kind:?} {len}");
            }
        }
    }
}

#[test]
fn anything_but_one_cluster_is_refused() {
    for (kind, compress) in both() {
        let data = text(65536);
        let input = compress(&data);
        let mut output = vec![0; 65536];
        assert!(
            decompress(kind, &input[..input.len() / 2], &mut output).is_err(),
            "{kind:?}: cut off"
        );
        assert!(decompress(kind, &[], &mut output).is_err());
        assert!(decompress(kind, &[0; 4096], &mut output).is_err());
        assert!(
            decompress(kind, &compress(&data[..65535]), &mut output).is_err(),
            "{kind:?}: short"
        );
    }
    // As in QEMU: deflate data may continue after the cluster. zstd data may not, but may consist
    // of several frames.
    let mut half = vec![0; 32768];
    decompress(CompressionType::Zlib, &deflated(&text(65536)), &mut half).unwrap();
    assert!(decompress(CompressionType::Zstd, &zstd_frame(&text(65536)), &mut half).is_err());
    let frames =
        [&b"\x50\x2a\x4d\x18\x03\0\0\0xyz"[..], &zstd_frame(&text(512)), &zstd_frame(&text(512))]
            .concat();
    let mut output = vec![0; 1024];
    decompress(CompressionType::Zstd, &frames, &mut output).unwrap();
    assert_eq!(output, [text(512), text(512)].concat());
}

/// Protects: the two decoders of deflate make one. A stream that only the second one decodes is a
/// cluster, and an error says what the second one has found.
#[test]
fn what_the_first_decoder_of_deflate_refuses_is_left_to_the_second() {
    let data = text(65536);
    let mut output = vec![0xee; 65536];
    for input in [endless(&data), deflated(&text(65536 + 512))] {
        output.fill(0xee);
        decompress(CompressionType::Zlib, &input, &mut output).unwrap();
        assert!(output == data);
    }
    let input = deflated(&data);
    let mut broken = input.clone();
    broken[200..220].fill(0xff);
    for (input, expected) in [
        (&deflated(&data[..65535])[..], "deflate stream has 65535 bytes instead of 65536"),
        (&endless(&data[..1000]), "deflate stream has 1000 bytes instead of 65536"),
        (&input[..input.len() / 2], "bytes instead of 65536"),
        (&broken, "deflate stream is broken: "),
    ] {
        let error = decompress(CompressionType::Zlib, input, &mut output).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn large_windows_and_dictionaries_are_refused() {
    // Magic, descriptor, window descriptor (log2 of the window minus 10, shifted by 3), a raw last
    // block of one byte.
    let frame = |window: u8| vec![0x28, 0xb5, 0x2f, 0xfd, 0, window, 0x09, 0, 0, b'x'];
    let mut output = [0];
    decompress(CompressionType::Zstd, &frame((23 - 10) << 3), &mut output).unwrap();
    let error = decompress(CompressionType::Zstd, &frame((27 - 10) << 3), &mut output).unwrap_err();
    assert!(error.to_string().contains("too much memory"), "{error}");
    // The same size, claimed as the content size of a single segment.
    let huge = [&[0x28, 0xb5, 0x2f, 0xfd, 0xe0][..], &u64::MAX.to_le_bytes(), &[0x09, 0, 0, b'x']]
        .concat();
    assert!(decompress(CompressionType::Zstd, &huge, &mut output).is_err());
    let dictionary = [0x28, 0xb5, 0x2f, 0xfd, 1, 0, 77, 0x09, 0, 0, b'x'];
    assert!(decompress(CompressionType::Zstd, &dictionary, &mut output).is_err());
}

/// Protects: clusters of an image that qemu-img compressed are read through this crate's decoders
/// of header and tables.
#[test]
fn images_compressed_by_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let raw = text(1 << 20);
    std::fs::write(dir.path().join("raw"), &raw).unwrap();
    for (options, bits) in [
        ("compression_type=zlib", 16),
        ("compression_type=zstd", 16),
        ("cluster_size=4k", 12),
        ("cluster_size=2M", 21),
    ] {
        let args = ["convert", "-c", "-O", "qcow2", "-o", options, "raw", "image"];
        assert!(
            Command::new("qemu-img").current_dir(dir.path()).args(args).status().unwrap().success()
        );
        let mut image = std::fs::read(dir.path().join("image")).unwrap();
        let header = Header::parse(&image[..image.len().min(2 << 20)], image.len() as u64).unwrap();
        let geometry: Geometry = header.geometry;
        assert_eq!(geometry.cluster_bits(), bits);
        let be64 =
            |at: usize, image: &[u8]| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        image.resize(image.len().next_multiple_of(4 << 20), 0);
        let mut compressed = 0;
        for (index, expected) in raw.chunks(geometry.cluster_size() as usize).enumerate() {
            let (l1, l2) = geometry.table_indexes(crate::format::GuestCluster(index as u64));
            let table =
                be64(header.l1_table_offset as usize + 8 * l1, &image) & 0x00ff_ffff_ffff_fe00;
            let entry = be64(table as usize + 8 * l2, &image);
            let Mapping::Compressed { at, len } = Mapping::decode(entry, &geometry).unwrap() else {
                continue;
            };
            let mut output = vec![0; geometry.cluster_size() as usize];
            decompress(header.compression, &image[at.0 as usize..][..len as usize], &mut output)
                .unwrap();
            assert_eq!(output[..expected.len()], *expected, "{options} cluster {index}");
            compressed += 1;
        }
        assert!(compressed > 0, "{options}");
    }
}

fn mutated(
    frame: &[u8],
    changes: &[(prop::sample::Index, u8)],
    cut: prop::sample::Index,
) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for (at, value) in changes {
        *at.get_mut(&mut frame) = *value;
    }
    frame.truncate(cut.index(frame.len()) + frame.len() / 2);
    frame
}

proptest! {
    /// Protects: arbitrary bytes never panic.
    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let mut output = vec![0; 4096];
        let _ = decompress(CompressionType::Zlib, &bytes, &mut output);
        let _ = decompress(CompressionType::Zstd, &bytes, &mut output);
        let _ = decompress(CompressionType::Zstd, &[&[0x28, 0xb5, 0x2f, 0xfd, 0, 0x20][..], &bytes].concat(), &mut output);
    }

    /// Protects: valid streams with changed bytes never panic. They get much further than arbitrary
    /// bytes.
    #[test]
    fn broken_streams(
        len in 1usize..8192,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        for (kind, compress) in both() {
            let data = text(len);
            let _ = decompress(kind, &mutated(&compress(&data), &changes, cut), &mut vec![0; len]);
        }
    }

    #[test]
    fn every_cluster_comes_back(data in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..4096)) {
        for (kind, compress) in both() {
            let mut output = vec![0; data.len()];
            decompress(kind, &compress(&data), &mut output).unwrap();
            prop_assert_eq!(&output, &data);
        }
    }
}
