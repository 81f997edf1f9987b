//! What the last process has left of its stream: read, and compared with the file and the chain, while
//! files can be opened still.

use super::note::{Note, Place};
use crate::chain::Gate;
use crate::disk::Disk;
use crate::format::printable;
use crate::{Error, Result};

/// What was found beside an image, for [`super::Streams::resume`].
#[derive(Debug)]
pub struct Interrupted(pub(super) Seen);

#[derive(Debug)]
pub(super) enum Seen {
    Nothing,
    /// A note of this very file, whose names pass the gate.
    Note(Box<Note>),
    /// One that this program has not written for this file, and why that is known.
    Foreign(String),
    Unreadable(Error),
}

impl Interrupted {
    /// Reads the note beside the image of `disk`. `gate` is the one through which its chain was opened.
    pub fn read(disk: &Disk, gate: &Gate) -> Interrupted {
        Interrupted(match disk.stream_note() {
            Ok(None) => Seen::Nothing,
            Ok(Some(text)) => Seen::judge(&text, disk, gate),
            Err(error) if error.errno() == Some(rustix::io::Errno::RANGE.raw_os_error()) => Seen::Foreign("it is too long".into()),
            Err(error) => Seen::Unreadable(error),
        })
    }

    /// What `text` beside the image of `disk` would be.
    #[cfg(test)]
    pub(super) fn of(text: &[u8], disk: &Disk) -> Interrupted {
        Interrupted(Seen::judge(text, disk, &Gate::default()))
    }
}

impl Seen {
    fn judge(text: &[u8], disk: &Disk, gate: &Gate) -> Seen {
        let note = match Note::parse(text) {
            Ok(note) => note,
            Err(error) => return Seen::Foreign(error.to_string()),
        };
        if note.file.as_ref() != disk.file_id() {
            let text = "it was written for another file, of which this one is a copy, or for this one on another file system; \
                        start the stream anew if it is wanted";
            return Seen::Foreign(text.into());
        }
        match names_its_base(&note, disk, gate) {
            Ok(true) => Seen::Note(Box::new(note)),
            Ok(false) => {
                let name = note.backing_file.as_deref().unwrap_or_default();
                Seen::Foreign(format!("the name that it would give the base, \"{}\", is that of another file", printable(name)))
            }
            Err(error) => Seen::Foreign(format!("the name that it would give the base: {error}")),
        }
    }
}

/// Whether the name that the note would write into the header leads to the base that stays. True where
/// nothing would be written.
fn names_its_base(note: &Note, disk: &Disk, gate: &Gate) -> Result<bool> {
    let Some(name) = &note.backing_file else { return Ok(true) };
    match note.place(&disk.info()?.backing) {
        Place::Depth(Some(depth)) => disk.names_layer(name, depth, gate),
        Place::Depth(None) | Place::Over | Place::Elsewhere => Ok(true),
    }
}
