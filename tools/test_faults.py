"""What becomes of messages where the disk fails or is full, with the service as a process."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_rockets import APPLIED, CHANNEL, Process, faster, fold, launch

STRACE = ["strace", "-D", "-f", "-qq", "-e", "signal=none"]
FAULTS = ["fdatasync:error=EIO:when=20..40", "pwrite64:error=EIO:when=100..140"]
FAULTS += ["pwrite64:error=ENOSPC:when=200..240"]
BODIES = [launch(), *(faster(number) for number in range(2, 72))]


def can_trace():
    words = [*STRACE, "-o", os.devnull, "true"]
    return shutil.which("strace") and not subprocess.run(words, capture_output=True).returncode


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is needed, and must be let trace")


def traced(file, *options):
    """Return the service as a process under strace."""
    process = Process(file)
    process.command[:0] = [*STRACE, *options]
    return process


@needs_strace
def test_every_202_is_sent_after_a_sync_of_what_was_written(tmp_path):
    trace = tmp_path / "trace"
    options = ["-y", "-e", "trace=pwrite64,fdatasync,fsync,sendto", "-o", trace]
    with traced(tmp_path / "rockets.db", *options) as process:
        assert [process.request("/messages", body) for body in BODIES[:10]] == [APPLIED] * 10
        process.stop()
        process.popen.stdout.read()  # until strace, too, has closed it, and the trace is complete
    lines = trace.read_text().splitlines()
    calls = [re.search(r"pwrite64.*-wal>|sync.*-wal>|HTTP/1.1 202|$", line)[0] for line in lines]
    names = [call[:4] for call in calls if call]
    assert names.count("HTTP") == 10
    assert all(names[place - 1] == "sync" for place, name in enumerate(names) if name == "HTTP")


@needs_strace
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_disk_loses_nothing_acknowledged_and_counts_nothing_twice(tmp_path, fault):
    call, file, refused = fault.partition(":")[0], tmp_path / "rockets.db", 0
    options = ["-e", f"trace={call}", "-e", f"inject={fault}", "-o", os.devnull]
    with traced(file, *options) as process:
        for body in BODIES:
            while (answer := process.request("/messages", body)) != APPLIED:
                assert answer[0] == 503
                refused += 1
        process.stop(signal.SIGKILL)
    assert 0 < refused < 100
    with Process(file) as process:
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold(BODIES))


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if not hasattr(os, "getuid") or os.getuid() or subprocess.run(mount).returncode:
        pytest.skip("root is needed to mount a small disk, and must be let mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_a_503_until_there_is_room_again(small_disk):
    ballast = small_disk / "ballast"
    bodies = [launch(number, padding="x" * 9000) for number in range(1, 5)]
    with Process(small_disk / "rockets.db") as process:
        assert process.request("/messages", bodies[0]) == APPLIED
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert [process.request("/messages", body)[0] for body in bodies[1:]] == [503] * 3
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold(bodies[:1]))
        assert process.request("/health")[0] == 503
        ballast.unlink()
        assert [process.request("/messages", body) for body in bodies[1:]] == [APPLIED] * 3
        assert process.request("/health")[0] == 200
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold(bodies))
