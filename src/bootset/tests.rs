//! Tests of the whole search, on images that e2fsprogs and util-linux make.

mod files;
mod hostile;
mod limits;
mod order;
mod partitioned;
mod support;
