//! A damaged image, and guest requests on it. The checks are in `src/trials/hostile/image.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| trials::hostile::image::damaged(data));
