use http::HeaderValue;

use super::*;

fn head(status: u16, headers: &[(&'static str, &str)]) -> Head {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, HeaderValue::from_str(value).unwrap());
    }
    Head { status: StatusCode::from_u16(status).unwrap(), headers: map, code: None }
}

fn found(more: &[(&'static str, &str)]) -> Head {
    let mut headers = vec![("content-range", "bytes 0-0/10"), ("etag", "\"t\"")];
    headers.extend(more);
    head(206, &headers)
}

fn look(scheme: Scheme, version: Option<&str>, more: &[(&'static str, &str)]) -> Option<Validator> {
    found(more).pin(scheme, version).ok().map(|pin| pin.validator)
}

#[test]
fn each_protocol_has_its_identity() {
    let tag = Some(Validator::Etag("\"t\"".into()));
    let version = |text: &str| Some(Validator::Version(text.into()));
    let s3 = ("x-amz-version-id", "v1");
    assert_eq!(look(Scheme::S3, None, &[]), tag);
    assert_eq!(look(Scheme::S3, None, &[s3]), version("v1"));
    assert_eq!(look(Scheme::S3, None, &[("x-amz-version-id", "null")]), tag);
    assert_eq!(look(Scheme::S3, Some("v1"), &[s3]), version("v1"));
    assert_eq!(look(Scheme::S3, Some("v2"), &[s3]), None);
    assert_eq!(look(Scheme::S3, Some("v1"), &[]), None);
    let gs = ("x-goog-generation", "7");
    assert_eq!(look(Scheme::Gs, None, &[gs]), Some(Validator::Generation("7".into())));
    assert_eq!(look(Scheme::Gs, Some("8"), &[gs]), None);
    assert_eq!(look(Scheme::Gs, None, &[]), None);
    let az = ("x-ms-version-id", "d");
    assert_eq!(look(Scheme::Az, None, &[az]), tag);
    assert_eq!(look(Scheme::Az, Some("d"), &[az]), version("d"));
    assert_eq!(look(Scheme::Az, Some("d"), &[]), None);
    assert_eq!(look(Scheme::Https, None, &[s3, gs, az]), tag);
}

/// Protects: compressed bytes are not taken for those of the file, wherever an answer says so.
#[test]
fn a_compressed_answer_is_refused() {
    let (content, transfer) = ("content-encoding", "transfer-encoding");
    for plain in [vec![], vec![(content, "identity")], vec![(transfer, "Chunked")]] {
        assert!(look(Scheme::Https, None, &plain).is_some(), "{plain:?}");
    }
    for coded in [
        vec![(content, "gzip")],
        vec![(content, "identity"), (content, "gzip")],
        vec![(transfer, "gzip, chunked")],
        vec![(transfer, "gzip"), (transfer, "chunked")],
    ] {
        assert!(look(Scheme::Https, None, &coded).is_none(), "{coded:?}");
    }
}

#[test]
fn each_answer_is_compared_with_its_pin() {
    let pin = |validator| Pin { size: 10, validator, digest: None };
    let check = |scheme, validator, more: &[(&'static str, &str)]| {
        found(more).check(scheme, &pin(validator), &(0..1)).map_err(|error| error.retry)
    };
    let version = || Validator::Version("v1".into());
    let s3 = ("x-amz-version-id", "v1");
    assert!(check(Scheme::S3, version(), &[s3]).is_ok());
    let other = [("x-amz-version-id", "v2")];
    assert!(matches!(check(Scheme::S3, version(), &other), Err(Retry::Changed)));
    assert!(matches!(check(Scheme::S3, version(), &[]), Err(Retry::Never)));
    let generation = || Validator::Generation("7".into());
    assert!(check(Scheme::Gs, generation(), &[("x-goog-generation", "7")]).is_ok());
    let other = [("x-goog-generation", "8")];
    assert!(matches!(check(Scheme::Gs, generation(), &other), Err(Retry::Changed)));
    assert!(matches!(check(Scheme::Gs, generation(), &[]), Err(Retry::Never)));
    assert!(check(Scheme::Https, Validator::Etag("\"t\"".into()), &[]).is_ok());
    assert!(check(Scheme::Https, Validator::None, &[]).is_ok());
    let larger = Pin { size: 11, validator: Validator::None, digest: None };
    let error = found(&[]).check(Scheme::Https, &larger, &(0..1)).unwrap_err();
    assert!(matches!(error.retry, Retry::Changed));
}

#[test]
fn content_ranges_are_digits() {
    let range = |range, total| Some(ContentRange { range, total });
    for (value, expected) in [
        ("bytes 0-0/1", range(Some(0..1), 1)),
        ("BYTES 5-9/100", range(Some(5..10), 100)),
        ("bytes */100", range(None, 100)),
        ("bytes 0-0/*", None),
        ("bytes 0-10/10", None),
        ("bytes 5-4/10", None),
        ("bytes +0-0/1", None),
        ("bytes -1/10", None),
        ("bytes 0-18446744073709551615/1", None),
        ("bytes 0-0/99999999999999999999999", None),
        ("bytes=0-0/1", None),
        ("lines 0-0/1", None),
        ("", None),
    ] {
        assert_eq!(parse_content_range(value), expected, "{value}");
    }
}

#[test]
fn retry_after_is_seconds_or_a_date() {
    let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
    for (value, expected) in [
        ("0", Some(0)),
        ("120", Some(120)),
        ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
        ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
    ] {
        let expected = expected.map(Duration::from_secs);
        assert_eq!(retry_after(value, now), expected, "{value}");
    }
}

/// Every status is an answer to a range or an error, and no error panics.
#[test]
fn every_other_status_is_an_error() {
    let pin = Pin { size: 10, validator: Validator::None, digest: None };
    for status in (100..600).filter(|status| *status != 206) {
        let Ok(code) = StatusCode::from_u16(status) else { continue };
        let head = Head { status: code, headers: HeaderMap::new(), code: Some("X".into()) };
        let error = head.check(Scheme::Https, &pin, &(0..1)).unwrap_err();
        assert!(error.to_string().contains(&format!("{status} ")), "{error}");
        let is_later = matches!(error.retry, Retry::Later { .. });
        let expected = matches!(status, 408 | 425 | 429 | 500 | 502..=504 | 506..=599);
        assert_eq!(is_later, expected, "{error}");
        assert!(head.pin(Scheme::Https, None).is_err());
    }
}
