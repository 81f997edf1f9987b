#!/usr/bin/env python3
"""Measures how soon a machine starts from a base on a server: cordisk with each order of its
stream, beside QEMU and nbdkit. Started by `scripts/bench.sh --only order`, which builds what is
measured and the guest (scripts/order_guest.sh).

The guest is booted once from a server that logs its requests. A start is the replay of that list by
fio, as fast as it goes, one request after the other: GRUB and most of a boot wait for each read
before they know the next one. The replay has none of the guest's computation, so the disk's part of
a boot is all of its time. The section `boot` boots the guest itself.

Base, servers and what is measured share the processors of the machine, so only ratios within one
run mean something. Rounds are interleaved.
"""

import argparse
import contextlib
import datetime
import json
import mmap
import os
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import time

import qmp
from bench_order_report import LATENCY, STARTS, bars_of, chart, table
from bench_servers import (LINK, MIB, REPO, RESULTS, Broken, benchmark, nbdkit, nginx, proxy, run,
                           started, wait_for)

SECTIONS = ("replay", "boot", "recording")
CLUSTER = 64 << 10
PROMPT = b"login:"
LONGEST_BOOT = 600  # seconds
TURN = 256  # reads of one program before the next one has its turn
LOGGED = re.compile(r"(\S+ \S+) connection=(\d+) (\.\.\.)?(Read|Write) id=(\d+)(?: offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+))?")

# What a start needs that a program may not have: the option of `mount`, the subcommand of `order`.
NEEDS = {"near": ("--order",), "files": ("--order",), "learned": ("--order", "save")}


def options_of(words):
    parser = argparse.ArgumentParser(
        prog="scripts/bench.sh --only order", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures how soon a machine starts from a base behind %d ms and a link of %d MB/s: the replay of a recorded\n"
        "boot, the boot itself, and what recording costs. QEMU and nbdkit are measured in the same run." % (LATENCY, LINK // 1_000_000),
        epilog="sections: %s\nstarts: %s" % (", ".join(SECTIONS), "; ".join("%s (%s)" % one for one in STARTS.items())))
    parser.add_argument("--only", metavar="SECTION[,..]", default=",".join(SECTIONS), help="these sections (default: all)")
    parser.add_argument("--starts", metavar="START[,..]", default=",".join(STARTS), help="these starts (default: all; a boot: those of cordisk but cor)")
    parser.add_argument("--sources", metavar="SOURCE[,..]", default="nbd,http", help="these sources (default: nbd,http)")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="rounds, interleaved (default 3)")
    parser.add_argument("--guest", metavar="DISK", type=pathlib.Path, default=REPO / "target/order-guest/disk.raw",
                        help="raw disk that boots to a login prompt on its serial line (default: target/order-guest/disk.raw)")
    parser.add_argument("--before", metavar="PROGRAM", help="an older program, beside which the cost of recording is measured")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, default=RESULTS / "order.json", help="default target/bench/order.json; the chart is beside it")
    parser.add_argument("--latencies", metavar="DIR", type=pathlib.Path, help="keep the time of each request of each replay there")
    parser.add_argument("--cordisk", metavar="PROGRAM", help="measure this one (default: built from here)")
    parser.add_argument("--parse-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    for name, known in (("only", SECTIONS), ("starts", STARTS), ("sources", ("nbd", "http"))):
        setattr(options, name, getattr(options, name).split(","))
        for one in getattr(options, name):
            if one not in known:
                parser.error('no "%s"; there are: %s' % (one, ", ".join(known)))
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    return options


# ---- the recorded boot ----


class Requests:
    """The list of a boot: (microseconds, "read" or "write", offset, length), in the order in which
    they came."""

    def __init__(self, entries):
        self.entries = entries

    def ranges(self, unit=1):
        """Ranges of the bytes read that were not written before, in units of `unit` bytes: without
        overlap, in order of their offset."""
        found = []
        written = []
        for _, kind, offset, length in self.entries:
            part = (offset // unit * unit, -(-(offset + length) // unit) * unit)
            if kind == "write":
                written.append((offset, offset + length))
            elif not any(start <= offset and offset + length <= end for start, end in written):
                found.append(part)
        found.sort()
        merged = []
        for start, end in found:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        return merged

    def bytes(self, unit=1):
        """The size of the boot set."""
        return sum(end - start for start, end in self.ranges(unit))

    def iolog(self, path, target, only=("read", "write")):
        """The list as fio reads it."""
        lines = ["fio version 2 iolog", "%s add" % target, "%s open" % target]
        lines += ["%s %s %d %d" % (target, kind, offset, length) for _, kind, offset, length in self.entries if kind in only]
        path.write_text("\n".join([*lines, "%s close" % target, ""]))


def requests_of_log(path):
    """The requests in a log of nbdkit's filter."""
    entries, first = [], None
    for line in path.read_text().splitlines():
        found = LOGGED.match(line)
        if not found or found[3] or not found[6]:
            continue
        at = datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S.%f")
        first = first or at
        entries.append(((at - first) // datetime.timedelta(microseconds=1), found[4].lower(), int(found[6], 16), int(found[7], 16)))
    return Requests(entries)


def boot(work, drive):
    """Boots a disk to its prompt, and returns the seconds. There is no acceleration by the
    processor: it is not everywhere, and where it is it differs. One processor, so that the guest
    leaves others to the servers."""
    serial = work / "serial"
    serial.unlink(missing_ok=True)
    words = ("qemu-system-x86_64", "-accel", "tcg", "-m", "1024", "-display", "none", "-no-reboot", "-nic", "none",
             "-serial", "file:%s" % serial, "-drive", "if=virtio,format=raw," + drive)
    begun = time.perf_counter()
    with started(*words) as process:
        while True:
            if serial.exists() and PROMPT in serial.read_bytes():
                return time.perf_counter() - begun
            if process.poll() is not None or time.perf_counter() - begun > LONGEST_BOOT:
                last = (serial.read_text(errors="replace").split("\n") if serial.exists() else [""])[-1]
                raise Broken("the guest shows no prompt; the last it said: %r" % last[-80:])
            time.sleep(0.01)


def recorded(disk, work):
    """The requests of a boot of this disk: those kept beside it, or those of a boot now."""
    kept, fact = disk.with_name(disk.name + ".requests"), os.stat(disk)
    head = "# a boot of a disk of %d bytes, changed at %d ns: microseconds, kind, offset, length" % (fact.st_size, fact.st_mtime_ns)
    if kept.exists():
        lines = kept.read_text().splitlines()
        if lines[:1] == [head]:
            return Requests([(int(at), kind, int(offset), int(length)) for at, kind, offset, length in (line.split() for line in lines[1:])])
    print("recording a boot of %s" % disk, flush=True)
    path, log = work / "log.sock", work / "boot.log"
    # The log lies above: it has what the guest asks for. The disk stays as it is.
    with started("nbdkit", "-f", "-U", path, "--filter=log", "--filter=cow", "file", disk, "logfile=%s" % log) as process:
        wait_for("nbdkit", path.exists, process)
        boot(work, "file=nbd+unix:///?socket=%s" % path)
    found = requests_of_log(log)
    if not found.entries:
        raise Broken("the log of nbdkit has no request")
    try:
        kept.write_text("\n".join([head, *("%d %s %d %d" % entry for entry in found.entries), ""]))
    except OSError as error:
        print("note: the list is not kept: %s" % error, file=sys.stderr)
    return found


# ---- starts ----


class Bench:
    def __init__(self, options, work):
        self.options, self.work, self.notes = options, pathlib.Path(work), []
        os.chmod(self.work, 0o755)  # nginx reads below it
        self.base = self.work / "base.raw"
        self.disk, self.cache, self.overlay = self.work / "disk", self.work / "cache", self.work / "o.qcow2"
        self.full = self.work / "full.qcow2"
        self.environment = {**os.environ, "CORDISK_RUNTIME_DIR": str(self.work / "run")}
        (self.work / "run").mkdir(mode=0o700)
        run("cp", "--sparse=always", "--reflink=auto", options.guest, self.base)
        self.requests = recorded(options.guest, self.work)
        self.values, self.nginx, self.orders = {}, None, {}

    def note(self, words):
        if words not in self.notes:
            self.notes.append(words)
            print("note: " + words, flush=True)

    def record(self, section, source, start, **figures):
        for name, value in figures.items():
            self.values.setdefault((section, source, start), {}).setdefault(name, []).append(value)
        print("%-9s %-5s %-31s %s" % (section, source, STARTS.get(start, start), "  ".join("%s %.4g" % one for one in figures.items())), flush=True)

    def cordisk(self, *words, program=None):
        return run(program or self.options.cordisk, *words, env=self.environment)

    def can(self, start):
        """Whether the program can start this way."""
        if start not in NEEDS:
            return True
        if not hasattr(self, "abilities"):
            self.abilities = set()
            if "--order" in self.cordisk("mount", "--help"):
                self.abilities.add("--order")
            with contextlib.suppress(Broken):
                self.abilities |= set(self.cordisk("order", "--help").split())
        missing = [one for one in NEEDS[start] if one not in self.abilities]
        if missing:
            self.note("left out: %s (this program has no %s)" % (STARTS[start], " and no ".join(missing)))
        return not missing

    @contextlib.contextmanager
    def source(self, kind):
        """The URL of the base, behind latency and link."""
        if kind == "nbd":
            with nbdkit(self.work, self.base, LATENCY, LINK) as path:
                yield "nbd+unix:///?socket=%s" % path
        else:
            with proxy(self.nginx, LATENCY, LINK) as port:
                yield "http://127.0.0.1:%d/base.raw" % port

    @contextlib.contextmanager
    def mounted(self, below, *more, image=None, program=None, at=""):
        """A new overlay above `below`, with an empty cache; or `image` as it is. Several at a time
        are told apart by `at`."""
        disk = self.work / ("disk" + at)
        shutil.rmtree(self.cache, ignore_errors=True)
        words = ()
        if "://" in str(below):
            words = ("--cache", self.cache)
        if image is None:
            image = self.work / ("o%s.qcow2" % at)
            image.unlink(missing_ok=True)
            self.cordisk("create", image, "-b", below, "-F", "raw", *words, program=program)
        if words:
            prefix = below if below.startswith("nbd") else below.rpartition("/")[0] + "/"
            words += ("--backing-url", prefix)
        os.sync()  # What was written before is not to be written now.
        self.cordisk("mount", image, disk, *words, *more, program=program)
        try:
            yield disk
        finally:
            self.cordisk("umount", disk, program=program)

    @contextlib.contextmanager
    def qemu(self, path):
        """QEMU's storage daemon: copy-on-read and block-stream above the NBD server."""
        control = self.work / "qmp.sock"
        for one in (control, self.overlay):
            one.unlink(missing_ok=True)
        size = os.path.getsize(self.base)
        run("qemu-img", "create", "-q", "-f", "qcow2", self.overlay, size)
        self.disk.touch()
        nbd = {"driver": "raw", "node-name": "below", "file": {"driver": "nbd", "server": {"type": "unix", "path": str(path)}, "export": ""}}
        over = {"driver": "qcow2", "node-name": "over", "file": {"driver": "file", "filename": str(self.overlay)}, "backing": nbd}
        words = ("qemu-storage-daemon", "--chardev", "socket,id=c,path=%s,server=on,wait=off" % control, "--monitor", "chardev=c",
                 "--blockdev", json.dumps(over), "--blockdev", json.dumps({"driver": "copy-on-read", "node-name": "cor", "file": "over"}),
                 "--export", "fuse,id=e,node-name=cor,mountpoint=%s,writable=off" % self.disk)
        with started(*words) as process:
            wait_for("qemu-storage-daemon", lambda: control.exists() and os.path.getsize(self.disk) == size, process)
            session = qmp.Qmp(str(control))
            session.execute("block-stream", device="over", **{"job-id": "j"})
            try:
                yield self.disk
            finally:
                session.socket.close()

    @contextlib.contextmanager
    def nbdkit(self, url):
        """nbdkit that keeps what was read and reads ahead, as a file through nbdfuse."""
        path, directory = self.work / "kit.sock", self.work / "kit"
        path.unlink(missing_ok=True)
        directory.mkdir(exist_ok=True)
        plugin = ("nbd", "socket=%s" % url.rpartition("=")[2]) if url.startswith("nbd") else ("curl", url)
        # Outermost first. `readahead` asks for a range to be cached, and `cow` keeps it then.
        with started("nbdkit", "-f", "-U", path, "--filter=readahead", "--filter=cow", *plugin, "cow-on-read=true", "cow-on-cache=true") as process:
            wait_for("nbdkit", path.exists, process)
            with started("nbdfuse", directory / "disk", "nbd+unix:///?socket=%s" % path) as fuse:
                wait_for("nbdfuse", (directory / "disk").exists, fuse)
                try:
                    yield directory / "disk"
                finally:
                    run("fusermount3", "-u", directory)

    def make_full(self):
        """The disk with everything local, and nothing of it in the page cache."""
        self.full.unlink(missing_ok=True)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.base, self.full)
        self.forget(self.full)

    def forget(self, path):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @contextlib.contextmanager
    def begun(self, start, url):
        """The file of a disk that has just been started."""
        if start == "plain":
            copy = self.work / "plain.raw"
            run("cp", "--sparse=always", self.base, copy)
            self.forget(copy)
            yield copy
            copy.unlink()
        elif start == "local":
            self.make_full()
            with self.mounted(None, image=self.full) as disk:
                yield disk
            self.full.unlink()
        elif start == "qemu":
            if not url.startswith("nbd"):
                raise Broken("QEMU is measured over NBD")
            with self.qemu(url.rpartition("=")[2]) as disk:
                yield disk
        elif start == "nbdkit":
            with self.nbdkit(url) as disk:
                yield disk
        else:
            with self.mounted(url, *self.words(start)) as disk:
                yield disk

    def words(self, start):
        """Options of `mount`."""
        if start == "cor":
            return ()
        words = ("--stream",)
        if start == "linear":
            # A program without orders has this one.
            return words + (("--order", "linear") if self.can("near") else ())
        return words + ("--order", {"near": "none", "files": "auto", "learned": self.orders.get("learned")}[start])

    def learn(self, url):
        """What the first machine of the image has recorded."""
        if "learned" not in self.orders:
            path = self.work / "learned.order"
            with self.mounted(url) as disk:
                self.replay(disk)
                with open(path, "wb") as file:
                    done = subprocess.run([self.options.cordisk, "order", "save", disk], stdout=file, stderr=subprocess.PIPE, env=self.environment, check=False)
                if done.returncode != 0:
                    raise Broken("order save: %s" % done.stderr.decode(errors="replace").strip())
            self.orders["learned"] = path

    def status(self):
        return json.loads(self.cordisk("status", "--json", self.disk))[0]

    def replay(self, disk, only=("read", "write"), keep=None):
        """Replays the boot, and returns the seconds."""
        iolog = self.work / "iolog"
        self.requests.iolog(iolog, disk, only)
        return self.fio(iolog, keep)

    def fio(self, iolog, keep=None):
        words = ("fio", "--name=boot", "--read_iolog=%s" % iolog, "--replay_no_stall=1", "--ioengine=psync", "--direct=1", "--allow_file_create=0",
                 "--output-format=json", "--eta=never")
        if keep:
            words += ("--write_lat_log=%s" % keep, "--log_offset=1")
        told = run(*words, cwd=self.work)
        return json.loads(told[told.index("{"):])["jobs"][0]["job_runtime"] / 1000

    def check(self, disk):
        """What was read without being written is what the base has."""
        chance = random.Random(1)
        written = [(offset, offset + length) for _, kind, offset, length in self.requests.entries if kind == "write"]
        reads = [(offset, length) for _, kind, offset, length in self.requests.entries
                 if kind == "read" and not any(start < offset + length and offset < end for start, end in written)]
        with open(disk, "rb") as shown, open(self.base, "rb") as source:
            for offset, length in chance.sample(reads, min(64, len(reads))):
                if os.pread(shown.fileno(), length, offset) != os.pread(source.fileno(), length, offset):
                    raise Broken("WRONG CONTENT: %d bytes at %d are not those of the base" % (length, offset))

    def figures(self, start):
        """What cordisk has counted."""
        if start in ("plain", "local", "qemu", "nbdkit"):
            return {}
        status = self.status()
        reading = sum(one["total-time-ns"] for one in status["requests"] if one["kind"] == "read")
        return {"fetched": sum(one["fetched-bytes"] for one in status["sources"]), "misses": status["misses"], "reading": reading / 1e9}


def turns(bench, starts):
    """Rounds, each beginning with another start."""
    for number in range(bench.options.rounds):
        for place in range(len(starts)):
            yield number, starts[(place + number) % len(starts)]


def starts_of(bench, chosen, kind):
    starts = [one for one in chosen if bench.can(one) and not (one == "qemu" and kind != "nbd")]
    if "nbdkit" in starts and not shutil.which("nbdfuse"):
        bench.note("left out: nbdkit (nbdfuse is not installed)")
        starts.remove("nbdkit")
    return starts


def replays(bench):
    for kind in bench.options.sources:
        for number, start in turns(bench, starts_of(bench, bench.options.starts, kind)):
            if start == "learned":
                with bench.source(kind) as url:
                    bench.learn(url)
            # A new server each time: its limited link has no credit of the last one.
            with bench.source(kind) as url, bench.begun(start, url) as disk:
                keep = bench.options.latencies and bench.options.latencies / ("%s-%s-%d" % (kind, start, number))
                # QEMU's export cannot be written to while its job runs.
                seconds = bench.replay(disk, ("read",) if start == "qemu" else ("read", "write"), keep)
                figures = bench.figures(start)
                bench.check(disk)
            bench.record("replay", kind, start, seconds=seconds, **figures)


def boots(bench):
    for kind in bench.options.sources:
        chosen = [one for one in bench.options.starts if one in ("local", "linear", "near", "files", "learned")]
        for _, start in turns(bench, starts_of(bench, chosen, kind)):
            if start == "learned":
                with bench.source(kind) as url:
                    bench.learn(url)
            with bench.source(kind) as url, bench.begun(start, url) as disk:
                seconds = boot(bench.work, "cache=none,file=%s" % disk)
                bench.record("boot", kind, start, seconds=seconds, **bench.figures(start))


def timed_reads(file, page, places):
    """Mean microseconds of a read. The slowest tenth is left out: mostly it has waited for a
    processor."""
    taken = []
    for place in places:
        begun = time.perf_counter_ns()
        os.preadv(file, page, place)
        taken.append(time.perf_counter_ns() - begun)
    taken.sort()
    return statistics.mean(taken[: len(taken) - len(taken) // 10]) / 1000


def recording(bench):
    """First touches, and hits, of new overlays above a local base: one read in each cluster, in
    random order.

    The differences are small against what else this machine does. So the programs take turns every
    few hundred reads, each turn is compared with its neighbours, and the older program runs twice:
    it shows what the comparison itself is worth.
    """
    if not bench.options.before:
        bench.note("left out: the cost of recording (give an older program with --before)")
        return
    places = list(range(0, os.path.getsize(bench.base) // CLUSTER * CLUSTER, CLUSTER))
    random.Random(1).shuffle(places)
    pieces = [places[at : at + TURN] for at in range(0, len(places), TURN)]
    run("dd", "if=%s" % bench.base, "of=/dev/null", "bs=1M")
    programs = {"before": bench.options.before, "now": bench.options.cordisk, "again": bench.options.before}
    page = [mmap.mmap(-1, 4096)]  # aligned, as O_DIRECT wants it
    for _ in range(bench.options.rounds):
        with contextlib.ExitStack() as stack:
            files = {}
            for name, program in programs.items():
                disk = stack.enter_context(bench.mounted(bench.base, program=program, at="-" + name))
                files[name] = os.open(disk, os.O_RDONLY | os.O_DIRECT)
                stack.callback(os.close, files[name])
            for figure in ("touch_us", "hit_us"):
                for number, piece in enumerate(pieces):
                    names = list(files)[number % 3 :] + list(files)[: number % 3]
                    for name in names:
                        taken = timed_reads(files[name], page, piece)
                        bench.values.setdefault(("recording", "local", name), {}).setdefault(figure, []).append(taken)
    for name in programs:
        figures = bench.values[("recording", "local", name)]
        print("recording local %-7s %s" % (name, "  ".join("%s %.4g" % (figure, statistics.median(values)) for figure, values in figures.items())), flush=True)


def measure(options, work):
    bench = Bench(options, work)
    reads = sum(kind == "read" for _, kind, _, _ in bench.requests.entries)
    facts = ["boot: %d reads, %d writes; boot set %.1f MiB (%.1f MiB in clusters of 64 KiB) of %.0f MiB allocated" % (
        reads, len(bench.requests.entries) - reads, bench.requests.bytes() / MIB, bench.requests.bytes(CLUSTER) / MIB, os.stat(options.guest).st_blocks * 512 / MIB),
        "boot set / link: %.2f s" % (bench.requests.bytes() / LINK)]
    print("\n".join(facts), flush=True)
    if options.latencies:
        options.latencies = options.latencies.resolve()
        options.latencies.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if "http" in options.sources:
            bench.nginx = stack.enter_context(nginx(bench.work, bench.base))
        for name in options.only:
            {"replay": replays, "boot": boots, "recording": recording}[name](bench)
    bars = bars_of(bench)
    print("\n" + table(bench, bars))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"section": section, "source": source, "start": start, "figures": figures} for (section, source, start), figures in bench.values.items()]
    found = {"facts": facts, "latency_ms": LATENCY, "link": LINK, "boot_set": bench.requests.bytes(), "rounds": options.rounds, "notes": bench.notes, "rows": rows, "bars": bars}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    picture = options.json.with_suffix(".svg")
    picture.write_text(chart(bench, facts))
    print("written: %s %s" % (options.json, picture))


if __name__ == "__main__":
    sys.exit(benchmark(options_of(sys.argv[1:]), measure))
