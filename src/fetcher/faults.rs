//! Wrong answers of servers, for the tests of all sources over HTTP.

use std::ops::Range;
use std::time::Duration;

use remote::pin::{Pin, Validator};
use test_servers::scripted::{Act, ScriptedRequest, answer};

use crate::source::{RemoteSource, Retry, SourceError};

/// In the query of each name, and never in an error.
pub(crate) const SECRET: &str = "5ecre7";

/// The tag of [`content`] on the scripted server.
pub(crate) const TAG: &str = "\"v1\"";

pub(crate) fn content() -> Vec<u8> {
    (0..100_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

pub(crate) fn pin() -> Pin {
    let validator = Validator::Etag(TAG.into());
    Pin { size: content().len() as u64, validator, digest: None }
}

/// Reads a range. Returns what the sink got as well if the read fails.
pub(crate) fn read(
    source: &dyn RemoteSource,
    pin: &Pin,
    range: Range<u64>,
) -> (Vec<u8>, Result<(), SourceError>) {
    let mut bytes = Vec::new();
    let result = source.read(pin, range, &mut |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    });
    (bytes, result)
}

pub(crate) fn good(source: &dyn RemoteSource, pin: &Pin, range: Range<u64>) -> Vec<u8> {
    let (bytes, result) = read(source, pin, range);
    result.unwrap();
    bytes
}

pub(crate) fn assert_no_secret(error: &SourceError) {
    let text = format!("{error} {error:?}");
    assert!(!text.contains(SECRET), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

/// One wrong answer, and what becomes of it.
pub(crate) struct WrongAnswer {
    pub(crate) what: &'static str,
    pub(crate) script: fn(&ScriptedRequest) -> Vec<Act>,
    /// Bytes that the sink gets: the beginning of the range.
    pub(crate) bytes: usize,
    pub(crate) is_right: fn(&Retry) -> bool,
    pub(crate) text: &'static str,
}

/// A right answer, with one text of its head replaced.
pub(crate) fn with(request: &ScriptedRequest, from: &str, to: &str) -> Vec<Act> {
    let mut acts = request.partial(&content(), TAG);
    let Some(Act::Send(head)) = acts.first_mut() else { panic!("no head") };
    let text = String::from_utf8(head.clone()).unwrap();
    *head = text.replace(from, to).into_bytes();
    acts
}

/// A right head, and `len` bytes of the body.
pub(crate) fn cut(request: &ScriptedRequest, len: usize, then: Act) -> Vec<Act> {
    let mut acts = request.partial(&content(), TAG);
    if let Some(Act::Send(body)) = acts.last_mut() {
        body.truncate(len);
    }
    acts.push(then);
    acts
}

pub(crate) const FAULTS: &[WrongAnswer] = &[
    WrongAnswer {
        what: "the connection ends before the answer",
        script: |_| vec![Act::Close],
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::AtOnce),
        text: "the request failed",
    },
    WrongAnswer {
        what: "the body ends early",
        script: |request| cut(request, 3000, Act::Close),
        bytes: 3000,
        is_right: |retry| matches!(retry, Retry::Later { after: None, slow_down: false }),
        text: "the answer failed",
    },
    WrongAnswer {
        what: "the body stalls",
        script: |request| cut(request, 3000, Act::Stall),
        bytes: 3000,
        is_right: |retry| matches!(retry, Retry::Later { after: None, slow_down: false }),
        text: "timed out",
    },
    WrongAnswer {
        what: "no answer",
        script: |_| vec![Act::Stall],
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Later { after: None, slow_down: false }),
        text: "timed out",
    },
    WrongAnswer {
        what: "429 with Retry-After",
        script: |_| answer("429 Too Many Requests", &["Retry-After: 7"], "slowly"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Later { after: Some(after), slow_down: true } if after.as_secs() == 7),
        text: "429 Too Many Requests",
    },
    WrongAnswer {
        what: "503 with the code of S3",
        script: |_| {
            answer("503 Slow Down", &[], "<Error><Code>SlowDown</Code><Key>5ecre7</Key></Error>")
        },
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Later { after: None, slow_down: true }),
        text: "503 Service Unavailable (SlowDown)",
    },
    WrongAnswer {
        what: "503 with a date that is over",
        script: |_| answer("503 X", &["Retry-After: Sun, 06 Nov 1994 08:49:37 GMT"], ""),
        bytes: 0,
        is_right: |retry| {
            matches!(retry, Retry::Later { after: Some(Duration::ZERO), slow_down: true })
        },
        text: "503 Service Unavailable",
    },
    WrongAnswer {
        what: "500 with a page",
        script: |_| answer("500 Internal Server Error", &[], "<html>5ecre7</html>"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Later { after: None, slow_down: false }),
        text: "500 Internal Server Error",
    },
    WrongAnswer {
        what: "a signed URL that has expired",
        script: |_| answer("403 Forbidden", &[], "<Error><Code>AccessDenied</Code></Error>"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Credentials),
        text: "403 Forbidden (AccessDenied)",
    },
    WrongAnswer {
        what: "an archived object",
        script: |_| answer("403 Forbidden", &[], "<Error><Code>InvalidObjectState</Code></Error>"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "restore it first",
    },
    WrongAnswer {
        what: "200 with the whole file",
        script: |request| {
            let mut acts = answer("200 OK", &["ETag: \"v1\""], "");
            acts.extend(request.partial(&content(), TAG));
            acts
        },
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "ignores ranges",
    },
    WrongAnswer {
        what: "a page of a proxy",
        script: |_| answer("200 OK", &["Content-Type: text/html"], "<html>log in</html>"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "an HTML page",
    },
    WrongAnswer {
        what: "another range",
        script: |request| with(request, "bytes 1000-", "bytes 0-"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "with the range bytes 0-10999/100000 for the bytes 1000-10999",
    },
    WrongAnswer {
        what: "a shorter range",
        script: |request| with(request, "-10999/", "-10998/"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "with the range bytes 1000-10998/100000",
    },
    WrongAnswer {
        what: "no size",
        script: |request| with(request, "/100000", "/*"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "no usable Content-Range",
    },
    WrongAnswer {
        what: "no Content-Range",
        script: |request| with(request, "Content-Range", "X-Range"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "no usable Content-Range",
    },
    WrongAnswer {
        what: "another length",
        script: |request| with(request, "Content-Length: 10000", "Content-Length: 9999"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "Content-Length and Content-Range",
    },
    WrongAnswer {
        what: "another size, as of a cache with a new file and an old head",
        script: |request| with(request, "/100000", "/100001"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Changed),
        text: "it has 100001 bytes instead of 100000",
    },
    WrongAnswer {
        what: "another tag, from a server that ignores If-Match",
        script: |request| with(request, "\"v1\"", "\"v2\""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Changed),
        text: "another entity tag",
    },
    WrongAnswer {
        what: "a weak tag",
        script: |request| with(request, "\"v1\"", "W/\"v1\""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Changed),
        text: "another entity tag",
    },
    WrongAnswer {
        what: "no tag",
        script: |request| with(request, "ETag: \"v1\"\r\n", ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "has no entity tag",
    },
    WrongAnswer {
        what: "two tags",
        script: |request| with(request, "ETag: \"v1\"\r\n", "ETag: \"v1\"\r\nETag: \"v2\"\r\n"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "has no entity tag",
    },
    WrongAnswer {
        what: "412",
        script: |_| answer("412 Precondition Failed", &[], ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Changed),
        text: "412 Precondition Failed",
    },
    WrongAnswer {
        what: "416 of a shorter file",
        script: |_| answer("416 X", &["Content-Range: bytes */500"], ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Changed),
        text: "not 100000 bytes any more",
    },
    WrongAnswer {
        what: "compressed",
        script: |request| with(request, "ETag", "Content-Encoding: gzip\r\nETag"),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "compressed",
    },
    WrongAnswer {
        what: "more bytes than announced, without a length",
        script: |request| {
            let mut acts = with(request, "Content-Length: 10000", "Transfer-Encoding: chunked");
            acts.truncate(1);
            let range = request.range();
            for (piece, len) in [(&content()[range][..], 10000), (&[7_u8; 16][..], 16)] {
                acts.push(Act::Send(format!("{len:x}\r\n").into_bytes()));
                acts.push(Act::Send([piece, b"\r\n"].concat()));
            }
            acts.push(Act::Send(b"0\r\n\r\n".to_vec()));
            acts
        },
        bytes: 10000,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "more than 10000 bytes",
    },
    WrongAnswer {
        what: "fewer bytes than announced, without a length",
        script: |request| {
            let mut acts = with(request, "Content-Length: 10000", "Transfer-Encoding: chunked");
            acts.truncate(1);
            let start = request.range().start;
            acts.push(Act::Send(b"10\r\n".to_vec()));
            acts.push(Act::Send([&content()[start..start + 16], b"\r\n0\r\n\r\n"].concat()));
            acts
        },
        bytes: 16,
        is_right: |retry| matches!(retry, Retry::Later { after: None, slow_down: false }),
        text: "ended after 16 of 10000 bytes",
    },
    WrongAnswer {
        what: "a redirect in a circle",
        script: |request| answer("302 Found", &[&format!("Location: {}x", request.target)], ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "more than 5 redirects",
    },
    WrongAnswer {
        what: "a redirect without a target",
        script: |_| answer("301 Moved Permanently", &[], ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "without a usable Location",
    },
    WrongAnswer {
        what: "a redirect to the metadata of a cloud",
        script: |_| answer("302 X", &["Location: http://169.254.169.254/latest/?token=5ecre7"], ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "leads to http://169.254.169.254, which is an address of this host or its link",
    },
    WrongAnswer {
        what: "a redirect to another protocol",
        script: |_| answer("302 X", &["Location: ftp://127.0.0.1/?token=5ecre7"], ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "from http to ftp://127.0.0.1",
    },
    WrongAnswer {
        what: "a redirect with a password",
        script: |_| answer("302 X", &["Location: http://u:5ecre7@127.0.0.1/"], ""),
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Never),
        text: "with a password",
    },
    WrongAnswer {
        what: "no HTTP",
        script: |_| vec![Act::Send(b"5ecre7\r\n\r\n".to_vec()), Act::Close],
        bytes: 0,
        is_right: |retry| matches!(retry, Retry::Later { .. }),
        text: "the request failed",
    },
];
