//! x **Never:**
mod top;
