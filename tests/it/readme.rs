//! The README and the program say the same: every option of `--help` stands in the README's "Command line", and every option there exists.

use std::collections::BTreeSet;
use std::process::Command;

use crate::support::{CORDISK, run_ok};

const README: &str = include_str!("../../README.md");

#[test]
fn the_readme_has_the_options_of_help_and_no_others() {
    for command in ["create", "mount", "check", "stream", "status", "umount", "map", "info", "top"] {
        let help = run_ok(Command::new(CORDISK).args([command, "--help"]));
        let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
        // Before the gap stands the option, after it what it means.
        let spelled: Vec<&str> = lines.map(|line| line.split("  ").next().unwrap_or_default()).collect();
        let spelled = spelled.join(" ");
        let mut offered = options(&spelled);
        for everywhere in ["-h", "--help"] {
            assert!(offered.remove(everywhere), "{command} has no {everywhere}");
        }
        assert_eq!(options(section_of(command)), offered, "left: README, right: cordisk {command} --help");
    }
}

/// Numbers of the sentences are quoted elsewhere, so they are counted here.
#[test]
fn the_semantics_are_numbered_without_a_gap() {
    let start = README.find("## Semantics").expect("the section Semantics");
    let section = &README[start..];
    let section = &section[..section[2..].find("\n## ").expect("a section after Semantics") + 2];
    let numbers: Vec<usize> = section.lines().filter_map(|line| line.split_once(". ")?.0.parse().ok()).collect();
    assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>());
    assert!(numbers.len() > 20, "{numbers:?}");
}

/// The synopsis and the table of one command.
fn section_of(command: &str) -> &'static str {
    let start = README.find(&format!("```text\ncordisk {command} ")).unwrap_or_else(|| panic!("README has no synopsis of {command}"));
    let rest = &README[start..];
    let table = rest.find("| option |").expect("a table of options below the synopsis");
    &rest[..table + rest[table..].find("\n\n").expect("an end of the table")]
}

/// Words that are options: `-b`, `--backing`.
fn options(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.split(|c| !is_part(c))
        .filter(|word| {
            let name = word.trim_start_matches('-');
            let dashes = word.len() - name.len();
            (dashes == 1 && name.len() == 1 || dashes == 2 && name.len() > 1) && name.starts_with(|c: char| c.is_ascii_alphabetic())
        })
        .collect()
}

/// Every test that the README names as the proof of a promise is there: in the test programs, or in the library.
#[test]
fn the_tests_of_the_promises_exist() {
    let start = README.find("## What is promised").expect("the section of the promises");
    let table = &README[start..start + README[start..].find("\nThe figures").expect("the figures behind the table")];
    let promises = table.lines().filter(|line| line.starts_with("| P")).count();
    assert_eq!(promises, 16);
    let names: Vec<&str> = table.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
    assert!(names.len() > 30, "{names:?}");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in names {
        let parts: Vec<&str> = name.split("::").collect();
        let found = [root.join("tests/it"), root.join("src")].iter().any(|top| {
            // A module, or a function in one: `a::b::f` is `fn f` in a/b.rs or a/b/mod.rs.
            let module = |path: &std::path::Path| [path.with_extension("rs"), path.join("mod.rs")].into_iter().find(|file| file.is_file());
            let (last, above) = parts.split_last().expect("a name");
            let path = |parts: &[&str]| parts.iter().fold(top.clone(), |path, part| path.join(part));
            module(&path(&parts)).is_some()
                || module(&path(above))
                    .is_some_and(|file| std::fs::read_to_string(file).is_ok_and(|source| source.contains(&format!("fn {last}()"))))
        });
        assert!(found, "the README names {name}, which does not exist");
    }
}
