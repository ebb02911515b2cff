"""The rules of the service, each as a test: over HTTP, on a real database file.

From "The process" on, it runs as a user starts it.
"""

import copy
import csv
import json
import logging
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice, permutations
from pathlib import Path
from urllib.parse import quote

import pytest
from webtest import TestApp

import rockets
import tools.launch as launch_tool
from tools.browser import Browser, find_chromium
from tools.launch import Sender, http_request

CHANNEL = "193270a9-c9cf-404a-8f83-838e71d9ae67"
OTHER = str(uuid.UUID(int=99))
SERVICE = Path(rockets.__file__)
LAUNCH = {"type": "Falcon-9", "launchSpeed": 500, "mission": "ARTEMIS"}
UNKNOWN = {"type": None, "speed": None, "mission": None, "status": "awaiting_launch"}
UNKNOWN |= {"explosionReason": None, "launchedAt": None}

# Messages and the app #############################################################################


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rockets.db"


@pytest.fixture
def store(file):
    with closing(rockets.Store(str(file))) as store:
        yield store


@pytest.fixture
def app(store):
    return TestApp(rockets.create_app(store))


def message(number, kind, content, channel=CHANNEL, at=None):
    at = at or f"2022-02-02T19:{number // 60 % 60:02}:{number % 60:02}+01:00"
    metadata = {"channel": channel, "messageNumber": number, "messageTime": at, "messageType": kind}
    return {"metadata": metadata, "message": content}


def launch(number=1, **changes):
    metadata = {key: changes.pop(key) for key in ("channel", "at") if key in changes}
    return message(number, "RocketLaunched", LAUNCH | changes, **metadata)


def faster(number, by=7, **metadata):
    return message(number, "RocketSpeedIncreased", {"by": by}, **metadata)


def slower(number, by=3, **metadata):
    return message(number, "RocketSpeedDecreased", {"by": by}, **metadata)


def exploded(number, reason="PRESSURE_VESSEL_FAILURE", **metadata):
    return message(number, "RocketExploded", {"reason": reason}, **metadata)


def renamed(number, mission="SHUTTLE_MIR", **metadata):
    return message(number, "RocketMissionChanged", {"newMission": mission}, **metadata)


KINDS = {  # what makes a message of each type
    "RocketLaunched": launch,
    "RocketSpeedIncreased": faster,
    "RocketSpeedDecreased": slower,
    "RocketExploded": exploded,
    "RocketMissionChanged": renamed,
}


def post(app, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return app.post("/messages", content, **({"content_type": "application/json"} | options))


def get(app, channel=CHANNEL):
    return app.get(f"/rockets/{channel}").json


def dump(file):
    """Return all rows of both tables."""
    with closing(sqlite3.connect(file)) as connection:
        tables = ("rockets", "messages")
        return [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]


@contextmanager
def locked(file):
    """Hold the lock of the database during the block, as another process may."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def fold(messages):
    """Return what the messages of one rocket, in any order, mean: read in order, first to last."""
    by_number = {each["metadata"]["messageNumber"]: each for each in reversed(messages)}
    ordered = [by_number[number] for number in sorted(by_number)]
    last = ordered[-1]["metadata"]
    rocket = {"channel": last["channel"], **UNKNOWN, "updatedAt": last["messageTime"]}
    rocket["lastMessageNumber"] = last["messageNumber"]
    rocket["missingMessages"] = last["messageNumber"] - len(ordered)
    change = 0
    for each in ordered:
        kind, content = each["metadata"]["messageType"], each["message"]
        if kind == "RocketLaunched":
            if rocket["type"] is None:
                rocket |= {"type": content["type"], "speed": content["launchSpeed"]}
                rocket["launchedAt"] = each["metadata"]["messageTime"]
            rocket["mission"] = content["mission"]
        elif kind == "RocketMissionChanged":
            rocket["mission"] = content["newMission"]
        elif kind == "RocketExploded":
            rocket["explosionReason"] = rocket["explosionReason"] or content["reason"]
        else:
            change += content["by"] if kind == "RocketSpeedIncreased" else -content["by"]
    if rocket["type"] is not None:
        rocket |= {"speed": rocket["speed"] + change, "status": "active"}
    if rocket["explosionReason"]:
        rocket["status"] = "exploded"
    return rocket


# Processes and raw HTTP ###########################################################################

# Some shells set HOST. The tests of these variables give their own.
ENVIRON = {name: os.environ[name] for name in {*os.environ} - {"HOST", "PORT", "DATABASE"}}
BODY = json.dumps(launch()).encode()
LENGTH = f"Content-Length: {len(BODY)}\r\n"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc or prlimit(), of Linux")


def wait_until(condition, seconds=60):
    """Return what a condition returns as soon as it holds. Raise TimeoutError if it doesn't."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not hold within {seconds} s")
        time.sleep(0.005)
    return found


def changed(statement):
    """Return the arguments that make Python run the service after a change."""
    path = f"import sys; sys.path.insert(0, {str(SERVICE.parent)!r})"
    return ["-c", f"{path}\n{statement}\nimport rockets; rockets.main()"]


class Process:
    """The service as a user starts it, on a free port; killed at the end of the with block.

    Without a file, only the options and the environment tell which file and port it takes.
    """

    def __init__(self, file, *options, program=(SERVICE,), wrapper=(), **environ):
        given = ("--database", file, "--port", "0") if file else ()
        self.command = [*wrapper, sys.executable, *program, *given, *options]
        self.environ = ENVIRON | environ

    def __enter__(self):
        self.stderr = tempfile.TemporaryFile()
        pipes = {"stdout": subprocess.PIPE, "stderr": self.stderr, "text": True}
        self.popen = subprocess.Popen(self.command, env=self.environ, **pipes)
        self.said = self.popen.stdout.readline() or wait_until(self.logged)
        address = re.search(r"Rockets listens on (http://[^, ]+),", self.said)
        assert address, self.said
        self.url = address[1]
        return self

    def __exit__(self, *_):
        self.popen.kill()
        self.popen.communicate()
        self.stderr.close()

    def logged(self):
        """Return what the service has written to stderr so far."""
        return os.pread(self.stderr.fileno(), 1 << 20, 0).decode()

    def stop(self, number=signal.SIGTERM):
        """Send a signal that ends the service; return its exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(timeout=60)

    @contextmanager
    def paused(self):
        """Let the service do nothing during the block, so that all that comes, comes at once."""
        self.popen.send_signal(signal.SIGSTOP)
        os.waitpid(self.popen.pid, os.WUNTRACED)
        yield
        self.popen.send_signal(signal.SIGCONT)

    def connect(self):
        return socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), 60)

    def request(self, path, body=None, timeout=60):
        """Return the status and the JSON of an answer; POST if there is a body."""
        content = json.dumps(body).encode() if body else None
        try:
            with urllib.request.urlopen(self.url + path, content, timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


def start_in_vain(file, *options, program=(SERVICE,), wrapper=(), **environ):
    """Return the exit code and the stderr of a service that cannot start."""
    process = Process(file, *options, program=program, wrapper=wrapper, **environ)
    pipes = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(process.command, env=process.environ, **pipes)
    assert done.stdout == ""
    return done.returncode, done.stderr


def http(body, headers=LENGTH, version="1.1", close=True):
    """Return the bytes of a POST."""
    last = "Connection: close\r\n" if close else ""
    return f"POST /messages HTTP/{version}\r\nHost: rockets\r\n{headers}{last}\r\n".encode() + body


def sized(body, headers="", **options):
    return http(body, f"Content-Length: {len(body)}\r\n{headers}", **options)


def chunked(body):
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def exchange(process, data):
    """Send bytes over a new connection; return all that comes until the service closes it."""
    received = bytearray()
    with process.connect() as connection, suppress(ConnectionError):
        connection.sendall(data)
        while more := connection.recv(65536):
            received += more
    return bytes(received)


def statuses(received):
    """Return the status of each answer in what was received."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]


def post_together(process, bodies):
    """Post messages in one turn of the service, if each is below 8 KB; return the answers."""
    with ExitStack() as stack:
        with process.paused():
            connections = [stack.enter_context(process.connect()) for _ in bodies]
            for connection, body in zip(connections, bodies, strict=True):
                connection.sendall(sized(json.dumps(body).encode()))
        return [read_answer(connection) for connection in connections]


def read_answer(connection):
    """Return the status and the JSON of the next answer on a connection."""
    answer = HTTPResponse(connection)
    answer.begin()
    return answer.status, json.load(answer)


def post_from_threads(process, bodies):
    """Post each message from a thread of its own; return the status and the JSON of each answer."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(partial(process.request, "/messages"), bodies))


# The state ########################################################################################


def on(channel, body):
    """Return a message on another channel."""
    return body | {"metadata": body["metadata"] | {"channel": channel}}


def test_every_permutation_of_a_life_delivered_twice_ends_the_same(app):
    life = [launch(1), faster(2, 3000), renamed(3), slower(4, 2500), exploded(5)]
    for permutation in permutations(life):
        channel, delivered = str(uuid.uuid4()), []
        for each in permutation:
            delivered.append(on(channel, each))
            assert post(app, delivered[-1], status=202).json == {"status": "applied"}
            assert post(app, delivered[-1], status=202).json == {"status": "duplicate"}
            assert get(app, channel) == fold(delivered)
        assert get(app, channel) == {
            "channel": channel,
            "type": "Falcon-9",
            "speed": 1000,
            "mission": "SHUTTLE_MIR",
            "status": "exploded",
            "explosionReason": "PRESSURE_VESSEL_FAILURE",
            "launchedAt": "2022-02-02T19:00:01+01:00",
            "updatedAt": "2022-02-02T19:00:05+01:00",
            "lastMessageNumber": 5,
            "missingMessages": 0,
        }


ODD = {
    "two launches": [launch(1), launch(4, type="B", launchSpeed=9, mission="B"), renamed(3, "C")],
    "two explosions": [launch(1), exploded(3, "THREE"), exploded(2, "TWO"), slower(4, 700)],
    "after an explosion": [launch(2), exploded(4), faster(7, 3000), renamed(9, "AFTER")],
    "no launch": [faster(3, 1), slower(8, 9), renamed(5, "NO_LAUNCH"), renamed(7, "B")],
    "times run back": [launch(2, at="2022-02-09T00:00:00Z"), faster(4, at="2022-02-07T00:00:00Z")],
    "limits": [launch(2**53 - 1, launchSpeed=2**31 - 1), faster(1, 2**31 - 1), slower(2, 0)],
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_sets_mean_the_same_in_every_order(app, odd):
    for order in permutations(odd):
        channel, delivered = str(uuid.uuid4()), []
        for each in order:
            delivered.append(on(channel, each))
            post(app, delivered[-1], status=202)
            assert get(app, channel) == fold(delivered)


@pytest.mark.parametrize("seed", [1, 2])
def test_shuffled_streams_agree_with_the_fold_after_every_delivery(app, seed):
    rng, sent, known = random.Random(seed), [], {}
    for _ in range(40):
        channel = str(uuid.UUID(int=rng.getrandbits(128)))
        for number in rng.sample(range(1, 60), rng.randint(1, 30)):
            kinds = [
                launch(number, type=rng.choice("AB"), launchSpeed=rng.randrange(9)),
                faster(number, rng.randrange(9000)),
                slower(number, rng.randrange(9000)),
                renamed(number, rng.choice("XYZ")),
                exploded(number, rng.choice("PQR")),
            ]
            sent.append(on(channel, rng.choices(kinds, [2, 4, 4, 3, 1])[0]))
    sent += rng.sample(sent, len(sent) // 10)
    rng.shuffle(sent)
    for delivery in sent:
        channel = delivery["metadata"]["channel"]
        known.setdefault(channel, []).append(delivery)
        post(app, delivery, status=202)
        assert get(app, channel) == fold(known[channel])
    assert app.get("/rockets").json["rockets"] == [fold(known[each]) for each in sorted(known)]


OTHERS = {"content": faster(2, 777), "type": slower(2, 100)}
OTHERS["control characters"] = renamed(2, "777 \x1b[31m\r\nforged \x9b \u2028 \u202e")


@pytest.mark.parametrize("other", OTHERS)
def test_another_message_of_a_known_number_is_a_duplicate_and_a_warning(app, file, caplog, other):
    post(app, faster(2, 100))
    before = dump(file)
    assert post(app, OTHERS[other], status=202).json == {"status": "duplicate"}
    assert dump(file) == before
    ((_, level, said),) = caplog.record_tuples
    assert level == logging.WARNING and said.isprintable()
    kind = OTHERS[other]["metadata"]["messageType"]
    assert "message 2 of " in said and kind in said and ("777" in said or other == "type")


def test_a_redelivery_in_another_spelling_does_not_differ(app, caplog):
    post(app, launch())
    body = launch(channel=CHANNEL.upper(), launchSpeed=500.0, at="2022-02-02T19:00:02+01:00")
    body["message"] = dict(reversed(body["message"].items()))
    assert post(app, body).json == {"status": "duplicate"}
    assert not caplog.records


# Validation #######################################################################################


def edited(path, value):
    """Return a launch in which a field has another value; none at all if it is ... ."""
    body = launch()
    *parents, name = path.split(".")
    holder = body[parents[0]] if parents else body
    holder[name] = value
    if value is ...:
        del holder[name]
    return body


def with_extra(content):
    """Return the bytes of a launch that has one more field, with this content."""
    return VALID.replace(b"500", b'500, "extra": ' + content)


def of_type(kind, content):
    return json.dumps(message(1, kind, content)).encode()


def short(words):
    """Return the id of a test."""
    return words.replace(CHANNEL, "channel")[:40]


WHOLE = "a whole number from"
TIME = "an RFC 3339 time with an offset and no leap second, such as 2022-02-02T19:39:05+01:00"
NAME = "a text of 1 to 256 characters, no NUL, no lone surrogate"
RULES = {
    "metadata": "an object",
    "message": "an object",
    "metadata.channel": "a UUID",
    "metadata.messageNumber": f"{WHOLE} 1 to 9007199254740991",
    "metadata.messageTime": TIME,
    "metadata.messageType": f"one of {', '.join(KINDS)}",
    "message.type": NAME,
    "message.launchSpeed": f"{WHOLE} 0 to 2147483647",
    "message.mission": NAME,
}
WRONG = {path: [..., None, True, False, [], 5.5, 7e99, "" if "." in path else 7] for path in RULES}
WRONG["metadata.messageNumber"] += ["7", {}, 0, -1, 2**53, 2.0**53, 10**400]
WRONG["message.launchSpeed"] += ["7", {}, -1, 2**31]
WRONG["message.type"] += [7, {}, "x" * 257, "a\0b", "\ud800", "\udfff"]
WRONG["message.mission"] += WRONG["message.type"]
WRONG["metadata.channel"] += [f"{CHANNEL}0", CHANNEL[:-1] + "g", f" {CHANNEL}", f"{{{CHANNEL}", 7]
WRONG["metadata.channel"] += [CHANNEL[:at] + CHANNEL[at + 1 :] for at in (8, 13, 18, 23)]
WRONG["metadata.channel"] += [f"{CHANNEL}}}", "1_" * 16, {}]
WRONG["metadata.channel"] += [f"193270a9c-9cf{CHANNEL[13:]}", CHANNEL.replace("1", "\uff11")]
WRONG["metadata.messageType"] += ["rocketlaunched", "RocketLanded", "RocketLaunched ", 7, {}]
WRONG["metadata.messageTime"] += """
    2022-02-02T19:39:05 2022-02-02 2022-13-02T19:39:05Z 2022-02-30T19:39:05Z 2022-02-02T24:00:00Z
    2022-02-02T19:60:05Z 2016-12-31T23:59:60Z 2016-12-31T15:59:60.5-08:00 2022-02-02T19:39:05.Z
    2022-02-02T19:39:05+24:00 2022-02-02T19:39:05+01:60 2022-02-02T19:39:05+0100 2022-2-2T19:39:05Z
    2022-02-02_19:39:05Z 9999-12-31T23:59:59-01:00 0001-01-01T00:00:00+00:01 0000-01-01T00:00:00Z
    \uff12022-02-02T19:39:05Z 2022-02-02T19:39:0\u0665Z 2022-02-02T19:39Z 1643827145""".split()
WRONG["metadata.messageTime"] += [1643827145, f"2022-02-02T19:39:05.{'0' * 236}Z"]
VALID = json.dumps(launch()).encode()
NO_JSON = {
    "must be JSON": [b"", b"{", VALID + b"x", with_extra(b"9" * 5000)],
    "UTF-8": [VALID.decode().encode("utf-16"), VALID.replace(b"ARTEMIS", b"\xff")],
    "the body must be an object, got []": [b"[]"],
    "the body must be an object, got null": [b"null"],
    "NaN": [b"NaN", with_extra(b"NaN"), VALID.replace(b"500", b"NaN")],
    "-Infinity": [VALID.replace(b"{", b'{"extra": -Infinity, ', 1)],
    "finite": [with_extra(b"1e999")],
    "whole characters": [with_extra(rb'"\ud800"')],
    "at most 800 levels": [b"[" * 30_000, b'{"a":' * 10_000, with_extra(b"[" * 799 + b"]" * 799)],
    f"message.reason must be {NAME}, got nothing": [of_type("RocketExploded", {"by": 7})],
    f"message.by must be {WHOLE} 0 to 2147483647, got -1": [
        of_type("RocketSpeedIncreased", {"by": -1}),
        of_type("RocketSpeedDecreased", {"by": -1}),
    ],
    f"message.newMission must be {NAME}, got 7": [
        of_type("RocketMissionChanged", {"newMission": 7}),
    ],
}


@pytest.mark.parametrize("path", [*RULES, *NO_JSON], ids=short)
def test_bad_input_is_named_and_changes_nothing(app, file, path):
    post(app, faster(7))
    before = dump(file)
    for value in WRONG.get(path) or NO_JSON[path]:
        answer = post(app, edited(path, value) if path in RULES else value, status=400)
        assert answer.content_type == "application/problem+json"
        detail = answer.json["detail"]
        assert answer.json == {"title": "Bad Request", "status": 400, "detail": detail}
        got = "nothing" if value is ... else json.dumps(value)[:100] if path in RULES else ""
        assert detail == f"{path} must be {RULES[path]}, got {got}" if got else path in detail
    assert dump(file) == before


def test_a_body_of_64_kib_is_taken_and_a_longer_one_refused(app, file):
    title, detail = "Content Too Large", "the body must be at most 65536 bytes long"
    answer = post(app, VALID.ljust(64 * 1024 + 1), status=413)
    assert answer.json == {"title": title, "status": 413, "detail": detail}
    assert dump(file) == [[], []]
    post(app, VALID.ljust(64 * 1024), status=202)
    with pytest.raises(rockets.HTTPError, match=detail):  # if no Content-Length tells
        rockets.parse_message(VALID.ljust(64 * 1024 + 1))


@pytest.mark.parametrize(
    "content",
    [b"[" * 798 + b"]" * 798, b'{"a":' * 798 + b"1" + b"}" * 798, rb'"\"' + b"[{" * 900 + b'"'],
    ids=["arrays", "objects", "brackets in a text"],
)
def test_800_levels_are_taken_and_brackets_in_a_text_are_none(app, content):
    post(app, with_extra(content), status=202)
    (kept,) = app.get(f"/rockets/{CHANNEL}/messages").json["messages"]
    assert kept["message"]["extra"] == json.loads(content)


def test_a_byte_order_mark_is_skipped(app):
    post(app, b"\xef\xbb\xbf" + VALID, status=202)
    assert get(app) == fold([launch()])


def test_a_coded_body_is_a_415(app, file):
    answer = post(app, VALID, headers={"Content-Encoding": "gzip"}, status=415)
    assert answer.json["detail"] == "the body must come as it is, not as gzip"
    assert (answer.headers["Accept-Encoding"], dump(file)) == ("identity", [[], []])
    post(app, VALID, headers={"Content-Encoding": "identity"}, status=202)
    post(app, VALID, headers={"Content-Encoding": "Identity"}, status=202)


@pytest.mark.parametrize("spelled", ["5", "5.0", "5e0", "50E-1", "0.5e+1"])
def test_a_number_without_a_fraction_is_whole_however_it_is_spelled(app, spelled):
    text = json.dumps(launch(5, launchSpeed=5)).replace(" 5,", f" {spelled},")
    post(app, text.encode(), status=202)
    answer = app.get(f"/rockets/{CHANNEL}").text
    assert '"speed":5,' in answer and '"lastMessageNumber":5,' in answer


TIMES = ["2022-02-02t19:39:05z", "2024-02-29T23:59:59.123456789012-00:00", "0001-01-01T00:00:00Z"]
TIMES += ["9999-12-31T23:59:59+23:59", f"2022-02-02T19:39:05.{'0' * 235}Z"]


@pytest.mark.parametrize("at", TIMES, ids=range(5))
def test_an_rfc_3339_time_is_served_as_sent_but_for_the_case_of_t_and_z(app, at):
    post(app, launch(at=at), status=202)
    (kept,) = app.get(f"/rockets/{CHANNEL}/messages").json["messages"]
    served = get(app)["launchedAt"], get(app)["updatedAt"], kept["metadata"]["messageTime"]
    assert served == (at.upper(),) * 3


SPELLINGS = [CHANNEL.upper(), CHANNEL.replace("-", ""), f"{{{CHANNEL}}}", f"urn:uuid:{CHANNEL}"]
SPELLINGS += [f"URN:UUID:{{{CHANNEL.replace('-', '')}}}"]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=short)
def test_a_channel_may_be_spelled_as_any_uuid(app, spelling):
    post(app, launch(channel=spelling), status=202)
    assert get(app, spelling) == fold([launch()])
    assert post(app, launch()).json == {"status": "duplicate"}


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data", ""])
def test_any_content_type_will_do(app, kind):
    headers = {"Content-Type": kind} if kind else {}
    app.request("/messages", method="POST", body=VALID, headers=headers, status=202)


# The list and the history #########################################################################


def nth(number):
    return str(uuid.UUID(int=number))


def store_five(app):
    """Store five rockets with ties, nulls, times of several offsets and messages that come late."""
    for body in (
        on(nth(1), faster(5, 1, at="2022-02-02T12:00:00.0000005+01:00")),
        on(nth(1), launch(2, at="2022-02-09T00:00:00Z", type="Z", launchSpeed=99, mission="X")),
        on(nth(1), launch(1, at="2022-02-02T11:00:00.50Z", type="B", launchSpeed=4, mission="Q")),
        on(nth(2), launch(at="2022-02-02T12:00:00.5+01:00", type="A", launchSpeed=5, mission="Y")),
        on(nth(3), exploded(2, at="2022-02-02T12:30:00+02:00")),
        on(nth(3), launch(1, at="2022-02-02T06:00:00-06:00", type="A", launchSpeed=9, mission="X")),
        on(nth(4), faster(3, 1, at="2022-02-02T11:00:00.00000041Z")),
        on(nth(5), exploded(1, at="2022-02-02T23:00:00+13:00")),
    ):
        post(app, body, status=202)


def numbers(answer):
    """Return which rockets an answer lists, by the numbers that nth() took."""
    return [uuid.UUID(rocket["channel"]).int for rocket in answer.json["rockets"]]


SORTED = {  # the order of store_five()'s rockets, ascending and descending
    "channel": ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]),
    "type": ([2, 3, 1, 4, 5], [1, 2, 3, 4, 5]),
    "speed": ([1, 2, 3, 4, 5], [3, 1, 2, 4, 5]),
    "mission": ([1, 3, 2, 4, 5], [2, 1, 3, 4, 5]),
    "status": ([1, 2, 4, 3, 5], [3, 5, 4, 1, 2]),
    "launchedAt": ([1, 2, 3, 4, 5], [3, 1, 2, 4, 5]),
    "updatedAt": ([5, 3, 4, 1, 2], [2, 1, 4, 3, 5]),
    "lastMessageNumber": ([2, 5, 3, 4, 1], [1, 4, 3, 2, 5]),
}


@pytest.mark.parametrize("sort", rockets.SORT_KEYS)
def test_rockets_sort_by_every_key_ties_by_channel_and_null_last(app, sort):
    store_five(app)
    for order, expected in zip(rockets.ORDERS, SORTED[sort], strict=True):
        answer = app.get(f"/rockets?sort={sort}&order={order}")
        assert numbers(answer) == expected
        head = {"count": 5, "total": 5, "sortBy": sort, "order": order}
        assert answer.json == head | {"rockets": answer.json["rockets"]}


def test_texts_sort_by_code_point_and_rockets_by_channel_unless_asked_otherwise(app):
    head = {"count": 0, "total": 0, "sortBy": "channel", "order": "asc"}
    assert app.get("/rockets").json == head | {"rockets": []}
    for number, mission in reversed([*enumerate(["Z", "a", "\U0001f680", "\uff5a", "É"], 1)]):
        post(app, launch(channel=nth(number), mission=mission))
    assert numbers(app.get("/rockets")) == [1, 2, 3, 4, 5]
    assert numbers(app.get("/rockets?sort=mission")) == [1, 2, 5, 4, 3]


MATCHING = {"status=exploded": [3, 5], "status=active": [1, 2, 6], "status=awaiting_launch": [4]}
MATCHING |= {"type=A": [2, 3], "mission=X": [1, 3], "mission=X&type=A&status=exploded&q=x": [3]}
MATCHING |= {"mission=Z%C3%BCrich+7": [6], "nobody=knows": [1, 2, 3, 4, 5, 6]}
for nothing in "type=a mission=z%C3%BCrich+7 mission=%25 mission=_ mission= mission=%00".split():
    MATCHING[nothing] = []
MATCHING |= {"mission=%ff": [], "mission=x'%20OR%20'1'='1": []}


def test_filters_leave_what_is_equal_to_all_of_them(app):
    store_five(app)
    post(app, launch(channel=nth(6), type="C", mission="Zürich 7"))
    for query, expected in MATCHING.items():
        answer = app.get(f"/rockets?{query}")
        assert (query, numbers(answer)) == (query, expected)
        assert answer.json["count"] == answer.json["total"] == len(expected)


FOUND_BY = {"strasse": [1, 2], "STRAßE": [1, 2], "falcon-9": [2, 4], "00000000000A": [10]}
FOUND_BY |= {"%": [2], "_": [3], "\\": [4], "\0": [], "": [1, 2, 3, 4, 5, 10]}
FOUND_BY |= {"é": [3], "E\u0301": [4]}  # the second with an accent of its own
FOUND_BY |= {"k2": [5]}  # the letter; the mission has the sign of Kelvin
FOUND_BY |= {"9strasse": []}  # a type and the mission behind it


def test_q_finds_a_part_of_channel_type_or_mission_whatever_the_case(app):
    for number, mission in enumerate(["Straße", "STRASSE 50%", "É_a", "e\u0301\\", "\u212a2"], 1):
        kind = "FALCON-9" if number in (2, 4) else "Atlas"
        post(app, launch(channel=nth(number), type=kind, mission=mission))
    post(app, exploded(1, "STRASSE", channel=nth(10)))
    for part, expected in FOUND_BY.items():
        assert (part, numbers(app.get("/rockets", {"q": part}))) == (part, expected)


def following(app, path):
    """Return the answer from a path, and those that its Link and theirs lead to."""
    answers = [app.get(path)]
    while (link := answers[-1].headers.get("Link")) and len(answers) < 9:
        answers.append(app.get(re.fullmatch('<(/.*)>; rel="next"', link)[1]))
    return answers


def test_pages_neither_skip_nor_repeat_and_link_to_the_next(app):
    store_five(app)
    for size in range(1, 7):
        pages = following(app, f"/rockets?sort=status&limit={size}")
        assert sum(map(numbers, pages), []) == SORTED["status"][0]
        assert [page.json["total"] for page in pages] == [5] * -(-5 // size)
        assert [page.json["count"] for page in pages] == [len(numbers(page)) for page in pages]


@pytest.mark.parametrize("query", ["limit=0", "offset=5", "offset=9007199254740991", "q=nowhere"])
def test_an_empty_page_tells_how_many_match_and_has_no_link(app, query):
    store_five(app)
    answer = app.get(f"/rockets?{query}")
    head = {"count": 0, "total": 0 if "q" in query else 5, "sortBy": "channel", "order": "asc"}
    assert (answer.json, "Link" in answer.headers) == (head | {"rockets": []}, False)


def store_all(store, bodies):
    with store.transaction():
        for body in bodies:
            store.apply(rockets.parse_message(json.dumps(body).encode()))


def test_10000_rockets_are_one_answer_and_more_are_linked_to_with_the_same_query(app, store):
    missions = ["none"] * 10 + ["É & é"] * 10_010
    each = enumerate(missions)
    store_all(store, (launch(channel=nth(n), launchSpeed=n % 7, mission=name) for n, name in each))
    query = "q=%C3%A9+%26&sort=speed&order=desc&mission=%C3%89+%26+%C3%A9&status=active&x=y"
    first, second = following(app, f"/rockets?{query}")
    expected = sorted(range(10, 10_020), key=lambda number: (-(number % 7), number))
    assert (numbers(first), numbers(second)) == (expected[:10_000], expected[10_000:])
    heads = [[page.json[key] for key in ("total", "sortBy", "order")] for page in (first, second)]
    assert heads == [[10_010, "speed", "desc"]] * 2


MESSAGES = f"/rockets/{CHANNEL}/messages"
BAD = {
    "/rockets?sort=age": f'sort must be one of {", ".join(SORTED)}, got "age"',
    "/rockets?sort=SPEED": "sort must be one of",
    "/rockets?sort=speed;DROP TABLE rockets": "sort must be one of",
    "/rockets?order=up": 'order must be one of asc, desc, got "up"',
    "/rockets?status=lost": f"status must be one of {', '.join(rockets.STATUSES)}, got",
    "/rockets?limit=-1": f'limit must be {WHOLE} 0 to 10000, got "-1"',
    "/rockets?limit=10001": f"limit must be {WHOLE} 0 to 10000",
    "/rockets?limit=%D9%A1": f"limit must be {WHOLE}",
    "/rockets?limit=" + "9" * 5000: f"limit must be {WHOLE}",
    "/rockets?offset=9007199254740992": f"offset must be {WHOLE} 0 to 9007199254740991",
    "/rockets?limit=1&limit=2": "only once",
    "/rockets?x=1&x=": "only once",
    f"{MESSAGES}?limit=10001": f"limit must be {WHOLE} 0 to 10000",
    f"{MESSAGES}?after=x": f"after must be {WHOLE} 0 to 9007199254740991",
    "/rockets/apollo": 'channel must be a UUID, got "apollo"',
    "/rockets/apollo/messages": "channel must be a UUID",
}


def test_a_bad_parameter_is_named_with_what_it_may_be(app):
    for path, words in BAD.items():
        answer = app.get(path, headers={"If-None-Match": "*"}, status=400)
        assert answer.content_type == "application/problem+json"
        assert words in answer.json["detail"]


def test_history_is_what_was_posted_in_the_order_of_numbers(app):
    first = launch(2, extra={"kept": [1, "é", None, 0.5, 2**70]}, at="2023-01-01T00:00:00Z")
    second, third = faster(4, 1), renamed(9, "B", at="2022-02-02T19:39:05.10+01:00")
    for body in (third, first, second, launch(1, channel=OTHER)):
        post(app, body)
    for query, messages in {
        "": [first, second, third],
        "?after=2&limit=1": [second],
        "?after=2": [second, third],
        "?after=9": [],
        "?limit=0": [],
    }.items():
        answer = {"channel": CHANNEL, "count": len(messages), "messages": messages}
        assert app.get(f"{MESSAGES}{query}").json == answer


def test_history_has_1000_messages_unless_asked_otherwise(app, store):
    store_all(store, map(faster, range(1, 10_002)))
    assert app.get(MESSAGES).json["count"] == 1000
    assert app.get(f"{MESSAGES}?limit=10000").json["count"] == 10_000


def test_a_page_of_history_ends_early_where_it_would_be_too_large(app, store):
    bodies = [launch(number, pad=str(number % 10) * 60_000) for number in range(1, 151)]
    store_all(store, bodies)
    seen, pages = [], 0
    while page := app.get(f"{MESSAGES}?limit=10000&after={len(seen)}").json["messages"]:
        assert 0 <= len(json.dumps(page[:-1])) <= rockets.MAX_HISTORY
        seen, pages = seen + page, pages + 1
    assert (seen, pages) == (bodies, 3)


# HTTP #############################################################################################

OF_THE_STATE = ["/rockets", f"/rockets/{CHANNEL}", MESSAGES]
GETS = [*OF_THE_STATE, "/health", "/metrics", "/openapi.json", "/"]
ELSEWHERE = {"Origin": "http://elsewhere.example"}
FOREIGN = {"Sec-Fetch-Site": "cross-site"}


@pytest.mark.parametrize("path", [*OF_THE_STATE[1:], "/nowhere", "/rockets/"], ids=short)
def test_what_is_unknown_is_a_404(app, path):
    answer = app.get(path, headers={"If-None-Match": "*"}, status=404)
    assert (answer.content_type, answer.json["title"]) == ("application/problem+json", "Not Found")
    assert "ETag" not in answer.headers


def test_a_wrong_method_is_a_405_that_names_the_right_ones(app):
    answer = app.get("/messages", status=405)
    title, detail = "Method Not Allowed", "/messages takes POST, not GET"
    assert answer.json == {"title": title, "status": 405, "detail": detail}
    assert answer.headers["Allow"] == "POST"
    assert app.delete("/rockets", status=405).headers["Allow"] == "GET,HEAD"


@pytest.mark.parametrize("path", OF_THE_STATE, ids=short)
def test_a_get_is_a_304_until_something_is_stored(app, path):
    post(app, launch())
    tag = app.get(path, status=200).headers["ETag"]
    post(app, launch(), status=202)
    post(app, launch(mission="ANOTHER"), status=202)
    post(app, faster(0), status=400)
    for held in (tag, f"W/{tag}", f'"x", {tag}', f'{tag},"x"', "*"):
        answer = app.get(path, headers={"If-None-Match": held}, status=304)
        assert (answer.body, answer.headers["ETag"]) == (b"", tag)
    for held in ('"x"', tag.strip('"'), ""):
        app.get(path, headers={"If-None-Match": held}, status=200)
    post(app, launch(channel=OTHER), status=202)
    assert app.get(path, headers={"If-None-Match": tag}, status=200).headers["ETag"] != tag


@pytest.mark.parametrize("path", OF_THE_STATE, ids=short)
def test_a_tag_does_not_outlive_what_another_process_stores(app, file, path):
    post(app, launch())
    with closing(rockets.Store(str(file))) as other:
        tag = app.get(path).headers["ETag"]
        app.get(path, headers={"If-None-Match": tag}, status=304)
        store_all(other, [faster(2)])
        assert app.get(path, headers={"If-None-Match": tag}, status=200).headers["ETag"] != tag
    assert get(app) == fold([launch(), faster(2)])


def test_a_tag_does_not_outlive_a_restart(file):
    tags = []
    for _ in range(3):
        with closing(rockets.Store(str(file))) as store:
            app = TestApp(rockets.create_app(store))
            post(app, launch())
            held = {"If-None-Match": ", ".join(tags)}
            tags.append(app.get("/rockets", headers=held, status=200).headers["ETag"])
    assert len(set(tags)) == 3


def test_a_tag_fits_the_address_that_it_is_from_alone(app):
    post(app, launch())
    paths = [*OF_THE_STATE, "/rockets?limit=1", "/rockets?limit=2", "/openapi.json", "/"]
    tags = {path: app.get(path).headers["ETag"] for path in paths}
    for path, tag in tags.items():
        others = ", ".join(tags[other] for other in paths if other != path)
        app.get(path, headers={"If-None-Match": others}, status=200)
        app.get(path, headers={"If-None-Match": tag}, status=304)


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_what_tells_of_the_service_has_no_tag(app, path):
    assert "ETag" not in app.get(path, headers={"If-None-Match": "*"}, status=200).headers


def test_the_tag_of_a_static_file_stands_for_its_content(store, tmp_path, monkeypatch):
    def tags():
        app = TestApp(rockets.create_app(store))
        return [app.get(path).headers["ETag"] for path in ("/", "/openapi.json")]

    before = tags()
    assert tags() == before
    monkeypatch.setattr(rockets, "STATIC", shutil.copytree(rockets.STATIC, tmp_path / "static"))
    assert tags() == before
    for file in ("dashboard.html", "openapi.json"):
        (rockets.STATIC / file).write_text("changed")
    assert not set(tags()) & set(before)


@pytest.mark.parametrize("path", [each for each in GETS if each != "/metrics"], ids=short)
def test_head_has_the_headers_of_get_and_no_body(app, path):
    store_five(app)
    post(app, launch())
    whole, head = app.get(f"{path}?limit=1"), app.head(f"{path}?limit=1")
    assert (head.body, dict(head.headers)) == (b"", dict(whole.headers))
    assert int(head.headers["Content-Length"]) == len(whole.body)


@pytest.mark.parametrize("path", GETS, ids=short)
def test_any_page_may_read_and_asks_again_each_time(app, path):
    post(app, launch())
    kinds = {"/": "text/html; charset=utf-8"}
    kinds["/metrics"] = "text/plain; version=0.0.4; charset=utf-8"
    headers = dict(app.get(path, headers=ELSEWHERE).headers)
    assert ("Etag" in headers) == (path not in ("/health", "/metrics"))
    assert {name: headers[name] for name in headers if name not in ("Etag", "Content-Length")} == {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Expose-Headers": "ETag, Link",
        "Cache-Control": "no-cache",
        "Content-Type": kinds.get(path, "application/json"),
        "X-Content-Type-Options": "nosniff",
    }


@pytest.mark.parametrize("path", GETS, ids=short)
def test_a_page_of_another_site_may_ask_whether_anything_has_changed(app, path):
    asked = {"Access-Control-Request-Method": "GET"}
    asked["Access-Control-Request-Headers"] = "if-none-match"
    answer = app.options(path, headers=ELSEWHERE | asked, status=204)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Access-Control-Allow-Headers"] == "*"
    assert (answer.headers["Allow"], answer.body) == ("GET,HEAD", b"")


def test_an_error_of_a_get_may_be_read_by_any_page_and_what_becomes_of_a_post_by_none(app):
    for path, status in {"/nowhere": 404, "/rockets?sort=x": 400}.items():
        assert app.get(path, status=status).headers["Access-Control-Allow-Origin"] == "*"
    answers = [post(app, launch(), status=202), post(app, b"", status=400)]
    answers += [post(app, launch(), headers=FOREIGN, status=403)]
    answers += [app.post("/rockets", status=405), app.post("/nowhere", status=404)]
    answers += [app.options("/messages", headers=ELSEWHERE, status=204)]
    for answer in answers:
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not answers[-1].headers["Access-Control-Allow-Headers"]


MAY_POST = [{}, {"Origin": "http://localhost:80"}, {"Sec-Fetch-Site": "none"}]
MAY_POST += [ELSEWHERE | {"Sec-Fetch-Site": "same-origin"}]
MAY_NOT = [FOREIGN, {"Sec-Fetch-Site": "same-site"}, FOREIGN | {"Origin": "http://localhost:80"}]
MAY_NOT += [{"Origin": f"http://{host}"} for host in ("x.example", "localhost:81", "localhost")]
MAY_NOT += [{"Origin": "null"}]


def test_only_the_own_page_may_post(app, file):
    for headers in MAY_NOT:
        answer = post(app, launch(), headers=headers, status=403)
        assert answer.json["detail"] == "a page of another site must not post messages"
    assert dump(file) == [[], []]
    for headers in MAY_POST:
        post(app, launch(), headers=headers, status=202)


# Failures #########################################################################################


def fail(app, file):
    """Post a message while another process holds the lock; return the answer."""
    with locked(file):
        answer = post(app, launch(), status=503)
        app.get("/rockets", status=200)
    return answer


def test_under_a_lock_a_message_is_a_503_at_once_and_gets_go_on(app, file):
    began = time.perf_counter()
    detail = "the database is not available: database is locked"
    detail += "; try again (messages count only once)"
    answer = fail(app, file).json
    assert time.perf_counter() - began < rockets.BUSY_TIMEOUT
    assert answer == {"title": "Service Unavailable", "status": 503, "detail": detail}
    assert post(app, launch(), status=202).json == {"status": "applied"}


def test_every_503_tells_when_to_try_again(app, file):
    held = {"If-None-Match": app.get("/rockets").headers["ETag"]}
    aside = file.rename(file.with_name("aside"))
    answers = [app.get(path, headers=held, status=503) for path in GETS[:5]]
    answers.append(post(app, launch(), status=503))
    for answer in answers:
        assert answer.content_type == "application/problem+json"
        assert answer.headers["Retry-After"] == "1"
    aside.rename(file)
    app.get("/rockets", status=200)


@pytest.mark.parametrize("moment", ["COMMIT", "SELECT CAST(json"])
def test_a_database_that_goes_while_a_statement_runs_is_a_503(app, store, file, moment):
    post(app, launch())
    aside = file.with_name("aside")

    def move(sql):
        if sql.startswith(moment) and file.exists():
            file.rename(aside)

    store.connection.set_trace_callback(move)
    if moment.startswith("SELECT"):
        app.get(f"/rockets/{CHANNEL}", status=503)
    else:
        post(app, faster(2), status=503)
    store.connection.set_trace_callback(None)
    aside.rename(file)
    post(app, faster(2), status=202)
    assert get(app) == fold([launch(), faster(2)])


MISTAKES = ["SELECT nothing FROM rockets", "SELECT :nobody", "INSERT"]
MISTAKES += ["INSERT INTO messages (channel) VALUES (:channel)"]  # breaks a NOT NULL


@pytest.mark.parametrize("sql", MISTAKES)
def test_a_mistake_in_our_own_sql_is_a_500_with_a_traceback(app, monkeypatch, sql):
    monkeypatch.setattr(rockets, "SELECT_ROCKET", sql)
    answer = app.get(f"/rockets/{CHANNEL}", expect_errors=True)
    title = "Internal Server Error"
    assert answer.json == {"title": title, "status": 500, "detail": title}
    assert "Traceback" in answer.errors


def test_health_tells_of_a_failure_until_a_new_message_is_stored(app, file):
    store_five(app)
    assert app.get("/health").json == {"status": "ok", "rockets": 5, "messages": 8}
    fail(app, file)
    store_five(app)  # all duplicates, which need no room
    post(app, b"", status=400)
    assert "could not be stored" in app.get("/health", status=503).json["detail"]
    post(app, launch(), status=202)
    assert app.get("/health").json == {"status": "ok", "rockets": 6, "messages": 9}


def test_health_tells_of_a_failure_for_a_while_and_another_one_prolongs_it(app, file, monkeypatch):
    fail(app, file)
    first = time.perf_counter()
    app.get("/health", status=503)
    wait_until(lambda: time.perf_counter() > first + 1)
    monkeypatch.setattr(rockets, "FAILURE_SHOWN", 1)
    app.get("/health", status=200)
    fail(app, file)
    monkeypatch.setattr(rockets, "FAILURE_SHOWN", time.perf_counter() - first)
    app.get("/health", status=503)


def test_an_outage_is_two_lines_in_the_log(app, file, caplog):
    fail(app, file)
    fail(app, file)
    post(app, launch())
    post(app, faster(2))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "messages can't be stored: 'database is locked'"),
        ("WARNING", "messages are stored again"),
    ]


def test_what_is_rolled_back_is_neither_stored_nor_counted_nor_logged(app, store, file, caplog):
    post(app, launch())
    before = read_metrics(app)
    with pytest.raises(OSError, match="no room"), store.transaction():
        post(app, faster(2), status=202)
        post(app, launch(mission="ANOTHER"), status=202)
        raise OSError("no room")
    assert (read_metrics(app), caplog.messages, len(dump(file)[1])) == (before, [], 1)
    assert post(app, faster(2)).json == {"status": "applied"}


# The metrics ######################################################################################


def read_metrics(app):
    """Return the values of /metrics by name."""
    lines = [line for line in app.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_count_what_became_of_every_message(app, store, file):
    store_five(app)
    with store.transaction():
        post(app, launch())
        post(app, faster(4))
    for body in (launch(), launch(mission="ANOTHER"), launch(type="ANOTHER")):
        post(app, body, status=202)
    for body, status in {b"{}": 400, b"": 400, VALID.ljust(70_000): 413}.items():
        post(app, body, status=status)
    post(app, faster(5), headers=FOREIGN, status=403)
    fail(app, file)
    metrics = read_metrics(app)
    assert 0 <= time.time() - metrics.pop("process_start_time_seconds") < 600
    assert {name: metrics[name] for name in metrics if "duration" not in name} == {
        'rockets_messages_total{outcome="applied"}': 10,
        'rockets_messages_total{outcome="duplicate"}': 1,
        'rockets_messages_total{outcome="conflicting"}': 2,
        'rockets_messages_total{outcome="rejected"}': 4,
        'rockets_messages_total{outcome="failed"}': 1,
        "rockets_commits_total": 9,
        'rockets_fleet{status="active"}': 3,
        'rockets_fleet{status="awaiting_launch"}': 1,
        'rockets_fleet{status="exploded"}': 2,
        "rockets_missing_messages": 6,
        f'rockets_build_info{{version="{rockets.VERSION}"}}': 1,
    }


def test_metrics_have_their_types_and_no_status_is_left_out(app):
    text = app.get("/metrics").text
    types = dict(re.findall(r"^# HELP (\w+) \w.*\n# TYPE \1 (\w+)$", text, re.MULTILINE))
    assert types == {
        "rockets_messages_total": "counter",
        "rockets_commits_total": "counter",
        "rockets_post_duration_seconds": "histogram",
        "rockets_fleet": "gauge",
        "rockets_missing_messages": "gauge",
        "rockets_build_info": "gauge",
        "process_start_time_seconds": "gauge",
    }
    fleet = re.findall(r'^rockets_fleet{status="(\w+)"} 0$', text, re.MULTILINE)
    assert fleet == list(rockets.STATUSES)
    assert text.endswith("\n")


def test_metrics_add_up_any_number_of_missing_messages(app, store):
    store_all(store, (faster(2**53 - 1, channel=nth(number)) for number in range(1025)))
    assert read_metrics(app)["rockets_missing_messages"] >= 2**63 - 1  # more is not shown


def test_a_post_duration_is_in_every_bucket_up_to_it_and_holds_the_commit(app, store):
    began = time.perf_counter()
    with store.transaction():
        post(app, launch())
        answered = time.perf_counter()
        wait_until(lambda: time.perf_counter() > answered + 0.06)
    longest, name = time.perf_counter() - began, "rockets_post_duration_seconds"
    found = {key: value for key, value in read_metrics(app).items() if key.startswith(name)}
    seconds = found[f"{name}_sum"]
    assert 0.06 < seconds < longest
    bounds = "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 +Inf".split()
    expected = {f'{name}_bucket{{le="{bound}"}}': seconds <= float(bound) for bound in bounds}
    assert found == expected | {f"{name}_sum": seconds, f"{name}_count": 1}
    post(app, faster(2))
    assert read_metrics(app)[f"{name}_sum"] > seconds


# The description of the API #######################################################################

API = json.loads((rockets.STATIC / "openapi.json").read_text())
PARTS = API["components"]
SCHEMAS, EXAMPLES = PARTS["schemas"], PARTS["examples"]
OPERATIONS = {
    (path, method): operation
    for path, methods in API["paths"].items()
    for method, operation in methods.items()
}
CANDIDATES = [None, True, [], {}, 0, -1, 1, 7.0, 7.5, "7", 2**31 - 1, 2**31, 2.0**53 - 1, 2**53]
CANDIDATES += ["", "x", "é" * 256, "é" * 257, "a\0b", *SPELLINGS, CHANNEL[1:], f"{{{CHANNEL}"]
CANDIDATES += [CHANNEL.replace("-", "", 1), f"uuid:{CHANNEL}", *KINDS, "Rocket", *TIMES]
CANDIDATES += ["2022-02-02T19:39:05", "2016-12-31T23:59:60Z", f"2022-02-02T19:39:05.{'0' * 236}Z"]
CANDIDATES += ["2022-02-02T24:00:00Z", "2022-02-02T19:39:05+24:00", "2022-02-02T19:60:05Z"]
ASKED_FOR = ["", "x", "-1", "0", "1", "7.0", "1000", "10000", "10001", str(2**53 - 1), str(2**53)]
ASKED_FOR += [*rockets.SORT_KEYS, *rockets.ORDERS, *rockets.STATUSES, "é%_'\"\0"]
ASKED_FOR += ["é" * 256, "9" * 257]


def resolved(part):
    """Return a part of the description, or what it refers to, with what stands beside that."""
    while "$ref" in part:
        found, part = API, dict(part)
        for step in part.pop("$ref").split("/")[1:]:
            found = found[step]
        part = found | part
    return part


def is_a(value, kind):
    """Tell whether a value has a type, as JSON Schema has it."""
    if kind == "integer":
        return type(value) is int or (type(value) is float and value.is_integer())
    return type(value) is {"string": str, "object": dict, "array": list, "null": type(None)}[kind]


def differences(value, schema, where="body"):
    """Return, in words, where a value breaks a schema. A key that is not named there is a fault."""
    schema = resolved(schema)
    assert schema.keys() & {"type", "const", "anyOf"}, f"{where} may be anything"
    kinds = [schema["type"]] if type(schema.get("type")) is str else schema.get("type", [])
    if kinds and not any(is_a(value, kind) for kind in kinds):
        return [f"{where} is no {kinds}, but {value!r}"]
    found = [value in schema.get("enum", [value]), value == schema.get("const", value)]
    if type(value) is str:
        found.append(re.search(schema.get("pattern", ""), value))
        found.append(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**6))
    if type(value) in (int, float):
        found.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if "anyOf" in schema:
        found.append([] in [differences(value, choice, where) for choice in schema["anyOf"]])
    items = value if "items" in schema else ()
    parts = [(each, schema["items"], f"{where}[]") for each in items]
    if inside := schema.get("properties"):
        found.append(set(schema["required"]) <= set(value) <= set(inside))
        parts = [(value[key], inside[key], f"{where}.{key}") for key in set(value) & set(inside)]
    deeper = [fault for part in parts for fault in differences(*part)]
    return [f"{where} is {value!r}"] * (not all(found)) + deeper


def test_the_description_names_every_route_and_no_other(app):
    assert app.get("/openapi.json").json == API
    assert API["info"]["version"] == rockets.VERSION
    routes = [(each.rule, each.method.lower()) for each in app.app.routes]
    described = [(re.sub("{(.*?)}", r"<\1>", path), method) for path, method in OPERATIONS]
    assert sorted(described) == sorted(routes)
    for (path, method), operation in OPERATIONS.items():
        parameters = [resolved(each) for each in operation.get("parameters", [])]
        required = [(each["in"], each["name"]) for each in parameters if each.get("required")]
        assert required == [("path", name) for name in re.findall("{(.*?)}", path)]
        conditional = "If-None-Match" in [each["name"] for each in parameters]
        assert conditional == ("304" in operation["responses"])
        assert operation.get("requestBody", {}).get("required", False) == (method == "post")


def test_the_links_of_the_description_lead_to_what_was_posted(app):
    by_id = {operation["operationId"]: path for (path, _), operation in OPERATIONS.items()}
    assert len(by_id) == len(OPERATIONS)
    post(app, launch())
    source = {"channel": "$request.body#/metadata/channel"}
    for link in OPERATIONS["/messages", "post"]["responses"]["202"]["links"].values():
        path = by_id[link["operationId"]]
        assert link["parameters"] == source and "{channel}" in path
        app.get(path.format(channel=CHANNEL), status=200)


LIMITS = {
    r"([\d,]+) bytes": rockets.MAX_BODY,
    r"(\d+) levels": rockets.MAX_DEPTH,
    r"up to ([\d,]+) in one answer": rockets.MAX_PAGE,
    r"text of 1 to (\d+) characters": rockets.MAX_TEXT,
    r"(\d+) MiB": rockets.MAX_HISTORY // 1024**2,
    r"for (\d+) seconds": rockets.FAILURE_SHOWN,
    r"headers of (\d+) KiB": 256,  # waitress's own limit
}


def test_the_limits_in_the_prose_of_the_description_are_those_of_the_code():
    for words, limit in LIMITS.items():
        found = re.findall(words, json.dumps(API))
        assert (words, {int(each.replace(",", "")) for each in found}) == (words, {limit})


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_may_have_what_the_description_says_and_no_more(app, kind):
    body = copy.deepcopy(EXAMPLES[kind]["value"])
    for part in ("metadata", "message"):
        described = SCHEMAS[kind]["properties"][part]
        assert list(described["properties"]) == list(body[part]) == described["required"]
        for field, schema in described["properties"].items():
            sent = body[part].pop(field)
            post(app, body, status=400)
            expected = {202: [], 400: []}
            for value in CANDIDATES:
                expected[400 if differences(value, schema) else 202].append(value)
            assert all(expected.values())
            for status, values in expected.items():
                for value in values:
                    if field != "messageType" or value not in list(KINDS) or status == 202:
                        post(app, body | {part: body[part] | {field: value}}, status=status)
            body[part][field] = sent


@pytest.mark.parametrize("path", ["/rockets", "/rockets/{channel}/messages"])
def test_a_query_may_have_what_the_description_says_and_no_more(app, path):
    parameters = [resolved(each) for each in OPERATIONS[path, "get"]["parameters"]]
    query = {each["name"]: each["schema"] for each in parameters if each["in"] == "query"}
    defaults = {name: schema["default"] for name, schema in query.items() if "default" in schema}
    rules, code = rockets.LIST_QUERY, rockets.LIST_DEFAULTS
    if path != "/rockets":
        rules, code = rockets.HISTORY_QUERY, rockets.HISTORY_DEFAULTS
    assert (list(query), defaults) == (list(rules), code)
    post(app, launch())
    for name, schema in query.items():
        is_number = resolved(schema)["type"] == "integer"
        for asked in ASKED_FOR:
            value = int(asked) if is_number and re.fullmatch("-?[0-9]+", asked) else asked
            status = 400 if differences(value, schema) else 200
            app.get(path.format(channel=CHANNEL), {name: asked}, status=status)


def test_a_channel_may_be_asked_for_as_the_description_says(app):
    schema = PARTS["parameters"]["channel"]["schema"]
    for spelling in [each for each in CANDIDATES if type(each) is str and each]:
        status = 400 if differences(spelling, schema) else 404
        app.get(f"/rockets/{quote(spelling)}", status=status)
        app.get(f"/rockets/{quote(spelling)}/messages", status=status)


def test_the_examples_of_the_description_are_true(app):
    body = OPERATIONS["/messages", "post"]["requestBody"]["content"]["application/json"]
    assert set(body["examples"]) == set(KINDS)
    for example in body["examples"].values():
        assert differences(resolved(example)["value"], body["schema"]) == []
        post(app, resolved(example)["value"], status=202)
    queries = {"/rockets": "?sort=speed&order=desc", "/rockets/{channel}/messages": "?limit=1"}
    for path in ("/rockets", "/rockets/{channel}", *list(queries)[1:], "/health", "/metrics"):
        answer = app.get(path.format(channel=CHANNEL) + queries.get(path, ""))
        content = OPERATIONS[path, "get"]["responses"]["200"]["content"][answer.content_type]
        (example,) = map(resolved, content["examples"].values())
        assert example["value"] in (answer.text if path == "/metrics" else [answer.json])
        assert path not in queries or example["summary"] == f"`{queries[path]}`"
    link, tag = PARTS["headers"]["Link"], PARTS["headers"]["ETag"]
    assert differences(link["example"], link["schema"]) == []
    assert differences(PARTS["parameters"]["ifNoneMatch"]["example"], tag["schema"]) == []


DESCRIBED = ("ETag", "Link", "Retry-After", "Accept-Encoding")


def check_described(answer, operation):
    """Check the body and the headers of an answer against the description of an operation."""
    described = resolved(operation["responses"][str(answer.status_int)])
    content = described.get("content", {"": {"schema": {"const": ""}}})
    schema = content[answer.content_type or ""]["schema"]
    is_json = (answer.content_type or "").endswith("json")
    if schema != {"type": "object"}:  # which the description itself is
        assert differences(answer.json if is_json else answer.text, schema) == []
    headers = {name: resolved(each) for name, each in described.get("headers", {}).items()}
    told = {name for name in DESCRIBED if name in answer.headers}
    required = {name for name, header in headers.items() if header.get("required")}
    assert required <= told <= set(headers)
    for name in told:
        is_number = headers[name]["schema"].get("type") == "integer"
        value = answer.headers[name]
        assert differences(int(value) if is_number else value, headers[name]["schema"]) == []


def test_every_answer_is_as_described(app, file):
    seen, said = set(), []

    def ask(path, status, query="", channel=CHANNEL, method="get", **options):
        url = path.format(channel=channel) + query
        answer = app.request(url, method=method.upper(), status=status, **options)
        check_described(answer, OPERATIONS[path, method])
        seen.add((path, method, str(status)))
        said.extend([answer.json] if status >= 400 else [])
        return answer

    def send(status, body, **headers):
        options = {"body": body, "headers": headers, "method": "post"}
        return ask("/messages", status, **options).json

    bodies = [json.dumps(EXAMPLES[kind]["value"]).encode() for kind in [*KINDS, *KINDS]]
    receipts = {send(202, body)["status"] for body in bodies}
    assert receipts == set(SCHEMAS["Receipt"]["properties"]["status"]["enum"])
    send(202, json.dumps(faster(2, channel=OTHER)).encode())
    send(400, json.dumps(edited("metadata.messageNumber", "7")).encode())
    send(403, VALID, **FOREIGN)
    send(413, VALID.ljust(70_000))
    send(415, VALID, **{"Content-Encoding": "gzip"})
    for path in set(API["paths"]) - {"/messages"}:
        if tag := ask(path, 200).headers.get("ETag"):
            ask(path, 304, headers={"If-None-Match": tag})
    assert "Link" in ask("/rockets", 200, "?limit=1").headers
    ask("/rockets", 400, "?sort=age")
    for path in ("/rockets/{channel}", "/rockets/{channel}/messages"):
        ask(path, 200, channel=OTHER)
        ask(path, 400, channel="Apollo")
        ask(path, 404, channel=nth(0))
    with locked(file):
        send(503, VALID.replace(b": 1,", b": 9,"))
    file.rename(file.with_name("aside"))
    statuses = {(*each, status) for each in OPERATIONS for status in OPERATIONS[each]["responses"]}
    for path, method, status in statuses:
        if (method, status) == ("get", "503"):
            ask(path, 503)
    assert {each for each in statuses if each[2] != "4XX"} == seen
    for name, response in PARTS["responses"].items():
        for content in response.get("content", {}).values():
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
            assert name == "Malformed" or content["example"] in said


def table(page, name):
    """Return the keys of a table in the script of the dashboard."""
    (rows,) = re.findall(rf"^const {name} = {{\n(.*?)^}};", page, re.DOTALL | re.MULTILINE)
    return [key for key in re.findall(r"^  (\w+):", rows, re.MULTILINE) if key != "__proto__"]


def test_whoever_adds_a_message_type_or_a_status_is_told_what_has_to_follow():
    page = (rockets.STATIC / "dashboard.html").read_text()
    described = [resolved(each)["properties"]["metadata"] for each in SCHEMAS["Message"]["anyOf"]]
    types, statuses = list(rockets.MESSAGE_TYPES), list(rockets.STATUSES)
    for place, found, expected in (
        ("openapi.json", [each["properties"]["messageType"]["const"] for each in described], types),
        ("dashboard.html, EVENTS", table(page, "EVENTS"), types),
        ("KINDS of this file", list(KINDS), types),
        ("openapi.json, Status", SCHEMAS["Status"]["enum"], statuses),
        ("dashboard.html, STATUSES", table(page, "STATUSES"), statuses),
    ):
        assert (place, found) == (place, expected)


# Hostile input ####################################################################################

ODD_VALUES = [*CANDIDATES, 10**30, 1e308, float("nan"), "\ud800", [[[]]], {"a": {"b": 1}}]


def mutated(rng, body):
    """Return the bytes of a message, mostly with something odd in it."""
    for _ in range(rng.choice([0, 0, 1, 2])):
        holder = rng.choice([body, body.get("metadata"), body.get("message")])
        if isinstance(holder, dict) and holder:
            holder[rng.choice([*holder, "extra"])] = rng.choice(ODD_VALUES)
    content = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        place = rng.randrange(len(content))
        junk = rng.choices(b'{}[]",:0123456789eE.-\\ux\0\xff ', k=rng.randint(0, 3))
        content[place : place + rng.randint(0, 3)] = bytes(junk)
    return bytes(content)


def test_no_mutation_of_a_message_is_a_5xx_or_counts_unaccepted(app):
    rng, accepted = random.Random(4), {}
    for _ in range(1500):
        kind, channel = rng.choice(list(KINDS.values())), nth(rng.randint(1, 3))
        content = mutated(rng, kind(rng.randint(1, 50), channel=channel))
        answer = app.post("/messages", content, status="*")
        assert answer.status_int in (202, 400)
        if answer.json["status"] == "applied":
            taken = json.loads(content)
            channel = str(uuid.UUID(taken["metadata"]["channel"].lower()))
            accepted.setdefault(channel, []).append(on(channel, taken))
    assert sum(map(len, accepted.values())) > 50
    listed = app.get("/rockets").json["rockets"]
    assert listed == [fold(accepted[channel]) for channel in sorted(accepted)]


# Command line and start ###########################################################################


def has_ipv6():
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True


with_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def content(folder):
    """Return the name and the bytes of every file in a folder, but for SQLite's shared memory."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".db-shm"}


def raise_limit_of_files():
    """Let this process open as many files as the tests of many connections need."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 < hard < 2000 else 2000, hard))


def test_help_names_every_option_with_its_default():
    done = subprocess.run([sys.executable, SERVICE, "--help"], capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("(default: localhost)", "(default: 8088)", "(default: rockets.db)", "--reset"):
        assert words in text
    assert "HOST, PORT and DATABASE in the environment stand in for the options" in text


@pytest.mark.parametrize("empty", [{}, {"HOST": "", "PORT": "", "DATABASE": ""}])
def test_without_options_it_takes_localhost_8088_and_a_file_in_the_current_folder(tmp_path, empty):
    there = changed(f"import os; os.chdir({str(tmp_path)!r})")
    with Process(None, program=there, **empty | {"PORT": "0"}) as process:
        assert process.url.startswith("http://localhost:")
        assert process.said.endswith(", rockets.db holds 0 rockets and 0 messages\n")
        assert process.stop() == 0
    assert os.listdir(tmp_path) == ["rockets.db"]
    with ExitStack() as stack:
        with suppress(OSError):  # another program has the port, which does as well
            stack.enter_context(socket.create_server(("127.0.0.1", 8088)))
        said = "rockets: cannot listen on 127.0.0.1 port 8088: Address already in use\n"
        assert start_in_vain(None, program=there, **empty) == (1, said)


def test_the_environment_stands_in_for_options(file):
    environ = {"HOST": "127.0.0.1", "PORT": "0", "DATABASE": str(file)}
    with Process(None, **environ) as process:
        assert process.url.startswith("http://127.0.0.1:") and file.exists()
    with Process(None, "--database", f"{file}2", "--host", "localhost", **environ) as process:
        assert process.url.startswith("http://localhost:") and f"{file}2 holds" in process.said


@pytest.mark.parametrize(
    ("options", "environ", "words"),
    [
        ("", {"PORT": "abc"}, "from 0 to 65535, got abc (from PORT in the environment)"),
        ("", {"HOST": "x86_64-conda-linux-gnu"}, "(from HOST in the environment)"),
        ("--host ..a", {"PORT": "0"}, "cannot listen on ..a port 0: "),
        ("", {"PORT": "0", "DATABASE": "/x/y.db"}, "(from DATABASE in the environment)"),
        ("--port -1", {}, "the port must be a whole number from 0 to 65535, got -1\n"),
        ("--port 99999", {"PORT": "7"}, "to 65535, got 99999\n"),
        ("--port abc", {}, "the port must be a whole number from 0 to 65535, got abc\n"),
        ("--host 192.0.2.1 --port 0", {}, "cannot listen on 192.0.2.1 port 0: "),
        ("--threads 4", {}, "unrecognized arguments: --threads 4\n"),
    ],
    ids=range(9),
)
def test_an_option_that_cannot_be_is_one_line_that_names_it(tmp_path, options, environ, words):
    there = changed(f"import os; os.chdir({str(tmp_path)!r})")
    code, said = start_in_vain(None, *options.split(), program=there, **environ)
    assert (code, said.count("\n")) == (1, 1) and said.startswith("rockets: ") and words in said
    assert os.listdir(tmp_path) == []


def test_only_an_error_about_an_option_names_where_that_is_from(file):
    bare = changed("import rockets, pathlib; rockets.STATIC = pathlib.Path('/nowhere')")
    code, said = start_in_vain(None, program=bare, PORT="0", DATABASE=str(file))
    assert code == 1 and "/nowhere" in said and "environment" not in said


def test_every_request_is_logged_if_asked_for(file):
    with Process(file, "--verbose") as process:
        process.request("/messages", launch())
        exchange(process, b"\0")
        assert process.stop() == 0
        lines = [line.split(" ", 2)[2] for line in process.logged().splitlines()]
        assert lines == ["INFO 202 127.0.0.1 b'POST /messages HTTP/1.1'", "INFO 400 127.0.0.1 b''"]


def test_what_was_found_is_said_and_served(file):
    with Process(file) as process:
        process.request("/messages", launch())
        process.request("/messages", faster(2, 3))
        assert process.stop() == 0
    with Process(file) as process:
        found = f"{file} holds 1 rockets and 2 messages"
        assert process.said == f"Rockets listens on {process.url}, {found}\n"
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(), faster(2, 3)]))
        process.stop()
        assert process.logged() == ""


@with_ipv6
def test_localhost_is_ipv4_and_ipv6_and_an_ipv6_address_stands_in_brackets(file):
    with Process(file) as process:
        port = process.url.rpartition(":")[2]
        for process.url in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}"):
            assert process.request("/health")[0] == 200
    with Process(file, "--host", "::1") as process:
        assert process.url.startswith("http://[::1]:")
        assert process.request("/health")[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=with_ipv6)])
def test_a_port_that_is_taken_is_one_line_and_leaves_the_database_alone(file, host):
    fill(file, 2)
    execute(file, "DROP TABLE rockets")  # which a start would make anew
    before = content(file.parent)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        port = str(other.getsockname()[1])
        said = f"rockets: cannot listen on {host} port {port}: Address already in use\n"
        assert start_in_vain(file, "--port", port, "--reset") == (1, said)
    assert content(file.parent) == before


OLD_PYTHON = "import rockets; sys.version_info = (3, 10, 12)"
OLD_SQLITE = "import sqlite3; sqlite3.sqlite_version_info = (3, 37, 2)"


@pytest.mark.parametrize("statement", [OLD_PYTHON, OLD_SQLITE], ids=["Python", "SQLite"])
def test_a_python_or_sqlite_that_is_too_old_is_one_line(file, statement):
    said = "rockets: at least Python 3.11 and SQLite 3.38 are needed\n"
    assert start_in_vain(file, program=changed(statement)) == (1, said)
    assert not file.exists()


def test_it_runs_without_docstrings_and_assertions(file):
    with Process(file, program=("-OO", SERVICE)) as process:
        assert process.request("/messages", launch()) == (202, {"status": "applied"})


def test_it_runs_without_what_windows_lacks(file):
    lacking = "sys.modules['resource'] = None; import select; del select.poll"
    with Process(file, program=changed(lacking)) as process:
        assert post_together(process, [launch(), faster(2, 3)]) == [APPLIED, APPLIED]
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(), faster(2, 3)]))
        assert (process.stop(signal.SIGINT), process.logged()) == (0, "")


APPLIED = (202, {"status": "applied"})
DUPLICATE = (202, {"status": "duplicate"})


def test_reset_starts_from_nothing_but_only_if_all_else_is_there(file):
    with Process(file) as process:
        process.request("/messages", launch())
        process.stop()
    before = content(file.parent)
    bare = changed("import rockets, pathlib; rockets.STATIC = pathlib.Path('/nowhere')")
    code, said = start_in_vain(file, "--reset", program=bare)
    assert (code, said.count("\n")) == (1, 1) and "/nowhere" in said
    assert content(file.parent) == before
    with Process(file, "--reset") as process:
        assert "holds 0 rockets and 0 messages" in process.said
        assert process.request("/rockets")[1]["rockets"] == []
        assert process.request("/messages", launch()) == APPLIED


def test_the_database_may_be_a_symbolic_link(file, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.db"
    link.symlink_to(file)
    for answer in (APPLIED, DUPLICATE):
        with Process(link) as process:
            assert process.request("/messages", launch()) == answer
            process.stop(signal.SIGKILL)
    assert os.listdir(link.parent) == ["link.db"]


# Root may write everything. Nobody may not even import everywhere.
AS_NOBODY = changed("import encodings.idna, os, rockets; os.getuid() or os.setuid(65534)")


@pytest.mark.parametrize("options", [(), ("--reset",)], ids=["start", "reset"])
def test_a_folder_or_a_file_that_may_not_be_written_is_told_from_one_that_is_missing(options):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(os.path.realpath(folder)) / "rockets.db"
        code, said = start_in_vain(file.parent / "missing" / "rockets.db", *options)
        assert (code, said.count("\n")) == (1, 1) and "/missing does not exist" in said
        os.chmod(folder, 0o555)
        code, said = start_in_vain(file, *options, program=AS_NOBODY)
        assert (code, said.count("\n")) == (1, 1) and f"{file.parent} may not be written" in said
        os.chmod(folder, 0o777)
        fill(file, 2)
        os.chmod(file, 0o444)
        code, said = start_in_vain(file, *options, program=AS_NOBODY)
        assert (code, said.count("\n")) == (1, 1) and "may not be written" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_greeting_that_stdout_cannot_take_goes_to_the_log_and_the_service_runs(file):
    full = ("sh", "-c", 'exec "$@" >/dev/full', "sh")
    with Process(file, wrapper=full) as process:
        assert process.request("/messages", launch()) == APPLIED
        assert (process.stop(), process.logged().count("\n")) == (0, 1)
        assert "No space left on device" in process.logged()


def test_a_greeting_with_letters_that_stdout_lacks_is_spelled_with_others(tmp_path):
    with Process(tmp_path / "Mêlée.db", PYTHONIOENCODING="ascii") as process:
        assert "M\\xeal\\xe9e.db holds 0 rockets" in process.said
        assert process.request("/messages", launch()) == APPLIED


def test_it_runs_with_stdout_closed(file):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    process = Process(file, "--port", str(port), wrapper=("sh", "-c", 'exec "$@" >&-', "sh"))
    process.url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(process.command, env=process.environ) as process.popen:
        try:
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            assert process.request("/messages", launch()) == APPLIED
            assert process.stop() == 0
        finally:
            process.popen.kill()


def allow_files(soft, hard):
    return changed(f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))")


def test_too_few_open_files_are_one_line_and_few_are_said(file):
    said = "rockets: too few open files are allowed (ulimit -n is 29)\n"
    assert start_in_vain(file, program=allow_files(29, 29)) == (1, said)
    with Process(file, program=allow_files(50, 50)) as process, ExitStack() as crowd:
        warning = r".* there can be only \d\d connections at a time \(ulimit -n is 50\)\n"
        assert re.fullmatch(warning, process.logged())
        for _ in range(100):
            crowd.enter_context(process.connect())
        wait_until(lambda: "reached the connection limit" in process.logged())
        crowd.close()
        assert process.request("/messages", launch()) == APPLIED
        assert process.logged().count("\n") == 2  # once a minute is enough
    with Process(file, program=allow_files(30, 30)) as process:
        assert process.request("/messages", launch()) == DUPLICATE


def test_a_warning_is_logged_once_a_minute_and_an_error_each_time():
    def passes(level, second):
        return sparing.filter(logging.makeLogRecord({"levelno": level, "created": second}))

    sparing = rockets.Sparing()
    assert [passes(logging.WARNING, 1000 + second) for second in (0, 59, 60, 119)] == [1, 0, 1, 0]
    assert passes(logging.ERROR, 1119)


def test_the_limit_of_open_files_is_raised_as_far_as_needed_and_allowed(file):
    raise_limit_of_files()
    with Process(file, program=allow_files(256, 2000)) as process, ExitStack() as crowd:
        for _ in range(300):
            crowd.enter_context(process.connect())
        assert process.request("/messages", launch()) == APPLIED
        assert process.stop() == 0 and process.logged() == ""


# The database file ################################################################################


def fill(file, number=500):
    """Make a database that holds so many messages of one rocket."""
    store = rockets.Store(str(file))
    with store.transaction():
        for each in [launch(), *(faster(n, 1) for n in range(2, number + 1))]:
            store.apply(rockets.parse_message(json.dumps(each).encode()))
    store.close()


def execute(file, statements):
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(statements)


def text(file):
    file.write_bytes(b"Dear diary, " * 1000)


def short_text(file):
    file.write_bytes(b"Dear diary")


def foreign_tables(file):
    execute(file, "CREATE TABLE holidays (day TEXT)")


def foreign_journal(file):
    execute(file, "PRAGMA page_size = 512; PRAGMA journal_mode = PERSIST; CREATE TABLE days (day)")


def foreign_transaction(file):
    """Leave what a crash in a transaction leaves: SQLite would roll it back."""
    journal = Path(f"{file}-journal")
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.executescript("""
            CREATE TABLE days (day); INSERT INTO days VALUES (zeroblob(9999));
            PRAGMA cache_size = 1; BEGIN; UPDATE days SET day = randomblob(9999)""")
        left = file.read_bytes(), journal.read_bytes()
    file.write_bytes(left[0])
    journal.write_bytes(left[1])


def foreign_version(file):
    execute(file, "PRAGMA user_version = 7")


def later_version(file):
    fill(file, 2)
    execute(file, f"PRAGMA user_version = {rockets.SCHEMA_VERSION + 1}")


def unknown_log(file):
    fill(file, 2)
    execute(file, "ALTER TABLE messages ADD COLUMN sender TEXT")


def strange_entry(file):
    fill(file, 2)
    execute(file, "UPDATE messages SET time = 'noon' WHERE number = 2; DROP TABLE rockets")


def first_half(file):
    fill(file)
    os.truncate(file, file.stat().st_size // 2)


def damaged(file):
    fill(file)
    with closing(sqlite3.connect(file)) as connection:
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'rockets'")
    with open(file, "r+b") as stream:
        stream.seek((page - 1) * 4096)
        stream.write(b"\x55" * 4096)


def log_alone(file):
    fill_and_kill(file)
    file.unlink()


def log_of_an_empty_file(file):
    fill_and_kill(file)
    os.truncate(file, 0)


def fill_and_kill(file, *bodies):
    """Leave a database whose newest messages are in a left-over log."""
    fill(file)
    with closing(rockets.Store(str(file))) as store:
        store_all(store, bodies)
    with Process(file) as process:
        for number in range(501, 511):
            process.request("/messages", faster(number, 1))
        process.stop(signal.SIGKILL)


def half_with_its_log(file):
    fill_and_kill(file)
    os.truncate(file, file.stat().st_size // 2)


def long_message_cut(file):
    """Break the chain of the pages of a long message, beside a left-over log."""
    fill_and_kill(file, launch(1, channel=OTHER, **BIG))
    pages = file.read_bytes()
    next_page = pages.index(b"x" * 4092) - 4
    file.write_bytes(pages[:next_page] + bytes(4) + pages[next_page + 4 :])


REFUSED = {
    text: "file is not a database",
    short_text: "file is not a database",
    foreign_tables: "another program wrote it",
    foreign_version: "another program wrote it",
    foreign_journal: "another program wrote it",
    foreign_transaction: "another program wrote it",
    later_version: "a later version of this program wrote it",
    unknown_log: "its log of messages has a form that this version does not know",
    strange_entry: f"message 2 of {CHANNEL} in its log is damaged",
    first_half: "malformed",
    damaged: "malformed",
    log_alone: "it is gone, but",
    log_of_an_empty_file: "it is gone, but",
    half_with_its_log: "rockets.db-wal",
    long_message_cut: "rockets.db-wal",
}


@pytest.mark.parametrize("make", REFUSED, ids=[make.__name__ for make in REFUSED])
def test_a_file_that_cannot_be_the_database_is_one_line_and_left_as_it_was(file, make):
    make(file)
    before = content(file.parent)
    code, said = start_in_vain(file, "--reset")
    assert (code, said.count("\n")) == (1, 1) and REFUSED[make] in said
    assert said.startswith(f"rockets: cannot use {file} as the database: ")
    assert content(file.parent) == before


def test_a_failure_while_a_left_over_log_is_looked_at_is_not_taken_for_damage(file):
    fill(file)
    with closing(rockets.connect(file, "mode=ro")) as connection:
        connection.set_progress_handler(lambda: True, 1)
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            rockets.is_sound(connection)


def test_a_backup_beside_an_old_log_is_refused_and_can_be_restored_as_the_refusal_says(file):
    fill(file)
    backup = file.read_bytes()
    with Process(file) as process:
        bodies = [launch(1, channel=str(uuid.UUID(int=number))) for number in range(100)]
        assert post_together(process, bodies) == [APPLIED] * 100
        process.stop()
    with Process(file) as process:
        process.request("/messages", faster(501, 1))
        process.stop(signal.SIGKILL)
    file.write_bytes(backup)
    before = content(file.parent)
    code, said = start_in_vain(file)
    assert (code, said.count("\n")) == (1, 1) and f"{file}-wal " in said and "delete" in said
    assert content(file.parent) == before
    os.remove(f"{file}-wal")
    file.write_bytes(backup)
    with Process(file) as process:
        assert process.said.endswith(" holds 1 rockets and 500 messages\n")
        assert process.request(f"/rockets/{CHANNEL}")[1]["speed"] == 999


def test_a_left_over_log_of_another_database_is_refused(file, tmp_path):
    fill(file)
    other = tmp_path / "other.db"
    with Process(other) as process:
        process.request("/messages", launch())
        process.stop(signal.SIGKILL)
    os.rename(f"{other}-wal", f"{file}-wal")
    before = content(file.parent)
    code, said = start_in_vain(file)
    assert (code, said.count("\n")) == (1, 1) and f"{file}-wal " in said
    assert content(file.parent) == before


def test_a_database_that_lives_in_its_left_over_log_is_taken(file):
    for answer in (APPLIED, DUPLICATE):
        with Process(file) as process:
            assert process.request("/messages", launch()) == answer
            process.stop(signal.SIGKILL)
        assert file.stat().st_size <= 4096 < os.path.getsize(f"{file}-wal")


def test_a_start_that_was_cut_short_at_one_page_is_taken_up(file):
    execute(file, "PRAGMA journal_mode = WAL")
    assert file.stat().st_size == 4096
    with Process(file) as process:
        assert process.request("/messages", launch()) == APPLIED


def test_a_start_of_which_only_the_size_of_the_first_page_was_written_is_taken_up(file):
    foreign_transaction(file)
    journal = Path(f"{file}-journal")
    sectors = journal.read_bytes()
    # without the pages that it keeps, as there were none before (sqlite.org/fileformat2.html, 3)
    journal.write_bytes(sectors[:8] + bytes(4) + sectors[12:16] + bytes(4) + sectors[20:512])
    file.write_bytes(bytes(4096))
    with Process(file) as process:
        assert process.request("/messages", launch()) == APPLIED


@on_linux
def test_a_start_waits_for_a_short_lock_of_another_process(file):
    fill(file)
    execute(file, "DROP TABLE rockets")  # so that the start has something to write
    process = Process(file, program=changed("import rockets; rockets.BUSY_TIMEOUT = 60"))

    def naps():
        """Return how often the service has slept; none before it has opened the file."""
        proc = Path(f"/proc/{process.popen.pid}")
        is_open = False
        for descriptor in (proc / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed by now
                is_open |= os.readlink(descriptor) == str(file)
        return is_open and int((proc / "status").read_text().split()[-3])

    with closing(sqlite3.connect(file, isolation_level=None)) as other, ExitStack() as stack:
        other.execute("BEGIN IMMEDIATE")
        starting = ThreadPoolExecutor(1).submit(stack.enter_context, process)
        wait_until(lambda: hasattr(process, "popen"))
        begin = wait_until(naps)
        wait_until(lambda: naps() > begin + 5)
        other.execute("ROLLBACK")
        assert starting.result().request("/messages", faster(501, 1)) == APPLIED


# Upgrade ##########################################################################################

EARLIER = "6f6d4a21-0b7a-4b1e-9c5e-0d7f6a1c2b3d"
VERSION_3 = f"""
CREATE TABLE messages (
    channel TEXT NOT NULL, number INTEGER NOT NULL, time TEXT NOT NULL, type TEXT NOT NULL, \
message TEXT NOT NULL,
    PRIMARY KEY (channel, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE rockets (
    channel TEXT NOT NULL PRIMARY KEY, messages INTEGER NOT NULL, speed_change INTEGER NOT NULL,
    updated_at TEXT NOT NULL, updated_utc TEXT NOT NULL, last_message_number INTEGER NOT NULL,
    type TEXT, launched_at TEXT, launched_utc TEXT, launch_speed INTEGER, \
launch_number INTEGER NOT NULL,
    mission TEXT, mission_number INTEGER NOT NULL,
    explosion_reason TEXT, explosion_number INTEGER NOT NULL,
    missing_messages INTEGER AS (last_message_number - messages),
    speed INTEGER AS (launch_speed + speed_change),
    status TEXT AS (iif(explosion_reason IS NOT NULL, 'exploded', \
iif(type IS NULL, 'awaiting_launch', 'active')))
) STRICT, WITHOUT ROWID;
INSERT INTO messages VALUES
('{CHANNEL}', 1, '2022-02-02T19:39:05.5+01:00', 'RocketLaunched',
 '{{"launchSpeed":500,"mission":"ARTEMIS","type":"Falcon-9"}}'),
('{CHANNEL}', 3, '2022-02-02T19:39:07+01:00', 'RocketSpeedIncreased', '{{"by":3000}}'),
('{CHANNEL}', 4, '2022-02-02t19:39:08z', 'RocketMissionChanged', '{{"newMission":"MÈLÉE"}}'),
('{EARLIER}', 1, '2016-12-31T23:59:60Z', 'RocketLaunched',
 '{{"launchSpeed":7,"mission":"MIR","type":"Soyuz"}}'),
('{EARLIER}', 5, '2017-01-01T00:00:01Z', 'RocketSpeedDecreased', '{{"by":20}}'),
('{EARLIER}', 6, '2016-12-31T15:59:60.25-08:00', 'RocketExploded', '{{"reason":"FUEL_LEAK"}}');
INSERT INTO rockets VALUES
('{CHANNEL}', 3, 3000, '2022-02-02t19:39:08z', '2022-02-02T19:39:08', 4, 'Falcon-9',
 '2022-02-02T19:39:05.5+01:00', '2022-02-02T18:39:05.5', 500, 1, 'MÈLÉE', 4, NULL, {2**53}),
('{EARLIER}', 3, -20, '2016-12-31T15:59:60.25-08:00', '2016-12-31T23:59:60.25', 6, 'Soyuz',
 '2016-12-31T23:59:60Z', '2016-12-31T23:59:60', 7, 1, 'MIR', 1, 'FUEL_LEAK', 6);
PRAGMA user_version = 0x524B0003;
PRAGMA journal_mode = WAL;
"""
LEAP = "2016-12-31T23:59:59Z"  # as a leap second is served
SERVED = [
    UNKNOWN
    | {"channel": CHANNEL, "type": "Falcon-9", "speed": 3500, "mission": "MÈLÉE"}
    | {"launchedAt": "2022-02-02T19:39:05.5+01:00", "updatedAt": "2022-02-02T19:39:08Z"}
    | {"status": "active", "lastMessageNumber": 4, "missingMessages": 1},
    {"channel": EARLIER, "type": "Soyuz", "speed": -13, "mission": "MIR"}
    | {"launchedAt": LEAP, "updatedAt": "2016-12-31T15:59:59.25-08:00"}
    | {"status": "exploded", "explosionReason": "FUEL_LEAK"}
    | {"lastMessageNumber": 6, "missingMessages": 3},
]
REBUILT = r"\S+ \S+ WARNING rebuilt the rockets from 6 messages in \d+\.\d s\n"


@pytest.mark.parametrize(
    "change",
    [
        "",
        "PRAGMA user_version = 0x524B0001",
        "ALTER TABLE rockets ADD COLUMN fuel INTEGER",
        "DROP TABLE rockets",
        "DROP TABLE rockets; CREATE TABLE rockets (channel TEXT, height INTEGER)",
        "DROP TABLE rockets; CREATE TABLE rockets (x) ; PRAGMA user_version = 0x524B0004",
    ],
    ids=["as it was", "version 1", "a column more", "none", "other columns", "version of today"],
)
def test_a_file_of_an_earlier_version_serves_the_same_rockets(file, change):
    execute(file, VERSION_3 + change)
    with Process(file) as process:
        assert process.request("/rockets")[1]["rockets"] == SERVED
        assert re.fullmatch(REBUILT, process.logged())
        for channel, number, served in (CHANNEL, 4, "2022-02-02T19:39:08Z"), (EARLIER, 1, LEAP):
            path = f"/rockets/{channel}/messages?after={number - 1}&limit=1"
            (message,) = process.request(path)[1]["messages"]
            assert message["metadata"]["messageTime"] == served
        assert process.request("/messages", faster(3, 3000)) == DUPLICATE
        assert process.request("/messages", faster(2, 9)) == APPLIED
        process.stop()
    with Process(file) as process:
        assert process.request(f"/rockets/{CHANNEL}")[1]["speed"] == 3509
        assert process.logged() == ""


def test_a_left_over_log_of_an_earlier_version_is_taken(file, tmp_path):
    old = tmp_path / "old.db"
    execute(old, VERSION_3)
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("DELETE FROM messages WHERE number = 3")
        connection.commit()
        for suffix in ("", "-wal"):  # as a crash leaves them
            shutil.copy(f"{old}{suffix}", f"{file}{suffix}")
    with Process(file) as process:
        assert process.request(f"/rockets/{CHANNEL}")[1]["speed"] == 500


def test_rebuilding_gives_the_same_rows_whatever_the_order_of_arrival(file):
    life = [launch(3), launch(9, type="B"), renamed(5, "A"), renamed(8, "B"), faster(1, 7)]
    life += [slower(2, 9), exploded(4, "A"), exploded(6, "B"), launch(2, channel=EARLIER)]
    strange = {"by": 100, "type": {"a": 1}, "launchSpeed": 2**70, "newMission": 0, "reason": "boom"}
    life += [message(7, "RocketSpeedIncreased", strange, channel=EARLIER)]
    seen = []
    for seed in range(10):
        random.Random(seed).shuffle(life)
        store = rockets.Store(str(file))
        for each in life:
            store.apply(rockets.parse_message(json.dumps(each).encode()))
        store.close()
        seen.append(dump(file))
        execute(file, "UPDATE rockets SET mission = 'X'; PRAGMA user_version = 0x524B0003")
        rockets.Store(str(file)).close()
        seen.append(dump(file))
        file.unlink()
    assert seen == [seen[0]] * 20


def rebuild_in_a_child(file, seconds):
    """Rebuild in a process that dies when it has used so much CPU time; return how it ended."""
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # kills as SIGKILL does: nothing catches it
        rockets.Store(str(file))
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_kill_at_any_moment_of_a_rebuild_loses_nothing(file, tmp_path):
    fill(file, 1500)
    right = dump(file)
    execute(file, "ALTER TABLE rockets ADD COLUMN fuel ANY")
    old = file.read_bytes()
    began = time.process_time()
    rockets.Store(str(file)).close()
    took = time.process_time() - began
    killed = 0
    for part in range(20):
        cut = tmp_path / str(part) / "rockets.db"
        cut.parent.mkdir()
        cut.write_bytes(old)
        killed += rebuild_in_a_child(cut, took * (part + 1) / 21) == signal.SIGPROF
        assert dump(cut)[1] == right[1]
        rockets.Store(str(cut)).close()
        assert dump(cut) == right
    assert killed >= 10


def test_a_long_rebuild_shows_its_progress_on_a_terminal(file):
    fill(file)
    execute(file, "DROP TABLE rockets")
    leader, terminal = pty.openpty()
    hasty = changed("import time; clock = time.monotonic; time.monotonic = lambda: 1e5 * clock()")
    process = Process(file, program=hasty)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": terminal}
    seen = b""
    with subprocess.Popen(process.command, env=process.environ, **pipes) as popen:
        os.close(terminal)
        while b"rebuilt the rockets from 500 messages" not in seen:
            seen += os.read(leader, 65536)
        popen.kill()
    os.close(leader)
    assert re.search(rb"\r\[#+ +\] \d+ of 500 messages\r", seen)
    assert b"\r[########################################] 500 of 500 messages\r" in seen
    execute(file, "DROP TABLE rockets")
    with Process(file, program=hasty) as process:  # to a file
        said = r"\S+ \S+ WARNING rebuilt the rockets from 500 messages in \S+ s\n"
        assert re.fullmatch(said, process.logged())


# Durability and faults ############################################################################


def post_until_it_stops(process, channel, sent, acknowledged):
    """Post messages of a channel one after the other; note each that was acknowledged."""
    for number in count(len(sent) + 1):
        try:
            status, _ = process.request("/messages", faster(number, number, channel=channel))
        except (OSError, HTTPException):
            return  # and send this one again after the restart
        assert status == 202
        sent.append(number)
        acknowledged.append(number)


ENDS = [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGKILL, -9), (signal.SIGINT, 0)]


def test_what_was_acknowledged_under_load_is_there_after_every_end(file):
    dice = random.Random(20)
    sent = {str(uuid.UUID(int=number)): [] for number in range(4)}
    for number, code in [*ENDS, *ENDS, (None, None)]:
        with Process(file) as process, ThreadPoolExecutor(4) as pool:
            for channel, numbers in sent.items():
                known = range(1, len(numbers) + 2)
                bodies = [faster(each, each, channel=channel) for each in known]
                assert process.request("/messages", bodies[-1])[0] == 202  # it lacked its answer
                assert process.request(f"/rockets/{channel}") == (200, fold(bodies))
                numbers.append(len(bodies))
            acknowledged = []
            for channel, numbers in sent.items():
                number and pool.submit(post_until_it_stops, process, channel, numbers, acknowledged)
            goal = number and dice.randint(20, 150)
            wait_until(lambda goal=goal, seen=acknowledged: not goal or len(seen) >= goal)
            assert number is None or process.stop(number) == code
        if code == 0:
            assert os.listdir(file.parent) == ["rockets.db"]  # the log is folded in


def test_every_commit_is_synced_to_the_disk_itself(file):
    store = rockets.Store(str(file))
    pragmas = ("journal_mode", "synchronous", "fullfsync", "checkpoint_fullfsync")
    found = [store.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
    store.close()
    assert found == ["wal", 2, 1, 1]


def counts(process):
    """Return how many messages had each outcome, and how many commits there were."""
    with urllib.request.urlopen(process.url + "/metrics") as answer:
        metrics = answer.read().decode()
    outcomes = re.findall(r'\nrockets_messages_total\{outcome="(\w+)"\} (\d+)', metrics)
    found = {outcome: int(number) for outcome, number in outcomes if number != "0"}
    return found, int(re.search(r"\nrockets_commits_total (\d+)", metrics)[1])


def test_under_another_process_s_lock_posts_fail_at_once_gets_go_on_and_all_heals(file):
    patient = changed("import rockets; rockets.BUSY_TIMEOUT = 1000")
    with Process(file, program=patient) as process, closing(sqlite3.connect(file)) as other:
        process.request("/messages", launch())
        other.execute("BEGIN IMMEDIATE")
        received = exchange(process, http(BODY.replace(b": 1,", b": 9,")))
        assert statuses(received) == [503] and b"\r\nRetry-After: 1\r\n" in received
        bodies = [faster(number, 1) for number in range(2, 12)]
        assert [status for status, _ in post_together(process, bodies)] == [503] * 10
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch()]))
        assert process.request("/health")[0] == 503
        other.execute("ROLLBACK")
        assert post_together(process, bodies) == [APPLIED] * 10
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(), *bodies]))
        assert process.request("/health")[0] == 200
        assert counts(process) == ({"applied": 11, "failed": 11}, 2)
        assert faults(process) == ["can't be stored", "are stored again"]


def faults(process):
    """Return the faults that a service logged, each in short."""
    lines = process.logged().splitlines()
    return [re.search("can't be stored|are stored again|ignored|$", line)[0] for line in lines]


def leave_room(process, file, size):
    """Let the service write so many bytes more to its write-ahead log."""
    limit = os.path.getsize(f"{file}-wal") + size
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


BIG = {"pad": "x" * 60_000}
LONG = {"pad": "x" * 7000}  # which still comes in one piece, so that it shares a turn with others


@on_linux
def test_of_a_turn_that_cannot_be_stored_whole_what_can_be_stored_is(file):
    with Process(file) as process:
        process.request("/messages", launch())
        leave_room(process, file, 12_000)
        bodies = [faster(2, 1), launch(3, **LONG), {"metadata": 0}, launch(), faster(2, 7)]
        answers = post_together(process, bodies)
        assert [status for status, _ in answers] == [202, 503, 400, 202, 202]
        assert [answers[place] for place in (0, 3, 4)] == [APPLIED, DUPLICATE, DUPLICATE]
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(), faster(2, 1)]))
        once = {"applied": 2, "duplicate": 1, "conflicting": 1, "rejected": 1, "failed": 1}
        assert counts(process) == (once, 2)
        assert faults(process) == ["can't be stored", "ignored"]


SMALL_CACHE = """
import rockets
connect = rockets.connect
def connect_with_small_cache(*arguments):
    connection = connect(*arguments)
    connection.execute("PRAGMA cache_size = 10")
    return connection
rockets.connect = connect_with_small_cache"""


@on_linux
def test_a_statement_that_fails_takes_back_nothing_acknowledged_in_its_turn(file):
    with Process(file, program=changed(SMALL_CACHE)) as process:  # it writes before the commit
        process.request("/messages", launch())
        leave_room(process, file, 12_000)
        bodies = [faster(2, 1), *(launch(number, **LONG) for number in range(3, 13))]
        answers = post_together(process, bodies)
        assert [status for status, _ in answers] == [202, *[503] * 10]
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(), faster(2, 1)]))
        assert counts(process) == ({"applied": 2, "failed": 10}, 2)


def test_a_mistake_of_our_own_in_a_turn_leaves_no_half_of_a_message(file):
    sql = rockets.ADD_TO_LOG.replace(":message)", "iif(:messageNumber = 2, NULL, :message))")
    with Process(file, program=changed(f"import rockets; rockets.ADD_TO_LOG = {sql!r}")) as process:
        answers = post_together(process, [launch(), faster(2, 9), faster(3, 1)])
        assert [status for status, _ in answers] == [202, 500, 202]
        rocket = fold([launch(), faster(3, 1)])
        assert process.request(f"/rockets/{CHANNEL}") == (200, rocket)


@on_linux
def test_a_message_is_no_conflict_with_one_that_could_not_be_stored(file):
    with Process(file) as process:
        leave_room(process, file, 12_000)
        answers = post_together(process, [launch(1, **LONG), launch(), launch()])
        assert [answers[0][0], *answers[1:]] == [503, APPLIED, DUPLICATE]
        assert counts(process) == ({"applied": 1, "duplicate": 1, "failed": 1}, 1)
        assert faults(process) == ["can't be stored", "are stored again"]


@on_linux
def test_a_full_disk_is_a_503_until_there_is_room_again(file):
    bodies = [launch(number, **BIG) for number in range(2, 8)]
    with Process(file) as process:
        process.request("/messages", launch())
        leave_room(process, file, 4096)
        assert [status for status, _ in post_together(process, bodies)] == [503] * 6
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch()]))
        assert process.request("/messages", launch()) == DUPLICATE
        assert process.request("/health")[0] == 503
        leave_room(process, file, 10_000_000)
        assert post_together(process, bodies) == [APPLIED] * 6
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(), *bodies]))
        assert process.request("/health") == (200, {"status": "ok", "rockets": 1, "messages": 7})
        assert faults(process) == ["can't be stored", "are stored again"]


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if os.getuid() or subprocess.run(mount).returncode:
        pytest.skip("nobody but root may mount a disk, and not everywhere")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_without_room_takes_messages_again_once_it_has_room(small_disk):
    with Process(small_disk / "rockets.db") as process:
        assert process.request("/messages", launch()) == APPLIED
        ballast = small_disk / "ballast"
        with suppress(OSError), open(ballast, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        bodies = [launch(number, pad="x" * 9000) for number in range(2, 5)]
        assert [status for status, _ in post_together(process, bodies)] == [503] * 3
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch()]))
        ballast.unlink()
        assert post_together(process, bodies) == [APPLIED] * 3
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(), *bodies]))


def can_trace():
    with suppress(OSError):
        return not subprocess.run(["strace", "-D", "-qq", "-o", os.devnull, "true"]).returncode


@pytest.mark.skipif(not can_trace(), reason="there is no strace here, or it may not trace")
@pytest.mark.parametrize(
    "fault",
    [
        "fdatasync:error=EIO:when=20..40",
        "pwrite64:error=EIO:when=200..240",
        "pwrite64:error=ENOSPC:when=300..340",
    ],
)
def test_a_failing_disk_loses_nothing_acknowledged_and_counts_nothing_twice(file, fault):
    trace = f"trace={fault.partition(':')[0]}"
    strace = ["strace", "-D", "-f", "-qq", "-o", os.devnull, "-e", trace, "-e", f"inject={fault}"]
    seen = Counter()
    with Process(file, wrapper=strace) as process:
        for number in range(1, 101):
            for _ in range(200):
                status, _ = process.request("/messages", faster(number, number))
                seen[status] += 1
                if status == 202:
                    break
        assert seen == {202: 100, 503: seen[503]} and seen[503]
        rocket = fold([faster(number, number) for number in range(1, 101)])
        assert process.request(f"/rockets/{CHANNEL}") == (200, rocket)
        process.stop(signal.SIGKILL)
    with Process(file) as process:
        assert process.request(f"/rockets/{CHANNEL}") == (200, rocket)
        assert process.request("/messages", launch(101)) == APPLIED
        assert process.request(f"/rockets/{CHANNEL}")[1]["speed"] == 500 + sum(range(101))


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("is_replaced", [False, True], ids=["moved", "replaced"])
@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_a_database_that_is_gone_is_a_503_until_it_is_back(file, is_old, is_replaced, suffix):
    program = changed("import rockets; rockets.CLOCK_STEP = 0") if is_old else (SERVICE,)
    with Process(file, program=program) as process:
        process.request("/messages", launch())
        gone, aside = Path(f"{file}{suffix}"), file.with_name("aside")
        gone.rename(aside)
        if is_replaced:
            gone.write_bytes(aside.read_bytes())
        paths = ("/rockets", f"/rockets/{CHANNEL}", "/health")
        assert process.request("/messages", faster(2, 5))[0] == 503
        assert [process.request(path)[0] for path in paths] == [503] * 3
        aside.rename(gone)
        assert process.request("/messages", faster(2, 5))[0] == 202
        assert process.request("/messages", faster(3, 5)) == APPLIED
        rocket = fold([launch(), faster(2, 5), faster(3, 5)])
        assert process.request(f"/rockets/{CHANNEL}") == (200, rocket)
        assert process.request("/health")[0] == 200
        assert faults(process) == ["can't be stored", "are stored again"]


def test_the_files_are_looked_at_after_a_change_of_their_folder_and_now_and_then(
    file, monkeypatch
):
    with closing(rockets.Store(file)) as store:
        assert store.seen == ()  # another change could have the same time
        monkeypatch.setattr(rockets, "CLOCK_STEP", 0)
        store.verify()
        folder = file.parent.stat()
        assert store.seen[:3] == (folder.st_dev, folder.st_ino, folder.st_ctime_ns)
        store.files[str(file)] = os.stat(SERVICE)  # as after a mount, which changes no folder
        with pytest.raises(OSError, match=f"another file has the name {file}"):
            wait_until(store.verify)


# Stopping #########################################################################################


def test_connections_that_have_come_but_are_not_accepted_are_served_at_sigterm(file):
    raise_limit_of_files()
    with Process(file) as process, ExitStack() as stack:
        with process.paused():
            waiting = [stack.enter_context(process.connect()) for _ in range(300)]
            for number, connection in enumerate(waiting, 1):
                connection.sendall(sized(json.dumps(faster(number, 1)).encode()))
            process.popen.terminate()
        assert [read_answer(connection) for connection in waiting] == [APPLIED] * 300
        assert process.popen.wait(20) == 0


def is_closed(process):
    """Tell whether new connections are refused."""
    try:
        process.connect().close()
    except ConnectionError:
        return True


def test_a_body_that_is_still_coming_at_sigterm_is_taken_but_no_new_connection(file):
    with Process(file) as process, process.connect() as connection, process.connect():
        with process.paused():
            connection.sendall(http(BODY)[:-20])
            process.popen.terminate()
        wait_until(lambda: is_closed(process))
        connection.sendall(http(BODY)[-20:])
        assert read_answer(connection) == APPLIED
        assert process.popen.wait(20) == 0 and process.logged() == ""


def test_half_a_body_that_never_ends_is_given_up_and_an_idle_connection_not_waited_for(file):
    for period, data in ((0.1, http(BODY)[:-20]), (1000, b"")):
        short = changed(f"import rockets; rockets.GRACE_PERIOD = {period}")
        with Process(file, program=short) as process, process.connect() as connection:
            connection.sendall(data)
            assert process.stop() == 0
            assert connection.recv(1) == b""


@pytest.fixture
def heavy(file):
    """A database with a history of 3.6 MB."""
    store = rockets.Store(str(file))
    with store.transaction():
        for number in range(1, 61):
            body = json.dumps(launch(number, **BIG)).encode()
            store.apply(rockets.parse_message(body))
    store.close()
    return file


HISTORY = f"GET /rockets/{CHANNEL}/messages HTTP/1.1\r\nHost: x\r\n".encode()


SMALL_BUFFERS = """
import rockets, socket
rockets.GRACE_PERIOD, listen = 1000, rockets.listen
def listen_with_small_buffers(*arguments):
    sockets = listen(*arguments)
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    return sockets
rockets.listen = listen_with_small_buffers"""


def test_a_large_answer_that_is_still_being_read_at_sigterm_arrives_whole(heavy):
    with Process(heavy, program=changed(SMALL_BUFFERS)) as process, process.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(HISTORY + b"\r\n")
        assert connection.recv(1, socket.MSG_PEEK) == b"H"
        process.popen.terminate()
        wait_until(lambda: is_closed(process))
        status, answer = read_answer(connection)
        assert (status, answer["count"]) == (200, 60)
        assert process.popen.wait(20) == 0


def test_a_second_sigterm_changes_nothing(file):
    with Process(file) as process, process.connect() as connection:
        process.popen.terminate()
        assert connection.recv(1) == b""  # it is about to exit
        process.popen.terminate()
        assert process.popen.wait(20) == 0 and process.logged() == ""


LAST_WORDS = """
import os
class Last:
    def __del__(self, kill=os.kill, me=os.getpid()):
        kill(me, 15)
sys.last = Last()"""


def test_a_sigterm_while_python_exits_changes_nothing(file):
    with Process(file, program=changed(LAST_WORDS)) as process:
        assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_while_it_starts_ends_it_in_peace(file, number):
    hit = f"import os, rockets; rockets.create_app = lambda _: os.kill(os.getpid(), {number:d})"
    assert start_in_vain(file, program=changed(hit)) == (0, "")


@on_linux
def test_a_sigterm_that_comes_before_the_greeting_is_out_ends_it_all_the_same(file):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, b"." * 4096):  # until there is no room for the greeting
            pass
    os.set_blocking(writing, True)
    process = Process(file)
    with subprocess.Popen(process.command, env=ENVIRON, stdout=writing) as popen:
        os.close(writing)
        call = Path(f"/proc/{popen.pid}/syscall")
        wait_until(lambda: call.read_text().split()[1:2] == ["0x1"])  # it waits to write there
        popen.terminate()
        with open(reading, "rb") as pipe:
            pipe.read()
        assert popen.wait(20) == 0


# The wire #########################################################################################


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One service for many connections; it has nothing to complain about in the end."""
    with Process(tmp_path_factory.mktemp("wire") / "rockets.db") as process:
        yield process
        assert (process.stop(), process.logged()) == (0, "")


def stored(process):
    return process.request("/health")[1]["messages"]


def coded(coding, body=None, headers="", **options):
    """Return the bytes of a POST in a transfer coding that leaves it to the service to close."""
    headers = f"Transfer-Encoding: {coding}\r\n{headers}"
    return http(body or chunked(BODY), headers, **{"close": False} | options)


HOST, OTHER_HOST = "Host: rockets\r\n", "Host: other\r\n"
CLOSE, KEEP = "Connection: TE, close\r\n", "Connection: keep-alive\r\n"
EXPECT = "Expect: 100-continue\r\n"
FULL = BODY.ljust(64 * 1024)
CRUMBS = b"".join(b"1\r\n%c\r\n" % byte for byte in FULL) + b"0\r\n\r\n"
FRAMES = {
    "a length": (http(BODY), [202]),
    "1.0": (http(BODY, version="1.0", close=False), [202]),
    "1.0 without Host": (http(BODY, version="1.0").replace(HOST.encode(), b""), [202]),
    "1.0 twice": (sized(BODY, KEEP, version="1.0", close=False) + http(BODY), [202, 202]),
    "chunked": (coded("chunked", close=True), [202]),
    "Chunked": (coded("Chunked", close=True), [202]),
    "chunked between blanks": (coded("\t chunked \t", close=True), [202]),
    "empty Host": (http(BODY).replace(HOST.encode(), b"Host:\r\n"), [202]),
    "pipelined": (http(BODY, close=False) + http(BODY), [202, 202]),
    "after an empty line": (b"\r\n" + http(BODY), [202]),
    "close in a list": (sized(BODY, CLOSE, close=False), [202]),
    "close after a tab": (sized(BODY, CLOSE.replace(" c", "\tC"), close=False), [202]),
    "close and keep-alive": (sized(BODY, "Connection: keep-alive, close\r\n", close=False), [202]),
    "64 KiB": (sized(FULL), [202]),
    "64 KiB in a chunk": (coded("chunked", chunked(FULL), close=True), [202]),
    "64 KiB in 1-byte chunks": (coded("chunked", CRUMBS, close=True), [202]),
    "64 KiB + 1": (sized(FULL + b" "), [413]),
    "64 KiB + 1 in a chunk": (coded("chunked", chunked(FULL + b" "), close=True), [413]),
    "1 MiB + 1": (http(b"", f"Content-Length: {2**20 + 1}\r\n", close=False), [413]),
    "1 MiB": (sized(bytes(2**20), close=False) + http(BODY), [413, 202]),
    "Expect": (sized(BODY, EXPECT), [100, 202]),
    "Expect, 64 KiB": (sized(FULL, EXPECT), [100, 202]),
    "Expect, chunked": (coded("chunked", headers=EXPECT, close=True), [100, 202]),
    "Expect, too large": (http(b"", "Content-Length: 65537\r\n" + EXPECT, close=False), [413]),
    "Expect, bad length": (http(b"", "Content-Length: abc\r\n" + EXPECT, close=False), [400]),
    "Expect, no body": (sized(b"", EXPECT, close=False) + http(BODY), [400, 202]),
    "length too small": (sized(BODY[5:]) + BODY[:5], [400]),
    "length below 0": (http(BODY, "Content-Length: -1\r\n", close=False), [400]),
    "length too long": (http(BODY, f"Content-Length: {'9' * 5000}\r\n", close=False), [400]),
    "two lengths": (http(BODY, LENGTH + "Content-Length: 7\r\n", close=False), [400]),
    "bad chunk": (coded("chunked", b"zz\r\n" + BODY), [400]),
    "chunked and a length": (coded("chunked", headers=LENGTH), [400]),
    "chunked in 1.0": (coded("chunked", headers=KEEP, version="1.0"), [400]),
    "chunked, chunked": (coded("chunked, chunked"), [400]),
    "chunked twice": (coded("chunked", headers="Transfer-Encoding: chunked\r\n"), [400]),
    "gzip": (coded("gzip"), [400]),
    "gzip, chunked": (coded("gzip, chunked"), [400]),
    "no Host": (http(BODY, close=False).replace(HOST.encode(), b""), [400]),
    "folded": (sized(BODY, "Padding: x\r\n y\r\n", close=False), [400]),
    "folded at a tab": (sized(BODY, "Padding: x\r\n\ty\r\n", close=False), [400]),
    "folded chunked": (coded("\r\n chunked"), [400]),
    "two Hosts": (sized(BODY, OTHER_HOST, close=False), [400]),
    "two Hosts in 1.0": (sized(BODY, OTHER_HOST + KEEP, version="1.0", close=False), [400]),
    "HTTP/2.0": (http(BODY, version="2.0", close=False), [400]),
    "HTTP/1.2": (http(BODY, version="1.2", close=False), [400]),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "bad address": (b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    "large header": (sized(BODY, f"Padding: {'x' * 300_000}\r\n", close=False), [431]),
    "TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),
    "SSH banner": (b"SSH-2.0-OpenSSH_9.2\r\n", [400]),
    "binary": (b"\0\xff\n\x80", [400]),
    "words": (b"hello, is anybody there?", [400]),
}
FRAMES |= {
    f"Host: {host}": (http(BODY, close=False).replace(b": rockets", b": " + host.encode()), [400])
    for host in ("a b", "a/b", "a?b", "a#b", "a@b")
}


@pytest.mark.parametrize(("data", "expected"), FRAMES.values(), ids=FRAMES)
def test_every_way_to_frame_a_request_gets_its_answer_and_is_closed(service, data, expected):
    received = exchange(service, data)
    assert statuses(received) == expected
    assert received.count(b"\r\nServer: rockets\r\n") == len(expected) - expected.count(100)
    if expected[-1] >= 400:
        head, _, body = received.rpartition(b"\r\n\r\n")
        assert b"\r\nContent-Type: application/problem+json\r\n" in head
        last = head[head.rindex(b"HTTP/1.") :]
        assert re.findall(rb"(?im)^connection: (.*)\r$", last) == [b"close"]
        assert b"\r\nX-Content-Type-Options: nosniff" in last
        answer = json.loads(body)
        assert answer.keys() == {"title", "status", "detail"} and answer["status"] == expected[-1]
        assert expected[-1] != 413 or answer["detail"] == rockets.TOO_LARGE


def test_a_request_may_come_byte_by_byte(service):
    with service.connect() as connection:
        for byte in b"\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n":
            connection.send(bytes([byte]))
            stored(service)  # so that it has taken the byte
        assert read_answer(connection)[0] == 200


def test_a_body_of_a_megabyte_gets_its_413_rather_than_a_reset(service):
    for _ in range(5):
        connection = HTTPConnection("127.0.0.1", int(service.url.rpartition(":")[2]), timeout=60)
        connection.request("POST", "/messages", b"x" * 1_000_000)
        with connection.getresponse() as answer:
            assert (answer.status, json.load(answer)["status"]) == (413, 413)
        connection.close()


def test_a_request_in_a_faulty_body_of_another_is_not_served(service):
    hidden = chunked(BODY) + sized(json.dumps(launch(7)).encode())
    before = stored(service)
    for version, headers in (("1.0", KEEP), ("1.1", f"Content-Length: {len(hidden)}\r\n")):
        smuggled = coded("chunked", hidden, headers, version=version)
        assert statuses(exchange(service, smuggled)) == [400]
    assert stored(service) == before


@pytest.mark.parametrize(
    "data",
    [
        http(b"", f"Transfer-Encoding: a{' ' * 250_000}b\r\n", version="1.0"),
        sized(b"[" * 801 + b'"' + b'\\"' * 32_000),
    ],
    ids=["a long coding", "a text without an end"],
)
def test_no_long_request_keeps_the_others_waiting(service, data):
    with service.connect() as connection:
        connection.settimeout(5)  # seconds; what looks at a byte again and again takes many more
        connection.sendall(data)
        assert statuses(connection.recv(65536)) == [400]


def test_a_client_that_has_no_more_to_send_still_gets_its_answer(service):
    with service.connect() as connection:
        connection.sendall(http(BODY, close=False))
        connection.shutdown(socket.SHUT_WR)
        assert read_answer(connection)[0] == 202
        assert connection.recv(1) == b""


@pytest.mark.parametrize(
    ("version", "stay", "last"),
    [
        ("1.0", KEEP, "Connection: close\r\n"),
        ("1.0", KEEP, "Connection: x\r\n"),
        ("1.0", KEEP.title(), ""),
        ("1.1", KEEP, "Connection: close\r\n"),
        ("1.1", "", "Connection: Close\r\n"),
        ("1.1", "Connection: x\r\n", CLOSE),
    ],
)
def test_a_connection_stays_open_for_50_conditional_gets(service, version, stay, last):
    head = f"GET /rockets HTTP/{version}\r\nHost: x\r\nIf-None-Match: *\r\n"
    with service.connect() as connection:
        for _ in range(50):
            connection.sendall(f"{head}{stay}\r\n".encode())
            received = connection.recv(65536)
            assert statuses(received) == [304]
            assert (b"\r\nConnection: Keep-Alive\r\n" in received) == (version == "1.0")
    pipelined = f"{head}{stay}\r\n" * 49 + f"{head}{last}\r\n"
    assert statuses(exchange(service, pipelined.encode())) == [304] * 50


def test_a_filter_is_compared_as_text_and_must_be_percent_encoded(service):
    channel = str(uuid.uuid4())
    body = launch(channel=channel, mission="Mêlée + 5 %")
    assert service.request("/messages", body) == APPLIED
    answer = service.request("/rockets?mission=M%C3%AAl%C3%A9e+%2B%205%20%25")[1]
    assert [rocket["channel"] for rocket in answer["rockets"]] == [channel]
    raw = "GET /rockets?mission=Mêlée HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert statuses(exchange(service, raw.encode())) == [400]


def test_the_same_message_on_many_connections_at_once_is_applied_once(service):
    channel = str(uuid.uuid4())
    for number in range(1, 31):
        answers = post_from_threads(service, [faster(number, 1, channel=channel)] * 4)
        assert sorted(answers, key=str) == [APPLIED, *[DUPLICATE] * 3]
    assert service.request(f"/rockets/{channel}")[1]["missingMessages"] == 0


def test_a_client_that_resets_its_connection_or_sends_urgent_data_harms_nobody(service):
    for _ in range(100):
        with service.connect() as connection:
            linger = struct.pack("ii", 1, 0)  # so that close() resets
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(http(BODY, close=False) * 3)
            connection.recv(1)
    with service.connect() as connection, suppress(ConnectionError):
        connection.send(b"!", socket.MSG_OOB)  # of TCP, which HTTP has no use for
        assert connection.recv(1) == b""
    assert service.request("/messages", launch())[0] == 202


def test_a_burst_over_many_connections_is_answered_at_the_first_try(file):
    with Process(file) as process:
        sender = Sender(process.url, concurrency=200)
        bodies = (json.dumps(faster(number, 1)).encode() for number in range(1, 5001))
        sender.run(http_request("POST", f"{process.url}/messages", body) for body in bodies)
        assert (len(sender.latencies), sender.retries, stored(process)) == (5000, {}, 5000)


@on_linux
def test_a_large_answer_or_body_needs_no_room_on_the_disk(heavy):
    with Process(heavy) as process:
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        assert process.request(f"/rockets/{CHANNEL}/messages")[1]["count"] == 60
        large = b"x" * 500_000
        assert statuses(exchange(process, sized(large))) == [413]
        assert statuses(exchange(process, coded("chunked", chunked(large), close=True))) == [413]


def test_pipelined_requests_of_a_slow_reader_are_all_answered(heavy):
    sleepy = changed("import rockets; rockets.IDLE = 1000")  # which no answer may wait for
    with Process(heavy, program=sleepy) as process, process.connect() as connection:
        connection.sendall((HISTORY + b"\r\n") * 4 + HISTORY + b"Connection: close\r\n\r\n")
        assert connection.recv(1) == b"H"
        assert process.request("/messages", launch(61)) == APPLIED  # while there is no reader
        received = b"H" + b"".join(iter(partial(connection.recv, 65536), b""))
        assert statuses(received) == [200] * 5


def test_a_crowd_is_answered_in_turns_of_bounded_length(file):
    with Process(file) as process:
        bodies = [faster(number, 1) for number in range(1, 3 * rockets.MAX_TURN + 1)]
        assert post_together(process, bodies) == [APPLIED] * len(bodies)
        assert counts(process)[1] >= 3


def test_a_pipelined_request_behind_a_huge_answer_keeps_nobody_waiting(file):
    with closing(rockets.Store(str(file))) as store:
        name = "\U0001f680" * 256
        fleet = (launch(channel=nth(n), type=name, mission=name) for n in range(10_000))
        store_all(store, fleet)
    with Process(file) as process, process.connect() as connection:
        connection.sendall(b"GET /rockets HTTP/1.1\r\nHost: x\r\n\r\n" * 2)  # 20 MB each
        assert connection.recv(1) == b"H"
        assert process.request("/messages", launch()) == APPLIED


def files(process):
    """Return how many files and connections the service has open."""
    return len(os.listdir(f"/proc/{process.popen.pid}/fd"))


@on_linux
def test_a_client_that_never_reads_is_dropped_in_the_end(heavy):
    hasty = "import rockets; rockets.CHANNEL_TIMEOUT = 1"
    hasty += "; rockets.WAITRESS.update(channel_timeout=1, cleanup_interval=1)"
    with Process(heavy, program=changed(hasty)) as process:
        before = files(process)
        with process.connect() as deaf:
            deaf.sendall((HISTORY + b"\r\n") * 10)
            wait_until(lambda: files(process) > before)
            wait_until(lambda: files(process) == before)
        assert process.request("/messages", launch(61)) == APPLIED
        assert process.stop() == 0 and process.logged() == ""


def test_a_connection_may_be_silent_for_two_minutes_and_no_longer(store):
    sockets = rockets.listen("127.0.0.1", 0)
    server = rockets.Server(rockets.create_app(store), store, sockets, limit=1)
    with socket.create_connection(sockets[0].getsockname()):
        wait_until(lambda: server.receive(0) or server.accepted)
        (silent,) = [each for each in server.map.values() if not each.accepting]
        for second in (120, 121):
            server.close_silent(silent.last_activity + second)
            assert silent.connected == (second == 120)
    server.listeners[0].close()


@on_linux
def test_a_crowd_of_idle_slow_and_deaf_connections_keeps_nobody_out(heavy):
    raise_limit_of_files()
    with Process(heavy) as process, ExitStack() as crowd:
        before = files(process)
        for place in range(700):
            connection = crowd.enter_context(process.connect())
            connection.sendall(http(b" ") if place % 4 == 0 else b"")
        connection.sendall((HISTORY + b"\r\n") * 100)  # and reads nothing of 360 MB
        for number in range(61, 91):
            assert process.request("/messages", faster(number, 1)) == APPLIED
            assert process.request(f"/rockets/{CHANNEL}")[1]["lastMessageNumber"] == number
        wait_until(lambda: files(process) >= before + 700)
        memory = Path(f"/proc/{process.popen.pid}/status").read_text()
        assert int(re.search(r"\nVmHWM:\s*(\d+)", memory)[1]) < 120_000  # KiB
        crowd.close()
        wait_until(lambda: files(process) == before)
        assert process.stop() == 0 and process.logged() == ""


# Power cuts #######################################################################################

def test_a_power_cut_takes_back_nothing_that_was_acknowledged(tmp_path):
    """The same must fail for a copy whose commits don't wait for the disk."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    strace = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull, "true"]
    if subprocess.run(strace, capture_output=True).returncode:
        pytest.skip("strace may not trace here, or is older than 5.3")
    (tmp_path / "static").symlink_to(SERVICE.parent / "static")
    broken = re.sub("synchronous *= *FULL", "synchronous = NORMAL", SERVICE.read_text())
    (tmp_path / SERVICE.name).write_text(broken)
    command = [sys.executable, SERVICE.parent / "tools" / "powercut.py"]
    options = [[SERVICE], [tmp_path / SERVICE.name, "--messages=200", "--cuts=20"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, *words], **pipes) for words in options]
    said, of_broken = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[0].returncode == 0 and said.startswith("100 power cuts in 600 messages"), said
    assert processes[1].returncode == 1, of_broken
    assert int(re.search(r"lost at (\d+) cuts", of_broken)[1]) >= 10, of_broken


# The dashboard, in a real browser #################################################################

AWAITING, EXPLODED = (f"{first}0000000-0000-4000-8000-000000000000" for first in (2, 3))
FLEET = [
    launch(1),
    faster(2, 3000),
    slower(4, 1000, at="2022-02-02T19:40:00+01:00"),
    faster(2, 5, channel=AWAITING),
    launch(1, channel=EXPLODED, type="Saturn", launchSpeed=0, mission="=1+1"),
    exploded(2, channel=EXPLODED),
]
CELLS = [
    [CHANNEL, "Falcon-9", "ARTEMIS", "2,500", "Active", "4", "1"],
    [AWAITING, "unknown", "unknown", "unknown", "Awaiting launch", "2", "1"],
    [EXPLODED, "Saturn", "=1+1", "0", "Exploded", "2", "0"],
]
LINES = [
    ["4", "▼Speed −1,000", "2,500"],
    ["1 message not received: number 3"],
    ["2", "▲Speed +3,000", "3,500"],
    ["1", "●Launched at 500 for ARTEMIS", "500"],
]
ROWS = "[...document.querySelectorAll('#rows tr')]"
TEXTS = f"{ROWS}.map(row => [...row.cells].map(cell => cell.textContent).slice(0, 7))"
LISTED = f"{ROWS}.map(row => row.dataset.channel)"
HISTORY_LINES = TEXTS.replace("rows", "history").replace("7", "3") + ".slice(1)"  # without the day
PULSE = "byId('pulse').dataset.state"
TOTALS = "['rockets', ...Object.keys(STATUSES), 'messages', 'missing']"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no Chromium or Chrome is installed")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def fleet(file):
    with Process(file) as process:
        for body in FLEET:
            process.request("/messages", body)
        yield process


@pytest.fixture
def page(browser, fleet):
    """The dashboard; whatever comes to the console, violations of its policy too, is a failure."""
    browser.messages.clear()
    browser.emulate(1280, 900)
    browser.open(f"{fleet.url}/")
    browser.wait(TEXTS, CELLS)
    yield browser
    leave(browser)
    assert browser.messages == []


def leave(page, expected=None):
    """Leave the dashboard, so that its console is complete, and forget what was expected there."""
    page.open("about:blank")
    page.wait("location.href", "about:blank")
    if expected:
        page.messages[:] = [said for said in page.messages if expected not in said]


def test_the_page_shows_totals_and_how_long_ago_and_when(page):
    page.wait(f"{TOTALS}.map(name => byId(`total-${{name}}`).textContent).join()", "3,1,1,1,6,2")
    page.wait("document.querySelector('#speeds svg').ariaLabel.split('. ')[0]",
              "Speeds by status: 1 active, from 2,500 to 2,500; 1 awaiting launch; "
              "1 exploded, from 0 to 0")
    updated = page.evaluate(f"{ROWS}.map(row => [row.lastChild.innerText, row.lastChild.title])[0]")
    assert re.fullmatch(r"\d+ years ago", updated[0])
    assert "as sent: 2022-02-02T19:40:00+01:00" in updated[1]


def test_the_page_cuts_ages_and_writes_long_numbers_as_powers(page):
    ages = page.evaluate("[119, 120].map(second => ago(now() - 1000 * second))")
    assert ages == ["1 min ago", "2 min ago"]
    speeds = page.evaluate("[1 - 1e10, 1e10 - 1, -1e10, 1e10].map(speed => short(speed, 10))")
    assert speeds == ["−9,999,999,999", "9,999,999,999", "−1.00×10¹⁰", "1.00×10¹⁰"]


def test_the_page_asks_for_no_more_rockets_than_an_answer_holds(page):
    page.evaluate("shown = MOST - PAGE")
    for _ in range(2):  # before the answer to the first
        page.click("#more-button")
    assert page.evaluate("shown") == rockets.MAX_PAGE


def test_the_page_searches_filters_and_sorts(page, fleet):
    page.press("/")
    page.type("fALC")
    page.wait(LISTED, [CHANNEL])
    page.wait("location.hash", "#q=fALC")
    page.press("Escape")
    page.wait(TEXTS, CELLS)
    for status in rockets.STATUSES:
        page.evaluate(f"byId('status').value = '{status}'")
        page.evaluate("byId('status').dispatchEvent(new Event('change'))")
        listed = fleet.request(f"/rockets?status={status}")[1]["rockets"]
        page.wait(LISTED, [rocket["channel"] for rocket in listed])
    page.click("#clear")
    for order in [CHANNEL, EXPLODED, AWAITING], [EXPLODED, CHANNEL, AWAITING]:
        page.click("[data-sort=speed]")
        page.wait(LISTED, order)


def test_a_wrong_address_is_named_and_breaks_nothing(page):
    page.evaluate("location.hash = '#status=constructor&sort=__proto__'")
    wrong = "The address is wrong: status can't be “constructor”, "
    wrong += "sort can't be “__proto__”."
    page.wait("byId('notice').innerText", wrong)
    page.wait(TEXTS, CELLS)


def test_a_rocket_opens_with_its_history_and_closes_for_good(page):
    page.click("#rows tr")
    page.wait(HISTORY_LINES, LINES)
    page.wait("document.querySelector('#chart svg').ariaLabel.split(';')[0]",
              "Speed from 500 to 2,500, at most 3,500")
    page.wait("document.title", "Falcon-9 193270a9 – Rockets")
    page.evaluate("history.back()")
    page.wait("document.title", "Rockets")
    page.click("#rows tr")
    page.wait("byId('detail').checkVisibility()", True)
    page.click("#close")
    page.wait("location.hash", "")
    page.evaluate("setTimeout(() => history.back()) && 0")  # after the answer, as the page goes
    page.wait("location.href", "about:blank")


def test_the_page_holds_still_while_paused_and_then_shows_an_explosion_as_new(page, fleet):
    page.press(" ")
    page.wait(PULSE, "paused")
    fleet.request("/messages", exploded(5))
    two_polls_later = page.evaluate("performance.now()") + 2500
    page.wait(f"performance.now() > {two_polls_later}", True)
    page.wait(TEXTS, CELLS)
    page.press(" ")
    page.wait(f"{TEXTS}[0].slice(4)", ["Exploded", "5", "1"])
    page.wait("[document.querySelector('#rows tr').className, byId('total-new').innerText]",
              ["recent", "1 new"])
    page.wait("document.querySelector('#speeds svg').ariaLabel.includes('; 2 exploded')", True)


def test_the_page_survives_a_restart_of_the_service(page, fleet, file):
    fleet.stop(signal.SIGTERM)
    page.wait(PULSE, "stale")
    page.wait(TEXTS, CELLS)
    with Process(file, "--port", fleet.url.rpartition(":")[2]) as restarted:
        restarted.request("/messages", faster(3, 7))
        page.wait(f"{TEXTS}[0][3]", "2,507")
        page.wait(PULSE, "live")
        leave(page, expected="net::ERR_CONNECTION")


def test_what_rockets_send_is_shown_as_text(page, fleet):
    hostile = ["<img src=x onerror='hurt = 1'>", "<script>hurt = 1</script>", "toString", "\u200b"]
    for first, name in enumerate(hostile, 4):
        channel = f"{first}0000000-0000-4000-8000-000000000000"
        fleet.request("/messages", launch(1, channel=channel, type=name, mission=name))
        fleet.request("/messages", exploded(2, name, channel=channel))
    page.wait(f"{TEXTS}.slice(3).map(cells => cells[1])", [*hostile[:3], "blank"])
    page.click("#rows tr:nth-child(4)")
    page.wait(f"{HISTORY_LINES}.map(cells => cells[1])",
              [f"✖Exploded: {hostile[0]}", f"●Launched at 500 for {hostile[0]}"])
    page.wait("document.querySelector('img, [onerror], tr script') ?? typeof hurt", "undefined")
    page.wait("tell({type: 'toString', message: {}}).join()", "toString,")  # of a later version
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b>')")
    leave(page, expected="TrustedHTML")


def test_the_list_is_saved_as_csv_that_runs_no_formula(page, fleet):
    fleet.request("/messages", renamed(1, " =1+1", channel=AWAITING))
    page.click("#as-csv")
    with page.saved("rockets.csv").open(encoding="utf-8-sig", newline="") as text:
        found = list(csv.DictReader(text))
    expected = fleet.request("/rockets")[1]["rockets"]
    expected[1]["mission"], expected[2]["mission"] = "' =1+1", "'=1+1"
    assert found == [
        {key: "" if value is None else str(value) for key, value in rocket.items()}
        for rocket in expected
    ]


# tools/launch.py ##################################################################################

FIELDS = (
    *("channel", "type", "speed", "mission", "status", "explosionReason"),
    *("launchedAt", "updatedAt", "lastMessageNumber", "missingMessages"),
)
A_THOUSAND = ("--max-messages=1000", "--duplicates=0.2", "--reorder=100", "--seed=7")


def run_launch(process, *options):
    """Return the exit code, what the report says by its first words, and the lines after it."""
    command = [sys.executable, launch_tool.__file__, f"{process.url}/messages", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    lines = done.stdout.splitlines()
    return done.returncode, dict(line.split(maxsplit=1) for line in lines[:6]), lines[6:]


def test_launch_sends_every_message_and_some_twice_and_finds_no_difference(tmp_path):
    with Process(tmp_path / "rockets.db") as process:
        code, report, compared = run_launch(process, *A_THOUSAND)
        health = process.request("/health")[1]
    assert (code, compared) == (0, ["20 rockets, 0 differences"])
    assert (health["rockets"], health["messages"]) == (20, 1000)
    copies = int(report["messages"].replace(",", "")) - 1000
    assert 150 < copies < 250
    assert report["duplicates"] == f"{copies} sent, {copies} answered as such"


def test_launch_names_what_is_wrong_and_exits_1(tmp_path):
    with Process(tmp_path / "rockets.db") as process:
        run_launch(process, *A_THOUSAND)
        with closing(sqlite3.connect(tmp_path / "rockets.db")) as connection, connection:
            (channel,) = connection.execute("SELECT max(channel) FROM rockets").fetchone()
            connection.execute("UPDATE rockets SET mission = 'X' WHERE channel = ?", (channel,))
        code, report, compared = run_launch(process, *A_THOUSAND)
    assert report["duplicates"].endswith(f"{report['messages']} answered as such")
    assert code == 1
    assert compared[0].startswith(f'{channel} mission is "X", not "')
    assert compared[1:] == ["20 rockets, 1 differences"]


def test_launch_takes_its_messages_from_its_seed(tmp_path):
    def contents(seed):
        return [message["message"] for message in islice(launch_tool.fly(seed), 100)]

    assert contents(7) == contents(7) != contents(8)
    with Process(tmp_path / "rockets.db") as process:
        for seed in (7, 8, 8):
            run_launch(process, f"--seed={seed}", "--max-messages=200")
        assert process.request("/health")[1] == {"status": "ok", "rockets": 40, "messages": 400}


def test_launch_flies_as_the_test_program_does():
    flown = {}
    for message in islice(launch_tool.fly(444), 100_000):
        channel, number = (message["metadata"][key] for key in ("channel", "messageNumber"))
        rocket = flown.get(channel, {"lastMessageNumber": 0, "status": "active"})
        assert (number, rocket["status"]) == (rocket["lastMessageNumber"] + 1, "active")
        launch_tool.fold(flown, message)
        speed = flown[channel]["speed"]
        assert speed >= 500 and speed % 500 == 0
    statuses = Counter(rocket["status"] for rocket in flown.values())
    assert statuses == {"active": 14, "exploded": 6}


def test_launch_pauses_between_messages_and_compares_nothing_if_asked_to(tmp_path):
    with Process(tmp_path / "rockets.db") as process:
        options = ("--message-delay=20ms", "--max-messages=20", "--no-verify")
        code, report, compared = run_launch(process, *options)
    assert (code, compared) == (0, [])
    assert float(report["seconds"]) >= 0.3


def test_launch_stopped_by_ctrl_c_reports_but_compares_nothing_and_exits_130(tmp_path):
    command = [sys.executable, launch_tool.__file__, "--message-delay=1m", "--max-messages=2"]
    options = {"stdout": subprocess.PIPE, "text": True}
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not ignored
    with (
        Process(tmp_path / "rockets.db") as process,
        subprocess.Popen([*command, f"{process.url}/messages"], **options) as popen,
    ):
        wait_until(lambda: process.request("/health")[1]["messages"])
        popen.send_signal(signal.SIGINT)
        lines = popen.communicate(timeout=60)[0].splitlines()
    assert (popen.returncode, lines[0].split()[0], len(lines)) == (130, "messages", 6)


def test_launch_reads_a_duration_with_its_unit():
    durations = [launch_tool.seconds(text) for text in ("0", "500ms", "1.5s", "2m")]
    assert durations == [0, 0.5, 1.5, 120]


def test_launch_sends_no_message_later_than_it_may():
    bodies = [b"%d" % number for number in range(1000)]
    sent = [int(body) for _, body in launch_tool.disorder(bodies, 7, reorder=50, duplicates=0)]
    assert sorted(sent) == list(range(1000))
    assert 25 < max(place - number for place, number in enumerate(sent)) <= 50
    assert sent != [int(body) for _, body in launch_tool.disorder(bodies, 8, 50, 0)]


def test_launch_compares_every_field():
    flight = launch_tool.Flight(seed=7, messages=1000)
    list(flight.bodies())
    channel, rocket = max(flight.rockets.items())
    assert not list(launch_tool.compare(flight.rockets, flight.rockets, departure=""))
    assert list(launch_tool.compare({channel: rocket}, {}, "")) == [f"{channel} is missing"]
    found = launch_tool.compare({channel: rocket}, {channel: dict.fromkeys(FIELDS, "X")}, "")
    right = [(name, json.dumps(rocket[name])) for name in FIELDS]
    assert set(found) == {f'{channel} {name} is "X", not {value}' for name, value in right}


def test_launch_lets_times_of_an_earlier_flight_be():
    flight = launch_tool.Flight(seed=7, messages=1000)
    list(flight.bodies())
    earlier = {channel: dict.fromkeys(FIELDS, "2022") for channel in flight.rockets}
    found = list(launch_tool.compare(flight.rockets, earlier, flight.departure))
    assert {line.split()[1] for line in found} == set(FIELDS) - {"launchedAt", "updatedAt"}


class RefusingOnce(BaseHTTPRequestHandler):
    """Answers with the status that the body asks for the first time, and with 202 from then on."""

    seen = Counter()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen[body] += 1
        self.send_response(202 if self.seen[body] > 1 else int(body))
        self.end_headers()


def test_launch_sends_again_after_half_a_second_what_gets_no_2xx():
    bodies, notices = [b"301", b"400", b"404", b"503", b" 503"], []
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingOnce) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://localhost:{server.server_port}/messages"  # ::1 first, where there is one
        sender = launch_tool.Sender(url, concurrency=2, notice=notices.append)
        took = sender.run(launch_tool.http_request("POST", url, body) for body in bodies)
        server.shutdown()
    assert RefusingOnce.seen == dict.fromkeys(bodies, 2)
    assert took >= 0.5
    assert "404 Not Found; trying again every 500 ms." in notices
    assert (len(notices), sender.retries.total(), len(sender.latencies)) == (4, 5, 5)


def test_launch_gives_up_an_answer_that_does_not_come(monkeypatch):
    monkeypatch.setattr(launch_tool, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/messages"
        sender = launch_tool.Sender(url, notice=sys.exit)
        with pytest.raises(SystemExit, match=r"No answer within 0\.1 s; trying again every 500 ms"):
            sender.run([launch_tool.http_request("POST", url, b"{}")])


def test_launch_reads_all_pages(tmp_path):
    store = rockets.Store(str(tmp_path / "rockets.db"))
    with store.transaction():
        for number in range(10_001):
            body = launch(channel=str(uuid.UUID(int=number)))
            store.apply(rockets.parse_message(json.dumps(body).encode()))
    store.close()
    with Process(tmp_path / "rockets.db") as process:
        assert len(launch_tool.read_rockets(f"{process.url}/messages")) == 10_001


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ('</rockets?limit=2&offset=2>; rel="next"', "/rockets?limit=2&offset=2"),
        ('</a>; rel="prev", </b,c>; title=d; rel=next', "/b,c"),
        ('</a>; rel="last Next"', "/a"),
        ('</a>; rel="next-to-last"', None),
        ("", None),
    ],
    ids=["one", "second", "two relations", "another relation", "none"],
)
def test_launch_follows_the_link_to_the_next_page(link, target):
    assert launch_tool.next_page(link) == target
