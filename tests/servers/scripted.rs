//! A scripted HTTP server inside the test process, for answers that no real server gives on demand.
//!
//! It is not a web server: it parses the head of a request, and sends what the script says.
//!
//! **Locks:** one leaf lock for the state that the threads of the connections share.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A request that the scripted server got.
#[derive(Clone, Debug)]
pub struct ScriptedRequest {
    /// Number of requests before this one, over all connections.
    pub number: usize,
    /// Path with query.
    pub target: String,
    head: String,
}

impl ScriptedRequest {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The range that is asked for, which every request of a remote base has.
    pub fn range(&self) -> Range<usize> {
        let (first, last) = self
            .header("range")
            .and_then(|value| value.strip_prefix("bytes="))
            .and_then(|value| value.split_once('-'))
            .expect("a range");
        first.parse().expect("a number")..last.parse::<usize>().expect("a number") + 1
    }

    /// The right answer for a file with `content` and the entity tag `tag`.
    pub fn partial(&self, content: &[u8], tag: &str) -> Vec<Act> {
        let range = self.range();
        vec![
            Act::Send(
                format!(
                    "HTTP/1.1 206 Partial Content\r\nETag: {tag}\r\nContent-Length: {}\r\n\
                     Content-Range: bytes {}-{}/{}\r\n\r\n",
                    range.len(),
                    range.start,
                    range.end - 1,
                    content.len()
                )
                .into_bytes(),
            ),
            Act::Send(content[range].to_vec()),
        ]
    }
}

/// What the scripted server does on a connection after a request.
#[derive(Clone, Debug)]
pub enum Act {
    /// Sends these bytes.
    Send(Vec<u8>),
    /// Sends nothing more until the server ends, and keeps the connection open.
    Stall,
    /// Sends a byte now and then until the server or the client ends.
    Trickle,
    /// Closes the connection.
    Close,
}

/// An answer without a body that matters.
pub fn answer(status: &str, headers: &[&str], body: &str) -> Vec<Act> {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    vec![Act::Send(
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
            .into_bytes(),
    )]
}

#[derive(Default)]
struct State {
    is_over: bool,
    requests: Vec<ScriptedRequest>,
    connections: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    over: Condvar,
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The scripted server. Its threads end when it is dropped.
pub struct ScriptedServer {
    /// Port on all addresses of 127.0.0.0/8.
    pub port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl ScriptedServer {
    /// Starts a server that does after each request what `script` says.
    pub fn start(
        script: impl Fn(&ScriptedRequest) -> Vec<Act> + Send + Sync + 'static,
    ) -> ScriptedServer {
        // Not 127.0.0.1 alone: tests need two hosts that are this one.
        let listener = TcpListener::bind(("0.0.0.0", 0)).expect("a free port");
        let port = listener.local_addr().expect("address of a listener").port();
        let shared = Arc::<Shared>::default();
        let script = Arc::new(script);
        let of_acceptor = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || {
            for connection in listener.incoming() {
                let Ok(connection) = connection else { break };
                let (shared, script) = (Arc::clone(&of_acceptor), Arc::clone(&script));
                let copy = connection.try_clone().expect("copy of a connection");
                let is_over = of_acceptor.with(|state| {
                    state.connections.push(copy);
                    state.is_over
                });
                if is_over {
                    break;
                }
                let thread = std::thread::spawn(move || {
                    let closing = Closing(connection);
                    serve(&closing.0, &shared, &*script);
                });
                of_acceptor.with(|state| state.threads.push(thread));
            }
        });
        ScriptedServer { port, shared, acceptor: Some(acceptor) }
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<ScriptedRequest> {
        self.shared.with(|state| state.requests.clone())
    }

    /// `http://127.0.0.1:PORT` with `target`.
    pub fn url(&self, target: &str) -> String {
        format!("http://127.0.0.1:{}{target}", self.port)
    }
}

impl Drop for ScriptedServer {
    fn drop(&mut self) {
        let connections = self.shared.with(|state| {
            state.is_over = true;
            std::mem::take(&mut state.connections)
        });
        self.shared.over.notify_all();
        for connection in connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
        // Wakes the acceptor.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let acceptor = self.acceptor.take();
        let threads = acceptor.into_iter().flat_map(|acceptor| {
            let _ = acceptor.join();
            self.shared.with(|state| std::mem::take(&mut state.threads))
        });
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// Closes a connection also if the script panics; the state has a copy of the descriptor.
struct Closing(TcpStream);

impl Drop for Closing {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn serve(
    mut connection: &TcpStream,
    shared: &Shared,
    script: &dyn Fn(&ScriptedRequest) -> Vec<Act>,
) {
    let Ok(copy) = connection.try_clone() else { return };
    let mut reader = BufReader::new(copy);
    while let Some(head) = read_head(&mut reader) {
        let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let request = shared.with(|state| {
            let number = state.requests.len();
            state.requests.push(ScriptedRequest { number, target, head });
            state.requests[number].clone()
        });
        for act in script(&request) {
            match act {
                Act::Send(bytes) => {
                    if connection.write_all(&bytes).is_err() {
                        return;
                    }
                }
                Act::Stall => {
                    let state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
                    let _over = shared.over.wait_while(state, |state| !state.is_over);
                    return;
                }
                Act::Trickle => loop {
                    if shared.with(|state| state.is_over) || connection.write_all(b"x").is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(50));
                },
                Act::Close => return,
            }
        }
    }
}

/// The head of the next request, whose body of `Content-Length` bytes is skipped.
fn read_head(reader: &mut BufReader<TcpStream>) -> Option<String> {
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            break;
        }
        head += &line;
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    reader.read_exact(&mut vec![0; length.unwrap_or(0)]).ok()?;
    Some(head)
}
