//! Notifications: messages to the kernel that no request has asked for. A process that takes a
//! session over sends them too, so they depend on nothing that was negotiated or read before.
//!
//! A notification is one writev(2) of `struct fuse_out_header` with number 0 and the code in the
//! field of the error, and of what belongs to the code. The kernel acts on it before the call
//! returns. It may send requests meanwhile and wait for their answers.
//!
//! **Touches:** the mounted descriptor of /dev/fuse.
//! **Never:** runs on a thread that serves requests, except [`Notifier::resend`], which comes
//! before the first of them: it would wait for itself (H29).
//! **Locks:** none.
//! **Invariants:** the kernel takes a notification as a whole or not at all.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::wire::{OUT_HEADER, ROOT};
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// FUSE_NOTIFY_INVAL_INODE.
const INVAL_INODE: i32 = 2;
/// FUSE_NOTIFY_STORE.
const STORE: i32 = 4;
/// FUSE_NOTIFY_RESEND.
const RESEND: i32 = 7;

/// Sends notifications for one mounted disk.
#[derive(Clone, Debug)]
pub(super) struct Notifier {
    device: Arc<OwnedFd>,
}

impl Notifier {
    /// Makes a notifier for the mount of `device`.
    pub(super) fn new(device: &Arc<OwnedFd>) -> Notifier {
        Notifier { device: Arc::clone(device) }
    }

    /// Makes the kernel know that the disk has grown to `size` bytes, also for programs that
    /// already have it open.
    ///
    /// Invalidating the attributes is enough for a program that asks for the size with stat(2) or
    /// lseek(2). A shorter `ATTR_TTL` would do that too, at the cost of one request for each
    /// stat(2). But asynchronous reads end where the kernel *believes* the file to end, and do not
    /// ask this process (observed on Linux 6.18: they find nothing past the old end until a program
    /// calls stat). Therefore this function stores the last byte into the kernel's page cache,
    /// which moves the kernel's end of the file, and then invalidates that page. The value 0 is
    /// correct: the new range is zeros, and no program could have written to it, because none knew
    /// an end beyond the old one.
    ///
    /// # Errors
    /// The disk is no longer mounted.
    pub(super) fn tell_size(&self, size: u64) -> io::Result<()> {
        let Some(last) = size.checked_sub(1) else { return Ok(()) };
        self.store(last, &[0])?;
        self.inval_inode(i64::try_from(last).unwrap_or(i64::MAX), 1)
    }

    /// Makes the kernel send the data that programs have written to shared mappings of the disk,
    /// and waits until those writes are answered.
    ///
    /// An invalidation writes dirty pages before it drops them (`launder_folio`). Unlike fsync(2)
    /// of the mounted file, it needs no path and no permission to open the file. Another mount may
    /// hide the path, or a lazy unmount may have removed it. Root lacks the permission if another
    /// user mounts without `allow_other`. Errors of these writes are reported to the programs by
    /// their msync(2).
    ///
    /// # Errors
    /// The disk is no longer mounted.
    pub(super) fn write_mapped_pages(&self) -> io::Result<()> {
        // A length of 0 means the whole file.
        self.inval_inode(0, 0)
    }

    /// Makes the kernel send every request again that was read from any descriptor of the mount and
    /// not answered. Such a request has bit 63 of its number set, and its reply carries the same
    /// number. Requests that were read with FUSE over io_uring are not sent again.
    ///
    /// Only for a process that has read no request yet: a request of its own would be served twice.
    ///
    /// # Errors
    /// The kernel does not know the notification, which Linux has since version 6.9.
    pub(super) fn resend(&self) -> Result<()> {
        match self.send(RESEND, &[]) {
            Err(Errno::INVAL) => Err(Error::new(
                ErrorKind::UnsupportedFeature,
                "this kernel cannot send requests again (FUSE_NOTIFY_RESEND, Linux 6.9): unmount and mount the disk anew",
            )),
            sent => sent
                .map_err(io::Error::from)
                .context(|| "asking the kernel over /dev/fuse to send requests again"),
        }
    }

    /// Puts `data` into the kernel's page cache at `offset`, in bytes.
    fn store(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        // `struct fuse_notify_store_out`.
        let mut out = [0; 24];
        out[0..8].copy_from_slice(&ROOT.to_ne_bytes());
        out[8..16].copy_from_slice(&offset.to_ne_bytes());
        out[16..20].copy_from_slice(&len.to_ne_bytes());
        self.send_to_inode(STORE, &[&out, data])
    }

    /// Makes the kernel drop the attributes, and the pages of `len` bytes at `offset`. A length of
    /// 0 means the rest of the file.
    fn inval_inode(&self, offset: i64, len: i64) -> io::Result<()> {
        // `struct fuse_notify_inval_inode_out`.
        let mut out = [0; 24];
        out[0..8].copy_from_slice(&ROOT.to_ne_bytes());
        out[8..16].copy_from_slice(&offset.to_ne_bytes());
        out[16..24].copy_from_slice(&len.to_ne_bytes());
        self.send_to_inode(INVAL_INODE, &[&out])
    }

    fn send_to_inode(&self, code: i32, parts: &[&[u8]]) -> io::Result<()> {
        match self.send(code, parts) {
            // The kernel holds nothing of this inode, so there is nothing to change.
            Err(Errno::NOENT) => Ok(()),
            sent => Ok(sent?),
        }
    }

    fn send(&self, code: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        let len = OUT_HEADER + parts.iter().map(|part| part.len()).sum::<usize>();
        let mut header = [0; OUT_HEADER];
        header[0..4].copy_from_slice(&u32::try_from(len).map_err(|_| Errno::TOOBIG)?.to_ne_bytes());
        header[4..8].copy_from_slice(&code.to_ne_bytes());
        let slices: Vec<IoSlice<'_>> =
            std::iter::once(&header[..]).chain(parts.iter().copied()).map(IoSlice::new).collect();
        rustix::io::retry_on_intr(|| rustix::io::writev(&self.device, &slices)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8], at: usize) -> i64 {
        i64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Protects: the bytes are those of `struct fuse_out_header` and of the structure of each code
    /// (include/uapi/linux/fuse.h), with the whole length in the header and number 0.
    #[test]
    fn notifications_have_the_layout_of_the_kernel() {
        let (kernel, device) = host::packet::pair().unwrap();
        let notifier = Notifier::new(&Arc::new(device));
        let message = || {
            let mut bytes = [0xee; 128];
            let len = rustix::io::read(&kernel, &mut bytes).unwrap();
            assert_eq!(bytes[..4], u32::try_from(len).unwrap().to_ne_bytes());
            assert_eq!(bytes[8..16], [0; 8], "a notification has number 0");
            (i32::from_ne_bytes(bytes[4..8].try_into().unwrap()), bytes[16..len].to_vec())
        };

        notifier.tell_size(0).unwrap();
        notifier.tell_size(0x1_0000_1000).unwrap();
        let (code, store) = message();
        assert_eq!((code, store.len()), (4, 25));
        assert_eq!((number(&store, 0), number(&store, 8)), (1, 0x1_0000_0fff));
        assert_eq!((number(&store, 16), store[24]), (1, 0));
        let (code, inval) = message();
        assert_eq!((code, inval.len()), (2, 24));
        assert_eq!([0, 8, 16].map(|at| number(&inval, at)), [1, 0x1_0000_0fff, 1]);

        notifier.write_mapped_pages().unwrap();
        let (code, inval) = message();
        assert_eq!((code, [0, 8, 16].map(|at| number(&inval, at))), (2, [1, 0, 0]));

        notifier.resend().unwrap();
        assert_eq!(message(), (7, vec![]));
    }

    /// Protects: the error of a kernel before 6.9 says what is missing. An epoll descriptor answers
    /// each write with EINVAL, as that kernel does for an unknown code.
    #[test]
    fn a_kernel_without_resend_is_named() {
        let epoll =
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let error = Notifier::new(&Arc::new(epoll)).resend().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
        assert!(error.to_string().contains("Linux 6.9"), "{error}");
    }

    #[test]
    fn an_unmounted_disk_is_an_error() {
        let (kernel, device) = host::packet::pair().unwrap();
        drop(kernel);
        let notifier = Notifier::new(&Arc::new(device));
        assert!(notifier.tell_size(1).is_err() && notifier.write_mapped_pages().is_err());
        assert!(notifier.resend().unwrap_err().to_string().contains("/dev/fuse"));
    }
}
