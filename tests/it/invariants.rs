//! Comments cite rules by code (P5, R12, V24, I1, H17). docs/invariants.md says what each means,
//! and which test holds it.

use std::collections::BTreeSet;

use crate::support::source::{comments, exists, files_below, report, tests_in};

const INVARIANTS: &str = include_str!("../../docs/invariants.md");

/// Promises, order of writes, validation, invariants, hazards.
const LETTERS: [char; 5] = ['P', 'R', 'V', 'I', 'H'];

/// This file: it has codes that mean nothing.
const OURSELVES: &str = "tests/it/invariants.rs";

#[test]
fn every_code_is_defined_and_every_definition_is_used() {
    let mut wrong = Vec::new();
    let mut defined = BTreeSet::new();
    for (code, _) in definitions(INVARIANTS) {
        if !defined.insert(code.clone()) {
            wrong.push(format!("docs/invariants.md defines {code} twice"));
        }
    }
    let mut used = BTreeSet::new();
    for file in files_below(&["src", "tests"], &["rs", "py", "sh"])
        .iter()
        .filter(|file| file.name != OURSELVES)
    {
        for (index, line) in file.text.lines().enumerate() {
            for code in codes(line) {
                if !defined.contains(&code) {
                    wrong.push(format!(
                        "{}:{}: {code} is not defined in docs/invariants.md",
                        file.name,
                        index + 1
                    ));
                }
                used.insert(code);
            }
        }
    }
    wrong.extend(
        defined
            .difference(&used)
            .map(|code| format!("docs/invariants.md defines {code}, which is used nowhere")),
    );
    report(&wrong);
}

/// The last column of a definition names tests, or says in a sentence why there is none.
#[test]
fn every_rule_has_a_test_that_exists_or_a_reason() {
    let mut wrong = Vec::new();
    let mut named = 0;
    for (code, row) in definitions(INVARIANTS) {
        let columns: Vec<&str> = row.trim().trim_matches('|').split('|').map(str::trim).collect();
        let [_, meaning, held] = columns[..] else {
            wrong.push(format!("{code}: not three columns: {row}"));
            continue;
        };
        if meaning.len() < 40 {
            wrong.push(format!("{code}: no sentence: {meaning}"));
        }
        let tests = tests_in(held);
        named += tests.len();
        if tests.is_empty() && held.strip_prefix("None: ").is_none_or(|reason| reason.len() < 40) {
            wrong.push(format!("{code}: names no test, and no reason: {held}"));
        }
        wrong.extend(
            tests
                .iter()
                .filter(|name| !exists(name))
                .map(|name| format!("{code}: there is no test {name}")),
        );
    }
    report(&wrong);
    assert!(named > 100, "{named} tests");
}

/// A reader of the repository can look up what a comment refers to: a code, a file, a standard; not
/// "2.6" or "finding 5" of a document that is not there.
#[test]
fn no_comment_cites_a_document_that_is_not_here() {
    let mut wrong = Vec::new();
    let files = files_below(&["src", "tests", "scripts", "examples"], &["rs", "py", "sh"]);
    for file in files.iter().filter(|file| file.name != OURSELVES) {
        for comment in comments(file) {
            let cited = section(&comment.text);
            wrong.extend(
                cited.map(|cited| format!("{}:{}: {cited} of what?", file.name, comment.line)),
            );
        }
    }
    report(&wrong);
}

/// The number of a section that a comment cites alone, at its start or between parentheses ("///
/// 2.6: …", "(R1, 2.6)"), or with a word that says of no document ("finding 5").
fn section(comment: &str) -> Option<&str> {
    let is_number = |text: &str| {
        let mut parts = text.split('.');
        let is_part = |part: &str| {
            (1..=2).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
        };
        text.contains('.') && parts.all(is_part)
    };
    let text = comment.trim_start_matches(['/', '!', '#', ' ']).trim_start_matches("Protects: ");
    let start = text
        .split([':', ',', ' '])
        .next()
        .filter(|start| text[start.len()..].starts_with([':', ',']));
    let listed = comment
        .split('(')
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .flat_map(|(inside, _)| inside.split([',', ';']));
    let number = start.into_iter().chain(listed.map(str::trim)).find(|text| is_number(text));
    let words = ["data-safety", "finding "].into_iter().find(|word| {
        comment.match_indices(word).any(|(at, _)| {
            !word.ends_with(' ')
                || comment[at + word.len()..].starts_with(|c: char| c.is_ascii_digit())
        })
    });
    number.or(words)
}

/// The rows of the tables that define a code: `| P1 | sentence | tests |`.
fn definitions(text: &str) -> impl Iterator<Item = (String, &str)> {
    text.lines().filter_map(|line| {
        let cell = line.strip_prefix("| ")?.split(" |").next()?;
        codes(cell).into_iter().find(|code| code == cell).map(|code| (code, line))
    })
}

/// The codes in a line: one of the letters and one or two digits, alone between characters that
/// belong to no word. What stands behind `::` is a name of Rust (`ABI::V1`).
fn codes(line: &str) -> Vec<String> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let code_at = |at: usize| {
        let (before, rest) = line.split_at(at);
        let digits =
            rest[1..].find(|c: char| !is_word(c)).map_or(&rest[1..], |end| &rest[1..1 + end]);
        let alone = !before.ends_with(is_word) && !before.ends_with("::");
        let is_number =
            (1..=2).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        (alone && is_number && !digits.starts_with('0'))
            .then(|| rest[..1 + digits.len()].to_owned())
    };
    line.match_indices(LETTERS).filter_map(|(at, _)| code_at(at)).collect()
}

#[test]
fn codes_are_found_and_nothing_that_looks_like_one() {
    assert_eq!(
        codes("/// R1, R12: a (V3). H1-H4, \"P5: x\" I8"),
        ["R1", "R12", "V3", "H1", "H4", "P5", "I8"]
    );
    for none in
        ["ABI::V10", "H264", "0xP9", "p9_a", "R7c", "XV2", "P", "P_1", "_P1", "V02", "R1é", "éR1"]
    {
        assert_eq!(codes(none), Vec::<String>::new(), "{none}");
    }
    assert_eq!(codes("`V2`é P3"), ["V2", "P3"]);
}

#[test]
fn definitions_are_rows_of_tables() {
    let text = "P1 is text\n| P1 | sentence | `a::b` |\n| P1 and P2 | no |\n|---|---|\n| R12 | other | None: reason |\n";
    let found: Vec<_> = definitions(text).map(|(code, _)| code).collect();
    assert_eq!(found, ["P1", "R12"]);
}

#[test]
fn citations_of_nothing_are_found() {
    for (text, number) in [
        ("/// 2.6, H18: no", "2.6"),
        ("// (R1, 2.5)", "2.5"),
        ("//! a (4.3, 4.4).", "4.3"),
        ("/// Protects: 2.5: a", "2.5"),
    ] {
        assert_eq!(section(text), Some(number), "{text}");
    }
    assert!(
        section("// (finding 6)").is_some() && section("//! see data-safety, part 3").is_some()
    );
    for good in [
        "// Linux 6.6 (or 6.8 and later)",
        "// 2.6 of them",
        "// a finding of ours",
        "// RFC 3164, section 4.1.1",
        "// (Linux 6.14)",
        "/// `1.1`: a",
    ] {
        assert_eq!(section(good), None, "{good}");
    }
}
