//! What all sources of one configuration share: the threads of the network, and the certificate
//! authorities of this host.
//!
//! **Locks:** none but those of the two cells, which are set once.

use std::io;
use std::sync::OnceLock;

use tokio::runtime::Runtime;

use crate::source::SourceError;

/// Threads that move the bytes of all connections: sockets and TLS. Two are enough for 10 Gbit/s of
/// TLS, and the threads of the callers do the rest.
const RUNTIME_THREADS: usize = 2;

/// The threads and the authorities, made when they are first needed.
#[derive(Debug, Default)]
pub struct Network {
    runtime: OnceLock<io::Result<Runtime>>,
    /// TLS with the authorities of the host: some 150 certificates, parsed once and not for each
    /// layer of each disk.
    tls: OnceLock<Result<rustls::ClientConfig, rustls::Error>>,
}

impl Network {
    /// Starts the threads, or returns them. The first source does it; a process that confines
    /// itself does it before.
    ///
    /// # Errors
    /// [`SourceError`] if the threads could not be started.
    pub fn runtime(&self) -> Result<&Runtime, SourceError> {
        self.runtime
            .get_or_init(|| {
                tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(RUNTIME_THREADS)
                    .thread_name("fetch")
                    .enable_all()
                    .build()
            })
            .as_ref()
            .map_err(|error| SourceError::never("cannot start the threads of the network", error))
    }

    /// TLS with the authorities of the host, which `make` reads.
    pub(crate) fn tls_of_host(
        &self,
        make: impl FnOnce() -> Result<rustls::ClientConfig, rustls::Error>,
    ) -> Result<rustls::ClientConfig, rustls::Error> {
        self.tls.get_or_init(make).clone()
    }
}
