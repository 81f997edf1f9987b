//! The other end of the socket: commands about disks that run.
//!
//! **Touches:** control sockets, entries, the list of mounts. **Never:** opens an image; serves anybody.
