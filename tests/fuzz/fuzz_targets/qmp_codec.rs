//! Arbitrary bytes, split at arbitrary places, from one to four QMP clients at the same time. The
//! checks are in `src/control/fuzzing.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| control::fuzzing::any_bytes(data));
