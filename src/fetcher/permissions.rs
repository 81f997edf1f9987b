//! What the process that asks may ask for. It checks its names as well; this list holds also if
//! that process was taken over by an image or by a client.

use host::{Error, ErrorKind, Result};
use order::SUFFIX;
use remote::url::SourceUrl;

/// The files that may be read, and whether orders may be written beside them.
#[derive(Debug, Default)]
pub struct Permissions {
    /// The prefixes below which files may be read.
    pub prefixes: Vec<SourceUrl>,
    /// Orders may be written beside these files (`mount --learn`).
    pub writes_orders: bool,
}

impl Permissions {
    /// Refuses a file that lies below no prefix.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`].
    pub(crate) fn check(&self, url: &SourceUrl) -> Result<()> {
        match self.prefixes.iter().any(|prefix| url.is_below(prefix)) {
            true => Ok(()),
            false => Err(denied(url, "not below a prefix that this fetcher was started for")),
        }
    }

    /// Refuses what [`Permissions::check`] refuses, except for the order beside a prefix that is
    /// the name of a file.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`].
    pub(crate) fn check_beside(&self, url: &SourceUrl) -> Result<()> {
        let is_order = |prefix: &SourceUrl| {
            prefix.beside(SUFFIX).is_ok_and(|order| order.as_str() == url.as_str())
        };
        match self.prefixes.iter().any(is_order) {
            true => Ok(()),
            false => self.check(url),
        }
    }

    /// Returns the name of the order beside the file `url`, if it may be written.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`]; the file can have no order beside it
    /// ([`SourceUrl::beside`]).
    pub(crate) fn order_beside(&self, url: &SourceUrl) -> Result<SourceUrl> {
        self.check(url)?;
        if !self.writes_orders {
            return Err(denied(url, "this fetcher was started to read only"));
        }
        url.beside(SUFFIX)
    }
}

fn denied(url: &SourceUrl, why: &str) -> Error {
    Error::new(ErrorKind::PermissionDenied, format!("{url}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(name: &str) -> SourceUrl {
        SourceUrl::parse(name).unwrap()
    }

    /// Protects: a process that was taken over neither reads nor writes elsewhere.
    #[test]
    fn only_what_lies_beside_an_allowed_file_is_read_or_written() {
        let prefixes = ["s3://golden/images/", "https://h/base.raw"].map(SourceUrl::parse_prefix);
        let prefixes = prefixes.into_iter().collect::<Result<Vec<_>>>().unwrap();
        let mut permissions = Permissions { prefixes, writes_orders: false };
        for name in ["s3://golden/images/a", "s3://golden/images/a.order", "https://h/base.raw"] {
            permissions.check(&url(name)).unwrap();
            permissions.check_beside(&url(name)).unwrap();
        }
        let beside = url("https://h/base.raw.order");
        permissions.check_beside(&beside).unwrap();
        assert!(permissions.check(&beside).is_err());
        for name in [
            "s3://golden/other",
            "https://h/base.raw.other",
            "https://h/base",
            "http://h/base.raw.order",
        ] {
            assert!(permissions.check_beside(&url(name)).is_err(), "{name}");
        }
        let image = url("s3://golden/images/a");
        let refused = permissions.order_beside(&image).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        permissions.writes_orders = true;
        let order = permissions.order_beside(&image).unwrap();
        assert_eq!(order.as_str(), "s3://golden/images/a.order");
        assert!(permissions.order_beside(&url("s3://golden/other")).is_err());
    }
}
