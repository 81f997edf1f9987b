//! What the kernel and this program have agreed on for the whole life of a mount.
//!
//! The kernel sends INIT once for each mount, and fuser answers it. A process that takes the
//! session over never sees it, so these facts are passed to it.
//!
//! **Touches:** the mounted descriptor of /dev/fuse, during INIT.
//! **Never:** lets fuser see another request, because fuser ends the process for some requests that
//! a client can make.
//! **Locks:** none.
//! **Invariants:** a process that does not know a fact refuses it, instead of serving by other
//! rules than those that the kernel follows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crossbeam_channel::Sender;
use fuser::{Filesystem, InitFlags, KernelConfig, Request, SessionACL};
use serde::{Deserialize, Serialize};

use super::dispatch::MAX_IO;
use super::ring::RingLayout;
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// Largest number of asynchronous requests that the kernel sends at once; further ones wait in the
/// kernel. Twice the depth at which the transport saturates.
const MAX_BACKGROUND: u16 = 64;

/// The capabilities that are requested if the kernel offers them.
///
/// FUSE_ATOMIC_O_TRUNC is not requested: see `Truncate`. Neither is FUSE_WRITEBACK_CACHE: it does
/// not work if the mountpoint is a file.
const WANTED: [InitFlags; 3] = [
    // Asynchronous O_DIRECT requests are sent in parallel.
    InitFlags::FUSE_ASYNC_DIO,
    // mmap(MAP_SHARED) works although the files are opened for direct I/O (Linux 6.6).
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    // Another process can take the session over (Linux 6.9, FUSE 7.40).
    InitFlags::FUSE_HAS_RESEND,
];

/// What INIT has agreed on, and what a process needs to know to take the session over.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Negotiated {
    /// Requests come over io_uring, and not over /dev/fuse.
    pub over_io_uring: bool,
    /// Minor version of the FUSE protocol that the kernel speaks. The major version is 7.
    pub minor: u32,
    /// Largest write request, in bytes.
    pub max_write: u32,
    /// The optional capabilities that were granted, as bits of the flags of FUSE_INIT.
    pub capabilities: u64,
    /// The memory through which requests come over io_uring. `None` over /dev/fuse, and for a
    /// session of a version whose memory ends with its process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rings: Option<RingLayout>,
}

impl Negotiated {
    /// Returns whether the kernel can send requests again that were read and not answered
    /// (FUSE_NOTIFY_RESEND, Linux 6.9). Without that no process can take the session over.
    pub fn can_resend(&self) -> bool {
        InitFlags::from_bits_retain(self.capabilities).contains(InitFlags::FUSE_HAS_RESEND)
    }

    /// Checks whether a process of this version can take the session over.
    ///
    /// # Errors
    /// The first reason why it cannot.
    pub fn check_takeover(&self) -> Result<()> {
        let known = WANTED.into_iter().collect::<InitFlags>().bits();
        let reason = if self.over_io_uring && self.rings.is_none() {
            "its requests come over io_uring, and their memory was not kept".to_string()
        } else if !self.can_resend() {
            format!("this kernel (FUSE 7.{}) cannot send requests again; Linux 6.9 can", self.minor)
        } else if self.max_write as usize != MAX_IO {
            format!("its writes have up to {} bytes, and here {MAX_IO}", self.max_write)
        } else if self.capabilities & !known != 0 {
            format!("it has capabilities that are unknown here ({:#x})", self.capabilities & !known)
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::UnsupportedFeature,
            format!("the session cannot be taken over: {reason}: unmount and mount the disk anew"),
        ))
    }
}

/// Answers the kernel's INIT. Requests are to come over io_uring if there are `rings` and the
/// kernel offers that. Returns the mounted descriptor and what was agreed on.
///
/// # Errors
/// The kernel uses another FUSE protocol, or the disk was unmounted.
pub(super) fn negotiate(
    device: OwnedFd,
    rings: Option<RingLayout>,
) -> Result<(OwnedFd, Negotiated)> {
    let (negotiated, agreed) = crossbeam_channel::bounded(1);
    let negotiation = Negotiation { rings, negotiated };
    // The kernel itself checks which users may open the disk (`allow_other`,
    // `default_permissions`).
    let session =
        fuser::Session::from_fd(negotiation, device, SessionACL::All, fuser::Config::default())
            .context(|| "FUSE handshake")?;
    let device = session.as_fd().try_clone_to_owned().context(|| "duplicating /dev/fuse")?;
    let agreed = agreed
        .try_recv()
        .map_err(|_| Error::new(ErrorKind::Io, "FUSE handshake: it ended without an INIT"))?;
    Ok((device, agreed))
}

/// The options that the reply to INIT requests.
struct Negotiation {
    rings: Option<RingLayout>,
    negotiated: Sender<Negotiated>,
}

impl Filesystem for Negotiation {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        const MAX_WRITE: u32 = MAX_IO as u32;
        config
            .set_max_write(MAX_WRITE)
            .map_err(|most| io::Error::other(format!("writes have at most {most} bytes")))?;
        let _ = config.set_max_background(MAX_BACKGROUND);
        let mut granted = InitFlags::empty();
        for wanted in WANTED {
            if config.add_capabilities(wanted).is_ok() {
                granted |= wanted;
            } else {
                log::debug!("the kernel does not offer {wanted:?}");
            }
        }
        let over_io_uring =
            self.rings.is_some() && config.add_capabilities(InitFlags::FUSE_OVER_IO_URING).is_ok();
        let _ = self.negotiated.try_send(Negotiated {
            over_io_uring,
            minor: config.kernel_abi().1,
            max_write: MAX_WRITE,
            capabilities: granted.bits(),
            rings: self.rings.filter(|_| over_io_uring),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreed() -> Negotiated {
        Negotiated {
            over_io_uring: false,
            minor: 45,
            max_write: MAX_IO as u32,
            capabilities: (InitFlags::FUSE_HAS_RESEND | InitFlags::FUSE_ASYNC_DIO).bits(),
            rings: None,
        }
    }

    /// Protects: a session that this version would serve by other rules than the kernel follows is
    /// refused, and the message says why in one line.
    #[test]
    fn a_session_that_cannot_be_taken_over_is_refused_with_the_reason() {
        agreed().check_takeover().unwrap();
        let refused = |change: fn(&mut Negotiated), reason: &str| {
            let mut negotiated = agreed();
            change(&mut negotiated);
            let error = negotiated.check_takeover().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
            let text = error.to_string();
            assert!(text.contains(reason) && !text.contains('\n'), "{text}");
        };
        refused(|it| it.over_io_uring = true, "their memory was not kept");
        refused(|it| it.capabilities = 0, "FUSE 7.45");
        refused(|it| it.max_write = 131_072, "131072");
        refused(|it| it.capabilities |= InitFlags::FUSE_WRITEBACK_CACHE.bits(), "0x10000");
    }

    /// Protects: a session over io_uring can be taken over if its memory is known, and a session
    /// over /dev/fuse is described as earlier versions do, which know no memory.
    #[test]
    fn the_memory_of_rings_is_part_of_the_facts() {
        let layout = RingLayout { address: 1 << 36, queues: 2, depth: 96 };
        let over_rings = Negotiated { over_io_uring: true, rings: Some(layout), ..agreed() };
        over_rings.check_takeover().unwrap();
        let text = serde_json::to_string(&over_rings).unwrap();
        assert_eq!(serde_json::from_str::<Negotiated>(&text).unwrap(), over_rings);
        assert!(!serde_json::to_string(&agreed()).unwrap().contains("rings"));
    }

    /// Protects: a fact that this version does not know is an error, and not silently dropped.
    #[test]
    fn unknown_facts_are_an_error() {
        let text = serde_json::to_string(&agreed()).unwrap();
        assert_eq!(serde_json::from_str::<Negotiated>(&text).unwrap(), agreed());
        let more = text.replacen('{', r#"{"max-pages":1,"#, 1);
        assert!(serde_json::from_str::<Negotiated>(&more).is_err(), "{more}");
    }
}
