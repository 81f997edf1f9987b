//! What is written beside the image while a stream runs, so that the next mount can start it again. Pure: options ⇄ text.
//!
//! The text is JSON, in the extended attribute `user.cordisk.stream` of the overlay. It says what was *asked for*, not what was done: a stream that is
//! resumed begins at the start of the disk and passes quickly over what is there already, so nothing depends on how far a killed one had come.
//!
//! ```text
//! job is created ─► note is written ─► first chunk is copied … chain is cut, durably ─► note is removed ─► users are told
//! ```
//! **Invariants:** there is no copied chunk without a note, and no news of an end with one, where the host can keep notes. So a kill at any moment
//! leaves a note exactly if the job had not ended, but for the moment between the cut of the chain and the removal: then nothing is left below, and
//! the note is removed without a job. The host writes the note to its disk when it likes, at the latest with the next commit of the image's
//! metadata: a power cut may lose a note that is younger (the stream is not resumed), or bring back that of a job that was cancelled or has failed
//! just before (it is resumed); the guest's bytes are those of the disk in either case.
//!
//! A note may come from anywhere: copies of an image carry attributes (`cp -a`, `rsync -X`, tar), and a file from elsewhere can come with a crafted
//! one. It is read as strictly as an image: its length is bounded, no member may be missing or unknown, and every value is one that a client could
//! have asked for. It names the file that it was written beside ([`FileId`]) and the backing file that stood in the header: beside another file it is
//! not obeyed and removed, and with another backing file it is not obeyed. The name that it would write into the header has to pass the gate again
//! and to lead to the base that stays. What is left to a note that names the right file is what its writer may do to the image anyway. Whatever is
//! wrong with a note, the disk is served without it.

use serde::{Deserialize, Serialize};

use super::plan::{FinishBy, Plan};
use super::{Priority, StreamOptions};
use crate::chain::LayerInfo;
use crate::disk::{FileId, LONGEST_STREAM_NOTE};
use crate::job::{self, OnError};
use crate::{Error, ErrorKind, Result};

/// The format of the text; another one is not read.
const VERSION: u32 = 2;
/// Longest name of a job.
const LONGEST_ID: usize = 128;
/// Longest name of a backing file in a header.
const LONGEST_BACKING_FILE: usize = 1023;

const ON_ERROR: [(OnError, &str); 5] = [
    (OnError::Report, "report"),
    (OnError::Ignore, "ignore"),
    (OnError::Enospc, "enospc"),
    (OnError::Stop, "stop"),
    (OnError::Auto, "auto"),
];

/// A stream that is to be started again.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Note {
    /// The overlay's file.
    pub file: Option<FileId>,
    /// The name of the backing file in the header of the overlay.
    pub backing: Option<String>,
    /// Only where it is not the device's.
    pub job_id: Option<String>,
    /// What stays below; `None` where nothing does.
    pub base: Option<Base>,
    /// Bytes per second, as last set by a user; 0 is unlimited. Of no meaning with a plan.
    pub speed: u64,
    pub plan: Option<Plan>,
    pub on_error: OnError,
    pub auto_finalize: bool,
    pub auto_dismiss: bool,
    pub backing_file: Option<String>,
    pub request: String,
    /// A user has paused it.
    pub paused: bool,
    /// About how far it has come, for people.
    pub offset: u64,
    /// Bytes there are.
    pub len: u64,
}

/// The first layer that stays below.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Base {
    /// As the header of the layer above calls it.
    name: String,
    /// The file that was opened.
    path: String,
    /// How many layers stay, with this one.
    layers: usize,
}

/// Where a noted stream stands in the chain of today.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    /// So many layers are to be copied up; `None` is all of them.
    Depth(Option<usize>),
    /// It had done all it was to do.
    Over,
    /// The chain is another one.
    Elsewhere,
}

/// The text, member by member.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Text {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<FileId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    job_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<Base>,
    speed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline: Option<i64>,
    on_error: String,
    auto_finalize: bool,
    auto_dismiss: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<String>,
    request: String,
    paused: bool,
    offset: u64,
    len: u64,
}

impl Base {
    /// Of a stream that copies `depth` of `layers` up; `None` where nothing stays.
    pub fn below(layers: &[LayerInfo], depth: usize) -> Option<Base> {
        let base = layers.get(depth)?;
        let (name, path) = (base.reference.name.clone(), base.path.display().to_string());
        Some(Base { name, path, layers: layers.len() - depth })
    }

    /// Whether a layer is this one: by name, so that a chain may be moved as a whole, or by path, which is what a cut chain is named by.
    fn is(&self, layer: &LayerInfo) -> bool {
        layer.reference.name == self.name || layer.path.display().to_string() == self.path
    }
}

impl Note {
    /// What the next mount starts, in words for the attribute.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] where it is too long to be kept.
    pub fn to_text(&self) -> Result<String> {
        let with = |request: &str| {
            let (schedule, finish_by) = match &self.plan {
                Some(Plan::Schedule(schedule)) => (Some(schedule.to_string()), None),
                Some(Plan::FinishBy(finish_by)) => (None, Some(finish_by)),
                None => (None, None),
            };
            let text = Text {
                version: VERSION,
                file: self.file.clone(),
                backing: self.backing.clone(),
                job_id: self.job_id.clone(),
                base: self.base.clone(),
                speed: self.speed,
                schedule,
                finish_by: finish_by.map(|finish_by| finish_by.at.to_string()),
                deadline: finish_by.and_then(|finish_by| finish_by.deadline),
                on_error: ON_ERROR.iter().find(|(known, _)| *known == self.on_error).map_or("report", |(_, word)| word).to_string(),
                auto_finalize: self.auto_finalize,
                auto_dismiss: self.auto_dismiss,
                backing_file: self.backing_file.clone(),
                request: request.to_string(),
                paused: self.paused,
                offset: self.offset,
                len: self.len,
            };
            serde_json::to_string(&text).map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "the note of a stream", error))
        };
        let whole = with(&self.request)?;
        // The words of the client are shown to people, and nothing else is done with them.
        let text = if whole.len() <= LONGEST_STREAM_NOTE { whole } else { with("")? };
        if text.len() > LONGEST_STREAM_NOTE {
            return Err(Error::new(ErrorKind::InvalidArgument, "its arguments are too long to be noted"));
        }
        Ok(text)
    }

    /// Reads what [`Note::to_text`] has written.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for anything else.
    pub fn parse(text: &[u8]) -> Result<Note> {
        let wrong = |why: &str| Error::new(ErrorKind::InvalidArgument, why.to_string());
        if text.len() > LONGEST_STREAM_NOTE {
            return Err(wrong("too long"));
        }
        let text: Text = serde_json::from_slice(text).map_err(|error| wrong(&error.to_string()))?;
        if text.version != VERSION {
            return Err(wrong("of another version"));
        }
        if text.job_id.as_deref().is_some_and(|id| id.len() > LONGEST_ID || !job::is_valid_id(id)) {
            return Err(wrong("job-id is none"));
        }
        if text.speed > i64::MAX as u64 {
            return Err(wrong("speed is too high"));
        }
        let plan = match (text.schedule, text.finish_by, text.deadline) {
            (None, None, None) => None,
            (Some(schedule), None, None) => Some(Plan::Schedule(schedule.parse().map_err(|why: String| wrong(&why))?)),
            (None, Some(at), Some(deadline)) => {
                let at = at.parse().map_err(|why: String| wrong(&why))?;
                jiff::Timestamp::from_second(deadline).map_err(|_| wrong("deadline is no time"))?;
                Some(Plan::FinishBy(FinishBy { at, deadline: Some(deadline) }))
            }
            _ => return Err(wrong("schedule, finish-by and deadline do not go together")),
        };
        let on_error = ON_ERROR.iter().find(|(_, word)| *word == text.on_error).ok_or_else(|| wrong("on-error is none"))?.0;
        let backing_file = text.backing_file;
        if backing_file.as_deref().is_some_and(|name| name.len() > LONGEST_BACKING_FILE || name.contains(char::is_control)) {
            return Err(wrong("backing-file is no name"));
        }
        if text.base.is_none() && backing_file.is_some() {
            return Err(wrong("backing-file without a base"));
        }
        if text.base.as_ref().is_some_and(|base| base.layers == 0) {
            return Err(wrong("a base that does not stay"));
        }
        Ok(Note {
            file: text.file,
            backing: text.backing,
            job_id: text.job_id,
            base: text.base,
            speed: text.speed,
            plan,
            on_error,
            auto_finalize: text.auto_finalize,
            auto_dismiss: text.auto_dismiss,
            backing_file,
            request: text.request,
            paused: text.paused,
            offset: text.offset,
            len: text.len,
        })
    }

    /// Where it stands in the chain of today.
    pub fn place(&self, layers: &[LayerInfo]) -> Place {
        let Some(base) = &self.base else {
            return if layers.is_empty() { Place::Over } else { Place::Depth(None) };
        };
        // Layers are counted from the lowest, whose number does not change when upper ones are cut away.
        let Some(depth) = layers.len().checked_sub(base.layers) else { return Place::Elsewhere };
        let renamed = depth == 0 && self.backing_file.as_deref() == layers.first().map(|layer| layer.reference.name.as_str());
        match layers.get(depth).is_some_and(|layer| base.is(layer)) || renamed {
            true if depth == 0 => Place::Over,
            true => Place::Depth(Some(depth)),
            false => Place::Elsewhere,
        }
    }

    /// How far it had come, in percent.
    pub fn percent(&self) -> u64 {
        let percent = u128::from(self.offset) * 100 / u128::from(self.len.max(1));
        u64::try_from(percent).unwrap_or(100).min(100)
    }

    /// What starts it again.
    pub fn into_options(self, depth: Option<usize>, device: &str, priority: Priority) -> StreamOptions {
        StreamOptions {
            job_id: self.job_id.unwrap_or_else(|| device.to_string()),
            depth,
            speed: self.speed,
            plan: self.plan,
            paused: self.paused,
            on_error: self.on_error,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            backing_file: self.backing_file,
            request: self.request,
            priority,
        }
    }
}

#[cfg(test)]
mod tests;
