//! A serving process whose keeper has died: it serves on, and gives its descriptors to a new one.
//!
//! ```text
//!  new keeper (estate.rs)                     serving process, thread "keeper-end"
//!   ├─ connects to PID.keeper ───────────────▶│ offer: an orphan
//!   ├─ arguments (none) ─────────────────────▶│
//!   │◀─ image, journal, devices, jobs ────────┤
//!   ├─ "hand over" ──────────────────────────▶│ flush, status HANDED_OVER
//!   │◀─ end of the connection, or the reason ─┤ (if it cannot flush, it keeps the disk)
//! ```
//! The keeper has given this process a duplicate of the socket on which it listens, so the socket
//! outlives it.
//!
//! **Touches:** that socket. **Never:** gives anything to another user than its own and root.
//! **Locks:** one leaf lock, held for moments by the threads that start the process, by the thread
//! "keeper-end" and by the main thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;

use super::estate::Bequest;
use super::upgrade::{self, LOOK};
use super::wire::{Heirloom, LONGEST};
use export::ShownAttributes;
use host::error::Context;
use host::{Result, packet};

/// What a serving process needs once its keeper has died.
#[derive(Debug, Default)]
pub(super) struct Orphan(Mutex<Belongings>);

#[derive(Debug, Default)]
struct Belongings {
    listener: Option<OwnedFd>,
    is_kept: bool,
    descriptors: Vec<(Heirloom, OwnedFd)>,
    /// The jobs and the attributes, as they were told last.
    jobs: Option<String>,
    attributes: Option<ShownAttributes>,
    /// Takes the reason why the disk is not handed over to the keeper that asks now.
    refusal: Option<Sender<String>>,
    /// The connection of that keeper.
    asks: Option<OwnedFd>,
}

impl Orphan {
    /// Takes a duplicate of a descriptor that the keeper has.
    pub(super) fn has(&self, what: Heirloom, descriptor: impl AsFd) {
        // Without it no keeper can be attached, and the disk is served all the same.
        if let Ok(descriptor) = descriptor.as_fd().try_clone_to_owned() {
            self.0.lock().descriptors.push((what, descriptor));
        }
    }

    /// Takes the socket on which the keeper listens.
    pub(super) fn listens(&self, listener: Option<OwnedFd>) {
        self.0.lock().listener = listener;
    }

    /// Remembers the jobs, which the keeper is told as well.
    pub(super) fn has_jobs(&self, jobs: &str) {
        self.0.lock().jobs = Some(jobs.to_owned());
    }

    /// Remembers the attributes of the disk's file.
    pub(super) fn has_attributes(&self, attributes: &ShownAttributes) {
        self.0.lock().attributes = Some(*attributes);
    }

    /// Whether a keeper has what a successor needs.
    pub(super) fn is_kept(&self) -> bool {
        self.0.lock().is_kept
    }

    /// A keeper has what a successor needs.
    pub(super) fn kept(&self) {
        self.0.lock().is_kept = true;
    }

    /// Whether a new keeper waits for the disk.
    pub(super) fn is_asked(&self) -> bool {
        self.0.lock().asks.as_ref().is_some_and(|keeper| !upgrade::has_gone(keeper))
    }

    /// Says why the disk is not handed over. Returns false if no new keeper has asked for it.
    pub(super) fn refuse(&self, why: &str) -> bool {
        let refusal = self.0.lock().refusal.take();
        refusal.is_some_and(|refusal| refusal.send(why.to_owned()).is_ok())
    }

    /// Answers new keepers until the process ends. `hand_over` asks the main thread to end it. Must
    /// be called once the keeper has died: it would otherwise answer in its place.
    pub(super) fn wait_for_a_keeper(&self, hand_over: impl Fn()) {
        let Some(listener) = self.0.lock().listener.take() else { return };
        loop {
            let answered =
                upgrade::accept(&listener).map(|keeper| self.answer(&keeper, &hand_over));
            match answered {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::debug!("a new keeper: {error}"),
                Err(_) => thread::sleep(LOOK),
            }
        }
    }

    /// Answers one new keeper. Returns if the disk stays here.
    fn answer(&self, keeper: &OwnedFd, hand_over: &impl Fn()) -> Result<()> {
        if !upgrade::greet_as_orphan(keeper)? {
            return Ok(());
        }
        // Copied, so that no thread waits for the lock while this one sends.
        let (descriptors, jobs, attributes) = {
            let belongings = self.0.lock();
            let copies = belongings.descriptors.iter();
            let copies = copies.map(|(what, file)| Ok((*what, file.try_clone()?)));
            (
                copies.collect::<io::Result<Vec<_>>>().context(|| "a descriptor")?,
                belongings.jobs.clone(),
                belongings.attributes,
            )
        };
        for (what, descriptor) in &descriptors {
            let message = Bequest::Descriptor(*what);
            packet::send(keeper, &message, LONGEST, &[descriptor.as_fd()])?;
        }
        packet::send(keeper, &Bequest::Latest { jobs, attributes }, LONGEST, &[])?;
        packet::send(keeper, &Bequest::All, LONGEST, &[])?;
        if packet::receive::<String>(keeper, LONGEST)?.is_none() {
            return Ok(());
        }
        let (sender, refusal) = bounded(1);
        {
            let mut belongings = self.0.lock();
            belongings.refusal = Some(sender);
            belongings.asks = keeper.try_clone().ok();
        }
        hand_over();
        // If the disk is handed over, the process ends while this thread waits.
        let why = refusal.recv().unwrap_or_else(|_| "another keeper has asked".to_owned());
        self.0.lock().asks = None;
        packet::send(keeper, &Bequest::Refused(why), LONGEST, &[])
    }
}
