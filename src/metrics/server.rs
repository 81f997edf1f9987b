//! The HTTP side: one thread, a few connections, two pages.

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
use crate::Result;
use crate::error::Context;

/// What Prometheus asks for first.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The page of a person who tries the address without a path.
const HINT: &str = "cordisk: the metrics are at /metrics\n";
/// The longest head of a request.
const LONGEST_HEAD: usize = 16 << 10;
/// Pause after a failed `accept`, which is for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the thread may take to end: it may be reading a table of the overlay.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// How often a thread that is about to end is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A port that nobody is served at yet: bound while that is still allowed. So is the runtime made, which wants sockets of its own for signals, whether
/// anybody asks for those or not: in the sandbox there are none to be had.
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
    /// The name is not one of this machine, or the port is taken or not for us.
    pub fn bind(address: &Address) -> Result<Listener> {
        let bind = || -> io::Result<Listener> {
            let listener = TcpListener::bind(address.host_and_port())?;
            listener.set_nonblocking(true)?;
            let bound = listener.local_addr()?;
            let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
            Ok(Listener { listener, runtime, address: bound })
        };
        bind().context(|| format!("--metrics {address}: cannot listen there, choose another address or port"))
    }

    /// Where, with the port that was found if any would do.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The server, until dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    /// The same socket, to end the wait for connections.
    socket: TcpListener,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves the port.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub fn start(listener: Listener, source: Source) -> Result<Server> {
        let Listener { listener, runtime, address } = listener;
        let what = || format!("--metrics {address}");
        let socket = listener.try_clone().context(what)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let body = move || {
            if let Err(error) = runtime.block_on(accept(listener, Arc::new(source), &stop)) {
                log::error!("metrics: {error}");
            }
            // With all connections that there still are.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("metrics".to_owned()).spawn(body).context(what)?;
        log::info!("metrics at http://{address}/metrics");
        Ok(Server { address, socket, stopping, thread: Some(thread) })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // Ends an `accept` that waits, with an error.
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

/// Serves until told to stop.
async fn accept(listener: TcpListener, source: Arc<Source>, stopping: &AtomicBool) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut connections = VecDeque::new();
    loop {
        let accepted = listener.accept().await;
        if stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        match accepted {
            Ok((stream, _)) => {
                connections.retain(|connection: &tokio::task::JoinHandle<()>| !connection.is_finished());
                // The oldest is the one that should have been done: an answer takes no time.
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

/// One connection, one answer.
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
        let mut response = page(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET and HEAD\n".to_owned());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/metrics" => match source.exposition() {
            Ok(text) => page(StatusCode::OK, OPENMETRICS, text),
            Err(_) => page(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", "the metrics could not be told\n".to_owned()),
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
