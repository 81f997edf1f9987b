//! Arbitrary bytes as the file of an order, with and without a checksum that is right. The checks
//! are in `src/order/fuzzing.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| order::fuzz_file(data));
