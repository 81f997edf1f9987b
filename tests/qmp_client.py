#!/usr/bin/env python3
"""Drives a block-stream job with `qemu.qmp`, QEMU's own client library from PyPI, as its users would.

    qmp_client.py SOCKET [--command block_stream] [--device drive0] [--job-id ID] [--speed BYTES] [--len BYTES]

It is started by tests/it/qmp_client.rs. The same file can be pointed at qemu-storage-daemon (--command block-stream --device NODE --job-id ID).
"""

import argparse
import asyncio

from qemu.qmp import ExecuteError, QMPClient


async def conversation(options):
    qmp = QMPClient("cordisk-test")
    # connect() checks the greeting, negotiates capabilities and fails if anything but the reply
    # comes first.
    await qmp.connect(options.socket)
    try:
        version = await qmp.execute("query-version")
        assert set(version) == {"qemu", "package"}, version
        names = {command["name"] for command in await qmp.execute("query-commands")}
        assert {options.command, "query-block-jobs", "quit"} <= names, names
        assert await qmp.execute("query-block-jobs") == []

        # An error reply carries the id of its command, otherwise this library ends the session.
        try:
            await qmp.execute("block-job-cancel", {"device": "nope"})
            raise AssertionError("cancelling a job that does not exist succeeded")
        except ExecuteError as error:
            assert error.error_class == "DeviceNotActive", error.error_class
            assert str(error) == "Block job 'nope' not found", str(error)

        job = options.job_id or options.device
        arguments = {"device": options.device, "speed": options.speed}
        if options.job_id:
            arguments["job-id"] = options.job_id
        statuses, completed = [], None
        with qmp.listener(["JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR"]) as events:
            assert await qmp.execute(options.command, arguments) == {}
            running = await qmp.execute("query-block-jobs")
            assert [(one["type"], one["device"], one["speed"]) for one in running] == [("stream", job, options.speed)], running
            assert 0 <= running[0]["offset"] <= running[0]["len"], running
            async for event in events:
                print(event["event"], event["data"])
                if event["event"] == "JOB_STATUS_CHANGE":
                    assert event["data"]["id"] == job, event
                    statuses.append(event["data"]["status"])
                else:
                    assert completed is None and event["event"] == "BLOCK_JOB_COMPLETED", event
                    completed = event["data"]
                    # A client that reacts to the event finds the job gone.
                    assert await qmp.execute("query-block-jobs") == []
                if statuses[-1:] == ["null"]:
                    break
        assert statuses == ["created", "running", "waiting", "pending", "concluded", "null"], statuses
        assert set(completed) == {"type", "device", "len", "offset", "speed"}, completed
        assert (completed["type"], completed["device"], completed["speed"]) == ("stream", job, options.speed), completed
        assert completed["offset"] == completed["len"], completed
        assert options.len in (None, completed["len"]), completed
        assert await qmp.execute("query-jobs") == []
    finally:
        await qmp.disconnect()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("socket")
    parser.add_argument("--command", default="block_stream")
    parser.add_argument("--device", default="drive0")
    parser.add_argument("--job-id")
    parser.add_argument("--speed", type=int, default=0)
    parser.add_argument("--len", type=int)
    asyncio.run(asyncio.wait_for(conversation(parser.parse_args()), timeout=60))
    print("ok")


if __name__ == "__main__":
    main()
