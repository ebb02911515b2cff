"""The rules of launch.py and powercut.py, on the service as a process of its own."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, permutations
from pathlib import Path
from statistics import median

import launch
import pytest

TOOLS = Path(launch.__file__).parent
FEW = ("--max-messages=300", "--duplicates=0.2", "--reorder=100", "--seed=7")


@pytest.fixture
def database(tmp_path):
    return tmp_path / "rockets.db"


@pytest.fixture
def url(database):
    with launch.Server(*launch.service(), database) as server:
        yield f"{server.url}/messages"


def run(*words, tool="launch.py"):
    """Return the exit code of a tool and the lines that it prints."""
    command = [sys.executable, TOOLS / tool, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, text=True, timeout=60, **pipes)
    return done.returncode, done.stdout.splitlines()


def test_launch_sends_every_message_and_some_twice_and_finds_no_difference(url, database):
    code, (compared, summary) = run("launch", url, *FEW, "--message-delay=2ms")
    assert (code, compared) == (0, "20 rockets, 0 differences")
    said = r"(\d+) messages in ([\d.]+) s, .* (\d+) duplicates, 0 retries"
    sent, took, twice = map(float, re.fullmatch(said, summary).groups())
    assert 30 < twice < 90
    assert sent == 300 + twice
    assert took >= 0.6  # the delays of 300 messages
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM messages").fetchone() == (300,)


def test_launch_names_what_is_wrong_and_exits_1(url, database):
    run(url, *FEW)
    with closing(sqlite3.connect(database)) as connection, connection:
        (channel,) = connection.execute("SELECT max(channel) FROM rockets").fetchone()
        connection.execute("UPDATE rockets SET mission = 'X' WHERE channel = ?", (channel,))
    code, (difference, compared, _) = run(url, *FEW)
    assert difference.startswith(f'{channel} mission is "X", not "')
    assert (code, compared) == (1, "20 rockets, 1 differences")


def test_launch_says_in_one_line_that_later_messages_are_there(url):
    run(url, *FEW)
    code, (compared,) = run(url, *FEW, "--max-messages=200")
    assert code == 1
    assert compared.startswith("not compared: the service holds later messages of this seed")


@pytest.mark.parametrize("url", ["", "localhost:8088/messages", "http://localhost:1/messages"])
def test_launch_says_what_is_wrong_with_its_url(url):
    code, lines = run(url)
    assert code > 0
    assert re.match(r"launch(\.py: error: a URL is needed|: .*refused)", lines[-1])


def test_the_demo_kills_the_service_five_times_and_finds_no_difference():
    code, lines = run("--demo", "--max-messages=200")
    kills = [line.split(" after ")[0] for line in lines if line.startswith("kill ")]
    assert kills == [f"kill {number} of 5" for number in range(1, 6)], lines
    assert (code, lines[-2]) == (0, "20 rockets, 0 differences")
    assert not lines[-1].endswith(" 0 retries")  # of what was under way


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


def test_messages_are_late_by_any_number_of_places_up_to_the_one_given():
    places = list(launch.disorder(range(10_000), seed=1, reorder=300, duplicates=0))
    assert sorted(places) == list(range(10_000))
    late = [arrival - place for arrival, place in enumerate(places)]
    assert 50 < median(map(abs, late)) < 100 < max(late) <= 300


LIFE = [
    (2, "RocketSpeedIncreased", {"by": 10}),
    (3, "RocketLaunched", {"type": "A", "launchSpeed": 500, "mission": "B"}),
    (5, "RocketMissionChanged", {"newMission": "C"}),
    (6, "RocketExploded", {"reason": "D"}),
    (7, "RocketLaunched", {"type": "E", "launchSpeed": 7, "mission": "F"}),
    (9, "RocketExploded", {"reason": "G"}),
]
ROCKET = {"channel": "x", "type": "A", "speed": 510, "mission": "F", "status": "exploded"}
ROCKET |= {"explosionReason": "D", "launchedAt": "at 3", "updatedAt": "at 9"}
ROCKET |= {"lastMessageNumber": 9, "missingMessages": 3}


def test_the_oracle_adds_up_messages_in_any_order_and_twice():
    life = []
    for number, message_type, content in LIFE:
        metadata = {"channel": "x", "messageNumber": number, "messageTime": f"at {number}"}
        life.append({"metadata": metadata | {"messageType": message_type}, "message": content})
    assert all(launch.fold([*order, life[0]]) == ROCKET for order in permutations(life))
    assert launch.fold(life[:1])["status"] == "awaiting_launch"
    assert launch.fold(life[:2])["status"] == "active"


class RefusingOnce(BaseHTTPRequestHandler):
    """Answers with the status that the body asks for the first time, and with 202 from then on."""

    seen = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(202 if body in self.seen else int(body))
        self.seen.append(body)
        self.end_headers()


def test_what_gets_no_2xx_is_sent_again_after_half_a_second():
    bodies = [b"301", b"400", b"404", b"503"]
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingOnce) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://localhost:{server.server_port}/messages"
        sender = launch.Sender(url, concurrency=4)
        took = sender.run(bodies)
        server.shutdown()
    assert sorted(RefusingOnce.seen) == sorted(bodies * 2)
    assert took >= 0.5
    assert (sender.done, sender.retries) == (4, 4)


def can_trace():
    words = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull, "true"]
    return shutil.which("strace") and not subprocess.run(words, capture_output=True).returncode


@pytest.mark.skipif(not can_trace(), reason="strace 5.3 or newer is needed, and must be let trace")
def test_a_power_cut_takes_back_acknowledged_messages_only_without_syncs(tmp_path):
    code, lines = run("--cuts=20", tool="powercut.py")
    assert (code, lines) == (0, ["20 power cuts in 600 messages: 0 with faults"])
    (tmp_path / "static").symlink_to(launch.SERVICE.parent / "static")
    broken = re.sub("synchronous *= *FULL", "synchronous=NORMAL", launch.SERVICE.read_text())
    (tmp_path / "rockets.py").write_text(broken)
    code, lines = run(tmp_path / "rockets.py", "--cuts=20", tool="powercut.py")
    assert code == 1
    assert re.match(r"after call .*: message \d+ of \S+ is lost$", lines[0])
