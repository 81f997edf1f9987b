//! A disk divided into cells of equal size, with the local, zero and remote bytes of each. Pictures
//! are drawn from it.

use std::ops::Range;

use super::units;
use host::{Error, ErrorKind, Result};

/// How many bytes of a range, or of a disk, are local, zero and remote. The numbers may come from a
/// socket, and need not add up.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Shares {
    /// Bytes in the overlay, as data or compressed.
    pub local: u64,
    /// Bytes known to be zero from the tables alone.
    pub zero: u64,
    /// Bytes that the backing chain supplies.
    pub remote: u64,
}

impl Shares {
    /// Returns the sum of all three.
    pub fn total(&self) -> u64 {
        self.local.saturating_add(self.zero).saturating_add(self.remote)
    }

    /// Returns the percentages of local, zero and remote as [`units::percents`] does; they are 0
    /// for an empty range.
    pub fn percents(&self) -> [String; 3] {
        units::percents([self.local, self.zero, self.remote])
    }

    /// Returns the local bytes, and the bytes that are local or remote. Zeros are left out, because
    /// they need not be fetched.
    pub fn fetched(&self) -> (u64, u64) {
        (self.local, self.local.saturating_add(self.remote))
    }

    fn plus(self, other: Shares) -> Shares {
        Shares {
            local: self.local + other.local,
            zero: self.zero + other.zero,
            remote: self.remote + other.remote,
        }
    }
}

/// A disk in cells of equal size. The last cell may be shorter, at the end of the disk.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Cells {
    size: u64,
    cell_size: u64,
    local: Vec<u64>,
    zero: Vec<u64>,
}

impl Cells {
    /// Most cells that a request or an answer may have.
    pub const MOST: u64 = 65536;

    /// Makes the cells of a disk of `size` bytes in cells of `cell_size` bytes, from the local and
    /// zero bytes of each. The rest of a cell is remote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the numbers are inconsistent; they may come from a socket.
    pub fn new(size: u64, cell_size: u64, local: Vec<u64>, zero: Vec<u64>) -> Result<Cells> {
        let wrong = |what: String| {
            Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("the map of cells does not add up: {what}"),
            ))
        };
        let wanted = if cell_size == 0 { 0 } else { size.div_ceil(cell_size) };
        if (size > 0 && cell_size == 0) || wanted > Cells::MOST {
            return wrong(format!("{size} bytes in cells of {cell_size}"));
        }
        if local.len() as u64 != wanted || zero.len() as u64 != wanted {
            return wrong(format!("{} and {} cells instead of {wanted}", local.len(), zero.len()));
        }
        let cells = Cells { size, cell_size, local, zero };
        for index in 0..cells.len() {
            let len = cells.range(index).end - cells.range(index).start;
            if cells.local[index].checked_add(cells.zero[index]).is_none_or(|known| known > len) {
                return wrong(format!(
                    "cell {index} has {len} bytes, of which {} and {}",
                    cells.local[index], cells.zero[index]
                ));
            }
        }
        Ok(cells)
    }

    /// Returns the number of cells.
    pub fn len(&self) -> usize {
        self.local.len()
    }

    /// Tells whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.local.is_empty()
    }

    /// Returns the size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the size of a cell in bytes; the last cell may be shorter.
    pub fn cell_size(&self) -> u64 {
        self.cell_size
    }

    /// Returns the range of the disk, in bytes, that a cell covers.
    ///
    /// # Panics
    /// If there is no such cell.
    pub fn range(&self, index: usize) -> Range<u64> {
        assert!(index < self.len());
        let start = index as u64 * self.cell_size;
        start..start.saturating_add(self.cell_size).min(self.size)
    }

    /// Returns how many bytes of a cell are local, zero and remote.
    ///
    /// # Panics
    /// If there is no such cell.
    pub fn shares(&self, index: usize) -> Shares {
        let range = self.range(index);
        let (local, zero) = (self.local[index], self.zero[index]);
        Shares { local, zero, remote: range.end - range.start - local - zero }
    }

    /// Returns how many bytes of the disk are local, zero and remote.
    pub fn sum(&self) -> Shares {
        (0..self.len()).map(|index| self.shares(index)).fold(Shares::default(), Shares::plus)
    }

    /// Divides the whole disk into at most `places` places of about equal size, each with one cell
    /// or more.
    pub fn spread(&self, places: usize) -> Vec<Shares> {
        let places = places.min(self.len());
        let start = |place: usize| place * self.len() / places;
        (0..places)
            .map(|place| {
                (start(place)..start(place + 1))
                    .map(|index| self.shares(index))
                    .fold(Shares::default(), Shares::plus)
            })
            .collect()
    }

    /// Divides the whole disk into exactly `places` places, as [`Cells::spread`] does. If there are
    /// fewer cells, each takes several places.
    pub fn stretched(&self, places: usize) -> Vec<Shares> {
        if places <= self.len() || self.is_empty() {
            return self.spread(places);
        }
        (0..places).map(|place| self.shares(place * self.len() / places)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_local_and_not_zero_is_remote_also_in_the_last_cell() {
        let cells = Cells::new(2500, 1000, vec![1000, 0, 100], vec![0, 400, 150]).unwrap();
        assert_eq!(cells.shares(0), Shares { local: 1000, zero: 0, remote: 0 });
        assert_eq!(cells.shares(1), Shares { local: 0, zero: 400, remote: 600 });
        assert_eq!(
            (cells.range(2), cells.shares(2)),
            (2000..2500, Shares { local: 100, zero: 150, remote: 250 })
        );
        assert_eq!(cells.sum(), Shares { local: 1100, zero: 550, remote: 850 });
        assert_eq!(cells.sum().total(), cells.size());
        assert_eq!(cells.sum().percents(), ["44.0 %", "22.0 %", "34.0 %"]);
        assert!(Cells::default().is_empty());
        assert_eq!(
            (Shares::default().percents(), Shares::default().fetched()),
            (["0.0 %"; 3].map(String::from), (0, 0))
        );
        let evil = Shares { local: u64::MAX, zero: 1, remote: 2 };
        assert_eq!(
            (evil.percents(), evil.fetched()),
            (["99.9 %", "0.0 %", "0.1 %"].map(String::from), (u64::MAX, u64::MAX))
        );
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        for (size, cell_size, local, zero) in [
            (10, 0, vec![], vec![]),
            (10, 5, vec![5], vec![0, 0]),
            (10, 5, vec![5, 0, 0], vec![0, 0, 0]),
            (10, 5, vec![5, 0], vec![1, 0]),
            (9, 5, vec![0, 5], vec![0, 0]),
            (10, 5, vec![u64::MAX, 0], vec![1, 0]),
            (u64::MAX, 1, vec![], vec![]),
        ] {
            let error = Cells::new(size, cell_size, local.clone(), zero.clone()).unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::InvalidArgument,
                "{size} {cell_size} {local:?} {zero:?}"
            );
        }
        assert!(
            Cells::new(
                u64::MAX,
                1 << 60,
                vec![0; 16],
                vec![1 << 60; 16]
                    .into_iter()
                    .enumerate()
                    .map(|(i, n)| if i == 15 { n - 1 } else { n })
                    .collect()
            )
            .is_ok()
        );
    }

    #[test]
    fn places_have_all_bytes_between_them() {
        let cells = Cells::new(10_000, 100, (0..100).collect(), vec![0; 100]).unwrap();
        for places in [1, 3, 7, 99, 100, 101, 5000] {
            let spread = cells.spread(places);
            assert_eq!(spread.len(), places.min(100));
            assert_eq!(
                spread.iter().copied().fold(Shares::default(), Shares::plus),
                cells.sum(),
                "{places}"
            );
            assert!(spread.iter().all(|shares| shares.total() > 0));
        }
        assert_eq!(cells.spread(0), vec![]);
        assert_eq!((cells.stretched(50), cells.stretched(200).len()), (cells.spread(50), 200));
        assert_eq!(
            (cells.stretched(200)[198], cells.stretched(200)[199]),
            (cells.shares(99), cells.shares(99))
        );
        assert_eq!(Cells::default().stretched(9), vec![]);
        assert_eq!(cells.spread(50)[49], Shares { local: 98 + 99, zero: 0, remote: 3 });
    }
}
