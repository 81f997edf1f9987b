//! Which disks run here: one entry file per daemon in a runtime directory, so that a disk is found by its mountpoint.
//!
//! ```text
//!  /run/cordisk/4711.json   {"pid":4711,"mountpoint":"/srv/vm.raw","image":"/srv/vm.qcow2","device":"drive0","qmp":"/run/cordisk/4711.sock","filesystem":"0:52"}
//!  /run/cordisk/4711.sock   the control socket, where none was asked for with --qmp
//! ```
//!
//! The daemon holds a lock (flock(2)) on its entry for as long as it lives. An entry that nobody holds is what a killed daemon has left: whoever
//! looks takes it as dead, and the next daemon that starts in the same directory removes it.
//!
//! **Touches:** the runtime directory, entries, the files of the sockets beside them. **Never:** connects to a socket; knows a disk; writes into a
//! directory that somebody else owns or may write to.
//! **Locks:** none in this process.
//! **Invariants:** what is read here was written by whoever owns the directory, and is believed no further ([`Found::owner`]).

mod directory;
mod locked_file;
mod place;
mod registration;
mod search;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

pub use locked_file::LockedFile;
pub use place::Place;
pub use registration::Registration;
pub use search::{Found, find_all};

/// What an entry file says of a daemon.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Entry {
    /// Its process id.
    pub pid: u32,
    /// Where the disk is mounted: absolute, without symbolic links. Bytes that are not UTF-8 are U+FFFD here, as in all of these paths.
    #[serde(serialize_with = "as_text")]
    pub mountpoint: PathBuf,
    /// The qcow2 image, absolute.
    #[serde(serialize_with = "as_text")]
    pub image: PathBuf,
    /// The device id on the socket.
    pub device: String,
    /// The control socket, absolute.
    #[serde(serialize_with = "as_text")]
    pub qmp: PathBuf,
    /// `major:minor` of the mounted file system: what the disk is found by when a directory above it was renamed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<String>,
    /// Where metrics are served, if they are: `127.0.0.1:9184`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
}

impl Entry {
    /// Whether the disk of this entry is mounted at `mountpoint` (absolute, without symbolic links).
    pub fn is_at(&self, mountpoint: &Path) -> bool {
        self.mountpoint.to_string_lossy() == mountpoint.to_string_lossy()
    }
}

fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

#[cfg(test)]
mod tests;
