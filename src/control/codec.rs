//! Bytes to requests, and values to lines. Pure.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::facts::Timestamp;
use super::json;
use super::lexer::{Kind, Lexer, Token};
use super::{parser, unicode};

/// Most bytes of the text of all tokens of one value. QEMU allows 64 MiB; no command of this
/// program needs 1 KiB.
pub(super) const MAX_SIZE: usize = 1 << 20;
/// Most tokens of one value. QEMU allows 2 Mi.
pub(super) const MAX_TOKENS: usize = 1 << 16;
/// Most brackets that may be open at once, as in QEMU.
const MAX_NESTING: i32 = 1024;
/// Stack of a thread that parses, in bytes: the recursion is as deep as the nesting, at about 3 KiB
/// per level without optimisation.
pub(super) const STACK: usize = 8 << 20;

/// Error classes (QEMU `qapi/error.json`); clients branch on them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Class {
    /// Any error without a class of its own.
    GenericError,
    /// There is no such command, or it is not allowed at present.
    CommandNotFound,
    /// There is no such block job.
    DeviceNotActive,
    /// There is no such device (only in the dialect of 2012).
    DeviceNotFound,
}

/// An error reply, without the id of its request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct QmpError {
    pub class: Class,
    pub desc: String,
}

impl QmpError {
    pub fn new(class: Class, desc: impl Into<String>) -> Self {
        QmpError { class, desc: desc.into() }
    }

    /// Creates an error of the class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        QmpError::new(Class::GenericError, desc)
    }
}

/// Splits the bytes of a client into values. Holds at most one incomplete value, within the limits
/// above.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    lexer: Lexer,
    tokens: Vec<Token>,
    size: usize,
    curly: i32,
    square: i32,
}

impl Decoder {
    /// Reads `input` up to the end of the next value, and advances `input` past it. Returns `None`
    /// when the input is used up.
    ///
    /// # Errors
    /// The error text of the reply, for each piece of input that is not a value. The decoder is
    /// then reset, except that the lexer may still skip bytes after a stray one.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, String>> {
        loop {
            let token = self.lexer.next(input, MAX_SIZE - self.size)?;
            if let Some(value) = self.take(token) {
                self.tokens.clear();
                (self.size, self.curly, self.square) = (0, 0, 0);
                return Some(value);
            }
        }
    }

    /// Returns the size of the incomplete value in bytes: its text, and the memory of its tokens.
    #[cfg(any(test, feature = "testing"))]
    pub fn held(&self) -> usize {
        self.size + self.lexer.held() + size_of_val(&self.tokens[..])
    }

    fn take(&mut self, token: Token) -> Option<Result<Value, String>> {
        match token.0 {
            Kind::LeftCurly => self.curly += 1,
            Kind::RightCurly => self.curly -= 1,
            Kind::LeftSquare => self.square += 1,
            Kind::RightSquare => self.square -= 1,
            Kind::Stray => {
                return Some(Err(format!(
                    "JSON parse error, stray '{}'",
                    unicode::lossy(&token.1)
                )));
            }
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
        // A value ends when its brackets balance, or when they cannot balance any more.
        if (self.curly > 0 || self.square > 0) && self.curly >= 0 && self.square >= 0 {
            return None;
        }
        Some(parser::parse(&self.tokens).map_err(|text| format!("JSON parse error, {text}")))
    }
}

/// A request with valid members. Its command may be unknown, and its arguments are not checked yet.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct QmpRequest {
    pub command: String,
    /// The request was sent with `exec-oob`.
    pub oob: bool,
    pub arguments: Map<String, Value>,
}

/// Whether the client has negotiated out-of-band requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Oob {
    Off,
    On,
}

/// Checks the members of a request.
///
/// # Errors
/// The error reply.
pub(super) fn check(mut members: Map<String, Value>, oob: Oob) -> Result<QmpRequest, QmpError> {
    let mut command: Option<(&str, &str)> = None;
    for (key, value) in json::in_order(&members) {
        match key.as_str() {
            "execute" | "exec-oob" if key == "execute" || oob == Oob::On => {
                let name = value.as_str().ok_or_else(|| {
                    QmpError::generic(format!("QMP input member '{key}' must be a string"))
                })?;
                if let Some((other, _)) = command {
                    return Err(QmpError::generic(format!(
                        "QMP input member '{key}' clashes with '{other}'"
                    )));
                }
                command = Some((key, name));
            }
            "arguments" if !value.is_object() => {
                return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
            }
            "arguments" | "id" => {}
            _ => return Err(QmpError::generic(format!("QMP input member '{key}' is unexpected"))),
        }
    }
    let (key, name) =
        command.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
    let (command, oob) = (name.to_string(), key == "exec-oob");
    let arguments = match members.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        _ => Map::new(),
    };
    Ok(QmpRequest { command, oob, arguments })
}

/// Returns the line of a reply, with its line end.
pub(super) fn reply(result: Result<Value, QmpError>, id: Option<Value>) -> String {
    let mut members = match result {
        Ok(value) => json!({ "return": value }),
        Err(QmpError { class, desc }) => {
            json!({ "error": { "class": format!("{class:?}"), "desc": desc } })
        }
    };
    if let Some(id) = id {
        members["id"] = id;
    }
    line(&members)
}

/// Returns the line of an event, with its line end; `data` is null if the event has none.
pub(super) fn event(name: &str, data: Value, at: SystemTime) -> String {
    let mut members = json!({ "timestamp": json::value(&Timestamp::from(at)), "event": name });
    if !data.is_null() {
        members["data"] = data;
    }
    line(&members)
}

/// Returns `value` as a line.
pub(super) fn line(value: &Value) -> String {
    json::to_text(value) + "\r\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns all values, as text, and errors that the decoder finds in `input`, fed in pieces of
    /// `piece` bytes.
    fn decode(input: &[u8], piece: usize) -> Vec<Result<String, String>> {
        let (mut decoder, mut found) = (Decoder::default(), Vec::new());
        for mut piece in input.chunks(piece) {
            while let Some(next) = decoder.next(&mut piece) {
                found.push(next.map(|value| json::to_text(&value)));
            }
        }
        found
    }

    /// Protects: the error texts, copied from sessions with qemu-storage-daemon.
    #[test]
    fn malformed_input_is_answered_as_qemu_does() {
        let table: &[(&[u8], &[&str])] = &[
            (br#"{"execute":}"#, &["expecting value"]),
            (br#"{"execute" "x"}"#, &["missing : in object pair"]),
            (br#"{"execute":"x",}"#, &["expecting value"]),
            (b"{1:2}", &["key is not a string in object"]),
            (b"{foo:2}", &["invalid keyword 'foo'"]),
            (br#"{"a":1,"a":2}"#, &["duplicate key"]),
            (br#"{"a":1 "b":2}"#, &["expected separator in dict"]),
            (b"[1 2]", &["expected separator in list"]),
            (b"foo ", &["invalid keyword 'foo'"]),
            (b"}", &["expecting value"]),
            (b"] , :", &["expecting value", "expecting value", "expecting value"]),
            (b"\x01", &["stray '\u{1}'"]),
            (b"\xff", &["stray '\u{fffd}'"]),
            (b"\0", &["stray ''"]),
            (br#"{"id": 01}"#, &["stray '01'", "expecting value"]),
            (b"\"abc\n", &["stray '\"abc\n'"]),
            (br#""\x""#, &["invalid escape sequence in string"]),
            (br#""\ud83d""#, &["\\ud83d is not a valid Unicode character"]),
            (br#""\ud83d\u0041""#, &["\\ud83d is not a valid Unicode character"]),
            (br#""\u12""#, &["\\u12\" is not a valid Unicode character"]),
            (br#""\uffff""#, &["\\uffff is not a valid Unicode character"]),
            (b"\"\xc3(\"", &["invalid UTF-8 sequence in string"]),
        ];
        for (input, expected) in table {
            for piece in [1, input.len()] {
                let found: Vec<_> =
                    decode(input, piece).into_iter().map(Result::unwrap_err).collect();
                let expected: Vec<_> =
                    expected.iter().map(|text| format!("JSON parse error, {text}")).collect();
                assert_eq!(found, expected, "{}", input.escape_ascii());
            }
        }
    }

    #[test]
    fn values_end_when_their_brackets_balance() {
        let found = decode(
            br#"{"a":1}{'b':'it\'s'}[1,[2]] true "x"{"id":"\u00e9\ud83d\ude00\/"} 12 -0 "#,
            1,
        );
        let expected = [
            r#"{"a": 1}"#,
            r#"{"b": "it's"}"#,
            "[1, [2]]",
            "true",
            r#""x""#,
            r#"{"id": "\u00E9\uD83D\uDE00/"}"#,
            "12",
            "0",
        ];
        assert_eq!(found, expected.map(|text| Ok(text.to_string())));
        assert_eq!(decode(br#"@@@ {"a":1}"#, 1).len(), 2, "skipped to the next brace");
        assert_eq!(
            decode(b"{\"a\":[1,\xff{\"a\":1}", 1).last(),
            Some(&Ok(r#"{"a": 1}"#.into())),
            "0xFF forces a clean state"
        );
    }

    #[test]
    fn input_without_end_is_bounded() {
        for (open, close) in [(&b"["[..], &b"]"[..]), (br#"{"a":"#, b"}")] {
            let deep = [open.repeat(1024), b"1".to_vec(), close.repeat(1024)].concat();
            let decoding =
                std::thread::Builder::new().stack_size(STACK).spawn(move || decode(&deep, 4096));
            assert!(matches!(decoding.unwrap().join().unwrap()[..], [Ok(_)]));
        }
        assert_eq!(
            decode(&b"[".repeat(1025), 4096),
            [Err("JSON nesting depth limit exceeded".into())]
        );
        let tokens = [b"[".as_slice(), &b"1,".repeat(MAX_TOKENS)].concat();
        assert_eq!(decode(&tokens, 4096)[0], Err("JSON token count limit exceeded".into()));
        let long = [b"[\"".as_slice(), &b"a".repeat(2 * MAX_SIZE)].concat();
        assert_eq!(decode(&long, 4096)[0], Err("JSON token size limit exceeded".into()));
        let keyword = decode(&[b"z".repeat(2000), b" ".to_vec()].concat(), 4096);
        assert_eq!(keyword[0].as_ref().unwrap_err().len(), "JSON parse error, ".len() + 1023);
    }

    #[test]
    fn members_of_a_request_are_checked() {
        let check = |text: &str, oob| {
            let Value::Object(members) = serde_json::from_str(text).unwrap() else {
                panic!("an object")
            };
            check(members, oob).map_err(|refusal| refusal.desc)
        };
        for (text, expected) in [
            ("{}", "QMP input lacks member 'execute'"),
            (r#"{"execute":1,"id":5}"#, "QMP input member 'execute' must be a string"),
            (r#"{"execute":"a","arguments":[]}"#, "QMP input member 'arguments' must be an object"),
            (r#"{"zz":1,"aa":2,"execute":"x"}"#, "QMP input member 'aa' is unexpected"),
            (r#"{"exec-oob":"x"}"#, "QMP input member 'exec-oob' is unexpected"),
        ] {
            assert_eq!(check(text, Oob::Off), Err(expected.into()));
        }
        assert_eq!(
            check(r#"{"execute":"a","exec-oob":"b"}"#, Oob::On),
            Err("QMP input member 'execute' clashes with 'exec-oob'".into())
        );
        assert!(check(r#"{"exec-oob":"x"}"#, Oob::On).unwrap().oob);
        assert_eq!(check(r#"{"execute":"x","id":null}"#, Oob::Off).unwrap().command, "x");
    }
}
