//! The control socket and the metrics listener: opened before the sandbox is entered, and
//! registered where commands find them.

use std::path::Path;

use super::successor::or_without;
use crate::cli::MountConfig;
use crate::metrics;
use crate::mount;
use crate::running::{Entry, Registration};
use control::Socket;
use host::Result;

/// The control socket and the metrics listener, open and not yet served.
pub(super) struct Servers {
    /// The control socket.
    pub socket: Option<Socket>,
    /// The listener of `--metrics`.
    pub metrics: Option<metrics::Listener>,
}

/// Opens the control socket: at the requested path, or beside the entry in the runtime directory,
/// so that every disk has one. If the default socket cannot be created, the disk is served without
/// a socket and is not registered; the error is returned in place of the registration.
///
/// # Errors
/// Those of [`Socket::listen`], for the requested path.
pub(super) fn listen(
    config: &MountConfig,
    registration: Result<Registration>,
    is_successor: bool,
) -> Result<(Option<Socket>, Result<Registration>)> {
    if let Some(path) = &config.qmp {
        let socket = or_without(is_successor, Socket::listen(path).map(Some))?;
        return Ok((socket, registration));
    }
    Ok(match registration.and_then(|place| Ok((Socket::listen(&place.socket_path())?, place))) {
        Ok((socket, place)) => (Some(socket), Ok(place)),
        Err(error) => (None, Err(error)),
    })
}

/// Registers the mounted disk, so that commands find it by its mountpoint. `main` is the process id
/// of the keeper. A failure is logged as a warning.
pub(super) fn register(
    config: &MountConfig,
    registration: Result<Registration>,
    servers: &Servers,
    mountpoint: &Path,
    main: u32,
) -> Result<Registration> {
    let registered = registration.and_then(|place| {
        let Some(socket) = &servers.socket else { return Ok(place) };
        place.publish(&Entry {
            pid: main,
            serving: Some(std::process::id()),
            mountpoint: mountpoint.into(),
            image: config.image.clone(),
            device: config.device.clone(),
            qmp: socket.path().into(),
            filesystem: mount::mounts()?
                .into_iter()
                .find(|mount| mount.mountpoint == mountpoint)
                .map(|mount| mount.device),
            metrics: servers.metrics.as_ref().map(|listener| listener.address().to_string()),
        })?;
        Ok(place)
    });
    registered.inspect_err(|error| {
        let instead = match &config.qmp {
            Some(path) => {
                format!("commands take the socket, {}, instead of the mountpoint", path.display())
            }
            None => "only `umount` finds this disk; mount it with --qmp to control it".to_string(),
        };
        log::warn!("{error}: {instead}");
    })
}
