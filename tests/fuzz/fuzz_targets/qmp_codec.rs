//! Any bytes, cut anyhow, from one to four QMP clients at once. What must hold is said in `src/qmp/fuzzing.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cordisk::qmp::fuzzing::any_bytes(data));
