//! The source tree as text, for the tests of its structure and its language: files, comments, and
//! the tests that a document names.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// A file of the repository.
pub struct Source {
    /// Path from the root of the repository, with `/`.
    pub name: String,
    pub text: String,
}

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `src/`, sorted by name.
pub fn sources() -> Vec<Source> {
    let files = files_below(&["src"], &["rs"]);
    assert!(files.len() > 100, "src/ was not found below {}", root().display());
    files
}

/// The files below directories of the repository with one of these extensions, sorted by name.
pub fn files_below(directories: &[&str], extensions: &[&str]) -> Vec<Source> {
    let mut files = Vec::new();
    directories
        .iter()
        .for_each(|directory| collect(&root().join(directory), extensions, &mut files));
    files.sort();
    let name = |path: &PathBuf| path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    files
        .iter()
        .map(|path| Source { name: name(path), text: std::fs::read_to_string(path).unwrap() })
        .collect()
}

fn collect(directory: &Path, extensions: &[&str], files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            collect(&path, extensions, files);
        } else if path
            .extension()
            .is_some_and(|end| extensions.iter().any(|extension| end == *extension))
        {
            files.push(path);
        }
    }
}

/// Fails with one line for each entry of `wrong`.
pub fn report(wrong: &[String]) {
    let mut text = String::new();
    for line in wrong {
        writeln!(text, "  {line}").unwrap();
    }
    assert!(wrong.is_empty(), "\n{text}");
}

/// Returns the texts in backquotes that are Rust paths.
pub fn tests_in(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect()
}

/// Whether the test exists, or a module with tests: `a::b::f` is `fn f` in a/b.rs or a/b/mod.rs, or
/// in a module inside a.rs.
pub fn exists(name: &str) -> bool {
    let parts: Vec<&str> = name.split("::").filter(|part| !part.is_empty()).collect();
    [root().join("tests/it"), root().join("src")].iter().any(|top| {
        let module = |path: &Path| {
            [path.with_extension("rs"), path.join("mod.rs")].into_iter().find(|file| file.is_file())
        };
        let (last, above) = parts.split_last().expect("a name");
        let path = |parts: &[&str]| parts.iter().fold(top.clone(), |path, part| path.join(part));
        let has = |file: PathBuf| {
            std::fs::read_to_string(file).is_ok_and(|source| has_test(&source, last))
        };
        // `mod tests { … }` may be in the file of the module itself.
        let inside =
            above.split_last().filter(|(tests, _)| **tests == "tests").map(|(_, above)| above);
        module(&path(&parts)).is_some()
            || module(&path(above)).is_some_and(has)
            || inside.and_then(|above| module(&path(above))).is_some_and(has)
    })
}

/// Whether the text has `fn name()` below a `#[test]`, with only attributes and comments between
/// the two.
fn has_test(source: &str, name: &str) -> bool {
    source.match_indices(&format!("fn {name}()")).any(|(at, _)| {
        let attributes = source[..at].lines().rev().map(str::trim).filter(|line| !line.is_empty());
        attributes
            .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
            .any(|line| line == "#[test]")
    })
}

/// A comment on one line.
#[derive(Debug, Eq, PartialEq)]
pub struct Comment {
    /// Number of the line, from 1.
    pub line: usize,
    /// Whether the line has only the comment.
    pub alone: bool,
    /// From the marker (`//`, `#`) to the end of the line.
    pub text: String,
}

/// Returns the comments of a file in the order of its lines; the name of the file determines the
/// language.
pub fn comments(file: &Source) -> Vec<Comment> {
    if file.name.ends_with(".rs") { rust_comments(&file.text) } else { script_comments(&file.text) }
}

/// Returns the comments of Rust code. Strings of every kind are skipped, so `"https://…"` is no
/// comment. Each line of a block comment is one comment.
fn rust_comments(text: &str) -> Vec<Comment> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let (mut at, mut line, mut start_of_line) = (0, 1, 0);
    let mut add = |line: usize, start_of_line: usize, from: usize, to: usize| {
        let alone = text[start_of_line..from].trim().is_empty();
        found.push(Comment { line, alone, text: text[from..to].trim_end().to_owned() });
    };
    while at < bytes.len() {
        let rest = &text[at..];
        if rest.starts_with("//") {
            let end = at + rest.find('\n').unwrap_or(rest.len());
            add(line, start_of_line, at, end);
            at = end;
            continue;
        }
        if rest.starts_with("/*") {
            let end = at + rest.find("*/").map_or(rest.len(), |end| end + 2);
            for (index, part) in text[at..end].split_inclusive('\n').enumerate() {
                if index > 0 {
                    (line, start_of_line) = (line + 1, at);
                }
                add(line, start_of_line, at, at + part.len());
                at += part.len();
            }
            continue;
        }
        let len = literal(
            rest,
            at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_'),
        );
        for (offset, _) in rest[..len].match_indices('\n') {
            (line, start_of_line) = (line + 1, at + offset + 1);
        }
        at += len;
    }
    found
}

/// Returns the length in bytes of the string or character literal at the start of `rest`, or of its
/// first character if there is no literal. With `in_word`, the character before it belongs to a
/// word, so an `r` does not start a raw string.
fn literal(rest: &str, in_word: bool) -> usize {
    let first = rest.chars().next().expect("not empty").len_utf8();
    let hashes = rest.strip_prefix('r').map(|raw| raw.len() - raw.trim_start_matches('#').len());
    if let Some(hashes) = hashes.filter(|hashes| !in_word && rest[1 + hashes..].starts_with('"')) {
        let end = format!("\"{}", "#".repeat(hashes));
        let body = 2 + hashes;
        return rest[body..].find(&end).map_or(rest.len(), |at| body + at + end.len());
    }
    let quote = match rest.as_bytes()[0] {
        b'"' => '"',
        // A lifetime has no second quote; a character literal is one character or an escape.
        b'\'' if rest[1..].starts_with('\\') => '\'',
        b'\'' => {
            let inside = rest[1..].chars().next().map_or(0, char::len_utf8);
            return if rest[1 + inside..].starts_with('\'') { inside + 2 } else { first };
        }
        _ => return first,
    };
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Returns the comments of shell and Python: a `#` with only blanks before it, or one behind a
/// blank and outside of quotes that open on its line.
fn script_comments(text: &str) -> Vec<Comment> {
    let in_line = |(index, line): (usize, &str)| {
        let is_comment = |at: &usize| {
            let before = &line[..*at];
            let quotes = |quote| before.matches(quote).count();
            before.trim().is_empty()
                || before.ends_with([' ', '\t']) && quotes('"') % 2 == 0 && quotes('\'') % 2 == 0
        };
        let at = line.match_indices('#').map(|(at, _)| at).find(is_comment)?;
        let interpreter = index == 0 && line.starts_with("#!");
        let alone = line[..at].trim().is_empty();
        (!interpreter).then(|| Comment {
            line: index + 1,
            alone,
            text: line[at..].trim_end().to_owned(),
        })
    };
    text.lines().enumerate().filter_map(in_line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, bool, String)> {
        rust_comments(text)
            .into_iter()
            .map(|comment| (comment.line, comment.alone, comment.text))
            .collect()
    }

    #[test]
    fn comments_of_rust_are_found_and_strings_are_none() {
        let text = "//! a\nlet s = \"// no\\\"// no\"; // b\nlet c = '\"'; // c\nr#\"// \"no\n\"#; /* d\ne */ f\n'\\''; // g\nfn f<'a>() {} // h\n";
        let expected = [
            (1, true, "//! a"),
            (2, false, "// b"),
            (3, false, "// c"),
            (5, false, "/* d"),
            (6, true, "e */"),
            (7, false, "// g"),
        ];
        let mut expected: Vec<_> =
            expected.iter().map(|&(line, alone, text)| (line, alone, text.to_owned())).collect();
        expected.push((8, false, "// h".to_owned()));
        assert_eq!(found(text), expected);
        assert_eq!(found("let url = \"https://a\";\nlet d = b\"//\";\nlet str = for\"//\";"), []);
        assert_eq!(found("let s = \"1\n2\"; // é"), [(2, false, "// é".to_owned())]);
    }

    #[test]
    fn comments_of_scripts_are_found() {
        let text = "#!/bin/sh\n# a\necho \"# no\" ${#b} # c\n\t# d\necho '# no'";
        let found: Vec<_> = script_comments(text)
            .into_iter()
            .map(|comment| (comment.line, comment.alone, comment.text))
            .collect();
        assert_eq!(
            found,
            [(2, true, "# a".into()), (3, false, "# c".into()), (4, true, "# d".into())]
        );
    }

    #[test]
    fn only_what_is_below_test_is_a_test() {
        let source = "fn helper() {}\n\n#[test]\n#[should_panic(expected = \"x\")]\nfn a() {}\n\n    #[test]\n    /// b\n    fn b() {}\n";
        assert!(has_test(source, "a") && has_test(source, "b"));
        assert!(!has_test(source, "helper") && !has_test(source, "c"));
    }

    #[test]
    fn tests_that_do_not_exist_are_noticed() {
        assert!(
            exists("qcow2::image::tests::failed_barrier_is_sticky")
                && exists("trials::crash_tests")
                && exists("trials::faults")
        );
        assert!(
            exists("qcow2::format::entries::tests::corrupt_entries_are_refused"),
            "inside of the file of the module"
        );
        assert!(!exists("qcow2::image::tests::no_such_test") && !exists("no_such_module::tests"));
        assert_eq!(tests_in("`a::b`, `c` and `d::e::f`"), ["a::b", "d::e::f"]);
    }
}
