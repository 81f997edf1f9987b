//! Where the disk is controlled and watched from: opened before the sandbox is entered, and entered where commands find it.

use std::path::Path;

use crate::Result;
use crate::cli::MountConfig;
use crate::fuse;
use crate::metrics;
use crate::qmp::Socket;
use crate::running::{Entry, Registration};

/// Where the disk is controlled and watched from, open and not served yet.
pub(super) struct Servers {
    /// The control socket.
    pub socket: Option<Socket>,
    /// Of `--metrics`.
    pub metrics: Option<metrics::Listener>,
}

/// The control socket: the one that was asked for, or one beside the entry in the runtime directory, so that there is always one. Where that cannot be
/// made, the disk is served without, and not registered: the error comes back in place of the registration.
///
/// # Errors
/// Those of [`Socket::listen`], for the one that was asked for.
pub(super) fn listen(config: &MountConfig, registration: Result<Registration>) -> Result<(Option<Socket>, Result<Registration>)> {
    if let Some(path) = &config.qmp {
        return Ok((Some(Socket::listen(path)?), registration));
    }
    Ok(match registration.and_then(|place| Ok((Socket::listen(&place.socket_path())?, place))) {
        Ok((socket, place)) => (Some(socket), Ok(place)),
        Err(error) => (None, Err(error)),
    })
}

/// The disk is mounted: from now on it is found by its mountpoint. Where that cannot be done, a warning says so.
pub(super) fn register(
    config: &MountConfig,
    registration: Result<Registration>,
    servers: &Servers,
    mountpoint: &Path,
) -> Result<Registration> {
    let registered = registration.and_then(|place| {
        let Some(socket) = &servers.socket else { return Ok(place) };
        place.publish(&Entry {
            pid: std::process::id(),
            mountpoint: mountpoint.into(),
            image: config.image.clone(),
            device: config.device.clone(),
            qmp: socket.path().into(),
            filesystem: fuse::mounts()?.into_iter().find(|mount| mount.mountpoint == mountpoint).map(|mount| mount.device),
            metrics: servers.metrics.as_ref().map(|listener| listener.address().to_string()),
        })?;
        Ok(place)
    });
    registered.inspect_err(|error| {
        let instead = match &config.qmp {
            Some(path) => format!("commands take the socket, {}, instead of the mountpoint", path.display()),
            None => "only `umount` finds this disk; mount it with --qmp to control it".to_string(),
        };
        log::warn!("{error}: {instead}");
    })
}
