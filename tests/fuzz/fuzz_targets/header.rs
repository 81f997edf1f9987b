//! A first cluster of arbitrary bytes. The checks are in `src/trials/hostile/header.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| trials::hostile::header::any_bytes(data));
