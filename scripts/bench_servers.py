"""What the benchmarks of bases on servers share: processes that end with the benchmark, servers
with latency and a limited link, and a proxy that makes these for HTTP.

Every server is real and on this machine: nbdkit, nginx, and radosgw if Ceph is installed. nbdkit's
delay and rate filters make latency and link of NBD; a proxy of this program, which holds every
request back and moves replies with splice(2), makes those of HTTP and S3.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
LINK = 50_000_000  # bytes per second of the limited link
REPO = pathlib.Path(__file__).resolve().parent.parent
RESULTS = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or REPO / "target") / "bench"


class Broken(Exception):
    """One line for the user."""


def run(*words, **more):
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **more)
    if done.returncode != 0:
        raise Broken("%s: %s" % (" ".join(str(word) for word in words[:3]), (done.stderr.strip().splitlines() or ["exit status %d" % done.returncode])[-1]))
    return done.stdout


@contextlib.contextmanager
def started(*words, **more):
    """A process that is ended at the end, and killed if it does not follow."""
    process = subprocess.Popen([str(word) for word in words], start_new_session=True, stdout=more.pop("stdout", subprocess.DEVNULL), stderr=subprocess.DEVNULL, **more)
    try:
        yield process
    finally:
        if process.poll() is None:
            # The session is its own, with the processes that it has started.
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(what, ready, process=None):
    deadline = time.monotonic() + 30
    while not ready():
        if time.monotonic() > deadline or process is not None and process.poll() is not None:
            raise Broken("%s does not start" % what)
        time.sleep(0.01)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def nbdkit(work, base, latency, rate=None):
    """The base behind nbdkit, each read `latency` ms late."""
    path = work / "nbd.sock"
    path.unlink(missing_ok=True)
    filters, words = ["--filter=delay"], ["rdelay=%dms" % latency]
    if rate:
        # The burst is small against what is read.
        filters, words = filters + ["--filter=rate"], words + ["rate=%d" % (rate * 8), "burstiness=0.2"]
    with started("nbdkit", "-f", "-r", "-U", path, *filters, "file", base, *words) as process:
        wait_for("nbdkit", path.exists, process)
        yield path


# A program of its own, so that its work is not that of the program that measures.
PROXY = r'''
import os, signal, socket, sys, threading, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
port, to, delay, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
lock, due = threading.Lock(), 0.0

def pace(count):
    """Waits until the link has carried these bytes; all connections share it."""
    global due
    if not rate:
        return
    with lock:
        now = time.monotonic()
        due = max(due, now - 0.01) + count / rate
        wait = due - now
    if wait > 0:
        time.sleep(wait)

def requests(client, server):
    try:
        while data := client.recv(65536):
            time.sleep(delay)
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)
    except OSError:
        pass

def replies(client, server):
    out, into = os.pipe()
    try:
        while (count := os.splice(server.fileno(), into, 65536 if rate else 1 << 20)) > 0:
            pace(count)
            while count > 0:
                count -= os.splice(out, client.fileno(), count)
    except OSError:
        pass
    for end in (out, into):
        os.close(end)
    client.close()

def serve(client):
    server = socket.create_connection(("127.0.0.1", to))
    for one in (client, server):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    asks = threading.Thread(target=requests, args=(client, server), daemon=True)
    answers = threading.Thread(target=replies, args=(client, server), daemon=True)
    asks.start()
    answers.start()
    return answers

listener = socket.create_server(("127.0.0.1", port), backlog=128)
while True:
    client, _ = listener.accept()
    if rate:
        # The connections share one link.
        serve(client)
    elif os.fork() == 0:
        # A process for each connection: threads of one would wait for each other.
        listener.close()
        serve(client).join()
        os._exit(0)
    else:
        client.close()
'''


@contextlib.contextmanager
def proxy(to, latency, rate=None):
    port = free_port()
    with started(sys.executable, "-c", PROXY, port, to, latency / 1000, rate or 0) as process:
        wait_for("the proxy", lambda: listens(port), process)
        yield port


@contextlib.contextmanager
def nginx(work, base):
    root = work / "nginx"
    (root / "root").mkdir(parents=True)
    os.link(base, root / "root" / "base.raw")
    port = free_port()
    (root / "nginx.conf").write_text("""
daemon off; worker_processes 1; pid %(root)s/pid; error_log %(root)s/error.log;
events { worker_connections 512; }
http { access_log off; sendfile on; tcp_nodelay on; client_body_temp_path %(root)s/b; proxy_temp_path %(root)s/p; fastcgi_temp_path %(root)s/f;
uwsgi_temp_path %(root)s/u; scgi_temp_path %(root)s/s; keepalive_requests 100000; server { listen 127.0.0.1:%(port)d; root %(root)s/root; } }
""" % {"root": root, "port": port})
    run("chmod", "-R", "a+rX", root)
    with started("nginx", "-p", root, "-c", root / "nginx.conf") as process:
        wait_for("nginx", lambda: listens(port), process)
        yield port


@contextlib.contextmanager
def radosgw(work, base):
    """One-node Ceph; yields the port and the environment with the keys."""
    root = work / "ceph"
    root.mkdir()
    process = subprocess.Popen(
        ["bash", str(REPO / "tests/servers/ceph.sh"), str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True)
    try:
        told = {}
        for line in process.stdout:
            if line.strip() == "ready":
                break
            name, _, value = line.strip().partition("=")
            told[name] = value
        else:
            raise Broken("Ceph does not start")
        keys = {**os.environ, **{name: told[name] for name in ("ENDPOINT", "ACCESS_KEY", "SECRET_KEY") if name in told}}
        for path, body in (("/golden", subprocess.DEVNULL), ("/golden/base.raw", open(base, "rb"))):
            done = subprocess.run([sys.executable, str(REPO / "tests/servers/s3.py"), "PUT", path], stdin=body, env=keys, capture_output=True, check=False)
            if done.returncode != 0:
                raise Broken("the object could not be stored")
        yield int(told["ENDPOINT"].rpartition(":")[2]), keys
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end(number, _frame):
    raise SystemExit(128 + number)


def benchmark(options, measure):
    """Runs `measure(options, DIRECTORY)`, and returns the exit status. The directory goes with it."""
    if options.parse_only:
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    work = os.path.realpath(tempfile.mkdtemp(prefix="cordisk-bench."))
    try:
        measure(options, work)
        return 0
    except (Broken, OSError) as error:
        print("bench.sh: %s" % error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
