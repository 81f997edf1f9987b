//! Any bytes as a request that was read from /dev/fuse. What must hold is said in `src/fuse/wire.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::fuse::any_request(data));
