//! A compressed cluster of any bytes. What must hold is said in `src/simulation/hostile/compressed.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::simulation::hostile::compressed::any_bytes(data));
