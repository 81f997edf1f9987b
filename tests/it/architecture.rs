//! The shape of the code, as a test: which room may use which, and what appears nowhere.
//!
//! `src/lib.rs` is the map for people; this file is the same map for the machine. A failure names file, line and rule. Where a new room or a better cut
//! is meant, the table below changes in the same commit as the code.
//!
//! The source is read with a small lexer that knows comments, strings, raw strings, characters and lifetimes, so that a word in a comment is not a use.
//! Test modules (`#[cfg(test)]`, `tests.rs`, `tests/`) are free of the rules, but for `unsafe`.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A module directly below the crate root. It may use rooms on lower floors, except those it is told not to; of its own floor only `error`, `sync` and `mutants`.
struct Room {
    name: &'static str,
    floor: u32,
    never: &'static [&'static str],
}

const ROOMS: &[Room] = &[
    Room { name: "error", floor: 0, never: &[] },
    Room { name: "sync", floor: 0, never: &[] },
    Room { name: "mutants", floor: 0, never: &[] },
    Room { name: "format", floor: 0, never: &["sync"] }, // pure: bytes in, values out
    Room { name: "range_lock", floor: 0, never: &[] },
    Room { name: "attributes", floor: 0, never: &[] },
    Room { name: "storage", floor: 1, never: &["format", "range_lock"] }, // one file, whatever it holds
    Room { name: "job", floor: 1, never: &["format", "range_lock"] },     // a job, whatever it does
    Room { name: "sandbox", floor: 1, never: &["format", "range_lock"] }, // rights of the process, not its work
    Room { name: "running", floor: 1, never: &["format", "range_lock", "sync"] }, // files that say who runs
    Room { name: "logging", floor: 2, never: &["format", "range_lock", "sync", "job", "sandbox", "storage"] }, // lines of text, whatever they say
    Room { name: "image", floor: 2, never: &["job", "sandbox"] },
    Room { name: "chain", floor: 3, never: &["job", "range_lock", "sandbox"] },
    Room { name: "disk", floor: 4, never: &["job", "sandbox"] },
    Room { name: "create", floor: 5, never: &["job", "sandbox"] },
    Room { name: "check", floor: 5, never: &["job", "chain", "disk", "sandbox"] }, // the image alone, never what lies below
    Room { name: "stream", floor: 5, never: &["image", "storage", "sandbox"] },    // the disk's public face is enough
    Room { name: "map", floor: 5, never: &["job", "image", "storage", "sandbox"] }, // where bytes are, not what they are
    Room { name: "info", floor: 6, never: &["job", "sandbox", "disk", "image"] },  // headers alone
    Room { name: "fuse", floor: 6, never: &["job", "stream", "create", "image", "storage", "sandbox"] },
    Room { name: "qmp", floor: 6, never: &["create", "image", "storage", "sandbox"] },
    Room { name: "metrics", floor: 6, never: &["chain", "image", "storage", "stream", "create", "sandbox"] },
    Room { name: "keeper", floor: 7, never: &["disk", "chain", "image", "storage", "job", "stream", "create"] }, // reads no image
    Room { name: "client", floor: 7, never: &["chain", "create", "disk", "image", "job", "qmp", "storage", "stream"] }, // another process than the disk's
    Room { name: "cli", floor: 8, never: &["image", "storage"] },
    Room { name: "daemon", floor: 9, never: &[] },
    Room { name: "simulation", floor: 10, never: &["fuse", "qmp", "daemon", "cli"] }, // for tests and fuzzing only
    Room { name: "main", floor: 10, never: &[] },
];

/// `crate::Error` and its like: `lib.rs` re-exports them from `error`.
const REEXPORTED: &[&str] = &["Error", "ErrorKind", "Result"];

/// Words of the wire protocol. Whoever else needs one of them is doing the control socket's work.
const WIRE_WORDS: &[&str] = &["block-stream", "BLOCK_JOB_", "JOB_STATUS_CHANGE", "query-block-jobs", "DeviceNotActive"];

/// Types that make a `static` a hidden channel between rooms, beside `Atomic…`. (`Cell` and its like can only stand in a `thread_local!`.)
const SHARED_STATE: &[&str] = &["Mutex", "RwLock", "Condvar", "Once", "OnceLock", "LazyLock"];

/// The only file that shares memory with the kernel. Everything unsafe in it says why it is sound, which Clippy sees to.
const WITH_UNSAFE: &str = "src/fuse/ring.rs";

const LINES_AT_MOST: usize = 600;
const LINES_WORTH_A_WORD: usize = 400;

#[test]
fn rooms_use_only_lower_floors() {
    let mut wrong = Vec::new();
    for file in sources() {
        let Some(room) = room_of(&file) else {
            wrong.push(format!("{}: a new room; give it a floor in {}", file.name, file!()));
            continue;
        };
        if room == "lib" {
            continue; // declares the rooms and re-exports the error type
        }
        let from = find(room).unwrap();
        for (line, used) in file.uses() {
            if REEXPORTED.contains(&used.as_str()) || used == room {
                continue;
            }
            match find(&used) {
                None => wrong.push(format!("{}:{line}: uses `{used}`, which is not a room", file.name)),
                Some(to) if from.never.contains(&to.name) => wrong.push(format!("{}:{line}: `{room}` never uses `{used}`", file.name)),
                Some(to) if to.floor < from.floor || (to.floor == from.floor && matches!(to.name, "error" | "sync" | "mutants")) => {}
                Some(to) => wrong.push(format!("{}:{line}: `{room}` (floor {}) uses `{used}` (floor {})", file.name, from.floor, to.floor)),
            }
        }
        for line in file.supers_to_the_root() {
            wrong.push(format!("{}:{line}: `super::` climbs out of the room; write `crate::`, which this test reads", file.name));
        }
    }
    report(&wrong);
}

#[test]
fn every_room_of_the_table_exists() {
    let files = sources();
    let wrong: Vec<_> = ROOMS
        .iter()
        .filter(|room| !files.iter().any(|file| room_of(file) == Some(room.name)))
        .map(|room| format!("{}: in the table, but not in src", room.name))
        .collect();
    report(&wrong);
}

/// I5: backing files are never written, by type. `chain` holds readers and has no word for writing.
#[test]
fn the_chain_has_no_word_for_writing() {
    let mut wrong = Vec::new();
    for file in sources().iter().filter(|file| room_of(file) == Some("chain")) {
        for (line, word) in words(&file.code) {
            if ["Image", "ReadWrite", "write_at", "clone_range", "punch_hole", "create_new"].contains(&word) {
                wrong.push(format!("{}:{line}: `{word}`", file.name));
            }
        }
    }
    report(&wrong);
}

#[test]
fn unsafe_is_in_one_file() {
    let mut wrong = Vec::new();
    for file in sources() {
        for (line, word) in words(&file.code_with_tests) {
            if word == "unsafe" && file.name != WITH_UNSAFE {
                wrong.push(format!("{}:{line}: unsafe", file.name));
            }
        }
    }
    let lib = sources().into_iter().find(|file| file.name == "src/lib.rs").unwrap();
    if !lib.code.replace(char::is_whitespace, "").contains("#![deny(unsafe_code)]") {
        wrong.push("src/lib.rs: #![deny(unsafe_code)] is gone".into());
    }
    report(&wrong);
}

#[test]
fn no_leftovers_and_no_global_state() {
    let mut wrong = Vec::new();
    for file in sources() {
        for (line, what) in leftovers(&file.code) {
            if file.name == "src/sync.rs" && what == "thread_local!" {
                continue; // the debug check of lock ranks is per thread by its nature
            }
            wrong.push(format!("{}:{line}: {what}", file.name));
        }
    }
    report(&wrong);
}

#[test]
fn every_room_says_what_it_never_does() {
    let mut wrong = Vec::new();
    for file in sources().iter().filter(|file| file.name.ends_with("/mod.rs")) {
        let docs: String = file.text.lines().map_while(|line| line.strip_prefix("//!")).collect::<Vec<_>>().join("\n");
        if docs.trim().is_empty() {
            wrong.push(format!("{}: does not open with //! and a sentence of purpose", file.name));
        } else if !docs.contains("**Never:**") {
            wrong.push(format!("{}: its opening doc comment has no **Never:** line", file.name));
        }
    }
    report(&wrong);
}

#[test]
fn files_stay_readable() {
    let mut wrong = Vec::new();
    for file in sources() {
        let lines = file.lines_without_tests();
        if lines > LINES_AT_MOST {
            wrong.push(format!("{}: {lines} lines without tests, at most {LINES_AT_MOST}; look for the second name in it", file.name));
        } else if lines > LINES_WORTH_A_WORD {
            eprintln!("note: {}: {lines} lines without tests; past {LINES_WORTH_A_WORD} there is often a second name in it", file.name);
        }
    }
    report(&wrong);
}

#[test]
fn wire_words_stay_at_the_two_ends_of_the_socket() {
    let mut wrong = Vec::new();
    for file in sources().iter().filter(|file| !matches!(room_of(file), Some("qmp" | "client"))) {
        for word in WIRE_WORDS {
            let in_strings = file.strings.iter().filter(|(_, text)| text.contains(word)).map(|(line, _)| *line);
            let in_code = words(&file.code).filter(|(_, code)| code.contains(word)).map(|(line, _)| line);
            for line in in_strings.chain(in_code) {
                wrong.push(format!("{}:{line}: `{word}` belongs to qmp/ and client/", file.name));
            }
        }
    }
    report(&wrong);
}

// ---- reading source ------------------------------------------------------------------------------------------------------------------------------

struct Source {
    /// From the crate's directory, with `/`.
    name: String,
    text: String,
    /// The text with comments and the insides of strings blanked out, byte for byte as long; test modules blanked as well.
    code: String,
    /// The same with test modules.
    code_with_tests: String,
    /// Insides of string literals outside of test modules, with their lines.
    strings: Vec<(usize, String)>,
    tests: Vec<Range<usize>>,
}

impl Source {
    fn new(name: String, text: String) -> Source {
        let (code_with_tests, literals) = blank(&text);
        let tests = if name.ends_with("/tests.rs") || name.contains("/tests/") {
            std::iter::once(0..text.len()).collect()
        } else {
            test_items(&code_with_tests)
        };
        let mut code = code_with_tests.clone().into_bytes();
        for at in tests.iter().flat_map(Clone::clone) {
            if code[at] != b'\n' {
                code[at] = b' ';
            }
        }
        let strings = literals
            .into_iter()
            .filter(|range| !tests.iter().any(|test| test.contains(&range.start)))
            .map(|range| (line_of(&text, range.start), text[range].to_string()))
            .collect();
        Source { name, text, code: String::from_utf8(code).unwrap(), code_with_tests, strings, tests }
    }

    fn lines_without_tests(&self) -> usize {
        let tests: usize = self.tests.iter().map(|range| self.text[range.clone()].lines().count()).sum();
        self.text.lines().count().saturating_sub(tests)
    }

    /// First path segments after `crate::` (and `cordisk::`, for `main.rs`), with their lines. Macros (`crate::name!`) have no room.
    fn uses(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for root in ["crate", "cordisk"] {
            for (at, _) in self.code.match_indices(root) {
                let path = self.code[at + root.len()..].trim_start();
                if !is_whole_word(&self.code, at, root.len()) || !path.starts_with("::") {
                    continue;
                }
                let line = line_of(&self.code, at);
                let rest = path[2..].trim_start();
                let segments = match rest.strip_prefix('{') {
                    Some(group) => top_level_segments(group),
                    None => vec![first_word(rest)],
                };
                found.extend(segments.into_iter().filter(|word| !word.is_empty() && !word.ends_with('!')).map(|word| (line, word)));
            }
        }
        found
    }

    /// Lines on which `super::` reaches the crate root.
    fn supers_to_the_root(&self) -> Vec<usize> {
        let parts: Vec<_> = self.name.trim_start_matches("src/").trim_end_matches(".rs").split('/').filter(|part| *part != "mod").collect();
        let climb = "super::".repeat(parts.len());
        let squeezed = &self.code;
        squeezed.match_indices(&climb).map(|(at, _)| line_of(squeezed, at)).collect()
    }
}

/// `a, b::{c, d}, Error}` gives `a`, `b`, `Error`.
fn top_level_segments(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut segments = vec![String::new()];
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => segments.push(String::new()),
            c if depth == 0 => segments.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    segments.iter().map(|segment| first_word(segment.trim_start())).collect()
}

fn first_word(text: &str) -> String {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let bang = text[end..].starts_with('!') && !text[end..].starts_with("!=");
    text[..end + usize::from(bang)].to_string()
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files);
    assert!(files.len() > 5, "src/ was not found below {}", root.display());
    files.sort();
    files
        .iter()
        .map(|path| Source::new(path.strip_prefix(root).unwrap().to_str().unwrap().to_string(), std::fs::read_to_string(path).unwrap()))
        .collect()
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The room a file belongs to: its first path segment below `src`; `lib` is the map itself.
fn room_of(file: &Source) -> Option<&'static str> {
    let first = file.name.trim_start_matches("src/").split('/').next().unwrap().trim_end_matches(".rs");
    if first == "lib" { Some("lib") } else { find(first).map(|room| room.name) }
}

fn find(name: &str) -> Option<&'static Room> {
    ROOMS.iter().find(|room| room.name == name)
}

/// What must not stand in code: forgotten helpers and state that every room could reach.
fn leftovers(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, word) in word_positions(code) {
        let line = || line_of(code, at);
        let after = code[at + word.len()..].trim_start();
        match word {
            "todo" | "dbg" | "unimplemented" | "thread_local" if after.starts_with('!') && !after.starts_with("!=") => {
                found.push((line(), format!("{word}!")));
            }
            "static" if first_word(after) == "mut" => found.push((line(), "static mut".into())),
            "static" => {
                let item = &after[..after.find(['=', ';', '{']).unwrap_or(after.len())];
                let shared = words(item).any(|(_, part)| SHARED_STATE.contains(&part) || part.starts_with("Atomic"));
                if shared && item.contains(':') {
                    found.push((line(), format!("static {}", item.trim())));
                }
            }
            _ => {}
        }
    }
    found
}

fn report(wrong: &[String]) {
    let mut text = String::new();
    for line in wrong {
        writeln!(text, "  {line}").unwrap();
    }
    assert!(wrong.is_empty(), "\n{text}");
}

/// Identifiers and keywords with their lines.
fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let (mut line, mut counted) = (1, 0);
    word_positions(code).map(move |(at, word)| {
        line += code.as_bytes()[counted..at].iter().filter(|&&byte| byte == b'\n').count();
        counted = at;
        (line, word)
    })
}

/// Identifiers and keywords with their byte positions; lifetimes are not words.
fn word_positions(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            at += code[at..].find(is_word)?;
            let start = at;
            at += code[at..].find(|c| !is_word(c)).unwrap_or(code.len() - at);
            if !code[..start].ends_with('\'') {
                return Some((start, &code[start..at]));
            }
        }
    })
}

fn is_whole_word(code: &str, at: usize, len: usize) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    // `$crate::` in a macro is a use as well, so `$` in front is fine.
    !code[..at].ends_with(is_word) && !code[at + len..].starts_with(is_word)
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Blanks comments and the insides of string and character literals; returns the positions of what was inside the strings.
fn blank(text: &str) -> (String, Vec<Range<usize>>) {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut literals = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        if rest.starts_with(b"//") {
            let end = at + text[at..].find('\n').unwrap_or(text.len() - at);
            wipe(&mut out, at..end);
            at = end;
        } else if rest.starts_with(b"/*") {
            let end = end_of_block_comment(bytes, at);
            wipe(&mut out, at..end);
            at = end;
        } else if let Some((start, hashes)) = raw_string_at(bytes, at) {
            let close = format!("\"{}", "#".repeat(hashes));
            let end = start + text[start..].find(&close).unwrap_or(text.len() - start);
            wipe(&mut out, start..end);
            literals.push(start..end);
            at = (end + close.len()).min(bytes.len());
        } else if rest[0] == b'"' {
            let end = end_of_quoted(bytes, at + 1, b'"');
            wipe(&mut out, at + 1..end);
            literals.push(at + 1..end);
            at = end + 1;
        } else if rest[0] == b'\'' && is_character(text, at) {
            let end = end_of_quoted(bytes, at + 1, b'\'');
            wipe(&mut out, at + 1..end);
            at = end + 1;
        } else {
            at += 1;
        }
    }
    (String::from_utf8(out).expect("only whole characters were blanked"), literals)
}

fn wipe(out: &mut [u8], range: Range<usize>) {
    for byte in &mut out[range] {
        if *byte != b'\n' {
            *byte = b' ';
        }
    }
}

fn end_of_block_comment(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// `r"`, `r#"`, `br"`, `cr#"` …: where its inside starts, and how many `#` close it.
fn raw_string_at(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let in_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    let rest = &bytes[at..];
    let prefix = [&b"r"[..], b"br", b"cr"].iter().find(|prefix| rest.starts_with(prefix))?.len();
    let hashes = rest[prefix..].iter().take_while(|&&byte| byte == b'#').count();
    (!in_word && rest.get(prefix + hashes) == Some(&b'"')).then_some((at + prefix + hashes + 1, hashes))
}

/// The position of the closing quote.
fn end_of_quoted(bytes: &[u8], mut at: usize, quote: u8) -> usize {
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at.min(bytes.len().saturating_sub(1))
}

/// A character literal, as opposed to a lifetime: `'x'` or `'\…'`.
fn is_character(text: &str, at: usize) -> bool {
    let mut chars = text[at + 1..].chars();
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

/// The byte ranges of items under `#[cfg(test)]`.
fn test_items(code: &str) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (start, attribute) in code.match_indices("#[cfg(test)]").chain(code.match_indices("#[cfg(all(test")) {
        let mut end = start + attribute.len();
        let mut depth = 0;
        let mut brace_list = false; // `use a::{b, c};` has braces, but ends at its semicolon
        for (at, c) in code[end..].char_indices() {
            if depth == 0 && code[end + at..].starts_with("use ") {
                brace_list = true;
            }
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 && (c == ';' || (c == '}' && !brace_list)) {
                end += at + 1;
                break;
            }
        }
        ranges.push(start..end);
    }
    ranges
}

// ---- the reader itself ---------------------------------------------------------------------------------------------------------------------------

#[test]
fn the_lexer_knows_what_is_code() {
    let text = r##"
//! unsafe in docs, crate::qmp
use crate::{disk::{Disk, Local}, Error, stream};
/* unsafe /* nested */ static mut X */
fn f<'static_like>(x: &'static str) -> char { let _ = r#"unsafe "quoted" dbg!"#; '"' }
const S: &str = "crate::fuse \" BLOCK_JOB_X";
fn g() { crate::job::start(); $crate::macros!(); a != b }
static COUNT: AtomicU64 = AtomicU64::new(0);
static TABLE: [u8; 4] = [0; 4];
static   mut Y: u8 = 0;
thread_local! { static Z: u8 = 0 }
#[cfg(test)]
mod tests {
    use crate::daemon;
    fn h() { dbg!("BLOCK_JOB_Y"); unsafe {} }
}
#[cfg(test)]
use crate::{cli};
fn after() { todo!() }
"##;
    let file = Source::new("src/disk/read.rs".into(), text.into());
    let uses: Vec<_> = file.uses().into_iter().map(|(line, word)| format!("{line} {word}")).collect();
    assert_eq!(uses, ["3 disk", "3 Error", "3 stream", "7 job"]);
    let left: Vec<_> = leftovers(&file.code).into_iter().map(|(line, what)| format!("{line} {what}")).collect();
    assert_eq!(left, ["8 static COUNT: AtomicU64", "10 static mut", "11 thread_local!", "19 todo!"]);
    assert_eq!(words(&file.code).filter(|(_, word)| *word == "unsafe").count(), 0);
    assert_eq!(words(&file.code_with_tests).filter(|(_, word)| *word == "unsafe").count(), 1);
    let wire: Vec<_> = file.strings.iter().filter(|(_, text)| text.contains("BLOCK_JOB_")).map(|(line, _)| *line).collect();
    assert_eq!(wire, [6]);
    assert_eq!(file.lines_without_tests(), text.lines().count() - 7);
    assert_eq!(Source::new("src/disk/read.rs".into(), "use super::super::x;".into()).supers_to_the_root(), [1]);
    assert_eq!(Source::new("src/disk/read.rs".into(), "use super::x;".into()).supers_to_the_root(), [0; 0]);
    assert_eq!(Source::new("src/disk/mod.rs".into(), "use super::x;".into()).supers_to_the_root(), [1]);
}
