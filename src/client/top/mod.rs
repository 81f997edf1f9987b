//! `cordisk top`.
mod bars;
mod facts;
mod model;
mod screen;
