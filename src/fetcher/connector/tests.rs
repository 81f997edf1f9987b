use super::*;

#[test]
fn addresses_have_their_class() {
    use AddressClass::{Local, Loopback, Ordinary};
    let cases = [
        ("127.0.0.1", Loopback),
        ("127.255.0.9", Loopback),
        ("0.0.0.0", Loopback),
        ("0.1.2.3", Loopback),
        ("::1", Loopback),
        ("::", Loopback),
        ("::ffff:127.0.0.1", Loopback),
        ("169.254.169.254", Local),
        ("::ffff:169.254.0.1", Local),
        ("100.100.100.200", Local),
        ("168.63.129.16", Local),
        ("fe80::1", Local),
        ("febf::1", Local),
        ("fd00:ec2::254", Local),
        ("fec0::1", Ordinary),
        ("10.0.0.1", Ordinary),
        ("192.168.1.1", Ordinary),
        ("126.255.255.255", Ordinary),
        ("2001:db8::1", Ordinary),
    ];
    for (address, class) in cases {
        assert_eq!(AddressClass::of(address.parse().unwrap()), class, "{address}");
    }
    assert_eq!(AddressClass::of_host("[::1]"), Some(Loopback));
    assert_eq!(AddressClass::of_host("LOCALHOST."), Some(Loopback));
    assert_eq!(AddressClass::of_host("a.localhost"), Some(Loopback));
    assert_eq!(AddressClass::of_host("example.org"), None);
}

#[test]
fn redirects_stay_in_the_class_of_the_name() {
    let from = |class| Names::default().of_redirects(class);
    for (class, host, allowed) in [
        (AddressClass::Ordinary, "example.org", true),
        (AddressClass::Ordinary, "10.0.0.1", true),
        (AddressClass::Ordinary, "127.0.0.1", false),
        (AddressClass::Ordinary, "169.254.169.254", false),
        (AddressClass::Loopback, "localhost", true),
        (AddressClass::Loopback, "169.254.169.254", false),
        (AddressClass::Local, "169.254.0.1", true),
        (AddressClass::Local, "127.0.0.1", false),
    ] {
        assert_eq!(from(class).allows_host(host), allowed, "{class:?} {host}");
    }
    assert!(Names::default().allows_host("127.0.0.1"));
}

#[test]
fn the_code_of_an_error_is_letters_and_digits() {
    assert_eq!(
        error_code("<?xml?><Error><Code>SlowDown</Code><Message>x</Message>").as_deref(),
        Some("SlowDown")
    );
    for body in ["", "<Code></Code>", "<Code>a b</Code>", "<Code>x", "<Code>\u{1b}[31m</Code>"] {
        assert_eq!(error_code(body), None, "{body}");
    }
    assert_eq!(error_code(&format!("<Code>{}</Code>", "x".repeat(65))), None);
}

#[test]
fn a_file_without_certificates_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.pem");
    let error = tls(Some(&path), &Network::default()).unwrap_err();
    assert!(matches!(error.retry, Retry::Never));
    assert!(error.to_string().contains("ca.pem"), "{error}");
    std::fs::write(&path, "nothing").unwrap();
    assert!(
        tls(Some(&path), &Network::default())
            .unwrap_err()
            .to_string()
            .contains("contains no certificate")
    );
    std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    assert!(matches!(tls(Some(&path), &Network::default()).unwrap_err().retry, Retry::Never));
    test_servers::certificates(directory.path());
    tls(Some(&path), &Network::default()).unwrap();
}

/// Metadata services are asked without a proxy, which would be asked for the credentials of its own
/// machine.
#[test]
fn metadata_hosts_are_known() {
    for host in ["169.254.169.254", "169.254.170.2", "metadata.google.internal", "[fd00:ec2::254]"]
    {
        assert!(is_metadata_host(host), "{host}");
    }
    for host in ["127.0.0.1", "s3.amazonaws.com", "metadata.example"] {
        assert!(!is_metadata_host(host), "{host}");
    }
}
