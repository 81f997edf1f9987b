//! The documents and the program say the same: every command and option of `--help` stands in
//! docs/commands.md, and every option there exists; the tests that docs/semantics.md and
//! docs/promises.md name exist; no link leads nowhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::source::{exists, tests_in};
use crate::support::{CORDISK, MIB, Rig, run_ok};

const README: &str = include_str!("../../README.md");
const SEMANTICS: &str = include_str!("../../docs/semantics.md");
const PROMISES: &str = include_str!("../../docs/promises.md");
const COMMANDS: &str = include_str!("../../docs/commands.md");
const QMP: &str = include_str!("../../docs/qmp.md");

/// Protects: the oldest compiler is one number, wherever it stands.
#[test]
fn the_oldest_rust_is_the_same_everywhere() {
    let manifest = include_str!("../../Cargo.toml");
    let workflow = include_str!("../../.github/workflows/ci.yml");
    let versions = |text: &str, before: &str| -> Vec<String> {
        let after = text.split(before).skip(1);
        after
            .map(|rest| {
                rest.split(|c: char| !c.is_ascii_digit() && c != '.')
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect()
    };
    let oldest = versions(manifest, "\nrust-version = \"");
    assert!(oldest.len() == 1 && oldest[0].starts_with("1."), "Cargo.toml: {oldest:?}");
    assert_eq!(versions(README, "[Rust toolchain](https://rustup.rs), "), oldest, "README.md");
    assert_eq!(
        versions(workflow, "rustup toolchain install 1").len(),
        1,
        "the workflow installs it once"
    );
    assert_eq!(
        versions(workflow, "rustup toolchain install 1"),
        [&oldest[0][1..]],
        "the workflow installs it"
    );
    assert_eq!(versions(workflow, "cargo +"), oldest, "the workflow uses it");
}

#[test]
fn the_documented_options_are_those_of_help_and_no_others() {
    let commands = subcommands(&[]);
    assert!(commands.len() > 10, "{commands:?}");
    for command in &commands {
        let deeper = subcommands(&[command]);
        let mut offered = BTreeSet::new();
        for help in if deeper.is_empty() {
            vec![vec![command.as_str()]]
        } else {
            deeper.iter().map(|word| vec![command.as_str(), word]).collect()
        } {
            offered.extend(offered_by(&help));
        }
        let documented: BTreeSet<String> =
            options(section_of(command)).into_iter().map(String::from).collect();
        assert_eq!(documented, offered, "left: docs/commands.md, right: cordisk {command} --help");
    }
}

/// What a script finds in the output of `cordisk status --json`, while a job runs and another has
/// ended, it also finds in the documentation.
#[test]
fn the_members_of_status_are_documented() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().start();
    let path = disk.path().to_str().expect("UTF-8");
    let cordisk = |args: &[&str]| run_ok(rig.scratch.cordisk().args(args));
    cordisk(&["stream", path, "--wait", "--base", rig.base.to_str().expect("UTF-8")]);
    cordisk(&["stream", path, "--speed", "1K"]);
    cordisk(&["job", "speed", path, "00:00=1K,12:00=1K"]);
    let status: Value = serde_json::from_str(&cordisk(&["status", "--json", path])).expect("JSON");
    assert!(
        status[0]["jobs"][0].is_object()
            && status[0]["last-job"].is_object()
            && status[0]["plan"].is_object(),
        "{status}"
    );
    let mut names = BTreeSet::new();
    members(&status, &mut names);
    assert!(names.len() > 50, "{names:?}");
    // What stands in `arguments` is what the command takes.
    let unknown: Vec<&String> =
        names.iter().filter(|name| !QMP.contains(&format!("`{name}`"))).collect();
    assert_eq!(unknown, Vec::<&String>::new());

    let schema = disk.client().ok("query-qmp-schema", json!({}));
    let entry = |name: &Value| {
        schema
            .as_array()
            .expect("list")
            .iter()
            .find(|entry| entry["name"] == *name)
            .expect("an entry")
            .clone()
    };
    let returned = entry(&entry(&json!("x-query-status"))["ret-type"]);
    let in_schema: Vec<&str> = returned["members"]
        .as_array()
        .expect("members")
        .iter()
        .filter_map(|member| member["name"].as_str())
        .collect();
    let told = status[0].as_object().expect("object").keys().map(String::as_str);
    let missing: Vec<&str> =
        told.filter(|name| !["qmp", "state"].contains(name) && !in_schema.contains(name)).collect();
    assert_eq!(missing, Vec::<&str>::new(), "not in query-qmp-schema");
    cordisk(&["job", "cancel", path]);
    disk.umount();
}

/// The names of all members, however deep.
fn members(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::Object(all) => all.iter().for_each(|(name, value)| {
            names.insert(name.clone());
            members(value, names);
        }),
        Value::Array(all) => all.iter().for_each(|value| members(value, names)),
        _ => {}
    }
}

/// The options in the help of a command, without those that every command has.
fn offered_by(command: &[&str]) -> BTreeSet<String> {
    let help = run_ok(Command::new(CORDISK).args(command).arg("--help"));
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    // Before the gap stands the option, after it what it means.
    let spelled: Vec<&str> =
        lines.map(|line| line.split("  ").next().unwrap_or_default()).collect();
    let spelled = spelled.join(" ");
    let mut offered = options(&spelled);
    for everywhere in ["-h", "--help"] {
        assert!(offered.remove(everywhere), "{command:?} has no {everywhere}");
    }
    offered.into_iter().map(String::from).collect()
}

/// The names below "Commands:" in the help of a command.
fn subcommands(of: &[&str]) -> Vec<String> {
    let help = run_ok(Command::new(CORDISK).args(of).arg("--help"));
    let below = help.split_once("\nCommands:\n").map_or("", |(_, below)| below);
    below
        .lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .map(String::from)
        .collect()
}

/// The synopsis of one command and what follows, up to the next one.
fn section_of(command: &str) -> &'static str {
    let start = COMMANDS
        .find(&format!("```text\ncordisk {command} "))
        .unwrap_or_else(|| panic!("no synopsis of {command}"));
    let rest = &COMMANDS[start + 7..];
    &rest[..rest.find("```text\n").unwrap_or(rest.len())]
}

/// Words that are options: `-b`, `--backing`.
fn options(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.split(|c| !is_part(c))
        .filter(|word| {
            let name = word.trim_start_matches('-');
            let dashes = word.len() - name.len();
            (dashes == 1 && name.len() == 1 || dashes == 2 && name.len() > 1)
                && name.starts_with(|c: char| c.is_ascii_alphabetic())
        })
        .collect()
}

/// Protects: the README stays what a reader takes in at once. Details belong to docs/.
#[test]
fn the_readme_is_short() {
    assert!(README.lines().count() <= 160, "{} lines", README.lines().count());
    let long = README.lines().filter(|line| line.chars().count() > 100);
    // Rows of tables and links to pictures cannot be broken.
    let long: Vec<&str> = long.filter(|line| !line.starts_with(['|', '!'])).collect();
    assert_eq!(long, Vec::<&str>::new(), "longer than 100 columns");
}

/// Numbers of the statements are quoted elsewhere, so they are counted here. Each has a test.
#[test]
fn the_semantics_are_numbered_without_a_gap_and_each_has_a_test() {
    let mut numbers = Vec::new();
    let mut statement = String::new();
    let check = |number: usize, statement: &str| {
        let tests = tests_in(statement);
        assert!(!tests.is_empty(), "statement {number} names no test");
        tests.iter().for_each(|name| {
            assert!(exists(name), "statement {number} names {name}, which does not exist")
        });
    };
    for line in SEMANTICS.lines() {
        if let Some(number) =
            line.split_once(". ").and_then(|(number, _)| number.parse::<usize>().ok())
        {
            if let Some(last) = numbers.last() {
                check(*last, &statement);
            }
            numbers.push(number);
            statement.clear();
        }
        statement += line;
    }
    check(numbers.len(), &statement);
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>());
    assert!(numbers.len() > 30, "{numbers:?}");
}

/// Every test that is named as the proof of a promise is there: in the test programs, or in the
/// library.
#[test]
fn the_tests_of_the_promises_exist() {
    let promises = PROMISES.lines().filter(|line| line.starts_with("| P")).count();
    assert_eq!(promises, 17);
    let names = tests_in(PROMISES);
    assert!(names.len() > 30, "{names:?}");
    for name in names {
        assert!(exists(name), "docs/promises.md names {name}, which does not exist");
    }
}

/// Links inside of the project lead to files and headings that are there.
#[test]
fn no_link_leads_nowhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let documents = std::fs::read_dir(root.join("docs"))
        .expect("docs")
        .map(|entry| entry.expect("entry").path());
    let documents: Vec<PathBuf> =
        documents.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
    assert!(documents.len() > 5, "{documents:?}");
    let mut links = 0;
    for document in documents
        .into_iter()
        .chain(["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root.join(name)))
    {
        let text = std::fs::read_to_string(&document).expect("a document");
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
            .filter(|link| !link.contains("://"))
        {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                document.clone()
            } else {
                document.parent().expect("a directory").join(file)
            };
            assert!(target.exists(), "{}: {link} leads nowhere", document.display());
            if !heading.is_empty() {
                let there = std::fs::read_to_string(&target).expect("a document");
                let anchors = there.lines().filter(|line| line.starts_with('#')).map(anchor);
                assert!(
                    anchors.into_iter().any(|anchor| anchor == heading),
                    "{}: no heading for {link}",
                    document.display()
                );
            }
            links += 1;
        }
    }
    assert!(links > 20, "{links}");
}

/// As GitHub makes them of headings.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    words
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}
