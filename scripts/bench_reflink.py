"""The workload `reflink` of scripts/bench.py: a stream where overlay and raw base lie on one file system that shares blocks, an XFS in a file.

The file system is in `LIVE` while it is mounted, before the disks upon it: the end of the program, whichever way it comes, unmounts it.
"""

import json
import os
import pathlib
import shutil
import time

import qmp
from bench_targets import LIVE, Broken, Setup, is_mounted, unmount
from bench_workloads import GIB, MIB, finish_stream, one_stream_transport, run

KEY = "stream-reflink"
NEEDS = ("mkfs.xfs", "mount", "losetup")


class LoopXfs:
    """An XFS in a sparse file, mounted. Looks like a disk to those who take down what is up."""

    process = None

    def __init__(self, work, size):
        self.image, self.path = work / "xfs.img", work / "xfs"
        with open(self.image, "wb") as file:
            file.truncate(size)
        run("mkfs.xfs", "-q", "-m", "reflink=1", self.image)
        self.path.mkdir()
        # First: a signal may come between mount(8) and the next line. Disks that are up later stand
        # behind it.
        LIVE.append(self)
        run("mount", "-o", "loop", self.image, self.path)

    def destroy(self):
        """Lazily where a disk that hangs still uses it: mount and loop device go with the last user."""
        if is_mounted(self.path) and not unmount(self.path):
            unmount(self.path, lazily=True)
        self.image.unlink(missing_ok=True)
        if self in LIVE:
            LIVE.remove(self)


def missing(bench):
    """Why this cannot be measured here; empty if it can."""
    if os.geteuid() != 0:
        return "mounting a file system of its own takes root"
    for tool in NEEDS:
        if not shutil.which(tool):
            return "%s is not installed" % tool
    # The base, the copy that QEMU makes, and the log.
    free, needed = shutil.disk_usage(bench.work).free, 2 * bench.size + GIB // 2
    return "%d MiB are free, some %d are needed" % (free // MIB, needed // MIB) if free < needed else ""


def reflink(bench):
    why = missing(bench)
    if why:
        bench.note("left out: reflink (%s)" % why)
        return
    try:
        host = LoopXfs(bench.work, 2 * bench.size + 2 * GIB)
    except Broken as error:
        for one in [one for one in LIVE if isinstance(one, LoopXfs)]:
            one.destroy()
        bench.note("left out: reflink (%s)" % error)
        return
    bench.row(KEY, "Stream the whole image, overlay and base on one XFS that shares blocks", "raw base", "s", "low")
    base, overlay, control = pathlib.Path(host.path, "base.raw"), pathlib.Path(host.path, "overlay.qcow2"), bench.path("qmp.sock")
    run("cp", "--reflink=never", "--sparse=never", bench.path("base.raw"), base)
    bench.settle(base)
    for target in bench.turns(one_stream_transport(bench)):
        overlay.unlink(missing_ok=True)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay)
        bench.set_cache(base)
        run("sync", "-f", host.path)
        control.unlink(missing_ok=True)
        disk = target.put_up(Setup(str(base), str(overlay), copy_on_read=True, stream=str(control)))
        session = qmp.Qmp(str(control))
        begun = time.perf_counter()
        session.execute("block-stream", **{"device": target.device(), "job-id": "bench"})
        finish_stream(session)
        bench.record(KEY, target, time.perf_counter() - begun)
        bench.check(disk)
        session.socket.close()
        disk.take_down()
        if json.loads(run("qemu-img", "info", "--output=json", overlay)).get("backing-filename"):
            raise Broken("%s has streamed, and the backing file is still there" % target.label)
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", overlay, base)
    host.destroy()
