//! Objects of S3, Google Cloud Storage and Azure, by the crate object_store.
//!
//! object_store signs the requests and finds the credentials. Its retries are switched off. What
//! the server answered is read from the [`Record`] of the request, because object_store compares no
//! entity tag with the one that was asked for.
//!
//! **Touches:** the network by [`Connector`]; files of credentials. **Never:** lists; writes
//! another object than the one that it was opened for; follows a redirect.
//! **Locks:** `store` is a leaf lock, held for a copy.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::HttpError;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path as ObjectPath;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectStore, PutMode, PutOptions,
    RetryConfig,
};
use parking_lot::Mutex;
use remote::pin::{Pin, Validator};
use remote::url::{Scheme, SourceUrl};

use crate::config::{SourceSettings, SourcesConfig, profile, secret};
use crate::connector::{Connector, Record, failure};
use crate::head::Head;
use crate::redact::{chain, text};
use crate::source::{RemoteSource, Retry, Sink, SourceError, asked, pour};

type Pieces = BoxStream<'static, object_store::Result<Bytes>>;

/// An object of an object store.
pub(crate) struct ObjectSource {
    url: SourceUrl,
    path: ObjectPath,
    /// The version that the name demands.
    version: Option<String>,
    config: SourcesConfig,
    store: Mutex<Arc<dyn ObjectStore>>,
    /// A request has reached the server, so credentials were found once.
    has_reached_server: AtomicBool,
}

impl fmt::Debug for ObjectSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectSource").field("url", &self.url).finish_non_exhaustive()
    }
}

impl ObjectSource {
    pub(crate) fn open(
        url: &SourceUrl,
        config: &SourcesConfig,
    ) -> Result<ObjectSource, SourceError> {
        let path = ObjectPath::from_url_path(url.url().path())
            .map_err(|error| SourceError::never("the key of the object", &error))?;
        let version = match url.scheme() {
            Scheme::Gs => url.parameter("generation"),
            _ => url.parameter("versionId"),
        };
        Ok(ObjectSource {
            store: Mutex::new(store(url, config)?),
            url: url.clone(),
            path,
            version,
            config: config.clone(),
            has_reached_server: AtomicBool::new(false),
        })
    }

    /// Asks for a range of the content that `pin` names, or of the one that is there now.
    async fn get(
        &self,
        range: &Range<u64>,
        pin: Option<&Validator>,
    ) -> Result<(Head, Result<Pieces, SourceError>), SourceError> {
        let record = Record::default();
        let mut options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            version: self.version.clone(),
            ..GetOptions::default()
        };
        options.extensions.insert(record.clone());
        match pin {
            Some(Validator::Etag(tag)) => options.if_match = Some(tag.clone()),
            Some(Validator::Version(version) | Validator::Generation(version)) => {
                options.version = Some(version.clone());
            }
            Some(Validator::None) | None => {}
        }
        let store = self.store.lock().clone();
        let result = store.get_opts(&self.path, options).await;
        let outcome = record.take();
        if outcome.is_some() {
            self.has_reached_server.store(true, Ordering::Relaxed);
        }
        match (outcome, result) {
            (Some(Ok(head)), Ok(result)) => Ok((head, Ok(result.into_stream()))),
            // The head says why; if it does not, object_store wants more of an answer.
            (Some(Ok(head)), Err(error)) => {
                Ok((head, Err(SourceError::never("the answer cannot be used", &error))))
            }
            (Some(Err(error)), _) => Err(error),
            (None, Ok(_)) => Err(SourceError::new(Retry::Never, "no request was made")),
            (None, Err(error)) => Err(self.no_credentials(&error)),
        }
    }

    /// Writes the object.
    async fn put(&self, bytes: Bytes) -> Result<Head, SourceError> {
        if self.url.scheme() == Scheme::Gs && self.config.settings(&self.url).anonymous {
            // object_store would ask the host's metadata service for a token.
            let text = "the source is anonymous, so it may only read: give it a service account";
            return Err(SourceError::new(Retry::Never, text));
        }
        let record = Record::default();
        let mut options = PutOptions::from(PutMode::Overwrite);
        options.extensions.insert(record.clone());
        let store = self.store.lock().clone();
        let result = store.put_opts(&self.path, bytes.into(), options).await;
        match (record.take(), result) {
            (Some(head), _) => head,
            (None, Ok(_)) => Err(SourceError::new(Retry::Never, "no request was made")),
            (None, Err(error)) => Err(self.no_credentials(&error)),
        }
    }

    /// The error for a request that was not made: a service that gives credentials has failed.
    fn no_credentials(&self, error: &object_store::Error) -> SourceError {
        let retry = match self.has_reached_server.load(Ordering::Relaxed) {
            true => Retry::LATER,
            false => Retry::Credentials,
        };
        let hint = "give the source credentials, or set anonymous = true";
        SourceError::new(retry, format!("no credentials: {}; {hint}", text(error)))
    }
}

/// The error of a body that broke. Its kind is inside the error of object_store.
fn broken(error: &object_store::Error) -> SourceError {
    match chain(error).find_map(|cause| cause.downcast_ref::<HttpError>()) {
        Some(cause) => failure(cause, "the answer"),
        None => SourceError::new(Retry::LATER, format!("the answer failed: {}", text(error))),
    }
}

impl RemoteSource for ObjectSource {
    fn look(&self) -> Result<Pin, SourceError> {
        let ask = async {
            let (head, _) = self.get(&(0..1), None).await?;
            head.pin(self.url.scheme(), self.version.as_deref())
        };
        self.config.network().runtime()?.block_on(ask).map_err(|error| error.of(&self.url))
    }

    fn read(&self, pin: &Pin, range: Range<u64>, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let read = async {
            asked(pin, &range)?;
            let (head, pieces) = self.get(&range, Some(&pin.validator)).await?;
            head.check(self.url.scheme(), pin, &range)?;
            let (len, stall_timeout) = (range.end - range.start, self.config.stall_timeout);
            pour(pieces?, len, stall_timeout, sink, |error| broken(&error)).await
        };
        self.config.network().runtime()?.block_on(read).map_err(|error| error.of(&self.url))
    }

    fn write(&self, bytes: Bytes) -> Result<(), SourceError> {
        let write = async { self.put(bytes).await?.written() };
        self.config.network().runtime()?.block_on(write).map_err(|error| error.of(&self.url))
    }

    fn refresh(&self) -> Result<(), SourceError> {
        let store = store(&self.url, &self.config).map_err(|error| error.of(&self.url))?;
        *self.store.lock() = store;
        Ok(())
    }
}

/// One try: the caller knows the deadline, and retries.
fn one_try() -> RetryConfig {
    RetryConfig { max_retries: 0, backoff: BackoffConfig::default(), ..RetryConfig::default() }
}

/// Makes the client of the object store of `url`, with the credentials that its files have now.
fn store(url: &SourceUrl, config: &SourcesConfig) -> Result<Arc<dyn ObjectStore>, SourceError> {
    let settings = config.settings(url);
    let connector = Connector::new(config, &settings)?;
    let bucket = url.url().host_str().unwrap_or_default();
    let is_http =
        settings.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http:"));
    if is_http && !settings.allow_http {
        return Err(SourceError::new(
            Retry::Never,
            "endpoint is an http:// URL: use https://, or set allow-http = true",
        ));
    }
    let made: object_store::Result<Arc<dyn ObjectStore>> = match url.scheme() {
        Scheme::S3 => s3(config, &settings)?
            .with_bucket_name(bucket)
            .with_retry(one_try())
            .with_http_connector(connector)
            .build()
            .map(|store| Arc::new(store) as _),
        Scheme::Gs => gs(config, &settings)?
            .with_bucket_name(bucket)
            .with_retry(one_try())
            .with_http_connector(connector)
            .build()
            .map(|store| Arc::new(store) as _),
        _ => az(config, &settings)?
            .with_container_name(bucket)
            .with_retry(one_try())
            .with_http_connector(connector)
            .build()
            .map(|store| Arc::new(store) as _),
    };
    made.map_err(|error| SourceError::never("the configuration of the source", &error))
}

/// Reads a file of one secret.
fn read_secret(path: &std::path::Path) -> Result<String, SourceError> {
    secret(path).map_err(|error| SourceError::never("credentials", &error))
}

fn s3(config: &SourcesConfig, settings: &SourceSettings) -> Result<AmazonS3Builder, SourceError> {
    let mut builder = AmazonS3Builder::new();
    let has_own = settings.anonymous
        || settings.credentials_file.is_some()
        || settings.access_key_id_file.is_some();
    for (key, value) in config.environment("AWS_") {
        let Ok(key) = key.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() else { continue };
        let is_credential = matches!(
            key,
            AmazonS3ConfigKey::AccessKeyId
                | AmazonS3ConfigKey::SecretAccessKey
                | AmazonS3ConfigKey::Token
        );
        // A token of the environment does not belong to a key of the file.
        if !(has_own && is_credential) {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(path) = &settings.credentials_file {
        let name = settings.profile.as_deref().unwrap_or("default");
        let keys = ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"];
        let [id, key, token] = profile(path, name, keys)
            .map_err(|error| SourceError::never("credentials-file", &error))?;
        let (Some(id), Some(key)) = (id, key) else {
            return Err(SourceError::new(
                Retry::Never,
                format!("credentials-file {}: [{name}] has no key", path.display()),
            ));
        };
        builder = builder.with_access_key_id(id).with_secret_access_key(key);
        if let Some(token) = token {
            builder = builder.with_token(token);
        }
    }
    if let (Some(id), Some(key)) = (&settings.access_key_id_file, &settings.secret_access_key_file)
    {
        builder =
            builder.with_access_key_id(read_secret(id)?).with_secret_access_key(read_secret(key)?);
    }
    if let Some(path) = &settings.session_token_file {
        builder = builder.with_token(read_secret(path)?);
    }
    if settings.anonymous {
        builder = builder.with_skip_signature(true);
    }
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    if let Some(region) = &settings.region {
        builder = builder.with_region(region);
    }
    if let Some(path_style) = settings.path_style {
        builder = builder.with_virtual_hosted_style_request(!path_style);
    }
    if settings.allow_http {
        builder = builder.with_allow_http(true);
    }
    Ok(builder)
}

fn gs(
    config: &SourcesConfig,
    settings: &SourceSettings,
) -> Result<GoogleCloudStorageBuilder, SourceError> {
    let mut builder = GoogleCloudStorageBuilder::new();
    for (key, value) in config.environment("GOOGLE_") {
        let Ok(key) = key.to_ascii_lowercase().parse::<GoogleConfigKey>() else { continue };
        let is_credential = matches!(
            key,
            GoogleConfigKey::ServiceAccount
                | GoogleConfigKey::ServiceAccountKey
                | GoogleConfigKey::ApplicationCredentials
        );
        if !(is_credential && settings.service_account_file.is_some()) {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(path) = &settings.service_account_file {
        builder = builder.with_service_account_key(read_secret(path)?);
    }
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    if settings.anonymous {
        builder = builder.with_skip_signature(true);
    }
    if settings.allow_http {
        builder = builder.with_client_options(ClientOptions::new().with_allow_http(true));
    }
    Ok(builder)
}

fn az(
    config: &SourcesConfig,
    settings: &SourceSettings,
) -> Result<MicrosoftAzureBuilder, SourceError> {
    let mut builder = MicrosoftAzureBuilder::new();
    let has_own = settings.account_key_file.is_some() || settings.sas_file.is_some();
    for (key, value) in config.environment("AZURE_") {
        let Ok(key) = key.to_ascii_lowercase().parse::<AzureConfigKey>() else { continue };
        let is_credential = matches!(
            key,
            AzureConfigKey::AccessKey | AzureConfigKey::SasKey | AzureConfigKey::Token
        );
        if !(has_own && is_credential) {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(account) = &settings.account {
        builder = builder.with_account(account);
    }
    if let Some(path) = &settings.account_key_file {
        builder = builder.with_access_key(read_secret(path)?);
    }
    if let Some(path) = &settings.sas_file {
        builder = builder.with_config(AzureConfigKey::SasKey, read_secret(path)?);
    }
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    if settings.anonymous {
        builder = builder.with_skip_signature(true);
    }
    if settings.allow_http {
        builder = builder.with_allow_http(true);
    }
    Ok(builder)
}

#[cfg(test)]
mod tests;
