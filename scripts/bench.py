#!/usr/bin/env python3
"""Measures cordisk beside its peers and beside the ceiling of its transport. Started by scripts/bench.sh, which builds what is measured.

Prints a table; writes JSON and a chart. Needs nothing but Python 3, and the tools that it measures.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import bench_report
from bench_many import many
from bench_reflink import reflink
from bench_targets import LIVE, Broken, all_targets
from bench_workloads import MIB, SECTIONS, Bench

SECTIONS["many"] = (many, "what 1, 10 and 100 idle disks cost: memory, threads, wake-ups")
SECTIONS["reflink"] = (reflink, "the whole image brought up where overlay and base share blocks, on an XFS in a file (root only)")

REPO = pathlib.Path(__file__).resolve().parent.parent
RESULTS = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or REPO / "target") / "bench"
NAMES = ("plain", "ceiling-dev", "ceiling-uring", "nbdkit", "qemu-threads", "qemu-uring", "cordisk-dev", "cordisk-uring")


def options_of(words):
    parser = argparse.ArgumentParser(
        prog="scripts/bench.sh", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures cordisk beside its peers: a plain file, a pass-through of it over FUSE (the ceiling),\n"
        "nbdkit's cow filter, and QEMU's storage daemon (the better of its two ways). All in turns, round after\n"
        "round; prints medians, and which bars are met. Figures drift from hour to hour: only ratios within one\n"
        "run mean something. What is shown is checked against the source first: a wrong answer is never a fast one.",
        epilog="workloads:\n" + "\n".join("  %-11s %s" % (name, about) for name, (_, about) in SECTIONS.items())
        + "\n\ntargets: " + ", ".join(NAMES)
        + "\n\nTMPDIR decides where the images lie (some 6 times --size). On tmpfs (TMPDIR=/dev/shm) the noise of the disk is gone.")
    parser.add_argument("--only", metavar="WORKLOAD[,..]", type=names(SECTIONS), default=list(SECTIONS), help="these workloads (default: all)")
    parser.add_argument("--targets", metavar="TARGET[,..]", type=names(NAMES), default=list(NAMES), help="these targets (default: all that are there)")
    parser.add_argument("--size", metavar="MIB", type=at_least(64), help="size of the disk (default 1024)")
    parser.add_argument("--rounds", metavar="N", type=at_least(1), help="rounds, interleaved (default 5)")
    parser.add_argument("--seconds", metavar="S", type=positive, help="runtime of one timed measurement (default 2)")
    parser.add_argument("--quick", action="store_true", help="small and short: 128 MiB, 2 rounds, 0.4 s; to see that it works")
    parser.add_argument("--cold", action="store_true", help="image files out of the page cache before each measurement (default: read once)")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="of offsets and samples (default 1)")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, default=RESULTS / "bench.json", help="default target/bench/bench.json")
    parser.add_argument("--svg", metavar="FILE", type=pathlib.Path, default=RESULTS / "bench.svg", help="default target/bench/bench.svg")
    parser.add_argument("--cordisk", metavar="PROGRAM", type=program, help="measure this one (default: built from here)")
    parser.add_argument("--passthrough", type=program, help=argparse.SUPPRESS)
    parser.add_argument("--parse-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    for name, usual, quick in (("size", 1024, 128), ("rounds", 5, 2), ("seconds", 2, 0.4)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    return options


def names(known):
    """Some of these, separated by commas; `qemu` means both of QEMU's."""

    def matching(word):
        return [one for one in known if one == word or one.startswith(word + "-")]

    def parse(words):
        chosen = words.split(",")
        for one in chosen:
            if not matching(one):
                raise argparse.ArgumentTypeError('no "%s"; there are: %s' % (one, ", ".join(known)))
        return [one for one in known if any(one in matching(word) for word in chosen)]

    return parse


def at_least(limit):
    def parse(word):
        if not word.isdigit() or int(word) < limit:
            raise argparse.ArgumentTypeError('"%s" is not a whole number of at least %d' % (word, limit))
        return int(word)

    return parse


def positive(word):
    try:
        value = float(word)
    except ValueError:
        value = 0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError('"%s" is not a number of seconds' % word)
    return value


def program(word):
    found = shutil.which(word)
    if not found:
        raise argparse.ArgumentTypeError('"%s" is not a program' % word)
    return os.path.abspath(found)


def style():
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return {"bold": "\033[1m", "dim": "\033[2m", "red": "\033[31m", "green": "\033[32m", "plain": "\033[0m"}
    return dict.fromkeys(("bold", "dim", "red", "green", "plain"), "")


def first_line(*words):
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def facts_of(options, work):
    """What a figure means nothing without."""
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    memory = int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemTotal"))) / (1 << 20)
    file_system = first_line("stat", "-fc", "%T", work)
    cache = "cold" if options.cold else "warm"
    if options.cold and file_system == "tmpfs":
        cache = "warm (tmpfs has nothing colder)"
    return {
        "what": "disk of %d MiB, %d rounds of %s s, on %s, page cache %s" % (options.size, options.rounds, options.seconds, file_system, cache),
        "machine": "%d x %s, %.0f GiB, Linux %s, %s" % (os.cpu_count(), cpu, memory, platform.release(), datetime.date.today()),
        "size_mib": options.size, "rounds": options.rounds, "seconds": options.seconds, "seed": options.seed, "cache": cache,
        "file_system": file_system, "load_before": os.getloadavg()[0], "commit": first_line("git", "-C", REPO, "describe", "--always", "--dirty"),
        "versions": {tool: first_line(tool, "--version") for tool in ("fio", "qemu-storage-daemon", "nbdkit", "nbdfuse", options.cordisk)},
    }


def progress(what):
    """One line that is written over; of a log only its beginning."""
    live = sys.stderr.isatty()

    def say(words):
        if live:
            sys.stderr.write("\r\033[K%s: %s" % (what, words))
            sys.stderr.flush()

    if not live:
        print("measuring: %s" % what, file=sys.stderr, flush=True)
    return say


def choose(bench, targets, wanted, notes):
    """Those that were asked for, are installed, start, and show what they should; of the others a note says why not."""
    for target in targets:
        if target.key not in wanted:
            continue
        missing = [tool for tool in target.needs if not shutil.which(tool)]
        if missing:
            notes.append("left out: %s (%s is not installed)" % (target.label, missing[0]))
            continue
        bench.say(target.label)
        try:
            bench.try_out(target)
        except Broken as error:
            if str(error).startswith("WRONG") or target.key == "cordisk-dev":
                raise
            notes.append("left out: %s" % error)
            continue
        bench.targets.append(target)
    if not bench.targets:
        raise Broken("nothing is left to be measured")


def measure(options, work, notes):
    targets, more = all_targets(work, options.cordisk, options.passthrough)
    notes += more
    bench = Bench(options, work, [], notes)
    bench.say = progress("making images")
    bench.say("%d MiB" % options.size)
    bench.make_bases()
    bench.say = progress("is the content right")
    choose(bench, targets, options.targets, notes)
    for name in options.only:
        bench.say = progress(name)
        SECTIONS[name][0](bench)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return bench


def report(bench, options, facts, notes):
    lines = bench_report.lines_of(bench.rows)
    bars = bench_report.bars_of(lines)
    colours = style()
    print("%s\n%s" % (facts["what"], facts["machine"]))
    print("content checked: %d sampled ranges, all as the source has them" % bench.checks)
    print("QEMU: the better of aio=threads (t) and aio=io_uring (u). x QEMU, x ceiling: how many times as good cordisk is, dev / uring.")
    print(bench_report.table(lines, colours))
    print(bench_report.bars_table(bars, colours))
    for note in notes:
        print("note: " + note)
    for path, content in ((options.json, json.dumps(bench_report.as_json(lines, bars, facts, notes), indent=1) + "\n"), (options.svg, bench_report.svg(lines, facts))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print("written: %s" % path)


def end(number, _frame):
    raise SystemExit(128 + number)


def end_although_it_hangs():
    """A read of a server that hangs keeps the handler of a signal waiting. This thread hears the signal all the same, and kills the server."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)

    def wait():
        while os.read(heard, 1)[0] not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            pass
        time.sleep(2)
        for disk in list(LIVE):
            if disk.process is not None:
                disk.kill()

    threading.Thread(target=wait, daemon=True).start()


def main(words):
    options = options_of(words)
    if options.parse_only:
        return 0
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    end_although_it_hangs()
    notes = []
    if os.getloadavg()[0] > 1:
        notes.append("the machine was busy (load %.1f): figures are lower and wider than they would be" % os.getloadavg()[0])
    work = os.path.realpath(tempfile.mkdtemp(prefix="cordisk-bench."))
    try:
        facts = facts_of(options, work)
        free = shutil.disk_usage(work).free
        if free < 7 * options.size * MIB:
            raise Broken("%s: %d MiB are free, some %d are needed; set TMPDIR or a smaller --size" % (work, free // MIB, 7 * options.size))
        bench = measure(options, work, notes)
        report(bench, options, facts, notes)
        return 0
    except (Broken, OSError) as error:
        print("bench.sh: %s" % error, file=sys.stderr)
        return 1
    finally:
        # Cleaning up takes a moment and is not to be cut short.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for disk in list(LIVE):
            disk.destroy()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
