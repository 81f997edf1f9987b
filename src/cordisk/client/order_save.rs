//! `cordisk order save`: the order of first touches of a mounted disk, as a file.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::order::{refuse_terminal, write_order};
use super::{facts, find};
use control::connection::Connection;
use control::facts::{FirstTouchFacts, OrderBase, OrderPage};
use host::{Error, ErrorKind, Result};
use order::{BaseIdentity, MOST_RANGES, Order, Touch};

/// The options of `cordisk order save`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OrderSaveOptions {
    /// The disk.
    pub target: PathBuf,
    /// Only what was touched in this time after the disk was opened.
    pub within: Option<Duration>,
    /// The file to write; `None` is standard output.
    pub output: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// The disk is not mounted, or has no order; its daemon does not answer; those of writing.
pub(super) fn save(options: &OrderSaveOptions) -> Result<()> {
    if options.output.is_none() {
        refuse_terminal("an order")?;
    }
    let (mut connection, disk) = find::connect(&options.target)?;
    let (base, touches, is_complete) = touches(&mut connection)?;
    let until = options.within.map_or(u64::MAX, |within| within.as_millis() as u64);
    let touches = touches.into_iter().filter(|touch| touch.milliseconds < until);
    let touch = |touch: FirstTouchFacts| Touch {
        offset: touch.offset,
        len: touch.length,
        at_ms: u32::try_from(touch.milliseconds).unwrap_or(u32::MAX),
    };
    let order = Order::from_touches(base, touches.map(touch));
    if order.ranges().is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "{}: nothing of the base was read yet: save its order when the machine has started",
                disk.name
            ),
        ));
    }
    if !is_complete {
        log::warn!(
            "{}: not all first touches are known: there were too many, or another process has served the disk before",
            disk.name
        );
    }
    write_order(&order, options.output.as_deref())
}

/// Asks for all first touches.
fn touches(connection: &mut Connection) -> Result<(BaseIdentity, Vec<FirstTouchFacts>, bool)> {
    let name = connection.name().to_owned();
    let (mut touches, mut first) = (Vec::new(), 0);
    loop {
        let answer = connection.ask("x-query-order", json!({ "first": first }))?;
        let answer = answer.map_err(|refusal| {
            let why = match refusal.is_unknown_command() {
                true => facts::of_another_version(&name),
                false => format!("{name}: {}", refusal.description),
            };
            Error::new(ErrorKind::UnsupportedFeature, why)
        })?;
        let page: OrderPage = facts::read(answer, &name)?;
        touches.extend(page.touches);
        // What a process sends is bounded as a file is.
        match page.next.filter(|next| *next > first && touches.len() < MOST_RANGES) {
            Some(next) => first = next,
            None => return Ok((identity(page.base, &name)?, touches, page.complete)),
        }
    }
}

fn identity(base: OrderBase, name: &str) -> Result<BaseIdentity> {
    let OrderBase { size, head, pin } = base;
    let mut bytes = [0; 32];
    let digit = |at: usize| head.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = digit(2 * index).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, facts::of_another_version(name))
        })?;
    }
    Ok(BaseIdentity { size, head: bytes, pin })
}
