//! The note that is stored beside the image while a stream runs, so that the next mount can start
//! it again. Pure: options ⇄ text.
//!
//! The text is JSON, in the extended attribute `user.cordisk.stream` of the overlay. It holds the
//! *arguments* of the stream, not its result. A resumed stream begins at the start of the disk and
//! quickly passes over clusters that are already local. So it does not depend on the offset at
//! which the old one was killed.
//!
//! ```text
//! job is created ─► note is written ─► first chunk is copied ─► …
//!                   … ─► chain is cut, durably ─► note is removed ─► end is reported
//! ```
//! **Invariants:** where the host can keep notes, no chunk is copied before the note is written,
//! and the note is removed before the end of the job is reported. So a kill leaves a note exactly
//! if the job had not ended. The one exception is a kill between the cut of the chain and the
//! removal of the note: then nothing is left to copy, and the next mount removes the note without
//! starting a job.
//!
//! The host writes the note to its disk at some later time, at the latest with the next commit of
//! the image's metadata. A power cut may lose a younger note (the stream is not resumed), or bring
//! back the note of a job that was cancelled or failed just before (the stream is resumed). The
//! guest's data is correct in both cases.
//!
//! A note is untrusted input. Copies of an image carry attributes (`cp -a`, `rsync -X`, tar), and
//! an image from elsewhere can come with a crafted note. The parser is as strict as that of the
//! image: the length is bounded, no member may be missing or unknown, and every value must be one
//! that a client could have requested. The note names the file that it was written for ([`FileId`])
//! and the backing file in its header. A note of another file is not obeyed and is removed; a note
//! with another backing file is not obeyed, but stays. The name that the note would write into the
//! header must pass the gate again and must lead to the base that stays. A crafted note that passes
//! these checks can do no more than any writer of the image could do anyway. If anything is wrong
//! with a note, the disk is served without it.

use serde::{Deserialize, Serialize};

use super::plan::{FinishBy, Plan};
use super::{Priority, StreamOptions};
use crate::chain::LayerInfo;
use crate::disk::{FileId, LONGEST_STREAM_NOTE};
use crate::job::{self, OnError};
use host::{Error, ErrorKind, Result};

/// Version of the text; a note of another version is refused.
const VERSION: u32 = 2;
/// Longest id of a job, in bytes.
const LONGEST_ID: usize = 128;
/// Longest name of a backing file in a header, in bytes.
const LONGEST_BACKING_FILE: usize = 1023;

const ON_ERROR: [(OnError, &str); 5] = [
    (OnError::Report, "report"),
    (OnError::Ignore, "ignore"),
    (OnError::Enospc, "enospc"),
    (OnError::Stop, "stop"),
    (OnError::Auto, "auto"),
];

/// The arguments of a stream to start again.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Note {
    /// Identity of the overlay's file.
    pub file: Option<FileId>,
    /// Name of the backing file in the header of the overlay.
    pub backing: Option<String>,
    /// `None` if the id is the name of the device.
    pub job_id: Option<String>,
    /// First layer that is not copied up; `None` if all layers are.
    pub base: Option<NotedBase>,
    /// Bytes per second, as last set by a user; 0 is unlimited. Ignored if there is a plan.
    pub speed: u64,
    pub plan: Option<Plan>,
    pub on_error: OnError,
    pub auto_finalize: bool,
    pub auto_dismiss: bool,
    pub backing_file: Option<String>,
    pub request: String,
    /// A user has paused the job.
    pub paused: bool,
    /// Approximate offset of the stream in bytes, for messages only.
    pub offset: u64,
    /// Total bytes of the stream.
    pub len: u64,
}

/// The first layer that is not copied up.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct NotedBase {
    /// Name of the layer in the header of the layer above.
    name: String,
    /// Path of the file that was opened.
    path: String,
    /// Number of layers that stay, including this one.
    layers: usize,
}

/// Position of a noted stream in the current chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum BasePlace {
    /// Number of layers to copy up; `None` is all of them.
    Depth(Option<usize>),
    /// The stream had completed all of its work.
    Over,
    /// The current chain is not the one that the note describes.
    Elsewhere,
}

/// The members of the JSON object.
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
    base: Option<NotedBase>,
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

impl NotedBase {
    /// Returns the base of a stream that copies the upper `depth` of `layers` up; `None` if no
    /// layer stays.
    pub fn below(layers: &[LayerInfo], depth: usize) -> Option<NotedBase> {
        let base = layers.get(depth)?;
        let (name, path) = (base.reference.name.clone(), base.path.display().to_string());
        Some(NotedBase { name, path, layers: layers.len() - depth })
    }

    /// Whether `layer` is this base, by name or by path. The name still matches after the whole
    /// chain was moved. The path matches after the chain was cut, because the header of a cut chain
    /// may name its base by path.
    fn is(&self, layer: &LayerInfo) -> bool {
        layer.reference.name == self.name || layer.path.display().to_string() == self.path
    }
}

impl Note {
    /// Returns the text for the attribute.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the text is longer than [`LONGEST_STREAM_NOTE`].
    pub fn to_text(&self) -> Result<String> {
        let whole = self.text_with(&self.request)?;
        // A request that is too long is left out: it is only shown to users.
        let text = if whole.len() <= LONGEST_STREAM_NOTE { whole } else { self.text_with("")? };
        if text.len() > LONGEST_STREAM_NOTE {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "its arguments are too long to be noted",
            ));
        }
        Ok(text)
    }

    /// Returns the text by which another process of the same mount continues the stream: without
    /// the id and the request, which the job has itself, and of any length.
    ///
    /// # Errors
    /// A value that JSON cannot hold.
    pub fn recipe(&self) -> Result<String> {
        Note { job_id: None, ..self.clone() }.text_with("")
    }

    fn text_with(&self, request: &str) -> Result<String> {
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
            on_error: ON_ERROR
                .iter()
                .find(|(known, _)| *known == self.on_error)
                .map_or("report", |(_, word)| word)
                .to_string(),
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            backing_file: self.backing_file.clone(),
            request: request.to_string(),
            paused: self.paused,
            offset: self.offset,
            len: self.len,
        };
        serde_json::to_string(&text)
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "the note of a stream", error))
    }

    /// Parses the text of [`Note::to_text`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for any other text.
    pub fn parse(text: &[u8]) -> Result<Note> {
        if text.len() > LONGEST_STREAM_NOTE {
            return Err(Error::new(ErrorKind::InvalidArgument, "too long"));
        }
        Note::parse_recipe(text)
    }

    /// Parses the text of [`Note::recipe`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for any other text.
    pub fn parse_recipe(text: &[u8]) -> Result<Note> {
        let wrong = |why: &str| Error::new(ErrorKind::InvalidArgument, why.to_string());
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
            (Some(schedule), None, None) => {
                Some(Plan::Schedule(schedule.parse().map_err(|why: String| wrong(&why))?))
            }
            (None, Some(at), Some(deadline)) => {
                let at = at.parse().map_err(|why: String| wrong(&why))?;
                jiff::Timestamp::from_second(deadline).map_err(|_| wrong("deadline is no time"))?;
                Some(Plan::FinishBy(FinishBy { at, deadline: Some(deadline) }))
            }
            _ => return Err(wrong("schedule, finish-by and deadline do not go together")),
        };
        let on_error = ON_ERROR
            .iter()
            .find(|(_, word)| *word == text.on_error)
            .ok_or_else(|| wrong("on-error is none"))?
            .0;
        let backing_file = text.backing_file;
        if backing_file.as_deref().is_some_and(|name| {
            name.len() > LONGEST_BACKING_FILE || name.contains(char::is_control)
        }) {
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

    /// Finds the position of this stream in the current chain.
    pub fn place(&self, layers: &[LayerInfo]) -> BasePlace {
        let Some(base) = &self.base else {
            return if layers.is_empty() { BasePlace::Over } else { BasePlace::Depth(None) };
        };
        // Layers are counted from the lowest one, because cutting away upper layers does not change
        // these numbers.
        let Some(depth) = layers.len().checked_sub(base.layers) else {
            return BasePlace::Elsewhere;
        };
        let renamed = depth == 0
            && self.backing_file.as_deref()
                == layers.first().map(|layer| layer.reference.name.as_str());
        match layers.get(depth).is_some_and(|layer| base.is(layer)) || renamed {
            true if depth == 0 => BasePlace::Over,
            true => BasePlace::Depth(Some(depth)),
            false => BasePlace::Elsewhere,
        }
    }

    /// Returns the progress in percent, at most 100.
    pub fn percent(&self) -> u64 {
        let percent = u128::from(self.offset) * 100 / u128::from(self.len.max(1));
        u64::try_from(percent).unwrap_or(100).min(100)
    }

    /// Returns the options that start this stream again.
    pub fn into_options(
        self,
        depth: Option<usize>,
        device: &str,
        priority: Priority,
    ) -> StreamOptions {
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
