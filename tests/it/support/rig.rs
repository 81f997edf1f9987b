//! The usual set-up: a raw base with known content, and an overlay that QEMU made above it.

use std::fs;
use std::path::PathBuf;

use super::{Daemon, Guest, Mount, Pattern, Scratch, header, qemu};

/// Cluster size where a test does not depend on it, in bytes.
pub const CLUSTER: u64 = 64 << 10;

/// Base and overlay in a scratch directory. Declare it before the [`Daemon`], so that it is dropped
/// after it.
#[derive(Debug)]
pub struct Rig {
    pub scratch: Scratch,
    pub base: PathBuf,
    pub overlay: PathBuf,
    /// The initial content of the disk: that of the base.
    pub content: Vec<u8>,
}

impl Rig {
    /// Creates a base of `size` bytes without zeros, and an overlay of the same size with clusters
    /// of 64 KiB.
    pub fn new(size: u64) -> Rig {
        Rig::with(Pattern::new(0xBA5E, 1).bytes(0, size), "")
    }

    /// Creates a base with this content, and an overlay with these options after `-o`.
    pub fn with(content: Vec<u8>, options: &str) -> Rig {
        let scratch = Scratch::new();
        let base = scratch.write("base.raw", &content);
        let overlay = scratch.join("overlay.qcow2");
        qemu::create(&overlay, None, options, Some(("base.raw", "raw")));
        Rig { scratch, base, overlay, content }
    }

    pub fn size(&self) -> u64 {
        self.content.len() as u64
    }

    pub fn mount(&self) -> Mount {
        Mount::new(&self.scratch, &self.overlay)
    }

    /// Opens a guest that expects the content of the base.
    pub fn guest(&self, disk: &Daemon) -> Guest {
        Guest::new(disk.open(), self.content.clone(), 0x6E57)
    }

    /// Asserts that the base was never written, and removes it.
    pub fn remove_base(&self) {
        super::assert_same(
            "the base must never change",
            &fs::read(&self.base).expect("base"),
            &self.content,
        );
        fs::remove_file(&self.base).expect("remove the base");
    }

    /// Asserts, after a clean end, that QEMU finds no errors and reads `want`.
    pub fn assert_overlay(&self, want: &[u8]) {
        qemu::assert_clean(&self.overlay);
        super::assert_same("the overlay as QEMU reads it", &qemu::read_all(&self.overlay), want);
    }

    /// Asserts the same as [`Rig::assert_overlay`] after a full stream and a clean end, and that
    /// the overlay needs no other file.
    pub fn assert_standalone(&self, want: &[u8]) {
        self.remove_base();
        qemu::assert_independent(&self.overlay);
        let extensions = header::Header::load(&self.overlay).extensions;
        assert!(
            extensions.iter().all(|(kind, _)| *kind != header::EXT_BACKING_FORMAT),
            "the backing format outlived its file: {extensions:x?}"
        );
        self.assert_overlay(want);
    }
}
