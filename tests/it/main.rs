//! One integration binary: links once.

#[macro_use]
mod support;

mod architecture;
mod hostile_image;
mod qmp_client;
mod readme;
mod release_log;
mod second_reader;
