//! Starts real servers for tests, on free ports of 127.0.0.1 or on sockets in a scratch directory.
//!
//! Each function returns a guard whose drop ends the server, or `None` after a line `skipped: …`
//! if a program is missing. A server ends with the test process as well, however that ends: it is
//! held by the standard input of a script.
//!
//! **Touches:** processes that it started, scratch directories. **Never:** uses a default port or a
//! configuration of the host.

#![forbid(unsafe_code)]

pub mod scripted;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Time for a server to answer after its start. A busy machine needs a few seconds.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Whether all `programs` can be found. If not, prints why the test is skipped.
pub fn have(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    for program in programs {
        if !places.iter().any(|place| place.join(program).is_file()) {
            println!("skipped: {program} is not installed");
            return false;
        }
    }
    true
}

/// A process that ends when its standard input does.
#[derive(Debug)]
struct Held {
    script: Child,
    log: PathBuf,
}

impl Held {
    fn start(
        script: &str,
        arguments: &[&OsStr],
        directory: &Path,
    ) -> (Held, BufReader<ChildStdout>) {
        let log = directory.join("server.log");
        let errors = fs::File::create(&log).expect("log of a server");
        let mut child = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(script))
            .args(arguments)
            .env("PATH", path_with_sbin())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("start of a server");
        let output = BufReader::new(child.stdout.take().expect("standard output is a pipe"));
        (Held { script: child, log }, output)
    }

    /// Waits until `ready` is true.
    fn wait(&mut self, ready: impl Fn() -> bool) {
        let start = Instant::now();
        while !ready() {
            let ended = self.script.try_wait().expect("state of a server").is_some();
            if ended || start.elapsed() > START_LIMIT {
                panic!("no server: {}", fs::read_to_string(&self.log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let _ = self.script.wait();
    }
}

fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// A port of 127.0.0.1 that was free just now. It is below those that the kernel chooses
/// by itself: one of those can be given to another test before the server binds it, and
/// `answers` can connect to itself on it, as TCP allows, before the server listens.
pub fn free_port() -> u16 {
    (0..1000)
        .map(|_| 10_000 + (RandomState::new().build_hasher().finish() % 20_000) as u16)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port of 127.0.0.1")
}

fn answers(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

fn run(program: &str, arguments: &[&str], directory: &Path) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// nginx with one directory of files, by HTTP and by HTTPS.
#[derive(Debug)]
pub struct Nginx {
    _held: Held,
    directory: TempDir,
    /// Port of HTTP.
    pub http: u16,
    /// Port of HTTPS. The certificate is for `localhost` and 127.0.0.1.
    pub https: u16,
}

impl Nginx {
    /// The directory of the files.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("files")
    }

    /// The certificate of the authority that signed the certificate of the server.
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// The log of requests, one line `METHOD URI STATUS "RANGE" "IF-MATCH"` each, when it has at
    /// least `count` lines: nginx writes a line after the answer.
    pub fn requests(&self, count: usize) -> Vec<String> {
        let start = Instant::now();
        loop {
            let log = fs::read_to_string(self.directory.path().join("access.log"));
            let lines: Vec<String> = log.unwrap_or_default().lines().map(str::to_owned).collect();
            if lines.len() >= count {
                return lines;
            }
            assert!(start.elapsed() < START_LIMIT, "{count} requests, and not only {lines:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Starts nginx. `locations` are further directives of its two servers, such as
/// `location /off/ { max_ranges 0; }`; `HTTP_PORT` and `HTTPS_PORT` in it become the ports.
pub fn nginx(locations: &str) -> Option<Nginx> {
    if !have(&["nginx", "openssl"]) {
        return None;
    }
    let directory = tempfile::tempdir().expect("scratch directory");
    let at = directory.path();
    fs::create_dir(at.join("files")).expect("directory of files");
    certificates(at);
    let (http, https) = (free_port(), free_port());
    let locations =
        locations.replace("HTTPS_PORT", &https.to_string()).replace("HTTP_PORT", &http.to_string());
    // One process, so that killing it ends the server. As root, the worker keeps its user: the
    // scratch directory is closed to others.
    let user = if run_as_root() { "user root;" } else { "" };
    let dir = at.display();
    fs::write(
        at.join("nginx.conf"),
        format!(
            r#"daemon off; master_process off; {user}
pid {dir}/nginx.pid; error_log stderr;
events {{ worker_connections 256; }}
http {{
    log_format test '$request_method $request_uri $status "$http_range" "$http_if_match"';
    access_log {dir}/access.log test;
    client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{http}; listen 127.0.0.1:{https} ssl;
        ssl_certificate {dir}/server.pem; ssl_certificate_key {dir}/server.key;
        root {dir}/files;
        {locations}
    }}
}}
"#
        ),
    )
    .expect("nginx.conf");
    let conf = at.join("nginx.conf");
    let arguments = ["nginx", "-p"].map(OsStr::new);
    let (mut held, mut output) = Held::start(
        "hold.sh",
        &[arguments[0], arguments[1], at.as_os_str(), OsStr::new("-c"), conf.as_os_str()],
        at,
    );
    let mut pid = String::new();
    output.read_line(&mut pid).expect("process id of nginx");
    held.wait(|| answers(http) && answers(https));
    Some(Nginx { _held: held, directory, http, https })
}

fn run_as_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Makes an authority and a certificate of a server: `ca.pem`, `server.pem`, `server.key`.
pub fn certificates(directory: &Path) {
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let req = |rest: &[&str]| {
        let arguments: Vec<&str> = ["req"].iter().chain(&key).chain(rest).copied().collect();
        run("openssl", &arguments, directory);
    };
    req(&[
        "-x509",
        "-subj",
        "/CN=test authority",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
    ]);
    req(&["-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr"]);
    fs::write(
        directory.join("names"),
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .expect("names of the certificate");
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            "server.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-days",
            "2",
            "-CAcreateserial",
            "-extfile",
            "names",
            "-out",
            "server.pem",
        ],
        directory,
    );
}

/// A Ceph cluster of one node, with radosgw as its S3 server.
#[derive(Debug)]
pub struct Ceph {
    // Dropped before the directory.
    _held: Held,
    directory: TempDir,
    /// URL of radosgw; buckets are in the path.
    pub endpoint: String,
    /// Id of the access key of S3.
    pub access_key: String,
    /// Secret of the access key of S3.
    pub secret_key: String,
    /// ceph.conf, for rbd and librbd. The pool `rbd` is ready.
    pub conf: PathBuf,
}

impl Ceph {
    /// A directory for files of the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Makes a signed request with a body, such as PUT of `/bucket` or `/bucket/key`. Returns
    /// status, headers with names in lower case, and body of the answer, which must be a success.
    pub fn request(&self, method: &str, path: &str, body: &[u8]) -> String {
        self.s3(&[method, path], body)
    }

    /// A presigned URL for GET of `/bucket/key`, valid for a number of seconds.
    pub fn presign(&self, path: &str, seconds: u32) -> String {
        self.s3(&["presign", path, &seconds.to_string()], b"").trim().to_owned()
    }

    /// Runs `rbd` with arguments for this cluster; it must succeed.
    pub fn rbd(&self, arguments: &[&str]) {
        let conf = self.conf.to_str().expect("UTF-8");
        let mut all = vec!["--conf", conf, "--no-progress"];
        all.extend(arguments);
        run("rbd", &all, self.directory.path());
    }

    /// Starts nbdkit with a snapshot of an image in the pool `rbd`. `more` are further arguments:
    /// filters with `--`, and their parameters.
    pub fn serve_snapshot(&self, image: &str, snapshot: &str, more: &[&str]) -> Option<NbdServer> {
        let plugin = Path::new(env!("CARGO_MANIFEST_DIR")).join("rbd.py").display().to_string();
        let (options, parameters): (Vec<&str>, Vec<&str>) =
            more.iter().partition(|argument| argument.starts_with("--"));
        let own = [
            format!("conf={}", self.conf.display()),
            format!("image={image}"),
            format!("snap={snapshot}"),
        ];
        let mut all = vec!["-r"];
        all.extend(options);
        all.extend(["python", plugin.as_str()]);
        all.extend(own.iter().map(String::as_str));
        all.extend(parameters);
        nbdkit(&all)
    }

    fn s3(&self, arguments: &[&str], body: &[u8]) -> String {
        let keys = [
            ("ENDPOINT", self.endpoint.as_str()),
            ("ACCESS_KEY", &self.access_key),
            ("SECRET_KEY", &self.secret_key),
        ];
        signed("s3.py", arguments, &keys, body)
    }
}

/// The value of a header in what [`Ceph::request`] returned.
pub fn header(answer: &str, name: &str) -> Option<String> {
    answer
        .lines()
        .take_while(|line| !line.is_empty())
        .find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned()))
}

/// Starts Ceph, which takes about 3 seconds and 200 MB of memory.
pub fn radosgw() -> Option<Ceph> {
    let programs = [
        "ceph-mon",
        "ceph-osd",
        "radosgw",
        "radosgw-admin",
        "ceph",
        "ceph-authtool",
        "monmaptool",
        "python3",
        "curl",
        "bash",
    ];
    if !have(&programs) {
        return None;
    }
    let directory = tempfile::tempdir().expect("scratch directory");
    let cluster = directory.path().join("ceph");
    fs::create_dir(&cluster).expect("directory of the cluster");
    let (held, output) = Held::start("ceph.sh", &[cluster.as_os_str()], directory.path());
    let mut values = HashMap::new();
    let mut is_ready = false;
    for line in output.lines() {
        let line = line.expect("output of ceph.sh");
        if line == "ready" {
            is_ready = true;
            break;
        }
        if let Some((name, value)) = line.split_once('=') {
            values.insert(name.to_owned(), value.to_owned());
        }
    }
    let log = || fs::read_to_string(&held.log).unwrap_or_default();
    assert!(is_ready, "no Ceph: {}", log());
    let mut take = |name: &str| values.remove(name).expect("a line of ceph.sh");
    Some(Ceph {
        endpoint: take("ENDPOINT"),
        access_key: take("ACCESS_KEY"),
        secret_key: take("SECRET_KEY"),
        conf: take("CEPH_CONF").into(),
        _held: held,
        directory,
    })
}

/// fake-gcs-server, an emulator of Google Cloud Storage: it ignores preconditions, and knows
/// generations.
#[derive(Debug)]
pub struct FakeGcs {
    _held: Held,
    _directory: TempDir,
    /// URL of the server.
    pub endpoint: String,
}

impl FakeGcs {
    /// Makes a bucket.
    pub fn make_bucket(&self, bucket: &str) {
        self.post("/storage/v1/b?project=test", format!("{{\"name\":\"{bucket}\"}}").as_bytes());
    }

    /// Stores an object, or replaces it.
    pub fn put(&self, bucket: &str, name: &str, content: &[u8]) {
        let target = format!("/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}");
        self.post(&target, content);
    }

    fn post(&self, target: &str, body: &[u8]) {
        let mut curl = Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--output", "/dev/null"])
            .args(["--header", "Expect:", "--data-binary", "@-"])
            .arg(format!("{}{target}", self.endpoint))
            .stdin(Stdio::piped())
            .spawn()
            .expect("curl");
        curl.stdin.take().expect("pipe").write_all(body).expect("body of a request");
        assert!(curl.wait().expect("curl").success(), "POST {target}");
    }
}

/// Starts `fake-gcs-server` with its objects in memory.
pub fn fake_gcs() -> Option<FakeGcs> {
    if !have(&["fake-gcs-server", "curl"]) {
        return None;
    }
    let directory = tempfile::tempdir().expect("scratch directory");
    let port = free_port();
    let (number, host) = (port.to_string(), format!("127.0.0.1:{port}"));
    let arguments = [
        "fake-gcs-server",
        "-scheme",
        "http",
        "-host",
        "127.0.0.1",
        "-port",
        &number,
        "-backend",
        "memory",
        "-public-host",
        &host,
    ]
    .map(OsStr::new);
    let (mut held, mut output) = Held::start("hold.sh", &arguments, directory.path());
    let mut pid = String::new();
    output.read_line(&mut pid).expect("process id of fake-gcs-server");
    held.wait(|| answers(port));
    Some(FakeGcs { _held: held, _directory: directory, endpoint: format!("http://{host}") })
}

/// azurite, the emulator of Azure blobs.
#[derive(Debug)]
pub struct Azurite {
    _held: Held,
    directory: TempDir,
    /// URL of the server with its one account, `devstoreaccount1`.
    pub endpoint: String,
}

impl Azurite {
    /// The key of the account, which is the same for every azurite and in its documentation.
    pub const KEY: &str =
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

    /// A directory for files of the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Makes a container.
    pub fn make_container(&self, container: &str) {
        self.signed_put(&format!("/{container}?restype=container"), b"");
    }

    /// Stores a blob, or replaces it.
    pub fn put(&self, container: &str, name: &str, content: &[u8]) {
        self.signed_put(&format!("/{container}/{name}"), content);
    }

    fn signed_put(&self, path: &str, body: &[u8]) {
        let keys = [("ENDPOINT", self.endpoint.as_str()), ("KEY", Azurite::KEY)];
        signed("azure.py", &[path], &keys, body);
    }
}

/// Runs a program of this directory that makes a signed request with `body`. Returns what it
/// prints.
fn signed(program: &str, arguments: &[&str], keys: &[(&str, &str)], body: &[u8]) -> String {
    let mut client = Command::new("python3")
        .arg("-I")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(program))
        .args(arguments)
        .envs(keys.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    client.stdin.take().expect("pipe").write_all(body).expect("body of a request");
    let output = client.wait_with_output().expect("python3");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// Starts `azurite-blob`; needs python3 as well.
pub fn azurite() -> Option<Azurite> {
    if !have(&["azurite-blob", "node", "python3"]) {
        return None;
    }
    let directory = tempfile::tempdir().expect("scratch directory");
    let port = free_port();
    let number = port.to_string();
    let mut arguments =
        ["azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", &number, "--location"]
            .map(OsStr::new)
            .to_vec();
    arguments.push(directory.path().as_os_str());
    arguments.extend(["--skipApiVersionCheck", "--disableTelemetry", "--silent"].map(OsStr::new));
    let (mut held, mut output) = Held::start("hold.sh", &arguments, directory.path());
    let mut pid = String::new();
    output.read_line(&mut pid).expect("process id of azurite");
    held.wait(|| answers(port));
    let endpoint = format!("http://127.0.0.1:{port}/devstoreaccount1");
    Some(Azurite { _held: held, directory, endpoint })
}

/// An NBD server on a socket.
#[derive(Debug)]
pub struct NbdServer {
    _held: Held,
    directory: TempDir,
    /// Path of the socket.
    pub socket: PathBuf,
    /// Process id, for tests that stop or kill the server.
    pub pid: u32,
}

impl NbdServer {
    /// `nbd+unix:///EXPORT?socket=…`.
    pub fn url(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// A directory for files of the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// Starts `nbdkit -f -U SOCKET arguments…`.
pub fn nbdkit(arguments: &[&str]) -> Option<NbdServer> {
    have(&["nbdkit"]).then(|| nbd("nbdkit", &["-f", "-U"], arguments))
}

/// Starts `qemu-nbd -t -k SOCKET arguments…`.
pub fn qemu_nbd(arguments: &[&str]) -> Option<NbdServer> {
    have(&["qemu-nbd"]).then(|| nbd("qemu-nbd", &["-t", "-k"], arguments))
}

fn nbd(program: &str, before: &[&str], after: &[&str]) -> NbdServer {
    let directory = tempfile::tempdir().expect("scratch directory");
    let socket = directory.path().join("nbd.sock");
    let mut all = vec![OsStr::new(program)];
    all.extend(before.iter().map(OsStr::new));
    all.push(socket.as_os_str());
    all.extend(after.iter().map(OsStr::new));
    let (mut held, mut output) = Held::start("hold.sh", &all, directory.path());
    let mut line = String::new();
    output.read_line(&mut line).expect("process id of an NBD server");
    let pid = line.trim().parse().expect("process id of an NBD server");
    held.wait(|| UnixStream::connect(&socket).is_ok());
    NbdServer { _held: held, directory, socket, pid }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Protects: no server outlives its guard.
    #[test]
    fn a_server_ends_with_its_guard() {
        let Some(server) = nbdkit(&["memory", "size=1M"]) else { return };
        let process = PathBuf::from(format!("/proc/{}", server.pid));
        let socket = server.socket.clone();
        let mut greeting = [0; 8];
        UnixStream::connect(&socket).unwrap().read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGIC");
        assert!(process.exists());
        drop(server);
        assert!(UnixStream::connect(&socket).is_err());
    }

    #[test]
    fn nginx_answers_by_http_and_https() {
        let Some(server) = nginx("") else { return };
        fs::write(server.root().join("a"), "content").unwrap();
        let ca = server.ca();
        for url in [
            format!("http://127.0.0.1:{}/a", server.http),
            format!("https://localhost:{}/a", server.https),
        ] {
            let output = Command::new("curl")
                .args(["--silent", "--cacert"])
                .arg(&ca)
                .arg(&url)
                .output()
                .unwrap();
            assert_eq!(output.stdout, b"content", "{url}");
        }
        assert_eq!(server.requests(2), ["GET /a 200 \"-\" \"-\""; 2]);
    }

    #[test]
    fn radosgw_keeps_what_is_put() {
        let Some(ceph) = radosgw() else { return };
        ceph.request("PUT", "/bucket", b"");
        let head = ceph.request("PUT", "/bucket/key", b"content");
        let tag = header(&head, "etag").unwrap();
        assert_eq!(tag, "\"9a0364b9e99bb480dd25e1f0284c8555\"", "the MD5 of the content");
        assert!(ceph.request("GET", "/bucket/key", b"").ends_with("\n\ncontent"));
        let url = ceph.presign("/bucket/key", 60);
        let output = Command::new("curl").args(["--silent", "--fail", &url]).output().unwrap();
        assert_eq!(output.stdout, b"content");
    }
}
