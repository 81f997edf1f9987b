//! The schema itself, and the check of values against it that other tests use.

use std::sync::LazyLock;

use super::*;

static SCHEMA: LazyLock<Vec<Value>> = LazyLock::new(schema);

fn entry<'a>(schema: &'a [Value], name: &str) -> &'a Value {
    schema
        .iter()
        .find(|entry| entry["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in the schema"))
}

/// Checks that `value` matches the type `name` of the schema, without additional members.
fn check(schema: &[Value], name: &str, value: &Value, at: &str) {
    let kind = entry(schema, name);
    match kind["meta-type"].as_str().unwrap() {
        "builtin" => assert!(
            match kind["json-type"].as_str().unwrap() {
                "string" => value.is_string(),
                "int" => value.is_i64() || value.is_u64(),
                "boolean" => value.is_boolean(),
                _ => true,
            },
            "{at}: {value} is no {name}"
        ),
        "enum" => assert!(kind["values"].as_array().unwrap().contains(value), "{at}: {value}"),
        "array" => {
            for element in value.as_array().unwrap_or_else(|| panic!("{at}: {value} is no list")) {
                check(schema, kind["element-type"].as_str().unwrap(), element, at);
            }
        }
        _ => {
            let members = kind["members"].as_array().unwrap();
            let value = value.as_object().unwrap_or_else(|| panic!("{at}: {value} is no object"));
            for member in members {
                let name = member["name"].as_str().unwrap();
                match value.get(name) {
                    Some(value) => check(
                        schema,
                        member["type"].as_str().unwrap(),
                        value,
                        &format!("{at}.{name}"),
                    ),
                    None => assert!(member.get("default").is_some(), "{at}.{name} is missing"),
                }
            }
            for name in value.keys() {
                assert!(
                    members.iter().any(|member| member["name"] == *name),
                    "{at}.{name} is not in the schema"
                );
            }
        }
    }
}

/// Checks the result of a command.
pub(in super::super) fn check_return(command: &str, value: &Value) {
    let schema = &SCHEMA;
    check(schema, entry(schema, command)["ret-type"].as_str().unwrap(), value, command);
}

/// Checks that the object `name` has all members of the schema, including the optional ones, and
/// that the objects in it do too. Each list in it must have an element.
pub(in super::super) fn check_object(name: &str, value: &Value) {
    let mut types = Types::default();
    let number = types.object(name);
    check(&types.entries, &number, value, name);
    check_all_there(&types.entries, &[], &number, value, name);
}

fn check_all_there(schema: &[Value], above: &[&str], name: &str, value: &Value, at: &str) {
    if above.contains(&name) {
        return;
    }
    let above = &[above, &[name]].concat();
    let kind = entry(schema, name);
    if let Some(element) = kind["element-type"].as_str() {
        assert!(
            value.as_array().is_some_and(|list| !list.is_empty()),
            "{at}: {value} shows no element"
        );
        value
            .as_array()
            .into_iter()
            .flatten()
            .for_each(|value| check_all_there(schema, above, element, value, at));
    }
    for member in
        kind["members"].as_array().into_iter().flatten().filter(|_| kind["meta-type"] == "object")
    {
        let (name, kind) = (member["name"].as_str().unwrap(), member["type"].as_str().unwrap());
        let at = format!("{at}.{name}");
        check_all_there(
            schema,
            above,
            kind,
            value.get(name).unwrap_or_else(|| panic!("{at} is in the schema only")),
            &at,
        );
    }
}

/// Checks an event.
pub(in super::super) fn check_event(event: &Value) {
    let schema = &SCHEMA;
    let name = event["event"].as_str().unwrap();
    check(schema, entry(schema, name)["arg-type"].as_str().unwrap(), &event["data"], name);
}

#[test]
fn the_schema_describes_itself_and_every_name_in_it_once() {
    let schema = schema();
    check_return("query-qmp-schema", &schema.clone().into());
    for (i, one) in schema.iter().enumerate() {
        assert!(schema[..i].iter().all(|other| other["name"] != one["name"]), "{one}");
        for key in ["arg-type", "ret-type", "element-type"] {
            one[key]
                .as_str()
                .into_iter()
                .for_each(|name| assert_eq!(entry(&schema, name)["name"], name));
        }
        if one["meta-type"] == "object" {
            for member in one["members"].as_array().unwrap() {
                assert_ne!(
                    entry(&schema, member["type"].as_str().unwrap())["meta-type"],
                    "command"
                );
            }
        }
    }
}

#[test]
fn objects_are_in_the_table_once() {
    fn look(kind: Type) {
        match kind {
            Type::Object(name) => {
                assert_eq!(OBJECTS.iter().filter(|(known, _)| *known == name).count(), 1, "{name}")
            }
            Type::List(element) => look(*element),
            _ => {}
        }
    }
    COMMANDS.iter().for_each(|command| look(command.returns));
    OBJECTS
        .iter()
        .chain(EVENTS)
        .flat_map(|(_, members)| *members)
        .for_each(|member| look(member.kind));
}

/// Protects: the description is that of qemu-storage-daemon 10.0.2, except for the numbers.
#[test]
fn block_stream_is_described_as_qemu_does() {
    let schema = schema();
    let command = entry(&schema, "block-stream");
    assert_eq!(command["meta-type"], "command");
    assert_eq!(entry(&schema, command["ret-type"].as_str().unwrap())["members"], json!([]));
    let arguments = entry(&schema, command["arg-type"].as_str().unwrap());
    let on_error = arguments["members"][8]["type"].as_str().unwrap();
    assert_eq!(
        arguments["members"],
        json!([
            {"name": "job-id", "default": null, "type": "str"},
            {"name": "device", "type": "str"},
            {"name": "base", "default": null, "type": "str"},
            {"name": "base-node", "default": null, "type": "str"},
            {"name": "backing-file", "default": null, "type": "str"},
            {"name": "backing-mask-protocol", "default": null, "type": "bool"},
            {"name": "bottom", "default": null, "type": "str"},
            {"name": "speed", "default": null, "type": "int"},
            {"name": "on-error", "default": null, "type": on_error},
            {"name": "filter-node-name", "default": null, "type": "str"},
            {"name": "auto-finalize", "default": null, "type": "bool"},
            {"name": "auto-dismiss", "default": null, "type": "bool"},
        ])
    );
    let words = ["report", "ignore", "enospc", "stop", "auto"];
    let members: Vec<_> = words.iter().map(|word| json!({ "name": word })).collect();
    assert_eq!(
        entry(&schema, on_error),
        &json!({"name": on_error, "meta-type": "enum", "values": words, "members": members})
    );
}
