//! The language of the comments, and names that mean two things: rules that a test can hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::support::source::{Comment, Source, comments, files_below, sources};

/// Columns that a line of comment may have.
const COLUMNS: usize = 100;

/// Relative pronouns of people. A thread, a request, a process or a client is a thing: "that", or
/// its name again.
const OF_PEOPLE: [&str; 4] = ["who", "whoever", "whom", "whomever"];

/// What may stand in front of [`OF_PEOPLE`], so that a person is meant.
const PEOPLE: [&str; 9] = [
    "user",
    "users",
    "person",
    "people",
    "somebody",
    "administrator",
    "administrators",
    "developer",
    "developers",
];

/// Pictures for what has a name: "module" or "layer", "space", "lower bound".
const PICTURES: [&str; 4] = ["room", "rooms", "floor", "floors"];

/// Public types of one name in two crates, and why they may have it.
const SAME_NAME: &[(&str, &str)] = &[];

#[test]
fn no_type_name_is_public_in_two_crates() {
    assert!(SAME_NAME.iter().all(|(_, reason)| reason.len() > 30), "a reason for each");
    let known: BTreeSet<&str> = SAME_NAME.iter().map(|(name, _)| *name).collect();
    let found = in_two_crates(&sources());
    let wrong = found
        .iter()
        .filter(|(name, _)| !known.contains(name.as_str()))
        .map(|(name, files)| format!("{name}: {}", files.join(", ")));
    let unused = known
        .iter()
        .filter(|name| !found.contains_key(**name))
        .map(|name| format!("{name} is in the list and in one crate only"));
    let wrong: Vec<String> = wrong.chain(unused).collect();
    assert!(wrong.is_empty(), "public types of one name in two crates:\n  {}", wrong.join("\n  "));
}

#[test]
fn no_comment_is_wider_than_100_columns() {
    report(&found(too_wide));
}

#[test]
fn only_people_are_called_who() {
    report(&found(of_people));
}

#[test]
fn modules_are_no_rooms() {
    report(&found(pictures));
}

/// What a rule finds in the comments of a file: numbers of lines, and what is wrong there.
type Rule = fn(&[Comment], &str) -> Vec<(usize, String)>;

/// What a rule finds in the whole tree: file, number of the line, what is wrong.
fn found(rule: Rule) -> Vec<(String, usize, String)> {
    let files =
        files_below(&["src", "tests", "scripts", "examples", "contrib"], &["rs", "sh", "py"]);
    let in_file = |file: &Source| {
        let name = file.name.clone();
        rule(&comments(file), &file.text)
            .into_iter()
            .map(move |(line, what)| (name.clone(), line, what))
    };
    files.iter().flat_map(in_file).collect()
}

/// Fails with every finding, and how many each directory has.
fn report(found: &[(String, usize, String)]) {
    let mut text = String::new();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (file, line, what) in found {
        writeln!(text, "  {file}:{line}: {what}").expect("a string");
        let parts: Vec<&str> = file.split('/').collect();
        *counts.entry(parts[..parts.len().min(3) - 1].join("/")).or_default() += 1;
    }
    for (directory, count) in counts {
        writeln!(text, "  {count:6} in {directory}").expect("a string");
    }
    assert!(found.is_empty(), "\n{text}  {:6} in all", found.len());
}

fn too_wide(comments: &[Comment], text: &str) -> Vec<(usize, String)> {
    let widths: Vec<usize> = text.lines().map(|line| line.chars().count()).collect();
    let width = |number: usize| widths.get(number - 1).copied().unwrap_or_default();
    // A row of a table cannot be wrapped.
    let is_row = |number: usize| {
        let line = text.lines().nth(number - 1).unwrap_or_default().trim_start();
        line.trim_start_matches(['/', '!', ' ']).starts_with('|')
    };
    let lines = comments
        .iter()
        .filter(|comment| comment.alone && !is_row(comment.line))
        .map(|comment| (comment.line, width(comment.line)));
    lines
        .filter(|(_, width)| *width > COLUMNS)
        .map(|(line, width)| (line, format!("{width} columns")))
        .collect()
}

fn of_people(comments: &[Comment], _: &str) -> Vec<(usize, String)> {
    let words = words(comments);
    let is_wrong = |index: usize| {
        let before = index.checked_sub(1).map(|before| &words[before]);
        OF_PEOPLE.contains(&words[index].1.as_str())
            && !before.is_some_and(|(_, word)| PEOPLE.contains(&word.as_str()))
    };
    let context = |index: usize| {
        let around = &words[index.saturating_sub(3)..words.len().min(index + 4)];
        around.iter().map(|(_, word)| word.as_str()).filter(|word| !word.is_empty())
    };
    (0..words.len())
        .filter(|&index| is_wrong(index))
        .map(|index| {
            (words[index].0, format!("… {} …", context(index).collect::<Vec<_>>().join(" ")))
        })
        .collect()
}

fn pictures(comments: &[Comment], _: &str) -> Vec<(usize, String)> {
    words(comments).into_iter().filter(|(_, word)| PICTURES.contains(&word.as_str())).collect()
}

/// The words of comments in lower case with the numbers of their lines, without what stands in
/// backquotes. Where a sentence or a comment ends, there is an empty one.
fn words(comments: &[Comment]) -> Vec<(usize, String)> {
    let mut words = Vec::new();
    let mut last = 0;
    for comment in comments {
        if last + 1 != comment.line {
            words.push((comment.line, String::new()));
        }
        last = comment.line;
        let prose =
            comment.text.split('`').step_by(2).collect::<Vec<_>>().join(" ` ").to_lowercase();
        for part in prose.split_inclusive(|c: char| !c.is_alphanumeric() && c != '_' && c != '\'') {
            let word = part.trim_end_matches(|c: char| !c.is_alphanumeric() && c != '_');
            if !word.is_empty() {
                words.push((comment.line, word.to_owned()));
            }
            if part.ends_with(['.', ':', ';', '?', '!', '`']) {
                words.push((comment.line, String::new()));
            }
        }
    }
    words
}

/// Names of types that are declared `pub` in two crates, with the files.
fn in_two_crates(files: &[Source]) -> BTreeMap<String, Vec<String>> {
    let mut declared: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in files {
        for name in file.text.lines().filter_map(public_type) {
            declared.entry(name.to_owned()).or_default().insert(file.name.clone());
        }
    }
    let crates = |files: &BTreeSet<String>| {
        files.iter().filter_map(|file| file.split('/').nth(1)).collect::<BTreeSet<_>>().len()
    };
    declared.retain(|_, files| crates(files) > 1);
    declared.into_iter().map(|(name, files)| (name, files.into_iter().collect())).collect()
}

/// The name that a line declares: `pub struct Name`, at any depth of modules. `pub(super)` is not
/// public.
fn public_type(line: &str) -> Option<&str> {
    let item = line.trim_start().strip_prefix("pub ")?;
    let name = ["struct ", "enum ", "trait ", "type ", "union "]
        .iter()
        .find_map(|kind| item.strip_prefix(kind))?;
    name.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &str) -> Source {
        Source { name: name.into(), text: text.into() }
    }

    fn lines(rule: Rule, text: &str) -> Vec<usize> {
        let file = file("src/a/b.rs", text);
        rule(&comments(&file), text).into_iter().map(|(line, _)| line).collect()
    }

    #[test]
    fn wide_comments_are_found_and_wide_code_is_not() {
        let wide = "x".repeat(98);
        let text = format!(
            "// {wide}\n// {}\n    /// {}\nlet {wide} = 1; // {wide}\nlet url = \"//{wide}\";\n",
            &wide[1..],
            "é".repeat(93)
        );
        assert_eq!(lines(too_wide, &text), [1, 3]);
    }

    #[test]
    fn only_people_may_be_who() {
        let text = "/// The thread who waits.\n\n// A user who waits.\n\n// For users\n// who wait, and whoever\n// else.\n\n/// Users. Who?\n";
        assert_eq!(lines(of_people, text), [1, 6, 9]);
        assert_eq!(
            lines(of_people, "// `who`, whose, who_waits\nlet who = \"// who\";\n// people who\n"),
            [0; 0]
        );
        assert_eq!(lines(of_people, "// a user\nlet a = 1;\n\n// who\n"), [4], "another comment");
    }

    #[test]
    fn pictures_are_found() {
        assert_eq!(
            lines(pictures, "//! This Room.\n/// `floor`, floored\n// the floors;\n"),
            [1, 3]
        );
    }

    #[test]
    fn one_name_in_two_crates_is_found() {
        let files = [
            file(
                "src/a/one.rs",
                "pub struct Answer {\n    pub enum Deep<T> {\npub(crate) struct Inside;\npub type Alias = u8;",
            ),
            file("src/a/two.rs", "pub struct Twice;\npub fn Answer() {}"),
            file("src/a/three.rs", "pub enum Twice {}\nstruct Alias;"),
            file(
                "src/b/four.rs",
                "pub trait Answer: Send {\npub struct Deep(u8);\npub(crate) struct Inside;\nstruct Twice;",
            ),
        ];
        let found = in_two_crates(&files);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["Answer", "Deep"]);
        assert_eq!(found["Answer"], ["src/a/one.rs", "src/b/four.rs"]);
    }
}
