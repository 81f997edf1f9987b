//! `x-query-order`: the first touches of the disk, in pages. They say which bytes below the overlay
//! the guest has read, and when.

use serde_json::Value;

use super::call::Call;
use super::codec::QmpError;
use super::facts::{FirstTouchFacts, OrderPage};
use super::json;
use super::status::in_range;

/// The most touches in one reply.
const PAGE: usize = 4096;

pub(super) fn x_query_order(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let first = in_range(call, "first", Some(0), 0..=i64::MAX as u64)?;
    let base = (call.target.order_base)()
        .ok_or_else(|| QmpError::generic("The disk has no backing file, or it cannot be read"))?;
    let record = call.target.disk.first_touches(usize::try_from(first).unwrap_or(usize::MAX), PAGE);
    let touches: Vec<_> = record
        .touches
        .iter()
        .map(|touch| FirstTouchFacts {
            offset: touch.offset,
            length: touch.len,
            milliseconds: touch.at_ms.into(),
        })
        .collect();
    let next = (record.further > 0).then_some(first.saturating_add(touches.len() as u64));
    Ok(json::value(&OrderPage { base, complete: record.is_whole && !record.is_cut, touches, next }))
}
