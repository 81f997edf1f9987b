#!/usr/bin/env python3
"""Measures bases on servers: cordisk beside QEMU's NBD client. Started by `scripts/bench.sh
--remote`, which builds what is measured.

The servers are those of scripts/bench_servers.py. Servers, proxy and what is measured share the
processors of the machine, so a rate is a lower bound, and only ratios within one run mean
something.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import statistics
import sys
import time

import qmp
from bench_servers import (LINK, MIB, RESULTS, Broken, benchmark, nbdkit, nginx, proxy, radosgw,
                           run, started, wait_for)

SECTIONS = ("stream", "limited", "touch", "cached")
# (latency in ms, wanted MiB/s, MiB that QEMU streams: it is slow)
STREAMS = ((1, 300, 256), (20, 200, 64), (100, 100, 16))


def options_of(words):
    parser = argparse.ArgumentParser(
        prog="scripts/bench.sh --remote", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures bases on servers: streams through latency and through a limited link, the first touch\n"
        "of a block, and reads of what the cache holds. QEMU's NBD client is measured in the same run.",
        epilog="workloads: " + ", ".join(SECTIONS))
    parser.add_argument("--only", metavar="WORKLOAD[,..]", default=",".join(SECTIONS), help="these workloads (default: all)")
    parser.add_argument("--sources", metavar="SOURCE[,..]", default="nbd,http,s3", help="these sources (default: nbd,http,s3)")
    parser.add_argument("--size", metavar="MIB", type=int, default=1024, help="size of the base (default 1024)")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="rounds, interleaved (default 3)")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, default=RESULTS / "remote.json", help="default target/bench/remote.json")
    parser.add_argument("--cordisk", metavar="PROGRAM", help="measure this one (default: built from here)")
    parser.add_argument("--parse-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.only, options.sources = options.only.split(","), options.sources.split(",")
    for given, known in ((options.only, SECTIONS), (options.sources, ("nbd", "http", "s3"))):
        for one in given:
            if one not in known:
                parser.error('no "%s"; there are: %s' % (one, ", ".join(known)))
    if options.size < 64 or options.rounds < 1:
        parser.error("--size is at least 64, --rounds at least 1")
    return options


class Bench:
    def __init__(self, options, work):
        self.options, self.work, self.rows = options, pathlib.Path(work), []
        self.words = ()
        self.disk, self.cache, self.overlay = self.work / "disk", self.work / "cache", self.work / "o.qcow2"
        self.base = self.work / "base.raw"
        self.environment = {**os.environ, "CORDISK_RUNTIME_DIR": str(self.work / "run")}
        (self.work / "run").mkdir(mode=0o700)
        with open(self.base, "wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(MIB))
        os.chmod(self.work, 0o755)

    def cordisk(self, *words):
        return run(self.options.cordisk, *words, env=self.environment)

    def row(self, name, unit, wanted, figures, peer=None):
        self.rows.append({"workload": name, "unit": unit, "wanted": wanted, "figures": figures, "median": statistics.median(figures), "peer": peer})
        row = self.rows[-1]
        is_met = "" if wanted is None else ("met" if row["median"] >= wanted else "MISSED")
        print("%-34s %9.2f %-7s wanted %-7s %-7s %s%s" % (
            name, row["median"], unit, "-" if wanted is None else wanted, is_met, " ".join("%.4g" % one for one in figures),
            "" if peer is None else "   QEMU %.4g (x %.1f)" % (peer, row["median"] / peer)), flush=True)

    @contextlib.contextmanager
    def mounted(self, url, *more, fresh_cache=True):
        """A new overlay above the URL."""
        if fresh_cache:
            shutil.rmtree(self.cache, ignore_errors=True)
        self.overlay.unlink(missing_ok=True)
        prefix = url if url.startswith("nbd") else url.rpartition("/")[0] + "/"
        words = () if url.startswith("/") else ("--cache", self.cache, *self.words)
        self.cordisk("create", self.overlay, "-b", url, "-F", "raw", *words)
        if words:
            words += ("--backing-url", prefix)
        self.cordisk("mount", self.overlay, self.disk, *words, *more)
        try:
            yield
        finally:
            self.cordisk("umount", self.disk)

    def stream(self, url):
        """Streams everything, and returns the bytes per second."""
        with self.mounted(url, "--stream-priority", "normal"):
            os.sync()  # What was written before is not to be written now.
            begun = time.perf_counter()
            self.cordisk("stream", "--wait", self.disk)
            seconds = time.perf_counter() - begun
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", self.overlay, self.base)
        return self.options.size * MIB / seconds

    def stream_of_qemu(self, path, size):
        """The same with QEMU's storage daemon, for the first `size` bytes."""
        control = self.work / "qmp.sock"
        for one in (control, self.overlay):
            one.unlink(missing_ok=True)
        run("qemu-img", "create", "-q", "-f", "qcow2", self.overlay, size)
        nbd = {"driver": "nbd", "node-name": "nbd", "server": {"type": "unix", "path": str(path)}, "export": ""}
        below = {"driver": "raw", "node-name": "below", "size": size, "file": nbd}
        over = {"driver": "qcow2", "node-name": "over", "file": {"driver": "file", "filename": str(self.overlay)}, "backing": below}
        with started("qemu-storage-daemon", "--chardev", "socket,id=c,path=%s,server=on,wait=off" % control, "--monitor", "chardev=c", "--blockdev", json.dumps(over)) as process:
            wait_for("qemu-storage-daemon", control.exists, process)
            session = qmp.Qmp(str(control))
            os.sync()
            begun = time.perf_counter()
            session.execute("block-stream", device="over", **{"job-id": "j"})
            while session.execute("query-block-jobs"):
                time.sleep(0.005)
            seconds = time.perf_counter() - begun
            session.socket.close()
        return size / seconds

    @contextlib.contextmanager
    def source(self, kind, latency, rate=None):
        """The URL of the base."""
        if kind == "nbd":
            with nbdkit(self.work, self.base, latency, rate) as path:
                yield "nbd+unix:///?socket=%s" % path
        elif kind == "http":
            with proxy(self.nginx, latency, rate) as port:
                yield "http://127.0.0.1:%d/base.raw" % port
        else:
            with proxy(self.s3[0], latency, rate) as port:
                keys = self.s3[1]
                config = self.work / "sources.toml"
                config.write_text('[[source]]\nprefix = "s3://golden/"\nendpoint = "http://127.0.0.1:%d"\nregion = "us-east-1"\nallow-http = true\n' % port)
                config.chmod(0o600)
                self.environment.update(AWS_ACCESS_KEY_ID=keys["ACCESS_KEY"], AWS_SECRET_ACCESS_KEY=keys["SECRET_KEY"])
                self.words = ("--sources", config)
                yield "s3://golden/base.raw"


def streams(bench):
    for latency, wanted, mib in STREAMS:
        figures, of_qemu = {kind: [] for kind in bench.options.sources}, []
        for _ in range(bench.options.rounds):
            for kind, found in figures.items():
                with bench.source(kind, latency) as url:
                    found.append(bench.stream(url) / MIB)
            with nbdkit(bench.work, bench.base, latency) as path:
                of_qemu.append(bench.stream_of_qemu(path, min(mib, bench.options.size) * MIB) / MIB)
        for kind, found in figures.items():
            bench.row("stream, %s, %d ms" % (kind, latency), "MiB/s", wanted, found, statistics.median(of_qemu))


def limited(bench):
    for latency, _, _ in STREAMS:
        for kind in bench.options.sources:
            figures = []
            for _ in range(bench.options.rounds):
                with bench.source(kind, latency, LINK) as url:
                    figures.append(bench.stream(url) / LINK)
            bench.row("limited link, %s, %d ms" % (kind, latency), "of it", 0.95, figures)


def touches(bench, depth, seconds=4):
    """Random reads of 4 KiB of a new disk: mean latency in ms and reads per second."""
    words = ("fio", "--name=touch", "--filename=%s" % bench.disk, "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=%d" % depth,
             "--runtime=%d" % seconds, "--time_based", "--randrepeat=0", "--output-format=json")
    told = run(*words)
    read = json.loads(told[told.index("{"):])["jobs"][0]["read"]
    return read["clat_ns"]["mean"] / 1e6, read["iops"]


def touch(bench):
    """Far more blocks than are read, so that nearly every read is a first touch."""
    latency, sparse = 20, bench.work / "sparse.raw"
    with open(sparse, "wb") as file:
        file.truncate(64 << 30)
    for kind in [kind for kind in bench.options.sources if kind != "s3"]:
        late, deep = [], []
        for _ in range(bench.options.rounds):
            for depth, found in ((1, late), (32, deep)):
                with nbdkit(bench.work, sparse, latency) if kind == "nbd" else contextlib.nullcontext() as path:
                    if kind == "nbd":
                        with bench.mounted("nbd+unix:///?socket=%s" % path):
                            found.append(touches(bench, depth))
                    else:
                        (bench.work / "nginx/root/sparse.raw").unlink(missing_ok=True)
                        os.link(sparse, bench.work / "nginx/root/sparse.raw")
                        with proxy(bench.nginx, latency) as port, bench.mounted("http://127.0.0.1:%d/sparse.raw" % port):
                            found.append(touches(bench, depth))
        bench.row("first touch, %s, depth 1" % kind, "trip/1", round(1 / 1.2, 3), [latency / mean for mean, _ in late])
        bench.row("first touch, %s, depth 32" % kind, "x d1", 20, [many / one for (_, many), (_, one) in zip(deep, late)])


def cached(bench):
    """Reads of the whole disk, all of it in the cache, beside the same with a local base."""
    url = "http://127.0.0.1:%d/base.raw" % bench.nginx
    shutil.rmtree(bench.cache, ignore_errors=True)
    bench.cordisk("cache", "fill", url, "--cache", bench.cache)
    ratios = []
    for _ in range(2 * bench.options.rounds + 1):
        seconds = []
        for one in (str(bench.base), url):
            with bench.mounted(one, fresh_cache=False):
                for path in [bench.base, *bench.cache.rglob("*.data")]:
                    run("dd", "if=%s" % path, "of=/dev/null", "bs=1M")
                begun = time.perf_counter()
                run("dd", "if=%s" % bench.disk, "of=/dev/null", "bs=1M", "iflag=direct")
                seconds.append(time.perf_counter() - begun)
        ratios.append(seconds[0] / seconds[1])
    bench.row("read of what the cache holds", "x local", 0.9, ratios)


def measure(options, work):
    bench = Bench(options, work)
    with contextlib.ExitStack() as stack:
        if "http" in options.sources or {"touch", "cached"} & set(options.only):
            bench.nginx = stack.enter_context(nginx(bench.work, bench.base))
        if "s3" in options.sources and {"stream", "limited"} & set(options.only):
            if shutil.which("radosgw"):
                bench.s3 = stack.enter_context(radosgw(bench.work, bench.base))
            else:
                options.sources.remove("s3")
                print("note: left out: s3 (radosgw is not installed)")
        for name in options.only:
            {"stream": streams, "limited": limited, "touch": touch, "cached": cached}[name](bench)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"size_mib": options.size, "rows": bench.rows}, indent=1) + "\n")
    print("written: %s" % options.json)


if __name__ == "__main__":
    sys.exit(benchmark(options_of(sys.argv[1:]), measure))
