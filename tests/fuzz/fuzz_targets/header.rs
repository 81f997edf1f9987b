//! DOC

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::simulation::hostile::header::any_bytes(data));
