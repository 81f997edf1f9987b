//! A first cluster of any bytes. What must hold is said in `src/simulation/hostile/header.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::simulation::hostile::header::any_bytes(data));
