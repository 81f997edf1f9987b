//! Pictures of where the data of a disk is and when guests touch it, and numbers in human-readable
//! form.
//!
//! **Touches:** facts of the `disk`. **Never:** reads the guest's bytes.

mod cells;
mod legend;
mod offline;
mod order;
mod picture;
mod png;
pub mod units;

pub use cells::{Cells, Shares};
pub use engine::map::{MapEntry, Page, extents, join};
pub use offline::OfflineMap;
pub use order::{order_picture, records, write_order_png};
pub use picture::{Canvas, Colour, PictureStyle, picture};
pub use png::write_png;
