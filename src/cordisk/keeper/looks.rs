//! Looks up paths that clients have named, each on a thread of its own. A path may lead to a file
//! system that hangs, and the keeper must still be able to unmount.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;

/// How long one lookup may take. A local file system answers at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// The most lookups that may hang at the same time. Beyond it the answer for every path is false.
const MOST_AT_A_TIME: usize = 4;

/// Counts the lookups that have not ended.
#[derive(Debug, Default)]
pub(super) struct Looks {
    running: Arc<AtomicUsize>,
}

impl Looks {
    /// Tells whether `path` leads to the file with this device and inode. Returns false if that
    /// cannot be found out in time. The answer reveals nothing else about the path.
    pub(super) fn leads_to(&self, path: PathBuf, identity: (u64, u64)) -> bool {
        if self.running.load(Ordering::Relaxed) >= MOST_AT_A_TIME {
            return false;
        }
        self.running.fetch_add(1, Ordering::Relaxed);
        let running = Arc::clone(&self.running);
        let (sender, answer) = bounded(1);
        let look = move || {
            let leads = path.metadata().is_ok_and(|file| (file.dev(), file.ino()) == identity);
            running.fetch_sub(1, Ordering::Relaxed);
            let _ = sender.send(leads);
        };
        if thread::Builder::new().name("look".into()).spawn(look).is_err() {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        answer.recv_timeout(PATIENCE).unwrap_or(false)
    }
}
