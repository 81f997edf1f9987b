//! cordisk: a FUSE-mounted copy-on-read virtual disk. This page is the map; the rules stand where they act.
//!
//! # The idea
//!
//! 1. A request is one plain call stack, [`fuse`] → [`disk`] → ([`image`] | [`chain`]) → [`storage`]; reading a backtrace is reading the
//!    architecture. What the overlay holds is answered on the thread that received the request, and so is a small read of a raw file below that the
//!    host has in memory. Any other miss goes whole to a worker that runs the same stack: of one pool if it must read below,
//!    of another if it allocates or waits for a range only. So a slow or hung backing file delays nothing that needs none.
//! 2. [`image`] knows only its own file; [`chain`] knows only what lies below; [`disk`] is the only room that knows both.
//! 3. One concurrency rule: a guest cluster changes its mapping only while its range is held exclusively; reads and in-place writes hold it
//!    shared ([`range_lock`]). Copy-on-read, allocating write, zero, discard and stream are then the same critical section.
//! 4. One durability rule: data and refcounts ▸ barrier ▸ L2 ▸ barrier ▸ L1 ▸ barrier ▸ frees. It lives in one function, `image/write_back.rs`,
//!    shared by all who flush at the same time.
//! 5. Two processes: the one that reads images and clients is in a [`sandbox`] and cannot mount, open, remove or run anything; a [`keeper`] that reads
//!    neither does that. Commands about a disk that runs are a third kind of process, a [`client`] of its control socket like any other.
//! 6. What can be a pure function is one ([`mod@format`], conflicts of ranges, job tables, rate limit, QMP codec); the rest is a thin shell.
//!
//! # Rooms and floors
//!
//! A file uses only rooms on lower floors; `tests/it/architecture.rs` reads every `use crate::…` and fails otherwise.
//!
//! | floor | room | one responsibility | never |
//! |---|---|---|---|
//! | 0 | [`error`], [`sync`], [`mod@format`], [`range_lock`], [`attributes`] | vocabulary; locks; bytes of qcow2; who may be where; names beside an image | files, threads |
//! | 1 | [`storage`] | one host file, QEMU's locks on it, and whose rights open it | qcow2 |
//! | 1 | [`job`] | the life of a background job | disk, qcow2, JSON |
//! | 1 | [`sandbox`] | what the serving process may do, and who it is | gives a right back |
//! | 1 | [`running`] | which disks run here, and where their sockets are | connects to one |
//! | 2 | [`logging`] | where lines of the log go, and the last warning | keeps a request waiting |
//! | 2 | [`image`] | one qcow2 file | backing files, sockets |
//! | 3 | [`chain`] | what is below the overlay | writing anything |
//! | 4 | [`disk`] | the guest's bytes | FUSE, JSON, jobs |
//! | 5 | [`stream`], [`create`], [`check`] | bring everything up, then cut the chain; a new overlay; what is wrong with an image | sockets |
//! | 5 | [`map`] | what is where: extents, a picture for a terminal, a PNG | the guest's bytes, sockets |
//! | 6 | [`info`] | what an image says of itself, whoever uses it | locks, guest data |
//! | 6 | [`fuse`] | kernel request ⇄ `disk` call | jobs, QMP, the image |
//! | 6 | [`qmp`] | JSON ⇄ jobs, streams, facts of the disk | FUSE, the image |
//! | 6 | [`metrics`] | HTTP and OpenMetrics ⇄ facts of the disk and its jobs | FUSE, images, backing files |
//! | 7 | [`keeper`] | the second process: mounts, unmounts, removes, changes attributes, runs `--on-complete` | images, clients |
//! | 7 | [`client`] | the other end of the socket: commands about disks that run | the image, serving |
//! | 8 | [`cli`] | what was typed, checked | the disk |
//! | 9 | [`daemon`] | wiring and lifetime | logic that a test would want |
//!
//! # Locks
//!
//! Taken in the order of [`sync::rank`], at most one of a rank; debug builds check it. The range guard is held across I/O, the write-back and
//! header locks too; the allocator only to load a refcount block; leaves never. Nothing waits for a guest's request while it holds any of them.
//!
//! # After a death
//!
//! A killed daemon leaves a dead mount, an image whose refcounts may be too high, and an attribute on the file that says so ([`storage::OpenMark`]).
//! The next read-write open drops what the host has in memory of the file, so that it reads what the disk holds (`image/settle.rs`), looks for the
//! leaks and gives them back ([`image::Image::find_leaks`]); the next mount at the same place removes the dead one (`fuse/stale.rs`). [`check`] is the
//! same walk for people. A stream that ran is noted in another attribute, and goes on at the next mount of that very file (`stream/note.rs`). The entry
//! by which commands have found the disk is held by a lock, so that one of the dead is known as such ([`running`]).
//!
//! # Where we left the first plan, and why
//!
//! * `storage` has no `zero_range`: zeros are zero clusters in version 3, and written in version 2, which both need no help of the host.
//! * A miss is not split between threads, and the queue of misses is not bounded by us but by the kernel (one request per blocked client thread
//!   and `max_background`): a bounded queue would have to block a session thread when full, which is what it is there to prevent.
//! * The range lock is striped from the start, so that no lock is taken exclusively by all requests.
//! * A read that misses is answered before its copy is stored (`disk/read.rs`): storing costs more than reading, and only who wants the same cluster
//!   has a reason to wait for it.
//! * A queue of FUSE over io_uring has two servers (`fuse/ring/queue.rs`): one on the CPU of whoever asks is best for small requests, and too slow for
//!   several large ones.
//! * Early write-out is posix_fadvise(2) instead of sync_file_range(2), which no crate offers without `unsafe` (`disk/write_out.rs`).
//! * Reads do not clone, only streams do (`disk/populate.rs`): what was cloned is not in the page cache, where the guest wants it.
//! * Who mounts is a child of the process that serves, not its parent (`keeper`): the id, the signals and the exit status that a user or a
//!   supervisor sees stay those of the disk.
//! * Flushes share a pass by counting passes (`image/write_back.rs`) instead of asking a committer thread; the 1 s timer only calls the same.
//! * How much is local is counted by walking the tables, with a bounded part of the time (`disk/survey.rs`), instead of kept while clusters change: the
//!   tables are the truth, and nothing on the way of a request counts for it.
//! * The backing format extension of the header goes with the backing link only where both fit one atomic 512-byte write; otherwise it stays
//!   without a name, which QEMU does not show either.

#![deny(unsafe_code)] // `fuse/ring.rs` alone allows it
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod attributes;
pub mod chain;
pub mod check;
pub mod cli;
pub mod client;
pub mod create;
pub mod daemon;
pub mod disk;
pub mod error;
pub mod format;
pub mod fuse;
pub mod image;
pub mod info;
pub mod job;
pub mod keeper;
pub mod logging;
pub mod map;
pub mod metrics;
mod mutants;
pub mod qmp;
pub mod range_lock;
pub mod running;
pub mod sandbox;
#[cfg(any(test, fuzzing))]
pub mod simulation;
pub mod storage;
pub mod stream;
pub mod sync;

pub use error::{Error, ErrorKind, Result};
