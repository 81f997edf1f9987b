//! Completions and manual pages: they are generated from the definition of the command line, and
//! shells and groff accept them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::{CORDISK, MIB, Rig, Scratch, have, run_ok, run_within};

fn completions(scratch: &Scratch, shell: &str) -> PathBuf {
    let script = run_ok(Command::new(CORDISK).args(["completions", shell]));
    scratch.write(&format!("completions.{shell}"), script.as_bytes())
}

/// Protects: every installed shell can read its completions.
#[test]
fn shells_parse_their_completions() {
    let scratch = Scratch::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = completions(&scratch, shell);
        assert!(fs::read_to_string(&script).expect("script").contains("cordisk"), "{shell}");
        if have(&[shell]) {
            run_ok(Command::new(shell).arg("-n").arg(script));
        }
    }
    for shell in ["elvish", "powershell"] {
        assert!(
            fs::read_to_string(completions(&scratch, shell))
                .expect("script")
                .contains("CORDISK_COMPLETE"),
            "{shell}"
        );
    }
}

/// The completion scripts call the program, which a shell finds in PATH.
fn with_program(shell: &mut Command) -> &mut Command {
    let directory = Path::new(CORDISK).parent().expect("a directory").display();
    shell.env("PATH", format!("{directory}:{}", std::env::var("PATH").unwrap_or_default()))
}

/// Returns what bash offers for the last of `words`.
fn bash_offers(script: &Path, words: &[&str]) -> Vec<String> {
    let list = words.join(" ");
    let last = words.last().expect("a word");
    let before = &words[words.len() - 2];
    let ask = format!(
        "source {}; COMP_WORDS=({list}); COMP_CWORD={}; COMP_LINE='{list}'; COMP_POINT=${{#COMP_LINE}}; \
         $(complete -p cordisk | sed 's/.*-F \\([^ ]*\\).*/\\1/') cordisk '{last}' '{before}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display(),
        words.len() - 1
    );
    run_ok(with_program(Command::new("bash").args(["--norc", "-c", &ask])))
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

/// Protects: bash completes commands, options and values; hidden ones are not offered.
#[test]
fn bash_completes() {
    requires!("bash");
    let scratch = Scratch::new();
    let script = completions(&scratch, "bash");
    assert_eq!(bash_offers(&script, &["cordisk", "mo"]), ["mount"]);
    let offered = bash_offers(&script, &["cordisk", "mount", "--str"]);
    assert!(
        offered.contains(&"--stream".to_owned())
            && offered.contains(&"--stream-priority".to_owned()),
        "{offered:?}"
    );
    assert_eq!(bash_offers(&script, &["cordisk", "mount", "--sandbox", "r"]), ["require"]);
    assert_eq!(bash_offers(&script, &["cordisk", "keep"]), [""; 0]);
    assert_eq!(bash_offers(&script, &["cordisk", "mount", "--backg"]), [""; 0]);
}

/// Protects: every installed shell offers a mounted disk where a command takes one, and the verbs
/// of a job.
#[test]
fn shells_complete_mounted_disks() {
    requires!("/dev/fuse", "qemu-img", "bash");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let path = disk.path().to_str().expect("UTF-8");
    let start = &path[..path.len() - 3];
    let script = completions(&rig.scratch, "bash");
    for words in [
        &["umount"][..],
        &["status"],
        &["stream"],
        &["top"],
        &["map"],
        &["job", "pause"],
        &["job", "speed"],
        &["unmount"],
    ] {
        let words: Vec<&str> = ["cordisk"].iter().chain(words).copied().chain([start]).collect();
        assert_eq!(bash_offers(&script, &words), [path], "{words:?}");
    }
    assert_eq!(bash_offers(&script, &["cordisk", "job", "pau"]), ["pause"]);
    if have(&["fish"]) {
        let script = completions(&rig.scratch, "fish");
        let ask = |line: &str| {
            run_ok(with_program(Command::new("fish").args([
                "-N",
                "-c",
                &format!("source {}; complete -C '{line}'", script.display()),
            ])))
        };
        assert!(ask(&format!("cordisk umount {start}")).contains(path));
        let verbs = ask("cordisk job ");
        assert!(
            ["pause", "resume", "cancel", "speed"].iter().all(|verb| verbs.contains(verb)),
            "{verbs}"
        );
    }
    // zsh completes only in a terminal, so the test runs the program as its script does.
    let asked = run_ok(
        Command::new(CORDISK)
            .args(["--", "cordisk", "umount", start])
            .env("CORDISK_COMPLETE", "zsh")
            .env("_CLAP_COMPLETE_INDEX", "2"),
    );
    assert_eq!(asked.trim(), path);
    disk.umount();
}

fn pages(scratch: &Scratch) -> Vec<PathBuf> {
    let dir = scratch.join("man");
    run_ok(Command::new(CORDISK).arg("man").arg(&dir));
    let mut pages: Vec<PathBuf> =
        fs::read_dir(dir).expect("pages").map(|entry| entry.expect("entry").path()).collect();
    pages.sort();
    assert!(pages.len() >= 6, "{pages:?}");
    pages
}

/// Renders a page, wide enough that no word is broken.
fn rendered(page: &Path) -> String {
    let done = run_within(
        Command::new("man")
            .args(["-l", "--warnings", "-E", "UTF-8"])
            .arg(page)
            .env("MANWIDTH", "200")
            .env("LC_ALL", "C.UTF-8")
            .env("MANOPT", ""),
        Duration::from_secs(60),
    );
    assert!(done.status.success(), "{}: {}", page.display(), done.stderr);
    assert_eq!(done.stderr, "", "groff has something to say about {}", page.display());
    done.stdout
}

/// Returns the words that are long options.
fn long_options(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let words = text.split(|c| !is_part(c)).filter_map(|word| word.strip_prefix("--"));
    words
        .filter(|name| name.starts_with(|c: char| c.is_ascii_alphabetic()))
        .map(str::to_owned)
        .collect()
}

/// Protects: groff prints no warning for any page, and each page has exactly the options of
/// `--help`.
#[test]
fn manual_pages_render_and_have_the_options_of_help() {
    requires!("man", "groff");
    let scratch = Scratch::new();
    for page in pages(&scratch) {
        let text = rendered(&page);
        let name = page.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
        if page.extension().is_some_and(|section| section == "8") {
            assert!(
                text.contains("qmp=SOCKET")
                    && text.contains("run_as=USER[:GROUP]")
                    && text.contains("backing_root="),
                "{text}"
            );
            continue;
        }
        // Only the list of options is compared, because other sections mention options of other
        // commands.
        let headings = |line: &str| !line.starts_with(char::is_whitespace) && !line.is_empty();
        let section = |name: &'static str| {
            let from = text.lines().skip_while(move |line| *line != name).skip(1);
            from.take_while(|line| !headings(line))
        };
        let options: Vec<&str> =
            section("OPTIONS").chain(section("REMOTE BACKING FILES")).collect();
        let terms = |lines: &[&str], indent: usize| {
            let lines = lines.iter().filter(|line| {
                line.trim_start().starts_with('-') && line.len() - line.trim_start().len() <= indent
            });
            // The option is before its value; its description is behind.
            long_options(
                &lines
                    .map(|line| {
                        line.trim_start()
                            .split("  ")
                            .next()
                            .unwrap_or_default()
                            .split(['<', '['])
                            .next()
                            .unwrap_or_default()
                    })
                    .collect::<Vec<_>>()
                    .join(" "),
            )
        };
        // cordisk-order-from-files: the name of a subcommand can have hyphens.
        let words: Vec<&str> = name.splitn(3, '-').skip(1).collect();
        let help = run_ok(Command::new(CORDISK).args(&words).arg("--help"));
        let help: Vec<&str> = help.lines().collect();
        let in_help = terms(&help, 6);
        assert!(in_help.contains("help"), "{help:?}");
        assert_eq!(
            terms(&options, 7),
            in_help,
            "left: {name}(1), right: cordisk {} --help\n{text}",
            words.join(" ")
        );
    }
}
