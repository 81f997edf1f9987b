//! Images that name each other and other files as backing files. The checks are in
//! `src/trials/hostile/chain.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| trials::hostile::chain::any_bytes(data));
