//! What lies below the overlay, as a whole: what a guest would see on a new overlay of it.

use std::path::PathBuf;
use std::sync::Arc;

use super::Disk;
use crate::chain::Chain;
use host::Result;
use remote::pin::Pin;

/// The backing chain of a disk, for reads that are no request of the guest: they copy nothing up
/// and are not counted.
#[derive(Clone, Debug)]
pub struct Base {
    chain: Arc<Chain>,
}

/// What is done with the chain before a part of it is detached.
pub(super) struct BeforeDetach(Box<dyn Fn(&Base) + Send + Sync>);

impl std::fmt::Debug for BeforeDetach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BeforeDetach")
    }
}

impl Disk {
    /// Calls `look` with the whole chain before a part of it is detached. Only the first function
    /// that is given counts.
    pub fn look_before_detach(&self, look: impl Fn(&Base) + Send + Sync + 'static) {
        let _ = self.before_detach.set(BeforeDetach(Box::new(look)));
    }

    /// Calls the function of [`Disk::look_before_detach`].
    pub(super) fn is_about_to_detach(&self, chain: &Arc<Chain>) {
        if let Some(BeforeDetach(look)) = self.before_detach.get() {
            look(&Base { chain: Arc::clone(chain) });
        }
    }

    /// The backing chain; `None` if there is none, or if it was detached. While the returned value
    /// exists, the files stay open.
    pub fn base(&self) -> Option<Base> {
        self.chain().map(|chain| Base { chain })
    }
}

impl Base {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.chain.size()
    }

    /// Reads bytes; zeros beyond the end. A remote layer may wait for its server.
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain.read(offset, buf)
    }

    /// The name of the first layer, with what may be a secret, and the path of its file if it is on
    /// this host.
    pub fn name(&self) -> (String, Option<PathBuf>) {
        let path = self.chain.layers().into_iter().next().filter(|layer| !layer.is_remote);
        (self.chain.full_name(0).unwrap_or_default(), path.map(|layer| layer.path))
    }

    /// What the first layer is pinned to, if it is remote.
    pub fn pin(&self) -> Option<Pin> {
        self.chain.pin_of_first()
    }
}
