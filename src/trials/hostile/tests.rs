//! Runs the cases of the fuzz targets with random bytes, with the corpus, and with inputs that were
//! found once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use sim::random::Random;

/// Returns the bytes of a random case; its seed and its number determine them.
fn random_bytes(mut random: Random, longest: u64) -> Vec<u8> {
    let len = 1 + random.below(longest);
    (0..len).map(|_| random.next() as u8).collect()
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Judges `count` cases of up to `longest` random bytes. `CORDISK_FUZZ_CASES` sets another count;
/// `CORDISK_FUZZ_CASE` runs one case.
fn cases(judge: fn(&[u8]), count: u64, longest: u64) {
    let seed = from_environment("CORDISK_SEED").unwrap_or(1);
    let count = from_environment("CORDISK_FUZZ_CASES").unwrap_or(count);
    let (first, end) =
        from_environment("CORDISK_FUZZ_CASE").map_or((0, count), |case| (case, case + 1));
    for case in first..end {
        let bytes =
            random_bytes(Random(seed.wrapping_mul(0x5851_f42d_4c95_7f2d) ^ case << 20), longest);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| judge(&bytes))) {
            println!("CORDISK_SEED={seed} CORDISK_FUZZ_CASE={case} repeats this case");
            std::panic::resume_unwind(panic);
        }
    }
}

/// Judges the committed inputs of a fuzz target.
fn corpus(target: &str, judge: fn(&[u8])) {
    let directory =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus").join(target);
    let files = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
    // Inputs that the fuzzer adds are named by their hash, and are not committed.
    let mut files: Vec<_> = files.filter(|file| file.file_name().unwrap().len() < 40).collect();
    files.sort();
    assert!(!files.is_empty(), "{}", directory.display());
    for file in files {
        println!("{}", file.display());
        judge(&std::fs::read(file).unwrap());
    }
}

#[test]
fn any_header_is_refused_or_within_bounds() {
    cases(super::header::any_bytes, 400, 300);
    corpus("header", super::header::any_bytes);
}

#[test]
fn damaged_images_are_refused_or_worked_with() {
    cases(super::image::damaged, 300, 700);
    corpus("image", super::image::damaged);
}

#[test]
fn valid_images_are_what_a_vector_is() {
    cases(super::image::valid, 150, 900);
    corpus("ops", super::image::valid);
}

#[test]
fn any_compressed_cluster_is_one_cluster_or_an_error() {
    cases(super::compressed::any_bytes, 200, 300);
    corpus("compressed", super::compressed::any_bytes);
}

#[test]
fn chains_open_only_what_may_be_opened() {
    cases(super::chain::any_bytes, 100, 300);
    corpus("chain", super::chain::any_bytes);
}
