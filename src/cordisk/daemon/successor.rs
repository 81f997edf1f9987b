//! The steps of the start that differ for a successor: a serving process that takes the disk of
//! another one over, which was killed while its guest lives on.
//!
//! ```text
//!  first process:  journal ─▶ open the image ─▶ mount ─▶ INIT ─▶ the keeper keeps all ─▶ serve
//!  successor:      everything from the keeper ─▶ repeat the journal ─▶ adopt the mount ─▶ serve
//! ```
//! A session of a kernel before 6.9 is not kept: since that version the kernel sends the requests
//! of a dead process again. Such a disk is served as before, and its mount is dead when its process
//! is killed.
//!
//! **Touches:** what the keeper keeps. **Never:** looks up the mountpoint: the lookup would wait
//! for this process (H29). **Locks:** none.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::survival::{self, Survival};
use crate::cli::MountConfig;
use crate::client;
use crate::keeper::{Inherited, Keeper};
use engine::disk::{Disk, DiskOptions};
use export::{Connected, Prepared, ShownAttributes, Transport};
use host::Result;
use host::error::Context;
use host::storage::MemoryFile;

/// Size of the journal in bytes. It has 131,072 records with bitmaps, of which a busy guest writes
/// about 60,000 between two passes. What was not used takes no memory.
const JOURNAL: u64 = 4096 + 131_072 * 48;

/// Returns what a step of the start has made. If it failed in a successor, logs the error and goes
/// on without: the guest lives, and needs the disk more than a pidfile or a socket.
///
/// # Errors
/// That of the step, in the first process.
pub(super) fn or_without<T>(is_successor: bool, made: Result<Option<T>>) -> Result<Option<T>> {
    match made {
        Err(error) if is_successor => {
            log::warn!("going on without: {error}");
            Ok(None)
        }
        made => made,
    }
}

/// Makes a journal. A host without memory for it serves the disk all the same.
pub(super) fn journal() -> Option<MemoryFile> {
    let made = MemoryFile::new(JOURNAL);
    made.inspect_err(|error| log::warn!("{error}: no process can take this disk over")).ok()
}

/// Opens the disk: that of the process that has died, or a new one with this journal.
///
/// # Errors
/// Those of [`Disk::open`] and [`Disk::take_over`].
pub(super) fn open_disk(
    config: &MountConfig,
    options: &DiskOptions,
    inherited: Option<&mut Inherited>,
    journal: Option<&MemoryFile>,
) -> Result<Disk> {
    if let Some(image) = inherited.and_then(|inherited| inherited.image.take()) {
        return Disk::take_over(&config.image, options, image);
    }
    let opened = match journal {
        None => Disk::open(&config.image, options),
        Some(journal) => {
            let shared = MemoryFile::of_descriptor(duplicate(journal.as_fd())?)?;
            Disk::open_journaled(&config.image, options, Arc::new(shared))
        }
    };
    opened.map_err(|error| client::explain_busy(error, &config.image, "unmount it first", "umount"))
}

fn duplicate(descriptor: BorrowedFd<'_>) -> Result<OwnedFd> {
    descriptor.try_clone_to_owned().context(|| "duplicating a descriptor")
}

/// Returns the transport: that of the options, or the one of the session that is taken over.
pub(super) fn transport(config: &MountConfig, inherited: &Option<Inherited>) -> Transport {
    match inherited {
        Some(inherited) if inherited.negotiated.over_io_uring => Transport::UringAgain,
        Some(_) => Transport::Dev,
        None => config.transport,
    }
}

/// Answers INIT, and gives the keeper what a successor needs. A disk that no successor can take
/// over is served all the same.
///
/// # Errors
/// Those of [`Prepared::connect`].
pub(super) fn connect(
    config: &MountConfig,
    prepared: Prepared,
    device: OwnedFd,
    keeper: &Keeper,
    image: BorrowedFd<'_>,
    journal: Option<BorrowedFd<'_>>,
    survival: &Survival,
) -> Result<Connected> {
    let attributes = prepared.attributes();
    keep_attributes(&prepared, keeper);
    let connected = prepared.connect(device)?;
    // Without a journal, a successor would not know what was answered to writers.
    let image = match journal {
        Some(journal) => Some((image, journal)),
        None if config.read_only => None,
        None => {
            survival.is_impossible("the host had no memory for the journal");
            return Ok(connected);
        }
    };
    let kept = connected
        .negotiated()
        .check_takeover()
        .and_then(|()| keeper.keep(image, &connected, attributes));
    match kept {
        Ok(()) => survival.is_possible(),
        Err(error) => {
            let obstacle = survival::obstacle(connected.negotiated());
            survival.is_impossible(obstacle.map_or_else(|| error.to_string(), str::to_owned));
            log::info!("if this process is killed, no other one takes the disk over: {error}");
        }
    }
    Ok(connected)
}

/// Continues the session of the process that has died.
///
/// # Errors
/// Those of [`Prepared::take_over`].
pub(super) fn take_over(
    prepared: Prepared,
    inherited: Inherited,
    keeper: &Keeper,
    survival: &Survival,
) -> Result<Connected> {
    keep_attributes(&prepared, keeper);
    // The keeper has what the next one needs.
    survival.is_possible();
    if let Some(attributes) = &inherited.attributes {
        prepared.show(attributes);
    }
    prepared.take_over(inherited.devices, inherited.requests, &inherited.negotiated)
}

/// How long a chmod waits until the keeper knows of it.
const PATIENCE: Duration = Duration::from_millis(200);

/// Tells the keeper of each change of the attributes, on a thread of its own. The thread that
/// serves the chmod waits for that, but not for a keeper that is stopped or unmounts: if this
/// process is killed then, its successor may show the attributes before the change.
fn keep_attributes(prepared: &Prepared, keeper: &Keeper) {
    let (sender, changes) = crossbeam_channel::unbounded::<(ShownAttributes, Sender<()>)>();
    let keep = keeper.attributes_keeper();
    let body = move || {
        for (attributes, kept) in changes {
            if let Err(error) = keep(&attributes) {
                log::debug!("attributes: {error}");
            }
            let _ = kept.try_send(());
        }
    };
    match thread::Builder::new().name("attributes".into()).spawn(body) {
        Ok(_detached) => prepared.on_attributes(move |shown| {
            let (kept, is_kept) = crossbeam_channel::bounded(1);
            if sender.send((*shown, kept)).is_ok() {
                let _ = is_kept.recv_timeout(PATIENCE);
            }
        }),
        Err(error) => log::warn!("starting a thread: {error}"),
    }
}
