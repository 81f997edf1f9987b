//! The remote files that a command may open.

use std::sync::Arc;

use host::Result;
use host::sync::unranked::Mutex;

use crate::line::FetcherLine;
use crate::pin::Pin;
use crate::storage::{RemoteFile, RemoteOptions};
use crate::url::SourceUrl;

/// Opens remote files over one line to a fetcher.
#[derive(Debug)]
pub struct Sources {
    line: Arc<FetcherLine>,
    options: RemoteOptions,
    allowed: Vec<SourceUrl>,
    /// `--base-digest`, until the first file is opened: that is the base it belongs to.
    digest: Mutex<Option<String>>,
    /// Numbers of files that belong to no disk.
    asides: Mutex<Vec<u32>>,
}

impl Sources {
    /// `allowed`: the prefixes below which an image may name files (`--backing-url`).
    pub fn new(line: Arc<FetcherLine>, options: RemoteOptions, allowed: Vec<SourceUrl>) -> Sources {
        let digest = Mutex::new(options.digest.clone());
        Sources { line, options, allowed, digest, asides: Mutex::default() }
    }

    /// Whether an image may name this file.
    pub fn allows(&self, name: &SourceUrl) -> bool {
        self.allowed.iter().any(|prefix| name.is_below(prefix))
    }

    /// Opens a file.
    ///
    /// # Errors
    /// As [`RemoteFile::open`].
    pub fn open(&self, name: &SourceUrl, pin: Option<Pin>) -> Result<RemoteFile> {
        let digest = self.digest.lock().take();
        let options = RemoteOptions { digest, ..self.options.clone() };
        RemoteFile::open(&self.line, name, pin, &options).inspect_err(|_| {
            // The next attempt is compared with the digest as well.
            self.digest.lock().clone_from(&options.digest);
        })
    }

    /// Opens a file that belongs to no disk, such as one beside a base.
    ///
    /// # Errors
    /// As [`RemoteFile::open`].
    pub fn open_aside(&self, name: &SourceUrl) -> Result<RemoteFile> {
        let options = RemoteOptions { digest: None, ..self.options.clone() };
        let file = RemoteFile::open(&self.line, name, None, &options)?;
        self.asides.lock().push(file.number());
        Ok(file)
    }

    /// Whether a file, by its number, belongs to no disk.
    pub fn is_aside(&self, number: u32) -> bool {
        self.asides.lock().contains(&number)
    }

    /// The line to the fetcher.
    pub fn line(&self) -> &Arc<FetcherLine> {
        &self.line
    }
}
