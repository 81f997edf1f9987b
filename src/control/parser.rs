//! Tokens to values, with the error texts of QEMU's `qobject/json-parser.c`.

use serde_json::{Map, Number, Value};

use super::lexer::{Kind, Token};
use super::unicode;

/// Longest error text of QEMU in bytes, without the NUL at its end.
const LONGEST_MESSAGE: usize = 1023;

/// Parses the tokens of one value. The recursion is as deep as the nesting of brackets, which the
/// caller bounds.
///
/// # Errors
/// The text of the error, without the prefix that all texts share.
pub(super) fn parse(tokens: &[Token]) -> Result<Value, String> {
    let mut parser = Parser { tokens };
    parser.value()
}

struct Parser<'a> {
    tokens: &'a [Token],
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Result<Kind, String> {
        self.tokens.first().map(|token| token.0).ok_or_else(|| "premature EOI".to_string())
    }

    fn pop(&mut self) -> Result<&'a Token, String> {
        let (first, rest) = self.tokens.split_first().ok_or("premature EOI")?;
        self.tokens = rest;
        Ok(first)
    }

    fn value(&mut self) -> Result<Value, String> {
        match self.peek()? {
            Kind::LeftCurly => self.object(),
            Kind::LeftSquare => self.array(),
            Kind::Integer => Ok(Value::Number(integer(&unicode::lossy(&self.pop()?.1)))),
            Kind::Float => Ok(Value::Number(float(&unicode::lossy(&self.pop()?.1)))),
            Kind::String => string(&self.pop()?.1).map(Value::String),
            Kind::Keyword => keyword(&unicode::lossy(&self.pop()?.1)),
            _ => Err("expecting value".into()),
        }
    }

    fn object(&mut self) -> Result<Value, String> {
        let mut members = Map::new();
        self.pop()?;
        if self.peek()? == Kind::RightCurly {
            self.pop()?;
            return Ok(Value::Object(members));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err("key is not a string in object".into());
            };
            if self.pop()?.0 != Kind::Colon {
                return Err("missing : in object pair".into());
            }
            let value = self.value()?;
            if members.insert(key, value).is_some() {
                return Err("duplicate key".into());
            }
            match self.pop()?.0 {
                Kind::RightCurly => return Ok(Value::Object(members)),
                Kind::Comma => {}
                _ => return Err("expected separator in dict".into()),
            }
        }
    }

    fn array(&mut self) -> Result<Value, String> {
        let mut elements = Vec::new();
        self.pop()?;
        if self.peek()? == Kind::RightSquare {
            self.pop()?;
            return Ok(Value::Array(elements));
        }
        loop {
            elements.push(self.value()?);
            match self.pop()?.0 {
                Kind::RightSquare => return Ok(Value::Array(elements)),
                Kind::Comma => {}
                _ => return Err("expected separator in list".into()),
            }
        }
    }
}

fn keyword(text: &str) -> Result<Value, String> {
    match text {
        "true" => Ok(Value::Bool(true)),
        "false" => Ok(Value::Bool(false)),
        "null" => Ok(Value::Null),
        // Keywords are ASCII, so the text may be cut at any index.
        _ => Err(format!(
            "invalid keyword '{}",
            cut(format!("{text}'"), LONGEST_MESSAGE - "invalid keyword '".len())
        )),
    }
}

fn cut(mut text: String, len: usize) -> String {
    text.truncate(len);
    text
}

/// An int64 if it fits, otherwise a uint64, otherwise a double.
fn integer(text: &str) -> Number {
    if let Ok(signed) = text.parse::<i64>() {
        signed.into()
    } else if let Ok(unsigned) = text.parse::<u64>() {
        unsigned.into()
    } else {
        float(text)
    }
}

/// A double, clamped to the largest finite one: QEMU uses infinity and prints it as `inf`, which is
/// not JSON.
fn float(text: &str) -> Number {
    let value: f64 = text.parse().unwrap_or_default();
    Number::from_f64(value.clamp(f64::MIN, f64::MAX)).unwrap_or_else(|| 0.into())
}

/// Returns the text of a string token.
fn string(token: &[u8]) -> Result<String, String> {
    let inner = &token[1..token.len() - 1];
    let mut text = String::with_capacity(inner.len());
    let mut at = 0;
    while let Some(&byte) = inner.get(at) {
        if byte != b'\\' {
            let (found, len) = unicode::decode(&inner[at..]);
            text.push(found.ok_or("invalid UTF-8 sequence in string")?);
            at += len;
            continue;
        }
        let escape = inner.get(at + 1).copied().unwrap_or_default();
        let simple = match escape {
            b'"' | b'\'' | b'\\' | b'/' => char::from(escape),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                // An escape of less than four digits at the end of the string is reported together
                // with the closing quote.
                let (found, len) = escaped(&token[1 + at..]);
                match found {
                    Some(found) => text.push(found),
                    None => {
                        let shown = &token[1 + at..(1 + at + len).min(token.len())];
                        return Err(format!(
                            "{} is not a valid Unicode character",
                            unicode::lossy(shown)
                        ));
                    }
                }
                at += len;
                continue;
            }
            _ => return Err("invalid escape sequence in string".into()),
        };
        text.push(simple);
        at += 2;
    }
    Ok(text)
}

/// Decodes the `\uXXXX` at the start of `bytes`, or the two of them that form a surrogate pair.
/// Returns the character and the number of bytes.
fn escaped(bytes: &[u8]) -> (Option<char>, usize) {
    const ONE: usize = 6;
    let Some(first) = hex(bytes.get(2..ONE)) else { return (None, ONE) };
    if !(0xd800..0xdc00).contains(&first) || bytes.get(ONE..ONE + 2) != Some(b"\\u") {
        return (unicode::character(first), ONE);
    }
    match hex(bytes.get(ONE + 2..2 * ONE)) {
        Some(second @ 0xdc00..0xe000) => {
            (unicode::character(0x1_0000 + ((first & 0x3ff) << 10) + (second & 0x3ff)), 2 * ONE)
        }
        _ => (None, ONE),
    }
}

fn hex(digits: Option<&[u8]>) -> Option<u32> {
    digits?.iter().try_fold(0, |value, &digit| Some(value << 4 | char::from(digit).to_digit(16)?))
}
