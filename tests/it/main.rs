//! One integration binary: links once.
mod hostile_image;
