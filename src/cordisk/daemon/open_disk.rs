//! The disk of the daemon, from its open to its close.

use std::sync::Arc;

use crate::cli::MountConfig;
use crate::keeper::EntrustedImage;
use engine::disk::Disk;
use host::Result;
use host::error::Context;

/// An open disk, which is closed once. If a step of the start fails before the disk is served, the
/// value is dropped and the drop closes the disk, so that its image is not left marked as open. No
/// request has to be waited for then.
pub(super) struct OpenDisk<'a> {
    pub disk: Arc<Disk>,
    config: &'a MountConfig,
    /// The image as the keeper has it, which removes the mark of an open image.
    pub image: Option<EntrustedImage>,
    is_open: bool,
}

impl<'a> OpenDisk<'a> {
    pub fn new(disk: Disk, config: &'a MountConfig) -> OpenDisk<'a> {
        OpenDisk { disk: Arc::new(disk), config, image: None, is_open: true }
    }

    /// Closes the disk, and makes the keeper remove the mark of an open image.
    ///
    /// # Errors
    /// Those of [`Disk::close`].
    pub fn close(mut self) -> Result<()> {
        self.close_once()
    }

    /// Makes every acknowledged write durable and leaves the disk open, because requests or jobs
    /// that hang use it. The image stays marked as open.
    ///
    /// # Errors
    /// Those of [`Disk::flush`].
    pub fn leave(mut self) -> Result<()> {
        self.is_open = false;
        self.disk.flush().context(|| format!("closing {}", self.config.image.display()))
    }

    fn close_once(&mut self) -> Result<()> {
        self.is_open = false;
        let image = self.config.image.display();
        self.disk.close().context(|| format!("closing {image}"))?;
        if let Some(entrusted) = self.image.as_ref().filter(|_| self.disk.may_lose_mark())
            && let Err(error) = entrusted.remove_mark()
        {
            log::warn!("{image}: {error}");
        }
        Ok(())
    }
}

impl Drop for OpenDisk<'_> {
    fn drop(&mut self) {
        if self.is_open
            && let Err(error) = self.close_once()
        {
            log::error!("{error}");
        }
    }
}
