//! x **Never:**
mod info;
mod map;
mod top;

pub use info::InfoOptions;
pub use map::MapOptions;
pub use top::TopOptions;

pub use info::run as info;
pub use map::run as map;
pub use top::run as top;
