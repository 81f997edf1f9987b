//! `query-qmp-schema`: the tables of commands, replies and events as QEMU's `SchemaInfo`.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::arguments::{Argument, ArgumentKind, Presence};
use super::call::Call;
use super::codec::QmpError;
use super::command::COMMANDS;
use super::json::to_text;
use super::types::{EMPTY, EVENTS, Member, OBJECTS, Type};

pub(super) fn query_qmp_schema(_: &mut Call<'_>) -> Result<Value, QmpError> {
    Ok(schema().into())
}

/// Returns events and commands, then the types that they use. As in QEMU, the names of types are
/// numbers, which may change with each version: clients have to look for members.
pub(super) fn schema() -> Vec<Value> {
    let mut types = Types::default();
    let mut entries = Vec::new();
    for (name, members) in EVENTS {
        let data = types.members(members.iter().copied());
        entries.push(json!({ "name": name, "meta-type": "event", "arg-type": data }));
    }
    for command in COMMANDS {
        let arguments = types.members(command.arguments.iter().map(Member::from));
        let returns = types.name(command.returns);
        entries.push(json!({ "name": command.name, "meta-type": "command", "arg-type": arguments, "ret-type": returns }));
    }
    entries.extend(types.entries);
    entries
}

/// The types described so far.
#[derive(Default)]
struct Types {
    /// Maps the description of a type to its name on the wire.
    names: HashMap<String, String>,
    entries: Vec<Value>,
    numbers: usize,
}

impl Types {
    /// Returns the name of a type. Describes the type first, if it is new.
    fn name(&mut self, kind: Type) -> String {
        match kind {
            Type::String => self.builtin("str", "string"),
            Type::Integer => self.builtin("int", "int"),
            Type::Boolean => self.builtin("bool", "boolean"),
            Type::Any => self.builtin("any", "value"),
            Type::Enum(values) => {
                let members: Vec<_> = values.iter().map(|value| json!({ "name": value })).collect();
                self.describe(json!({ "meta-type": "enum", "values": values, "members": members }))
            }
            Type::EnumList(values) => {
                let element = self.name(Type::Enum(values));
                self.list(element)
            }
            Type::List(element) => {
                let element = self.name(*element);
                self.list(element)
            }
            Type::Object(object) => self.object(object),
        }
    }

    fn list(&mut self, element: String) -> String {
        let name = format!("[{element}]");
        if self.names.insert(name.clone(), name.clone()).is_none() {
            self.entries
                .push(json!({ "name": name, "meta-type": "array", "element-type": element }));
        }
        name
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        if self.names.insert(name.into(), name.into()).is_none() {
            self.entries
                .push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }));
        }
        name.into()
    }

    /// Returns the name of an object of the table. The number is assigned before the object is
    /// described, because it may contain itself.
    fn object(&mut self, object: &str) -> String {
        let key = format!("object {object}");
        if let Some(name) = self.names.get(&key) {
            return name.clone();
        }
        let name = self.number();
        self.names.insert(key, name.clone());
        let members = OBJECTS
            .iter()
            .find(|(known, _)| *known == object)
            .map_or(&[][..], |(_, members)| members);
        let members = self.described(members.iter().copied());
        self.entries.push(json!({ "name": name, "meta-type": "object", "members": members }));
        name
    }

    /// Returns the name of an object that is not in the table: arguments of a command, or data of
    /// an event.
    fn members(&mut self, members: impl Iterator<Item = Member>) -> String {
        let members = self.described(members);
        match members.is_empty() {
            true => self.object(EMPTY),
            false => self.describe(json!({ "meta-type": "object", "members": members })),
        }
    }

    fn described(&mut self, members: impl Iterator<Item = Member>) -> Vec<Value> {
        let described = members.map(|member| {
            let mut value = json!({ "name": member.name, "type": self.name(member.kind) });
            if member.presence == Presence::Optional {
                value["default"] = Value::Null;
            }
            value
        });
        described.collect()
    }

    /// Returns the name of a type that is identified by its description. Equal descriptions share
    /// one name.
    fn describe(&mut self, mut entry: Value) -> String {
        let key = to_text(&entry);
        if let Some(name) = self.names.get(&key) {
            return name.clone();
        }
        let name = self.number();
        self.names.insert(key, name.clone());
        entry["name"] = name.as_str().into();
        self.entries.push(entry);
        name
    }

    fn number(&mut self) -> String {
        self.numbers += 1;
        (self.numbers - 1).to_string()
    }
}

impl From<&Argument> for Member {
    fn from(argument: &Argument) -> Self {
        let kind = match argument.kind {
            ArgumentKind::String => Type::String,
            ArgumentKind::Integer => Type::Integer,
            ArgumentKind::Boolean => Type::Boolean,
            ArgumentKind::Enum(values) => Type::Enum(values),
            ArgumentKind::EnumList(values) => Type::EnumList(values),
        };
        Member { name: argument.name, kind, presence: argument.presence }
    }
}

#[cfg(test)]
pub(super) mod tests;
