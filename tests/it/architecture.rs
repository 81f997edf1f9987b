//! The structure of the code as tests: which crate may use which, and what no file may contain.
//!
//! Cargo enforces the layers: a crate sees only the crates in its Cargo.toml. `src/cordisk/lib.rs`
//! is the map for people; the table below has the same for the Cargo.toml files. A change of the
//! layers changes the table in the same commit.

use std::process::Command;

use crate::support::source::{Source, report, root, sources};

/// The crates below `src/`, each with the crates of the workspace that it depends on (its tests may
/// use more).
const LAYERS: &[(&str, &[&str])] = &[
    ("host", &[]),
    ("qcow2", &["host"]),
    ("sim", &["host"]),
    ("remote", &["host"]),
    ("order", &["host"]),
    ("bootset", &["host"]),
    ("engine", &["host", "qcow2", "remote"]),
    ("uring", &["host"]),
    ("export", &["engine", "host", "uring"]),
    ("control", &["engine", "host", "qcow2"]),
    ("trials", &["engine", "host", "qcow2", "sim"]),
    ("nbd", &[]),
    ("fetcher", &["host", "nbd", "order", "remote"]),
    (
        "cordisk",
        &["bootset", "control", "engine", "export", "fetcher", "host", "order", "qcow2", "remote"],
    ),
];

/// Packages for terminals, servers and command lines; a change of the engine must not compile them.
const NOT_BELOW_THE_PROGRAM: &[&str] =
    &["tokio", "hyper", "ratatui", "clap", "indicatif", "crossterm"];

/// Words of the wire protocol. They belong to the two ends of the socket: the server, and the
/// commands that are its clients.
const WIRE_WORDS: &[&str] =
    &["block-stream", "BLOCK_JOB_", "JOB_STATUS_CHANGE", "query-block-jobs", "DeviceNotActive"];

/// Types that make a `static` a hidden connection between modules.
const SHARED_STATE: &[&str] =
    &["Mutex", "RwLock", "Condvar", "Once", "OnceLock", "LazyLock", "Atomic"];

/// The only crate that shares memory with the kernel.
const WITH_UNSAFE: &str = "src/uring/";

#[test]
fn crates_use_only_the_layers_below_them() {
    let mut wrong = Vec::new();
    for (layer, allowed) in LAYERS {
        let path = if *layer == "cordisk" {
            "Cargo.toml".into()
        } else {
            format!("src/{layer}/Cargo.toml")
        };
        let manifest = std::fs::read_to_string(root().join(&path)).unwrap();
        let dependencies =
            manifest.split("\n[dependencies]\n").nth(1).unwrap().split("\n[").next().unwrap();
        // A feature for tests may bring the simulated hosts, and no other crate.
        let for_tests = "sim = { workspace = true, optional = true }";
        let names = dependencies
            .lines()
            .filter(|line| *line != for_tests)
            .filter_map(|line| line.split(['.', ' ', '=']).next());
        let ours: Vec<&str> =
            names.filter(|name| LAYERS.iter().any(|(layer, _)| layer == name)).collect();
        if ours != *allowed {
            wrong.push(format!("{path}: {layer} is built from {ours:?}, the map says {allowed:?}"));
        }
    }
    let mut known: Vec<_> = LAYERS.iter().map(|(layer, _)| (*layer).to_owned()).collect();
    let mut there: Vec<_> = std::fs::read_dir(root().join("src"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    known.sort();
    there.sort();
    assert_eq!(there, known, "the directories in src/");
    report(&wrong);
}

#[test]
fn the_layers_below_the_program_are_built_without_its_packages() {
    for layer in ["qcow2", "engine", "export", "control"] {
        let package = format!("cordisk-{layer}");
        let cargo = Command::new(env!("CARGO"))
            .current_dir(root())
            .args([
                "tree",
                "--locked",
                "--offline",
                "--package",
                &package,
                "--edges",
                "normal,build,dev",
                "--prefix",
                "none",
                "--format",
                "{p}",
            ])
            .output()
            .unwrap();
        let packages = String::from_utf8(cargo.stdout).unwrap();
        assert!(
            cargo.status.success() && packages.contains("cordisk-host"),
            "{}",
            String::from_utf8_lossy(&cargo.stderr)
        );
        for package in packages.lines().filter_map(|line| line.split(' ').next()) {
            assert!(
                !NOT_BELOW_THE_PROGRAM.contains(&package),
                "cordisk-{layer} and its tests are built from {package}"
            );
        }
    }
}

/// I5: backing files cannot be written, by type: `chain` holds readers and has no word for writing.
#[test]
fn the_chain_has_no_word_for_writing() {
    let mut wrong = Vec::new();
    for file in sources().iter().filter(|file| file.name.starts_with("src/engine/chain/")) {
        for (line, code) in file.code() {
            for word in words(code).filter(|word| {
                ["Image", "ReadWrite", "write_at", "clone_range", "punch_hole", "create_new"]
                    .contains(word)
            }) {
                wrong.push(format!("{}:{line}: `{word}`", file.name));
            }
        }
    }
    report(&wrong);
}

#[test]
fn unsafe_is_in_one_crate() {
    let mut wrong = Vec::new();
    for file in sources() {
        for (line, code) in
            file.text.lines().enumerate().map(|(index, line)| (index + 1, without_comment(line)))
        {
            if words(code).any(|word| word == "unsafe") && !file.name.starts_with(WITH_UNSAFE) {
                wrong.push(format!("{}:{line}: unsafe", file.name));
            }
        }
    }
    for (layer, _) in LAYERS {
        let lib = std::fs::read_to_string(root().join(format!("src/{layer}/lib.rs"))).unwrap();
        if WITH_UNSAFE != format!("src/{layer}/") && !lib.contains("#![forbid(unsafe_code)]") {
            wrong.push(format!("src/{layer}/lib.rs: no #![forbid(unsafe_code)]"));
        }
    }
    report(&wrong);
}

/// State that threads share is a field of a value that is passed to them. Two exceptions are for
/// debug builds and tests; the third one is a mark of a thread for itself.
#[test]
fn there_is_no_global_state() {
    let mut wrong = Vec::new();
    for file in sources().iter().filter(|file| {
        !matches!(
            file.name.as_str(),
            "src/host/sync.rs" | "src/host/mutants.rs" | "src/host/background.rs"
        )
    }) {
        for (line, code) in file.code() {
            let item = code.trim_start().trim_start_matches("pub ");
            let shared =
                item.starts_with("static ") && SHARED_STATE.iter().any(|name| item.contains(name));
            if shared || code.contains("thread_local!") || item.starts_with("static mut ") {
                wrong.push(format!("{}:{line}: {}", file.name, code.trim()));
            }
        }
    }
    report(&wrong);
}

#[test]
fn every_module_with_parts_says_what_it_never_does() {
    let mut wrong = Vec::new();
    for file in sources()
        .iter()
        .filter(|file| file.name.ends_with("/mod.rs") || file.name.ends_with("/lib.rs"))
    {
        let docs: String = file
            .text
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .collect::<Vec<_>>()
            .join("\n");
        if docs.trim().is_empty() {
            wrong.push(format!("{}: does not open with //! and a sentence of purpose", file.name));
        } else if !docs.contains("**Never:**") && file.name != "src/cordisk/lib.rs" {
            wrong.push(format!("{}: its opening doc comment has no **Never:** line", file.name));
        }
    }
    report(&wrong);
}

#[test]
fn wire_words_stay_at_the_two_ends_of_the_socket() {
    let mut wrong = Vec::new();
    let elsewhere = |file: &&Source| {
        !file.name.starts_with("src/control/") && !file.name.starts_with("src/cordisk/client/")
    };
    for file in sources().iter().filter(elsewhere) {
        for (line, code) in file.code() {
            for word in WIRE_WORDS.iter().filter(|word| code.contains(*word)) {
                wrong.push(format!(
                    "{}:{line}: `{word}` belongs to src/control/ and src/cordisk/client/",
                    file.name
                ));
            }
        }
    }
    report(&wrong);
}

// ---- reading source

impl Source {
    /// Returns the numbered lines without comments and without tests, which are separate files or
    /// at the end of a file.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let is_test = self.name.ends_with("/tests.rs")
            || self.name.contains("/tests/")
            || self.name.starts_with("src/trials/");
        let numbered = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        numbered
            .take_while(move |(_, line)| !is_test && !line.starts_with("mod tests {"))
            .map(|(number, line)| (number, without_comment(line)))
    }
}

/// Sufficient for this tree: none of its strings has `//` after a blank.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with("//") {
        ""
    } else {
        line.split(" //").next().unwrap_or_default()
    }
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}
