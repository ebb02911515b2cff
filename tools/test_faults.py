"""What becomes of messages where the disk fails or is full, with the service as a process."""

import json
import os
import re
import shutil
import subprocess
from contextlib import closing, suppress
from http.client import HTTPConnection
from urllib.parse import urlsplit

import launch
import pytest


STRACE = ["strace", "-D", "-f", "-qq", "-e", "signal=none"]


def can_trace():
    words = [*STRACE, "-o", os.devnull, "true"]
    return shutil.which("strace") and not subprocess.run(words, capture_output=True).returncode


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is needed, and must be let trace")
FAULTS = ["fdatasync:error=EIO:when=20..40", "pwrite64:error=EIO:when=100..140"]
FAULTS += ["pwrite64:error=ENOSPC:when=200..240"]
CHANNEL = "193270a9-c9cf-404a-8f83-838e71d9ae67"


@pytest.fixture
def start():
    """Start the service, under strace if words for it are given, and end it with the test."""
    processes = []

    def start(database, *strace):
        process, url = launch.start(*strace, *launch.service(database))
        processes.append(process)
        return process, url

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(url, body=None):
    """Return the status and the JSON of an answer; POST if there is a body."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST" if body else "GET", urlsplit(url).path, json.dumps(body))
    with closing(connection), connection.getresponse() as answer:
        return answer.status, json.load(answer)


def post(url, number, message_type="RocketSpeedIncreased", content=None):
    metadata = {"channel": CHANNEL, "messageNumber": number, "messageType": message_type}
    metadata["messageTime"] = "2022-02-02T19:39:05Z"
    body = {"metadata": metadata, "message": content or {"by": number}}
    return ask(f"{url}/messages", body)[0]


def stored(url):
    """Return the numbers of the messages that are stored."""
    messages = ask(f"{url}/rockets/{CHANNEL}/messages")[1]["messages"]
    return [message["metadata"]["messageNumber"] for message in messages]


@needs_strace
def test_every_202_is_sent_after_a_sync_of_what_was_written(start, tmp_path):
    trace = tmp_path / "trace"
    strace = [*STRACE, "-y", "-e", "trace=pwrite64,fdatasync,fsync,sendto", "-o", trace]
    process, url = start(tmp_path / "rockets.db", *strace)
    assert [post(url, number) for number in range(1, 11)] == [202] * 10
    process.terminate()
    process.stdout.read()  # until strace, too, has closed it, and the trace is complete
    lines = trace.read_text().splitlines()
    calls = [re.search(r"pwrite64.*-wal>|sync.*-wal>|HTTP/1.1 202|$", line)[0] for line in lines]
    names = [call[:4] for call in calls if call]
    assert names.count("HTTP") == 10
    assert all(names[place - 1] == "sync" for place, name in enumerate(names) if name == "HTTP")


@needs_strace
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_disk_loses_nothing_acknowledged_and_counts_nothing_twice(start, tmp_path, fault):
    call, database = fault.partition(":")[0], tmp_path / "rockets.db"
    options = ["-e", f"trace={call}", "-e", f"inject={fault}", "-o", os.devnull]
    process, url = start(database, *STRACE, *options)
    refused = 0
    for number in range(1, 71):
        while (status := post(url, number)) != 202:
            assert status == 503
            refused += 1
    assert 0 < refused < 100
    process.kill()
    process.wait()
    _, url = start(database)
    assert stored(url) == list(range(1, 71))
    launched = {"type": "A", "launchSpeed": 500, "mission": "B"}
    assert post(url, 71, "RocketLaunched", launched) == 202
    assert ask(f"{url}/rockets/{CHANNEL}")[1]["speed"] == 500 + sum(range(71))


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if not hasattr(os, "getuid") or os.getuid() or subprocess.run(mount).returncode:
        pytest.skip("root is needed to mount a small disk, and must be let mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_a_503_until_there_is_room_again(small_disk, start):
    _, url = start(small_disk / "rockets.db")
    assert post(url, 1) == 202
    ballast = small_disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    big = {"by": 1, "padding": "x" * 9000}
    assert [post(url, number, content=big) for number in (2, 3, 4)] == [503] * 3
    assert stored(url) == [1]
    assert ask(f"{url}/health")[0] == 503
    ballast.unlink()
    assert [post(url, number, content=big) for number in (2, 3, 4)] == [202] * 3
    assert ask(f"{url}/health")[0] == 200
    assert stored(url) == [1, 2, 3, 4]
