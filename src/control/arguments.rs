//! Tables of arguments, and the check of a client's arguments against them.

use serde_json::{Map, Value};

use super::codec::QmpError;
use super::json;

/// One argument of a command.
pub(super) struct Argument {
    pub name: &'static str,
    pub kind: ArgumentKind,
    pub presence: Presence,
}

/// Whether an argument must be given.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Presence {
    Mandatory,
    Optional,
}

/// Type of an argument.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ArgumentKind {
    String,
    /// A signed 64-bit integer.
    Integer,
    Boolean,
    /// One of these strings.
    Enum(&'static [&'static str]),
    /// A list of these strings.
    EnumList(&'static [&'static str]),
}

use ArgumentKind::{Boolean, Enum, EnumList, Integer, String as Text};

pub(super) const fn mandatory(name: &'static str, kind: ArgumentKind) -> Argument {
    Argument { name, kind, presence: Presence::Mandatory }
}

pub(super) const fn optional(name: &'static str, kind: ArgumentKind) -> Argument {
    Argument { name, kind, presence: Presence::Optional }
}

/// Arguments of a command, checked against its table.
#[derive(Debug)]
pub(super) struct Arguments(Map<String, Value>);

impl Arguments {
    /// Checks `given` in the order of the table; unknown arguments are reported last.
    ///
    /// # Errors
    /// The reply for the first error.
    pub fn check(table: &[Argument], given: Map<String, Value>) -> Result<Arguments, QmpError> {
        for argument in table {
            match given.get(argument.name) {
                Some(value) => argument.check(value)?,
                None if argument.presence == Presence::Mandatory => {
                    return Err(QmpError::generic(format!(
                        "Parameter '{}' is missing",
                        argument.name
                    )));
                }
                None => {}
            }
        }
        let known = |key: &str| table.iter().any(|argument| argument.name == key);
        // QEMU reports one of them in an undefined order.
        match given.keys().find(|key| !known(key)) {
            Some(key) => Err(QmpError::generic(format!("Parameter '{key}' is unexpected"))),
            None => Ok(Arguments(given)),
        }
    }

    /// Returns all arguments as JSON text.
    pub fn to_text(&self) -> String {
        json::to_text(&Value::Object(self.0.clone()))
    }

    /// Returns an optional string.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str)
    }

    /// Returns a mandatory string.
    pub fn mandatory_text(&self, name: &str) -> &str {
        self.text(name).unwrap_or_default()
    }

    /// Returns an integer, if it was given.
    pub fn integer(&self, name: &str) -> Option<i64> {
        self.0.get(name).and_then(Value::as_i64)
    }

    /// Returns a boolean, if it was given.
    pub fn boolean(&self, name: &str) -> Option<bool> {
        self.0.get(name).and_then(Value::as_bool)
    }

    /// Returns the strings of a list.
    pub fn texts(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.get(name).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
    }
}

impl Argument {
    fn check(&self, value: &Value) -> Result<(), QmpError> {
        let invalid = |name: &str, expected: &str| {
            Err(QmpError::generic(format!(
                "Invalid parameter type for '{name}', expected: {expected}"
            )))
        };
        // An element of a list has no name (QEMU prints `null`).
        let one_of = |name: &str, values: &[&str], text: &str| match values.contains(&text) {
            true => Ok(()),
            false => {
                Err(QmpError::generic(format!("Parameter '{name}' does not accept value '{text}'")))
            }
        };
        match (self.kind, value) {
            (Text, Value::String(_)) | (Boolean, Value::Bool(_)) => Ok(()),
            (Integer, value) if value.is_i64() => Ok(()),
            (Enum(values), Value::String(text)) => one_of(self.name, values, text),
            (EnumList(values), Value::Array(elements)) => {
                elements.iter().enumerate().try_for_each(|(i, element)| match element.as_str() {
                    Some(text) => one_of("null", values, text),
                    None => invalid(&format!("{}[{i}]", self.name), "string"),
                })
            }
            (Text | Enum(_), _) => invalid(self.name, "string"),
            (Integer, _) => invalid(self.name, "integer"),
            (Boolean, _) => invalid(self.name, "boolean"),
            (EnumList(_), _) => invalid(self.name, "array"),
        }
    }
}
