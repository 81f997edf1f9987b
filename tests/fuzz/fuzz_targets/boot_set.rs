//! A disk of arbitrary bytes: the search for what its boot needs ends, within its limits.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bootset::fuzz_disk(data));
