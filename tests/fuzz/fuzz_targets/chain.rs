//! Images that name each other and other things as backing files. What must hold is said in `src/simulation/hostile/chain.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::simulation::hostile::chain::any_bytes(data));
