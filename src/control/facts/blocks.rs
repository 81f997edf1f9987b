//! Structs for QEMU's facts about a disk, its layers and their files: the replies to `query-block`
//! and `query-named-block-nodes`. The names of types and members are QEMU's.

use serde::{Deserialize, Serialize};

use qcow2::format::Qcow2Facts;

/// A disk: an element of the reply to `query-block`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BlockInfo {
    /// Name of the disk.
    pub device: String,
    /// Always `unknown`, as in QEMU.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether a guest can eject the disk; always `false`.
    pub removable: bool,
    /// Whether a guest has locked the disk in its drive; always `false`.
    pub locked: bool,
    /// The layer that the guest sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inserted: Option<BlockDeviceInfo>,
    /// Kind of the error that has stopped the guest: always `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_status: Option<String>,
}

/// A layer, or the file that holds it: an element of the reply to `query-named-block-nodes`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct BlockDeviceInfo {
    /// Path of the file.
    pub file: String,
    /// Name of the layer or of the file in other commands.
    #[serde(rename = "node-name", skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Whether it is read-only.
    pub ro: bool,
    /// Format of a layer, `file` or `host_device` for a file.
    pub drv: String,
    /// Path of the file of the layer below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// Number of layers below that are described here.
    pub backing_file_depth: u64,
    /// The layer below and the file of this layer.
    pub children: Vec<BlockdevChild>,
    /// Always `true`: this process has the file open.
    pub active: bool,
    /// Always `false`: encrypted images are refused.
    pub encrypted: bool,
    /// Whether written zeros become zero clusters without data: always `off`.
    pub detect_zeroes: String,
    /// Limit of bytes per second, which this program does not have; 0 is unlimited.
    pub bps: u64,
    /// As `bps`, for reads.
    pub bps_rd: u64,
    /// As `bps`, for writes.
    pub bps_wr: u64,
    /// Limit of requests per second, which this program does not have; 0 is unlimited.
    pub iops: u64,
    /// As `iops`, for reads.
    pub iops_rd: u64,
    /// As `iops`, for writes.
    pub iops_wr: u64,
    /// Facts of the image.
    pub image: ImageInfo,
    /// How the host's cache is used.
    pub cache: BlockdevCacheInfo,
    /// Offset above which a write causes an event, which this program does not have; 0 is none.
    pub write_threshold: u64,
}

/// What a layer is made of.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BlockdevChild {
    /// `backing` or `file`.
    pub child: String,
    /// Name of the layer or of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
}

/// How the host's cache is used.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BlockdevCacheInfo {
    /// Whether writes are durable only after a flush.
    pub writeback: bool,
    /// Whether the host's page cache is bypassed.
    pub direct: bool,
    /// Whether flushes are ignored.
    pub no_flush: bool,
}

/// Facts of an image. `cordisk info` prints these members too, for a file that is not in use. A
/// reply without a name, format or size is an error for a client, because nothing can be shown
/// then.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file, as the command line or the image above names it; an absolute path in replies.
    pub filename: String,
    /// `qcow2` or `raw`, for a file `file` or `host_device`.
    pub format: String,
    /// Size of the guest's disk.
    pub virtual_size: u64,
    /// Bytes that the file occupies on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Size of a cluster, for qcow2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Whether the image was not closed cleanly (only with lazy refcounts).
    #[serde(default)]
    pub dirty_flag: bool,
    /// The name of the backing file in the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The path of the backing file, relative to the same directory as `filename`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The format of the backing file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Facts that only images of this format have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<ImageInfoSpecific>,
    /// The image below, if the reply includes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_image: Option<Box<ImageInfo>>,
}

/// Facts that only images of one format have.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum ImageInfoSpecific {
    /// Facts of a qcow2 image.
    Qcow2(Qcow2Facts),
    /// A file has none.
    File {},
}
