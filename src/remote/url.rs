//! Names of remote files.

use std::fmt;

use host::{Error, ErrorKind, Result};
use url::Url;

/// The protocol of a name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scheme {
    /// `nbd://HOST[:PORT]/EXPORT`
    Nbd,
    /// `nbds://HOST[:PORT]/EXPORT`: NBD with TLS.
    Nbds,
    /// `nbd+unix:///EXPORT?socket=PATH`
    NbdUnix,
    /// `http://…`
    Http,
    /// `https://…`
    Https,
    /// `s3://BUCKET/KEY[?versionId=VERSION]`
    S3,
    /// `gs://BUCKET/OBJECT[?generation=GENERATION]`
    Gs,
    /// `az://CONTAINER/BLOB[?versionId=VERSION]`
    Az,
}

const SCHEMES: [(&str, Scheme); 8] = [
    ("nbd", Scheme::Nbd),
    ("nbds", Scheme::Nbds),
    ("nbd+unix", Scheme::NbdUnix),
    ("http", Scheme::Http),
    ("https", Scheme::Https),
    ("s3", Scheme::S3),
    ("gs", Scheme::Gs),
    ("az", Scheme::Az),
];

/// The name of a remote file. `Debug` and `Display` print it without what could be a secret: user
/// name, password, and the query, which of a presigned URL is the signature.
#[derive(Clone, Eq, PartialEq)]
pub struct SourceUrl {
    url: Url,
    scheme: Scheme,
}

impl SourceUrl {
    /// Whether `name` starts with a protocol of this module. Other names with a colon are left to
    /// the caller.
    pub fn is_source(name: &str) -> bool {
        name.split_once("://")
            .is_some_and(|(scheme, _)| SCHEMES.iter().any(|(name, _)| *name == scheme))
    }

    /// Parses a name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a name that is not a URL of this module, or that contains
    /// a user name, a password or a fragment.
    pub fn parse(name: &str) -> Result<SourceUrl> {
        let parsed = SourceUrl::parse_prefix(name)?;
        let is_bucket = matches!(parsed.scheme, Scheme::S3 | Scheme::Gs | Scheme::Az);
        if is_bucket && parsed.url.path().len() < 2 {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("\"{parsed}\": the key of the object is missing"),
            ));
        }
        Ok(parsed)
    }

    /// Parses a name, or the beginning of names for [`SourceUrl::is_below`], which may be a bucket
    /// without a key.
    ///
    /// # Errors
    /// As [`SourceUrl::parse`].
    pub fn parse_prefix(name: &str) -> Result<SourceUrl> {
        let bad = |why: &str| {
            Error::new(ErrorKind::InvalidArgument, format!("\"{}\": {why}", redacted(name)))
        };
        let url = Url::parse(name).map_err(|error| bad(&format!("not a URL: {error}")))?;
        let scheme = SCHEMES
            .iter()
            .find(|(name, _)| *name == url.scheme())
            .map(|(_, scheme)| *scheme)
            .ok_or_else(|| bad("not a protocol of a remote base (nbd, nbds, nbd+unix, http, https, s3, gs, az)"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad(
                "a name must not contain a user or a password: they belong into the configuration of sources",
            ));
        }
        if url.fragment().is_some() {
            return Err(bad("a name must not contain a fragment (#)"));
        }
        let has_host = url.host_str().is_some_and(|host| !host.is_empty());
        if has_host == (scheme == Scheme::NbdUnix) {
            return Err(bad(if has_host {
                "nbd+unix names a socket instead of a host: nbd+unix:///EXPORT?socket=PATH"
            } else {
                "the host or bucket is missing"
            }));
        }
        if scheme == Scheme::NbdUnix && !url.query_pairs().any(|(key, _)| key == "socket") {
            return Err(bad("the socket is missing: nbd+unix:///EXPORT?socket=PATH"));
        }
        Ok(SourceUrl { url, scheme })
    }

    /// The protocol.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The parsed URL.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The whole name, with everything that may be a secret.
    pub fn as_str(&self) -> &str {
        self.url.as_str()
    }

    /// The value of the parameter `key` of the query.
    pub fn parameter(&self, key: &str) -> Option<String> {
        self.url.query_pairs().find(|(name, _)| name == key).map(|(_, value)| value.into_owned())
    }

    /// The name that `name`, found in the header of the image at this URL, means: a URL of its own,
    /// or a path that starts from the directory of this URL.
    ///
    /// # Errors
    /// As [`SourceUrl::parse`]; [`ErrorKind::UnsupportedFeature`] if this URL has no directories
    /// (NBD).
    pub fn join(&self, name: &str) -> Result<SourceUrl> {
        if SourceUrl::is_source(name) {
            return SourceUrl::parse(name);
        }
        if matches!(self.scheme, Scheme::Nbd | Scheme::Nbds | Scheme::NbdUnix) {
            return Err(Error::new(
                ErrorKind::UnsupportedFeature,
                format!(
                    "{self}: names the backing file \"{}\", but an NBD export has no directory to look in",
                    redacted(name)
                ),
            ));
        }
        let mut url = self.url.clone();
        url.set_query(None);
        let joined = url.join(name).map_err(|error| {
            Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{self}: names the backing file \"{}\", which is not a name: {error}",
                    redacted(name)
                ),
            )
        })?;
        SourceUrl::parse(joined.as_str())
    }

    /// The name without what may be a secret, as a prefix: without the query, of which only that of
    /// a Unix socket says where a file is.
    pub fn as_prefix(&self) -> String {
        let mut url = self.url.clone();
        if self.scheme != Scheme::NbdUnix {
            url.set_query(None);
        }
        url.into()
    }

    /// The name of the directory of this file, for messages: what `--backing-url` takes.
    pub fn directory(&self) -> String {
        let name = self.to_string();
        let path = name.split('?').next().unwrap_or_default();
        path[..path.rfind('/').map_or(path.len(), |at| at + 1)].to_owned()
    }

    /// Whether an NBD server has the file: its exports lie beside no other file.
    pub fn is_nbd(&self) -> bool {
        matches!(self.scheme, Scheme::Nbd | Scheme::Nbds | Scheme::NbdUnix)
    }

    /// The name of a file beside this one, whose name has `suffix` in addition.
    ///
    /// # Errors
    /// As [`SourceUrl::parse`].
    pub fn beside(&self, suffix: &str) -> Result<SourceUrl> {
        let mut url = self.url.clone();
        url.set_path(&format!("{}{suffix}", self.url.path()));
        if self.scheme != Scheme::NbdUnix {
            url.set_query(None);
        }
        SourceUrl::parse(url.as_str())
    }

    /// Whether this name lies below `prefix` (`--backing-url`): the same protocol, host and port,
    /// and a path that starts with whole components of the prefix's path. A path with an encoded
    /// slash, backslash or dot is below no prefix: some servers decode it first.
    pub fn is_below(&self, prefix: &SourceUrl) -> bool {
        let same = |of: fn(&Url) -> Option<String>| of(&self.url) == of(&prefix.url);
        let (path, above) = (self.url.path(), prefix.url.path());
        self.scheme == prefix.scheme
            && same(|url| url.host_str().map(str::to_owned))
            && self.url.port_or_known_default() == prefix.url.port_or_known_default()
            && (self.scheme != Scheme::NbdUnix
                || self.parameter("socket") == prefix.parameter("socket"))
            && (above.is_empty()
                || path == above
                || path
                    .strip_prefix(above)
                    .is_some_and(|rest| above.ends_with('/') || rest.starts_with('/')))
            && !["%2f", "%2e", "%5c"].iter().any(|code| path.to_ascii_lowercase().contains(code))
    }
}

impl fmt::Display for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted(self.url.as_str()))
    }
}

impl fmt::Debug for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A name for messages: without user name, password, and the values of the query other than
/// `versionId`, `generation` and `socket`.
pub fn redacted(name: &str) -> String {
    let clean = |text: &str| -> String {
        text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
    };
    // A fragment can be a token as well, and has no meaning in a name.
    let (name, fragment) = name.split_once('#').map_or((name, ""), |(a, _)| (a, "#…"));
    let (front, query) = name.split_once('?').map_or((name, None), |(a, b)| (a, Some(b)));
    let front = match front.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            let is_port =
                |port: &str| port.ends_with(']') || port.bytes().all(|b| b.is_ascii_digit());
            if host.rsplit_once(':').is_none_or(|(_, port)| is_port(port)) {
                format!("{scheme}://{host}{path}")
            } else {
                // A password with a slash or a question mark in it, which no URL can have.
                let host = rest.rsplit_once('@').map_or("…", |(_, host)| host);
                format!("{scheme}://{host}")
            }
        }
        None => front.to_owned(),
    };
    let shown = query.map(|query| {
        let known = |pair: &&str| {
            ["versionId=", "generation=", "socket="].iter().any(|key| pair.starts_with(key))
        };
        let mut parts: Vec<&str> = query.split('&').filter(known).collect();
        if parts.len() < query.split('&').count() {
            parts.push("…");
        }
        format!("?{}", parts.join("&"))
    });
    clean(&format!("{front}{}{fragment}", shown.unwrap_or_default()))
}

/// A text in which every word that has the form of a URL, or of a query, has lost what may be a
/// secret.
pub fn redacted_text(text: &str) -> String {
    text.split(' ')
        .map(|word| {
            let bare = word.trim_matches(|c| "()<>[]\"',;".contains(c));
            if bare.contains("://") || (bare.contains('?') && bare.contains('=')) {
                word.replace(bare, &redacted(bare))
            } else {
                word.to_owned()
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: what may be a secret is not printed, also of a name that is no URL because its
    /// password has characters that end the part of a URL with the host.
    #[test]
    fn no_secret_is_printed() {
        for (name, shown) in [
            ("https://u:5ecre7@h:8443/disk?sig=5ecre7", "https://h:8443/disk?…"),
            ("https://u:5ec/re7@h/disk?sig=5ecre7", "https://h/disk?…"),
            ("https://u:5ec?re7@h/disk", "https://…?…"),
            ("https://u:5ec#re7@h/disk", "https://…#…"),
            ("https://h/disk#5ecre7", "https://h/disk#…"),
            ("https://h/disk?versionId=1#5ecre7", "https://h/disk?versionId=1#…"),
            ("https://[::1]:80/a@b", "https://[::1]:80/a@b"),
            ("https://[::1]/a:b@c", "https://[::1]/a:b@c"),
            ("nbd+unix:///disk?socket=/run/s&x=5ecre7", "nbd+unix:///disk?socket=/run/s&…"),
        ] {
            assert_eq!(redacted(name), shown, "{name}");
        }
        for name in ["https://u:5ec/re7@h/disk", "https://h/disk#5ecre7", "https://u:5ec?re7@h/"] {
            let error = SourceUrl::parse(name).unwrap_err().to_string();
            assert!(!error.contains("5ec") && !error.contains("re7"), "{error}");
        }
    }

    /// Protects: a prefix allows what lies below it, and nothing else, however the name is written.
    #[test]
    fn only_what_lies_below_a_prefix_is_allowed() {
        let below = |name, prefix| {
            let prefix = SourceUrl::parse_prefix(prefix).unwrap();
            SourceUrl::parse(name).is_ok_and(|name| name.is_below(&prefix))
        };
        for (name, prefix) in [
            ("s3://golden/a", "s3://golden"),
            ("s3://golden/images/a", "s3://golden/images"),
            ("https://h/golden/a%20b", "https://h/golden/"),
            ("https://h:443/golden/a", "https://H/golden"),
            ("nbd://h/disk", "nbd://h/"),
        ] {
            assert!(below(name, prefix), "{name} {prefix}");
        }
        for (name, prefix) in [
            ("s3://golden-evil/a", "s3://golden"),
            ("s3://golden/images-evil/a", "s3://golden/images"),
            ("s3://golden/images/../evil", "s3://golden/images/"),
            ("https://h/golden/../evil", "https://h/golden/"),
            ("https://h/golden/%2e%2e/evil", "https://h/golden/"),
            ("https://h/golden/..%2fevil", "https://h/golden/"),
            ("https://h/golden/..%5Cevil", "https://h/golden/"),
            ("https://h/golden/..\\evil", "https://h/golden/"),
            ("https://h.evil/golden/a", "https://h/golden/"),
            ("https://h:8443/golden/a", "https://h/golden/"),
            ("http://h/golden/a", "https://h/golden/"),
            ("https://h/golden/a", "https://h/Golden/"),
            ("https://h@evil/golden/a", "https://h/golden/"),
            ("nbd+unix:///a?socket=/evil", "nbd+unix:///?socket=/s"),
        ] {
            assert!(!below(name, prefix), "{name} {prefix}");
        }
    }
}
