//! The remote files that a command may open.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use host::Result;
use host::error::Context as _;
use host::sync::unranked::Mutex;

use crate::line::{FetcherLine, unexpected};
use crate::pin::Pin;
use crate::storage::{RemoteFile, RemoteOptions, deadline};
use crate::url::SourceUrl;
use crate::wire::{FetchReply, FetchRequest};

/// Opens remote files over one line to a fetcher.
#[derive(Debug)]
pub struct Sources {
    line: Arc<FetcherLine>,
    options: RemoteOptions,
    allowed: Vec<SourceUrl>,
    /// `--base-digest`, until the first file is opened: that is the base it belongs to.
    digest: Mutex<Option<String>>,
}

impl Sources {
    /// `allowed`: the prefixes below which an image may name files (`--backing-url`).
    pub fn new(line: Arc<FetcherLine>, options: RemoteOptions, allowed: Vec<SourceUrl>) -> Sources {
        let digest = Mutex::new(options.digest.clone());
        Sources { line, options, allowed, digest }
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

    /// Reads a file of at most `longest` bytes that lies beside a remote file, such as an order.
    /// The content is that of now; nothing of it stays in the cache.
    ///
    /// # Errors
    /// The failure that the fetcher reports, among them: the file does not exist, it is too long,
    /// no prefix allows it; the fetcher cannot be started.
    pub fn read_beside(&self, name: &SourceUrl, longest: u64) -> Result<Vec<u8>> {
        let patience = self.options.patience;
        let url = name.as_str().to_owned();
        let (reply, descriptors) = self.line.ask(patience.map(deadline), None, |id| {
            let patience = patience.map(|patience| patience.as_millis() as u64);
            FetchRequest::ReadBeside { id, url, longest, patience }
        })?;
        let (len, memory) = match (&reply, descriptors.into_iter().next()) {
            (FetchReply::Content { len, .. }, Some(memory)) if *len <= longest => (*len, memory),
            _ => return Err(unexpected(&reply)),
        };
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        File::from(memory).read_exact_at(&mut bytes, 0).context(|| name.to_string())?;
        Ok(bytes)
    }

    /// Writes the first `len` bytes of `memory`, an order, beside the remote file `name`. The file
    /// there has the old content or the new one, as a whole. The fetcher gives up after `patience`,
    /// and this side some seconds later.
    ///
    /// # Errors
    /// The failure that the fetcher reports, among them: it was started without the permission to
    /// write, the bytes are no order, the server takes no files.
    pub fn write_order(
        &self,
        name: &SourceUrl,
        memory: OwnedFd,
        len: u64,
        patience: Duration,
    ) -> Result<()> {
        let url = name.as_str().to_owned();
        let until = Some(deadline(patience));
        let patience = patience.as_millis() as u64;
        let write = |id| FetchRequest::WriteOrder { id, url, len, patience };
        match self.line.ask(until, Some(memory), write)?.0 {
            FetchReply::Written { .. } => Ok(()),
            reply => Err(unexpected(&reply)),
        }
    }

    /// The line to the fetcher.
    pub fn line(&self) -> &Arc<FetcherLine> {
        &self.line
    }
}
