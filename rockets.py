"""Rockets takes in what rockets in flight report and serves their current state as JSON.

Messages arrive out of order and more than once. A 202 means that this message is on disk, counts exactly once and is
in every later answer; neither a crash nor a power cut takes it back.

The idea: the state of a rocket is a function of the set of its messages, not of their order. So each message counts as
soon as it arrives, by one upsert in which speed changes add up while message numbers decide which launch, mission and
explosion stand. The log of messages, kept by the same statement, saves a redelivery from counting again.

    python rockets.py         serves http://localhost:8088 from ./rockets.db; --help lists the options
"""

import argparse
import errno
import hashlib
import json
import logging
import os
import re
import select
import signal
import socket
import sqlite3
import struct
import sys
import threading
import time
from bisect import bisect_left
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import parse_qsl

import waitress
from bottle import HTTP_CODES, Bottle, HTTPError, HTTPResponse, request, response
from waitress import wasyncore

VERSION = "1.0.0"
STATIC = Path(__file__).resolve().parent / "static"

MAX_BODY = 64 * 1024  # bytes; a real message has about 300, a larger body gets a 413
MAX_BRACKETS = 800  # objects and arrays in a body; a real message has 2, and SQLite reads at most 1,000 levels
MAX_TEXT = 256  # characters
MAX_SPEED = 2**31 - 1
MAX_NUMBER = 2**53 - 1  # up to here every JSON parser reads whole numbers exactly (RFC 8259, section 6)
MAX_PAGE = 10_000  # messages in one answer
READERS = 4  # connections; Python builds no more answers than that at a time anyway
LOCK_PATIENCE = 4  # seconds to wait for another process's lock; the sender waits 10 for its answer
PLACE_PATIENCE = 0.5  # seconds that a POST waits once only SPARE_THREADS are left
SPARE_THREADS = 4  # serve GETs even while all others wait for the disk
TROUBLE_SHOWN = 30  # seconds that /health tells of a failed write, unless another succeeds
DRAIN_PATIENCE = 4  # seconds after SIGTERM in which requests under way are answered
SWITCH_INTERVAL = 0.0001  # seconds; with Python's 0.005, a thread back from SQLite waits too long for its turn

log = logging.getLogger("rockets")

# SQL ##################################################################################################################

OLDEST_SQLITE = (3, 38, 0)  # the first with STRICT tables and the ->> operator
SCHEMA_VERSION = 0x524B_0002  # in the header of the file: "RK", which no other program has there, and the version
NEVER = MAX_NUMBER + 1  # number of a launch or explosion not known yet; above all others, as the lowest one counts

# launch_number, mission_number and explosion_number are of the messages that the columns before them come from. Columns
# in _utc are the instants of those in _at, spelled so that ORDER BY sorts them. The triggers write the message that has
# just arrived to the log, so that the upsert alone is the whole transaction.
KEEP = """BEGIN INSERT INTO messages SELECT new.channel, new.arrived ->> 1, new.arrived ->> 2, new.arrived ->> 4,
                                             new.arrived -> 5, new.arrived_at; END"""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS rockets (
    channel TEXT NOT NULL PRIMARY KEY,
    type TEXT, launched_at TEXT, launched_utc TEXT, launch_speed INTEGER, launch_number INTEGER NOT NULL,
    speed_change INTEGER NOT NULL,
    mission TEXT, mission_number INTEGER NOT NULL,
    explosion_reason TEXT, explosion_number INTEGER NOT NULL,
    updated_at TEXT NOT NULL, updated_utc TEXT NOT NULL, last_message_number INTEGER NOT NULL,
    messages INTEGER NOT NULL,
    arrived TEXT NOT NULL, arrived_at INTEGER NOT NULL,
    missing_messages INTEGER AS (last_message_number - messages),
    speed INTEGER AS (launch_speed + speed_change),
    status TEXT AS (CASE WHEN explosion_reason IS NOT NULL THEN 'exploded'
                         WHEN type IS NOT NULL THEN 'active'
                         ELSE 'awaiting_launch' END)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
    channel TEXT NOT NULL, number INTEGER NOT NULL, time TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL,
    arrived_at INTEGER NOT NULL, PRIMARY KEY (channel, number)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS keep_first AFTER INSERT ON rockets {KEEP};
CREATE TRIGGER IF NOT EXISTS keep_next AFTER UPDATE ON rockets {KEEP};
PRAGMA user_version = {SCHEMA_VERSION};
"""
RESET = "DROP TABLE IF EXISTS rockets; DROP TABLE IF EXISTS messages;"

# In whatever order messages come, and however often, they leave the same row: sums don't depend on order, the lowest
# or highest number wins whenever it comes, and the WHERE clause lets no number count that the log already holds.
# A batch comes as one JSON array of the rows that parse_message() makes: one statement costs far less than many.
UPSERT = f"""
INSERT INTO rockets (
    channel, arrived, arrived_at, messages, updated_at, updated_utc, last_message_number,
    type, launched_at, launched_utc, launch_speed, launch_number,
    speed_change, mission, mission_number, explosion_reason, explosion_number
)
WITH arrived AS (
    SELECT key AS place, value AS row, value ->> 0 AS channel, value ->> 1 AS number, value ->> 2 AS time,
           value ->> 3 AS utc, value ->> 4 AS type, value -> 6 AS known
    FROM json_each(:batch)
)
SELECT
    channel, row, :now + place, 1, time, utc, number,
    known ->> 'type', iif(type = 'RocketLaunched', time, NULL), iif(type = 'RocketLaunched', utc, NULL),
    known ->> 'launchSpeed', iif(type = 'RocketLaunched', number, {NEVER}),
    iif(type = 'RocketSpeedDecreased', -1, 1) * ifnull(known ->> 'by', 0),
    ifnull(known ->> 'mission', known ->> 'newMission'),
    iif(type IN ('RocketLaunched', 'RocketMissionChanged'), number, 0),
    known ->> 'reason', iif(type = 'RocketExploded', number, {NEVER})
FROM arrived WHERE true
ON CONFLICT (channel) DO UPDATE SET
    arrived = excluded.arrived,
    arrived_at = excluded.arrived_at,
    messages = messages + 1,
    updated_at = iif(excluded.last_message_number > last_message_number, excluded.updated_at, updated_at),
    updated_utc = iif(excluded.last_message_number > last_message_number, excluded.updated_utc, updated_utc),
    last_message_number = max(excluded.last_message_number, last_message_number),
    type = iif(excluded.launch_number < launch_number, excluded.type, type),
    launched_at = iif(excluded.launch_number < launch_number, excluded.launched_at, launched_at),
    launched_utc = iif(excluded.launch_number < launch_number, excluded.launched_utc, launched_utc),
    launch_speed = iif(excluded.launch_number < launch_number, excluded.launch_speed, launch_speed),
    launch_number = min(excluded.launch_number, launch_number),
    speed_change = speed_change + excluded.speed_change,
    mission = iif(excluded.mission_number > mission_number, excluded.mission, mission),
    mission_number = max(excluded.mission_number, mission_number),
    explosion_reason = iif(excluded.explosion_number < explosion_number, excluded.explosion_reason, explosion_reason),
    explosion_number = min(excluded.explosion_number, explosion_number)
WHERE NOT EXISTS (SELECT * FROM messages AS log
                  WHERE log.channel = excluded.channel AND log.number = excluded.last_message_number)"""

# Those that the upsert left out of a batch, as the log held their numbers, perhaps with something else.
KNOWN = """
SELECT key, iif(messages.type = value ->> 4 AND message = value -> 5, 'duplicate', 'conflicting')
FROM json_each(:batch) JOIN messages ON channel = value ->> 0 AND number = value ->> 1
WHERE arrived_at <> :now + key"""

STATUSES = ("active", "awaiting_launch", "exploded")
ORDERS = ("asc", "desc")
SORT_KEYS = {  # of the API, and the column that each stands for
    **{name: name for name in ("channel", "type", "speed", "mission", "status")},
    "launchedAt": "launched_utc",
    "updatedAt": "updated_utc",
    "lastMessageNumber": "last_message_number",
}

ROCKET_JSON = """json_object(
    'channel', channel, 'type', type, 'speed', speed, 'mission', mission, 'status', status,
    'explosionReason', explosion_reason, 'launchedAt', launched_at, 'updatedAt', updated_at,
    'lastMessageNumber', last_message_number, 'missingMessages', missing_messages)"""
ROCKET = f"SELECT {ROCKET_JSON} FROM rockets WHERE channel = :channel"

MATCHING = """FROM rockets WHERE status = ifnull(:status, status)
    AND (:type IS NULL OR type = :type) AND (:mission IS NULL OR mission = :mission)"""
# One query for each order, made of the tables above alone. Its LIMIT keeps SQLite from dropping the inner ORDER BY.
ROCKETS = {
    (sort, order): f"""
SELECT json_object('count', count(*), 'total', (SELECT count(*) {MATCHING}), 'sortBy', :sort, 'order', :order,
                   'rockets', json_group_array({ROCKET_JSON}))
FROM (SELECT * {MATCHING} ORDER BY {column} {order} NULLS LAST, channel LIMIT :limit OFFSET :offset)"""
    for sort, column in SORT_KEYS.items()
    for order in ORDERS
}

# NULL for an unknown rocket, unlike one without messages after :after.
HISTORY = """
SELECT iif(EXISTS (SELECT * FROM rockets WHERE channel = :channel), json_object(
    'channel', :channel, 'count', count(*), 'messages', json_group_array(json_object(
        'metadata', json_object('channel', channel, 'messageNumber', number, 'messageTime', time, 'messageType', type),
        'message', json(message)))), NULL)
FROM (SELECT * FROM messages WHERE channel = :channel AND number > :after ORDER BY number LIMIT :limit)"""

HEALTH = "SELECT json_object('status', 'ok', 'rockets', count(*), 'messages', ifnull(sum(messages), 0)) FROM rockets"
FLEET = f"""
SELECT json_object({", ".join(f"'{status}', count(*) FILTER (WHERE status = '{status}')" for status in STATUSES)},
                   'missing', CAST(total(missing_messages) AS INTEGER)) FROM rockets"""  # sum() fails beyond 2**63

# Messages #############################################################################################################

# What a value must be, in words, and a function that returns what to keep of it, or None if it isn't that.
Rule = namedtuple("Rule", "words read")


def whole(lowest: int, highest: int) -> Rule:
    words = f"a whole number from {lowest} to {highest}"  # below, type() is asked since True is an int
    return Rule(words, lambda value: value if type(value) is int and lowest <= value <= highest else None)


def text(words: str, pattern: str, keep: Callable[[re.Match], Any] = re.Match.group) -> Rule:
    def read(value: Any) -> Any:
        match = re.fullmatch(pattern, value, re.ASCII) if type(value) is str and len(value) <= MAX_TEXT else None
        return match and keep(match)

    return Rule(words, read)


def one_of(choices: Iterable[str]) -> Rule:
    return text(f"one of {', '.join(choices)}", "|".join(choices))


def up_to(highest: int) -> Rule:
    limit = whole(0, highest)
    return text(limit.words, "[0-9]{1,16}", lambda match: limit.read(int(match[0])))


def to_utc(match: re.Match) -> str | None:
    """Return an RFC 3339 time in UTC, spelled so that texts sort as the instants do, to the last digit."""
    date, minute, second, fraction, offset = match.groups("")
    try:
        utc = datetime.fromisoformat(f"{date}T{minute}{offset.upper()}").astimezone(UTC).isoformat()[:16]
    except (ValueError, OverflowError):  # no such day, or outside of the years 1 to 9999
        return None
    if second == "60" and not utc.endswith("23:59"):  # a leap second ends a day in UTC
        return None
    return f"{utc}:{second}{fraction.rstrip('0.')}"


UUID = r"(?i)(?:urn:uuid:)?(\{)?([0-9a-f]{8})(-?)([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{12})(?(1)\})"
RFC_3339 = r"(?i)(\d{4}-\d\d-\d\d)T((?:[01]\d|2[0-3]):[0-5]\d):([0-5]\d|60)(\.\d+)?(Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
ANY = Rule("a text", str)
NAME = text(f"a text of 1 to {MAX_TEXT} characters, no NUL, no lone surrogate", r"[^\0\ud800-\udfff]+")
SPEED = whole(0, MAX_SPEED)
CHANNEL = text("a UUID", UUID, lambda match: "-".join(match.group(2, 4, 5, 6, 7)).lower())
TIME = text("an RFC 3339 time with an offset, such as 2022-02-02T19:39:05+01:00", RFC_3339, to_utc)
MESSAGE_TYPES = {
    "RocketLaunched": {"type": NAME, "launchSpeed": SPEED, "mission": NAME},
    "RocketSpeedIncreased": {"by": SPEED},
    "RocketSpeedDecreased": {"by": SPEED},
    "RocketExploded": {"reason": NAME},
    "RocketMissionChanged": {"newMission": NAME},
}
METADATA = {
    "channel": CHANNEL,
    "messageNumber": whole(1, MAX_NUMBER),
    "messageTime": TIME,
    "messageType": one_of(MESSAGE_TYPES),
}
LIST_QUERY = {"sort": one_of(SORT_KEYS), "order": one_of(ORDERS), "status": one_of(STATUSES), "type": ANY}
LIST_QUERY |= {"mission": ANY, "limit": up_to(MAX_NUMBER), "offset": up_to(MAX_NUMBER)}
HISTORY_QUERY = {"after": up_to(MAX_NUMBER), "limit": up_to(MAX_PAGE)}


def read_fields(holder: Any, rules: dict[str, Rule], name: str = "") -> dict:
    """Return what the rules keep of the fields they name. Raise HTTPError(400) for the first that breaks its rule."""
    if type(holder) is not dict:
        raise HTTPError(400, f"{name or 'the body'} must be an object, got {json.dumps(holder)[:100]}")
    kept = {}
    for field, rule in rules.items():
        kept[field] = rule.read(holder.get(field))
        if kept[field] is None:
            got = json.dumps(holder[field])[:100] if field in holder else "nothing"
            raise HTTPError(400, f"{name and name + '.'}{field} must be {rule.words}, got {got}")
    return kept


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


decode = json.JSONDecoder(parse_constant=refuse).decode
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True).encode


def parse_message(body: bytes) -> str:
    """Turn the body of a POST into a row for UPSERT, as JSON. Raise HTTPError(400), naming the field and its rule."""
    if body.count(b"{") + body.count(b"[") > MAX_BRACKETS:
        raise HTTPError(400, f"the body must hold at most {MAX_BRACKETS} opening brackets of objects and arrays")
    try:
        envelope = decode(body.decode())
    except ValueError as error:
        raise HTTPError(400, f"the body must be JSON in UTF-8: {str(error).partition(';')[0]}") from error
    read_fields(envelope, {})
    metadata, content = envelope.get("metadata"), envelope.get("message")
    channel, number, utc, kind = read_fields(metadata, METADATA, "metadata").values()
    known = read_fields(content, MESSAGE_TYPES[kind], "message")
    try:
        row = encode([channel, number, metadata["messageTime"], utc, kind, content, known])
        row.encode()
    except ValueError as error:
        raise HTTPError(400, f"message must hold finite numbers and whole characters only: {error}") from error
    return row


# Storage ##############################################################################################################


def inspect(path: str) -> None:
    """Raise OSError, and change nothing, if the file holds anything but a whole database of this version."""
    size, logged = [os.path.getsize(name) if os.path.exists(name) else 0 for name in (path, f"{path}-wal")]
    if logged and not size:
        raise OSError("it is gone, but its write-ahead log is there")  # which SQLite would delete
    if size:
        with open(path, "rb") as file:  # the header, see sqlite.org/fileformat2.html
            magic, page_size, pages, version = struct.unpack(">16s H 10x I 28x I 36x", file.read(100).ljust(100))
        if magic != b"SQLite format 3\0":
            raise OSError("it is no SQLite database")
        if version != SCHEMA_VERSION and (version or pages > 1):  # one page is a start that was cut short
            raise OSError("another program, or a newer version of this one, wrote it")
        if pages * page_size > size + logged:
            raise OSError("a part of it is missing")


def connect(path: str, mode: str = "rw", patience: float = LOCK_PATIENCE) -> sqlite3.Connection:
    """Open a connection that waits so many seconds for a lock; mode 'rwc' creates the file (sqlite.org/uri.html)."""
    uri = f"{Path(path).absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, timeout=patience, isolation_level=None, check_same_thread=False, uri=True)
    connection.text_factory = bytes  # the JSON that SQLite builds goes out as it is
    connection.execute("PRAGMA journal_mode = WAL")  # reading never waits for writing
    connection.execute("PRAGMA synchronous = FULL")  # success is the disk's word; NORMAL may lose the last commits
    return connection


def unavailable(why: Any) -> HTTPError:
    return HTTPError(503, f"{why}; try again, as a message that comes twice counts once", Retry_After="1")


class Store:
    """The rockets and the log of their messages, in one SQLite file, for many threads at once.

    One thread writes. It stores all messages that wait at that moment with one statement and one disk sync; the next
    ones gather in the meantime.
    """

    def __init__(self, path: str, places: int, reset: bool = False):
        """Open or create the file, with places for so many messages to wait to be stored; reset empties it.

        Raise OSError, and leave the file as it was, if that can't be.
        """
        self.places, self.waiting, self.readers = SimpleQueue(), SimpleQueue(), SimpleQueue()
        self.patience = PLACE_PATIENCE
        self.trouble: tuple[float, HTTPError] | None = None  # when and why the last commit failed, if it did
        self.commits = 0
        try:
            inspect(path)
            self.patient, self.hasty = connect(path, "rwc"), connect(path, patience=0)
            self.patient.executescript(f"BEGIN IMMEDIATE; {RESET if reset else ''} {SCHEMA} COMMIT;")
            self.patient.execute("PRAGMA wal_checkpoint")  # so that inspect() finds the version in the header
            for _ in range(READERS):
                self.readers.put(connect(path))
            self.files = {name: os.stat(name) for name in (path, f"{path}-wal")}
        except (sqlite3.Error, OSError) as error:
            raise OSError(f"cannot use {path} as the database: {error}") from error
        for _ in range(places):
            self.places.put(SimpleQueue())
        threading.Thread(target=self.run, daemon=True).start()

    def verify(self) -> None:
        """Raise OSError unless the files are those that were opened: what goes to a deleted file is lost."""
        for name, opened in self.files.items():
            if not os.path.samestat(os.stat(name), opened):
                raise OSError(f"another file has the name {name}")

    def read(self, sql: str, **parameters: Any) -> bytes | None:
        """Return the one value that a query yields, or None. Raise HTTPError(503)."""
        connection = self.readers.get()
        try:
            row = connection.execute(sql, parameters).fetchone()
            self.verify()
        except (sqlite3.Error, OSError) as error:
            raise unavailable(f"the database is not available: {error}") from error
        finally:
            self.readers.put(connection)
        return row and row[0]

    def apply(self, row: str) -> str:
        """Put a message on disk and return 'applied', 'duplicate' or 'conflicting'.

        Raise HTTPError(503) if that failed, or may have failed.
        """
        try:
            place = self.places.get(timeout=self.patience)
        except Empty:
            self.patience = 0  # where one has waited in vain, the next need not
            raise unavailable("too many messages wait for the disk") from None
        self.patience = PLACE_PATIENCE
        self.waiting.put((row, place))
        outcome = place.get()
        self.places.put(place)
        if isinstance(outcome, HTTPError):
            raise outcome
        return outcome

    def run(self) -> None:
        """Store what waits, for ever, and tell the threads that wait for it."""
        while True:
            batch = [self.waiting.get()]
            batch += [self.waiting.get() for _ in range(self.waiting.qsize())]
            rows, places = zip(*batch, strict=True)
            for place, outcome in zip(places, self.commit(rows), strict=True):
                place.put(outcome)

    def commit(self, rows: Sequence[str]) -> list[str | HTTPError]:
        """Store a batch of messages, all together or, lest one's failure fail another, each alone."""
        try:
            outcomes = self.write(rows)
            self.trouble = None
            return outcomes
        except Exception as error:
            self.trouble = (time.monotonic(), unavailable(f"the database is not available: {error}"))
            if len(rows) > 1:
                return [self.commit([row])[0] for row in rows]
            return [self.trouble[1]]

    def write(self, rows: Sequence[str]) -> list[str]:
        """Apply a batch by one statement, which is a transaction of its own, and return what became of each message."""
        arrived = {"batch": f"[{','.join(rows)}]", "now": time.time_ns()}
        writer = self.hasty if self.trouble else self.patient  # after one wait in vain for another process's lock
        applied = writer.execute(UPSERT, arrived).rowcount
        known = dict(writer.execute(KNOWN, arrived)) if applied < len(rows) else {}
        self.verify()
        self.commits += 1
        return [known.get(place, b"applied").decode() for place in range(len(rows))]

    def close(self) -> None:
        """Close every connection; the last one folds the write-ahead log into the file (sqlite.org/wal.html)."""
        for connection in (self.patient, self.hasty, *(self.readers.get() for _ in range(READERS))):
            connection.close()


# HTTP #################################################################################################################

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, float("inf"))  # seconds
SAFE = {"X-Content-Type-Options": "nosniff"}  # keeps browsers from taking JSON for a page
OPEN = SAFE | {"Access-Control-Allow-Origin": "*"}  # lets every page read what a GET answers


def read_query(rules: dict[str, Rule], **defaults: Any) -> dict:
    """Return the query parameters that the rules name. Raise HTTPError(400) if one breaks its rule or comes twice."""
    raw = request.query_string.encode("latin-1").decode(errors="replace")  # WSGI shows bytes as Latin-1 (PEP 3333)
    pairs = parse_qsl(raw, keep_blank_values=True)
    query = dict(pairs)
    if len(query) < len(pairs):
        raise HTTPError(400, "a query parameter must come only once")
    return defaults | read_fields(query, {name: rule for name, rule in rules.items() if name in query})


def answer(body: bytes | None, content_type: str = "application/json") -> bytes:
    """Answer a GET: 404 for no body, 304 if the client has this one already (RFC 9110, section 13.1.2), or else 200."""
    if body is None:
        raise HTTPError(404, "no message has come on this channel")
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    response.headers.update(OPEN | {"Content-Type": content_type, "ETag": tag, "Cache-Control": "no-cache"})
    held = request.environ.get("HTTP_IF_NONE_MATCH", "")
    if held == "*" or tag in re.findall('"[^"]*"', held):
        response.status = 304
    return body + b"\n"


def problem(error: HTTPError) -> str:
    """Render an error as RFC 9457 asks; every error comes through here."""
    detail = error.body
    if error.status_code == 405:
        response.headers["Allow"] = allow = response.headers["Allow"].replace("GET", "GET,HEAD")
        detail = f"{request.path} takes {allow}, not {request.method}"
    response.headers.update((SAFE if request.method == "POST" else OPEN) | {"Content-Type": "application/problem+json"})
    return json.dumps({"title": HTTP_CODES[error.status_code], "status": error.status_code, "detail": detail}) + "\n"


def create_app(store: Store) -> Bottle:
    """Return the service on top of a store, as a WSGI application."""
    app = Bottle()
    app.default_error_handler = problem
    page, description = [(STATIC / name).read_bytes() for name in ("dashboard.html", "openapi.json")]
    metrics = (STATIC / "metrics.txt").read_text().rstrip()
    json_type = SAFE | {"Content-Type": "application/json"}
    applied, duplicate = [
        HTTPResponse(f'{{"status": "{status}"}}\n', 202, json_type) for status in ("applied", "duplicate")
    ]
    started = time.time()
    counting = threading.Lock()
    outcomes = dict.fromkeys(("applied", "duplicate", "conflicting", "rejected", "failed"), 0)
    durations, spent = [0] * len(BUCKETS), 0.0

    def receive() -> str:
        environ = request.environ
        site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
        if site is None and origin:  # as browsers have it on plain HTTP to another machine
            site = "same-origin" if origin.partition("://")[2] == environ.get("HTTP_HOST") else "cross-site"
        if site in ("cross-site", "same-site"):
            raise HTTPError(403, "a page of another site must not post messages")
        body = request.body.read(MAX_BODY + 1)
        if len(body) > MAX_BODY:
            raise HTTPError(413, f"the body must be at most {MAX_BODY} bytes long")
        return parse_message(body)

    @app.post("/messages")
    def post_message() -> HTTPResponse:
        nonlocal spent
        began, outcome = time.perf_counter(), "rejected"
        try:
            row = receive()
            outcome = "failed"
            outcome = store.apply(row)
        finally:
            seconds = time.perf_counter() - began
            with counting:
                outcomes[outcome] += 1
                durations[bisect_left(BUCKETS, seconds)] += 1
                spent += seconds
        if outcome == "conflicting":
            log.warning("the first message of this number stands; a different one was ignored: %a", row)
        return applied if outcome == "applied" else duplicate

    @app.get("/rockets")
    def get_rockets() -> bytes:
        query = {"sort": "channel", "order": "asc", "status": None, "type": None, "mission": None}
        query |= {"limit": -1, "offset": 0} | read_query(LIST_QUERY)
        return answer(store.read(ROCKETS[query["sort"], query["order"]], **query))

    @app.get("/rockets/<channel>")
    def get_rocket(channel: str) -> bytes:
        return answer(store.read(ROCKET, **read_fields({"channel": channel}, {"channel": CHANNEL})))

    @app.get("/rockets/<channel>/messages")
    def get_history(channel: str) -> bytes:
        query = read_fields({"channel": channel}, {"channel": CHANNEL}) | {"after": 0, "limit": 1000}
        return answer(store.read(HISTORY, **query | read_query(HISTORY_QUERY)))

    @app.get("/health")
    def get_health() -> bytes:
        if store.trouble and time.monotonic() < store.trouble[0] + TROUBLE_SHOWN:
            raise store.trouble[1]
        return answer(store.read(HEALTH))

    @app.get("/metrics")
    def get_metrics() -> bytes:
        with counting:
            values = outcomes | dict(zip(map("le {:g}".format, BUCKETS), accumulate(durations), strict=True))
            values |= {"spent": spent, "commits": store.commits, "started": started, "version": VERSION}
        values |= json.loads(store.read(FLEET))
        return answer((metrics % values).encode(), "text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json")
    def get_openapi() -> bytes:
        return answer(description)

    @app.get("/")
    def get_dashboard() -> bytes:
        return answer(page, "text/html; charset=utf-8")

    return app


# Command line #########################################################################################################


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on the host; 'localhost' is every loopback address there is. Raise OSError."""
    sockets: list[socket.socket] = []
    for address in ("127.0.0.1", "::1") if host == "localhost" else (host,):
        try:
            family = socket.getaddrinfo(address, port)[0][0]
            sockets.append(socket.create_server((address, port), family=family))
        except OSError as error:
            if sockets and error.errno != errno.EADDRINUSE:
                break  # no IPv6 on this machine
            raise OSError(f"cannot listen on {address} port {port}: {error.strerror.partition(' (')[0]}") from error
        port = sockets[0].getsockname()[1]  # the same for both, also where the system has chosen it
    return sockets


def serve(app: Bottle, sockets: list[socket.socket], threads: int, greeting: str) -> None:
    """Greet, and serve until SIGTERM or Ctrl-C; then take nothing more, and answer what is under way."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sys.setswitchinterval(SWITCH_INTERVAL)
    channels: dict[int, Any] = {}  # waitress's listeners and connections, by file number
    # Beyond its own limit of a body, waitress answers 413 by itself, in plain text.
    limits = {"connection_limit": 1000, "max_request_body_size": 2 * MAX_BODY}
    server = waitress.create_server(app, map=channels, sockets=sockets, threads=threads, ident="rockets", **limits)
    poller, stirred = select.poll(), set()

    def turn() -> None:
        """Wait for events and let waitress handle them. Its own loop asks every connection at every turn what it waits
        for, so that idle ones slow down all; this one asks those that something has happened to."""
        for number in tuple(stirred):
            channel = channels.get(number)
            if channel is None or not (channel.accepting or getattr(channel, "requests", None)):
                stirred.discard(number)
            if channel is None:
                poller.unregister(number)
            else:
                reads, writes = channel.readable() and select.POLLIN, channel.writable() and select.POLLOUT
                poller.register(number, reads | writes)
        for number, events in poller.poll(200):
            if number in channels:
                wasyncore.readwrite(channels[number], events)
            stirred.update((number, next(reversed(channels))))  # the newest one, if this was a listener

    print(greeting, flush=True)
    while not stop.is_set():
        stirred.update(channels)  # all of them once a second, for waitress's timeouts
        second = time.monotonic() + 1
        while not stop.is_set() and time.monotonic() < second:
            turn()
    for listener in [channel for channel in channels.values() if channel.accepting]:
        wasyncore.dispatcher.close(listener)
    deadline, busy = time.monotonic() + DRAIN_PATIENCE, True
    while busy and time.monotonic() < deadline:
        turn()
        busy = any(getattr(c, "requests", 0) or getattr(c, "request", 0) or c.writable() for c in channels.values())
    server.task_dispatcher.shutdown(timeout=0.5)


def main() -> None:
    """Read the command line and the environment, and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="HOST, PORT and DATABASE in the environment stand in for the options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda text: sys.exit(f"rockets: {text}")  # one line, as for everything else that can't work
    option, environ = parser.add_argument, os.environ.get
    option("--host", default=environ("HOST", "localhost"), help="address to listen on; localhost is all loopback ones")
    option("--port", type=int, default=environ("PORT", "8088"), help="port to listen on; 0 takes any free one")
    option("--database", metavar="FILE", default=environ("DATABASE", "rockets.db"), help="SQLite file to keep all in")
    option("--threads", metavar="N", type=int, default=64, help="requests worked on at a time")
    option("--reset", action="store_true", help="start from an empty database")
    option("--verbose", action="store_true", help="log every request")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    logging.basicConfig(level="INFO" if args.verbose else "WARNING", format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("waitress").setLevel("ERROR")  # else a line for every request that has to wait a moment
    try:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise OSError(f"SQLite {sqlite3.sqlite_version} is too old, at least {OLDEST_SQLITE} is needed")
        sockets = listen(args.host, args.port)
        store = Store(args.database, max(1, args.threads - SPARE_THREADS), args.reset)
        app, found = create_app(store), json.loads(store.read(HEALTH))
    except (OSError, OverflowError, UnicodeError) as error:  # of a port above 65,535, of a host that can't be
        sys.exit(f"rockets: {error}")
    if args.verbose:
        line = "{0.remote_addr} {0.method} {0.path}"
        app.add_hook("after_request", lambda: log.info("%d %a", response.status_code, line.format(request)))
    host = f"[{args.host}]" if ":" in args.host else args.host
    where = f"http://{host}:{sockets[0].getsockname()[1]}"
    holds = f"{args.database} holds {found['rockets']} rockets and {found['messages']} messages"
    serve(app, sockets, args.threads, f"Rockets listens on {where}, {holds}")
    store.close()


if __name__ == "__main__":
    main()
