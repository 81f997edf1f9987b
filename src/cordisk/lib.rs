//! cordisk: a copy-on-read virtual disk, mounted through FUSE. This page is the map of the
//! workspace.
//!
//! # The idea
//!
//! 1. A request is one call stack: [`export`] → [`engine::disk`] → ([`qcow2::image`] |
//!    [`engine::chain`]) → [`host::storage`]. A backtrace shows the architecture. A read that the
//!    overlay can answer alone is answered by the thread that received it, and so is a small read
//!    of a raw base whose pages the host has in memory. Every other request moves, as a whole, to a
//!    worker thread that runs the same stack. Requests that read below the overlay have a pool of
//!    their own, so a backing file that hangs delays no request that needs none.
//! 2. [`qcow2::image`] knows one file, [`engine::chain`] knows what lies below it, and only
//!    [`engine::disk`] knows both.
//! 3. One rule of concurrency: the mapping of a guest cluster changes only while its range is held
//!    exclusively; reads and writes in place hold it shared ([`qcow2::range_lock`]). Copy-on-read,
//!    an allocating write, a zero, a discard and a chunk of a stream are the same critical section.
//! 4. One rule of durability: data and refcounts, barrier, L2 tables, barrier, L1 table, barrier,
//!    frees. One function holds this order (`qcow2/image/write_back.rs`), and flushes that arrive
//!    at the same time share one pass.
//! 5. Two processes: the [`keeper`], which the user has started, and its child, the serving
//!    process. The child reads images and talks to clients inside a [`sandbox`], and cannot mount,
//!    open, remove or run anything. The keeper does that, and reads neither images nor messages of
//!    clients. A disk with a remote backing file has a third one, the fetcher: it has the network
//!    and the credentials, and opens no image. Commands about a running disk are a process of
//!    another kind: a [`client`] of its control socket.
//! 6. Everything that can be a pure function is one ([`mod@qcow2::format`], range conflicts, the
//!    job tables, the rate limit, the QMP codec); the rest is a thin shell around them.
//!
//! # The crates
//!
//! Each crate in `src/` uses only crates above it in this table. Cargo holds that;
//! `tests/it/architecture.rs` has the same table for the machine.
//!
//! | crate | what it is | never |
//! |---|---|---|
//! | [`host`] | one host file, QEMU's locks on it, errors, lock ranks | knows qcow2 |
//! | [`qcow2`] | one qcow2 file: format, tables, refcounts, order of writes, check | opens a base |
//! | `sim` | hosts for tests that record, fail, forget and lose power | is part of the program |
//! | [`remote`] | remote files here: names, pins, cache, line to the fetcher | connects to a server |
//! | [`order`] | what guests touch first: its file, how several are merged | reads a disk |
//! | [`bootset`] | what a disk's boot needs, from the file system on it | opens a disk, writes |
//! | [`engine`] | a disk without a front end: chain, jobs, stream, map | FUSE, sockets |
//! | `uring` | rings of FUSE over io_uring: the only `unsafe` | knows what a request means |
//! | [`export`] | requests of the kernel become calls of the disk | jobs, QMP, mount(2) |
//! | [`control`] | the control socket: QMP server, schema, client | FUSE, the image |
//! | `trials` | crashes, faults, races, hostile images above `sim` | is part of the program |
//! | `nbd` | a client of NBD servers | writes |
//! | `fetcher` | the program `cordisk-fetcher`, which reads from servers | opens an image |
//! | `cordisk` | the program: what follows | |
//!
//! | module of the program | what it does |
//! |---|---|
//! | [`cli`] | the command line, parsed and checked |
//! | [`daemon`] | a disk that is served: wiring and lifetime |
//! | [`mount`] | mountpoints, mount(2), umount(2), the kernel's list of mounts |
//! | [`keeper`] | the main process: starts the others and their successors, mounts, removes |
//! | [`fetching`] | how the fetcher is started, and what is opened over it |
//! | [`sandbox`] | the rights of the serving process, and its user |
//! | [`running`] | the registry of disks that run on this host, and of their sockets |
//! | [`client`] | commands about running disks |
//! | [`info`], [`map`] | facts in the header of an image; pictures of where data is |
//! | [`logging`], [`metrics`] | destinations of the log; the HTTP server for Prometheus |
//!
//! # The path of a read
//!
//! ```text
//! kernel ─▶ export/device.rs or export/ring.rs         a server thread takes the request
//!        ─▶ export/wire.rs                             its bytes become an Operation
//!        ─▶ export/dispatch.rs                         which thread does the work
//!             ├─▶ handler.rs ─▶ Disk::read_local       same thread: the overlay has every byte
//!             ├─▶ handler.rs ─▶ Disk::read_cached      same thread: it is in memory
//!             └─▶ workers.rs ─▶ Disk::read_and_answer  worker of the pool "below":
//!                   Chain::read ─▶ reply ─▶ copies are written ─▶ Image::publish
//! ```
//! The worker holds the missing clusters exclusively from the read below to the publish. The reply
//! leaves before the copies are written; a later request for the same clusters waits for the range.
//!
//! # The path of a read from a server
//!
//! ```text
//! Chain::read ─▶ remote::RemoteFile::read_at          worker of the pool "below"
//!   ├─▶ remote/cache/reader.rs: the map says present ─▶ pread of the file of the cache
//!   └─▶ remote/line.rs: Want ═ socket ═▶ fetcher/serve.rs     a process of its own
//!         ─▶ download.rs ─▶ a worker claims the blocks in the cache: one fetcher of the host
//!         ─▶ web.rs, object.rs or nbd_source.rs ─▶ the head of the answer is compared with the pin
//!         ─▶ writer.rs: chunk list, data, then the map ═ Have ═▶ the worker reads the cache
//! ```
//! The bytes do not go over the socket: both processes have the file of the cache open, one of them
//! for reading only. What arrives answers every thread that waits for it, before the whole request
//! is complete (`download.rs`). A thread of a stream is marked ([`host::background`]), and what it
//! wants waits in another queue (`fetcher/ahead.rs`). A fetcher that dies is started again by the
//! keeper; it opens the same files and gets the requests that wait once more (`remote/line.rs`). A
//! stream says early what it will read (`engine/stream/scout.rs`).
//!
//! # The path of a write
//!
//! `Disk::write_local` overwrites clusters that the overlay owns, on the server thread, with the
//! range held shared, and stores small writes in new clusters if neither another request nor a
//! backing file is in the way. Any other write goes to a worker: `Disk::write_without_base`, or
//! `Disk::write` if a cluster must be completed with data of the backing chain. The worker holds
//! the range exclusively, [`qcow2::image`] allocates clusters and fills them, and `publish` puts
//! their L2 entries into the tables in memory. Nothing is durable yet. A flush, a write with
//! O_DSYNC, or the commit timer runs the write-back pass, which writes the tables in the order of
//! rule 4. A flush that has no write to cover is answered at once.
//!
//! # The path of a streamed chunk
//!
//! `engine/stream.rs` first brings the pieces of its course (`stream/course.rs`): what lies beside
//! the guest's reads, of which `disk/touches.rs` tells it, and the order that `daemon/order.rs` has
//! found. Then it walks the disk in chunks of 512 KiB. Reader threads read the next chunks from the
//! backing chain (`stream/ahead.rs`) without holding a range. The job's thread then stops at its
//! checkpoint (pause, cancel, rate limit). `Disk::populate_read` holds the clusters exclusively,
//! reads their mapping again, writes or clones the clusters that are still missing, and publishes
//! them. While the guest is active, these threads work in pieces of 64 KiB and yield after each
//! (`host::background`), and small reads ahead of the walk leave their copies to it, if their bytes
//! are in memory (`disk/walk.rs`). After the last chunk, `disk/detach.rs` walks all tables, drains
//! the requests, checks the clusters that changed meanwhile, and removes the backing link from the
//! header.
//!
//! # The path of a `speed`
//!
//! `block-job-set-speed` arrives at a reader thread of [`control`]: decoder, parser, table of
//! commands, `job_commands.rs`, [`engine::stream::Streams::set_speed`]. The job table changes the
//! limit under its lock and wakes the job, which waits in its checkpoint or reaches it after the
//! current chunk. The reply is sent before any event that the change causes (`control/fanout.rs`).
//!
//! # Locks
//!
//! Locks are taken in the order of [`host::sync::rank`], at most one of each rank; debug builds
//! check it. The range guard is held across I/O, and so are the locks of the write-back pass and of
//! the header. The allocator's lock is held across I/O only to load a refcount block, and leaf
//! locks never are. No thread waits for a guest's request while it holds one of them.
//!
//! # After a death
//!
//! A killed daemon leaves a dead mount, an image whose refcounts may be too high, and an extended
//! attribute that marks the image as not closed ([`host::storage::OpenMark`]). The next read-write
//! open drops the host's cached pages of the file, so that it reads the bytes on the disk
//! (`qcow2/image/settle.rs`), finds the leaked clusters and frees them
//! ([`qcow2::image::Image::find_leaks`]). The next mount at the same place removes the dead mount
//! (`mount/stale.rs`). [`qcow2::check`] is the same walk as a command. Another attribute notes a
//! stream that ran, and the next mount of that file resumes it (`stream/note.rs`). A daemon locks
//! the entry by which commands find its disk, so an entry without a lock belongs to a dead daemon
//! ([`running`]).
//!
//! # Decisions, and why
//!
//! * [`host`] is a crate below [`qcow2`], because a simulated host must implement the traits of a
//!   crate that is not the one under test: so the unit tests of `qcow2` and `engine` run on `sim`.
//!   Tests that use the simulated hosts *and* the engine are in `trials`, so that a change of such
//!   a test rebuilds no other crate.
//! * `Storage` has no `zero_range`: zeros are zero clusters in version 3 and written data in
//!   version 2, and neither needs that operation.
//! * A miss is not split between threads, and the queue of misses has no bound of its own: the
//!   kernel bounds it (`max_background`). A bounded queue would block a server thread when it is
//!   full.
//! * The range lock is striped, so that no one lock is taken by all requests.
//! * The reply to a missing read is sent before the copy is stored (`disk/read.rs`): storing is
//!   slower, and only a later request for the same cluster has to wait.
//! * A queue of FUSE over io_uring has two server threads (`export/ring.rs`): one on the CPU of
//!   the requesting program is best for small requests, and too slow for several large ones.
//! * Early write-out is posix_fadvise(2) instead of sync_file_range(2), which no crate offers
//!   without `unsafe` (`disk/write_out.rs`).
//! * Streams clone blocks if the file system can; reads never do (`disk/populate.rs`): cloned data
//!   is not in the page cache of the overlay, and the guest is about to read it again.
//! * The keeper is the parent of the serving process, not its child: the process that a supervisor
//!   watches is small, reads no image, and outlives the one that may die. It passes signals and
//!   messages to a service manager on, and ends with the exit status of the other.
//! * A disk outlives its serving process (`keeper/legacy.rs`, `daemon/successor.rs`): the keeper
//!   has duplicates of all descriptors, and the changes of the mapping that no pass has written yet
//!   are in a journal in shared memory (`qcow2/journal.rs`). Early writes of the tables would break
//!   the order of rule 4. A journal that does not fit the image is refused instead of latching the
//!   image: reads would be answered with old bytes.
//! * `cordisk upgrade` makes the serving process flush and end, and another program takes the disk
//!   over as after a kill (`keeper/upgrade.rs`). A way that only upgrades use would be tried less
//!   often than the one that every kill in the tests goes. The keeper stays: its messages have a
//!   number, by which programs of different versions find out whether they understand each other.
//! * A keeper can be replaced as well (`keeper/estate.rs`): systemd keeps its descriptors, or the
//!   serving process gives them to a new one. What the new one runs and opens is what the dead
//!   keeper has written down, and nothing that the serving process says.
//! * `--transport auto` is /dev/fuse unless `--prefer speed` is given. Over io_uring a session
//!   survives a kill too, except that a write whose data the kernel is copying into memory that is
//!   not there yet can fail.
//! * The fetcher is a process and a program of its own: TLS, HTTP and credentials are in no process
//!   that reads images or mounts, and a build without the feature `remote` has none of them.
//! * The cache is files and not a daemon ([`remote::cache`]). Each fetcher opens them by itself,
//!   and OFD locks decide which fetcher fetches a block. Locks vanish with their process, and there
//!   is nothing to restart or to keep at one version.
//! * The map of the cache has one byte for each block, so that each change is one write of its own
//!   bytes, and readers need no lock.
//! * One of the threads that wait for the fetcher receives for all of them (`remote/line.rs`),
//!   instead of a thread for that: disks are opened before the process may start threads.
//! * A learned order changes neither the walk of a stream nor its result: its pieces are hints. A
//!   stream in another order would need a set of the chunks that are done, and an offset that
//!   QEMU's clients do not know.
//! * First touches are recorded in blocks of 64 KiB, whatever the cluster size: an order is for
//!   disks with any cluster size.
//! * Pins of remote files are an extension of the qcow2 header, beside the name that they belong
//!   to: QEMU keeps it, and a copy of the image has it. Extended attributes are lost too easily.
//! * Flushes share a pass by counting passes (`image/write_back.rs`) instead of asking a committer
//!   thread. The commit timer calls the same function a second after a table has become dirty.
//! * The number of local bytes is counted by walking the tables, in a bounded part of the time
//!   (`disk/allocation_statistics.rs`). So the number cannot differ from the tables, and no request
//!   has to update a counter.
//! * The backing format extension of the header is removed together with the backing link only if
//!   both fit one atomic 512-byte write. Otherwise the extension stays without a backing file name,
//!   and QEMU ignores it.

#![forbid(unsafe_code)]
// The modules of the program are private: `cargo doc --document-private-items` shows them.
#![allow(rustdoc::private_intra_doc_links)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod cli;
mod client;
pub mod daemon;
mod fetching;
mod info;
mod keeper;
mod logging;
mod map;
mod metrics;
pub mod mount;
mod running;
mod sandbox;
