#!/usr/bin/env python3
"""Talks QMP to a socket; needs nothing but Python 3.

    qmp.py SOCKET COMMAND [NAME=VALUE ...]           sends one command, prints what it returns
    qmp.py --follow SOCKET COMMAND [NAME=VALUE ...]  starts a block job, shows its progress, prints the event that ends it

VALUE is JSON where it parses as JSON, a string otherwise. Exit status 0 if the command and the job succeeded, 1 if not, 2 for wrong usage.
"""

import json
import socket
import sys
import time

MIB = 1 << 20


class Qmp:
    """One session: greeting, negotiation, then commands; events are kept in the order in which they came."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.file = self.socket.makefile("rw", encoding="utf-8", newline="\n")
        self.greeting = self.receive()["QMP"]
        self.events = []
        self.execute("qmp_capabilities")

    def receive(self):
        line = self.file.readline()
        if not line:
            raise SystemExit("qmp.py: the other side closed the connection")
        return json.loads(line)

    def execute(self, command, **arguments):
        """Returns the "return" member; an error reply ends the program."""
        request = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self.file.write(json.dumps(request) + "\r\n")
        self.file.flush()
        while True:
            reply = self.receive()
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise SystemExit("qmp.py: %s: %s: %s" % (command, reply["error"]["class"], reply["error"]["desc"]))
            else:
                return reply["return"]


def parse(words):
    arguments = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise SystemExit(2)
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def ended(events):
    """The event that says that a block job is over, if it is among these."""
    for event in events:
        if event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
            return event
    return None


def show_progress(offset, length, rate):
    live = sys.stdout.isatty()
    part = offset / length if length else 1.0
    text = "%3d %%  %s of %s MiB" % (part * 100, offset // MIB, length // MIB)
    text += ", %.1f MiB/s" % (rate / MIB) if rate is not None else ""
    if live:
        filled = int(part * 30)
        sys.stdout.write("\r     [%s%s] %s\x1b[K" % ("#" * filled, "." * (30 - filled), text))
    else:
        sys.stdout.write("     %s\n" % text)
    sys.stdout.flush()


def follow(qmp):
    """Asks how far the job is until the event says that it is over; returns that event."""
    live = sys.stdout.isatty()
    before = None
    while ended(qmp.events) is None:
        jobs = qmp.execute("query-block-jobs")
        if jobs:
            now, offset = time.monotonic(), jobs[0]["offset"]
            rate = (offset - before[1]) / (now - before[0]) if before else None
            show_progress(offset, jobs[0]["len"], rate)
            before = (now, offset)
        elif ended(qmp.events) is None:
            qmp.events.append(qmp.receive())
        time.sleep(0.2 if live else 1.0)
    event = ended(qmp.events)
    data = event["data"]
    if live or before is None or before[1] != data["offset"]:
        show_progress(data["offset"], data["len"], None)
    if live:
        sys.stdout.write("\n")
    return event


def main(words):
    following = words[:1] == ["--follow"]
    words = words[1:] if following else words
    if len(words) < 2 or words[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    qmp = Qmp(words[0])
    result = qmp.execute(words[1], **parse(words[2:]))
    if not following:
        print(json.dumps(result))
        return 0
    event = follow(qmp)
    print("     " + json.dumps(event))
    return 0 if event["event"] == "BLOCK_JOB_COMPLETED" and "error" not in event["data"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
