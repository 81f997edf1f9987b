//! The registry of disks that run on this host: one entry file per daemon in a runtime directory,
//! so that a disk is found by its mountpoint.
//!
//! ```text
//!  /run/cordisk/4711.json   {"pid":4711,"serving":4712,"mountpoint":"/srv/vm.raw",
//!                            "image":"/srv/vm.qcow2","device":"drive0",
//!                            "qmp":"/run/cordisk/4711.sock","filesystem":"0:52"}
//!  /run/cordisk/4711.sock   the control socket, unless --qmp names another
//!  /run/cordisk/4711.keeper the socket of the mount keeper, for `cordisk upgrade`
//!  /run/cordisk/4711.mount  what a new keeper needs, if this one dies
//! ```
//!
//! The files have the process id of the daemon's main process. The serving process holds a lock
//! (flock(2)) on its entry for as long as it runs. An entry without a lock
//! is left from a killed daemon. Commands take it as dead, and the next daemon that starts in the
//! same directory removes it.
//!
//! **Touches:** the runtime directory, entries, the files of the sockets beside them. **Never:**
//! connects to a socket; knows a disk; writes into a directory that another user owns or may write
//! to.
//! **Locks:** none in this process.
//! **Invariants:** an entry was written by the owner of its directory, and is trusted no further
//! than that user is ([`Found::owner`]).

mod directory;
mod locked_file;
mod registration;
mod search;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

pub use locked_file::LockedFile;
pub use registration::{KEEPER_NAME, Registration, is_keeper};
pub use search::{Found, find_all, starting};

/// The content of an entry file, which describes one daemon.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Entry {
    /// Process id of the daemon: of its main process, to which signals are sent.
    pub pid: u32,
    /// Process id of the process that serves the disk and has the image open. The main process of
    /// an older daemon does that itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<u32>,
    /// The mountpoint: absolute, without symbolic links. Here and in the other paths, bytes that
    /// are not UTF-8 are replaced by U+FFFD.
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
    /// `major:minor` of the mounted file system, by which the disk is found if a directory above it
    /// was renamed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<String>,
    /// The address of the metrics server, if there is one: `127.0.0.1:9184`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
}

impl Entry {
    /// Returns the process id of the process that serves the disk.
    pub fn serving(&self) -> u32 {
        self.serving.unwrap_or(self.pid)
    }

    /// Tells whether the disk of this entry is mounted at `mountpoint` (absolute, without symbolic
    /// links).
    pub fn is_at(&self, mountpoint: &Path) -> bool {
        self.mountpoint.to_string_lossy() == mountpoint.to_string_lossy()
    }
}

fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

#[cfg(test)]
mod tests;
