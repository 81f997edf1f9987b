//! Numbers that look random and are the same every time (splitmix64), for whatever tests draw: what a seed says, it says everywhere.

/// A sequence of numbers; any seed is as good as any other.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        let number = mix(self.0);
        self.0 = self.0.wrapping_add(STEP);
        number
    }

    /// A number from 0 to `n` - 1.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A number that looks like any other, and always the same for the same one.
pub fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(STEP);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// The first numbers of the seed 0, as the authors of the generator give them.
#[test]
fn the_numbers_are_those_of_splitmix64() {
    let mut random = Random(0);
    let numbers = [random.next(), random.next(), random.next()];
    assert_eq!(numbers, [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f]);
    assert!((0..100).all(|_| random.below(3) < 3));
}
