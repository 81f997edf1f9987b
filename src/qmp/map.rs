//! What is where, in pages. Looks at the backing files as well: where one of them hangs, so does the client that asks, and nobody else.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::Refusal;
use super::status::in_range;
use crate::map::Page;

/// Extents in one reply, where the client does not say.
const DEFAULT_LIMIT: u64 = 1024;
/// At most: a reply of half a megabyte.
const MOST: u64 = 4096;

pub(super) fn x_query_map(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let offset = in_range(call, "offset", Some(0), 0..=i64::MAX.unsigned_abs())?;
    let limit = in_range(call, "limit", Some(DEFAULT_LIMIT), 1..=MOST)? as usize;
    let Page { extents, next } = (call.backend.facts.extents)(offset, limit).map_err(|error| Refusal::generic(error.to_string()))?;
    let extents = serde_json::to_value(extents).map_err(|error| Refusal::generic(error.to_string()))?;
    let mut page = json!({ "extents": extents });
    if let Some(next) = next {
        page["next"] = next.into();
    }
    Ok(page)
}
