//! Bytes to requests, values to lines. Pure.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::json;
use super::lexer::{Kind, Lexer, Token};
use super::{parser, unicode};

/// Bytes of text of all tokens of one value. QEMU allows 64 MiB; no command of ours needs 1 KiB.
const MAX_SIZE: usize = 1 << 20;
/// Tokens of one value. QEMU allows 2 Mi.
const MAX_TOKENS: usize = 1 << 16;
/// Brackets open at once; QEMU's number.
const MAX_NESTING: i32 = 1024;

/// Classes of errors (QEMU `qapi/error.json`); callers of the protocol branch on them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Class {
    /// Anything but the following.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// No such block job.
    DeviceNotActive,
    /// No such device (only where the dialect of 2012 is spoken).
    DeviceNotFound,
}

/// An error reply, without the request's id.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Refusal {
    pub class: Class,
    pub desc: String,
}

impl Refusal {
    pub fn new(class: Class, desc: impl Into<String>) -> Self {
        Refusal { class, desc: desc.into() }
    }

    /// The usual class.
    pub fn generic(desc: impl Into<String>) -> Self {
        Refusal::new(Class::GenericError, desc)
    }
}

/// Cuts the bytes of a client into values. Holds at most one value that is not complete, within the limits above.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    lexer: Lexer,
    tokens: Vec<Token>,
    size: usize,
    curly: i32,
    square: i32,
}

impl Decoder {
    /// Reads from `input`, and takes from it what was read, up to the end of the next value. `None` when the input is used up.
    ///
    /// # Errors
    /// For each piece of input that is no value, the text for its reply. The decoder is as new then, except that the lexer may be
    /// skipping what follows bytes that made no sense.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, String>> {
        loop {
            let token = self.lexer.next(input, MAX_SIZE)?;
            if let Some(value) = self.take(token) {
                self.tokens.clear();
                (self.size, self.curly, self.square) = (0, 0, 0);
                return Some(value);
            }
        }
    }

    fn take(&mut self, token: Token) -> Option<Result<Value, String>> {
        match token.0 {
            Kind::LeftCurly => self.curly += 1,
            Kind::RightCurly => self.curly -= 1,
            Kind::LeftSquare => self.square += 1,
            Kind::RightSquare => self.square -= 1,
            Kind::Stray => return Some(Err(format!("JSON parse error, stray '{}'", unicode::lossy(&token.1)))),
            _ => {}
        }
        let size = self.size + token.1.len();
        if size + 1 > MAX_SIZE {
            return Some(Err("JSON token size limit exceeded".into()));
        }
        if self.tokens.len() + 1 > MAX_TOKENS {
            return Some(Err("JSON token count limit exceeded".into()));
        }
        if self.curly + self.square > MAX_NESTING {
            return Some(Err("JSON nesting depth limit exceeded".into()));
        }
        self.size = size;
        self.tokens.push(token);
        // A value ends when its brackets balance, or can no longer balance.
        if (self.curly > 0 || self.square > 0) && self.curly >= 0 && self.square >= 0 {
            return None;
        }
        Some(parser::parse(&self.tokens).map_err(|text| format!("JSON parse error, {text}")))
    }
}

/// A request whose members are as they must be; its command may not exist and its arguments may make no sense.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    pub command: String,
    /// Asked for out of band.
    pub oob: bool,
    pub arguments: Map<String, Value>,
}

/// Whether a client has asked for the capability to send requests out of band.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Oob {
    Off,
    On,
}

/// Checks the members of a request.
///
/// # Errors
/// The reply.
pub(super) fn check(members: &Map<String, Value>, oob: Oob) -> Result<Request, Refusal> {
    let mut command: Option<(&str, &str)> = None;
    let mut arguments = Map::new();
    for (key, value) in json::in_order(members) {
        match key.as_str() {
            "execute" | "exec-oob" if key == "execute" || oob == Oob::On => {
                let name = value.as_str().ok_or_else(|| Refusal::generic(format!("QMP input member '{key}' must be a string")))?;
                if let Some((other, _)) = command {
                    return Err(Refusal::generic(format!("QMP input member '{key}' clashes with '{other}'")));
                }
                command = Some((key, name));
            }
            "arguments" => match value {
                Value::Object(given) => arguments = given.clone(),
                _ => return Err(Refusal::generic("QMP input member 'arguments' must be an object")),
            },
            "id" => {}
            _ => return Err(Refusal::generic(format!("QMP input member '{key}' is unexpected"))),
        }
    }
    let (key, name) = command.ok_or_else(|| Refusal::generic("QMP input lacks member 'execute'"))?;
    Ok(Request { command: name.into(), oob: key == "exec-oob", arguments })
}

/// The line of a reply, with its end.
pub(super) fn reply(result: Result<Value, Refusal>, id: Option<Value>) -> String {
    let mut members = match result {
        Ok(value) => json!({ "return": value }),
        Err(Refusal { class, desc }) => json!({ "error": { "class": format!("{class:?}"), "desc": desc } }),
    };
    if let Some(id) = id {
        members["id"] = id;
    }
    line(&members)
}

/// The line of an event, with its end; `data` is null where there is none.
pub(super) fn event(name: &str, data: Value, at: SystemTime) -> String {
    let timestamp = match at.duration_since(UNIX_EPOCH) {
        Ok(since) => json!({ "seconds": since.as_secs(), "microseconds": since.subsec_micros() }),
        Err(_) => json!({ "seconds": -1, "microseconds": -1 }),
    };
    let mut members = json!({ "timestamp": timestamp, "event": name });
    if !data.is_null() {
        members["data"] = data;
    }
    line(&members)
}

/// `value` on a line of its own.
pub(super) fn line(value: &Value) -> String {
    json::to_text(value) + "\r\n"
}
