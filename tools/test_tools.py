"""The rules of launch.py and powercut.py, on the service as a process of its own."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, permutations
from pathlib import Path

import launch
import pytest

TOOLS = Path(launch.__file__).parent
FEW = ("--max-messages=300", "--duplicates=0.2", "--reorder=100", "--seed=7")


@pytest.fixture
def database(tmp_path):
    return tmp_path / "rockets.db"


@pytest.fixture
def url(database):
    process, url = launch.start(*launch.service(database))
    yield f"{url}/messages"
    process.kill()
    process.communicate()


def run(*words):
    """Return the exit code of launch.py and the lines that it prints."""
    command = [sys.executable, TOOLS / "launch.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, text=True, timeout=60, **pipes)
    return done.returncode, done.stdout.splitlines()


def test_launch_sends_every_message_and_some_twice_and_finds_no_difference(url, database):
    code, (summary, compared) = run("launch", url, *FEW)
    assert (code, compared) == (0, "20 rockets, 0 differences")
    sent, twice = re.match(r"(\d+) messages .* (\d+) duplicates, 0 retries$", summary).groups()
    assert 30 < int(twice) < 90
    assert int(sent) == 300 + int(twice)
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM messages").fetchone() == (300,)


def test_launch_names_what_is_wrong_and_exits_1(url, database):
    run(url, *FEW)
    with closing(sqlite3.connect(database)) as connection, connection:
        (channel,) = connection.execute("SELECT max(channel) FROM rockets").fetchone()
        connection.execute("UPDATE rockets SET mission = 'X' WHERE channel = ?", (channel,))
    code, (_, difference, compared) = run(url, *FEW)
    assert difference.startswith(f'{channel} mission is "X", not "')
    assert (code, compared) == (1, "20 rockets, 1 differences")


def test_launch_says_in_one_line_that_later_messages_are_there(url):
    run(url, *FEW)
    code, lines = run(url, *FEW, "--max-messages=200")
    assert (code, len(lines)) == (1, 3)
    assert lines[0] == "the service holds later messages of seed 7 than this run sends"
    assert lines[2].startswith("not compared: ")


def test_launch_pauses_between_messages(url):
    began = time.perf_counter()
    code, lines = run(url, "--message-delay=20ms", "--max-messages=20")
    assert (code, len(lines)) == (0, 2)
    assert time.perf_counter() - began >= 0.4


def test_launch_stopped_by_ctrl_c_tells_how_far_it_came_and_exits_130(url):
    command = [sys.executable, TOOLS / "launch.py", url, "--message-delay=1m", "--max-messages=2"]
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 30
        while not launch.read_rockets(url):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert re.fullmatch(r"[01] messages in .*\n", said)


def test_the_demo_kills_the_service_five_times_and_finds_no_difference():
    code, lines = run("--demo", "--max-messages=200")
    kills = [line.split(" after ")[0] for line in lines[:5]]
    assert kills == [f"kill {number} of 5" for number in range(1, 6)], lines
    assert (code, lines[-2]) == (0, "20 rockets, 0 differences")
    assert lines[-1].startswith("the demo took ")


def test_launch_flies_as_the_test_program_does():
    flown, speeds, gone = Counter(), Counter(), set()
    signs = {"RocketLaunched": 1, "RocketSpeedIncreased": 1, "RocketSpeedDecreased": -1}
    for message in islice(launch.fly(444), 100_000):
        metadata, content = message["metadata"], message["message"]
        channel, message_type = metadata["channel"], metadata["messageType"]
        flown[channel] += 1
        assert metadata["messageNumber"] == flown[channel] and channel not in gone
        assert (message_type == "RocketLaunched") == (flown[channel] == 1)
        change = content.get("launchSpeed", content.get("by", 0))
        speeds[channel] += signs.get(message_type, 0) * change
        assert speeds[channel] >= 500 and speeds[channel] % 500 == 0
        gone |= {channel} if message_type == "RocketExploded" else set()
    assert (len(flown), len(gone)) == (20, 6)


LIFE = [
    (2, "RocketSpeedIncreased", {"by": 10}),
    (3, "RocketLaunched", {"type": "A", "launchSpeed": 500, "mission": "B"}),
    (5, "RocketMissionChanged", {"newMission": "C"}),
    (6, "RocketExploded", {"reason": "D"}),
    (7, "RocketLaunched", {"type": "E", "launchSpeed": 7, "mission": "F"}),
    (9, "RocketExploded", {"reason": "G"}),
]
FIELDS = ("type", "speed", "mission", "status", "explosionReason", "launchedAt", "updatedAt")
FIELDS += ("lastMessageNumber", "missingMessages")
ROCKETS = [  # after the first message, after two, and so on
    (None, None, None, "awaiting_launch", None, None, "at 2", 2, 1),
    ("A", 510, "B", "active", None, "at 3", "at 3", 3, 1),
    ("A", 510, "C", "active", None, "at 3", "at 5", 5, 2),
    ("A", 510, "C", "exploded", "D", "at 3", "at 6", 6, 2),
    ("A", 510, "F", "exploded", "D", "at 3", "at 7", 7, 2),
    ("A", 510, "F", "exploded", "D", "at 3", "at 9", 9, 3),
]


def test_the_oracle_adds_up_any_set_of_messages_in_any_order():
    life = []
    for (number, message_type, content), fields in zip(LIFE, ROCKETS, strict=True):
        metadata = {"channel": "x", "messageNumber": number, "messageTime": f"at {number}"}
        life.append({"metadata": metadata | {"messageType": message_type}, "message": content})
        rocket = {"channel": "x"} | dict(zip(FIELDS, fields, strict=True))
        assert all(launch.fold([*order, life[0]]) == rocket for order in permutations(life))


class RefusingOnce(BaseHTTPRequestHandler):
    """Answers with the status that the body asks for the first time, and with 202 from then on."""

    seen = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(202 if body in self.seen else int(body))
        self.seen.append(body)
        self.end_headers()


def test_what_gets_no_2xx_is_sent_again_after_half_a_second_and_holds_up_no_other():
    bodies = [b"301", b"400", b"404", b"503"]
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingOnce) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://localhost:{server.server_port}/messages"
        sender = launch.Sender(url, concurrency=1)
        took = sender.run(launch.http_request("POST", url, body) for body in bodies)
        server.shutdown()
    assert RefusingOnce.seen == bodies * 2
    assert took >= 0.5
    assert (sender.done, sender.retries["404 Not Found"], sender.retries.total()) == (4, 1, 4)


def test_launch_reads_all_pages_of_rockets(url):
    launches = islice(launch.fly(7, fleet=1001), 20_000)
    first = [json.dumps(each) for each in launches if each["metadata"]["messageNumber"] == 1]
    launch.Sender(url, 20).run(launch.http_request("POST", url, one.encode()) for one in first)
    assert len(first) == len(launch.read_rockets(url)) == 1001


def can_trace():
    words = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull, "true"]
    return shutil.which("strace") and not subprocess.run(words, capture_output=True).returncode


@pytest.mark.skipif(not can_trace(), reason="strace 5.3 or newer is needed, and must be let trace")
def test_a_power_cut_takes_back_acknowledged_messages_only_without_syncs(tmp_path):
    (tmp_path / "static").symlink_to(launch.SERVICE.parent / "static")
    broken = re.sub("synchronous *= *FULL", "synchronous=NORMAL", launch.SERVICE.read_text())
    (tmp_path / "rockets.py").write_text(broken)
    for program, code in (launch.SERVICE, 0), (tmp_path / "rockets.py", 1):
        command = [sys.executable, TOOLS / "powercut.py", program, "--cuts=20"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (code, ""), done.stdout
        assert done.stdout.splitlines()[-1].startswith("20 power cuts in 600 messages")
    assert re.search(r"(?m)^after call .*: message \d+ of \S+ is lost$", done.stdout)
