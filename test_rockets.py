"""The rules of the service, each as a test: over HTTP, on a real database file.

Most tests ask the app. A Process is the whole service, as a user starts it.
"""

import inspect
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from http.client import HTTPException, HTTPResponse, responses
from itertools import permutations
from pathlib import Path
from urllib.parse import urljoin

import pytest
from webtest import TestApp

import rockets

SERVICE = Path(rockets.__file__)
CHANNEL = "193270a9-c9cf-404a-8f83-838e71d9ae67"
LAUNCH = {"type": "Falcon-9", "launchSpeed": 500, "mission": "ARTEMIS"}
APPLIED = (202, {"status": "applied"})
DUPLICATE = (202, {"status": "duplicate"})
HISTORY = f"/rockets/{CHANNEL}/messages"
PROBLEM = "application/problem+json"

# Messages and the app #############################################################################


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rockets.db"


@pytest.fixture
def store(file):
    with closing(rockets.Store(str(file))) as store:
        yield store


def make_app(store):
    return TestApp(rockets.create_app(store), extra_environ={"REMOTE_ADDR": "192.0.2.7"})


@pytest.fixture
def app(store):
    return make_app(store)


def nth(number):
    """Return a channel. Channels sort as their numbers do."""
    return str(uuid.UUID(int=number))


def message(number, message_type, content, channel=CHANNEL, at=None):
    at = at or f"2022-02-02T19:{number // 60 % 60:02}:{number % 60:02}+01:00"
    metadata = {"channel": channel, "messageNumber": number}
    metadata |= {"messageTime": at, "messageType": message_type}
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


def on(channel, body):
    """Return a message on another channel."""
    return body | {"metadata": body["metadata"] | {"channel": channel}}


def fold(messages):
    """Return what the messages of a rocket mean. Of those with one number, the first counts."""
    by_number = {each["metadata"]["messageNumber"]: each for each in reversed(messages)}
    last = by_number[max(by_number)]["metadata"]
    rocket = dict.fromkeys(rockets.ROCKET_FIELDS) | {"channel": last["channel"]}
    rocket |= {"status": "awaiting_launch", "updatedAt": last["messageTime"]}
    rocket["lastMessageNumber"] = last["messageNumber"]
    rocket["missingMessages"] = last["messageNumber"] - len(by_number)
    change = 0
    for _, each in sorted(by_number.items()):
        content = each["message"]
        match each["metadata"]["messageType"]:
            case "RocketLaunched":
                rocket["mission"] = content["mission"]
                if rocket["type"] is None:
                    rocket |= {"type": content["type"], "speed": content["launchSpeed"]}
                    rocket["launchedAt"] = each["metadata"]["messageTime"]
            case "RocketMissionChanged":
                rocket["mission"] = content["newMission"]
            case "RocketExploded":
                rocket["explosionReason"] = rocket["explosionReason"] or content["reason"]
            case "RocketSpeedIncreased":
                change += content["by"]
            case "RocketSpeedDecreased":
                change -= content["by"]
    if rocket["type"]:
        rocket |= {"speed": rocket["speed"] + change, "status": "active"}
    if rocket["explosionReason"]:
        rocket["status"] = "exploded"
    return rocket


def post(app, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return app.post("/messages", content, **({"content_type": "application/json"} | options))


def get(app, channel=CHANNEL):
    return app.get(f"/rockets/{channel}").json


def fill(file, bodies):
    """Store messages in a database file, which is made if it is not there."""
    with closing(rockets.Store(str(file))) as store, store.transaction():
        for body in bodies:
            store.apply(rockets.parse_message(json.dumps(body).encode()))


def run_sql(file, script):
    """Change a database file behind the service's back."""
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(script)


def dump(file):
    """Return all rows of both tables."""
    with closing(sqlite3.connect(file)) as connection:
        tables = ("rockets", "messages")
        return [list(connection.execute(f"SELECT * FROM {name}")) for name in tables]


@contextmanager
def locked(file):
    """Hold the lock of the database during the block, as another process may."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


# Processes and raw HTTP ###########################################################################

# Some shells set HOST. The tests of these variables give their own.
ENVIRON = {name: os.environ[name] for name in {*os.environ} - {"HOST", "PORT", "DATABASE"}}
BODY = json.dumps(launch()).encode()
LENGTH = f"Content-Length: {len(BODY)}\r\n"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def wait_until(condition, seconds=60):
    """Return what a condition returns as soon as it holds. Raise TimeoutError if it doesn't."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not hold within {seconds} s")
        time.sleep(0.005)
    return found


class Process:
    """The service as a user starts it, on a free port; killed at the end of the with block.

    Without a file, only the options and the environment tell which file and port it takes.
    """

    def __init__(self, file, *options, program=(SERVICE,), folder=None, **environ):
        given = ("--database", file, "--port", "0") if file else ()
        self.command = [sys.executable, *program, *given, *options]
        self.where = {"env": ENVIRON | environ, "cwd": folder}

    def __enter__(self):
        self.stderr = tempfile.TemporaryFile()
        pipes = {"stdout": subprocess.PIPE, "stderr": self.stderr, "text": True}
        self.popen = subprocess.Popen(self.command, **pipes, **self.where)
        self.said = self.popen.stdout.readline()
        address = re.search(r"Rockets listens on (http://[^, ]+),", self.said)
        assert address, self.logged()
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
        """Send a signal that ends the service. Return its exit code."""
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
        """Return the status and the JSON of an answer. POST if there is a body."""
        content = json.dumps(body).encode() if body else None
        try:
            answer = urllib.request.urlopen(self.url + path, content, timeout)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return answer.status, json.load(answer)


def start_in_vain(file, *options, **others):
    """Return what a service that cannot start says, which must be one line; it must exit with 1."""
    process = Process(file, *options, **others)
    pipes = {"capture_output": True, "text": True, "timeout": 30}
    done = subprocess.run(process.command, **pipes, **process.where)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("rockets: ")
    return done.stderr


def http(body, headers=LENGTH, version="1.1", close=True):
    """Return the bytes of a POST."""
    last = "Connection: close\r\n" if close else ""
    return f"POST /messages HTTP/{version}\r\nHost: rockets\r\n{headers}{last}\r\n".encode() + body


def sized(body, headers="", **options):
    return http(body, f"Content-Length: {len(body)}\r\n{headers}", **options)


def chunked(body):
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def exchange(process, data):
    """Send bytes over a new connection. Return all that comes until the service closes it."""
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
    """Post messages in one turn of the service, if each is below 8 KB. Return the answers."""
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


# The state ########################################################################################


LIVES = {
    "usual": [launch(1), faster(2, 3000), renamed(3), slower(4, 2500), exploded(5)],
    "two launches": [launch(1), launch(4, type="B", launchSpeed=9, mission="B"), renamed(3, "C")],
    "two explosions": [launch(1), exploded(3, "THREE"), exploded(2, "TWO"), slower(4, 700)],
    "after an explosion": [launch(2), exploded(4), faster(7, 3000), renamed(9, "AFTER")],
    "no launch": [faster(3, 1), slower(8, 9), renamed(5, "NO_LAUNCH"), renamed(7, "B")],
    "times run back": [launch(2, at="2022-02-09T00:00:00Z"), faster(4, at="2022-02-07T00:00:00Z")],
    "limits": [launch(2**53 - 1, launchSpeed=2**31 - 1), faster(1, 2**31 - 1), slower(2, 0)],
}


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_every_permutation_of_a_life_delivered_twice_ends_the_same(app, life):
    for permutation in permutations(life):
        channel, delivered = str(uuid.uuid4()), []
        for each in permutation:
            delivered.append(on(channel, each))
            assert post(app, delivered[-1], status=202).json == {"status": "applied"}
            assert post(app, delivered[-1], status=202).json == {"status": "duplicate"}
            assert get(app, channel) == fold(delivered)


def test_a_rocket_is_served_with_all_its_fields(app):
    for body in reversed(LIVES["usual"]):
        post(app, body)
    assert get(app) == {
        "channel": CHANNEL, "type": "Falcon-9", "speed": 1000, "mission": "SHUTTLE_MIR",
        "status": "exploded", "explosionReason": "PRESSURE_VESSEL_FAILURE",
        "launchedAt": "2022-02-02T19:00:01+01:00", "updatedAt": "2022-02-02T19:00:05+01:00",
        "lastMessageNumber": 5, "missingMessages": 0,
    }  # fmt: skip


def test_shuffled_streams_agree_with_the_fold_after_every_delivery(app):
    rng, sent, known = random.Random(1), [], {}
    for channel in map(nth, range(60)):
        for number in rng.sample(range(1, 60), rng.randint(1, 30)):
            choices = [launch(number, type=rng.choice("AB"), launchSpeed=rng.randrange(9))]
            choices += [faster(number, rng.randrange(9000)), slower(number, rng.randrange(9000))]
            choices += [renamed(number, rng.choice("XYZ")), exploded(number, rng.choice("PQR"))]
            sent.append(on(channel, rng.choices(choices, [2, 4, 4, 3, 1])[0]))
    sent += rng.sample(sent, len(sent) // 10)
    rng.shuffle(sent)
    for delivery in sent:
        channel = delivery["metadata"]["channel"]
        known.setdefault(channel, []).append(delivery)
        post(app, delivery, status=202)
        assert get(app, channel) == fold(known[channel])
    assert app.get("/rockets").json["rockets"] == [fold(known[each]) for each in sorted(known)]


OTHERS = [faster(2, 777), slower(2, 100), renamed(2, "\x1b\r\n\x9b\u2028\u202e" + "x" * 200)]


@pytest.mark.parametrize("other", OTHERS, ids=["content", "type", "control characters"])
def test_another_message_of_a_known_number_is_a_duplicate_and_a_warning(app, file, caplog, other):
    post(app, faster(2, 100))
    before = dump(file)
    assert post(app, other, status=202).json == {"status": "duplicate"}
    assert dump(file) == before
    (said,) = caplog.messages
    assert f"message 2 of {CHANNEL} " in said and other["metadata"]["messageType"] in said
    assert said.isprintable() and len(said) < 350


def test_a_redelivery_in_another_spelling_does_not_differ(app, caplog):
    post(app, launch())
    body = launch(channel=CHANNEL.upper(), launchSpeed=500.0, at="2022-02-02T19:00:02+01:00")
    body["message"] = dict(reversed(body["message"].items()))
    assert post(app, body).json == {"status": "duplicate"}
    assert not caplog.records


# Validation #######################################################################################

SPEED = "a whole number from 0 to 2147483647"
NAME = "a text of 1 to 256 characters, no NUL, no lone surrogate"
TYPES = "RocketLaunched RocketSpeedIncreased RocketSpeedDecreased RocketExploded".split()
TYPES += ["RocketMissionChanged"]
NOTHING = [..., None, True, [], ""]  # ... leaves the field out
NO_NUMBERS = [*NOTHING, {}, "7", 5.5, 7e99, -1]
NO_NAMES = [*NOTHING, {}, 7, "x" * 257, "a\0b", "\ud800", "\udfff"]
NO_CHANNELS = [*NOTHING, {}, 7, f"{CHANNEL}0", f" {CHANNEL}", f"{{{CHANNEL}}}", f"{CHANNEL}\n"]
NO_CHANNELS += [CHANNEL.replace("-", ""), CHANNEL.replace("1", "\uff11"), CHANNEL[:-1] + "g"]
NO_TIMES = """
    2022-02-02T19:39:05 2022-02-02 2022-13-02T19:39:05Z 2022-02-30T19:39:05Z 2022-02-02T24:00:00Z
    2022-02-02T19:60:05Z 2016-12-31T23:59:60Z 2022-02-02T19:39:05.Z 2022-02-02T19:39:05+14:01
    2022-02-02T19:39:05-15:00 2022-02-02T19:39:05+01:60 2022-02-02T19:39:05+0100
    2022-2-2T19:39:05Z 2022-02-02_19:39:05Z 0000-01-01T00:00:00Z 2022-02-02T19:39Z
    2022-02-02T19:39:0\u0665Z 1643827145""".split()
FIELDS = {  # what each field must be, and values that it must not have
    "metadata": ("an object", [*NOTHING, 7]),
    "message": ("an object", [*NOTHING, 7]),
    "metadata.channel": ("a UUID", NO_CHANNELS),
    "metadata.messageNumber": (
        "a whole number from 1 to 9007199254740991", [*NO_NUMBERS, 0, 2**53, 2.0**53, 10**400]
    ),
    "metadata.messageTime": (
        "an RFC 3339 time with an offset up to 14:00, such as 2022-02-02T19:39:05+01:00",
        [*NOTHING, {}, 1643827145, *NO_TIMES],
    ),
    "metadata.messageType": (f"one of {', '.join(TYPES)}", [*NOTHING, {}, "rocketlaunched", "x"]),
    "message.type": (NAME, NO_NAMES),
    "message.launchSpeed": (SPEED, [*NO_NUMBERS, 2**31]),
    "message.mission": (NAME, NO_NAMES),
}  # fmt: skip
BAD_FIELDS = [(path, value, words) for path, (words, values) in FIELDS.items() for value in values]
BAD_FIELDS += [("RocketSpeedIncreased.by", -1, SPEED), ("RocketSpeedDecreased.by", 2**31, SPEED)]
BAD_FIELDS += [("RocketExploded.reason", "", NAME), ("RocketMissionChanged.newMission", 7, NAME)]


def short(value):
    """Return the id of a test of a value."""
    return None if isinstance(value, dict) else str(value).replace(CHANNEL, "channel")[:24]


def assert_problem(answer, words):
    """Check that an answer is an error with a detail that begins so."""
    title, detail = responses[answer.status_int], answer.json["detail"]
    assert answer.json == {"title": title, "status": answer.status_int, "detail": detail}
    assert answer.content_type == PROBLEM and detail.startswith(words) and len(detail) < 300


def assert_refused(app, file, body, words, status=400):
    """Post a body that must be refused with a detail that begins so, and must change nothing."""
    post(app, faster(7))
    before = dump(file)
    assert_problem(post(app, body, status=status), words)
    assert dump(file) == before


@pytest.mark.parametrize(("path", "value", "words"), BAD_FIELDS, ids=short)
def test_a_bad_field_is_named_with_its_rule_and_value_and_changes_nothing(
    app, file, path, value, words
):
    body, (*parents, name) = launch(), path.split(".")
    if parents and parents[0] in TYPES:
        body, parents = message(1, parents[0], dict(LAUNCH)), ["message"]
    holder = body[parents[0]] if parents else body
    holder[name] = value
    if value is ...:
        del holder[name]
    got = "nothing" if value is ... else json.dumps(value)[:100]
    assert_refused(app, file, body, ".".join([*parents, name]) + f" must be {words}, got {got}")


NO_JSON = [b"", BODY[:-1], BODY + BODY, BODY.decode().encode("utf-16"), b"[" * 10_000]
NO_JSON += [BODY.replace(b"ARTEMIS", b"\xff")]
EXTRA = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, rb'"\ud800"')
NO_JSON += [BODY.replace(b"{", b'{"extra": NaN, ', 1)]
NO_JSON += [BODY.replace(b"500", b'500, "extra": ' + value) for value in EXTRA]


@pytest.mark.parametrize("body", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_or_no_object_is_refused_and_changes_nothing(app, file, body):
    words = "the body must be JSON in UTF-8, with finite numbers and no lone surrogates: "
    assert_refused(app, file, body, words)
    for value in (b"[]", b"null", b"7", b'"metadata"'):
        assert_refused(app, file, value, "body must be an object, got ")


def test_a_body_of_16_kib_is_taken_and_a_longer_one_refused(app, file):
    long = BODY.ljust(16 * 1024 + 1)
    assert_refused(app, file, long, "the body must be at most 16384 bytes long", 413)
    post(app, long[:-1], status=202)


def test_what_is_just_within_the_limits_is_taken_and_unknown_fields_are_kept_but_count_not(app):
    names = {"type": "\U0001f680" * rockets.MAX_NAME, "mission": "\x01\x7f\u2028\"'<\\&%s{0}é"}
    strange = {"by": 9, "reason": {"a": [2**70, 0.5, None]}, "newMission": []}
    body = launch(rockets.MAX_NUMBER, launchSpeed=rockets.MAX_SPEED, **names, **strange)
    post(app, body | {"extra": 1}, status=202)
    assert get(app) == fold([body])
    assert app.get(HISTORY).json["messages"] == [body]


@pytest.mark.parametrize("spelled", ["7", "7.0", "7e0", "70E-1", "0.7e+1"])
def test_a_number_without_a_fraction_is_whole_however_it_is_spelled(app, spelled):
    body = json.dumps(launch(7, launchSpeed=7)).replace(" 7,", f" {spelled},")
    post(app, body.encode(), status=202)
    served = app.get(f"/rockets/{CHANNEL}").text + app.get(HISTORY).text
    for words in ('"speed":7,', '"lastMessageNumber":7,', '"launchSpeed":7,', '"messageNumber":7,'):
        assert words in served


TIMES = "2022-02-02t19:39:05z 2024-02-29T23:59:59.123456789012-00:00 0001-01-01T00:00:00+14:00"
TIMES += f" 9999-12-31T23:59:59-13:59 2022-02-02T19:39:05.{'0' * 300}Z"


@pytest.mark.parametrize("at", TIMES.split(), ids=short)
def test_a_time_is_served_as_sent_but_for_the_case_of_t_and_z(app, at):
    post(app, launch(at=at), status=202)
    (kept,) = app.get(HISTORY).json["messages"]
    served = get(app)["launchedAt"], get(app)["updatedAt"], kept["metadata"]["messageTime"]
    assert served == (at.upper(),) * 3


def test_a_channel_may_come_in_either_case_and_is_served_in_lower_case(app):
    post(app, launch(channel=CHANNEL.upper()), status=202)
    assert get(app, CHANNEL.upper()) == fold([launch()])
    answer = app.get(f"/rockets/{CHANNEL.upper()}/messages").json
    assert (answer["channel"], answer["messages"]) == (CHANNEL, [launch()])


def test_any_content_type_will_do(app):
    for headers in ({}, {"Content-Type": "multipart/form-data"}, {"Content-Type": "x"}):
        app.request("/messages", method="POST", body=BODY, headers=headers, status=202)


# The list and the history #########################################################################

FIVE = [  # rockets with ties, nulls, times of several offsets, and messages that come late
    faster(5, 1, channel=nth(1), at="2022-02-02T12:00:00.002+01:00"),
    launch(2, channel=nth(1), at="2022-02-09T00:00:00Z", type="Z", launchSpeed=99, mission="X"),
    launch(1, channel=nth(1), at="2022-02-02T11:00:00.50Z", type="B", launchSpeed=4, mission="Q"),
    launch(1, channel=nth(2), at="2022-02-02T12:00:00.5+01:00", type="A", launchSpeed=5),
    exploded(2, channel=nth(3), at="2022-02-02T12:30:00+02:00"),
    launch(1, channel=nth(3), at="2022-02-02T06:00:00-06:00", type="A", launchSpeed=9, mission="X"),
    faster(3, 1, channel=nth(4), at="2022-02-02T11:00:00.001Z"),
    exploded(1, channel=nth(5), at="2022-02-02T23:00:00+13:00"),
]
SORTED = {  # the order of these rockets, ascending and descending
    "channel": ("12345", "54321"), "type": ("23145", "12345"), "speed": ("12345", "31245"),
    "mission": ("21345", "13245"), "status": ("12435", "35412"), "launchedAt": ("12345", "31245"),
    "updatedAt": ("53412", "21435"), "lastMessageNumber": ("25341", "14325"),
    "missingMessages": ("23514", "14235"),
}  # fmt: skip


def digits(answer):
    """Return which rockets an answer lists, by the last digits of their channels."""
    return "".join(rocket["channel"][-1] for rocket in answer.json["rockets"])


@pytest.mark.parametrize("sort", SORTED)
def test_rockets_sort_by_every_key_ties_by_channel_and_null_last(app, file, sort):
    fill(file, FIVE)
    assert SORTED.keys() == rockets.SORT_KEYS.keys()
    for order, expected in zip(("asc", "desc"), SORTED[sort], strict=True):
        head = {"count": 5, "total": 5, "sort": sort, "order": order}
        listed = {"rockets": [get(app, nth(int(digit))) for digit in expected]}
        assert app.get(f"/rockets?sort={sort}&order={order}").json == head | listed


def test_texts_sort_by_code_point_and_rockets_by_channel_unless_asked_otherwise(app, file):
    head = {"count": 0, "total": 0, "sort": "channel", "order": "asc"}
    assert app.get("/rockets").json == head | {"rockets": []}
    missions = ["Z", "a", "\U0001f680", "\uff5a", "É"]
    fill(file, [launch(channel=nth(5 - n), mission=mission) for n, mission in enumerate(missions)])
    assert digits(app.get("/rockets")) == "12345"
    assert digits(app.get("/rockets?sort=mission")) == "54123"


FOUND = {"status=exploded": "35", "status=active": "1267", "status=awaiting_launch": "4"}
FOUND |= {"type=A": "23", "mission=X": "13", "mission=Stra%C3%9Fe": "6", "q=": "1234567"}
FOUND |= {"mission=X&type=A&status=exploded&q=x": "3", "mission=X&type=A&status=active": ""}
FOUND |= {"q=STRASSE": "6", "q=stra%C3%9Fe": "6", "q=falcon-9": "67", "q=000000000005": "5"}
FOUND |= {"q=%25": "7", "q=_": "7", "q=%5C": "7", "q=%C3%A9": "7", "q=9%C3%A9": ""}
FOUND |= {"q=k2": "7", "q=" + "%C3%9F" * 64: ""}  # the mission has the sign of Kelvin
for none in "type=a mission=STRASSE mission=%25 mission=_ mission= type=%00 q=%00".split():
    FOUND[none] = ""


@pytest.mark.parametrize(("query", "expected"), FOUND.items(), ids=short)
def test_filters_leave_what_is_equal_and_q_what_contains_it_whatever_the_case(
    app, file, query, expected
):
    sixth = launch(channel=nth(6), mission="Straße")
    seventh = launch(channel=nth(7), type="FALCON-9", mission="É_50%\\\u212a2")
    fill(file, [*FIVE, sixth, seventh])
    answer = app.get(f"/rockets?{query}")
    found = [digits(answer), answer.json["count"], answer.json["total"]]
    assert found == [expected, len(expected), len(expected)]


def following(app, path):
    """Return the answer from a path, and those that its Link and theirs lead to."""
    answers = [app.get(path)]
    while (link := answers[-1].headers.get("Link")) and len(answers) < 9:
        reference = re.fullmatch(r'<(\?.*)>; rel="next"', link)[1]
        answers.append(app.get(urljoin(answers[-1].request.path_qs, reference)))
    return answers


def test_pages_neither_skip_nor_repeat_and_link_to_the_next(app, file):
    fill(file, FIVE)
    for size in range(1, 7):
        pages = following(app, f"/rockets?sort=status&limit={size}")
        assert "".join(map(digits, pages)) == SORTED["status"][0]
        assert [page.json["total"] for page in pages] == [5] * -(-5 // size)
        assert [page.json["count"] for page in pages] == [len(digits(page)) for page in pages]
    answer = app.get("/rockets?offset=9007199254740991")
    head = {"count": 0, "total": 5, "sort": "channel", "order": "asc"}
    assert (answer.json, "Link" in answer.headers) == (head | {"rockets": []}, False)


def test_1000_rockets_are_one_answer_and_more_are_linked_to_with_the_same_query(app, file):
    each = enumerate(["none"] * 10 + ["É & é"] * 1010)
    fill(file, (launch(channel=nth(n), launchSpeed=n % 7, mission=name) for n, name in each))
    query = "q=%C3%A9+%26&sort=speed&order=desc&mission=%C3%89+%26+%C3%A9&status=active"
    first, second = following(app, f"/rockets?{query}")
    expected = [nth(n) for n in sorted(range(10, 1020), key=lambda n: (-(n % 7), n))]
    listed = [[each["channel"] for each in page.json["rockets"]] for page in (first, second)]
    assert listed == [expected[:1000], expected[1000:]]
    assert (first.json["total"], second.json["count"], second.json["order"]) == (1010, 10, "desc")


def test_the_history_is_what_was_posted_in_the_order_of_numbers(app, file):
    first = launch(2, extra={"kept": [1, "é", None]}, at="2023-01-01T00:00:00Z")
    second, third = faster(4, 1), renamed(9, "B", at="2022-02-02T19:39:05.10+01:00")
    for body in (third, first, second, launch(1, channel=nth(1))):
        post(app, body)
    for query, order, messages, link in [
        ("", "asc", [first, second, third], None),
        ("?after=2&limit=1", "asc", [second], "after=4&limit=1"),
        ("?limit=3", "asc", [first, second, third], None),
        ("?after=2&before=9", "asc", [second], None),
        ("?before=9007199254740992&order=desc", "desc", [third, second, first], None),
        ("?order=desc&limit=2", "desc", [third, second], "order=desc&limit=2&before=4"),
    ]:
        answer = app.get(f"{HISTORY}{query}")
        head = {"channel": CHANNEL, "count": len(messages), "total": 3, "order": order}
        assert answer.json == head | {"messages": messages}
        assert answer.headers.get("Link") == (link and f'<?{link}>; rel="next"')
    page = app.get(f"{HISTORY}?limit=2")
    fill(file, [faster(1), faster(7)])  # neither makes the next page skip or repeat one
    (rest,) = following(app, HISTORY + re.search("[?].*(?=>)", page.headers["Link"])[0])
    assert [page.json["messages"], rest.json["messages"]] == [[first, second], [faster(7), third]]


TO_1000 = "must be a whole number from 1 to 1000, got"
BAD_SORT = f"sort must be one of {', '.join(SORTED)}, got"
BAD_PARAMETERS = {
    "/rockets?sort=SPEED": f'{BAD_SORT} "SPEED"',
    "/rockets?order=up": 'order must be one of asc, desc, got "up"',
    "/rockets?status=lost": 'status must be one of active, awaiting_launch, exploded, got "lost"',
    "/rockets?limit=0": f'limit {TO_1000} "0"',
    "/rockets?limit=1001": f'limit {TO_1000} "1001"',
    "/rockets?limit=": f'limit {TO_1000} ""',
    "/rockets?limit=%D9%A1": f'limit {TO_1000} "\\u0661"',
    "/rockets?limit=" + "9" * 5000: f'limit {TO_1000} "{"9" * 99}',
    "/rockets?offset=-1": 'offset must be a whole number from 0 to 9007199254740991, got "-1"',
    "/rockets?q=" + "x" * 65: f'q must be at most 64 characters, got "{"x" * 65}"',
    f"{HISTORY}?limit=1001": f'limit {TO_1000} "1001"',
    f"{HISTORY}?after=x": 'after must be a whole number from 0 to 9007199254740991, got "x"',
    f"{HISTORY}?before=0": 'before must be a whole number from 1 to 9007199254740992, got "0"',
    f"{HISTORY}?order=up": 'order must be one of asc, desc, got "up"',
    "/rockets/apollo": 'channel must be a UUID, got "apollo"',
    "/rockets/apollo/messages": 'channel must be a UUID, got "apollo"',
}


@pytest.mark.parametrize(("path", "detail"), BAD_PARAMETERS.items(), ids=short)
def test_a_bad_parameter_is_named_with_what_it_may_be_even_by_a_fitting_tag(app, path, detail):
    post(app, launch())
    tag = app.get("/rockets").headers["ETag"]
    assert_problem(app.get(path, headers={"If-None-Match": tag}, status=400), detail)


# HTTP #############################################################################################

OF_THE_STATE = ["/rockets", f"/rockets/{CHANNEL}", HISTORY, "/fleet"]
GETS = [*OF_THE_STATE, "/health", "/metrics"]
ELSEWHERE, ALLOW = {"Origin": "http://elsewhere.example"}, "Access-Control-Allow-Origin"


def test_what_is_unknown_or_outside_of_the_static_files_is_a_problem_without_a_tag(app):
    outside = ["/static/../rockets.py", "/static/%2e%2e/rockets.py", "/static//etc/hosts"]
    for path in [*OF_THE_STATE[1:3], "/nowhere", "/rockets/", "/static/none.js", *outside]:
        answer = app.get(path, status=[403, 404])
        assert_problem(answer, "no message has come on this channel" if CHANNEL in path else "")
        assert "ETag" not in answer.headers


def test_a_wrong_method_is_a_405_that_names_the_right_ones(app):
    for method, path, allowed in [("GET", "/messages", "POST"), ("DELETE", "/fleet", "GET")]:
        answer = app.request(path, method=method, status=405)
        assert_problem(answer, f"{path} takes {allowed}, not {method}")
        assert answer.headers["Allow"] == allowed


@pytest.mark.parametrize("path", OF_THE_STATE, ids=short)
def test_a_get_is_a_304_until_something_is_stored_by_whatever_process(app, file, path):
    post(app, launch())
    tag = app.get(path).headers["ETag"]
    for body in (launch(), launch(mission="ANOTHER"), faster(0)):
        post(app, body, status="*")
    for held in (tag, f"W/{tag}", f'\xff, {tag}'):
        answer = app.get(path, headers={"If-None-Match": held}, status=304)
        assert (answer.headers["ETag"], answer.headers[ALLOW]) == (tag, "*")
    app.get(path, headers={"If-None-Match": '"x"'}, status=200)
    post(app, faster(2), status=202)
    other = app.get(path, headers={"If-None-Match": tag}, status=200).headers["ETag"]
    fill(file, [faster(3)])  # as another process does
    third = app.get(path, headers={"If-None-Match": other}, status=200).headers["ETag"]
    for number in (4, 5):
        with closing(rockets.Store(str(file))) as store:  # as after a restart
            held = {"If-None-Match": f"{tag}, {third}"}
            third = make_app(store).get(path, headers=held, status=200).headers["ETag"]
        fill(file, [faster(number)])
    assert len({tag, other, third}) == 3 and get(app) == fold([launch(), *map(faster, range(2, 6))])


@pytest.mark.parametrize("path", GETS, ids=short)
def test_a_get_may_be_read_by_any_page_and_head_has_its_headers_without_a_body(app, path):
    post(app, launch())
    whole, head = app.get(path, headers=ELSEWHERE), app.head(path)
    headers = dict(whole.headers)
    assert (head.body, dict(head.headers).keys()) == (b"", headers.keys())
    assert int(headers.pop("Content-Length")) == len(whole.body)
    assert bool(headers.pop("Etag", "")) == (path in OF_THE_STATE)
    metrics = "text/plain; version=0.0.4; charset=utf-8"
    assert headers == {
        ALLOW: "*",
        "Cache-Control": "no-cache",
        "Content-Type": metrics if path == "/metrics" else "application/json",
        "X-Content-Type-Options": "nosniff",
    }


def test_an_error_of_a_get_may_be_read_by_any_page_and_the_answer_to_a_post_by_none(app):
    for path, status in {"/nowhere": 404, "/rockets?sort=x": 400}.items():
        assert app.get(path, status=status).headers[ALLOW] == "*"
    answers = [post(app, launch(), status=202), post(app, b"", status=400)]
    for answer in [*answers, app.post("/rockets", status=405), app.post("/nowhere", status=404)]:
        assert ALLOW not in answer.headers


def test_only_the_own_page_may_post(app, file):
    detail = "a page of another site must not post messages"
    for origin in "http://x.example http://localhost:81 http://localhost null \xff".split():
        assert_problem(post(app, launch(), headers={"Origin": origin}, status=403), detail)
    assert dump(file) == [[], []]
    post(app, launch(), headers={"Origin": "http://localhost:80"}, status=202)


def test_static_files_have_their_types_whatever_the_system_thinks(app):
    types = {".css": "text/css", ".html": "text/html", ".json": "application/json"}
    types[".js"], folder = "text/javascript", SERVICE.parent / "static"
    found = [each for each in folder.rglob("*") if each.suffix in types]
    for each in found:
        answer = app.get(f"/static/{each.relative_to(folder)}")
        assert (answer.content_type, answer.body) == (types[each.suffix], each.read_bytes())
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert found


def test_fleet_has_the_totals_and_the_100_most_frequent_names_ties_by_name(app, file):
    statuses = {"active": 0, "awaiting_launch": 0, "exploded": 0}
    empty = {"rockets": 0, "messages": 0, "missingMessages": 0, "statuses": statuses}
    assert app.get("/fleet").json == empty | {"types": [], "missions": []}
    names = [f"{n:03}" for n in range(102)]
    more = [launch(channel=nth(n), type=name, mission=name) for n, name in enumerate(names, 10)]
    fill(file, [*FIVE, *more])
    statuses = {"active": 104, "awaiting_launch": 1, "exploded": 2}
    assert app.get("/fleet").json == {
        "rockets": 107, "messages": 110, "missingMessages": 4, "statuses": statuses,
        "types": [{"type": "A", "rockets": 2}, *({"type": n, "rockets": 1} for n in names[:99])],
        "missions": [{"mission": n, "rockets": 1 + (n == "X")} for n in ("X", *names[:99])],
    }  # fmt: skip


def read_metrics(text):
    """Return the values of /metrics by name."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_what_became_of_every_message_and_the_fleet(app, store, file):
    with store.transaction():
        for body in FIVE:
            post(app, body)
    for body in (FIVE[0], on(nth(1), launch(1)), b"{}", b"", BODY.ljust(20_000)):
        post(app, body, status="*")
    post(app, faster(5), headers=ELSEWHERE, status=403)
    with locked(file):
        post(app, faster(5), status=503)
    metrics = read_metrics(app.get("/metrics").text)
    assert 0 <= time.time() - metrics.pop("process_start_time_seconds") < 600
    assert metrics.pop("rockets_post_duration_seconds_sum") > 0
    outcomes = {"applied": 8, "duplicate": 1, "conflicting": 1, "rejected": 4, "failed": 1}
    statuses = {"active": 2, "awaiting_launch": 1, "exploded": 2}
    assert metrics == {
        **{f'rockets_messages_total{{outcome="{name}"}}': outcomes[name] for name in outcomes},
        **{f'rockets_fleet{{status="{name}"}}': statuses[name] for name in statuses},
        "rockets_commits_total": 1,
        "rockets_post_duration_seconds_count": 15,
        "rockets_missing_messages": 4,
        f'rockets_build_info{{version="{rockets.VERSION}"}}': 1,
    }


# Failures #########################################################################################


def test_under_a_lock_a_message_is_a_503_at_once_and_gets_go_on(app, file):
    before = app.get("/rockets").json
    with locked(file):
        began = time.perf_counter()
        answer = post(app, launch(), status=503)
        assert time.perf_counter() - began < 4  # SQLite itself would wait for 5 s
        assert app.get("/rockets").json == before
    assert_problem(answer, "the database is not available: database is locked")
    assert answer.headers["Retry-After"] == "1"
    assert post(app, launch(), status=202).json == {"status": "applied"}


def test_after_a_failure_health_is_a_503_until_a_commit_of_its_own_succeeds(app, file):
    fill(file, FIVE)
    with locked(file):
        app.get("/health", status=200)  # as nothing was posted
        post(app, launch(), status=503)
        assert "locked" in app.get("/health", status=503).json["detail"]
    assert app.get("/health").json == {"status": "ok", "rockets": 5, "messages": 8}


def test_a_message_that_is_refused_is_one_short_line_with_the_reason_and_the_address(app, caplog):
    post(app, launch(launchSpeed="\x1b" * 2000), status=400)
    post(app, BODY, headers=ELSEWHERE, status=403)
    first, second = caplog.messages
    assert "192.0.2.7 is rejected: message.launchSpeed must be a whole number" in first
    assert first.isprintable() and len(first) < 350
    assert "192.0.2.7 is rejected: " in second and "a page of another site must not post" in second


def count_outcomes(process):
    """Return how many messages had each outcome, and how many commits there were."""
    with urllib.request.urlopen(process.url + "/metrics") as answer:
        metrics = read_metrics(answer.read().decode())
    names = ("applied", "duplicate", "conflicting", "rejected", "failed")
    counts = [int(metrics[f'rockets_messages_total{{outcome="{name}"}}']) for name in names]
    return *counts, int(metrics["rockets_commits_total"])


REFUSE_13 = """
    CREATE TRIGGER refuse_13 BEFORE INSERT ON messages WHEN new.messageNumber = 13
    BEGIN SELECT RAISE(ABORT, 'refused'); END"""


def test_of_a_turn_only_what_cannot_be_stored_fails_once_and_all_heals(file):
    bodies = [faster(number, 1) for number in range(2, 12)]
    with Process(file) as process:
        process.request("/messages", launch())
        with locked(file):
            answers = post_together(process, [*bodies, {"metadata": 0}])
            assert [status for status, _ in answers] == [*[503] * 10, 400]
            assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch()]))
        assert post_together(process, bodies) == [APPLIED] * 10
        assert count_outcomes(process) == (11, 0, 0, 1, 10, 2)
        run_sql(file, REFUSE_13)  # so that the rocket is updated, but the message not kept
        answers = post_together(process, [faster(12), faster(13), {"metadata": 0}, slower(2)])
        assert [status for status, _ in answers] == [202, 500, 400, 202]
        assert (answers[0], answers[3]) == (APPLIED, DUPLICATE)
        life = [launch(), *bodies, faster(12)]
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold(life))
        assert count_outcomes(process) == (12, 0, 1, 2, 10, 3)
        assert process.logged().count("127.0.0.1") == 10 + 3  # 3: two rejected, one conflicting
        run_sql(file, "DROP TABLE messages")
        assert process.request("/messages", launch(14))[0] == 500  # as no sender can help it


# The database file ################################################################################


def read_folder(folder):
    """Return the bytes of every file in a folder, but for SQLite's shared memory."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".db-shm"}


def fill_and_kill(file, *bodies):
    """Post messages to a service that is killed then, so that they are in its -wal only."""
    with Process(file) as process:
        assert post_together(process, bodies) == [APPLIED] * len(bodies)
        process.stop(signal.SIGKILL)


FOREIGN = "another program, or a later version of this one, wrote it"
GONE = "it is gone or empty, but"
LATER = f"PRAGMA user_version = {0x524B7FFF}"
REFUSED = [  # what makes the file, and what the line says
    (lambda file: file.write_bytes(b"Dear diary"), "file is not a database"),
    (lambda file: run_sql(file, "CREATE TABLE days (day); PRAGMA user_version = 7"), FOREIGN),
    (lambda file: run_sql(file, "PRAGMA user_version = 2000000000"), FOREIGN),
    (lambda file: (fill(file, []), run_sql(file, LATER)), FOREIGN),
    (lambda file: (fill_and_kill(file, launch()), file.unlink()), GONE),
    (lambda file: (fill_and_kill(file, launch()), os.truncate(file, 0)), GONE),
    (lambda file: (fill(file, map(faster, range(1, 500))), os.truncate(file, 9999)), "malformed"),
]
IDS = "text foreign empty later wal wal-and-empty half".split()


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=IDS)
def test_a_file_that_cannot_be_the_database_is_one_line_and_left_as_it_was(file, make, words):
    make(file)
    before = read_folder(file.parent)
    said = start_in_vain(file, "--reset")
    assert said.startswith(f"rockets: cannot use {file} as the database: ") and words in said
    assert read_folder(file.parent) == before


def test_a_backup_beside_the_wal_of_another_day_is_refused_and_restored_as_the_refusal_says(file):
    life = list(map(faster, range(1, 500)))
    fill(file, life)
    backup = file.read_bytes()
    fill(file, [launch(channel=nth(n)) for n in range(100)])
    fill_and_kill(file, faster(501))
    file.write_bytes(backup)
    assert "delete its -wal and copy the backup again" in start_in_vain(file)
    Path(f"{file}-wal").unlink(missing_ok=True)
    file.write_bytes(backup)
    with Process(file) as process:
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold(life))


def test_the_file_is_marked_as_ours_and_every_commit_goes_to_the_disk_itself(store):
    expected = {"user_version": rockets.SCHEMA_VERSION, "journal_mode": "wal", "synchronous": 2}
    expected |= {"fullfsync": 1, "journal_size_limit": 2**24}
    assert {name: store.execute(f"PRAGMA {name}")[0][0] for name in expected} == expected


VERSION_4 = """
CREATE TABLE messages (
    channel TEXT NOT NULL, number INTEGER NOT NULL, time TEXT NOT NULL, type TEXT NOT NULL,
    message TEXT NOT NULL, PRIMARY KEY (channel, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE rockets (channel TEXT NOT NULL PRIMARY KEY, messages INTEGER NOT NULL) STRICT;
INSERT INTO rockets VALUES ('left', 3);
PRAGMA application_id = 7; PRAGMA user_version = 0x524B0004; PRAGMA journal_mode = WAL;
"""


def fill_version_4(file, bodies):
    """Make the file that an earlier version of the service made for messages."""
    run_sql(file, VERSION_4)
    with closing(sqlite3.connect(file)) as connection, connection:
        rows = [(*body["metadata"].values(), json.dumps(body["message"])) for body in bodies]
        connection.executemany("INSERT INTO messages VALUES (?, ?, ?, ?, ?)", rows)


def test_a_file_of_version_4_serves_the_same_whatever_today_s_limits_and_in_spite_of_a_kill(file):
    name, strange = "é" * 1000, {"by": 9, "type": {}, "launchSpeed": 2**70, "newMission": "B"}
    life = [launch(2, type=name), slower(5), message(7, "RocketMissionChanged", strange)]
    other = [launch(3, mission=name, channel=nth(1)), exploded(9, reason=name, channel=nth(1))]
    many = [faster(number, channel=nth(2)) for number in range(1, 5000)]
    fill_version_4(file, life + other + many)
    process = Process(file)
    with subprocess.Popen(process.command, stderr=subprocess.PIPE, **process.where) as popen:
        assert b"making the rockets" in popen.stderr.readline()
        popen.kill()
        assert popen.stderr.read() == b""
    with Process(file) as process:
        assert process.request("/rockets")[1]["rockets"] == [fold(other), fold(many), fold(life)]
        assert process.request(HISTORY)[1]["messages"] == life
        first, last = process.logged().splitlines()
        assert "making the rockets" in first and "made the rockets" in last
        assert process.request("/messages", slower(5)) == DUPLICATE
        assert process.request("/messages", faster(6)) == APPLIED
        process.stop()
    with Process(file) as process:
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([*life, faster(6)]))
        assert process.logged() == ""


def test_reset_starts_from_an_empty_database_and_gives_the_room_back(file):
    fill(file, (launch(channel=nth(n)) for n in range(1000)))
    assert file.stat().st_size > 500_000
    with Process(file, "--reset") as process:
        assert process.said.endswith(" holds 0 rockets and 0 messages\n")
        assert file.stat().st_size + os.path.getsize(f"{file}-wal") < 50_000
        assert process.request("/rockets")[1]["rockets"] == []


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_a_database_that_is_gone_or_replaced_is_a_503_until_it_is_back(file, suffix):
    bodies, aside = [launch()], file.with_name("aside")
    with Process(file) as process:

        def post_next():
            status, _ = process.request("/messages", bodies[-1])
            if status == 202:
                bodies.append(faster(len(bodies) + 1))
            return status

        assert post_next() == 202
        Path(f"{file}{suffix}").rename(aside)
        if not suffix:
            shutil.copy(aside, file)  # so it is replaced, not gone
        wait_until(lambda: post_next() == 503)
        assert "moved or replaced" in process.request("/health")[1]["detail"]
        aside.replace(f"{file}{suffix}")
        wait_until(lambda: process.request("/health")[0] == 200)
        assert post_next() == 202
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold(bodies[:-1]))


def test_the_database_may_be_a_symbolic_link(file, tmp_path):
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(file)
    for answer in (APPLIED, DUPLICATE):
        with Process(link) as process:
            assert process.request("/messages", launch()) == answer
            process.stop(signal.SIGKILL)
    assert os.listdir(link.parent) == ["link.db"]


def test_it_works_with_an_sqlite_that_trusts_no_schema(file, monkeypatch):
    connect = sqlite3.connect

    def connect_without_trust(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA trusted_schema = OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_without_trust)
    fill(file, [launch()])
    with closing(rockets.Store(str(file))) as store:
        assert get(make_app(store)) == fold([launch()])


def post_until_it_stops(process, channel, acknowledged):
    """Post messages of a channel one after the other. Note each that was acknowledged."""
    with suppress(OSError, HTTPException):
        while True:
            process.connect().close()  # others come and go
            number = len(acknowledged) + 1
            answer = process.request("/messages", faster(number, number, channel=channel))
            assert answer in (APPLIED, DUPLICATE)  # an answer may have been lost with the last end
            acknowledged.append(number)


def test_what_was_acknowledged_under_load_is_there_after_every_end(file):
    dice, acknowledged = random.Random(20), {nth(number): [] for number in range(4)}
    ends = [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGKILL, -9), (signal.SIGINT, 0)]
    for number, code in ends * 2:
        with Process(file) as process, ThreadPoolExecutor(4) as pool:
            goal = sum(map(len, acknowledged.values())) + dice.randint(20, 150)
            load = partial(pool.submit, post_until_it_stops, process)
            tasks = [load(*each) for each in acknowledged.items()]
            wait_until(lambda goal=goal: sum(map(len, acknowledged.values())) >= goal)
            assert process.stop(number) == code
            for task in tasks:
                task.result()
        if code == 0:
            assert os.listdir(file.parent) == ["rockets.db"]  # the WAL is folded in
        with Process(file) as process:
            for channel, numbers in acknowledged.items():
                rocket = process.request(f"/rockets/{channel}")[1]
                last = rocket["lastMessageNumber"]
                assert last - len(numbers) in (0, 1)  # one may lack its answer
                assert rocket == fold([faster(n, n, channel=channel) for n in range(1, last + 1)])


# The command line #################################################################################


def has_ipv6():
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True


@pytest.mark.parametrize("empty", [{}, {"HOST": "", "DATABASE": ""}], ids=["unset", "empty"])
def test_without_options_it_takes_localhost_8088_and_a_file_in_the_current_folder(tmp_path, empty):
    with Process(None, folder=tmp_path, **empty, PORT="0") as process:
        assert process.url.startswith("http://localhost:")
        assert process.said.endswith(", rockets.db holds 0 rockets and 0 messages\n")
        assert process.stop() == 0
    assert os.listdir(tmp_path) == ["rockets.db"]
    with ExitStack() as stack:
        with suppress(OSError):  # another program has the port, which does as well
            stack.enter_context(socket.create_server(("127.0.0.1", 8088)))
        said = start_in_vain(None, folder=tmp_path, PORT="", **empty)
        assert "cannot listen on 127.0.0.1 port 8088: " in said


BAD_OPTIONS = [
    ("--port abc", {}, "--port: invalid int value: 'abc'"),
    ("", {"PORT": "abc"}, "--port: invalid int value: 'abc'"),
    ("--port -1", {}, "port -1: "),
    ("--port 99999", {"PORT": "7"}, "port 99999: "),
    ("--host ..a --port 0", {"HOST": "::1"}, "cannot listen on ..a port 0: "),
    ("--port 0", {"HOST": "192.0.2.1"}, "cannot listen on 192.0.2.1 port 0: "),
    ("--port 0 --database /x/y.db", {"DATABASE": "a.db"}, "cannot use /x/y.db as the database: "),
    ("--port 0", {"DATABASE": "/"}, "cannot use / as the database: "),
    ("--threads 4", {}, "unrecognized arguments: --threads 4"),
]


@pytest.mark.parametrize(("options", "environ", "words"), BAD_OPTIONS, ids=short)
def test_an_option_that_cannot_be_goes_before_its_variable_and_is_one_line_that_names_it(
    tmp_path, options, environ, words
):
    assert words in start_in_vain(None, *options.split(), folder=tmp_path, **environ)
    assert os.listdir(tmp_path) == []


def test_a_reset_is_one_line_if_the_port_or_the_lock_is_taken_and_changes_nothing(file):
    fill(file, [launch()])
    before = read_folder(file.parent)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = start_in_vain(file, "--port", port, "--reset")
    assert f"cannot listen on 127.0.0.1 port {port}: " in said
    with locked(file):
        assert "database is locked" in start_in_vain(file, "--reset")
    assert read_folder(file.parent) == before


def test_packages_that_are_missing_are_one_line_with_the_command_that_installs_them(file):
    said = start_in_vain(file, program=("-S", "-E", SERVICE))
    assert "No module named 'bottle'" in said and "pip install -r requirements.txt" in said


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_localhost_is_ipv4_and_ipv6_and_an_ipv6_address_stands_in_brackets(file):
    with Process(file) as process:
        port = process.url.rpartition(":")[2]
        for process.url in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}"):
            assert process.request("/health")[0] == 200
    with Process(file, "--host", "::1") as process:
        assert process.url.startswith("http://[::1]:")
        assert process.request("/health")[0] == 200


def test_it_says_where_it_listens_and_what_it_found_and_logs_requests_only_if_asked(file):
    fill(file, [launch(), faster(2)])
    for number, options in enumerate([(), ("--verbose",)]):
        with Process(file, *options) as process:
            found = f"{file} holds 1 rockets and {2 + number} messages"
            assert process.said == f"Rockets listens on {process.url}, {found}\n"
            assert process.request("/messages", faster(3 + number)) == APPLIED
            assert process.request("/nowhere")[0] == 404
            assert statuses(exchange(process, b"?")) == [400]
            assert process.stop() == 0
            *lines, refused = process.logged().splitlines()
            assert "WARNING 400 127.0.0.1 " in refused and len(lines) == 2 * number
    assert "202 127.0.0.1" in lines[0] and "POST /messages HTTP/1.1" in lines[0]
    assert "404 127.0.0.1" in lines[1] and "GET /nowhere HTTP/1.1" in lines[1]


def test_every_place_that_must_know_the_types_of_messages_knows_all_of_them():
    names = ("tools/launch.py", "static/openapi.json", "static/messages.js")
    places = {name: (SERVICE.parent / name).read_text() for name in names}
    stand_in, _, its_fold = places.pop("tools/launch.py").partition("def fold(")
    places |= {"fold() in tools/launch.py": its_fold, "the sender of tools/launch.py": stand_in}
    places |= {"fold() in test_rockets.py": inspect.getsource(fold)}
    lacking = [
        f"{place} lacks {message_type}"
        for message_type in rockets.MESSAGE_TYPES
        for place, text in places.items()
        if message_type not in text
    ]
    assert lacking == []


# The description of the API #######################################################################

API = json.loads((rockets.STATIC / "openapi.json").read_text())
PATHS, SCHEMAS = API["paths"], API["components"]["schemas"]
POSTED = PATHS["/messages"]["post"]["requestBody"]["content"]["application/json"]["examples"]
ADDRESSES = ["/rockets", "/rockets/{channel}", "/rockets/{channel}/messages"]
ADDRESSES += ["/fleet", "/health", "/metrics"]


def resolved(part):
    """Return a part of the description, with what it refers to."""
    *_, kind, name = part.get("$ref", "/").split("/")
    return API["components"].get(kind, {}).get(name, {}) | part


def test_the_description_names_every_route_and_no_other(app):
    described = {(path, method.upper()) for path, methods in PATHS.items() for method in methods}
    routes = {(re.sub("<(.*?)>", r"{\1}", each.rule), each.method) for each in app.app.routes}
    described.add(("/static/{path:path}", "GET"))  # files of the pages, which are not described
    assert {each for each in routes if each[1] != "HEAD"} == described
    assert API["info"]["version"] == rockets.VERSION


@pytest.mark.parametrize("path", ADDRESSES[:-1])
def test_the_examples_of_messages_are_accepted_and_lead_to_those_of_answers(app, path):
    receipts = [post(app, example["value"]).json for example in POSTED.values()]
    assert receipts == [{"status": "applied"}] * len(rockets.MESSAGE_TYPES)
    query = "?after=4" if path.endswith("/messages") else ""
    answer = app.get(path.format(channel=CHANNEL) + query)
    described = PATHS[path]["get"]["responses"]["200"]["content"][answer.content_type]
    assert answer.json == described["example"]
    schema = resolved(described["schema"])
    assert list(answer.json) == list(schema["properties"]) == schema["required"]


def test_the_choices_in_the_description_are_those_of_the_service():
    assert SCHEMAS["Metadata"]["properties"]["messageType"]["enum"] == list(rockets.MESSAGE_TYPES)
    assert list(SCHEMAS["Rocket"]["properties"]) == list(rockets.ROCKET_FIELDS)
    assert SCHEMAS["SortKey"]["enum"] == list(rockets.SORT_KEYS)
    assert SCHEMAS["Status"]["enum"] == list(rockets.STATUSES)
    for choice in SCHEMAS["Message"]["oneOf"]:
        message_type = choice["properties"]["metadata"]["properties"]["messageType"]
        part = choice["properties"]["message"]
        for each in message_type.get("enum") or [message_type["const"]]:
            assert list(part["properties"]) == part["required"] == list(rockets.MESSAGE_TYPES[each])


def test_the_limits_in_the_description_are_those_of_the_service():
    described = map(resolved, PATHS["/rockets"]["get"]["parameters"])
    parameters = {each["name"]: each["schema"] for each in described}
    assert SCHEMAS["MessageNumber"]["maximum"] == rockets.MAX_NUMBER
    assert SCHEMAS["Name"]["maxLength"] == rockets.MAX_NAME
    assert SCHEMAS["Speed"]["maximum"] == rockets.MAX_SPEED
    assert parameters["q"]["maxLength"] == rockets.MAX_SEARCH
    assert parameters["limit"]["maximum"] == parameters["limit"]["default"] == rockets.MAX_PAGE
    assert set(re.findall(r"([\d,]+) bytes", json.dumps(API))) == {f"{rockets.MAX_BODY:,}"}


def test_an_unknown_parameter_is_a_400_that_names_those_in_the_description(app):
    for path in ADDRESSES:
        url = f"{path.format(channel=CHANNEL)}?sortBy=speed"
        words, taken = app.get(url, status=400).json["detail"].split("; this address has ")
        parameters = map(resolved, PATHS[path]["get"].get("parameters", []))
        described = [each["name"] for each in parameters if each["in"] == "query"]
        assert words == "parameter 'sortBy' is unknown"
        assert sorted(taken.split(", ")) == sorted(described or ["no parameters"])


def test_docs_lead_to_the_description_and_load_pinned_files_with_their_hashes(app):
    page = app.get("/docs", status=200).text
    pinned = r'crossorigin="anonymous"\s.+@\d+\.\d+\.\d+/.+"\s+integrity="sha384-'
    assert len(re.findall(pinned, page)) == page.count("//") == 2
    assert 'href="openapi.json"' in page and 'url: "openapi.json"' in page
    assert urljoin("/prefix/openapi.json", API["servers"][0]["url"]) == "/prefix/"


# The wire #########################################################################################

LONG_GET = f"GET /rockets/{CHANNEL}/messages HTTP/1.1\r\nHost: rockets\r\n\r\n".encode()
LONG = 1001  # messages; an answer has 1,000 of them, 24 MB


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One service for many connections. None of them may make it fail."""
    with Process(tmp_path_factory.mktemp("wire") / "rockets.db") as process:
        yield process
        assert process.stop() == 0 and "Traceback" not in process.logged()


@pytest.fixture(scope="module")
def long_history(tmp_path_factory):
    """A database with one rocket, of which there is much to read."""
    file = tmp_path_factory.mktemp("long") / "rockets.db"
    fill(file, (launch(number) for number in range(1, LONG + 1)))
    run_sql(file, "UPDATE messages SET message = json_set(message, '$.x', hex(zeroblob(12000)))")
    return file


def with_constants(**constants):
    """Return the arguments that make Python run the service with other constants."""
    changes = "; ".join(f"rockets.{name} = {value}" for name, value in constants.items())
    path = f"import sys; sys.path.insert(0, {str(SERVICE.parent)!r})"
    return ("-c", f"{path}; import rockets; {changes}; rockets.main()")


def stored(process):
    return process.request("/health")[1]["messages"]


def files(process):
    """Return how many files and connections the service has open."""
    return len(os.listdir(f"/proc/{process.popen.pid}/fd"))


def connect_deaf(process, requests):
    """Return a connection that sends requests and reads nothing yet."""
    connection = process.connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.sendall(requests)
    return connection


def read_to_the_end(connection):
    """Return all that comes until the service closes a connection."""
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def is_refused(process):
    """Tell whether the service takes no more connections."""
    try:
        process.connect().close()
    except ConnectionError:
        return True


def coded(coding, body=None, headers="", **options):
    """Return the bytes of a POST with a transfer coding."""
    headers = f"Transfer-Encoding: {coding}\r\n{headers}"
    return http(body or chunked(BODY), headers, **{"close": False} | options)


KEEP = "Connection: keep-alive\r\n"
HEADER = 16 * 1024  # bytes
PADDED = BODY.ljust(rockets.MAX_BODY)
LARGE = bytes(64 * 1024)
TOO_LARGE = chunked(bytes(1_000_000))[: 64 * 1024 + 1]
HIDDEN = sized(json.dumps(launch(1000)).encode())
FRAMES = [
    (sized(BODY, close=False) + http(BODY), [202, 202], "length"),
    (coded("chunked") + http(BODY), [202, 202], "chunked"),
    (coded("\t Chunked \t") + http(BODY), [202, 202], "chunked-in-blanks"),
    (http(BODY, version="1.0").replace(b"Host", b"X"), [202], "1.0-without-host"),
    (b"\r\n" + http(BODY), [400], "empty-line"),
    (sized(PADDED, close=False) + http(BODY), [202, 202], "16-KiB"),
    (coded("chunked", chunked(PADDED)) + http(BODY), [202, 202], "16-KiB-chunked"),
    (sized(PADDED + b" ", close=False) + http(BODY), [413, 202], "16-KiB+1"),
    (coded("chunked", chunked(PADDED + b" ")) + http(BODY), [413, 202], "16-KiB+1-chunked"),
    (sized(LARGE, close=False) + http(BODY), [413, 202], "64-KiB"),
    (http(b"", f"Content-Length: {len(LARGE) + 1}\r\n", close=False), [413], "64-KiB+1"),
    (coded("chunked", TOO_LARGE), [413], "64-KiB+1-chunked"),
    (sized(BODY, f"Padding: {'x' * (HEADER - 200)}\r\n"), [202], "almost-16-KiB-of-header"),
    (sized(BODY, f"Padding: {'x' * HEADER}\r\n")[:HEADER], [431], "16-KiB-of-header"),
    (b"GET /".ljust(HEADER, b"x"), [431], "16-KiB-of-address"),
    # RFC 9112: what one server takes for a body, another one may take for a request
    (coded("chunked", headers=LENGTH), [400], "chunked-and-length"),
    (coded("chunked", headers=KEEP, version="1.0"), [400], "chunked-in-1.0"),
    (coded("chunked", headers=KEEP, version="1.2"), [400], "chunked-in-1.2"),
    (coded("chunked", headers="Transfer-Encoding: chunked\r\n"), [400], "chunked-twice"),
    (coded("chunked, chunked"), [400], "chunked-chunked"),
    (coded("\r\n chunked"), [400], "chunked-on-a-line-of-its-own"),
    (coded("gzip"), [400], "gzip"),
    (http(BODY, close=False).replace(b"Host", b"X"), [400], "no-host"),
    (sized(BODY, "Host: other\r\n", close=False), [400], "two-hosts"),
    (http(BODY, f"Content-Length: {'9' * 5000}\r\n", close=False), [400], "5000-digits"),
    (b"GET http://[::1 HTTP/1.1\r\nHost: rockets\r\n\r\n", [400], "bad-address"),
]


@pytest.mark.parametrize(
    ("data", "expected"), [frame[:2] for frame in FRAMES], ids=[frame[2] for frame in FRAMES]
)
def test_every_way_to_frame_a_request_gets_its_answer_and_is_closed(service, data, expected):
    service.request("/messages", launch())
    before = stored(service)
    received = exchange(service, data + HIDDEN if expected == [400] else data)
    assert statuses(received) == expected
    if expected[-1] == 202:
        return
    assert stored(service) == before  # nothing behind a refused request is served
    head, _, body = received.rpartition(b"\r\n\r\n")
    assert b"\r\nContent-Type: application/problem+json\r\n" in head
    assert b"\r\nConnection: close\r\n" in head
    answer = json.loads(body)
    assert answer.keys() == {"title", "status", "detail"} and answer["status"] == expected[-1]
    assert answer["title"] == responses[expected[-1]] and answer["detail"]


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01", b"\0"], ids=["tls", "nul"])
def test_what_is_no_http_is_a_400_at_once(service, data):
    assert statuses(exchange(service, data)) == [400]


def test_a_connection_with_urgent_data_is_closed(service):
    with service.connect() as connection, suppress(ConnectionError):
        connection.settimeout(rockets.SILENCE / 2)
        connection.send(b"!", socket.MSG_OOB)
        assert read_to_the_end(connection) == b""


@pytest.mark.parametrize("name", ["Padding", "Transfer-Encoding"])
def test_no_run_of_blanks_keeps_the_others_waiting(service, name):
    data = sized(BODY, f"{name}: a" + " \t" * 7_500 + "a\r\n")
    with ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(100)]
        for connection in connections:
            connection.sendall(data)
        assert service.request("/health", timeout=10)[0] == 200  # else it takes a minute
        assert [read_answer(connection)[0] for connection in connections] == [400] * 100


def test_messages_that_come_together_share_a_commit_in_turns_of_bounded_length(file):
    with Process(file) as process, ExitStack() as stack:
        bodies = [faster(number, 1) for number in range(1, 21)]
        assert post_together(process, [*bodies, bodies[0]]) == [APPLIED] * 20 + [DUPLICATE]
        assert count_outcomes(process) == (20, 1, 0, 0, 0, 1)
        many = range(100, 196)  # three turns of 32
        connections = [stack.enter_context(process.connect()) for _ in many]
        stored(process)  # so that all of them are accepted
        with process.paused():
            for number, connection in zip(many, connections, strict=True):
                connection.sendall(sized(json.dumps(faster(number, 1)).encode()))
        assert [read_answer(connection) for connection in connections] == [APPLIED] * len(many)
        assert count_outcomes(process) == (20 + len(many), 1, 0, 0, 0, 1 + 3)


def test_more_connections_at_once_than_there_may_be_are_all_answered(file):
    with Process(file) as process:
        bodies = [faster(number, 1) for number in range(1, rockets.MAX_CONNECTIONS + 101)]
        assert post_together(process, bodies) == [APPLIED] * len(bodies)


@on_linux
def test_a_crowd_of_idle_connections_keeps_nobody_out(long_history):
    with Process(long_history) as process, ExitStack() as stack:
        before = files(process)
        waiting = stack.enter_context(connect_deaf(process, LONG_GET * 3))  # with whole requests
        assert waiting.recv(1) == b"H"
        crowd = []
        for place in range(rockets.MAX_CONNECTIONS + 100):
            crowd.append(stack.enter_context(process.connect()))
            crowd[-1].sendall(http(BODY)[:-20] if place % 2 else b"")
        for number in range(LONG + 1, LONG + 31):
            assert process.request("/messages", faster(number, 1))[0] == 202
        assert files(process) <= before + rockets.MAX_CONNECTIONS + 1
        assert crowd[0].recv(1) == b""  # it was silent longest
        crowd[-1].sendall(http(BODY)[-20:])
        assert read_answer(crowd[-1]) == DUPLICATE
        waiting.shutdown(socket.SHUT_WR)
        assert statuses(b"H" + read_to_the_end(waiting)) == [200] * 3


@on_linux
def test_a_connection_that_neither_sends_nor_reads_is_closed_in_the_end(long_history):
    assert rockets.SILENCE == 30
    program = with_constants(SILENCE=1.5)
    with Process(long_history, program=program) as process, process.connect() as busy:
        busy.sendall(http(BODY, close=False))
        assert read_answer(busy) == DUPLICATE
        before, began = files(process), time.monotonic()
        silent = (b"", http(BODY)[:-20], LONG_GET * 3)
        with ExitStack() as stack:
            for data in silent:
                stack.enter_context(connect_deaf(process, data))
            wait_until(lambda: files(process) == before + len(silent))
            while files(process) > before and time.monotonic() < began + 60:
                busy.sendall(http(BODY, close=False))
                assert read_answer(busy) == DUPLICATE  # it stays
        assert 1 < time.monotonic() - began < 60


@on_linux
def test_large_answers_and_bodies_need_room_neither_in_the_memory_nor_on_the_disk(long_history):
    import resource

    with Process(long_history) as process, connect_deaf(process, LONG_GET * 15) as deaf:
        assert deaf.recv(1) == b"H"
        for number in range(LONG + 1, LONG + 31):
            assert process.request("/messages", faster(number, 1))[0] == 202
        status = Path(f"/proc/{process.popen.pid}/status").read_text()
        assert int(re.search(r"VmHWM:\s*(\d+)", status)[1]) < 150_000  # kB; the answers have 360 MB
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        deaf.shutdown(socket.SHUT_WR)
        assert statuses(b"H" + read_to_the_end(deaf)) == [200] * 15
        assert process.request(HISTORY)[1]["count"] == rockets.MAX_PAGE
        assert statuses(exchange(process, sized(LARGE))) == [413]
        assert statuses(exchange(process, coded("chunked", chunked(LARGE)[:-7]))) == [413]


# Stopping #########################################################################################


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_at_a_signal_is_finished_but_nobody_new_is_accepted(long_history, number):
    bodies = [launch(channel=str(uuid.uuid4())) for _ in range(21)]
    first, *others = [sized(json.dumps(body).encode()) for body in bodies]
    program = with_constants(GRACE_PERIOD=1000)
    with Process(long_history, program=program) as process, ExitStack() as stack:
        stack.enter_context(process.connect())  # it is idle, so nobody waits for it
        deaf = stack.enter_context(connect_deaf(process, LONG_GET))
        assert deaf.recv(1, socket.MSG_PEEK) == b"H"
        with process.paused():
            half, *whole = [stack.enter_context(process.connect()) for _ in range(21)]
            half.sendall(first[: first.index(b":")])
            for connection, data in zip(whole, others, strict=True):
                connection.sendall(data)
            process.popen.send_signal(number)
        wait_until(lambda: is_refused(process))
        process.popen.send_signal(number)  # a second one changes nothing
        assert [read_answer(connection) for connection in whole] == [APPLIED] * 20
        status, answer = read_answer(deaf)
        assert (status, answer["count"]) == (200, rockets.MAX_PAGE)
        half.sendall(first[first.index(b":") :])
        assert read_answer(half) == APPLIED
        assert (process.popen.wait(60), process.logged()) == (0, "")


def test_what_does_not_end_within_the_grace_period_is_given_up(long_history):
    assert rockets.GRACE_PERIOD == 4
    program = with_constants(GRACE_PERIOD=0.1, SILENCE=1000)
    with Process(long_history, program=program) as process:
        with process.connect() as half, connect_deaf(process, LONG_GET) as deaf:
            half.sendall(http(BODY)[:-20])
            assert deaf.recv(1) == b"H"
            assert process.stop() == 0
            assert half.recv(1) == b""
