//! Tests of web servers: nginx, and a scripted server for what nginx does not do on demand.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use test_servers::scripted::{Act, ScriptedServer, answer};

use super::*;
use crate::faults::{FAULTS, SECRET, TAG, assert_no_secret, content, cut, good, pin, read};
use crate::source::open;

fn config(text: &str) -> SourcesConfig {
    SourcesConfig::parse(text, Path::new("sources.toml"), Vec::new()).unwrap()
}

fn name(url: &str) -> SourceUrl {
    SourceUrl::parse(url).unwrap()
}

fn source(url: &str, config: &SourcesConfig) -> Box<dyn RemoteSource> {
    open(&name(url), config).unwrap()
}

/// nginx, the real thing: pin, ranges, a change of the file, and what it refuses.
#[test]
fn nginx_serves_a_pinned_file() {
    let locations = "location /off/ { max_ranges 0; }
        location /key/ { if ($http_authorization != \"Bearer letmein\") { return 401; } }
        location /up/ { rewrite ^/up/(.*)$ https://localhost:HTTPS_PORT/key/$1 redirect; }
        location /down/ { rewrite ^/down/(.*)$ http://127.0.0.1:HTTP_PORT/$1 redirect; }
        location /page { return 200 '<html>log in</html>'; default_type text/html; }";
    let Some(nginx) = test_servers::nginx(locations) else { return };
    let bytes = content();
    let file = nginx.root().join("disk.raw");
    fs::write(&file, &bytes).unwrap();
    fs::create_dir(nginx.root().join("off")).unwrap();
    fs::create_dir(nginx.root().join("key")).unwrap();
    fs::write(nginx.root().join("off/disk.raw"), &bytes).unwrap();
    fs::write(nginx.root().join("key/disk.raw"), &bytes).unwrap();
    let header_file = nginx.root().join("headers");
    fs::write(&header_file, "Authorization: Bearer letmein\nX-Other: 1\n").unwrap();
    let http = |path: &str| format!("http://127.0.0.1:{}{path}", nginx.http);
    let https = |path: &str| format!("https://localhost:{}{path}", nginx.https);
    let with_ca = config(&format!(
        "[[source]]\nprefix = \"{}\"\nca = \"{}\"",
        https(""),
        nginx.ca().display()
    ));
    let plain = SourcesConfig::default();

    let mut expected = Vec::new();
    for (url, config) in [(http("/disk.raw"), &plain), (https("/disk.raw?sig=1"), &with_ca)] {
        let disk = source(&url, config);
        let pin = disk.look().unwrap();
        let Validator::Etag(tag) = &pin.validator else { panic!("{pin:?}") };
        assert_eq!(pin.size, bytes.len() as u64);
        for range in [0..1, 0..pin.size, 4096..8192, pin.size - 1..pin.size] {
            let wanted = &bytes[range.start as usize..range.end as usize];
            assert!(good(&*disk, &pin, range.clone()) == wanted, "{url} {range:?}");
        }
        assert_eq!(disk.status(&pin, 5, 7).unwrap(), [(host::storage::BlockStatus::Data, 7)]);
        expected.push(format!("206 \"bytes=4096-8191\" \"{}\"", tag.replace('"', "\\x22")));
    }
    let log = nginx.requests(10).join("\n");
    for line in expected {
        assert!(log.contains(&line), "{line} is not in:\n{log}");
    }
    assert!(!log.contains("HEAD "), "{log}");

    let error = source(&http("/off/disk.raw"), &plain).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    assert!(error.to_string().contains("ignores ranges"), "{error}");
    let error = source(&http("/page"), &plain).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    assert!(error.to_string().contains("HTML page"), "{error}");
    let error = source(&http("/none?sig=5ecre7"), &plain).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    assert!(error.to_string().ends_with("404 Not Found: the file does not exist"), "{error}");
    assert_no_secret(&error);

    // A certificate of an authority that is not known.
    let error = source(&https("/disk.raw?sig=5ecre7"), &plain).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(error.to_string().contains("set ca of the source"), "{error}");
    assert_no_secret(&error);
    // HTTPS to a port without TLS.
    let no_tls = format!("https://127.0.0.1:{}/disk.raw?sig=5ecre7", nginx.http);
    let error = source(&no_tls, &plain).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    assert_no_secret(&error);

    // Headers of the configuration, and 401 without them.
    let secret = |prefix: &str| {
        config(&format!(
            "[[source]]\nprefix = \"{prefix}\"\nheader-file = \"{}\"\n{}",
            header_file.display(),
            if prefix.starts_with("https") {
                format!("ca = \"{}\"", nginx.ca().display())
            } else {
                String::new()
            }
        ))
    };
    let error = source(&http("/key/disk.raw"), &plain).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");
    let disk = source(&http("/key/disk.raw"), &secret(&http("/key")));
    assert_eq!(disk.look().unwrap().size, bytes.len() as u64);
    // New headers are found by a refresh.
    fs::write(&header_file, "Authorization: Bearer old\n").unwrap();
    assert_eq!(disk.look().unwrap().size, bytes.len() as u64);
    disk.refresh().unwrap();
    assert!(matches!(disk.look().unwrap_err().retry, Retry::Credentials));
    fs::write(&header_file, "no header\n").unwrap();
    let error = disk.refresh().unwrap_err();
    assert!(error.to_string().contains("line 1: not Name: value"), "{error}");

    // From https to http: refused.
    let error = source(&https("/down/disk.raw?sig=5ecre7"), &with_ca).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    assert!(error.to_string().contains("from https to http://127.0.0.1"), "{error}");
    assert_no_secret(&error);
    // From http to https: followed, and the other origin gets no header of the first.
    fs::write(&header_file, "Authorization: Bearer letmein\n").unwrap();
    let text = format!(
        "[[source]]\nprefix = \"{}\"\nheader-file = \"{}\"",
        http("/up"),
        header_file.display()
    );
    let mut up = WebSource::open(&name(&http("/up/disk.raw")), &config(&text)).unwrap();
    let trusting = Connector::new(&with_ca, &with_ca.settings(&name(&https("/up")))).unwrap();
    up.redirects = trusting.wire(up.allowed.clone(), Protocols::Both).unwrap();
    let error = up.look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");

    // The file changes: the next range is refused.
    let disk = source(&http("/disk.raw"), &plain);
    let pin = disk.look().unwrap();
    fs::write(&file, &bytes[1..]).unwrap();
    let (got, result) = read(&*disk, &pin, 0..10);
    let error = result.unwrap_err();
    assert!(matches!(error.retry, Retry::Changed), "{error}");
    assert!(got.is_empty());
    assert_eq!(
        error.to_string(),
        format!(
            "{}: the file on the server has changed: the server answers 412 Precondition Failed",
            http("/disk.raw")
        )
    );
}

/// Protects: no byte of a wrong answer reaches the sink, each error has the right consequence, and
/// none has the query of the name in its text.
#[test]
fn wrong_answers_have_their_consequence() {
    let bytes = content();
    for fault in FAULTS {
        let server = ScriptedServer::start(fault.script);
        let config = config("stall-timeout = 1");
        let url = server.url(&format!("/disk?X-Amz-Signature={SECRET}"));
        let disk = source(&url, &config);
        let (got, result) = read(&*disk, &pin(), 1000..11_000);
        let error = result.expect_err(fault.what);
        assert!((fault.is_right)(&error.retry), "{}: {error} {:?}", fault.what, error.retry);
        assert!(error.to_string().contains(fault.text), "{}: {error}", fault.what);
        assert!(got == bytes[1000..1000 + fault.bytes], "{}: {} bytes", fault.what, got.len());
        assert_no_secret(&error);
        assert!(error.to_string().starts_with("http://127.0.0.1:"), "{error}");
        // The first byte may well be right.
        if let Err(error) = disk.look() {
            assert_no_secret(&error);
        }
    }
}

/// Protects: a server that sends a byte now and then, and so never stalls, holds no worker for
/// ever, neither with a body nor with the page of an error.
#[test]
fn a_server_that_trickles_is_left() {
    let server = ScriptedServer::start(|request| match request.number {
        0 => cut(request, 3000, Act::Trickle),
        _ => vec![
            Act::Send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 10000\r\n\r\n".to_vec()),
            Act::Trickle,
        ],
    });
    let disk = source(&server.url("/disk"), &config("stall-timeout = 1"));
    let begun = Instant::now();
    let (got, result) = read(&*disk, &pin(), 1000..11_000);
    let error = result.unwrap_err();
    assert!(matches!(error.retry, Retry::Later { after: None, slow_down: false }), "{error}");
    assert!(error.to_string().contains("less than 4096 bytes in 1 seconds"), "{error}");
    assert!(got[..3000] == content()[1000..4000]);
    let error = disk.look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}

/// A server that is not there.
#[test]
fn a_refused_connection_is_tried_later() {
    let port = test_servers::free_port();
    let url = format!("http://127.0.0.1:{port}/disk?X-Amz-Signature={SECRET}");
    let error = source(&url, &SourcesConfig::default()).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Later { .. }), "{error}");
    assert!(error.to_string().contains("Connection refused"), "{error}");
    assert_no_secret(&error);
}

/// What a look makes of tags: only a strong one becomes a pin.
#[test]
fn only_a_strong_tag_is_an_identity() {
    let tags = [
        ("\"v1\"", Validator::Etag("\"v1\"".into())),
        ("W/\"v1\"", Validator::None),
        ("v1", Validator::None),
        ("\"\"", Validator::None),
        ("\"a\", \"b\"", Validator::None),
    ];
    for (tag, validator) in tags {
        let server = ScriptedServer::start(move |request| request.partial(&content(), tag));
        let disk = source(&server.url("/disk"), &SourcesConfig::default());
        let expected = Pin { size: 100_000, validator, digest: None };
        assert_eq!(disk.look().unwrap(), expected, "{tag}");
        // A file that is not pinned is read by its size alone.
        let unpinned = Pin { validator: Validator::None, ..expected };
        assert!(good(&*disk, &unpinned, 10..20) == content()[10..20]);
    }
}

/// A pin comes from the header of an image: it may be anything.
#[test]
fn a_pin_that_is_no_tag_is_refused() {
    let server = ScriptedServer::start(|request| request.partial(&content(), TAG));
    let disk = source(&server.url("/disk"), &SourcesConfig::default());
    let validators = [
        Validator::Etag("\"a\r\nHost: x\"".into()),
        Validator::Version("1".into()),
        Validator::Generation("1".into()),
    ];
    for validator in validators {
        let (got, result) = read(&*disk, &Pin { validator, ..pin() }, 0..1);
        assert!(matches!(result.unwrap_err().retry, Retry::Never));
        assert!(got.is_empty());
    }
    for range in [0..100_001, 10..10, u64::MAX - 1..u64::MAX] {
        assert!(matches!(read(&*disk, &pin(), range).1.unwrap_err().retry, Retry::Never));
    }
    assert!(server.requests().is_empty());
}

/// A redirect to another host: followed once, remembered, left when it has expired, and never given
/// the headers of the configuration.
#[test]
fn a_redirect_is_remembered_until_it_expires() {
    let target = ScriptedServer::start(|request| match request.number {
        0..=2 => request.partial(&content(), TAG),
        3 => answer("403 Forbidden", &[], "expired"),
        _ => request.partial(&content(), TAG),
    });
    let location = format!("Location: http://127.0.0.2:{}/signed?s={SECRET}", target.port);
    let server = ScriptedServer::start(move |_| answer("307 X", &[&location], ""));
    let directory = tempfile::tempdir().unwrap();
    let headers = directory.path().join("headers");
    fs::write(&headers, "Authorization: Bearer letmein").unwrap();
    let config = config(&format!(
        "[[source]]\nprefix = \"{}\"\nheader-file = \"{}\"",
        server.url("/"),
        headers.display()
    ));
    let disk = source(&server.url("/disk"), &config);
    assert_eq!(disk.look().unwrap(), pin());
    for at in [0, 500, 1000] {
        assert!(good(&*disk, &pin(), at..at + 500) == content()[at as usize..][..500]);
    }
    // look, two reads, the expired one, and its repetition.
    assert_eq!(target.requests().len(), 5);
    assert_eq!(server.requests().len(), 2, "at the look, and after the target had expired");
    assert!(server.requests()[0].header("authorization") == Some("Bearer letmein"));
    for request in target.requests() {
        assert_eq!(request.header("authorization"), None);
        assert_eq!(request.target, format!("/signed?s={SECRET}"));
    }
    assert_eq!(target.requests()[1].header("if-match"), Some(TAG));
    assert_eq!(target.requests()[1].header("accept-encoding"), Some("identity"));
}

/// Protects: a server on the internet cannot send this host to itself, neither by an address nor by
/// a name whose address is this host's.
#[test]
fn a_redirect_to_this_host_is_refused() {
    let inner = ScriptedServer::start(|request| request.partial(&content(), TAG));
    for host in
        ["127.0.0.1", "localhost", "inner.example", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"]
    {
        let location = format!("Location: http://{host}:{}/?s={SECRET}", inner.port);
        let outer = ScriptedServer::start(move |_| answer("302 X", &[&location], ""));
        let known = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let names = Names {
            known: vec![("outer.example", known(outer.port)), ("inner.example", known(inner.port))],
            ..Names::default()
        };
        let url = name(&format!("http://outer.example:{}/disk", outer.port));
        let disk = WebSource::with_names(&url, &SourcesConfig::default(), names).unwrap();
        let error = disk.look().unwrap_err();
        assert!(matches!(error.retry, Retry::Never), "{host}: {error}");
        assert!(error.to_string().contains("address of this host"), "{host}: {error}");
        assert_no_secret(&error);
        assert_eq!(outer.requests().len(), 1);
    }
    assert!(inner.requests().is_empty());
}

/// The proxy of the configuration gets the request; nothing else resolves the name.
#[test]
fn a_proxy_is_asked() {
    let proxy = ScriptedServer::start(|request| request.partial(&content(), TAG));
    let text =
        format!("[[source]]\nprefix = \"http://golden.invalid\"\nproxy = \"{}\"", proxy.url(""));
    let disk = source("http://golden.invalid/disk?a=b", &config(&text));
    assert_eq!(disk.look().unwrap(), pin());
    assert_eq!(proxy.requests()[0].target, "http://golden.invalid/disk?a=b");
}
