//! Reproducible pseudo-random numbers (splitmix64) for all tests: a seed gives the same numbers on
//! every machine and in every version.
//!
//! The crate `fastrand` would save some ten lines here, but it changes its numbers in minor
//! versions (2.1.0 did). A seed that is recorded for a fault must find the fault again after an
//! update.

/// A sequence of numbers. Any seed is as good as any other.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// Returns the sequence of `CORDISK_SEED`, or of `seed` if that is not set. Prints the seed, so
    /// that a failure can be repeated.
    pub fn of_test(seed: u64) -> Random {
        let given = std::env::var("CORDISK_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or(seed);
        println!("CORDISK_SEED={seed}");
        Random(seed)
    }

    /// Returns the next number.
    #[expect(
        clippy::should_implement_trait,
        reason = "it never ends, so there is no Option to return"
    )]
    pub fn next(&mut self) -> u64 {
        let number = mix(self.0);
        self.0 = self.0.wrapping_add(STEP);
        number
    }

    /// Returns a number from 0 to `n` - 1.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Returns a pseudo-random number that depends only on `number`.
pub fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(STEP);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// The first numbers of the seed 0, as the authors of the generator publish them.
#[test]
fn the_numbers_are_those_of_splitmix64() {
    let mut random = Random(0);
    let numbers = [random.next(), random.next(), random.next()];
    assert_eq!(numbers, [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f]);
    assert!((0..100).all(|_| random.below(3) < 3));
}
