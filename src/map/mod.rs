//! What of a disk is where, for people: cells of it, as characters and as a picture.
//!
//! **Touches:** nothing but numbers. **Never:** the disk's bytes; sockets. **Locks:** none.
//! **Invariants:** the bytes of a cell that are local, zero and remote add up to its length, whoever has counted them.

mod cells;
mod offline;
mod picture;
mod png;
pub mod units;

pub use cells::{Cells, Shares};
pub use offline::OfflineMap;
pub use picture::{Canvas, Colour, Look, picture};
pub use png::{CELL_PIXELS, write_png};
