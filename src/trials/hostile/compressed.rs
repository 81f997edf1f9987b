//! Compressed clusters of arbitrary bytes: decompression gives exactly one cluster, the same each
//! time, or an error.

use super::template::{deflate, zstd_frame};
use super::{Input, pattern};
use qcow2::format::{CompressionType, decompress};

/// The fuzz target. The first bytes choose the compression of the other bytes and the length of the
/// cluster.
///
/// # Panics
/// If a check fails.
pub fn any_bytes(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.pick(&[CompressionType::Zlib, CompressionType::Zstd]);
    let what = input.byte();
    let cluster = 512usize << input.pick(&[0, 0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 9, 12]);
    match what % 4 {
        0 => judge(kind, input.rest(), cluster),
        1 => round_trip(kind, &mut input, cluster),
        _ => {
            let whole = claimed(&mut input, cluster);
            let mut payload = encode(kind, &whole);
            while !input.is_over() {
                let at = input.below(payload.len() as u64) as usize;
                match input.byte() % 4 {
                    0 => payload[at] ^= 1 << (input.byte() % 8),
                    1 => payload[at] = input.byte(),
                    2 => payload.truncate(at.max(1)),
                    _ => payload.extend_from_within(at..),
                }
                payload.truncate(2 * cluster);
            }
            judge(kind, &payload, cluster);
        }
    }
}

fn encode(kind: CompressionType, bytes: &[u8]) -> Vec<u8> {
    match kind {
        CompressionType::Zlib => deflate(bytes),
        CompressionType::Zstd => zstd_frame(bytes),
    }
}

/// Returns contents of a cluster, or slightly shorter or longer ones.
fn claimed(input: &mut Input<'_>, cluster: usize) -> Vec<u8> {
    let len = match input.byte() % 4 {
        0 => cluster - 1,
        1 => cluster + 1 + input.below(4096) as usize,
        _ => cluster,
    };
    pattern(input.byte(), len)
}

/// Checks that decompression restores the cluster, whatever bytes follow the payload in its last
/// sector.
fn round_trip(kind: CompressionType, input: &mut Input<'_>, cluster: usize) {
    let mut bytes = pattern(input.byte(), cluster);
    let own = input.rest().len().min(cluster);
    bytes[..own].copy_from_slice(&input.rest()[..own]);
    let mut payload = encode(kind, &bytes);
    let sectors = payload.len().next_multiple_of(512);
    payload.resize(sectors, input.byte());
    let mut output = vec![0xee; cluster];
    decompress(kind, &payload, &mut output).unwrap_or_else(|error| panic!("{error}"));
    assert!(output == bytes, "{kind:?}: another cluster of {cluster} bytes came out");
}

/// Decompresses twice, into buffers with different contents. The results must be equal, or some
/// bytes were not decompressed but left over.
fn judge(kind: CompressionType, payload: &[u8], cluster: usize) {
    let [mut first, mut second] = [vec![0x55; cluster], vec![0xaa; cluster]];
    let results = (decompress(kind, payload, &mut first), decompress(kind, payload, &mut second));
    match results {
        (Ok(()), Ok(())) => assert!(
            first == second,
            "{kind:?}: part of a cluster of {cluster} bytes was not written"
        ),
        (Err(first), Err(second)) => {
            assert_eq!(first, second);
            let text = first.to_string();
            assert!(!text.contains('\n') && text.len() < 1000, "one line: {text:?}");
        }
        (first, second) => panic!("{kind:?}: {first:?}, then {second:?}"),
    }
}
