//! Hostile input: checks that hold for every content of an image (V1 to V29).
//!
//! ```text
//! bytes (a fuzzer's, or random) ─▶ Input ─▶ a case: images and operations ─▶ engine ─▶ judge
//! ```
//! Each file here makes the cases of one target from bytes and checks them: [`header`], [`image`]
//! (hostile images and valid ones), [`chain`], [`compressed`]. The fuzz targets (`tests/fuzz`) and
//! the property tests (`tests.rs`) call the same functions, so a case that one of them finds can be
//! repeated by the other. `template` writes images and [`sim::spec`] reads them, both from the
//! specification and without code of `format` or `image`. So the judge does not repeat a mistake of
//! the engine.
//!
//! **Touches:** the engine through its public interface, files in memory; [`chain`] uses a
//! directory of its own. **Never:** is part of the program.
//! **Locks:** none. **Invariants:** a case depends on its bytes only.

pub mod chain;
pub mod compressed;
pub mod header;
pub mod image;
mod template;
mod watch;

#[cfg(test)]
mod findings;
#[cfg(test)]
mod tests;

/// The bytes that define a case. It continues with zeros when the bytes are used up, so that every
/// sequence of bytes is a case.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        match self.0 {
            [] => 0,
            [first, rest @ ..] => {
                self.0 = rest;
                *first
            }
        }
    }

    /// Reads a big-endian number of `bytes` bytes.
    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }

    /// Reads a number from 0 to `bound` - 1, from as few bytes as possible.
    fn below(&mut self, bound: u64) -> u64 {
        let bytes = (64 - bound.saturating_sub(1).leading_zeros()).div_ceil(8) as usize;
        self.number(bytes) % bound.max(1)
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == n - 1
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn rest(&self) -> &'a [u8] {
        self.0
    }
}

/// Returns `len` bytes of a pattern that depends on `seed`; every fourth seed gives zeros.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    if seed.is_multiple_of(4) {
        return vec![0; len];
    }
    let mut bytes = vec![0; len];
    for (index, part) in bytes.chunks_mut(61).enumerate() {
        part.fill(seed.wrapping_add(index as u8).wrapping_mul(31) | 1);
    }
    bytes
}
