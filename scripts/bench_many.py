"""The workload `many` of scripts/bench.py: what idle disks of one host cost, each an overlay of its own above the same base.

Memory is the proportional set size (PSS): what several processes share counts once. A disk has read a MiB before it is idle.
"""

import pathlib
import time

from bench_targets import Broken, Setup
from bench_workloads import MIB, run

COUNTS = (1, 10, 100)
IDLE_SECONDS = 5
READ = 64 << 10

TITLE = "Idle disks on one host, for each disk"
FACTS = (("memory", "memory", "MiB"), ("threads", "threads", ""), ("wakes", "wake-ups per second", ""), ("ready", "from start to the first read", "ms"))


def proportional_mib(pid):
    lines = pathlib.Path("/proc/%d/smaps_rollup" % pid).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def threads(pid):
    return list(pathlib.Path("/proc/%d/task" % pid).iterdir())


def switches(pids):
    """For each thread, how often it was scheduled away so far, because it waited or because it had to."""
    found = {}
    for pid in pids:
        for thread in threads(pid):
            try:
                lines = (thread / "status").read_text().splitlines()
            except OSError:
                continue  # it has ended
            found[thread] = sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return found


def many(bench):
    for count in COUNTS:
        for key, label, unit in FACTS:
            bench.row("many-%s-%d" % (key, count), TITLE, "%s, %d disk%s" % (label, count, "s" if count > 1 else ""), unit, "low")
    overlays = [bench.path("many-%d.qcow2" % number) for number in range(max(COUNTS))]
    for target in bench.turns(bench.of(qcow2_only=True)):
        disks = []
        for number, overlay in enumerate(overlays):
            overlay.unlink(missing_ok=True)
            run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", bench.path("base.raw"), overlay)
            disks.append(target.put_up(Setup("", str(overlay), copy_on_read=True), name="disk-%d" % number))
            with open(disks[-1].path, "rb", buffering=0) as guest:
                for _ in range(MIB // READ):
                    if len(guest.read(READ)) != READ:
                        raise Broken("%s: a short read" % target.label)
            if len(disks) in COUNTS:
                record(bench, target, disks)
        bench.check(disks[-1])
        for disk in disks:
            disk.take_down()
    for overlay in overlays:
        overlay.unlink(missing_ok=True)


def record(bench, target, disks):
    count = len(disks)
    # What the last reads have left to do, such as a commit a second later, is over by then.
    time.sleep(IDLE_SECONDS)
    pids = [pid for disk in disks for pid in disk.processes()]
    before, begun = switches(pids), time.monotonic()
    time.sleep(IDLE_SECONDS)
    # Threads of a pool may end meanwhile, and others may begin.
    wakes = sum(now - before.get(thread, 0) for thread, now in switches(pids).items()) / (time.monotonic() - begun)
    found = {
        "memory": sum(proportional_mib(pid) for pid in pids),
        "threads": sum(len(threads(pid)) for pid in pids),
        "wakes": wakes,
        "ready": sum(disk.ready_seconds for disk in disks) * 1e3,
    }
    for key, value in found.items():
        bench.record("many-%s-%d" % (key, count), target, value / count)
