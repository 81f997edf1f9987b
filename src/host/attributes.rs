//! Names and bounds of the extended attributes of an image file. The qcow2 format does not contain
//! them.
//!
//! Programs that copy files also copy the attributes (`cp -a`), and any user with write permission
//! on the file may set them. Their content is therefore checked when it is read.

/// Present while this program writes the image, and after it was killed. A copy of the image has it
/// too, which costs the next open of the copy a search for leaks.
pub const OPEN_MARK: &str = "user.cordisk.open";
/// The versions of the backing files when the image was first mounted. The note stays true for a
/// copy, which has the same backing files. A wrong note causes or prevents a warning, and nothing
/// else.
pub const BASE_NOTE: &str = "user.cordisk.base";
/// The running stream job, for the next mount. The note contains the identity of its file, see
/// `stream/note.rs`.
pub const STREAM_NOTE: &str = "user.cordisk.stream";

/// Largest size of a [`BASE_NOTE`], in bytes: more than any note needs.
pub const LONGEST_BASE_NOTE: usize = 2048;
/// Largest size of a [`STREAM_NOTE`], in bytes. With the other attributes it fits into the one
/// block that ext4 has for them.
pub const LONGEST_STREAM_NOTE: usize = 3072;
