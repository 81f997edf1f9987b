//! A compressed cluster of arbitrary bytes. The checks are in `src/trials/hostile/compressed.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| trials::hostile::compressed::any_bytes(data));
