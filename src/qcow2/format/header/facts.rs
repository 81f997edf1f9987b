//! Facts about an image that its header contains, for users and for QMP.

use serde::{Deserialize, Serialize};

use super::{CompressionType, Header, feature};

/// Compatible feature bit 0 (specification: "compatible_features").
const LAZY_REFCOUNTS: u64 = 1;

/// Facts that are specific to qcow2, with the names of QMP's `ImageInfoSpecificQCow2`. Facts that a
/// version 2 header cannot express are absent.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Facts {
    /// `0.10` for version 2, `1.1` for version 3.
    pub compat: String,
    /// `zlib` or `zstd`.
    pub compression_type: String,
    /// Whether refcount updates may be postponed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Whether the image is marked corrupt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Whether the image has subclusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
}

impl Header {
    /// Returns the information that `qemu-img info` calls format specific.
    pub fn facts(&self) -> Qcow2Facts {
        let v3 = self.geometry.version() >= 3;
        let of_v3 = |bits: u64| v3.then_some(bits != 0);
        let compression = match self.compression {
            CompressionType::Zlib => "zlib",
            CompressionType::Zstd => "zstd",
        };
        Qcow2Facts {
            compat: if v3 { "1.1" } else { "0.10" }.into(),
            compression_type: compression.into(),
            lazy_refcounts: of_v3(self.compatible & LAZY_REFCOUNTS),
            refcount_bits: 1 << self.geometry.refcount_order(),
            corrupt: of_v3(self.incompatible & feature::CORRUPT),
            extended_l2: of_v3(self.incompatible & feature::EXTENDED_L2),
        }
    }
}
