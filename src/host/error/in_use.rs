//! The error that another process uses a file, with the process if it is known.

use std::fmt;

/// A file that another process uses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InUse {
    /// The permission of QEMU's block layer that the process uses or denies.
    pub lock: &'static str,
    /// The process, if it is known.
    pub holder: Option<Holder>,
}

/// A process that holds a lock.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("in use by another process")?;
        if let Some(Holder { pid, name }) = &self.holder {
            write!(f, ", {pid} {name}")?;
        }
        write!(f, " (its \"{}\" lock is held); stop it first", self.lock)
    }
}

impl std::error::Error for InUse {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_what_is_known() {
        let known =
            InUse { lock: "write", holder: Some(Holder { pid: 42, name: "qemu-img".into() }) };
        assert_eq!(
            known.to_string(),
            "in use by another process, 42 qemu-img (its \"write\" lock is held); stop it first"
        );
        let unknown = InUse { holder: None, ..known };
        assert_eq!(
            unknown.to_string(),
            "in use by another process (its \"write\" lock is held); stop it first"
        );
    }
}
