//! Arbitrary bytes as a request that was read from /dev/fuse. The checks are in
//! `src/export/wire.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| export::any_request(data));
