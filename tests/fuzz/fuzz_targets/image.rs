//! DOC

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::simulation::hostile::image::damaged(data));
