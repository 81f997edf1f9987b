"""What scripts/bench.py measures: the disks of every peer, how they are put up, watched and taken down.

A target shows the same bytes as one regular file, by its own means. Whatever is put up is in `LIVE` until it is taken down, so that the end of the
program, whichever way it comes, leaves no mount and no process.
"""

import contextlib
import ctypes
import dataclasses
import mmap
import os
import pathlib
import signal
import subprocess
import time

LIVE = []
PAGE = 4096
TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 20  # a target that has not mounted by then is broken
END_SECONDS = 30  # and so is one that has not written back and gone by then
MNT_DETACH = 2


class Broken(Exception):
    """A target does not start, or does not do what it is asked: one line for the user."""


@dataclasses.dataclass
class Setup:
    """What a target is to show: the same bytes twice, for those that know qcow2 and for those that do not."""

    raw: str  # a raw file with the content
    qcow2: str  # an image with it; with copy_on_read an overlay above some base
    copy_on_read: bool = False
    stream: str = ""  # path of a QMP socket: the disk is to be streamed (QEMU then exports it read-only, it can no other way)


class Disk:
    """A disk that is up: a file to read and write, and the processes behind it."""

    def __init__(self, target, path, process=None, log=None):
        self.target, self.path, self.process, self.log = target, path, process, log
        self.ready_seconds = 0.0

    def processes(self):
        """The server and all its descendants."""
        if self.process is None:
            return []
        children = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                fields = stat_of(entry.name)
                if fields:
                    children.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:
            found.extend(children.get(pid, []))
        return found

    def kill(self):
        """Kills the server and all its descendants: the process that serves may be one of them."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cpu_seconds(self):
        """User and system time that the server and its children have used so far."""
        ticks = 0
        for pid in self.processes():
            fields = stat_of(pid)
            if fields:
                ticks += int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
        return ticks / TICKS

    def resident_mib(self):
        """Resident memory of the server, and what its helper processes hold for themselves beside it."""
        total = 0
        for number, pid in enumerate(self.processes()):
            wanted = ("Rss:",) if number == 0 else ("Private_Clean:", "Private_Dirty:")
            try:
                text = pathlib.Path("/proc/%d/smaps_rollup" % pid).read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(wanted))
        return total / 1024

    def last_words(self):
        if self.log is None:
            return ""
        lines = [line.strip() for line in pathlib.Path(self.log).read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def take_down(self):
        """Unmounts, and waits until everything has been written back and all processes have gone."""
        if self not in LIVE:
            return
        process = self.process
        try:
            if process is not None:
                deadline = time.monotonic() + END_SECONDS
                while is_mounted(self.path) and not unmount(self.path) and time.monotonic() < deadline:
                    time.sleep(0.05)
                if self.target.stays_when_unmounted and process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                try:
                    process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    raise Broken("%s does not end: %s" % (self.target.label, self.last_words())) from None
                if is_mounted(self.path):
                    raise Broken("%s ended and left its mount" % self.target.label)
        finally:
            self.destroy()

    def destroy(self):
        """Nothing is left after this, whatever state it is in. To be called more than once if need be."""
        if self.process is not None:
            others = self.processes()
            if is_mounted(self.path):
                unmount(self.path, lazily=True)
            if self.process.poll() is None:
                self.kill()
            self.process.wait()
            for pid in others[1:]:
                # Descendants end by themselves when the server is gone; this is for those that
                # hang.
                deadline = time.monotonic() + 2
                while alive(pid) and time.monotonic() < deadline:
                    time.sleep(0.02)
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
            pathlib.Path(self.path).unlink(missing_ok=True)
        if self in LIVE:
            LIVE.remove(self)


def stat_of(pid):
    """Fields of /proc/PID/stat from the state on (which is number 0 here): the name before it may hold anything."""
    try:
        return pathlib.Path("/proc/%s/stat" % pid).read_text().rpartition(")")[2].split()
    except OSError:
        return None


def alive(pid):
    fields = stat_of(pid)
    return fields is not None and fields[0] not in "ZX"


def is_mounted(path):
    # By the list, and not by stat(2), which would wait for a server that hangs.
    wanted = str(path).replace(" ", "\\040")
    return any(line.split(" ")[1] == wanted for line in pathlib.Path("/proc/self/mounts").read_text().splitlines())


def unmount(path, lazily=False):
    if os.geteuid() == 0:
        command = ["umount"] + (["-l"] if lazily else []) + [str(path)]
    else:
        command = ["fusermount3", "-u"] + (["-z"] if lazily else []) + [str(path)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def end_with_parent():
    """In a child, before it becomes somebody else: if this program is killed with SIGKILL, the servers are told to end."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


class Target:
    """One column. `key` is its name in options and JSON, `label` its name in the table."""

    key = label = ""
    needs = ()
    knows_qcow2 = True
    streams = False
    stays_when_unmounted = False
    fills_by_reading = False  # shows its base through a temporary overlay, which must be filled before "everything is allocated"
    flushes = True

    def __init__(self, work):
        self.work = pathlib.Path(work)

    def command(self, setup, path):
        raise NotImplementedError

    def put_up(self, setup, name="disk"):
        path, log = self.work / name, self.work / (self.key + ".log")
        path.touch()
        begun = time.perf_counter()
        with open(log, "ab") as output:
            # A session of its own: Ctrl-C reaches only this program, which then ends the servers in
            # order.
            process = subprocess.Popen(
                self.command(setup, str(path)), cwd=self.work, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=end_with_parent)
        disk = Disk(self, str(path), process, str(log))
        LIVE.append(disk)
        try:
            while not self.is_ready(disk):
                if process.poll() is not None:
                    raise Broken("%s does not start: %s" % (self.label, disk.last_words()))
                if time.perf_counter() - begun > START_SECONDS:
                    raise Broken("%s has not mounted after %d s: %s" % (self.label, START_SECONDS, disk.last_words()))
                time.sleep(0.001)
        except BaseException:
            disk.destroy()
            raise
        disk.ready_seconds = time.perf_counter() - begun
        if setup.stream:
            wait_for(setup.stream)
        return disk

    def is_ready(self, disk):
        """Mounted, and the first 4 KiB can be read."""
        if not is_mounted(disk.path):
            return False
        with Reader(disk.path) as reader:
            return len(reader.read(0, PAGE)) == PAGE

    def device(self):
        """Name of the disk on its QMP socket."""
        return ""


def wait_for(socket_path):
    deadline = time.monotonic() + START_SECONDS
    while not os.path.exists(socket_path):
        if time.monotonic() > deadline:
            raise Broken("no QMP socket at %s" % socket_path)
        time.sleep(0.001)


class Reader:
    """Reads and writes a disk past every cache of the kernel that is above its server."""

    def __init__(self, path, write=False, direct=True):
        self.fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | (os.O_DIRECT if direct else 0))
        self.buffer = mmap.mmap(-1, 1 << 16)  # aligned, as O_DIRECT wants it

    def read(self, offset, length):
        with memoryview(self.buffer) as view:
            return view[: os.preadv(self.fd, [view[:length]], offset)].tobytes()

    def read_quietly(self, offset):
        """4 KiB whose content nobody wants: as little Python as there can be, for whoever takes the time."""
        os.preadv(self.fd, [self.page()], offset)

    def page(self):
        return memoryview(self.buffer)[:PAGE]

    def write(self, offset, data):
        self.buffer[: len(data)] = data
        with memoryview(self.buffer) as view:
            if os.pwritev(self.fd, [view[: len(data)]], offset) != len(data):
                raise Broken("short write")

    def sync(self):
        os.fsync(self.fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.close(self.fd)
        except OSError:
            pass  # of a server that has died; what was written was synced before, which is where it would matter


class Plain(Target):
    """The raw file itself, through the page cache, as all the servers read theirs."""

    key, label, knows_qcow2 = "plain", "plain file", False

    def put_up(self, setup):
        disk = Disk(self, setup.raw)
        LIVE.append(disk)
        return disk


class Passthrough(Target):
    """The ceiling: the same raw file behind the same transport, and no disk logic."""

    knows_qcow2 = False

    def __init__(self, work, program, transport):
        super().__init__(work)
        self.program = program
        self.key, self.label = "ceiling-" + transport, "ceiling " + transport
        self.words = ["uring"] if transport == "uring" else []

    def command(self, setup, path):
        return [self.program, setup.raw, path] + self.words


class Nbdkit(Target):
    key, label, needs, knows_qcow2, fills_by_reading, flushes = "nbdkit", "nbdkit cow", ("nbdkit", "nbdfuse"), False, True, False

    def command(self, setup, path):
        return ["nbdfuse", path, "[", "nbdkit", "--filter=cow", "file", setup.raw, "cow-on-read=true", "]"]


class Qemu(Target):
    needs, streams, stays_when_unmounted = ("qemu-storage-daemon",), True, True

    def __init__(self, work, aio):
        super().__init__(work)
        self.aio = aio
        self.key = {"threads": "qemu-threads", "io_uring": "qemu-uring"}[aio]
        self.label = "QEMU " + {"threads": "threads", "io_uring": "io_uring"}[aio]

    def command(self, setup, path):
        node = "top"
        words = ["qemu-storage-daemon", "--blockdev",
                 "driver=qcow2,node-name=top,file.driver=file,file.filename=%s,file.aio=%s,discard=unmap" % (setup.qcow2, self.aio)]
        if setup.copy_on_read and not setup.stream:
            node = "cor"
            words += ["--blockdev", "driver=copy-on-read,node-name=cor,file=top"]
        if setup.stream:
            words += ["--chardev", "socket,path=%s,server=on,wait=off,id=c" % setup.stream, "--monitor", "c"]
        writable = "off" if setup.stream else "on"
        return words + ["--export", "fuse,id=e,node-name=%s,mountpoint=%s,writable=%s" % (node, path, writable)]

    def device(self):
        return "top"


class Cordisk(Target):
    streams = True

    def __init__(self, work, program, transport, option):
        super().__init__(work)
        self.program = program
        self.key, self.label = "cordisk-" + transport, "cordisk " + transport
        self.option = ["--transport", transport] if option else []

    def command(self, setup, path):
        # Without a reserve: what is measured is the copying, however full the host is.
        words = [self.program, "mount", "--foreground", "--reserve", "0"] + self.option
        if setup.stream:
            words += ["--qmp", setup.stream]
        return words + [setup.qcow2, path]

    def device(self):
        return "drive0"


def all_targets(work, cordisk, passthrough):
    """Every target in the order of the columns, and notes on what could not even be tried."""
    notes = []
    help_text = subprocess.run([cordisk, "mount", "--help"], capture_output=True, text=True, check=True).stdout
    option = "--transport" in help_text
    if not option:
        notes.append("this cordisk has no --transport: it is measured once, over /dev/fuse")
    targets = [Plain(work), Passthrough(work, passthrough, "dev"), Passthrough(work, passthrough, "uring"), Nbdkit(work), Qemu(work, "threads"), Qemu(work, "io_uring"), Cordisk(work, cordisk, "dev", option)]
    if option:
        targets.append(Cordisk(work, cordisk, "uring", option))
    return targets, notes
