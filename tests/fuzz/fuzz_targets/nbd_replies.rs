//! Arbitrary bytes from an NBD server: its negotiation, or its replies to several requests. The
//! checks are in `src/nbd/fuzzing.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd::fuzz_conversation(data));
