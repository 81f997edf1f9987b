//! The extended attributes beside an image: their names and bounds. The format knows nothing of them.
//!
//! Programs that copy files copy them as well (`cp -a`), and any user with write permission on the file may set them: what
//! they say is checked where it is read.

/// There while a program of ours writes the image, and after it was killed. Copied with an image it costs
/// the next open of the copy a search for leaks.
pub const OPEN_MARK: &str = "user.cordisk.open";
/// What the backing files were like when the image was first mounted. It stays true beside a copy, which
/// has the same backing files, and a wrong one causes or prevents a warning, nothing else.
pub const BASE_NOTE: &str = "user.cordisk.base";
/// The stream that runs, for the next mount. Names its file, see `stream/note.rs`.
pub const STREAM_NOTE: &str = "user.cordisk.stream";

/// Bytes of the longest [`BASE_NOTE`]: more than it ever has.
pub const LONGEST_BASE_NOTE: usize = 2048;
/// Bytes of the longest [`STREAM_NOTE`]: with the other attributes it fits the one block that ext4 has for them.
pub const LONGEST_STREAM_NOTE: usize = 3072;
