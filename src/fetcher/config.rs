//! The configuration of sources: how to reach the servers of names below a prefix, and with which
//! credentials.
//!
//! ```toml
//! connect-timeout = 5
//! stall-timeout = 10
//!
//! [[source]]
//! prefix = "s3://golden/"
//! endpoint = "https://s3.example"
//! access-key-id-file = "/etc/cordisk/golden.id"
//! secret-access-key-file = "/etc/cordisk/golden.key"
//! ```
//! The file names files of secrets, and contains none. What it does not say is taken from the
//! environment, by the names that the crate object_store knows (`AWS_…`, `GOOGLE_…`, `AZURE_…`).
//!
//! **Touches:** the configuration file, and the metadata of the files that it names. **Never:**
//! prints the content of a file of secrets. **Locks:** none.
//! **Invariants:** a key that has no meaning for the protocol of its prefix is an error.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use host::{Error, ErrorKind, Result};
use remote::url::{Scheme, SourceUrl};
use serde::Deserialize;
use toml::Spanned;

use crate::network::Network;

/// Where the configuration is if the command line names no file.
pub const DEFAULT_PATH: &str = "/etc/cordisk/sources.toml";

/// Time for a connection with its TLS handshake: more than three retransmissions of a SYN.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time without a byte from the server, or with next to nothing, after which a request has failed.
/// Object stores answer the first byte within 200 ms; ten seconds are a server or a network that is
/// gone.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest time limit that makes sense, in seconds: one day.
const LONGEST: u64 = 86_400;

/// The configuration of all sources.
#[derive(Clone)]
pub struct SourcesConfig {
    /// Time limit of a connection.
    pub connect_timeout: Duration,
    /// Time limit without a byte of an answer.
    pub stall_timeout: Duration,
    sources: Vec<SourceSettings>,
    environment: Vec<(String, String)>,
    network: Arc<Network>,
}

/// What the configuration says about the names below one prefix. It has no `Debug`, because the URL
/// of a proxy contains a password.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SourceSettings {
    prefix: String,
    /// URL of the server instead of the one that follows from protocol and region.
    pub endpoint: Option<String>,
    /// Region of S3, part of the signature.
    pub region: Option<String>,
    /// File with the id of an access key of S3.
    pub access_key_id_file: Option<PathBuf>,
    /// File with the secret of an access key of S3.
    pub secret_access_key_file: Option<PathBuf>,
    /// File with the session token of a temporary access key of S3.
    pub session_token_file: Option<PathBuf>,
    /// File of credentials in the format of the AWS command line.
    pub credentials_file: Option<PathBuf>,
    /// Section of `credentials_file`; "default" if it is missing.
    pub profile: Option<String>,
    /// Requests are not signed.
    #[serde(default)]
    pub anonymous: bool,
    /// Whether the bucket is in the path of the URL (S3). True if it is missing.
    pub path_style: Option<bool>,
    /// The endpoint may be an http:// URL.
    #[serde(default)]
    pub allow_http: bool,
    /// File with the certificates of the authorities that are accepted, and no others (PEM).
    pub ca: Option<PathBuf>,
    /// URL of the proxy, instead of the one of the environment.
    pub proxy: Option<String>,
    /// File with lines `Name: value` that are added to each request (HTTP).
    pub header_file: Option<PathBuf>,
    /// Storage account (Azure).
    pub account: Option<String>,
    /// File with the key of the storage account (Azure).
    pub account_key_file: Option<PathBuf>,
    /// File with a shared access signature (Azure).
    pub sas_file: Option<PathBuf>,
    /// JSON file of a service account (Google).
    pub service_account_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct ConfigFile {
    connect_timeout: Option<Spanned<u64>>,
    stall_timeout: Option<Spanned<u64>>,
    #[serde(default)]
    source: Vec<Spanned<SourceSettings>>,
}

impl fmt::Debug for SourcesConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefixes: Vec<String> =
            self.sources.iter().map(|source| remote::url::redacted(&source.prefix)).collect();
        f.debug_struct("SourcesConfig").field("prefixes", &prefixes).finish_non_exhaustive()
    }
}

impl Default for SourcesConfig {
    /// No file and no environment.
    fn default() -> Self {
        SourcesConfig {
            connect_timeout: CONNECT_TIMEOUT,
            stall_timeout: STALL_TIMEOUT,
            sources: Vec::new(),
            environment: Vec::new(),
            network: Arc::default(),
        }
    }
}

impl SourcesConfig {
    /// Reads the file at `path` and the environment of this process, and logs a warning for each
    /// file of secrets that every user of the host may read.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] with file and line, or the error of reading the file.
    pub fn load(path: &Path) -> Result<SourcesConfig> {
        let text = fs::read_to_string(path).map_err(|error| {
            Error::io(format!("configuration of sources {}", path.display()), error)
        })?;
        let environment = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let config = SourcesConfig::parse(&text, path, environment)?;
        for warning in config.warnings() {
            log::warn!("{warning}");
        }
        Ok(config)
    }

    /// As [`SourcesConfig::load`] of [`DEFAULT_PATH`]; a file that does not exist is empty.
    ///
    /// # Errors
    /// As [`SourcesConfig::load`].
    pub fn load_default() -> Result<SourcesConfig> {
        match SourcesConfig::load(Path::new(DEFAULT_PATH)) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let environment = std::env::vars_os();
                let environment = environment
                    .filter_map(|(key, value)| {
                        Some((key.into_string().ok()?, value.into_string().ok()?))
                    })
                    .collect();
                SourcesConfig::parse("", Path::new(DEFAULT_PATH), environment)
            }
            other => other,
        }
    }

    /// Parses the text of a configuration file. `path` is for messages.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] with file and line.
    pub fn parse(
        text: &str,
        path: &Path,
        environment: Vec<(String, String)>,
    ) -> Result<SourcesConfig> {
        let bad = |at: usize, why: &str| {
            let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{}: line {line}: {why}", path.display()),
            )
        };
        let file: ConfigFile = toml::from_str(text)
            .map_err(|error| bad(error.span().map_or(0, |span| span.start), error.message()))?;
        let mut sources = Vec::with_capacity(file.source.len());
        for source in file.source {
            let at = source.span().start;
            let source = source.into_inner();
            let prefix = SourceUrl::parse_prefix(&source.prefix)
                .map_err(|error| bad(at, &format!("prefix {error}")))?;
            if let Some(key) = source.misplaced(prefix.scheme()) {
                return Err(bad(at, &format!("{key} has no meaning for the prefix {prefix}")));
            }
            if let Some(why) = source.contradiction() {
                return Err(bad(at, &format!("{prefix}: {why}")));
            }
            if sources.iter().any(|other: &SourceSettings| other.prefix == source.prefix) {
                return Err(bad(at, &format!("a second source with the prefix {prefix}")));
            }
            sources.push(source);
        }
        let seconds = |value: Option<Spanned<u64>>, default: Duration| match value {
            Some(value) if *value.get_ref() == 0 => {
                Err(bad(value.span().start, "a time limit of 0 seconds: give 1 or more"))
            }
            Some(value) if *value.get_ref() > LONGEST => {
                let why = format!("a time limit of more than {LONGEST} seconds: give less");
                Err(bad(value.span().start, &why))
            }
            Some(value) => Ok(Duration::from_secs(value.into_inner())),
            None => Ok(default),
        };
        Ok(SourcesConfig {
            connect_timeout: seconds(file.connect_timeout, CONNECT_TIMEOUT)?,
            stall_timeout: seconds(file.stall_timeout, STALL_TIMEOUT)?,
            sources,
            environment,
            network: Arc::default(),
        })
    }

    /// What all sources of this configuration share.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// The settings of the longest prefix that `url` lies below; empty ones if there is none.
    pub fn settings(&self, url: &SourceUrl) -> SourceSettings {
        self.sources
            .iter()
            .filter(|source| {
                SourceUrl::parse_prefix(&source.prefix).is_ok_and(|prefix| url.is_below(&prefix))
            })
            .max_by_key(|source| source.prefix.len())
            .cloned()
            .unwrap_or_default()
    }

    /// Variables of the environment whose names start with `prefix`.
    pub(crate) fn environment(&self, prefix: &str) -> impl Iterator<Item = (&str, &str)> {
        self.environment
            .iter()
            .filter(move |(key, _)| key.starts_with(prefix))
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// All files that the configuration names: a process that confines itself must still be able to
    /// read them, because [`crate::source::RemoteSource::refresh`] does.
    pub fn files(&self) -> Vec<PathBuf> {
        let of = |source: &SourceSettings| {
            source.secrets().into_iter().chain(source.ca.clone()).collect::<Vec<_>>()
        };
        self.sources.iter().flat_map(of).collect()
    }

    /// One line for each file of secrets that every user of the host may read.
    fn warnings(&self) -> Vec<String> {
        self.sources
            .iter()
            .flat_map(SourceSettings::secrets)
            .filter(|path| fs::metadata(path).is_ok_and(|found| found.mode() & 0o004 != 0))
            .map(|path| {
                format!(
                    "{}: every user of this host may read this secret: chmod 600",
                    path.display()
                )
            })
            .collect()
    }
}

impl SourceSettings {
    /// The files of secrets.
    fn secrets(&self) -> Vec<PathBuf> {
        [
            &self.access_key_id_file,
            &self.secret_access_key_file,
            &self.session_token_file,
            &self.credentials_file,
            &self.header_file,
            &self.account_key_file,
            &self.sas_file,
            &self.service_account_file,
        ]
        .into_iter()
        .flatten()
        .cloned()
        .collect()
    }

    /// The first key that is set and has no meaning for `scheme`.
    fn misplaced(&self, scheme: Scheme) -> Option<&'static str> {
        use Scheme::{Az, Gs, Http, Https, Nbd, NbdUnix, Nbds, S3};
        let stores: &[Scheme] = &[S3, Gs, Az];
        let network: &[Scheme] = &[Http, Https, S3, Gs, Az];
        let keys: [(&str, bool, &[Scheme]); 18] = [
            ("endpoint", self.endpoint.is_some(), stores),
            ("region", self.region.is_some(), &[S3]),
            ("access-key-id-file", self.access_key_id_file.is_some(), &[S3]),
            ("secret-access-key-file", self.secret_access_key_file.is_some(), &[S3]),
            ("session-token-file", self.session_token_file.is_some(), &[S3]),
            ("credentials-file", self.credentials_file.is_some(), &[S3]),
            ("profile", self.profile.is_some(), &[S3]),
            ("anonymous", self.anonymous, stores),
            ("path-style", self.path_style.is_some(), &[S3]),
            ("allow-http", self.allow_http, stores),
            ("ca", self.ca.is_some() && matches!(scheme, Nbd | NbdUnix | Http), &[]),
            ("ca", self.ca.is_some(), &[Https, S3, Gs, Az, Nbds]),
            ("proxy", self.proxy.is_some(), network),
            ("header-file", self.header_file.is_some(), &[Http, Https]),
            ("account", self.account.is_some(), &[Az]),
            ("account-key-file", self.account_key_file.is_some(), &[Az]),
            ("sas-file", self.sas_file.is_some(), &[Az]),
            ("service-account-file", self.service_account_file.is_some(), &[Gs]),
        ];
        keys.into_iter()
            .find(|(_, set, schemes)| *set && !schemes.contains(&scheme))
            .map(|(key, ..)| key)
    }

    /// Why the keys do not fit together.
    fn contradiction(&self) -> Option<&'static str> {
        let keys = self.access_key_id_file.is_some() || self.secret_access_key_file.is_some();
        let ways = [
            keys,
            self.credentials_file.is_some(),
            self.anonymous,
            self.account_key_file.is_some(),
            self.sas_file.is_some(),
            self.service_account_file.is_some(),
        ];
        if self.access_key_id_file.is_some() != self.secret_access_key_file.is_some() {
            return Some("access-key-id-file and secret-access-key-file belong together");
        }
        if ways.into_iter().filter(|way| *way).count() > 1 {
            return Some("more than one kind of credentials: keep one");
        }
        if self.profile.is_some() && self.credentials_file.is_none() {
            return Some("profile without credentials-file");
        }
        None
    }
}

/// Reads a file of one secret: its text without the white space around it.
///
/// # Errors
/// The error of reading, with the name of the file.
pub(crate) fn secret(path: &Path) -> Result<String> {
    let context = || format!("secret {}", path.display());
    let text = fs::read_to_string(path).map_err(|error| Error::io(context(), error))?;
    match text.trim() {
        "" => Err(Error::io(context(), io::Error::other("the file is empty"))),
        text => Ok(text.to_owned()),
    }
}

/// Reads `keys` of the section `[profile]` of a file in the format of the AWS command line. A key
/// that is missing stays `None`.
///
/// # Errors
/// The error of reading, or [`ErrorKind::NotFound`] if there is no such section.
pub(crate) fn profile<const N: usize>(
    path: &Path,
    profile: &str,
    keys: [&str; N],
) -> Result<[Option<String>; N]> {
    let text = fs::read_to_string(path)
        .map_err(|error| Error::io(format!("credentials {}", path.display()), error))?;
    let mut found = [const { None }; N];
    let mut inside = false;
    let mut seen = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = name.trim() == profile;
            seen |= inside;
        } else if inside
            && !line.starts_with(['#', ';'])
            && let Some((key, value)) = line.split_once('=')
        {
            for (wanted, slot) in keys.iter().zip(&mut found) {
                if key.trim() == *wanted {
                    *slot = Some(value.trim().to_owned());
                }
            }
        }
    }
    if !seen {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("credentials {}: no section [{profile}]", path.display()),
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
