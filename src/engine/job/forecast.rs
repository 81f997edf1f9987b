//! Forecast of the work that is left for a job, by offset. Pure.
//!
//! A job that walks `len` bytes has to move only some of them: the others are local already, or
//! zero. A forecast holds the number of bytes to move for slices of equal length, so its size does
//! not depend on the length of the job.

/// Most slices of a forecast, which is the resolution of the bytes left.
pub const SLICES: usize = 1024;

/// Bytes that are still to be moved, as a function of the job's offset.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Forecast {
    /// Bytes of a slice; the last slice may be shorter.
    slice: u64,
    /// For each slice, the bytes to be moved from its start to the end of the job.
    from: Vec<u64>,
}

impl Forecast {
    /// Returns the size of a slice in bytes, for a job of `len` bytes in at most `SLICES` slices.
    pub fn slice_of(len: u64) -> u64 {
        len.div_ceil(SLICES as u64).max(1)
    }

    /// Creates a forecast from the bytes to move in each slice of [`Forecast::slice_of`] bytes.
    pub fn new(slice: u64, to_move: &[u64]) -> Forecast {
        let mut from = vec![0_u64; to_move.len() + 1];
        for (index, bytes) in to_move.iter().enumerate().rev() {
            from[index] = from[index + 1].saturating_add(*bytes);
        }
        Forecast { slice: slice.max(1), from }
    }

    /// Returns the bytes to move beyond `offset`. Inside a slice they are assumed to be evenly
    /// spread.
    pub fn left(&self, offset: u64) -> u64 {
        let index = usize::try_from(offset / self.slice).unwrap_or(usize::MAX);
        let at = |index: usize| self.from.get(index).copied().unwrap_or(0);
        let (here, next) = (at(index), at(index.saturating_add(1)));
        let passed =
            u128::from(here - next) * u128::from(offset % self.slice) / u128::from(self.slice);
        here - u64::try_from(passed).unwrap_or(here)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_what_lies_beyond() {
        let forecast = Forecast::new(10, &[10, 0, 4, 0]);
        for (offset, left) in
            [(0, 14), (5, 9), (10, 4), (19, 4), (20, 4), (25, 2), (30, 0), (40, 0), (u64::MAX, 0)]
        {
            assert_eq!(forecast.left(offset), left, "{offset}");
        }
        assert_eq!(Forecast::new(0, &[u64::MAX, u64::MAX]).left(0), u64::MAX);
        for len in [1, 1023, 1024, 1025, u64::MAX] {
            assert!(len.div_ceil(Forecast::slice_of(len)) <= SLICES as u64, "{len}");
        }
    }
}
