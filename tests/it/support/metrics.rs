//! A scrape of `--metrics` without a library: a request over TCP, and a check of the text against
//! the grammar of OpenMetrics.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::Daemon;

const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the address of the metrics of a disk that was mounted with `--metrics …:0`.
pub fn address(disk: &Daemon) -> SocketAddr {
    // The disk is mounted a moment before the daemon logs this line.
    let found = super::poll(PATIENCE, || {
        disk.log()
            .split_once("metrics at http://")
            .and_then(|(_, url)| Some(url.split_once("/metrics")?.0.to_owned()))
    });
    let address = found.unwrap_or_else(|| panic!("no address in the log\n{}", disk.log()));
    address.parse().unwrap_or_else(|error| panic!("{address}: {error}"))
}

/// Sends `request` and returns the whole reply.
pub fn ask(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.write_all(request).expect("request");
    let mut answer = Vec::new();
    // A server that refuses a request may reset the connection after its reply.
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert!(!answer.is_empty(), "no answer: {error}");
    }
    String::from_utf8(answer).expect("text")
}

/// A parsed scrape.
#[derive(Debug)]
pub struct Scrape {
    pub text: String,
    /// Name of each family, and its type.
    pub families: BTreeMap<String, String>,
    /// Name and labels of each sample, without the label `device`, and its value.
    samples: BTreeMap<(String, BTreeSet<(String, String)>), f64>,
}

impl Scrape {
    pub fn of(address: SocketAddr) -> Scrape {
        let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n");
        let (head, text) =
            answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {answer}"));
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let kind = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert!(head.lines().any(|line| line.eq_ignore_ascii_case(kind)), "{head}");
        Scrape::parse(text)
    }

    /// Parses a scrape. Panics if the text breaks the grammar: every sample belongs to the family
    /// declared just before it, with a suffix that fits its type. Its labels are well-formed and
    /// unique, buckets rise, and the end marker exists.
    fn parse(text: &str) -> Scrape {
        let body = text.strip_suffix("# EOF\n").unwrap_or_else(|| panic!("no end: {text}"));
        let mut scrape =
            Scrape { text: text.to_owned(), families: BTreeMap::new(), samples: BTreeMap::new() };
        let (mut family, mut declared) = (String::new(), BTreeSet::new());
        for line in body.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (word, name, rest) = (
                    words.next().expect("word"),
                    words.next().expect("name"),
                    words.next().expect("text"),
                );
                if name != family {
                    assert!(declared.insert(name.to_owned()), "{name} is declared twice");
                    family = name.to_owned();
                }
                match word {
                    "HELP" => assert!(!rest.is_empty(), "{line}"),
                    "TYPE" => drop(scrape.families.insert(name.to_owned(), rest.to_owned())),
                    "UNIT" => assert!(
                        name.ends_with(&format!("_{rest}")),
                        "the unit is part of the name: {line}"
                    ),
                    _ => panic!("what is this: {line}"),
                }
                continue;
            }
            let (series, value) =
                line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
            let (name, labels) =
                series.split_once('{').unwrap_or_else(|| panic!("no labels: {line}"));
            let kind =
                scrape.families.get(&family).unwrap_or_else(|| panic!("no TYPE before {line}"));
            let suffixes: &[&str] = match kind.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_sum", "_count"],
                other => panic!("a family of {other}"),
            };
            let suffix = name
                .strip_prefix(family.as_str())
                .unwrap_or_else(|| panic!("{line} is not of the family {family}"));
            assert!(suffixes.contains(&suffix), "{line} in a family of {kind}");
            let mut labels = parse_labels(
                labels.strip_suffix('}').unwrap_or_else(|| panic!("no end of the labels: {line}")),
            );
            let device = labels.iter().find(|(name, _)| name == "device").cloned();
            assert!(device.is_some_and(|device| labels.remove(&device)), "no device in {line}");
            let value = value.parse().unwrap_or_else(|error| panic!("{error}: {line}"));
            assert!(
                scrape.samples.insert((name.to_owned(), labels), value).is_none(),
                "twice: {line}"
            );
        }
        scrape.check_histograms();
        scrape
    }

    /// Checks that the buckets rise to the count.
    fn check_histograms(&self) {
        for (family, _) in self.families.iter().filter(|(_, kind)| *kind == "histogram") {
            for ((_, labels), count) in
                self.samples.iter().filter(|((name, _), _)| *name == format!("{family}_count"))
            {
                let mut buckets: Vec<(f64, f64)> = Vec::new();
                for ((name, its), value) in &self.samples {
                    if *name == format!("{family}_bucket") && labels.is_subset(its) {
                        let (_, bound) =
                            its.iter().find(|(name, _)| name == "le").expect("a bound");
                        buckets.push((
                            if bound == "+Inf" {
                                f64::INFINITY
                            } else {
                                bound.parse().expect("bound")
                            },
                            *value,
                        ));
                    }
                }
                buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
                assert!(
                    buckets.len() > 10 && buckets.is_sorted_by(|a, b| a.1 <= b.1),
                    "{family}: {buckets:?}"
                );
                assert_eq!(buckets.last(), Some(&(f64::INFINITY, *count)), "{family} {labels:?}");
            }
        }
    }

    /// Returns the sample of this name with exactly these labels, besides `device`.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels: BTreeSet<(String, String)> =
            labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let found = self.samples.get(&(name.to_owned(), labels.clone()));
        *found.unwrap_or_else(|| panic!("no {name} with {labels:?} in\n{}", self.text))
    }

    /// Returns the names of all samples.
    pub fn names(&self) -> BTreeSet<&str> {
        self.samples.keys().map(|(name, _)| name.as_str()).collect()
    }
}

/// Parses labels like `a="b",c="d\"e"`.
fn parse_labels(text: &str) -> BTreeSet<(String, String)> {
    let mut labels = BTreeSet::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label: {text}"));
        assert!(
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'),
            "{text}"
        );
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next().unwrap_or_else(|| panic!("no end of a label: {text}")) {
                (at, '"') => break at,
                (_, '\\') => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                    other => panic!("no escape: {other:?} in {text}"),
                },
                (_, c) => value.push(c),
            }
        };
        assert!(labels.insert((name.to_owned(), value)), "twice: {text}");
        rest = &after[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    labels
}
