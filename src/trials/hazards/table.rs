//! Checks the table of hazards in the module documentation of `hazards.rs`.

use std::path::Path;

/// Every hazard is listed once and in order, and every test that the table names exists.
#[test]
fn the_table_of_hazards_is_whole() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let sources = [root.join("src"), root.join("tests/it")]
        .iter()
        .flat_map(|dir| sources_below(dir))
        .collect::<Vec<_>>()
        .concat();
    let table = include_str!("../hazards.rs");
    let mut next = 1;
    for row in table.lines().filter_map(|line| line.strip_prefix("//! | H")) {
        let (number, what) = row.split_once('|').unwrap();
        assert_eq!(number.trim().parse(), Ok(next), "{row}");
        let tests: Vec<&str> = what.split('`').skip(1).step_by(2).collect();
        match what.trim_start().strip_prefix("None: ") {
            Some(reason) => assert!(reason.len() > 40, "H{next} needs a reason"),
            None => assert!(!tests.is_empty(), "H{next} has neither a test nor a reason"),
        }
        for test in
            tests.iter().filter(|test| !what.contains("None:") || test.contains("features_"))
        {
            let head = format!("fn {test}()");
            let at =
                sources.find(&head).unwrap_or_else(|| panic!("H{next}: there is no test {test}"));
            assert!(sources[..at].trim_end().ends_with("#[test]"), "H{next}: {test} is no test");
        }
        next += 1;
    }
    assert_eq!(next, 35, "H1 to H34");
    for test in sources
        .split("#[test]\nfn ")
        .skip(1)
        .filter_map(|text| text.split('(').next())
        .filter(|name| is_numbered(name))
    {
        assert!(table.contains(&format!("`{test}`")), "{test} is missing in the table");
    }
}

/// Whether a test has the number of a hazard in its name.
fn is_numbered(name: &str) -> bool {
    let name = name.as_bytes();
    name.len() > 4
        && name[0] == b'h'
        && name[1].is_ascii_digit()
        && name[2].is_ascii_digit()
        && name[3] == b'_'
}

fn sources_below(dir: &Path) -> Vec<String> {
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources.extend(sources_below(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(std::fs::read_to_string(&path).unwrap());
        }
    }
    sources
}
