//! How TLS is set up.
//!
//! **Touches:** certificate authorities of the host, or the given file. **Never:** uses the
//! cryptographic provider of the process, which another library may have chosen; skips a check.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use rustls_platform_verifier::BuilderVerifierExt;

use crate::NbdTls;
use crate::error::{NbdError, NbdErrorKind, Result};

/// A checked [`NbdTls`]; all connections of a client use it, so that sessions are resumed.
#[derive(Clone, Debug)]
pub(crate) struct TlsSetup {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

impl TlsSetup {
    /// Checks `tls` and reads its certificate authorities.
    pub fn new(tls: &NbdTls) -> Result<TlsSetup> {
        let server_name = ServerName::try_from(tls.server_name.clone()).map_err(|_| {
            failed(format!("\"{}\" is neither a host name nor an IP address", tls.server_name))
        })?;
        let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(error.to_string()))?;
        let builder = match &tls.ca_file {
            Some(path) => builder.with_root_certificates(authorities(path)?),
            None => builder.with_platform_verifier().map_err(|error| failed(error.to_string()))?,
        };
        Ok(TlsSetup { config: Arc::new(builder.with_no_client_auth()), server_name })
    }

    /// Creates the client side of a TLS connection.
    pub fn session(&self) -> Result<ClientConnection> {
        ClientConnection::new(Arc::clone(&self.config), self.server_name.clone())
            .map_err(|error| failed(error.to_string()))
    }
}

fn authorities(path: &Path) -> Result<RootCertStore> {
    let bad = |why: String| {
        failed(format!("the file of certificate authorities \"{}\": {why}", path.display()))
    };
    let mut roots = RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| bad(error.to_string()))?;
        roots.add(certificate).map_err(|error| bad(error.to_string()))?;
    }
    if roots.is_empty() { Err(bad("it has no certificate in PEM form".into())) } else { Ok(roots) }
}

/// Returns an error of TLS.
pub(crate) fn failed(why: String) -> NbdError {
    NbdError::new(NbdErrorKind::Tls, format!("TLS failed: {why}"))
}
