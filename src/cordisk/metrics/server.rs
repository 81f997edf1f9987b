//! HTTP server: one thread, a few connections, two pages.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};

use super::{Address, CONNECTION_TIME, MOST_CONNECTIONS, Source};
use host::Result;
use host::error::Context;

/// The content type that Prometheus prefers.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The page at the address without a path.
const HINT: &str = "cordisk: the metrics are at /metrics\n";
/// Longest head of a request, in bytes.
const LONGEST_HEAD: usize = 16 << 10;
/// Pause after a failed `accept`, whose cause is a lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long to wait for the end of the thread, which may be reading a table of the overlay.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// Interval at which the end of the thread is polled.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A bound port that is not served yet. The port is bound and the runtime is built before the
/// sandbox is entered: the sandbox forbids new sockets, and the runtime always creates sockets for
/// signals.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    runtime: Runtime,
    address: SocketAddr,
}

impl Listener {
    /// Binds the port.
    ///
    /// # Errors
    /// The name is not an address of this machine, or the port is in use or not permitted.
    pub fn bind(address: &Address) -> Result<Listener> {
        let bind = || -> io::Result<Listener> {
            let listener = TcpListener::bind(address.host_and_port())?;
            listener.set_nonblocking(true)?;
            let bound = listener.local_addr()?;
            let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
            Ok(Listener { listener, runtime, address: bound })
        };
        bind().context(|| {
            format!("--metrics {address}: cannot listen there, choose another address or port")
        })
    }

    /// Returns the bound address; port 0 was replaced by the actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The metrics server; it stops when it is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    /// A duplicate of the listening socket, used to end the wait for connections.
    socket: TcpListener,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsServer {
    /// Starts to serve the port.
    ///
    /// # Errors
    /// The socket could not be duplicated, or the thread could not be started.
    pub fn start(listener: Listener, source: Source) -> Result<MetricsServer> {
        let Listener { listener, runtime, address } = listener;
        let what = || format!("--metrics {address}");
        let socket = listener.try_clone().context(what)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let body = move || {
            if let Err(error) = runtime.block_on(accept(listener, Arc::new(source), &stop)) {
                log::error!("metrics: {error}");
            }
            // Also ends all open connections.
            runtime.shutdown_background();
        };
        let thread =
            std::thread::Builder::new().name("metrics".to_owned()).spawn(body).context(what)?;
        log::info!("metrics at http://{address}/metrics");
        Ok(MetricsServer { socket, stopping, thread: Some(thread) })
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // A waiting `accept` returns with an error.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let Some(thread) = self.thread.take() else { return };
        let give_up = Instant::now() + LAST_ANSWER;
        while !thread.is_finished() && Instant::now() < give_up {
            std::thread::sleep(LOOK_AGAIN);
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

/// Accepts connections until `stopping` is set.
async fn accept(
    listener: TcpListener,
    source: Arc<Source>,
    stopping: &AtomicBool,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut connections = VecDeque::new();
    loop {
        let accepted = listener.accept().await;
        if stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        match accepted {
            Ok((stream, _)) => {
                connections
                    .retain(|connection: &tokio::task::JoinHandle<()>| !connection.is_finished());
                // The oldest connection is closed, because an answer takes almost no time, so it
                // should have ended.
                if connections.len() >= MOST_CONNECTIONS
                    && let Some(oldest) = connections.pop_front()
                {
                    oldest.abort();
                }
                connections.push_back(tokio::spawn(serve(stream, Arc::clone(&source))));
            }
            Err(error) => {
                log::debug!("metrics: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection with one answer.
async fn serve(stream: TcpStream, source: Arc<Source>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(&source, request.method(), request.uri().path());
        async move { Ok::<_, Infallible>(response) }
    });
    let mut builder = http1::Builder::new();
    builder.keep_alive(false).max_buf_size(LONGEST_HEAD).header_read_timeout(None);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("metrics: {error}"),
        Err(_) => log::debug!("metrics: a client was too slow"),
    }
}

fn answer(source: &Source, method: &Method, path: &str) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        let mut response =
            page(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET and HEAD\n".to_owned());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/metrics" => match source.exposition() {
            Ok(text) => page(StatusCode::OK, OPENMETRICS, text),
            Err(_) => page(
                StatusCode::INTERNAL_SERVER_ERROR,
                "text/plain",
                "the metrics could not be told\n".to_owned(),
            ),
        },
        "/" => page(StatusCode::OK, "text/plain", HINT.to_owned()),
        _ => page(StatusCode::NOT_FOUND, "text/plain", HINT.to_owned()),
    }
}

fn page(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
