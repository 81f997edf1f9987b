//! The other end of the socket: commands about disks that run.
//!
//! ```text
//!  cordisk stream /srv/vm.raw ── find: list of mounts ▸ entry in the runtime directory ▸ /run/cordisk/4711.sock
//!                               └─ connection: QMP, one line each way ──▶ the daemon, another process
//! ```
//!
//! A disk is named by its mountpoint or by its socket. What stands in an entry is believed where root wrote it, or whoever the mount belongs to.
//! What a daemon answers is data of another process, and is shown on one line without control characters.
//!
//! **Touches:** control sockets, entries of [`crate::running`], the list of mounts, umount(2), the terminal. **Never:** opens an image (of one that
//! nobody serves [`crate::map`] and [`crate::info`] tell); stats a mounted disk that may be dead or hang; waits for a daemon that says nothing for
//! longer than ten seconds, other than for the end of what it was told to do.
//! **Locks:** none. **Invariants:** no command leaves a job or a mount in another state than it says.

mod closing;
mod connection;
mod facts;
mod find;
mod info;
mod job;
mod limit;
mod map;
mod progress;
mod several;
mod show;
mod status;
mod stream;
mod table;
mod terminal;
mod top;
mod umount;

pub use closing::wait_for_closing;
pub use connection::{Connection, Heard, Refusal};
pub use find::{Disk, Target, connect, explain_busy, find, find_all};
pub use info::InfoOptions;
pub use job::{JobAction, JobOptions};
pub use limit::Limit;
pub use map::MapOptions;
pub use several::Targets;
pub use status::StatusOptions;
pub use stream::StreamOptions;
pub use top::TopOptions;
pub use umount::UmountOptions;

pub use info::run as info;
pub use job::run as job;
pub use map::run as map;
pub use status::run as status;
pub use stream::run as stream;
pub use top::run as top;
pub use umount::run as umount;
