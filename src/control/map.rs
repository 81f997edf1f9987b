//! `x-query-map`: the block map, in pages. It asks the backing files too, so a backing file that
//! hangs blocks the client that asks, and no other client.

use serde_json::Value;

use super::call::Call;
use super::codec::QmpError;
use super::json;
use super::status::in_range;
use engine::map::extents;

/// Default number of extents in one reply.
const DEFAULT_LIMIT: u64 = 1024;
/// Most extents in one reply, which is half a megabyte.
const MOST: u64 = 4096;

pub(super) fn x_query_map(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let offset = in_range(call, "offset", Some(0), 0..=i64::MAX.unsigned_abs())?;
    let limit = in_range(call, "limit", Some(DEFAULT_LIMIT), 1..=MOST)? as usize;
    let page = extents(&call.target.disk, offset, limit)
        .map_err(|error| QmpError::generic(error.to_string()))?;
    Ok(json::value(&page))
}
