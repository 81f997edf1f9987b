//! Background jobs. (to be written)

/// The registry.
#[derive(Clone, Debug, Default)]
pub struct Jobs {}
