use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn parse(text: &str) -> Result<SourcesConfig> {
    SourcesConfig::parse(text, Path::new("sources.toml"), Vec::new())
}

fn region(config: &SourcesConfig, name: &str) -> Option<String> {
    config.settings(&SourceUrl::parse(name).unwrap()).region
}

#[test]
fn the_longest_prefix_wins_by_whole_components() {
    let config = parse(
        "[[source]]\nprefix = \"s3://golden/\"\nregion = \"a\"\n\
         [[source]]\nprefix = \"s3://golden/images/\"\nregion = \"b\"\n\
         [[source]]\nprefix = \"s3://other\"\nregion = \"c\"\n",
    )
    .unwrap();
    assert_eq!(region(&config, "s3://golden/disk").as_deref(), Some("a"));
    assert_eq!(region(&config, "s3://golden/images/disk").as_deref(), Some("b"));
    assert_eq!(region(&config, "s3://golden/imagesdisk").as_deref(), Some("a"));
    assert_eq!(region(&config, "s3://other/disk").as_deref(), Some("c"));
    assert_eq!(region(&config, "s3://golden2/disk"), None);
    assert_eq!(region(&config, "gs://golden/disk"), None);
}

#[test]
fn errors_name_file_line_and_key() {
    let cases = [
        ("stall-timeout = 3\ntimeout = 4\n", "sources.toml: line 2: unknown field `timeout`"),
        (
            "[[source]]\nprefix = \"s3://a/\"\n\npath_style = true\n",
            "sources.toml: line 4: unknown field `path_style`",
        ),
        ("[[source]]\nregion = \"x\"\n", "sources.toml: line 1: missing field `prefix`"),
        ("connect-timeout = 0\n", "sources.toml: line 1: a time limit of 0 seconds"),
        ("stall-timeout = \"x\"\n", "sources.toml: line 1: invalid type"),
        ("\n[[source]\n", "sources.toml: line 2: "),
        (
            "[[source]]\nprefix = \"ftp://x/?a=5ecre7\"\n",
            "sources.toml: line 1: prefix \"ftp://x/?…\"",
        ),
        (
            "[[source]]\nprefix = \"s3://a/\"\nheader-file = \"x\"\n",
            "sources.toml: line 1: header-file has no meaning for the prefix s3://a/",
        ),
        (
            "[[source]]\nprefix = \"http://a/\"\nca = \"x\"\n",
            "ca has no meaning for the prefix http://a/",
        ),
        (
            "[[source]]\nprefix = \"https://a/\"\nanonymous = true\n",
            "anonymous has no meaning for the prefix https://a/",
        ),
        (
            "[[source]]\nprefix = \"gs://a/\"\nsas-file = \"x\"\n",
            "sas-file has no meaning for the prefix gs://a/",
        ),
        (
            "[[source]]\nprefix = \"s3://a/\"\naccess-key-id-file = \"x\"\n",
            "access-key-id-file and secret-access-key-file belong together",
        ),
        (
            "[[source]]\nprefix = \"s3://a/\"\ncredentials-file = \"x\"\nanonymous = true\n",
            "more than one kind of credentials",
        ),
        ("[[source]]\nprefix = \"s3://a/\"\nprofile = \"x\"\n", "profile without credentials-file"),
        (
            "connect-timeout = 9223372036854775807\n",
            "line 1: a time limit of more than 86400 seconds",
        ),
        (
            "[[source]]\nprefix = \"https://a/?s=5ecre7\"\nregion = \"x\"\n",
            "region has no meaning for the prefix https://a/?…",
        ),
        (
            "[[source]]\nprefix = \"s3://a/\"\n[[source]]\nprefix = \"s3://a/\"\n",
            "line 3: a second source with the prefix s3://a/",
        ),
    ];
    for (text, expected) in cases {
        let error = parse(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{text}");
        assert!(error.to_string().contains(expected), "{text}{error}");
        assert!(!error.to_string().contains("5ecre7"), "{error}");
    }
}

#[test]
fn limits_have_defaults() {
    let config = parse("").unwrap();
    assert_eq!((config.connect_timeout.as_secs(), config.stall_timeout.as_secs()), (5, 10));
    let config = parse("connect-timeout = 2\nstall-timeout = 3\n").unwrap();
    assert_eq!((config.connect_timeout.as_secs(), config.stall_timeout.as_secs()), (2, 3));
}

#[test]
fn a_file_that_others_can_read_is_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    let (open, closed) = (directory.path().join("open"), directory.path().join("closed"));
    for (path, mode) in [(&open, 0o644), (&closed, 0o640)] {
        fs::write(path, "secret").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let config = parse(&format!(
        "[[source]]\nprefix = \"s3://a/\"\naccess-key-id-file = \"{}\"\nsecret-access-key-file = \"{}\"\n\
         [[source]]\nprefix = \"https://b/\"\nca = \"/ca.pem\"\nheader-file = \"/none\"\n",
        closed.display(),
        open.display()
    ))
    .unwrap();
    let warnings = config.warnings();
    assert_eq!(
        warnings,
        [format!("{}: every user of this host may read this secret: chmod 600", open.display())]
    );
    assert_eq!(config.files(), [closed, open, "/none".into(), "/ca.pem".into()]);
    assert!(!format!("{config:?}").contains("secret"));
}

#[test]
fn files_are_read_from_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sources.toml");
    let error = SourcesConfig::load(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    fs::write(&path, "stall-timeout = 20\n").unwrap();
    assert_eq!(SourcesConfig::load(&path).unwrap().stall_timeout.as_secs(), 20);
    let path = directory.path().join("key");
    fs::write(&path, "  key\n").unwrap();
    assert_eq!(secret(&path).unwrap(), "key");
    fs::write(&path, "\n").unwrap();
    assert!(secret(&path).unwrap_err().to_string().ends_with("the file is empty"));
}

#[test]
fn profiles_are_sections_of_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("credentials");
    fs::write(
        &path,
        "id = outside\n[default]\nid = 1\n# id = 2\n; id = 3\n[ other ]\n\nid=4\nkey = a=b\n",
    )
    .unwrap();
    let read = |name| profile(&path, name, ["id", "key"]);
    assert_eq!(read("default").unwrap(), [Some("1".into()), None]);
    assert_eq!(read("other").unwrap(), [Some("4".into()), Some("a=b".into())]);
    assert!(read("none").unwrap_err().to_string().ends_with("no section [none]"));
}
