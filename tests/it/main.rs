//! One integration binary: links once.

mod architecture;
mod hostile_image;
mod second_reader;
