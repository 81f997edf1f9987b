//! What is done if the file system of the cache is full: files that no disk uses are dropped.
//!
//! **Touches:** the directory of the cache. **Never:** drops a file that is in use.
//! **Locks:** one lock, `made`, held while files are dropped, so that of several threads that find
//! the file system full one drops files; no other lock of this crate is taken below it.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use host::{Error, ErrorKind, Result};
use remote::cache::Pruned;

use crate::download::MakeSpace;
use crate::serve::CacheChoice;

/// What is freed at once, in bytes.
const SPACE: u64 = 1 << 30;

/// Frees space in a cache that several disks share, for all files of this process.
pub struct SpaceMaker {
    cache: Arc<CacheChoice>,
    /// When files were dropped last.
    made: Mutex<Option<Instant>>,
}

impl SpaceMaker {
    /// For the cache of this process.
    pub fn new(cache: &Arc<CacheChoice>) -> Arc<SpaceMaker> {
        Arc::new(SpaceMaker { cache: Arc::clone(cache), made: Mutex::default() })
    }

    /// As [`MakeSpace`] says.
    ///
    /// # Errors
    /// Those of [`remote::cache::CacheDirectory::prune`].
    pub fn make(&self, asked: Instant) -> Result<bool> {
        let CacheChoice::Shared(directory) = &*self.cache else { return Ok(false) };
        let mut made = self.made.lock();
        if made.is_some_and(|made| made >= asked) {
            return Ok(true);
        }
        let used = directory.prune(u64::MAX)?.left;
        let pruned = directory.prune(used.saturating_sub(SPACE))?;
        report(&pruned);
        if pruned.bytes > 0 {
            *made = Some(Instant::now());
        }
        Ok(pruned.bytes > 0)
    }

    /// [`SpaceMaker::make`] for one download.
    pub fn maker(self: &Arc<Self>) -> MakeSpace {
        let this = Arc::clone(self);
        Box::new(move |asked| this.make(asked))
    }
}

/// The error of a cache from which nothing can be dropped: `error`, and what to do.
pub fn full(error: &Error) -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!(
            "{error}; nothing in the cache can be dropped: free space on its file system, or choose another one with --cache"
        ),
    )
}

/// Writes into the log what a prune has dropped.
pub fn report(pruned: &Pruned) {
    if pruned.objects > 0 {
        let were = if pruned.objects == 1 { "file was" } else { "files were" };
        log::info!("cache: {} {were} dropped ({} bytes)", pruned.objects, pruned.bytes);
    }
}

#[cfg(test)]
mod tests {
    use remote::cache::{CacheDirectory, Claim};
    use remote::pin::{Pin, Validator};
    use remote::url::SourceUrl;

    use super::*;

    /// Protects: a thread that finds the cache full while another thread drops files tries again,
    /// instead of reporting that nothing was left for it to drop.
    #[test]
    fn space_that_another_thread_has_made_counts() {
        let dir = tempfile::tempdir().unwrap();
        let directory = CacheDirectory::open(&dir.path().join("cache"), None).unwrap();
        let url = SourceUrl::parse("s3://golden/base.raw").unwrap();
        let pin = Pin { size: 1 << 20, validator: Validator::Etag("\"1\"".into()), digest: None };
        let object = directory.object(&url, &pin).unwrap();
        let Claim::Got(claim) = object.claim(&(0..pin.size)).unwrap() else { panic!("no claim") };
        object.write_at(0, &vec![1; 1 << 20]).unwrap();
        let cache = Arc::new(CacheChoice::Shared(directory));
        let space = SpaceMaker::new(&cache);
        assert!(!space.make(Instant::now()).unwrap(), "in use");
        drop((claim, object));
        let asked = Instant::now();
        assert!(space.make(asked).unwrap());
        assert!(space.make(asked).unwrap(), "made since");
        assert!(!space.maker()(Instant::now()).unwrap(), "nothing is left");
        let none = Arc::new(CacheChoice::None { directory: dir.path().to_owned() });
        assert!(!SpaceMaker::new(&none).make(asked).unwrap());
    }
}
