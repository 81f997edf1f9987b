//! What a remote file is pinned to: the size and the identity that it had when it was first opened.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::url::SourceUrl;

/// The identity that a server gives the content of a file. Each answer of the server is compared
/// with it, also when the request has already asked for it: some servers ignore the question.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "value")]
pub enum Validator {
    /// A strong entity tag with its quotes (RFC 9110, section 8.8.3), sent as `If-Match`.
    Etag(String),
    /// The version of an object in a versioned bucket of S3, or in a container of Azure.
    Version(String),
    /// The generation of an object of Google Cloud Storage.
    Generation(String),
    /// The server gives no identity. NBD has none, and `--unpinned` accepts servers without one.
    None,
}

/// The size and the identity of a remote file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Pin {
    /// Size in bytes.
    pub size: u64,
    /// The identity of the content.
    pub validator: Validator,
    /// SHA-256 of the chunk list (see [`crate::sums`]) that names the content, as 64 hexadecimal
    /// digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Pin {
    /// Whether both can be pins of one file. A pin without a digest is compatible with any digest.
    pub fn is_compatible(&self, other: &Pin) -> bool {
        let digests = self.digest.as_ref().zip(other.digest.as_ref());
        self.size == other.size
            && self.validator == other.validator
            && digests.is_none_or(|(one, another)| one == another)
    }
}

/// A pin and the name for which it was made, as the header of an overlay stores it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NamedPin {
    /// [`url_digest`] of the name. A pin whose name is not that of the backing file is stale: a
    /// program that does not know the pin has changed the name.
    pub url: String,
    /// What the file is pinned to.
    #[serde(flatten)]
    pub pin: Pin,
}

/// Hexadecimal digits of [`url_digest`].
const NAME_DIGITS: usize = 32;

/// The first half of the SHA-256 of a name, in hexadecimal digits. The name itself is not stored
/// twice, because it can contain a signature.
pub fn url_digest(url: &SourceUrl) -> String {
    hex(&Sha256::digest(url.as_str().as_bytes())[..NAME_DIGITS / 2])
}

/// The name of the file in the cache: the same for all disks of a host that use the same content.
pub fn cache_key(url: &SourceUrl, pin: &Pin) -> String {
    let mut hash = Sha256::new();
    for part in [url.as_str(), &format!("{:?}", pin.validator), &pin.size.to_string()] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    if let Some(digest) = &pin.digest {
        hash.update(digest.as_bytes());
    }
    hex(&hash.finalize())
}

/// The form in which the header of an overlay stores pins: one line each, `NAME SIZE KIND VALUE
/// DIGEST`, where NAME is [`url_digest`] and `-` stands for what there is not. Short, because it
/// has to fit the first sector.
pub fn encode(pins: &[NamedPin]) -> Vec<u8> {
    let lines = pins.iter().map(|named| {
        let (kind, value) = match &named.pin.validator {
            Validator::Etag(value) => ("etag", value.as_str()),
            Validator::Version(value) => ("version", value.as_str()),
            Validator::Generation(value) => ("generation", value.as_str()),
            Validator::None => ("none", "-"),
        };
        let digest = named.pin.digest.as_deref().unwrap_or("-");
        let value = utf8_percent_encode(value, SPACE);
        format!("{} {} {kind} {value} {digest}\n", named.url, named.pin.size)
    });
    lines.collect::<String>().into_bytes()
}

/// The names ([`url_digest`]) of the files that are pinned in a way that this version does not
/// understand, because a later version has done it or the bytes are damaged. What they are pinned
/// to is not known, so they must not be opened.
pub fn not_understood(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let is_name = |name: &&str| {
        name.len() == NAME_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    text.lines()
        .filter(|line| decode_line(line).is_none())
        .filter_map(|line| line.split(' ').next().filter(is_name))
        .map(str::to_owned)
        .collect()
}

/// Reads what [`encode`] has written. Lines that are not understood are left out: see
/// [`not_understood`].
pub fn decode(bytes: &[u8]) -> Vec<NamedPin> {
    let text = String::from_utf8_lossy(bytes);
    text.lines().filter_map(decode_line).collect()
}

fn decode_line(line: &str) -> Option<NamedPin> {
    let mut fields = line.split(' ');
    let url = fields.next().filter(|url| url.len() == NAME_DIGITS)?.to_owned();
    let size = fields.next()?.parse().ok()?;
    let (kind, value) = (fields.next()?, fields.next()?);
    let value = percent_decode_str(value).decode_utf8().ok()?.into_owned();
    let validator = match kind {
        "etag" => Validator::Etag(value),
        "version" => Validator::Version(value),
        "generation" => Validator::Generation(value),
        "none" => Validator::None,
        _ => return None,
    };
    let digest = match fields.next()? {
        "-" => None,
        digest => Some(digest.to_owned()),
    };
    Some(NamedPin { url, pin: Pin { size, validator, digest } })
}

/// What separates the fields of a line, and what cannot be in the middle of one.
const SPACE: &AsciiSet = &CONTROLS.add(b' ').add(b'%');

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(validator: Validator, digest: Option<&str>) -> NamedPin {
        let url = SourceUrl::parse("s3://golden/base.raw").unwrap();
        let pin = Pin { size: 1 << 30, validator, digest: digest.map(str::to_owned) };
        NamedPin { url: url_digest(&url), pin }
    }

    #[test]
    fn pins_are_read_as_they_were_written() {
        let pins = [
            pin(Validator::Etag("\"9a0364b9e99bb480dd25e1f0284c8555-2\"".into()), None),
            pin(Validator::Etag("\"with space, 100% and \u{1f980}\n\"".into()), Some("ab")),
            pin(Validator::Version("3HL4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY".into()), None),
            pin(Validator::Generation("1700000000000000".into()), Some("ff00")),
            pin(Validator::None, None),
        ];
        assert_eq!(decode(&encode(&pins)), pins);
    }

    #[test]
    fn lines_that_are_not_understood_are_left_out() {
        let good = pin(Validator::None, None);
        let mut bytes = b"x\n\xff\xfe 1 etag a -\n".to_vec();
        bytes.extend(encode(std::slice::from_ref(&good)));
        bytes.extend(b"0123456789abcdef0123456789abcdef 1 later x -\n");
        bytes.extend(b"0123456789abcdef0123456789abcdef -1 etag x -\n");
        assert_eq!(decode(&bytes), [good]);
        let name = "0123456789abcdef0123456789abcdef";
        assert_eq!(not_understood(&bytes), [name, name]);
    }
}
