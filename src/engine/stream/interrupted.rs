//! The note that the last process left of its stream: read, and compared with the file and the
//! chain, while files can still be opened.

use super::note::{BasePlace, Note};
use crate::chain::Gate;
use crate::disk::Disk;
use host::{Error, Result};
use qcow2::format::printable;

/// The result of looking for a note beside an image, for [`super::Streams::resume`].
#[derive(Debug)]
pub struct Interrupted(pub(super) NoteState);

#[derive(Debug)]
pub(super) enum NoteState {
    Nothing,
    /// A note of this file, whose names pass the gate.
    Note(Box<Note>),
    /// A note that this program did not write for this file, and the reason for that verdict.
    Foreign(String),
    Unreadable(Error),
}

impl Interrupted {
    /// Reads the note beside the image of `disk`. `gate` is the gate through which the chain of the
    /// disk was opened.
    pub fn read(disk: &Disk, gate: &Gate) -> Interrupted {
        Interrupted(match disk.stream_note() {
            Ok(None) => NoteState::Nothing,
            Ok(Some(text)) => NoteState::judge(&text, disk, gate),
            Err(error) if error.errno() == Some(rustix::io::Errno::RANGE.raw_os_error()) => {
                NoteState::Foreign("it is too long".into())
            }
            Err(error) => NoteState::Unreadable(error),
        })
    }

    /// Returns the result for a note of the given `text` beside the image of `disk`.
    #[cfg(test)]
    pub(super) fn of(text: &[u8], disk: &Disk) -> Interrupted {
        Interrupted(NoteState::judge(text, disk, &Gate::default()))
    }
}

impl NoteState {
    fn judge(text: &[u8], disk: &Disk, gate: &Gate) -> NoteState {
        let note = match Note::parse(text) {
            Ok(note) => note,
            Err(error) => return NoteState::Foreign(error.to_string()),
        };
        if note.file.as_ref() != disk.file_id() {
            let text = "it was written for another file, of which this one is a copy, or for this one on another file system; \
                        start the stream anew if it is wanted";
            return NoteState::Foreign(text.into());
        }
        let depth = || match note.place(&disk.info()?.backing) {
            BasePlace::Depth(depth) => Ok(depth),
            // Nothing would be written.
            BasePlace::Over | BasePlace::Elsewhere => Ok(None),
        };
        let named = match &note.backing_file {
            Some(_) => depth().and_then(|depth| names_its_base(&note, depth, disk, gate)),
            None => Ok(true),
        };
        match named {
            Ok(true) => NoteState::Note(Box::new(note)),
            Ok(false) => {
                let name = note.backing_file.as_deref().unwrap_or_default();
                NoteState::Foreign(format!(
                    "the name that it would give the base, \"{}\", is that of another file",
                    printable(name)
                ))
            }
            Err(error) => {
                NoteState::Foreign(format!("the name that it would give the base: {error}"))
            }
        }
    }
}

/// Whether the name that the note would write into the header leads to the base that stays, which
/// is the layer at `depth`. `true` if nothing would be written.
pub(super) fn names_its_base(
    note: &Note,
    depth: Option<usize>,
    disk: &Disk,
    gate: &Gate,
) -> Result<bool> {
    match (&note.backing_file, depth) {
        (Some(name), Some(depth)) => disk.names_layer(name, depth, gate),
        _ => Ok(true),
    }
}
