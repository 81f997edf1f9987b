//! One integration binary: links once.
