//! Events of jobs in the words of the protocol.

use serde_json::{Value, json};

use super::job_commands::action_word;
use engine::job::{JobEvent, Progress};

/// Returns name and data of an event.
pub(super) fn event(event: &JobEvent) -> (&'static str, Value) {
    match event {
        JobEvent::StatusChange { id, status } => {
            ("JOB_STATUS_CHANGE", json!({ "id": id, "status": status.to_string() }))
        }
        JobEvent::Completed { progress, error } => {
            let mut data = block_job(progress);
            if let Some(error) = error {
                data["error"] = error.as_str().into();
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Cancelled { progress } => ("BLOCK_JOB_CANCELLED", block_job(progress)),
        JobEvent::Ready { progress } => ("BLOCK_JOB_READY", block_job(progress)),
        // As in QEMU (`block/stream.c`), a stream reports `read` even for a failed write.
        JobEvent::Error { id, action } => (
            "BLOCK_JOB_ERROR",
            json!({ "device": id, "operation": "read", "action": action_word(*action) }),
        ),
        JobEvent::Pending { id, kind } => ("BLOCK_JOB_PENDING", json!({ "type": kind, "id": id })),
    }
}

/// Returns exactly the members that these events have had since 2012.
fn block_job(progress: &Progress) -> Value {
    json!({ "type": progress.kind, "device": progress.id, "len": progress.len, "offset": progress.offset, "speed": progress.speed })
}
