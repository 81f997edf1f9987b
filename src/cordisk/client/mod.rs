//! The client's side of the control socket: commands about running disks.
//!
//! ```text
//!  cordisk stream /srv/vm.raw
//!    ├─ find: list of mounts ▸ entry in the runtime directory ▸ /run/cordisk/4711.sock
//!    └─ connection: QMP, one line each way ──▶ the daemon, another process
//! ```
//!
//! A disk is named by its mountpoint or by its socket. The content of an entry is trusted if root
//! wrote it, or the user that owns the mount. The answers of a daemon are data of another process;
//! they are shown on one line without control characters.
//!
//! **Touches:** control sockets, entries of [`crate::running`], the list of mounts, umount(2), the
//! terminal. **Never:** opens an image itself ([`crate::map`] and [`crate::info`] read one that no
//! daemon serves, and `order from-files` a base); stats a mounted disk that may be dead or hang;
//! waits longer than ten seconds for a daemon that sends nothing, except for the end of an
//! operation that it was asked for.
//! **Locks:** none. **Invariants:** no command leaves a job or a mount in another state than it
//! reports.

mod boot_search;
mod cache;
mod cache_order;
mod closing;
mod facts;
mod find;
mod info;
mod job;
mod limit;
mod map;
mod order;
mod order_from_files;
mod order_save;
mod progress;
mod several;
mod show;
mod status;
mod stream;
mod table;
mod terminal;
mod top;
mod umount;
mod upgrade;

pub use boot_search::BootSearch;
pub use cache::{CacheOptions, SumsOptions};
pub use closing::wait_for_closing;
pub use control::connection::Connection;
pub use find::{FoundDisk, connect, explain_busy, find, find_all};
pub use info::InfoOptions;
pub use job::{JobAction, JobOptions};
pub use limit::Limit;
pub use map::MapOptions;
pub use order::OrderOptions;
pub use order_from_files::FromFilesOptions;
pub use order_save::OrderSaveOptions;
pub use several::Targets;
pub use status::StatusOptions;
pub use stream::StreamArguments;
pub use top::TopOptions;
pub use umount::UmountOptions;
pub use upgrade::UpgradeOptions;

pub use cache::{cache, sums};
pub use info::run as info;
pub use job::run as job;
pub use map::run as map;
pub use order::run as order;
pub use status::run as status;
pub use stream::run as stream;
pub use top::run as top;
pub use umount::run as umount;
pub use upgrade::run as upgrade;
