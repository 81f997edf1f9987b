"""The workloads of scripts/bench.py. Each section makes its images, then measures all targets in turns, round after round, and records values.

A section is a function of the bench; `SECTIONS` names them. Rates are better when high, times and sizes when low: a `Row` says which.
"""

import array
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import subprocess
import threading
import time

import qmp
from bench_targets import PAGE, Broken, Reader, Setup

MIB = 1 << 20
GIB = 1 << 30
CLUSTER = 64 << 10
BASES = ("raw", "qcow2", "zlib")
BASE_LABEL = {"raw": "raw base", "qcow2": "qcow2 base", "zlib": "zlib base"}
PERCENTILES = ((50, "p50"), (99, "p99"), (99.9, "p99.9"))
SAMPLES = 48  # ranges that are compared with the source
SAMPLE_LEN = 16 << 10
HANG_SECONDS = 10  # a server that answers a guest under a stream no sooner has got stuck


@dataclasses.dataclass
class Row:
    """One line of the table: one workload, a list of values for each target."""

    section: str
    label: str
    unit: str
    better: str  # "high" or "low"
    values: dict = dataclasses.field(default_factory=dict)


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise Broken("%s: %s" % (words[0], (done.stderr or done.stdout).strip().splitlines()[-1:] or done.returncode))
    return done.stdout


class Bench:
    """What all sections share: the scratch directory, the base images, the targets and what has been recorded."""

    def __init__(self, options, work, targets, notes):
        self.options, self.work, self.targets, self.notes = options, pathlib.Path(work), targets, notes
        self.size = options.size * MIB
        self.rows = {}
        self.checks = 0
        self.say = lambda text: None

    def note(self, words):
        if words not in self.notes:
            self.notes.append(words)

    # ---- images ----

    def make_bases(self):
        """The same content three times: raw, qcow2, zlib-compressed qcow2."""
        write_content(self.path("base.raw"), self.size)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.path("base.raw"), self.path("base.qcow2"))
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", self.path("base.raw"), self.path("base-zlib.qcow2"))
        # Two that are written to: every target writes in place, so that all see the same layout.
        run("cp", "--reflink=never", self.path("base.raw"), self.path("steady.raw"))
        run("cp", "--reflink=never", self.path("base.qcow2"), self.path("steady.qcow2"))
        # One for every target to be tried with before anything is measured.
        self.settle(*self.work.glob("base*"), *self.work.glob("steady*"))

    def path(self, name):
        return self.work / name

    def base(self, kind):
        return self.path({"raw": "base.raw", "qcow2": "base.qcow2", "zlib": "base-zlib.qcow2"}[kind])

    def overlay(self, kind, options=()):
        """A fresh, empty overlay above a base, made with these further words."""
        path = self.path("overlay.qcow2")
        path.unlink(missing_ok=True)
        base_format = "raw" if kind == "raw" else "qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", *options,
            "-F", base_format, "-b", self.base(kind), path)
        return path

    def settle(self, *paths):
        """Nothing of these is left to be written back while the next one is measured."""
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def set_cache(self, *paths):
        """The state of the page cache that the user has asked for, of these files."""
        for path in paths:
            with open(path, "rb") as file:
                if self.options.cold:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(4 * MIB):
                        pass

    # ---- targets ----

    def of(self, *, qcow2_only=False, streams=False, keys=None):
        chosen = [one for one in self.targets if (one.knows_qcow2 or not qcow2_only) and (one.streams or not streams)]
        return [one for one in chosen if keys is None or one.key in keys]

    def turns(self, targets):
        """Rounds, each beginning with another target: none is always the first, or always behind the same one."""
        for number in range(self.options.rounds):
            for place in range(len(targets)):
                target = targets[(place + number) % len(targets)]
                self.say("round %d of %d, %s" % (number + 1, self.options.rounds, target.label))
                yield target

    def record(self, key, target, value):
        self.rows[key].values.setdefault(target if isinstance(target, str) else target.key, []).append(value)

    def row(self, key, section, label, unit, better):
        self.rows.setdefault(key, Row(section, label, unit, better))

    # ---- content ----

    def samples(self, size):
        chance = random.Random(self.options.seed)
        inside = [chance.randrange(0, size - SAMPLE_LEN + 1, PAGE) for _ in range(SAMPLES)]
        return sorted({0, size - SAMPLE_LEN, *inside})

    def check(self, disk, size=None, source="base.raw", flip=False):
        """Sampled ranges of the disk are those of the source (or their complement). `source` None: zeros."""
        size = size or self.size
        with Reader(disk.path, direct=disk.process is not None) as shown:
            with open(self.path(source) if source else "/dev/zero", "rb") as file:
                for offset in self.samples(size):
                    wanted = os.pread(file.fileno(), SAMPLE_LEN, offset if source else 0)
                    got = shown.read(offset, SAMPLE_LEN)
                    if checksum(got) != checksum(inverted(wanted) if flip else wanted):
                        raise Broken("WRONG CONTENT: %s, %d bytes at %d are not those of the source" % (disk.target.label, SAMPLE_LEN, offset))
                    self.checks += 1

    def write_samples(self, disk, flip):
        with Reader(disk.path, write=True, direct=disk.process is not None) as shown, open(self.path("base.raw"), "rb") as file:
            for offset in self.samples(self.size):
                data = os.pread(file.fileno(), SAMPLE_LEN, offset)
                shown.write(offset, inverted(data) if flip else data)
            shown.sync()

    def try_out(self, target):
        """Before anything is timed: what it shows is right, what is written is read back, also after it has been down."""
        setup = self.steady_setup(target)
        disk = target.put_up(setup)
        self.check(disk)
        self.write_samples(disk, flip=True)
        self.check_flipped(disk)
        if not target.fills_by_reading:
            disk.take_down()
            disk = target.put_up(setup)
            self.check_flipped(disk)
            self.write_samples(disk, flip=False)
        disk.take_down()
        if target.knows_qcow2:
            disk = target.put_up(Setup(str(self.path("base.raw")), str(self.overlay("zlib")), copy_on_read=True))
            self.check(disk)
            self.check(disk)  # of what was copied up
            disk.take_down()

    def check_flipped(self, disk):
        # Sampled ranges overlap now and then: both halves were made from the same source, so each
        # is right as a whole.
        self.check(disk, flip=True)

    def steady_setup(self, target):
        # nbdkit's own overlay is temporary: its base stays as it is.
        raw = "base.raw" if target.fills_by_reading else "steady.raw"
        return Setup(str(self.path(raw)), str(self.path("steady.qcow2")))

    # ---- measuring ----

    def fio(self, disk, size, *words):
        """Runs one job. Returns (operations per second, bytes per second, bytes, CPU seconds of the server)."""
        # The plain file through the page cache: so do the servers read their images. O_DIRECT keeps
        # the mount's own cache out.
        direct = int(disk.process is not None)
        before = disk.cpu_seconds()
        text = run(
            "fio", "--name=job", "--filename=%s" % disk.path, "--direct=%d" % direct, "--size=%d" % size, "--output-format=json", "--eta=never",
            "--randrepeat=1", "--allow_file_create=0", "--invalidate=0", "--group_reporting", *words, cwd=self.work)
        cpu = disk.cpu_seconds() - before
        job = json.loads(text[text.index("{"):])["jobs"][0]
        side = max(job["read"], job["write"], key=lambda one: one["io_bytes"])
        if not side["io_bytes"]:
            raise Broken("fio moved nothing on %s" % disk.target.label)
        return side["iops"], side["bw_bytes"], side["io_bytes"], cpu

    def timed(self):
        # In milliseconds: fio takes a fraction of a second for none at all, and ends after one
        # pass.
        return "--time_based", "--runtime=%dms" % (self.options.seconds * 1000)


def write_content(path, size):
    """Bytes that compress to some half and hold no zeros and nothing twice: nothing on the way may profit from either."""
    chance = random.Random(1)
    words = b" ".join(chance.randbytes(chance.randrange(2, 12)).hex().encode() for _ in range(8000))
    with open(path, "wb") as file:
        for _ in range(0, size, MIB):
            noise = os.urandom(MIB)
            pieces = []
            for at in range(0, MIB, PAGE):
                begin = int.from_bytes(noise[at : at + 2], "little") % (len(words) - 3072)
                pieces += [noise[at : at + 1024], words[begin : begin + 3072]]
            file.write(b"".join(pieces))


def inverted(data):
    return data.translate(bytes(255 - value for value in range(256)))


def checksum(data):
    return hashlib.sha256(data).digest()


def percentile(sorted_values, part):
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * part / 100))]


# ---- everything allocated ----

STEADY = (  # key, label, unit, fio words, CPU time is shown too
    ("read4k-d1", "4 KiB random read, depth 1", "IOPS", ("--rw=randread", "--bs=4k", "--ioengine=psync"), False),
    ("read4k-d32", "4 KiB random read, depth 32", "IOPS", ("--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=32"), True),
    ("read4k-j4", "4 KiB random read, 4 jobs", "IOPS", ("--rw=randread", "--bs=4k", "--ioengine=psync", "--numjobs=4"), False),
    ("read1m", "1 MiB sequential read, depth 4", "MiB/s", ("--rw=read", "--bs=1M", "--ioengine=libaio", "--iodepth=4"), True),
    ("write4k-d1", "4 KiB random write, depth 1", "IOPS", ("--rw=randwrite", "--bs=4k", "--ioengine=psync"), False),
    ("write4k-d32", "4 KiB random write, depth 32", "IOPS", ("--rw=randwrite", "--bs=4k", "--ioengine=libaio", "--iodepth=32"), True),
    ("write4k-j4", "4 KiB random write, 4 jobs", "IOPS", ("--rw=randwrite", "--bs=4k", "--ioengine=psync", "--numjobs=4"), False),
    ("write1m", "1 MiB sequential write, depth 4", "MiB/s", ("--rw=write", "--bs=1M", "--ioengine=libaio", "--iodepth=4"), True),
)


def steady(bench):
    title, cost = "Everything allocated", "CPU seconds of the server per GiB moved"
    for key, label, unit, _, shown in STEADY:
        bench.row(key, title, label, unit, "high")
    for key, label, _, _, shown in STEADY:
        if shown:
            bench.row("cpu-" + key, cost, label, "s/GiB", "low")
    for target in bench.turns(bench.of()):
        setup = bench.steady_setup(target)
        image = setup.qcow2 if target.knows_qcow2 else setup.raw
        bench.set_cache(image)
        disk = target.put_up(setup)
        if target.fills_by_reading:
            bench.fio(disk, bench.size, "--rw=read", "--bs=1M", "--ioengine=psync")
        for key, _, unit, words, shown in STEADY:
            if bench.options.cold:
                bench.set_cache(image)
            iops, rate, moved, cpu = bench.fio(disk, bench.size, *words, *bench.timed())
            bench.record(key, target, iops if unit == "IOPS" else rate / MIB)
            if shown and disk.process is not None:
                bench.record("cpu-" + key, target, cpu / (moved / GIB))
        disk.take_down()
        bench.settle(image)


# ---- first touch ----

def touch(bench):
    title = "First touch (copy-on-read, fresh overlay)"
    misses = misses_of(bench)
    ways = (
        ("seq", "1 MiB sequential", "MiB/s", ("--rw=read", "--bs=1M", "--ioengine=psync")),
        ("rand", "4 KiB random, depth 1", "IOPS", (*misses, "--ioengine=psync")),
        ("rand-d32", "4 KiB random, depth 32", "IOPS", (*misses, "--ioengine=libaio", "--iodepth=32")),
    )
    for kind in BASES:
        for way, label, unit, words in ways:
            key = "touch-%s-%s" % (kind, way)
            bench.row(key, title, "%s, %s" % (label, BASE_LABEL[kind]), unit, "high")
            targets = bench.of(qcow2_only=kind != "raw", keys=None)
            for target in bench.turns([one for one in targets if one.key not in ("plain", "ceiling-dev", "ceiling-uring")]):
                overlay = bench.overlay(kind)
                bench.set_cache(bench.base(kind))
                disk = target.put_up(Setup(str(bench.path("base.raw")), str(overlay), copy_on_read=True))
                iops, rate, _, _ = bench.fio(disk, bench.size, *words)
                bench.record(key, target, iops if unit == "IOPS" else rate / MIB)
                bench.check(disk)
                disk.take_down()
                bench.settle(overlay)


def misses_of(bench):
    """With blockalign each read goes to another cluster: every one is a miss, and none is a hit."""
    io_size = bench.size // CLUSTER * PAGE
    return "--rw=randread", "--bs=4k", "--blockalign=64k", "--io_size=%d" % io_size


def subclusters(bench):
    """First reads and first writes of 4 KiB without and with subclusters, of 2 KiB and of 4 KiB."""
    title = "First touch of 4 KiB at random, depth 1, raw base"
    kinds = (
        ("", "clusters of 64 KiB", ()),
        ("-sub2k", "64 KiB, subclusters", ("-o", "extended_l2=on")),
        ("-sub4k", "128 KiB, subclusters", ("-o", "extended_l2=on,cluster_size=128k")),
        ("-4k", "clusters of 4 KiB", ("-o", "cluster_size=4k")),
    )
    misses = misses_of(bench)
    writes = [word.replace("randread", "randwrite") for word in misses]
    for way, words in (("read", misses), ("write", writes)):
        for kind, label, options in kinds:
            key = "first%s%s" % (way, kind)
            bench.row(key, title, "%s, %s" % (way, label), "IOPS", "high")
            bench.row(key + "-space", title, "  space that it takes", "MiB", "low")
            for target in bench.turns(bench.of(qcow2_only=True)):
                overlay = bench.overlay("raw", options)
                bench.set_cache(bench.base("raw"))
                base = str(bench.path("base.raw"))
                disk = target.put_up(Setup(base, str(overlay), copy_on_read=True))
                iops, _, _, _ = bench.fio(disk, bench.size, *words, "--ioengine=psync")
                bench.record(key, target, iops)
                if way == "read":
                    bench.check(disk)
                disk.take_down()
                bench.settle(overlay)
                bench.record(key + "-space", target, os.stat(overlay).st_blocks * 512 / MIB)


# ---- stream ----

def start_stream(bench, kind, target):
    """A fresh overlay that is up, and a connection to its control socket."""
    overlay = bench.overlay(kind)
    bench.set_cache(bench.base(kind))
    control = bench.path("qmp.sock")
    control.unlink(missing_ok=True)
    disk = target.put_up(Setup(str(bench.path("base.raw")), str(overlay), copy_on_read=True, stream=str(control)))
    return disk, overlay, qmp.Qmp(str(control))


def finish_stream(session):
    """Waits for the end of the job."""
    while (event := qmp.ended(session.events)) is None:
        session.events.append(session.receive())
    if event["event"] != "BLOCK_JOB_COMPLETED" or "error" in event["data"]:
        raise Broken("the stream failed: %s" % event["data"].get("error", event["event"]))


def one_stream_transport(bench):
    """Streaming has nothing to do with the transport: one column of cordisk."""
    targets = bench.of(streams=True)
    first = [one for one in targets if one.key.startswith("cordisk")][:1]
    return [one for one in targets if not one.key.startswith("cordisk")] + first


def stream(bench):
    title = "Stream the whole image"
    for kind in BASES:
        bench.row("stream-" + kind, title, BASE_LABEL[kind], "s", "low")
        bench.row("stream-%s-synced" % kind, title, BASE_LABEL[kind] + ", and fsync of the overlay", "s", "low")
    for kind in BASES:
        key = "stream-" + kind
        for target in bench.turns(one_stream_transport(bench)):
            disk, overlay, session = start_stream(bench, kind, target)
            begun = time.perf_counter()
            session.execute("block-stream", **{"device": target.device(), "job-id": "bench"})
            finish_stream(session)
            bench.record(key, target, time.perf_counter() - begun)
            # The job of cordisk ends when everything is durable, that of QEMU before.
            bench.settle(overlay)
            bench.record(key + "-synced", target, time.perf_counter() - begun)
            bench.check(disk)
            session.socket.close()
            disk.take_down()
            if json.loads(run("qemu-img", "info", "--output=json", overlay)).get("backing-filename"):
                raise Broken("%s has streamed, and the backing file is still there" % target.label)
            bench.settle(overlay)
        for _ in range(bench.options.rounds):
            copiers = (("cp", ("cp", "--reflink=never", "--sparse=never")),
                       ("convert", ("qemu-img", "convert", "-f", "raw" if kind == "raw" else "qcow2", "-O", "qcow2")))
            for name, words in copiers:
                copy = bench.path("copy")
                copy.unlink(missing_ok=True)
                bench.set_cache(bench.base(kind))
                begun = time.perf_counter()
                run(*words, bench.base(kind), copy)
                bench.record(key, name, time.perf_counter() - begun)
                bench.settle(copy)
                bench.record(key + "-synced", name, time.perf_counter() - begun)
                copy.unlink()


def during(bench):
    """Latencies that a guest sees while a stream runs as fast as it can. Streams are repeated until there are enough."""
    title = "Guest latency while a stream runs (raw base)"
    kinds = (("read", "4 KiB random read"), ("fsync", "fsync"))
    for kind, label in kinds:
        for _, name in PERCENTILES:
            bench.row("during-%s-%s" % (kind, name), title, "%s, %s" % (label, name), "us", "low")
    for kind, label in kinds:
        bench.row("idle-%s-p99.9" % kind, title, "%s, p99.9, after the stream" % label, "us", "low")
        # An export of QEMU may hang at the end of its stream.
        own = [target for target in one_stream_transport(bench) if target.key.startswith("cordisk")]
        for target in bench.turns(own):
            record_percentiles(bench, "idle-" + kind, target, latencies_after(bench, kind, target))
    enough = 200 if bench.options.quick else 1000
    for kind, _ in kinds:
        for target in bench.turns(one_stream_transport(bench)):
            latencies = []
            for _ in range(3 if bench.options.quick else 10):
                disk, overlay, session = start_stream(bench, "raw", target)
                try:
                    found, hung = latencies_during(bench, disk, session, kind, target)
                finally:
                    session.socket.close()
                latencies += found
                if hung:
                    disk.destroy()
                    break
                disk.take_down()
                bench.settle(overlay)
                if len(latencies) >= enough:
                    break
            record_percentiles(bench, "during-" + kind, target, latencies)


def latencies_after(bench, kind, target):
    """The same requests as beside a stream, after its end: nothing is copied any more."""
    disk, overlay, session = start_stream(bench, "raw", target)
    session.execute("block-stream", **{"device": target.device(), "job-id": "bench"})
    finish_stream(session)
    session.socket.close()
    chance, found = random.Random(bench.options.seed), []
    with Reader(disk.path) as reader:
        for _ in range(2000 if bench.options.quick else 20000):
            measure_one(bench, reader, kind, chance, found)
    disk.take_down()
    bench.settle(overlay)
    return found


def latencies_during(bench, disk, session, kind, target):
    over, failed = threading.Event(), []

    def wait():
        try:
            finish_stream(session)
        except (Broken, SystemExit, OSError, ValueError) as error:
            failed.append(error)
        over.set()

    chance, found = random.Random(bench.options.seed), []
    with Reader(disk.path) as reader:
        session.execute("block-stream", **{"device": target.device(), "job-id": "bench"})
        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        threading.Thread(target=kill_if_stuck, args=(disk, found, over), daemon=True).start()
        try:
            measure_until(bench, over, reader, kind, chance, found)
        except OSError as error:
            over.wait(HANG_SECONDS)
            if target.key.startswith("cordisk"):
                raise Broken("%s: a %s under its stream: %s" % (target.label, kind, error.strerror)) from None
            # What was answered before counts: QEMU 10.0 at times answers nothing more at the end of
            # a stream.
            bench.note("%s hung in a %s under its stream; what it had answered before counts"
                       % (target.label, kind))
            return found, True
    waiter.join()
    if failed:
        raise Broken(str(failed[0]))
    return found, False


def measure_until(bench, over, reader, kind, chance, found):
    while not over.is_set():
        measure_one(bench, reader, kind, chance, found)


def measure_one(bench, reader, kind, chance, found):
    offset = chance.randrange(0, bench.size, PAGE)
    begun = time.perf_counter()
    if kind == "read":
        reader.read_quietly(offset)
    else:
        reader.sync()
    found.append(time.perf_counter() - begun)


def kill_if_stuck(disk, found, over):
    """A server that hangs takes the reader with it, past every signal. Killing it gives the reader an error."""
    known, since = -1, time.monotonic()
    while not over.wait(0.5):
        if len(found) != known:
            known, since = len(found), time.monotonic()
        elif time.monotonic() - since > HANG_SECONDS:
            disk.kill()
            return


def record_percentiles(bench, key, target, seconds):
    seconds = sorted(seconds)
    for part, name in PERCENTILES:
        row = "%s-%s" % (key, name)
        if seconds and row in bench.rows:
            bench.record(row, target, percentile(seconds, part) * 1e6)


# ---- fsync ----

def fsync(bench):
    title = "fsync after a 4 KiB write"
    ways = (("fsync-inplace", "nothing allocated"), ("fsync-alloc", "each write has allocated a cluster"))
    for key, label in ways:
        for _, name in PERCENTILES[:2]:
            bench.row("%s-%s" % (key, name), title, "%s, %s" % (label, name), "us", "low")
    count = min(100 if bench.options.quick else 500, bench.size // CLUSTER)
    for key, _ in ways:
        allocating = key == "fsync-alloc"
        # nbdkit's cow answers fsync without doing anything, its overlay being temporary.
        for target in bench.turns([one for one in bench.of(qcow2_only=allocating) if one.flushes]):
            if allocating:
                setup = Setup(str(bench.path("base.raw")), str(bench.overlay("raw")))
                bench.set_cache(bench.base("raw"))
            else:
                setup = bench.steady_setup(target)
            disk = target.put_up(setup)
            clusters = random.Random(bench.options.seed).sample(range(bench.size // CLUSTER), count)
            latencies = []
            with Reader(disk.path, write=True, direct=disk.process is not None) as guest:
                for cluster in clusters:
                    guest.write(cluster * CLUSTER, b"x" * PAGE)
                    begun = time.perf_counter()
                    guest.sync()
                    latencies.append(time.perf_counter() - begun)
            record_percentiles(bench, key, target, latencies)
            disk.take_down()


# ---- large images ----

def metadata_only(path, allocated_gib, size_gib):
    """All clusters of the first part are allocated, and none is written: the file is sparse, the disk reads zeros."""
    pathlib.Path(path).unlink(missing_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "%dG" % allocated_gib)
    if size_gib > allocated_gib:
        run("qemu-img", "resize", "-q", path, "%dG" % size_gib)


def big(bench):
    title = "1 TiB image, 100 GiB of it allocated"
    bench.row("big-ready", title, "from start to the first read", "ms", "low")
    bench.row("big-rss-ready", title, "resident memory then", "MiB", "low")
    bench.row("big-rss", title, "resident memory after reads all over", "MiB", "low")
    image = bench.path("big.qcow2")
    metadata_only(image, 100, 1024)
    for target in bench.turns(bench.of(qcow2_only=True)):
        disk = target.put_up(Setup("", str(image)))
        bench.record("big-ready", target, disk.ready_seconds * 1e3)
        bench.record("big-rss-ready", target, disk.resident_mib())
        bench.check(disk, size=100 * GIB, source=None)
        # One in the range of every L2 table (512 MiB), then many.
        with Reader(disk.path) as guest:
            for offset in range(0, 100 * GIB, 512 * MIB):
                guest.read_quietly(offset)
        bench.fio(disk, 100 * GIB, "--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=32", "--norandommap", *bench.timed())
        bench.record("big-rss", target, disk.resident_mib())
        disk.take_down()
    image.unlink()


def growth(bench):
    title = "As the image grows (metadata only: data reads as zeros)"
    sizes = (1, 10, 100, 1000)
    ways = (("d1", "depth 1", ("--ioengine=psync",)), ("d32", "depth 32", ("--ioengine=libaio", "--iodepth=32")))
    for way, label, _ in ways:
        for gib in sizes:
            bench.row("growth-%s-%d" % (way, gib), title, "4 KiB random read, %s, %d GiB allocated" % (label, gib), "IOPS", "high")
    for gib in sizes:
        image = bench.path("growth.qcow2")
        metadata_only(image, gib, gib)
        for target in bench.turns(bench.of(qcow2_only=True)):
            disk = target.put_up(Setup("", str(image)))
            bench.check(disk, size=gib * GIB, source=None)
            for way, _, words in ways:
                iops, _, _, _ = bench.fio(disk, gib * GIB, "--rw=randread", "--bs=4k", "--norandommap", *words, *bench.timed())
                bench.record("growth-%s-%d" % (way, gib), target, iops)
            disk.take_down()
        image.unlink()


def shuffle_clusters(path, part, seed):
    """Swaps host clusters of that part (0 to 1) of the allocated guest clusters: the same references, in another order."""
    with open(path, "r+b") as file:
        header = file.read(104)
        table_offset, entries = int.from_bytes(header[40:48], "big"), int.from_bytes(header[36:40], "big")
        cluster = 1 << int.from_bytes(header[20:24], "big")
        file.seek(table_offset)
        l1 = array.array("Q", file.read(entries * 8))
        l1.byteswap()
        tables = [entry & 0x00FFFFFFFFFFFE00 for entry in l1 if entry]
        mapped = array.array("Q")
        for at in tables:
            file.seek(at)
            mapped.frombytes(file.read(cluster))
        chance = random.Random(seed)
        places = [place for place, entry in enumerate(mapped) if entry and chance.random() < part]
        moved = [mapped[place] for place in places]
        chance.shuffle(moved)
        for place, entry in zip(places, moved):
            mapped[place] = entry
        per_table = cluster // 8
        for index, at in enumerate(tables):
            file.seek(at)
            file.write(mapped[index * per_table : (index + 1) * per_table].tobytes())


def fragments(bench):
    title = "As the image is fragmented (metadata only: data reads as zeros)"
    ways = (("read1m", "1 MiB sequential read, depth 4", "MiB/s", ("--rw=read", "--bs=1M", "--ioengine=libaio", "--iodepth=4")),
            ("read4k", "4 KiB random read, depth 32", "IOPS", ("--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=32")))
    # More tables than memory holds, each with clusters all over the file.
    sizes = ((1, (0, 10, 100)), (1000, (100,)))
    for way, label, unit, _ in ways:
        for gib, parts in sizes:
            for part in parts:
                bench.row("fragments-%s-%d-%d" % (way, gib, part), title, "%s, %d GiB, %d %% moved" % (label, gib, part), unit, "high")
    for gib, part in ((gib, part) for gib, parts in sizes for part in parts):
        image = bench.path("fragments.qcow2")
        metadata_only(image, gib, gib)
        shuffle_clusters(image, part / 100, bench.options.seed)
        if gib == 1:  # With 16 million clusters all over the file it takes minutes.
            run("qemu-img", "check", "-q", image)
        for target in bench.turns(bench.of(qcow2_only=True)):
            disk = target.put_up(Setup("", str(image)))
            bench.check(disk, size=gib * GIB, source=None)
            for way, _, unit, words in ways:
                iops, rate, _, _ = bench.fio(disk, gib * GIB, *words, *bench.timed())
                bench.record("fragments-%s-%d-%d" % (way, gib, part), target, iops if unit == "IOPS" else rate / MIB)
            disk.take_down()
        image.unlink()


SECTIONS = {
    "steady": (steady, "random and sequential reads and writes, everything allocated; CPU time per GiB"),
    "subclusters": (subclusters, "first reads and writes of 4 KiB with and without subclusters"),
    "touch": (touch, "copy-on-read first touch, from raw, qcow2 and zlib-compressed qcow2"),
    "stream": (stream, "the whole image brought up, beside cp and qemu-img convert"),
    "during": (during, "read and fsync latency while an unlimited stream runs"),
    "fsync": (fsync, "fsync latency with and without an allocation to make durable"),
    "big": (big, "start and memory with a 1 TiB image"),
    "growth": (growth, "reads as the image grows from 1 to 1000 GiB"),
    "fragments": (fragments, "reads as the image is fragmented"),
}
