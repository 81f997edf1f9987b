//! Tests of object stores against radosgw, the S3 server of Ceph.

use std::fs;
use std::path::Path;

use test_servers::scripted::{Act, ScriptedRequest, ScriptedServer, answer};
use test_servers::{Ceph, header};

use super::*;
use crate::faults::{self, FAULTS, SECRET, TAG, assert_no_secret};
use crate::source::open;

fn config(ceph: &Ceph, more: &str) -> SourcesConfig {
    let text = format!(
        "[[source]]\nprefix = \"s3://\"\nendpoint = \"{}\"\nallow-http = true\n{more}",
        ceph.endpoint
    );
    let text = text.replace("s3://", "s3://golden/");
    SourcesConfig::parse(&text, Path::new("sources.toml"), Vec::new()).unwrap()
}

/// A configuration with the keys of `ceph` in files.
fn config_with_keys(ceph: &Ceph) -> SourcesConfig {
    let (id, key) = (ceph.directory().join("id"), ceph.directory().join("key"));
    fs::write(&id, format!("{}\n", ceph.access_key)).unwrap();
    fs::write(&key, &ceph.secret_key).unwrap();
    config(
        ceph,
        &format!(
            "access-key-id-file = \"{}\"\nsecret-access-key-file = \"{}\"\n",
            id.display(),
            key.display()
        ),
    )
}

fn source(url: &str, config: &SourcesConfig) -> Box<dyn RemoteSource> {
    open(&SourceUrl::parse(url).unwrap(), config).unwrap()
}

fn read(source: &dyn RemoteSource, pin: &Pin, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
    let (bytes, result) = faults::read(source, pin, range);
    result.map(|()| bytes)
}

/// Bytes that differ everywhere, from a seed.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn objects_of_radosgw_are_read_and_pinned() {
    let Some(ceph) = test_servers::radosgw() else { return };
    let first = content(1, 1 << 20);
    let second = content(2, 1 << 20);
    ceph.request("PUT", "/golden", b"");
    let tag = header(&ceph.request("PUT", "/golden/disk.raw", &first), "etag").unwrap();
    let config = config_with_keys(&ceph);
    let disk = source("s3://golden/disk.raw", &config);

    // The pin is the entity tag, and ranges are those bytes.
    let pin = disk.look().unwrap();
    assert_eq!(pin, Pin { size: 1 << 20, validator: Validator::Etag(tag), digest: None });
    for range in [0..1, 0..1 << 20, 4096..12288, (1 << 20) - 1..1 << 20] {
        let expected = &first[range.start as usize..range.end as usize];
        assert!(read(&*disk, &pin, range.clone()).unwrap() == expected, "{range:?}");
    }
    let error = read(&*disk, &pin, (1 << 20) - 1..(1 << 20) + 1).unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");

    // Threads read at the same time.
    std::thread::scope(|scope| {
        for at in 0..8_u64 {
            let (disk, pin, first) = (&disk, &pin, &first);
            scope.spawn(move || {
                let range = at << 17..(at + 1) << 17;
                let expected = &first[range.start as usize..range.end as usize];
                assert!(read(&**disk, pin, range).unwrap() == expected);
            });
        }
    });

    // The sink fails: its error comes back, and the source stays usable.
    let mut calls = 0;
    let error = disk
        .read(&pin, 0..1 << 20, &mut |_| {
            calls += 1;
            Err(std::io::Error::from_raw_os_error(28))
        })
        .unwrap_err();
    assert!(matches!(&error.retry, Retry::Local(error) if error.raw_os_error() == Some(28)));
    assert_eq!(calls, 1);
    assert!(read(&*disk, &pin, 5..10).unwrap() == first[5..10]);

    // Other bytes under the same name are not mixed with the first ones.
    ceph.request("PUT", "/golden/disk.raw", &second);
    let error = read(&*disk, &pin, 0..10).unwrap_err();
    assert!(matches!(error.retry, Retry::Changed), "{error}");
    assert_eq!(
        error.to_string(),
        "s3://golden/disk.raw: the file on the server has changed: the server answers \
         412 Precondition Failed (PreconditionFailed)"
    );
    let pin = disk.look().unwrap();
    assert!(read(&*disk, &pin, 0..10).unwrap() == second[..10]);

    // A wrong size in the pin is found although the tag is right.
    let wrong = Pin { size: pin.size - 1, ..pin.clone() };
    let error = read(&*disk, &wrong, 0..10).unwrap_err();
    assert!(matches!(error.retry, Retry::Changed), "{error}");

    ceph.request("DELETE", "/golden/disk.raw", b"");
    let error = read(&*disk, &pin, 0..10).unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    assert!(error.to_string().contains("404 Not Found (NoSuchKey)"), "{error}");
    let error = source("s3://golden/none", &config).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    ceph.request("PUT", "/golden/empty", b"");
    let error = source("s3://golden/empty", &config).look().unwrap_err();
    assert_eq!(error.to_string(), "s3://golden/empty: the file on the server is empty");

    versions(&ceph, &config, &first, &second);
    multipart(&ceph, &config);
    credentials(&ceph, &first);
    presigned(&ceph, &first);
}

/// A versioned bucket: the pin is the version, and it stays readable when the name has other bytes.
fn versions(ceph: &Ceph, _: &SourcesConfig, first: &[u8], second: &[u8]) {
    ceph.request("PUT", "/versioned", b"");
    ceph.request("PUT", "/versioned/old", first);
    ceph.request(
        "PUT",
        "/versioned?versioning",
        b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>",
    );
    let version =
        header(&ceph.request("PUT", "/versioned/disk", first), "x-amz-version-id").unwrap();
    let text = fs::read_to_string(ceph.directory().join("id")).unwrap();
    assert_eq!(text.trim(), ceph.access_key);
    let config = SourcesConfig::parse(
        &format!(
            "[[source]]\nprefix = \"s3://versioned\"\nendpoint = \"{}\"\nallow-http = true\n\
             access-key-id-file = \"{1}/id\"\nsecret-access-key-file = \"{1}/key\"\n",
            ceph.endpoint,
            ceph.directory().display()
        ),
        Path::new("sources.toml"),
        Vec::new(),
    )
    .unwrap();
    let disk = source("s3://versioned/disk", &config);
    let pin = disk.look().unwrap();
    assert_eq!(pin.validator, Validator::Version(version.clone()));
    ceph.request("PUT", "/versioned/disk", second);
    assert!(read(&*disk, &pin, 100..200).unwrap() == first[100..200]);
    assert!(disk.look().unwrap().validator != pin.validator);

    let named = source(&format!("s3://versioned/disk?versionId={version}"), &config);
    assert_eq!(named.look().unwrap(), pin);
    assert!(read(&*named, &pin, 100..200).unwrap() == first[100..200]);
    let other = Pin { validator: Validator::Version("none".into()), ..pin.clone() };
    let error = read(&*named, &other, 0..1).unwrap_err();
    assert!(matches!(error.retry, Retry::Never | Retry::Changed), "{error}");

    // An object from before the bucket had versions is pinned by its entity tag.
    let old = source("s3://versioned/old", &config).look().unwrap();
    assert!(matches!(old.validator, Validator::Etag(_)), "{old:?}");

    ceph.request("DELETE", &format!("/versioned/disk?versionId={version}"), b"");
    let error = read(&*disk, &pin, 0..1).unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
}

/// An object that was put in parts has a tag with the number of parts, and ranges over their edge.
fn multipart(ceph: &Ceph, config: &SourcesConfig) {
    let parts = [content(3, 5 << 20), content(4, 1 << 20)];
    let started = ceph.request("POST", "/golden/parts?uploads", b"");
    let id = started.split_once("<UploadId>").unwrap().1.split_once("</UploadId>").unwrap().0;
    let mut list = String::new();
    for (number, part) in (1..).zip(&parts) {
        let target = format!("/golden/parts?partNumber={number}&uploadId={id}");
        let tag = header(&ceph.request("PUT", &target, part), "etag").unwrap();
        list += &format!("<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>");
    }
    let list = format!("<CompleteMultipartUpload>{list}</CompleteMultipartUpload>");
    ceph.request("POST", &format!("/golden/parts?uploadId={id}"), list.as_bytes());
    let disk = source("s3://golden/parts", config);
    let pin = disk.look().unwrap();
    assert_eq!(pin.size, 6 << 20);
    assert!(matches!(&pin.validator, Validator::Etag(tag) if tag.ends_with("-2\"")), "{pin:?}");
    let all = parts.concat();
    let edge = 5 << 20;
    assert!(read(&*disk, &pin, edge - 10..edge + 10).unwrap() == all[edge as usize - 10..][..20]);
    assert!(read(&*disk, &pin, 0..pin.size).unwrap() == all);
}

/// Wrong keys are an error of credentials, and new ones in the same files are found by a refresh.
fn credentials(ceph: &Ceph, first: &[u8]) {
    ceph.request("PUT", "/golden/disk.raw", first);
    let anonymous = source("s3://golden/disk.raw", &config(ceph, "anonymous = true"));
    let error = anonymous.look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");

    let file = ceph.directory().join("credentials");
    let keys = |secret: &str| {
        format!(
            "[other]\naws_access_key_id = x\n[golden]\naws_access_key_id = {}\n\
             aws_secret_access_key={secret}\n",
            ceph.access_key
        )
    };
    fs::write(&file, keys("wrong-secret")).unwrap();
    let with = |profile| {
        config(ceph, &format!("credentials-file = \"{}\"\nprofile = \"{profile}\"", file.display()))
    };
    let disk = source("s3://golden/disk.raw", &with("golden"));
    let error = disk.look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");
    assert!(error.to_string().contains("SignatureDoesNotMatch"), "{error}");
    assert!(!error.to_string().contains(&ceph.access_key), "{error}");
    fs::write(&file, keys(&ceph.secret_key)).unwrap();
    assert!(matches!(disk.look().unwrap_err().retry, Retry::Credentials), "before the refresh");
    disk.refresh().unwrap();
    assert_eq!(disk.look().unwrap().size, first.len() as u64);

    let name = SourceUrl::parse("s3://golden/disk.raw").unwrap();
    let error = open(&name, &with("other")).unwrap_err();
    assert!(error.to_string().contains("[other] has no key"), "{error}");
    let error = open(&name, &with("none")).unwrap_err();
    assert!(error.to_string().contains("no section [none]"), "{error}");

    // The environment, by the names of the AWS command line.
    let environment = [
        ("AWS_ENDPOINT_URL", ceph.endpoint.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", &ceph.access_key),
        ("AWS_SECRET_ACCESS_KEY", &ceph.secret_key),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let config = SourcesConfig::parse("", Path::new("x"), environment.into()).unwrap();
    assert_eq!(source("s3://golden/disk.raw", &config).look().unwrap().size, first.len() as u64);
}

/// A presigned URL is a name of HTTP, and its signature is in no error.
fn presigned(ceph: &Ceph, first: &[u8]) {
    let config = SourcesConfig::default();
    let url = ceph.presign("/golden/disk.raw", 600);
    let disk = source(&url, &config);
    let pin = disk.look().unwrap();
    assert!(matches!(pin.validator, Validator::Etag(_)), "{pin:?}");
    assert!(read(&*disk, &pin, 1000..2000).unwrap() == first[1000..2000]);

    // A signature for another key.
    let wrong = url.replace("disk.raw", "other.raw");
    let error = source(&wrong, &config).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");
    assert!(error.to_string().contains("SignatureDoesNotMatch"), "{error}");
    let signature = url.rsplit_once("X-Amz-Signature=").unwrap().1;
    for secret in [signature, &ceph.access_key] {
        assert!(!error.to_string().contains(secret), "{error}");
        assert!(!format!("{error:?} {disk:?}").contains(secret), "{error:?}");
    }
}

/// A configuration for a server that is not asked for credentials.
fn anonymous(scheme: &str, endpoint: &str) -> SourcesConfig {
    let account = if scheme == "az" { "account = \"test\"\n" } else { "" };
    let text = format!(
        "stall-timeout = 1\n[[source]]\nprefix = \"{scheme}://golden\"\nendpoint = \"{endpoint}\"\n\
         allow-http = true\nanonymous = true\n{account}"
    );
    SourcesConfig::parse(&text, Path::new("sources.toml"), Vec::new()).unwrap()
}

/// Protects: the wrong answers that a web server can give have the same consequence if they come
/// from an object store, although object_store hides what they were.
#[test]
fn wrong_answers_have_their_consequence() {
    for fault in FAULTS {
        let server = ScriptedServer::start(fault.script);
        let disk = source("s3://golden/disk.raw", &anonymous("s3", &server.url("")));
        let (got, result) = faults::read(&*disk, &faults::pin(), 1000..11_000);
        let error = result.expect_err(fault.what);
        assert_eq!(server.requests().len(), 1, "{}: one try, and no redirect", fault.what);
        assert_no_secret(&error);
        if fault.what.contains("without a length") {
            // object_store refuses an answer without Content-Length.
            assert!(got.is_empty() && matches!(error.retry, Retry::Never), "{error}");
            continue;
        }
        assert!(got == faults::content()[1000..1000 + fault.bytes], "{}", fault.what);
        if fault.what.contains("redirect") {
            assert!(matches!(error.retry, Retry::Never), "{}: {error}", fault.what);
            assert!(error.to_string().contains("set region or endpoint"), "{error}");
        } else {
            assert!((fault.is_right)(&error.retry), "{}: {error} {:?}", fault.what, error.retry);
            assert!(error.to_string().contains(fault.text), "{}: {error}", fault.what);
        }
        assert!(error.to_string().starts_with("s3://golden/disk.raw: "), "{error}");
    }
}

/// A right answer with more headers.
fn partial_with(request: &ScriptedRequest, headers: &str) -> Vec<Act> {
    let mut acts = request.partial(&faults::content(), TAG);
    let Some(Act::Send(head)) = acts.first_mut() else { panic!("no head") };
    let text = String::from_utf8(head.clone()).unwrap();
    let date = "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT";
    *head = text.replace("ETag", &format!("{date}\r\n{headers}ETag")).into_bytes();
    acts
}

/// Google: the generation is the pin, in each request and each answer. The server is scripted; the
/// protocol has no server that can be installed.
#[test]
fn google_is_pinned_by_generation() {
    let server = ScriptedServer::start(|request| {
        let generation = if request.target.contains("changed") { 8 } else { 7 };
        partial_with(request, &format!("x-goog-generation: {generation}\r\n"))
    });
    let config = anonymous("gs", &server.url(""));
    let disk = source("gs://golden/a%20b/disk.raw", &config);
    let pin = disk.look().unwrap();
    assert_eq!(pin.validator, Validator::Generation("7".into()));
    assert!(read(&*disk, &pin, 5..50).unwrap() == faults::content()[5..50]);
    let targets: Vec<String> =
        server.requests().into_iter().map(|request| request.target).collect();
    assert_eq!(targets, ["/golden/a%20b%2Fdisk%2Eraw", "/golden/a%20b%2Fdisk%2Eraw?generation=7"]);
    let changed = source("gs://golden/changed", &config);
    assert!(matches!(read(&*changed, &pin, 5..50).unwrap_err().retry, Retry::Changed));
    let named = source("gs://golden/disk.raw?generation=7", &config);
    assert_eq!(named.look().unwrap(), pin);
    assert!(source("gs://golden/disk.raw?generation=9", &config).look().is_err());
}

/// The same with an emulator, which keeps no old generation: the pinned one is gone then.
#[test]
fn an_emulator_of_google_replaces_the_object() {
    let Some(gcs) = test_servers::fake_gcs() else { return };
    gcs.make_bucket("golden");
    gcs.put("golden", "disk.raw", &faults::content());
    let config = anonymous("gs", &gcs.endpoint);
    let disk = source("gs://golden/disk.raw", &config);
    let pin = disk.look().unwrap();
    assert!(matches!(pin.validator, Validator::Generation(_)), "{pin:?}");
    assert!(read(&*disk, &pin, 5..5000).unwrap() == faults::content()[5..5000]);
    gcs.put("golden", "disk.raw", &vec![7; faults::content().len()]);
    let error = read(&*disk, &pin, 5..5000).unwrap_err();
    assert!(matches!(error.retry, Retry::Never | Retry::Changed), "{error}");
    assert!(disk.look().unwrap().validator != pin.validator);
}

/// Azure: the entity tag is the pin, or the version that the name demands. The server is scripted.
#[test]
fn azure_is_pinned_by_tag_or_version() {
    let server = ScriptedServer::start(|request| partial_with(request, "x-ms-version-id: d1\r\n"));
    let config = anonymous("az", &server.url("/account"));
    let disk = source("az://golden/disk.raw", &config);
    let pin = disk.look().unwrap();
    assert_eq!(pin.validator, Validator::Etag(TAG.into()));
    assert!(read(&*disk, &pin, 5..50).unwrap() == faults::content()[5..50]);
    assert_eq!(server.requests()[1].header("if-match"), Some(TAG));
    let named = source("az://golden/disk.raw?versionId=d1", &config);
    let pin = named.look().unwrap();
    assert_eq!(pin.validator, Validator::Version("d1".into()));
    assert!(read(&*named, &pin, 5..50).unwrap() == faults::content()[5..50]);
    assert_eq!(server.requests()[3].target, "/account/golden/disk.raw?versionid=d1");
}

/// The same with an emulator, and with the key of the account.
#[test]
fn an_emulator_of_azure_replaces_the_blob() {
    let Some(azurite) = test_servers::azurite() else { return };
    let content = faults::content();
    azurite.make_container("golden");
    azurite.put("golden", "disk.raw", &content);
    let key = azurite.directory().join("key");
    fs::write(&key, test_servers::Azurite::KEY).unwrap();
    let text = format!(
        "[[source]]\nprefix = \"az://golden\"\nendpoint = \"{}\"\nallow-http = true\n\
         account = \"devstoreaccount1\"\naccount-key-file = \"{}\"\n",
        azurite.endpoint,
        key.display()
    );
    let config = SourcesConfig::parse(&text, Path::new("x"), Vec::new()).unwrap();
    let disk = source("az://golden/disk.raw", &config);
    let pin = disk.look().unwrap();
    assert!(matches!(pin.validator, Validator::Etag(_)), "{pin:?}");
    assert!(read(&*disk, &pin, 5..5000).unwrap() == content[5..5000]);
    assert!(read(&*disk, &pin, 0..pin.size).unwrap() == content);
    azurite.put("golden", "disk.raw", &vec![7; content.len()]);
    let error = read(&*disk, &pin, 5..5000).unwrap_err();
    assert!(matches!(error.retry, Retry::Changed), "{error}");
    assert!(disk.look().unwrap().validator != pin.validator);
    let error = source("az://golden/none", &config).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Never), "{error}");
    fs::write(&key, "AAAA").unwrap();
    disk.refresh().unwrap();
    let error = disk.look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");
}

/// Credentials of a virtual machine come from the service of its cloud, which is scripted here.
#[test]
fn credentials_come_from_the_cloud() {
    let cloud = ScriptedServer::start(|request| match request.target.as_str() {
        "/latest/api/token" => answer("200 OK", &[], "token"),
        "/latest/meta-data/iam/security-credentials/" => answer("200 OK", &[], "role"),
        "/latest/meta-data/iam/security-credentials/role" => answer(
            "200 OK",
            &[],
            &format!(
                "{{\"AccessKeyId\":\"AKIA1\",\"SecretAccessKey\":\"{SECRET}\",\"Token\":\"t\",\
                 \"Expiration\":\"2126-01-01T00:00:00Z\"}}"
            ),
        ),
        _ => answer("404 Not Found", &[], ""),
    });
    let server = ScriptedServer::start(|request| request.partial(&faults::content(), TAG));
    let config = |endpoint: String| {
        let environment = [
            ("AWS_ENDPOINT_URL", server.url("")),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_METADATA_ENDPOINT", endpoint),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value));
        SourcesConfig::parse("stall-timeout = 1", Path::new("x"), environment.into()).unwrap()
    };
    let disk = source("s3://golden/disk.raw", &config(cloud.url("")));
    assert_eq!(disk.look().unwrap(), faults::pin());
    let signed = server.requests()[0].header("authorization").map(str::to_owned).unwrap();
    assert!(signed.starts_with("AWS4-HMAC-SHA256 Credential=AKIA1/"), "{signed}");
    assert!(!signed.contains(SECRET));

    // No such service: the error says what to set.
    let nothing = format!("http://127.0.0.1:{}/?x={SECRET}", test_servers::free_port());
    let error = source("s3://golden/disk.raw", &config(nothing)).look().unwrap_err();
    assert!(matches!(error.retry, Retry::Credentials), "{error}");
    assert!(error.to_string().contains("give the source credentials"), "{error}");
    assert_no_secret(&error);
}

#[test]
fn a_configuration_that_cannot_be_used_is_an_error() {
    let cases = [
        ("s3://golden/disk", "endpoint = \"http://x\"\nanonymous = true", "allow-http = true"),
        ("s3://golden/a//b", "anonymous = true", "the key of the object"),
        (
            "s3://golden/disk",
            "access-key-id-file = \"/none/id\"\nsecret-access-key-file = \"/none/key\"",
            "/none/id",
        ),
        ("s3://golden/disk", "ca = \"/none/ca\"", "/none/ca"),
        ("s3://golden/disk", "proxy = \"::\"", "proxy of the source"),
    ];
    for (name, keys, expected) in cases {
        let text = format!("[[source]]\nprefix = \"s3://golden\"\n{keys}");
        let config = SourcesConfig::parse(&text, Path::new("x"), Vec::new()).unwrap();
        let error = open(&SourceUrl::parse(name).unwrap(), &config).unwrap_err();
        assert!(matches!(error.retry, Retry::Never), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}
