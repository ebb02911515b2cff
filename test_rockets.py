"""The rules of the service, each as a test: over HTTP, on a real database file; the last part on a real process."""

import base64
import copy
import hashlib
import http.client as http_client
import itertools
import json
import logging
import os
import random
import re
import resource
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from bottle import HTTPError
from webtest import TestApp

import rockets
import tools.launch as launch_tool

CHANNEL = "193270a9-c9cf-404a-8f83-838e71d9ae67"
SERVICE = Path(rockets.__file__)
LAUNCH = {"type": "Falcon-9", "launchSpeed": 500, "mission": "ARTEMIS"}
UNKNOWN = {
    "type": None,
    "speed": None,
    "mission": None,
    "status": "awaiting_launch",
    "explosionReason": None,
    "launchedAt": None,
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rockets.db"


@pytest.fixture
def app(file):
    store = rockets.Store(str(file))
    yield TestApp(rockets.create_app(store))
    store.close()


def message(number, kind, content, channel=CHANNEL, at=None):
    at = at or f"2022-02-02T19:{number // 60 % 60:02}:{number % 60:02}+01:00"
    metadata = {"channel": channel, "messageNumber": number, "messageTime": at, "messageType": kind}
    return {"metadata": metadata, "message": content}


def launch(number=1, **changes):
    metadata = {key: changes.pop(key) for key in ("channel", "at") if key in changes}
    return message(number, "RocketLaunched", LAUNCH | changes, **metadata)


def faster(number, by, **metadata):
    return message(number, "RocketSpeedIncreased", {"by": by}, **metadata)


def slower(number, by, **metadata):
    return message(number, "RocketSpeedDecreased", {"by": by}, **metadata)


def exploded(number, reason="PRESSURE_VESSEL_FAILURE", **metadata):
    return message(number, "RocketExploded", {"reason": reason}, **metadata)


def renamed(number, mission, **metadata):
    return message(number, "RocketMissionChanged", {"newMission": mission}, **metadata)


def post(app, body, **options):
    text = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return app.post("/messages", text, **({"content_type": "application/json"} | options))


def get(app, channel=CHANNEL):
    return app.get(f"/rockets/{channel}").json


def dump(file):
    with closing(sqlite3.connect(file)) as connection:
        return [connection.execute(f"SELECT * FROM {table}").fetchall() for table in ("rockets", "messages")]


def fold(messages):
    """Return what the messages of one rocket, in any order and number, mean: read in order, from first to last."""
    ordered = [found for _, found in sorted({m["metadata"]["messageNumber"]: m for m in reversed(messages)}.items())]
    last = ordered[-1]["metadata"]
    rocket = {"channel": last["channel"], **UNKNOWN, "updatedAt": last["messageTime"]}
    rocket |= {"lastMessageNumber": last["messageNumber"], "missingMessages": last["messageNumber"] - len(ordered)}
    change = 0
    for found in ordered:
        kind, content = found["metadata"]["messageType"], found["message"]
        if kind == "RocketLaunched":
            if rocket["type"] is None:
                rocket |= {"type": content["type"], "speed": content["launchSpeed"]}
                rocket["launchedAt"] = found["metadata"]["messageTime"]
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


# The state ############################################################################################################


def test_a_launch_is_the_whole_state(app):
    assert post(app, launch(), status=202).json == {"status": "applied"}
    assert get(app) == {
        "channel": CHANNEL,
        "type": "Falcon-9",
        "speed": 500,
        "mission": "ARTEMIS",
        "status": "active",
        "explosionReason": None,
        "launchedAt": "2022-02-02T19:00:01+01:00",
        "updatedAt": "2022-02-02T19:00:01+01:00",
        "lastMessageNumber": 1,
        "missingMessages": 0,
    }


def test_every_permutation_of_a_life_delivered_twice_ends_the_same(app):
    for permutation in itertools.permutations(range(6)):
        channel = str(uuid.uuid4())
        life = [
            launch(1, channel=channel),
            faster(2, 3000, channel=channel),
            renamed(3, "SHUTTLE_MIR", channel=channel),
            slower(4, 2500, channel=channel),
            renamed(5, "APOLLO", channel=channel),
            exploded(6, channel=channel),
        ]
        delivered = []
        for index in permutation:
            delivered.append(life[index])
            assert post(app, life[index]).json == {"status": "applied"}
            assert post(app, life[index]).json == {"status": "duplicate"}
            assert get(app, channel) == fold(delivered)
        assert get(app, channel) == {
            "channel": channel,
            "type": "Falcon-9",
            "speed": 1000,
            "mission": "APOLLO",
            "status": "exploded",
            "explosionReason": "PRESSURE_VESSEL_FAILURE",
            "launchedAt": "2022-02-02T19:00:01+01:00",
            "updatedAt": "2022-02-02T19:00:06+01:00",
            "lastMessageNumber": 6,
            "missingMessages": 0,
        }


@pytest.mark.parametrize(
    "odd",
    [
        [launch(1), launch(4, type="B", launchSpeed=9, mission="B"), faster(2, 5), renamed(3, "C")],
        [launch(1), exploded(3, "THREE"), exploded(2, "TWO"), slower(4, 700)],
        [launch(2), exploded(4), faster(7, 3000), renamed(9, "AFTER")],
        [faster(3, 1), slower(8, 9), renamed(5, "NO_LAUNCH"), exploded(40)],
        [
            launch(2, at="2022-02-09T00:00:00Z"),
            launch(3, at="2022-02-08T00:00:00Z"),
            faster(4, 1, at="2022-02-07T00:00:00Z"),
        ],
        [launch(2**53 - 1, launchSpeed=2**31 - 1), faster(1, 2**31 - 1), slower(2, 0), exploded(2**53 - 2)],
    ],
    ids=[
        "two launches",
        "two explosions",
        "after an explosion",
        "no launch, gaps",
        "times that run backwards",
        "limits",
    ],
)
def test_odd_sets_mean_the_same_in_every_order(app, odd):
    for order in itertools.permutations(odd):
        channel = str(uuid.uuid4())
        delivered = []
        for found in order:
            delivered.append({**found, "metadata": found["metadata"] | {"channel": channel}})
            post(app, delivered[-1], status=202)
            assert get(app, channel) == fold(delivered)


@pytest.mark.parametrize("seed", [1, 2])
def test_shuffled_streams_agree_with_the_fold_after_every_delivery(app, seed):
    rng = random.Random(seed)
    sent = []
    for _ in range(50):
        channel = str(uuid.UUID(int=rng.getrandbits(128)))
        numbers = sorted(rng.sample(range(1, 60), rng.randint(1, 30)))
        for number in numbers:
            kinds = [
                launch(number, channel=channel, type=rng.choice("ABC"), launchSpeed=rng.randrange(9)),
                faster(number, rng.randrange(9000), channel=channel),
                slower(number, rng.randrange(9000), channel=channel),
                renamed(number, rng.choice("XYZ"), channel=channel),
                exploded(number, rng.choice("PQR"), channel=channel),
            ]
            sent.append(rng.choices(kinds, [2, 4, 4, 3, 1])[0])
    rng.shuffle(sent)
    sent.sort(key=lambda delivery: delivery["metadata"]["messageNumber"])
    sent += rng.sample(sent, len(sent) // 10)
    places = {id(delivery): place + rng.uniform(0, 300) for place, delivery in enumerate(sent)}
    sent.sort(key=lambda delivery: places[id(delivery)])
    known = {}
    for delivery in sent:
        channel = delivery["metadata"]["channel"]
        known.setdefault(channel, []).append(delivery)
        post(app, delivery, status=202)
        assert get(app, channel) == fold(known[channel])
    assert app.get("/rockets").json["rockets"] == [fold(known[channel]) for channel in sorted(known)]


def test_the_launch_with_the_lowest_number_stands(app):
    post(app, launch(5, type="B", launchSpeed=7))
    post(app, launch(2, type="A", launchSpeed=3))
    post(app, launch(9, type="C", launchSpeed=11))
    assert [get(app)[key] for key in ("type", "speed", "launchedAt")] == ["A", 3, "2022-02-02T19:00:02+01:00"]


def test_the_explosion_with_the_lowest_number_gives_the_reason(app):
    for number, reason in ((5, "FIVE"), (3, "THREE"), (8, "EIGHT")):
        post(app, exploded(number, reason))
    assert get(app)["explosionReason"] == "THREE"


def test_speed_is_unknown_until_the_launch_and_then_counts_what_came_before(app):
    post(app, faster(2, 3000))
    assert (get(app)["speed"], get(app)["status"], get(app)["missingMessages"]) == (None, "awaiting_launch", 1)
    post(app, launch())
    assert (get(app)["speed"], get(app)["status"], get(app)["missingMessages"]) == (3500, "active", 0)


def test_a_late_mission_change_does_not_undo_a_newer_one(app):
    post(app, renamed(9, "NEW"))
    post(app, renamed(4, "OLD"))
    assert get(app)["mission"] == "NEW"


def test_a_redelivery_that_differs_is_a_duplicate_and_the_first_stands(app, caplog):
    post(app, faster(2, 100))
    before = get(app)
    assert post(app, faster(2, 999), status=202).json == {"status": "duplicate"}
    assert get(app) == before
    assert "999" in caplog.records[0].getMessage() and caplog.records[0].levelno == logging.WARNING


def test_a_redelivery_with_its_keys_in_another_order_does_not_differ(app, caplog):
    post(app, launch())
    post(app, message(1, "RocketLaunched", dict(reversed(LAUNCH.items()))))
    assert not caplog.records


# Validation ###########################################################################################################


def edited(path, value):
    body = launch()
    holder = body
    *parents, name = path.split(".")
    for parent in parents:
        holder = holder[parent]
    if value is ...:  # missing
        del holder[name]
    else:
        holder[name] = value
    return json.dumps(body)


FIELDS = {
    "metadata": "an object",
    "message": "an object",
    "metadata.channel": "a UUID",
    "metadata.messageNumber": "a whole number from 1 to 9007199254740991",
    "metadata.messageTime": "an RFC 3339 time with an offset",
    "metadata.messageType": "one of RocketLaunched",
    "message.type": "a text of 1 to 256 characters",
    "message.launchSpeed": "a whole number from 0 to 2147483647",
    "message.mission": "a text of 1 to 256 characters",
}
WRONG = {path: [..., None, True, [], 1.5] for path in FIELDS}
for path in FIELDS:
    WRONG[path] += [""] if path.count(".") else ["text", 7]
for path, lowest, highest in (("metadata.messageNumber", 1, 2**53 - 1), ("message.launchSpeed", 0, 2**31 - 1)):
    WRONG[path] += [lowest - 1, highest + 1, 1.0, "1", 10**400, {}]
for path in ("message.type", "message.mission"):
    WRONG[path] += ["x" * 257, "a\0b", "\ud800", 7, {}]
WRONG["metadata.channel"] += ["7", f"{CHANNEL}0", CHANNEL[:-1] + "g", f" {CHANNEL}", f"{{{CHANNEL}", "1_" * 16, 7]
WRONG["metadata.messageType"] += ["rocketlaunched", "RocketLanded", "RocketLaunched ", 7, {}]
WRONG["metadata.messageTime"] += [
    "2022-02-02T19:39:05", "2022-02-02", "2022-13-02T19:39:05Z", "2022-02-30T19:39:05Z", "2022-02-02T24:00:00Z",
    "2022-02-02T19:60:05Z", "2022-02-02T19:39:61Z", "2022-02-02T12:00:60Z", "2022-02-02T19:39:05+24:00",
    "2022-02-02 19:39:05Z", "2022-02-02T19:39:05.Z", "0000-01-01T00:00:00Z", "9999-12-31T23:59:59-01:00",
    "\uff12022-02-02T19:39:05Z", 1643827145,
]  # fmt: skip
CASES = [(edited(path, value), f"{path} must be {FIELDS[path]}") for path, values in WRONG.items() for value in values]
CASES += [(edited(path, float("nan")), "NaN") for path in FIELDS]
VALID = json.dumps(launch())
CASES += [
    ("", "JSON"),
    ("{", "JSON"),
    (VALID + "x", "JSON"),
    (VALID.encode("utf-16"), "UTF-8"),
    (VALID.encode().replace(b"ARTEMIS", b"\xff"), "UTF-8"),
    ("[]", "the body must be an object, got []"),
    ("null", "the body must be an object, got null"),
    ("NaN", "JSON"),
    (VALID.replace("500", '500, "by": NaN'), "NaN"),
    (VALID.replace("{", '{"by": -Infinity, ', 1), "-Infinity"),
    ("[" * 30_000, "objects and arrays"),
    (VALID.replace("500", "9" * 5000), "JSON"),
    (VALID.replace("500", '500, "extra": 1e999'), "finite"),
    (VALID.replace("500", '500, "extra": "\\ud800"'), "whole characters"),
    (edited("message", {"by": 7}).replace("RocketLaunched", "RocketExploded"), "message.reason must be"),
    (edited("message", {"by": -1}).replace("RocketLaunched", "RocketSpeedDecreased"), "message.by must be"),
    (edited("message", {}).replace("RocketLaunched", "RocketMissionChanged"), "message.newMission must be"),
]


@pytest.mark.parametrize(("body", "words"), CASES, ids=[f"{i}-{words[:40]}" for i, (_, words) in enumerate(CASES)])
def test_bad_input_is_named_and_changes_nothing(app, file, body, words):
    post(app, faster(7, 1))
    before = dump(file)
    answer = post(app, body, status=400)
    assert answer.content_type == "application/problem+json"
    assert answer.json.keys() == {"title", "status", "detail"}
    assert (answer.json["title"], answer.json["status"]) == ("Bad Request", 400)
    assert words in answer.json["detail"]
    assert dump(file) == before


def test_a_body_over_64_kib_is_refused_and_one_of_64_kib_taken(app, file):
    padding = 64 * 1024 - len(json.dumps(launch(pad="")))
    assert post(app, launch(pad="x" * (padding + 1)), status=413).json["detail"].endswith("65536 bytes long")
    assert dump(file) == [[], []]
    post(app, launch(pad="x" * padding), status=202)


VALID_TIMES = ["2022-02-02t19:39:05z", "2016-12-31T23:59:60Z", "2016-12-31T15:59:60.5-08:00", "0001-01-01T00:00:00Z"]


@pytest.mark.parametrize("at", [*VALID_TIMES, "2022-02-02T19:39:05.123456789012-00:00"])
def test_every_rfc_3339_time_is_taken_and_served_as_sent(app, at):
    post(app, launch(at=at), status=202)
    assert get(app)["launchedAt"] == at


SPELLINGS = [CHANNEL.upper(), CHANNEL.replace("-", ""), f"{{{CHANNEL}}}", f"urn:uuid:{CHANNEL}", f"URN:UUID:{CHANNEL}"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_channel_may_be_spelled_as_any_uuid(app, spelling):
    post(app, launch(channel=spelling), status=202)
    assert get(app, spelling)["channel"] == CHANNEL
    assert post(app, launch()).json == {"status": "duplicate"}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
def test_any_content_type_will_do(app, content_type):
    request = app.RequestClass.blank("/messages", method="POST", body=json.dumps(launch()).encode())
    request.headers.pop("Content-Type", None)
    if content_type:
        request.headers["Content-Type"] = content_type
    assert app.do_request(request, status=202).json == {"status": "applied"}


# HTTP #################################################################################################################


def fill(app):
    """Store five rockets with ties, nulls and times of several offsets; return their channels."""
    channels = [str(uuid.UUID(int=n)) for n in range(1, 6)]
    post(app, launch(channel=channels[0], type="B", launchSpeed=5, mission="X", at="2022-02-02T12:00:00.0005+01:00"))
    post(app, launch(channel=channels[1], type="A", launchSpeed=5, mission="Y", at="2022-02-02T12:00:00.0004+01:00"))
    post(app, launch(channel=channels[2], type="A", launchSpeed=9, mission="X", at="2022-02-02T06:00:00-06:00"))
    post(app, exploded(2, channel=channels[2], at="2022-02-02T12:30:00+02:00"))
    post(app, faster(3, 1, channel=channels[3], at="2022-02-02T11:00:00.00041Z"))
    post(app, exploded(1, channel=channels[4], at="2022-02-02T23:00:00+13:00"))
    return channels


SORTED = {  # the order of fill()'s rockets, ascending and descending
    "channel": ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]),
    "type": ([2, 3, 1, 4, 5], [1, 2, 3, 4, 5]),
    "speed": ([1, 2, 3, 4, 5], [3, 1, 2, 4, 5]),
    "mission": ([1, 3, 2, 4, 5], [2, 1, 3, 4, 5]),
    "status": ([1, 2, 4, 3, 5], [3, 5, 4, 1, 2]),
    "launchedAt": ([2, 1, 3, 4, 5], [3, 1, 2, 4, 5]),
    "updatedAt": ([5, 3, 2, 4, 1], [1, 4, 2, 3, 5]),
    "lastMessageNumber": ([1, 2, 5, 3, 4], [4, 3, 1, 2, 5]),
}


@pytest.mark.parametrize("sort", SORTED)
def test_rockets_sort_by_every_key_in_both_orders_ties_by_channel_and_null_last(app, sort):
    channels = fill(app)
    for order, expected in zip(("asc", "desc"), SORTED[sort], strict=True):
        answer = app.get(f"/rockets?sort={sort}&order={order}").json
        assert [rocket["channel"] for rocket in answer.pop("rockets")] == [channels[n - 1] for n in expected]
        assert answer == {"count": 5, "total": 5, "sortBy": sort, "order": order}


@pytest.mark.parametrize("sort", ["launchedAt", "updatedAt"])
def test_times_sort_by_the_message_they_are_from_whenever_it_came(app, sort):
    one, two = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
    post(app, launch(5, channel=one, at="2022-02-05T00:00:00Z"))
    post(app, launch(3, channel=one, at="2022-02-03T00:00:00Z"))
    post(app, launch(4, channel=one, at="2022-02-01T00:00:00Z"))
    post(app, launch(1, channel=two, at="2022-02-04T00:00:00Z"))
    expected = [one, two] if sort == "launchedAt" else [two, one]
    assert [rocket["channel"] for rocket in app.get(f"/rockets?sort={sort}").json["rockets"]] == expected


def test_spellings_of_one_instant_tie(app):
    channels = [str(uuid.UUID(int=n)) for n in range(1, 5)]
    times = ["2022-02-02T12:00:00.500Z", "2022-02-02T13:00:00.5+01:00", "2022-02-02t06:00:00.50-06:00"]
    for channel, at in zip(channels, [*times, "2022-02-02T12:00:00Z"], strict=True):
        post(app, launch(channel=channel, at=at))
    for order, expected in (("asc", [4, 1, 2, 3]), ("desc", [1, 2, 3, 4])):
        found = app.get(f"/rockets?sort=launchedAt&order={order}").json["rockets"]
        assert [rocket["channel"] for rocket in found] == [channels[n - 1] for n in expected]


def test_rockets_come_by_channel_upwards_unless_asked_otherwise(app):
    assert app.get("/rockets").json == {"count": 0, "total": 0, "sortBy": "channel", "order": "asc", "rockets": []}
    channels = fill(app)
    assert [rocket["channel"] for rocket in app.get("/rockets").json["rockets"]] == channels


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("status=exploded", [3, 5]),
        ("status=active", [1, 2]),
        ("status=awaiting_launch", [4]),
        ("type=A", [2, 3]),
        ("mission=X", [1, 3]),
        ("mission=X&type=A&status=exploded", [3]),
        ("mission=", []),
        ("mission=x'%20OR%20'1'='1", []),
        ("mission=%00", []),
        ("mission=%ff", []),
    ],
)
def test_filters_leave_what_matches_all_of_them(app, query, expected):
    channels = fill(app)
    answer = app.get(f"/rockets?{query}").json
    assert [rocket["channel"] for rocket in answer["rockets"]] == [channels[n - 1] for n in expected]
    assert answer["count"] == answer["total"] == len(expected)


@pytest.mark.parametrize("spelling", ["Z%C3%BCrich", "Zürich"])
def test_a_filter_may_be_percent_encoded_or_not(app, spelling):
    post(app, launch(mission="Zürich"))
    query = spelling.encode().decode("latin-1")  # as WSGI shows what came
    assert app.get("/rockets", extra_environ={"QUERY_STRING": f"mission={query}"}).json["count"] == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_pages_neither_skip_nor_repeat(app, size):
    channels = fill(app)
    seen = []
    for offset in range(0, 9, size):
        page = app.get(f"/rockets?sort=status&limit={size}&offset={offset}").json
        assert page["count"] == len(page["rockets"]) and page["total"] == 5
        seen += [rocket["channel"] for rocket in page["rockets"]]
    assert seen == [channels[n - 1] for n in SORTED["status"][0]]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/rockets?sort=age", "sort must be one of channel, type, speed, mission, status, launchedAt, updatedAt, last"),
        ("/rockets?sort=", "sort must be one of"),
        ("/rockets?sort=speed;DROP TABLE rockets", "sort must be one of"),
        ("/rockets?order=up", 'order must be one of asc, desc, got "up"'),
        ("/rockets?status=lost", 'status must be one of active, awaiting_launch, exploded, got "lost"'),
        ("/rockets?limit=-1", 'limit must be a whole number from 0 to 9007199254740991, got "-1"'),
        ("/rockets?limit=ten", "limit must be a whole number"),
        ("/rockets?limit=1.0", "limit must be a whole number"),
        ("/rockets?limit=%D9%A1", "limit must be a whole number"),
        ("/rockets?offset=9007199254740992", "offset must be a whole number"),
        ("/rockets?limit=" + "9" * 5000, "limit must be a whole number"),
        ("/rockets?limit=1&limit=2", "only once"),
        (f"/rockets/{CHANNEL}/messages?limit=10001", 'limit must be a whole number from 0 to 10000, got "10001"'),
        (f"/rockets/{CHANNEL}/messages?after=x", "after must be a whole number"),
        ("/rockets/apollo", 'channel must be a UUID, got "apollo"'),
        ("/rockets/apollo/messages", "channel must be a UUID"),
    ],
)
def test_a_bad_parameter_is_named_with_what_it_may_be(app, path, words):
    answer = app.get(path, status=400)
    assert answer.content_type == "application/problem+json"
    assert words in answer.json["detail"]


def test_history_is_what_was_posted_in_the_order_of_numbers(app):
    sent = [renamed(9, "B", at="2022-02-02T19:39:05.10+01:00"), launch(2, extra={"kept": [1, "é", None]}), faster(4, 1)]
    for body in sent:
        post(app, body)
    ordered = [sent[1], sent[2], sent[0]]
    assert app.get(f"/rockets/{CHANNEL}/messages").json == {"channel": CHANNEL, "count": 3, "messages": ordered}
    page = app.get(f"/rockets/{CHANNEL}/messages?after=2&limit=1").json
    assert page == {"channel": CHANNEL, "count": 1, "messages": [sent[2]]}
    assert app.get(f"/rockets/{CHANNEL}/messages?after=9").json == {"channel": CHANNEL, "count": 0, "messages": []}


def test_history_has_1000_messages_unless_asked_otherwise(app):
    assert API["components"]["parameters"]["historyLimit"]["schema"]["default"] == 1000
    for number in range(1, 1003):
        post(app, faster(number, 1))
    assert app.get(f"/rockets/{CHANNEL}/messages").json["count"] == 1000
    assert app.get(f"/rockets/{CHANNEL}/messages?limit=10000").json["count"] == 1002


@pytest.mark.parametrize("path", [f"/rockets/{CHANNEL}", f"/rockets/{CHANNEL}/messages", "/nowhere", "/rockets/"])
def test_what_is_unknown_is_a_404(app, path):
    answer = app.get(path, status=404)
    assert answer.content_type == "application/problem+json"
    assert answer.json["title"] == "Not Found"


def test_a_wrong_method_is_a_405_that_names_the_right_one(app):
    answer = app.get("/messages", status=405)
    assert answer.headers["Allow"] == "POST"
    assert answer.json == {"title": "Method Not Allowed", "status": 405, "detail": "/messages takes POST, not GET"}
    assert app.delete("/rockets", status=405).headers["Allow"] == "GET,HEAD"


def test_health_counts_rockets_and_messages(app):
    fill(app)
    assert app.get("/health").json == {"status": "ok", "rockets": 5, "messages": 6}


@pytest.mark.parametrize("path", ["/rockets", f"/rockets/{CHANNEL}", f"/rockets/{CHANNEL}/messages", "/health"])
def test_a_get_that_would_repeat_itself_answers_304(app, path):
    post(app, launch())
    tag = app.get(path).headers["ETag"]
    for held in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        assert app.get(path, headers={"If-None-Match": held}, status=304).body == b""
    assert app.get(path, headers={"If-None-Match": '"other"'}, status=200).headers["ETag"] == tag
    post(app, faster(2, 1))
    assert app.get(path, headers={"If-None-Match": tag}, status=200).headers["ETag"] != tag


def test_head_has_the_headers_of_get_and_no_body(app):
    post(app, launch())
    head, whole = app.head("/rockets"), app.get("/rockets")
    assert (head.body, head.headers["Content-Length"]) == (b"", str(len(whole.body)))


def test_any_page_may_read_and_no_browser_takes_an_answer_for_a_page(app):
    for answer in (app.get("/rockets"), app.get("/nowhere", status=404), app.get("/rockets?sort=x", status=400)):
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    answer = post(app, launch(mission="<script>"))
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert app.get("/rockets").content_type == "application/json"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:80"}, 202),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://elsewhere.example"}, 202),
        ({"Sec-Fetch-Site": "none"}, 202),
    ],
)
def test_only_the_own_page_may_post(app, file, headers, status):
    answer = post(app, launch(), headers=headers, status=status)
    assert len(dump(file)[1]) == (status == 202)
    assert answer.content_type == ("application/json" if status == 202 else "application/problem+json")


# The dashboard and the metrics ########################################################################################


def test_the_dashboard_may_run_its_own_script_and_load_nothing_from_elsewhere(app):
    answer = app.get("/", status=200)
    assert answer.content_type == "text/html"
    (policy,) = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*?)">', answer.text, re.DOTALL)
    policy = dict(part.split(maxsplit=1) for part in policy.split(";"))
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[f"{tag}-src"]
    assert "unsafe" not in str(policy)
    assert (policy["default-src"], policy["connect-src"], policy["form-action"]) == ("'none'", "'self'", "'none'")
    assert not re.search(r"""(src|href)=["']?(https?:)?//|\son\w+=|innerHTML|style=["']""", answer.text)


def read_metrics(app):
    lines = app.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_count_what_became_of_every_message(app, file):
    post(app, launch(1))
    post(app, launch(1))
    post(app, launch(1, mission="OTHER"))
    post(app, exploded(5))
    post(app, "{}", status=400)
    post(app, launch(channel=str(uuid.UUID(int=1))), headers={"Sec-Fetch-Site": "cross-site"}, status=403)
    post(app, faster(1, 1, channel=str(uuid.UUID(int=2))))
    aside = file.rename(file.with_name("aside"))
    post(app, faster(1, 1, channel=str(uuid.UUID(int=2))), status=503)
    aside.rename(file)
    metrics = read_metrics(app)
    assert {
        name: value for name, value in metrics.items() if name.startswith(("rockets_m", "rockets_f", "rockets_c"))
    } == {
        'rockets_messages_total{outcome="applied"}': 3,
        'rockets_messages_total{outcome="duplicate"}': 1,
        'rockets_messages_total{outcome="conflicting"}': 1,
        'rockets_messages_total{outcome="rejected"}': 2,
        'rockets_messages_total{outcome="failed"}': 1,
        "rockets_commits_total": 3,
        'rockets_fleet{status="active"}': 0,
        'rockets_fleet{status="awaiting_launch"}': 1,
        'rockets_fleet{status="exploded"}': 1,
        "rockets_missing_messages": 3,
    }
    assert metrics[f'rockets_build_info{{version="{rockets.VERSION}"}}'] == 1
    assert 0 <= time.time() - metrics["process_start_time_seconds"] < 60


def test_metrics_add_up_any_number_of_missing_messages(app):
    for number in range(1025):
        post(app, faster(2**53 - 1, 1, channel=str(uuid.UUID(int=number))))
    assert read_metrics(app)["rockets_missing_messages"] >= 2**63 - 1  # more is not shown


def test_metrics_sort_post_durations_into_buckets(app):
    for number in range(1, 8):
        post(app, faster(number, 1))
    metrics = read_metrics(app)
    bucket = 'rockets_post_duration_seconds_bucket{le="%s"}'
    buckets = [metrics[bucket % f"{bound:g}".replace("inf", "+Inf")] for bound in rockets.BUCKETS]
    assert len(buckets) == sum(name.startswith("rockets_post_duration_seconds_bucket") for name in metrics)
    assert buckets == sorted(buckets)
    assert buckets[-1] == metrics['rockets_post_duration_seconds_bucket{le="+Inf"}'] == 7
    assert metrics["rockets_post_duration_seconds_count"] == 7
    assert 0 < metrics["rockets_post_duration_seconds_sum"] < 60


# The description of the API ###########################################################################################

API = json.loads((rockets.STATIC / "openapi.json").read_text())
SCHEMAS, EXAMPLES = API["components"]["schemas"], API["components"]["examples"]
TYPES = {"string": str, "integer": int, "object": dict, "array": list, "null": type(None)}
NO_UUIDS = [CHANNEL[1:], f"{CHANNEL}0", f"{{{CHANNEL}", f"{CHANNEL}}}", CHANNEL.replace("-", "", 1), f"uuid:{CHANNEL}"]


def resolved(part):
    """Return a part of the description; if it is a reference, what that names, with what stands beside it."""
    while "$ref" in part:
        found, part = API, dict(part)
        for step in part.pop("$ref").split("/")[1:]:
            found = found[step]
        part = found | part
    return part


def faults(value, schema, where="body"):
    """Return, in words, where a value differs from a schema. A key that the schema doesn't name is a fault, too."""
    schema = resolved(schema)
    assert schema.keys() & {"type", "const", "oneOf"}, f"{where} may be anything"
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if types and type(value) not in [TYPES[name] for name in types]:
        return [f"{where} is {value!r}, which is no {' or '.join(types)}"]
    found = []
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        found.append(f"{where} is {value!r}, which is not among the choices")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where} is {value!r}, which does not match the pattern")
    if "oneOf" in schema and [faults(value, choice) for choice in schema["oneOf"]].count([]) != 1:
        found.append(f"{where} is {value!r}, which is not one of the alternatives")
    if "properties" in schema:
        if not set(schema["required"]) <= set(value) <= set(schema["properties"]):
            found.append(f"{where} has the keys {sorted(value)}")
        for key in set(value) & set(schema["properties"]):
            found += faults(value[key], schema["properties"][key], f"{where}.{key}")
    for place, item in enumerate(value if "items" in schema else []):
        found += faults(item, schema["items"], f"{where}[{place}]")
    return found


def edges(schema):
    """Return values at the limits of a schema, and values just beyond them."""
    schema = resolved(schema)
    if "const" in schema or "enum" in schema:
        return schema.get("enum") or [schema["const"]], ["RocketLost", ""]
    if schema["type"] == "integer":
        return [schema["minimum"], schema["maximum"]], [schema["minimum"] - 1, schema["maximum"] + 1]
    if schema.get("format") == "date-time":
        times = [f"2022-02-02T19:39:05.{'9' * (schema['maxLength'] - 21 + more)}Z" for more in (0, 1)]
        return times[:1], times[1:]
    if "maxLength" in schema:
        low, high = schema["minLength"], schema["maxLength"]
        return ["é" * low, "é" * high], ["é" * (low - 1), "é" * (high + 1), "\0"]
    spelled = [*SPELLINGS, *NO_UUIDS] if "pattern" in schema else []
    valid = [text for text in spelled if re.search(schema["pattern"], text)]
    return valid, [text for text in spelled if text not in valid]


def test_the_description_names_every_route_and_no_other(app):
    assert app.get("/openapi.json").json == API
    routes = {(re.sub("<(.*?)>", r"{\1}", route.rule), route.method.lower()) for route in app.app.routes}
    assert {(path, method) for path, methods in API["paths"].items() for method in methods} == routes
    for path, methods in API["paths"].items():
        parameters = [resolved(each) for each in methods.get("get", {}).get("parameters", [])]
        assert [each["name"] for each in parameters if each["in"] == "path"] == re.findall("{(.*?)}", path)
        assert [each["name"] for each in parameters if each["in"] == "header"] == ["If-None-Match"] * ("get" in methods)


def test_the_described_choices_are_those_of_the_code():
    assert API["info"]["version"] == rockets.VERSION
    assert SCHEMAS["SortKey"]["enum"] == list(rockets.SORT_KEYS)
    assert SCHEMAS["Order"]["enum"] == list(rockets.ORDERS)
    assert SCHEMAS["Status"]["enum"] == list(rockets.STATUSES)
    kinds = [resolved(each)["properties"]["metadata"] for each in SCHEMAS["Message"]["oneOf"]]
    assert [kind["properties"]["messageType"]["const"] for kind in kinds] == list(rockets.MESSAGE_TYPES)


@pytest.mark.parametrize("kind", rockets.MESSAGE_TYPES)
def test_a_message_may_have_what_the_description_says_and_no_more(app, kind):
    for part, rules in {"metadata": rockets.METADATA, "message": rockets.MESSAGE_TYPES[kind]}.items():
        described = SCHEMAS[kind]["properties"][part]
        assert set(described["required"]) == set(described["properties"]) == set(rules)
        for field, schema in described["properties"].items():
            valid, invalid = edges(schema)
            assert valid and invalid
            body = copy.deepcopy(EXAMPLES[kind]["value"])
            for value in valid + invalid:
                body[part][field] = value
                post(app, body, status=202 if value in valid else 400)
            del body[part][field]
            post(app, body, status=400)


@pytest.mark.parametrize(
    ("path", "rules"), [("/rockets", rockets.LIST_QUERY), ("/rockets/{channel}/messages", rockets.HISTORY_QUERY)]
)
def test_a_query_may_have_what_the_description_says_and_no_more(app, path, rules):
    post(app, launch())
    post(app, faster(1, 5, channel=CHANNEL.replace("1", "2")))
    parameters = [resolved(each) for each in API["paths"][path]["get"]["parameters"]]
    query = {each["name"]: each["schema"] for each in parameters if each["in"] == "query"}
    assert set(query) == set(rules)
    path = path.format(channel=CHANNEL)
    for name, schema in query.items():
        valid, invalid = edges(schema)
        for value in valid + invalid:
            app.get(path, {name: value}, status=200 if value in valid else 400)
        if "default" in resolved(schema):
            assert app.get(path, {name: resolved(schema)["default"]}).json == app.get(path).json


@pytest.mark.parametrize("spelling", [*SPELLINGS, *NO_UUIDS])
def test_a_channel_may_be_asked_for_as_the_description_says(app, spelling):
    post(app, launch())
    valid = re.search(SCHEMAS["AnyChannel"]["pattern"], spelling)
    for path in ("/rockets/{channel}", "/rockets/{channel}/messages"):
        app.get(path.format(channel=spelling), status=200 if valid else 400)


def test_the_examples_of_the_description_are_true(app):
    body = API["paths"]["/messages"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        assert faults(resolved(example)["value"], body["schema"]) == []
        post(app, resolved(example)["value"], status=202)
    for path, query in {
        "/rockets": "?sort=speed&order=desc",
        "/rockets/{channel}": "",
        "/rockets/{channel}/messages": "?limit=1",
        "/health": "",
    }.items():
        answer = app.get(path.format(channel=CHANNEL) + query)
        examples = API["paths"][path]["get"]["responses"]["200"]["content"][answer.content_type]["examples"]
        assert [resolved(each)["value"] for each in examples.values()] == [answer.json]


def test_every_answer_is_as_described(app, file):
    everything = {
        (path, method, int(status))
        for path, methods in API["paths"].items()
        for method, operation in methods.items()
        for status in operation["responses"]
    }
    seen = set()

    def ask(path, status, method="get", channel=CHANNEL, query="", **options):
        answer = app.request(path.format(channel=channel) + query, method=method.upper(), status=status, **options)
        described = resolved(API["paths"][path][method]["responses"][str(status)])
        for media, content in described.get("content", {"": {"schema": {"const": ""}}}).items():
            assert (answer.content_type or "") == media
            assert faults(answer.json if media.endswith("json") else answer.text, content["schema"]) == []
        headers = {name.lower(): resolved(header)["schema"] for name, header in described.get("headers", {}).items()}
        assert {name.lower() for name in answer.headers} & {"etag", "retry-after"} == set(headers)
        for name, schema in headers.items():
            value = answer.headers[name]
            assert faults(int(value) if schema["type"] == "integer" else value, schema, name) == []
        if status >= 400:
            assert answer.json["status"] == status
        seen.add((path, method, status))
        return answer

    messages = [EXAMPLES[kind]["value"] for kind in rockets.MESSAGE_TYPES] * 2
    bodies = [json.dumps(each).encode() for each in [*messages, faster(1, 5, channel=CHANNEL.replace("1", "2"))]]
    said = [ask("/messages", 202, "post", body=body).json["status"] for body in bodies]
    assert set(said) == set(SCHEMAS["Receipt"]["properties"]["status"]["enum"])
    ask("/messages", 400, "post", body=b"")
    ask("/messages", 403, "post", body=bodies[0], headers={"Sec-Fetch-Site": "cross-site"})
    ask("/messages", 413, "post", body=bodies[0].ljust(rockets.MAX_BODY + 1))
    for path in [path for path in API["paths"] if path != "/messages"]:
        tag = ask(path, 200).headers["ETag"]
        ask(path, 304, headers={"If-None-Match": tag})
    ask("/rockets/{channel}", 200, channel=CHANNEL.replace("1", "2"))
    ask("/rockets", 400, query="?sort=age")
    for path in ("/rockets/{channel}", "/rockets/{channel}/messages"):
        ask(path, 400, channel="Apollo")
        ask(path, 404, channel=CHANNEL.replace("1", "3"))
    for path, methods in API["paths"].items():
        answer = app.request(path.format(channel=CHANNEL), method="PUT", status=405)
        assert faults(answer.json, SCHEMAS["Problem"]) == []
        assert set(answer.headers["Allow"].lower().split(",")) - {"head"} == set(methods)
    assert faults(app.get("/nowhere", status=404).json, SCHEMAS["Problem"]) == []
    file.unlink()
    for path, method, status in everything:
        if status == 503:
            ask(path, status, method, **({"body": bodies[0]} if method == "post" else {}))
    assert seen == everything


# The process ##########################################################################################################


class Process:
    """The service as a user starts it; stopped at the end of the with block."""

    def __init__(self, file, *options, program=(SERVICE,), **environ):
        self.file, self.options, self.program, self.environ = file, options, program, environ

    def __enter__(self):
        command = [sys.executable, *self.program, "--database", self.file, "--port", "0", *self.options]
        self.popen = subprocess.Popen(
            command, env=os.environ | self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said = self.popen.stdout.readline()
        self.url = self.said.split()[3].rstrip(",")
        return self

    def __exit__(self, *_):
        self.popen.kill()
        self.popen.communicate()

    def stop(self, number):
        self.popen.send_signal(number)
        return self.popen.wait(timeout=10)

    def connect(self, timeout=10):
        return socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout)

    def request(self, path, body=None, timeout=10):
        """Return the status and the JSON of an answer."""
        try:
            with urllib.request.urlopen(self.url + path, body and json.dumps(body).encode(), timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@contextmanager
def post_from_threads(process, bodies):
    """Post at the same time, while the block runs; its list then holds status, JSON and seconds of each answer."""
    answers = []

    def deliver(body):
        began = time.monotonic()
        status, answer = process.request("/messages", body, timeout=30)
        answers.append((status, answer, time.monotonic() - began))

    threads = [threading.Thread(target=deliver, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join()


def start_in_vain(file, *options):
    """Return the exit code and the stderr of a service that can't start."""
    command = [sys.executable, SERVICE, "--database", file, "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stderr


def post_until_it_stops(process, acknowledged, channel):
    for number in itertools.count(1):
        try:
            status, _ = process.request("/messages", faster(number, 1, channel=channel))
        except (OSError, http_client.HTTPException):
            return
        if status == 202:
            acknowledged.append((channel, number))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_everything_acknowledged_is_there_after(number, code, file):
    acknowledged = []
    with Process(file) as process:
        channels = [str(uuid.uuid4()) for _ in range(4)]
        senders = [threading.Thread(target=post_until_it_stops, args=(process, acknowledged, c)) for c in channels]
        for sender in senders:
            sender.start()
        while len(acknowledged) < 200:
            time.sleep(0.01)
        assert process.stop(number) == code
        for sender in senders:
            sender.join()
    if code == 0:
        assert sorted(path.name for path in file.parent.iterdir()) == ["rockets.db"]  # no write-ahead log is left
    with Process(file) as process:
        for channel in channels:
            numbers = {number for sent, number in acknowledged if sent == channel}
            status, rocket = process.request(f"/rockets/{channel}")
            assert status == 200
            assert rocket["lastMessageNumber"] - len(numbers) in (0, 1)  # the last one may lack its answer alone
            assert rocket["missingMessages"] == 0
            history = process.request(f"/rockets/{channel}/messages?limit=10000")[1]["messages"]
            assert numbers <= {entry["metadata"]["messageNumber"] for entry in history}


def test_the_same_message_on_many_connections_at_once_is_applied_once(file):
    with Process(file) as process:
        for number in range(1, 51):
            with post_from_threads(process, [faster(number, 1)] * 4) as answers:
                pass
            assert Counter(answer["status"] for _, answer, _ in answers) == {"applied": 1, "duplicate": 3}
        process.request("/messages", launch(51))
        assert process.request(f"/rockets/{CHANNEL}")[1]["speed"] == 550


def test_what_was_found_is_said(file):
    with Process(file) as process:
        process.request("/messages", launch())
        process.stop(signal.SIGTERM)
    with Process(file) as process:
        assert process.said == f"Rockets listens on {process.url}, {file} holds 1 rockets and 1 messages\n"
        assert process.request(f"/rockets/{CHANNEL}")[1] == fold([launch()])


def test_reset_starts_from_nothing(file):
    with Process(file) as process:
        process.request("/messages", launch())
        process.stop(signal.SIGTERM)
    with Process(file, "--reset") as process:
        assert process.request("/health") == (200, {"status": "ok", "rockets": 0, "messages": 0})
        assert process.request("/messages", launch()) == (202, {"status": "applied"})


def test_the_environment_stands_in_for_options(tmp_path):
    environ = os.environ | {"HOST": "127.0.0.1", "PORT": "0", "DATABASE": str(tmp_path / "other.db")}
    popen = subprocess.Popen([sys.executable, SERVICE], env=environ, stdout=subprocess.PIPE, text=True)
    said = popen.stdout.readline()
    popen.terminate()
    assert popen.wait(timeout=10) == 0
    assert said.startswith("Rockets listens on http://127.0.0.1:") and "other.db" in said


def test_localhost_is_ipv4_and_ipv6(file):
    with Process(file) as process:
        port = process.url.rpartition(":")[2]
        for host in ["127.0.0.1", "[::1]"] if has_ipv6() else ["127.0.0.1"]:
            process.url = f"http://{host}:{port}"
            assert process.request("/health")[0] == 200


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("options", [[], ["--verbose"]])
def test_requests_are_logged_only_when_asked_for_and_on_one_line_each(file, options):
    with Process(file, *options) as process:
        process.request("/nowhere%0A%1B[31mforged%C2%9B")
        process.popen.terminate()
        logged = process.popen.communicate()[1]
    assert logged.count("\n") == len(options)
    assert logged.replace("\n", "").isprintable()


def test_a_port_that_is_taken_is_one_line_and_leaves_the_database_alone(file, tmp_path):
    with Process(file) as process:
        process.request("/messages", launch())
        port = process.url.rpartition(":")[2]
        code, said = start_in_vain(file, "--port", port, "--reset")
        assert (code, said) == (1, f"rockets: cannot listen on 127.0.0.1 port {port}: Address already in use\n")
        assert process.request(f"/rockets/{CHANNEL}")[0] == 200


@pytest.mark.parametrize(
    "options", ["--port 99999", "--host ..a", "--host 192.0.2.1", "--port abc", "--threads x", "--x"]
)
def test_an_option_that_cannot_be_is_one_line(file, options):
    code, said = start_in_vain(file, *options.split())
    assert (code, said.count("\n")) == (1, 1) and said.startswith("rockets: ")


def test_a_log_without_its_database_is_one_line_and_left_as_it_was(file):
    with Process(file) as process:
        process.request("/messages", launch(1))
        process.stop(signal.SIGKILL)
    kept = file.read_bytes()
    file.unlink()
    code, said = start_in_vain(file)
    assert (code, said.count("\n")) == (1, 1) and "its write-ahead log is there" in said
    file.write_bytes(kept)
    with Process(file) as process:
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1)]))


def test_half_a_database_with_a_log_beside_it_is_one_line_and_left_as_it_was(file):
    a_whole_database(file)
    with Process(file) as process:
        process.request("/messages", launch(501))
        process.stop(signal.SIGKILL)
    os.truncate(file, file.stat().st_size // 2)
    before = file.read_bytes()
    code, said = start_in_vain(file)
    assert (code, said) == (1, f"rockets: cannot use {file} as the database: a part of it is missing\n")
    assert file.read_bytes() == before


def answer_to_a_body_that_ends_after_sigterm(process, meanwhile=lambda: None):
    with process.connect() as connection:
        connection.sendall(http(BODY, LENGTH)[:-20])
        time.sleep(0.3)
        meanwhile()
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        connection.sendall(http(BODY, LENGTH)[-20:])
        return connection.recv(65536)


def test_a_body_that_is_still_coming_at_sigterm_is_taken(file):
    with Process(file) as process:
        assert b" 202 Accepted" in answer_to_a_body_that_ends_after_sigterm(process)
        assert process.popen.wait(timeout=10) == 0


def test_a_sigterm_that_comes_before_the_greeting_is_out_ends_it_all_the_same(file):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, b"." * 4096)  # no room for the greeting
    os.set_blocking(writing, True)
    command = [sys.executable, SERVICE, "--database", file, "--port", "0"]
    popen = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    while not Path(f"{file}-wal").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    popen.terminate()
    time.sleep(0.1)
    with open(reading, "rb") as pipe:
        pipe.read()
    assert (popen.communicate(timeout=10)[1], popen.returncode) == (b"", 0)


def test_a_message_that_meets_a_lock_after_sigterm_is_answered_all_the_same(file):
    with Process(file) as process, closing(sqlite3.connect(file, isolation_level=None)) as other:
        answered = answer_to_a_body_that_ends_after_sigterm(process, lambda: other.execute("BEGIN IMMEDIATE"))
        assert b" 503 " in answered
        assert process.popen.wait(timeout=5) == 0


def test_a_second_sigterm_changes_nothing(file):
    with Process(file) as process:
        with process.connect() as connection:
            process.popen.terminate()
            assert connection.recv(1) == b""  # it is about to exit
        process.popen.terminate()
        assert process.popen.wait(timeout=5) == 0


def a_text_file(file):
    file.write_bytes(b"Dear diary, " * 1000)


def a_short_text_file(file):
    file.write_bytes(b"Dear diary")


def a_whole_database(file):
    store = rockets.Store(str(file))
    for number in range(1, 501):
        store.apply(rockets.parse_message(json.dumps(faster(number, 1)).encode()))
    store.close()


def half_a_database(file):
    a_whole_database(file)
    os.truncate(file, file.stat().st_size // 2)


def a_newer_schema(file):
    rockets.Store(str(file)).close()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA user_version = {rockets.SCHEMA_VERSION + 1}")


def another_program(file):
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE holidays (day TEXT)")


@pytest.mark.parametrize("options", [[], ["--reset"]])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_text_file, "no SQLite database"),
        (a_short_text_file, "no SQLite database"),
        (half_a_database, "a part of it is missing"),
        (a_newer_schema, "another version of this one"),
        (another_program, "another program"),
    ],
)
def test_a_file_that_is_no_database_of_ours_is_one_line_and_left_as_it_was(file, make, words, options):
    make(file)
    before = file.read_bytes()
    code, said = start_in_vain(file, *options)
    assert code == 1
    assert said.startswith(f"rockets: cannot use {file} as the database: ") and said.count("\n") == 1
    assert words in said
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_database_that_is_damaged_inside_is_one_line(file):
    a_whole_database(file)
    damaged = bytearray(file.read_bytes())
    with closing(sqlite3.connect(file)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'rockets'").fetchone()
    damaged[(page - 1) * 4096 : page * 4096] = b"\x55" * 4096
    file.write_bytes(damaged)
    code, said = start_in_vain(file)
    assert (code, said) == (1, f"rockets: cannot use {file} as the database: database disk image is malformed\n")


@pytest.mark.parametrize("file", ["/proc/rockets.db", "/nowhere/at/all/rockets.db"])
def test_a_folder_that_takes_no_file_is_one_line(file):
    code, said = start_in_vain(file)
    assert (code, said) == (1, f"rockets: cannot use {file} as the database: unable to open database file\n")


# Faults ###############################################################################################################


def test_posts_outlast_a_lock_of_two_seconds(file):
    with Process(file) as process, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with post_from_threads(process, [faster(number, 1) for number in range(1, 31)]) as answers:
            time.sleep(2)
            assert answers == []
            other.execute("ROLLBACK")
        assert Counter(status for status, *_ in answers) == {202: 30}
        metrics = urllib.request.urlopen(process.url + "/metrics").read().decode()
        assert 'rockets_post_duration_seconds_bucket{le="1"} 0\n' in metrics  # the wait counts
        assert process.request("/health")[1]["messages"] == 30


def test_under_a_long_lock_posts_fail_in_time_gets_go_on_and_all_heals(file):
    with Process(file) as process, closing(sqlite3.connect(file, isolation_level=None)) as other:
        process.request("/messages", launch(1))
        other.execute("BEGIN IMMEDIATE")
        with post_from_threads(process, [faster(number, 1) for number in range(2, 42)]) as answers:
            for _ in range(20):
                assert process.request(f"/rockets/{CHANNEL}", timeout=3) == (200, fold([launch(1)]))
                time.sleep(0.2)
        assert Counter(status for status, *_ in answers) == {503: 40}
        assert max(seconds for *_, seconds in answers) < 8  # the sender gives up after 10
        assert process.request("/health")[0] == 503
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(process.url + "/messages", json.dumps(faster(99, 1)).encode(), 8)
        assert refused.value.headers["Retry-After"] == "1"
        other.execute("ROLLBACK")
        assert process.request("/messages", faster(2, 3)) == (202, {"status": "applied"})
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1), faster(2, 3)]))
        assert process.request("/health")[0] == 200


def test_a_client_that_hangs_up_while_its_message_waits_harms_nobody(file):
    with Process(file) as process, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            with process.connect() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, no goodbye
                connection.sendall(http(BODY, LENGTH))
                time.sleep(0.2)
        with post_from_threads(process, [faster(2, 1)]):
            time.sleep(0.2)
            other.execute("ROLLBACK")
        assert process.request("/health")[1]["messages"] in (1, 2)


def test_a_full_disk_fails_all_that_share_its_commit_and_each_is_taken_later(file):
    bodies = [launch(number, pad="x" * 30_000) for number in range(2, 10)]
    with Process(file) as process, closing(sqlite3.connect(file, isolation_level=None)) as other:
        process.request("/messages", launch(1))
        limit = os.path.getsize(f"{file}-wal") + 4096
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        other.execute("BEGIN IMMEDIATE")
        with post_from_threads(process, [*bodies, {"metadata": "not a 202 at all"}]) as answers:
            time.sleep(0.5)
            other.execute("ROLLBACK")  # so that all of them come to one transaction
        assert Counter(status for status, *_ in answers) == {503: 8, 400: 1}
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1)]))
        metrics = urllib.request.urlopen(process.url + "/metrics").read().decode()
        assert 'outcome="applied"} 1\n' in metrics and 'outcome="failed"} 8\n' in metrics
        assert 'outcome="rejected"} 1\n' in metrics and "rockets_commits_total 1\n" in metrics
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        with post_from_threads(process, bodies) as answers:
            pass
        assert [answer for _, answer, _ in answers] == [{"status": "applied"}] * 8
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1), *bodies]))


def test_a_statement_that_fails_takes_back_all_that_share_its_transaction(file):
    channels = [str(uuid.UUID(int=number)) for number in range(120)]  # so much that SQLite writes before the commit
    with Process(file) as process, closing(sqlite3.connect(file, isolation_level=None)) as other:
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
        other.execute("BEGIN IMMEDIATE")
        with post_from_threads(process, [launch(pad="x" * 50_000, channel=channel) for channel in channels]) as answers:
            time.sleep(1)
            other.execute("ROLLBACK")
        assert Counter(status for status, *_ in answers) == {503: 120}
        assert process.request("/rockets")[1]["count"] == 0
        metrics = urllib.request.urlopen(process.url + "/metrics").read().decode()
        assert 'outcome="failed"} 120\n' in metrics and "rockets_commits_total 0\n" in metrics


def test_a_lock_that_comes_again_is_waited_for_again_and_health_tells_of_failures_alone(file):
    with Process(file) as process, closing(sqlite3.connect(file, isolation_level=None)) as other:
        for pause in (3, 2):  # together more than the patience with one lock
            other.execute("BEGIN IMMEDIATE")
            with process.connect() as connection:
                connection.sendall(http(BODY, LENGTH))
                time.sleep(pause)
                assert process.request("/health")[0] == 200
            time.sleep(0.2)  # it has hung up
            if pause == 2:
                with post_from_threads(process, [faster(2, 1)]) as answers:
                    time.sleep(0.5)
                    other.execute("ROLLBACK")
                assert [status for status, *_ in answers] == [202]
            else:
                other.execute("ROLLBACK")
                time.sleep(0.2)


def test_a_full_disk_is_a_503_that_leaves_nothing_half_written(file):
    with Process(file) as process:
        process.request("/messages", launch(1))
        limit = os.path.getsize(f"{file}-wal") + 4096
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        status, answer = process.request("/messages", launch(2, pad="x" * 30_000))
        assert (status, answer["title"]) == (503, "Service Unavailable")
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1)]))
        assert process.request("/health")[0] == 503
        assert process.request("/messages", launch(1)) == (202, {"status": "duplicate"})
        assert process.request("/health")[0] == 503
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert process.request("/messages", launch(2, pad="x" * 30_000)) == (202, {"status": "applied"})
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1), launch(2)]))
        assert process.request("/health") == (200, {"status": "ok", "rockets": 1, "messages": 2})


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a disk")
def test_a_disk_without_room_takes_messages_again_once_it_has_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    try:
        with Process(disk / "rockets.db") as process:
            assert process.request("/messages", launch(1))[0] == 202
            ballast = disk / "ballast"
            with pytest.raises(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            statuses = [process.request("/messages", launch(number, pad="x" * 9000))[0] for number in range(2, 5)]
            assert statuses == [503] * 3
            assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1)]))
            assert process.request("/health")[0] == 503
            ballast.unlink()
            assert process.request("/messages", launch(2, pad="x" * 9000)) == (202, {"status": "applied"})
            assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1), launch(2)]))
            assert process.request("/health") == (200, {"status": "ok", "rockets": 1, "messages": 2})
    finally:
        subprocess.run(["umount", disk], check=True)


def test_of_a_message_that_fails_half_way_nothing_stays_and_the_next_one_is_taken(file):
    store = rockets.Store(str(file))
    good, broken = [rockets.parse_message(json.dumps(launch(number)).encode()) for number in (1, 2)]
    del broken["message"]  # as no valid message can lack it; the upsert does without, the log doesn't
    with pytest.raises(HTTPError), store.transaction():
        assert store.apply(good) == "applied"
        with pytest.raises(HTTPError):
            store.apply(broken)
    assert dump(file) == [[], []]
    with pytest.raises(HTTPError):
        store.apply(broken)
    assert store.apply(good) == "applied"
    store.close()
    assert [row[1] for row in dump(file)[1]] == [1]


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("way", ["moved", "replaced"])
def test_a_database_that_is_gone_is_a_503_until_it_is_back(file, way, suffix):
    with Process(file) as process:
        process.request("/messages", launch(1))
        moved = Path(f"{file}{suffix}")
        aside = file.with_name("aside")
        moved.rename(aside)
        if way == "replaced":
            moved.write_bytes(aside.read_bytes())
        assert process.request("/messages", faster(2, 5))[0] == 503
        assert [process.request(path)[0] for path in ("/rockets", f"/rockets/{CHANNEL}", "/health")] == [503] * 3
        aside.rename(moved)  # and with it the message, which was stored before it was found that the file is gone
        assert process.request("/messages", faster(2, 5)) == (202, {"status": "duplicate"})
        assert process.request(f"/rockets/{CHANNEL}") == (200, fold([launch(1), faster(2, 5)]))
        assert process.request("/messages", faster(3, 5)) == (202, {"status": "applied"})
        assert process.request("/health")[0] == 200
        process.popen.terminate()
        logged = process.popen.communicate()[1].splitlines()
        assert [line.split(" ERROR ")[1].split(":")[0] for line in logged] == [
            "messages can't be stored",
            "messages are stored again",
        ]


def test_every_message_outlives_kill_after_kill(file):
    rng = random.Random(20)
    channels = [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(4)]
    sent = {channel: [] for channel in channels}
    for _ in range(5):
        acknowledged = []
        with Process(file) as process:

            def deliver(channel, process=process, acknowledged=acknowledged):
                while True:
                    number = len(sent[channel]) + 1
                    body = faster(number, number, channel=channel)
                    try:
                        status, _ = process.request("/messages", body)
                    except (OSError, http_client.HTTPException):
                        return  # sent again, with the same number, after the restart
                    assert status == 202
                    sent[channel].append(body)
                    acknowledged.append(number)

            senders = [threading.Thread(target=deliver, args=(channel,)) for channel in channels]
            for sender in senders:
                sender.start()
            while len(acknowledged) < 50:
                time.sleep(0.001)
            time.sleep(rng.random() / 10)
            process.stop(signal.SIGKILL)
            for sender in senders:
                sender.join()
    with Process(file) as process:
        for channel in channels:
            number = len(sent[channel]) + 1  # perhaps stored before the last kill, perhaps not
            sent[channel].append(faster(number, number, channel=channel))
            assert process.request("/messages", sent[channel][-1])[0] == 202
            process.request("/messages", launch(number + 1, channel=channel))
            sent[channel].append(launch(number + 1, channel=channel))
            assert process.request(f"/rockets/{channel}") == (200, fold(sent[channel]))


# Limits and hostile input #############################################################################################


def exchange(process, data, wait=5):
    """Send bytes over a new connection; return all that comes until the service closes it or says no more."""
    with process.connect(wait) as connection:
        connection.sendall(data)
        received = b""
        try:
            while more := connection.recv(65536):
                received += more
        except OSError:
            pass
        return received


def http(body, headers="", version="1.1", close=True):
    closing_header = "Connection: close\r\n" if close else ""
    head = f"POST /messages HTTP/{version}\r\nHost: localhost\r\n{headers}{closing_header}\r\n"
    return head.encode() + body


def chunked(body):
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


BODY = json.dumps(launch()).encode()
LENGTH = f"Content-Length: {len(BODY)}\r\n"
LARGE = json.dumps(launch(pad="x" * 66_000)).encode()


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (http(BODY, LENGTH), [202]),
        (http(BODY, LENGTH, "1.0"), [202]),
        (http(chunked(BODY), "Transfer-Encoding: chunked\r\n"), [202]),
        (http(BODY, LENGTH, close=False) + http(BODY, LENGTH), [202, 202]),
        (http(BODY, LENGTH + "Expect: 100-continue\r\n"), [100, 202]),
        (http(LARGE, f"Content-Length: {len(LARGE)}\r\n"), [413]),
        (http(chunked(LARGE), "Transfer-Encoding: chunked\r\n"), [413]),
        (http(b"", "Content-Length: 99999999999\r\n"), [413]),
        (http(BODY, f"Content-Length: {len(BODY) - 5}\r\n"), [400]),
        (http(BODY, "Content-Length: -1\r\n"), [400]),
        (http(BODY, "Content-Length: 7\r\n" + LENGTH), [400]),
        (http(b"zz\r\n" + BODY, "Transfer-Encoding: chunked\r\n"), [400]),
        (http(BODY, LENGTH + "Transfer-Encoding: gzip\r\n"), [501]),
        (http(BODY, "Padding: " + "x" * 300_000 + "\r\n" + LENGTH), [431]),
        (b"nonsense\r\n\r\n", [400]),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", [400]),
        (http(BODY, f"Content-Length: {'9' * 5000}\r\n"), [400]),
        (http(b"", "Content-Length: abc\r\nExpect: 100-continue\r\n"), [400]),
        (http(b"", "Content-Length: 1000000\r\nExpect: 100-continue\r\n"), [413]),
        (http(b"", "Content-Length: 0\r\nExpect: 100-continue\r\n", close=False) + http(BODY, LENGTH), [400, 202]),
    ],
)
def test_every_way_to_frame_a_request_gets_its_answer_and_the_next_client_too(file, data, statuses):
    with Process(file) as process:
        received = exchange(process, data)
        assert [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", received)] == statuses
        if statuses[-1] >= 400:
            head, _, body = received.partition(b"\r\n\r\n")
            assert b"Content-Type: application/problem+json\r\n" in head
            assert json.loads(body).keys() == {"title", "status", "detail"}
            assert json.loads(body)["status"] == statuses[-1]
        assert process.request("/health")[0] == 200
        process.popen.terminate()
        assert process.popen.communicate()[1] == ""


def test_a_request_in_the_body_of_another_is_not_served(file):
    smuggled = http(json.dumps(launch(2)).encode(), LENGTH)
    both = http(
        chunked(BODY) + smuggled, f"Content-Length: {len(chunked(BODY) + smuggled)}\r\nTransfer-Encoding: chunked\r\n"
    )
    with Process(file) as process:
        exchange(process, both)
        assert process.request("/health")[1]["messages"] <= 1


def test_no_202_leaves_before_the_commit_even_if_the_client_expects_a_continue_behind_it(file):
    with Process(file) as process:
        aside = file.rename(file.with_name("aside"))
        received = exchange(
            process, http(BODY, LENGTH, close=False) + http(b"", LENGTH + "Expect: 100-continue\r\n"), 1
        )
        assert re.findall(rb"HTTP/1\.1 (\d{3})", received)[0] == b"503"
        aside.rename(file)
        assert process.request("/health")[0] == 503  # for the message that was not stored: the service lives


def test_pipelined_requests_are_answered_one_after_the_other_without_a_pause(file):
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with Process(file) as process:
        began = time.monotonic()
        received = exchange(process, (ask + b"\r\n") * 49 + ask + b"Connection: close\r\n\r\n")
        assert received.count(b"HTTP/1.1 200 OK") == 50
        assert time.monotonic() - began < 0.8  # a pause of 0.02 s after each would make it 1


def test_pipelined_requests_of_a_slow_reader_are_all_answered(file):
    ask = f"GET /rockets/{CHANNEL}/messages HTTP/1.1\r\nHost: localhost\r\n".encode()
    with Process(file) as process:
        for number in range(1, 101):
            process.request("/messages", launch(number, pad="x" * 60_000))
        with process.connect() as connection:
            connection.sendall((ask + b"\r\n") * 4 + ask + b"Connection: close\r\n\r\n")
            time.sleep(0.5)  # 6 MB are more than the system takes without a reader
            received = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert received.count(b"HTTP/1.1 200 OK") == 5


def test_an_answer_of_many_megabytes_needs_no_room_on_the_disk(file):
    with Process(file) as process:
        for number in range(1, 301):
            assert process.request("/messages", launch(number, pad="x" * 10_000))[0] == 202
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        assert process.request(f"/rockets/{CHANNEL}/messages")[1]["count"] == 300


def changed(change):
    """Return the arguments that make Python run the service after a change."""
    return ["-c", f"import sys; sys.path.insert(0, {str(SERVICE.parent)!r}); {change}; import rockets; rockets.main()"]


def test_more_connections_than_the_system_allows_wait_and_cost_nothing(file):
    few = changed("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))")
    with Process(file, program=few) as process, ExitStack() as crowd:

        def ticks():
            return sum(map(int, Path(f"/proc/{process.popen.pid}/stat").read_text().split()[13:15]))

        for _ in range(100):
            crowd.enter_context(process.connect())
        time.sleep(0.5)
        before = ticks()
        time.sleep(1)
        assert ticks() - before < 0.3 * os.sysconf("SC_CLK_TCK")
        crowd.close()
        assert process.request("/health")[0] == 200


def test_a_client_that_never_reads_is_dropped_in_the_end(file):
    with Process(file, program=changed("import rockets; rockets.READ_PATIENCE = 1")) as process:
        for number in range(1, 301):
            process.request("/messages", launch(number, pad="x" * 20_000))
        time.sleep(0.3)  # until the last connection is closed
        before = len(os.listdir(f"/proc/{process.popen.pid}/fd"))
        with process.connect() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(f"GET /rockets/{CHANNEL}/messages HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 3)
            while len(os.listdir(f"/proc/{process.popen.pid}/fd")) == before:
                time.sleep(0.01)
            for _ in range(50):
                time.sleep(0.1)
                held = len(os.listdir(f"/proc/{process.popen.pid}/fd")) - before
            assert held == 0
        assert process.request("/health")[0] == 200


def test_a_burst_over_many_connections_is_answered_without_a_5xx(file):
    with Process(file) as process:
        sender = launch_tool.Sender(process.url, concurrency=200)
        bodies = (json.dumps(faster(number, 1)).encode() for number in range(1, 5001))
        sender.run(launch_tool.http_request("POST", process.url + "/messages", body) for body in bodies)
        assert (len(sender.latencies), sender.retries) == (5000, {})
        assert process.request("/health")[1]["messages"] == 5000


def test_a_crowd_of_idle_slow_and_deaf_connections_keeps_nobody_out(file):
    with Process(file) as process, ExitStack() as crowd:

        def connect():
            connection = process.connect()
            return crowd.enter_context(connection)

        def files():
            return len(os.listdir(f"/proc/{process.popen.pid}/fd"))

        for number in range(1, 101):
            assert process.request("/messages", launch(number, pad="x" * 10_000))[0] == 202
        before = files()
        for place in range(600):
            connect().sendall(http(b" ", "Content-Length: 9\r\n") if place % 4 == 0 else b"")
        deaf = connect()
        deaf.setblocking(False)
        ask = f"GET /rockets/{CHANNEL}/messages HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        deaf.send(ask * 100)  # 100 MB of answers
        for number in range(101, 151):
            assert process.request("/messages", faster(number, 1), timeout=2)[0] == 202
            assert process.request(f"/rockets/{CHANNEL}", timeout=2)[1]["lastMessageNumber"] == number
        assert files() < before + 600 + 20
        assert resident(process) < 100
        crowd.close()
        for _ in range(100):
            if files() <= before:
                break
            time.sleep(0.1)
        assert files() <= before


def resident(process):
    """Return the MiB of memory that a service holds."""
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024


def test_no_mutation_of_a_message_or_a_query_is_a_5xx_or_counts_unaccepted(app, caplog, capfd):
    rng = random.Random(4)
    odd = [
        None,
        True,
        -1,
        0,
        1.0,
        2**53,
        10**30,
        1e308,
        "",
        "\0",
        "\ud800",
        "x" * 300,
        "'; DROP TABLE rockets; --",
        [],
        {},
    ]
    odd += [[[[]]], {"a": {"b": 1}}, "2022-02-30T00:00:00Z", "RocketExploded", CHANNEL, float("nan"), "\u2028\x9b"]
    kinds = [
        launch,
        lambda n, **k: faster(n, 7, **k),
        lambda n, **k: renamed(n, "M", **k),
        lambda n, **k: exploded(n, **k),
    ]
    accepted = {}
    channels = [str(uuid.UUID(int=n)) for n in range(1, 4)]
    for _ in range(4000):
        body = rng.choice(kinds)(rng.randint(1, 50), channel=rng.choice(channels))
        for _ in range(rng.randint(0, 2)):
            holder = rng.choice([body, body.get("metadata"), body.get("message")])
            if isinstance(holder, dict) and holder:
                holder[rng.choice([*holder, "extra"])] = rng.choice(odd)
        text = bytearray(json.dumps(body).encode())
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 3)] = bytes(
                rng.choices(b'{}[]",:0123456789eE.-\\ux\0\xff ', k=rng.randint(0, 3))
            )
        answer = app.post("/messages", bytes(text), expect_errors=True)
        assert answer.status_code in (202, 400)
        if answer.status_code == 400:
            assert answer.content_type == "application/problem+json" and answer.json["detail"]
        elif answer.json["status"] == "applied":
            taken = json.loads(text)
            channel = str(uuid.UUID(taken["metadata"]["channel"]))
            accepted.setdefault(channel, []).append({**taken, "metadata": taken["metadata"] | {"channel": channel}})
    assert len(accepted) >= 3
    values = [
        "",
        "asc",
        "speed",
        "-1",
        "1",
        "9" * 30,
        "%00",
        "%ff",
        "%",
        "'",
        "x" * 5000,
        "%f0%9f%9a%80",
        "1;SELECT 1",
        "a&b=c",
    ]
    names = ["sort", "order", "status", "type", "mission", "limit", "offset", "after", "%00", "", "x"]
    for _ in range(1500):
        path = rng.choice(["/rockets", f"/rockets/{channels[0]}/messages", "/health", "/rockets/%00", "/rockets/%ff"])
        query = "&".join(f"{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.randint(0, 3)))
        answer = app.get(f"{path}?{query}", expect_errors=True)
        assert answer.status_code in (200, 400, 404)
        if answer.status_code != 200:
            assert answer.content_type == "application/problem+json"
    assert app.get("/rockets").json["rockets"] == [fold(accepted[channel]) for channel in sorted(accepted)]
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())
