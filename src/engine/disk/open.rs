//! Opening a disk: the overlay and its chain, their locks, and the leaks of a crash.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::base_note::warn_of_changed_base;
use super::{Disk, DiskOptions, Overlay};
use crate::chain::{Chain, Namer};
use host::error::Context;
use host::storage::{Access, FileStorage, SharedBytes, Sidecar};
use host::{Error, ErrorKind, Result};
use qcow2::image::{Image, ImageReader, LeakSearch, distrust};
use remote::pin::NamedPin;

/// Limit of the search for the end of an image on a block device. The refcount table of a hostile
/// image can name one block of zeros a million times.
const END_TIME: Duration = Duration::from_secs(1);

/// What a process that has died leaves to its successor, in the hands of a third process.
#[derive(Debug)]
pub struct Inheritance {
    /// What [`Disk::descriptor`] has returned. It has the locks of the overlay.
    pub image: OwnedFd,
    /// Another open file description of the overlay, which was opened before the first write and
    /// was not synchronised since: it still knows of a write-back that has failed (P7).
    pub witness: File,
    /// The memory of the journal.
    pub journal: Arc<dyn SharedBytes>,
}

/// How the overlay is opened.
enum Opening {
    /// By its name, with a journal in this memory if there is one.
    ByName(Option<Arc<dyn SharedBytes>>),
    /// From a process that has died.
    TakeOver(Inheritance),
}

impl Disk {
    /// Opens the overlay and its chain, and locks the files. Changes nothing unless all of them
    /// open.
    ///
    /// # Errors
    /// Any error of any of the files, in one line.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<Disk> {
        Disk::open_as(path, options, Opening::ByName(None))
    }

    /// Opens a disk as [`Disk::open`] does, with a journal in `journal`, from which a successor can
    /// take the disk over. A disk that is opened read-only needs no journal, and writes none.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open_journaled(
        path: &Path,
        options: &DiskOptions,
        journal: Arc<dyn SharedBytes>,
    ) -> Result<Disk> {
        Disk::open_as(path, options, Opening::ByName(Some(journal)))
    }

    /// Opens the disk of a process that has died while its guest lives on (P17). The overlay is not
    /// looked up by its name; backing files are. Neither are leaks searched for, which is done
    /// later ([`Disk::search_step`]), nor is the host's cache of the overlay dropped: the guest
    /// waits, and the cache holds its last writes.
    ///
    /// # Errors
    /// As [`Disk::open`]; [`ErrorKind::Corrupt`] if the journal does not fit the overlay.
    pub fn take_over(path: &Path, options: &DiskOptions, from: Inheritance) -> Result<Disk> {
        Disk::open_as(path, options, Opening::TakeOver(from))
    }

    /// Returns a duplicate of the descriptor of the overlay, for [`Inheritance::image`].
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn descriptor(&self) -> Result<OwnedFd> {
        let file = self.reader().storage();
        file.descriptor().context(|| self.path.display().to_string())
    }

    fn open_as(path: &Path, options: &DiskOptions, opening: Opening) -> Result<Disk> {
        let path = std::path::absolute(path).context(|| path.display().to_string())?;
        let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let is_taken_over = matches!(opening, Opening::TakeOver(_));
        let (file, journal, witness) = match opening {
            Opening::ByName(journal) => (FileStorage::open(&path, access)?, journal, None),
            Opening::TakeOver(Inheritance { image, witness, journal }) => {
                let file = FileStorage::of_descriptor(&path, access, image)?;
                (file, Some(journal), Some(witness))
            }
        };
        let file = Arc::new(file);
        let owner = file.owner();
        let mut gate = options.gate.clone();
        gate.taken.push(file.identity());
        let file_id = file.file_id().context(|| path.display().to_string())?;
        let sidecar: Arc<dyn Sidecar> = Arc::clone(&file) as Arc<dyn Sidecar>;
        let overlay = if options.read_only && is_taken_over {
            ImageReader::open(file).map(|reader| Overlay::ReadOnly(Box::new(reader)))
        } else if options.read_only {
            ImageReader::open_locked(file, &path).map(|reader| Overlay::ReadOnly(Box::new(reader)))
        } else {
            let image = match (journal, witness) {
                (Some(journal), Some(witness)) => {
                    Image::take_over(file, journal, || witness.sync_data())
                }
                (journal, _) => {
                    let checked = if options.full_check { distrust(&*file) } else { Ok(()) };
                    checked.and_then(|()| Image::open(file)).and_then(|image| match journal {
                        Some(journal) => image.with_journal(journal),
                        None => Ok(image),
                    })
                }
            };
            image.map(|image| Overlay::Writable(Box::new(image))).map_err(|error| match error.kind() {
                ErrorKind::Corrupt => {
                    Error::new(ErrorKind::Corrupt, format!("{error}: repair a copy with qemu-img check -r all, or mount with --read-only"))
                }
                _ => error,
            })
        };
        let overlay = overlay.context(|| path.display().to_string())?;
        overlay.reader().header().pins().iter().for_each(|pins| gate.add_pins(pins));
        let chain = match overlay.reader().backing() {
            Some(reference) => {
                Some(Chain::open(&reference, Namer::Above { path: &path, owner }, &gate)?)
            }
            None => None,
        };
        let end_at_open = match overlay.reader().storage().allocated_size() {
            Ok(0) => overlay.reader().end(Instant::now() + END_TIME),
            _ => 0,
        };
        let disk = Disk {
            file_id,
            end_at_open,
            ..Disk::assemble(path, overlay, sidecar, chain, options.copy_on_read, options.reserve)
        };
        if is_taken_over {
            disk.touches.taken_over();
        }
        if let Overlay::Writable(image) = &disk.overlay {
            let what = || disk.path.display().to_string();
            let search = match options.full_check {
                _ if is_taken_over => LeakSearch::Later,
                true => LeakSearch::Always,
                false => LeakSearch::AfterCrash,
            };
            let clusters = image.start_writing(search).context(what)?;
            if clusters > 0 {
                let bytes = clusters * disk.cluster_size();
                log::info!(
                    "{}: {clusters} leaked clusters ({bytes} bytes) were given back",
                    what()
                );
            }
            if let Some(chain) = disk.chain() {
                warn_of_changed_base(&disk.path, &*disk.sidecar, &chain).context(what)?;
                // An image that accepts no writes keeps the pins that it has.
                if image.is_usable() {
                    pin_remote_layers(image, &gate.pins, &chain.pins()).context(what)?;
                }
            }
        }
        Ok(disk)
    }
}

/// Stores the pins of remote layers in the header, unless they are there already.
fn pin_remote_layers(image: &Image, known: &[NamedPin], now: &[NamedPin]) -> Result<()> {
    if now.iter().all(|pin| known.contains(pin)) {
        return Ok(());
    }
    image.set_pins(&remote::pin::encode(now))
}
