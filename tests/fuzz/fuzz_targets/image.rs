//! A damaged image, and what a guest does to it. What must hold is said in `src/simulation/hostile/image.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::simulation::hostile::image::damaged(data));
