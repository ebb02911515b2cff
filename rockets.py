"""Rockets takes in what rockets in flight report and serves their current state as JSON.

Messages arrive out of order and more than once. A 202 means that this message (or the first one with its number) is on
disk, counts exactly once and is in every later answer; neither a crash nor a power cut takes it back.

The idea: the state of a rocket is a function of the set of its messages, not of their order. So each message counts as
soon as it arrives, by one upsert in which speed changes add up while message numbers decide which launch, mission and
explosion stand. A log of all messages, written in the same transaction, keeps a redelivery from counting again.

    python rockets.py         serves http://localhost:8088 from ./rockets.db; --help lists the options
"""

import argparse
import errno
import hashlib
import json
import logging
import os
import re
import resource
import select
import signal
import socket
import sqlite3
import struct
import sys
import time
from bisect import bisect_left
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import waitress
from bottle import HTTP_CODES, Bottle, HTTPError, HTTPResponse, request, response
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError

VERSION = "1.0.0"
STATIC = Path(__file__).resolve().parent / "static"

MAX_BODY = 64 * 1024  # bytes; a real message has about 300, a larger body gets a 413
TOO_LARGE = f"the body must be at most {MAX_BODY} bytes long"
MAX_BRACKETS = 800  # objects and arrays in a body; a real message has 2, and SQLite reads at most 1,000 levels
MAX_TEXT = 256  # characters
MAX_SPEED = 2**31 - 1
MAX_NUMBER = 2**53 - 1  # up to here every JSON parser reads whole numbers exactly (RFC 8259, section 6)
MAX_PAGE = 10_000  # messages in one answer
READ_PATIENCE = 60  # seconds for a client to read some of its answer
MAX_CONNECTIONS = 1000  # at a time; more of them wait in the system
MAX_LOOKS = 100  # for new connections in one turn; more of them must not keep these waiting
LOCK_PATIENCE = 4  # seconds that POSTs wait for another process's lock; the sender gives up after 10
LOCK_RETRY = 0.02  # seconds between two looks whether it is gone
TROUBLE_SHOWN = 30  # seconds that /health tells of a failed write, unless another succeeds
DRAIN_PATIENCE = 4  # seconds after SIGTERM or Ctrl-C in which requests under way are answered
IDLE = 0.2  # seconds between two looks for a signal to stop while there are no requests
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, float("inf"))  # seconds

log = logging.getLogger("rockets")

# SQL ##################################################################################################################

OLDEST_SQLITE = (3, 38, 0)  # the first with STRICT tables and JSON built in
SCHEMA_VERSION = 0x524B_0003  # in the header of the file: "RK", which no other program has there, and the version
NEVER = MAX_NUMBER + 1  # number of a launch or explosion not known yet; above all others, as the lowest one counts

# launch_number, mission_number and explosion_number are of the messages that the columns before them come from. Columns
# in _utc are the instants of those in _at, spelled so that ORDER BY sorts them.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS rockets (
    channel TEXT NOT NULL PRIMARY KEY, messages INTEGER NOT NULL, speed_change INTEGER NOT NULL,
    updated_at TEXT NOT NULL, updated_utc TEXT NOT NULL, last_message_number INTEGER NOT NULL,
    type TEXT, launched_at TEXT, launched_utc TEXT, launch_speed INTEGER, launch_number INTEGER NOT NULL,
    mission TEXT, mission_number INTEGER NOT NULL,
    explosion_reason TEXT, explosion_number INTEGER NOT NULL,
    missing_messages INTEGER AS (last_message_number - messages),
    speed INTEGER AS (launch_speed + speed_change),
    status TEXT AS (iif(explosion_reason IS NOT NULL, 'exploded', iif(type IS NULL, 'awaiting_launch', 'active')))
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
    channel TEXT NOT NULL, number INTEGER NOT NULL, time TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL,
    PRIMARY KEY (channel, number)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""
RESET = "DROP TABLE IF EXISTS rockets; DROP TABLE IF EXISTS messages;"

# In whatever order messages come, and however often, they leave the same row: sums don't depend on order, the lowest
# or highest number wins whenever it comes, and the WHERE clause lets no number count that the log already holds.
UPSERT = f"""
INSERT INTO rockets VALUES (
    :channel, 1, iif(:messageType = 'RocketSpeedDecreased', -1, 1) * ifnull(:by, 0),
    :messageTime, :utc, :messageNumber,
    :type, iif(:type IS NULL, NULL, :messageTime), iif(:type IS NULL, NULL, :utc), :launchSpeed,
    iif(:type IS NULL, {NEVER}, :messageNumber),
    ifnull(:mission, :newMission), iif(ifnull(:mission, :newMission) IS NULL, 0, :messageNumber),
    :reason, iif(:reason IS NULL, {NEVER}, :messageNumber)
)
ON CONFLICT (channel) DO UPDATE SET
    messages = messages + 1,
    speed_change = speed_change + excluded.speed_change,
    updated_at = iif(excluded.last_message_number > last_message_number, excluded.updated_at, updated_at),
    updated_utc = iif(excluded.last_message_number > last_message_number, excluded.updated_utc, updated_utc),
    last_message_number = max(excluded.last_message_number, last_message_number),
    type = iif(excluded.launch_number < launch_number, excluded.type, type),
    launched_at = iif(excluded.launch_number < launch_number, excluded.launched_at, launched_at),
    launched_utc = iif(excluded.launch_number < launch_number, excluded.launched_utc, launched_utc),
    launch_speed = iif(excluded.launch_number < launch_number, excluded.launch_speed, launch_speed),
    launch_number = min(excluded.launch_number, launch_number),
    mission = iif(excluded.mission_number > mission_number, excluded.mission, mission),
    mission_number = max(excluded.mission_number, mission_number),
    explosion_reason = iif(excluded.explosion_number < explosion_number, excluded.explosion_reason, explosion_reason),
    explosion_number = min(excluded.explosion_number, explosion_number)
WHERE NOT EXISTS (SELECT * FROM messages WHERE channel = :channel AND number = :messageNumber)"""

KEEP = "INSERT INTO messages VALUES (:channel, :messageNumber, :messageTime, :messageType, :message)"
IS_SAME = """
SELECT type = :messageType AND message = :message FROM messages WHERE channel = :channel AND number = :messageNumber"""

STATUSES = ("active", "awaiting_launch", "exploded")
ORDERS = ("asc", "desc")
SORT_KEYS = {name: name for name in ("channel", "type", "speed", "mission", "status")}  # and what to ORDER BY for each
SORT_KEYS |= {"launchedAt": "launched_utc", "updatedAt": "updated_utc", "lastMessageNumber": "last_message_number"}

ROCKET_JSON = """json_object(
    'channel', channel, 'type', type, 'speed', speed, 'mission', mission, 'status', status,
    'explosionReason', explosion_reason, 'launchedAt', launched_at, 'updatedAt', updated_at,
    'lastMessageNumber', last_message_number, 'missingMessages', missing_messages)"""
ROCKET = f"SELECT {ROCKET_JSON} FROM rockets WHERE channel = :channel"
MATCHING = """FROM rockets WHERE status = ifnull(:status, status)
    AND (:type IS NULL OR type = :type) AND (:mission IS NULL OR mission = :mission)"""
ROCKETS = {  # made of the tables above alone; the LIMIT keeps SQLite from dropping the inner ORDER BY
    (sort, order): f"""
SELECT json_object('count', count(*), 'total', (SELECT count(*) {MATCHING}), 'sortBy', :sort, 'order', :order,
                   'rockets', json_group_array({ROCKET_JSON}))
FROM (SELECT * {MATCHING} ORDER BY {column} {order} NULLS LAST, channel LIMIT :limit OFFSET :offset)"""
    for sort, column in SORT_KEYS.items()
    for order in ORDERS
}
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
    fullmatch = re.compile(pattern, re.ASCII).fullmatch

    def read(value: Any) -> Any:
        match = fullmatch(value) if type(value) is str and len(value) <= MAX_TEXT else None
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
CHANNEL = {"channel": text("a UUID", UUID, lambda match: "-".join(match.group(2, 4, 5, 6, 7)).lower())}
MESSAGE_TYPES = {
    "RocketLaunched": {"type": NAME, "launchSpeed": SPEED, "mission": NAME},
    "RocketSpeedIncreased": {"by": SPEED},
    "RocketSpeedDecreased": {"by": SPEED},
    "RocketExploded": {"reason": NAME},
    "RocketMissionChanged": {"newMission": NAME},
}
NO_CONTENT = dict.fromkeys(field for fields in MESSAGE_TYPES.values() for field in fields)  # UPSERT names all
METADATA = CHANNEL | {
    "messageNumber": whole(1, MAX_NUMBER),
    "messageTime": text("an RFC 3339 time with an offset, such as 2022-02-02T19:39:05+01:00", RFC_3339, to_utc),
    "messageType": one_of(MESSAGE_TYPES),
}
LIST_QUERY = {"sort": one_of(SORT_KEYS), "order": one_of(ORDERS), "status": one_of(STATUSES), "type": ANY}
LIST_QUERY |= {"mission": ANY, "limit": up_to(MAX_NUMBER), "offset": up_to(MAX_NUMBER)}
HISTORY_QUERY = {"after": up_to(MAX_NUMBER), "limit": up_to(MAX_PAGE)}


def read_fields(holder: Any, rules: dict[str, Rule], name: str = "") -> dict:
    """Return what the rules keep of the fields they name. Raise HTTPError(400) for the first that breaks its rule."""
    if type(holder) is not dict:
        raise HTTPError(400, f"{name or 'the body'} must be an object, got {json.dumps(holder)[:100]}")
    kept = {field: rule.read(holder.get(field)) for field, rule in rules.items()}
    for field, value in kept.items():
        if value is None:
            got = json.dumps(holder[field])[:100] if field in holder else "nothing"
            raise HTTPError(400, f"{name and name + '.'}{field} must be {rules[field].words}, got {got}")
    return kept


decode = json.JSONDecoder(parse_constant=int).decode  # int() refuses NaN and Infinity, and names them
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True).encode


def parse_message(body: bytes) -> dict:
    """Turn the body of a POST into the parameters of UPSERT. Raise HTTPError(400 or 413) that names the broken rule."""
    if len(body) > MAX_BODY:
        raise HTTPError(413, TOO_LARGE)
    if body.count(b"{") + body.count(b"[") > MAX_BRACKETS:
        raise HTTPError(400, f"the body must hold at most {MAX_BRACKETS} opening brackets of objects and arrays")
    try:
        envelope = decode(body.decode())
        read_fields(envelope, {})  # raises unless it is an object
        metadata, content = envelope.get("metadata"), envelope.get("message")
        message = NO_CONTENT | read_fields(metadata, METADATA, "metadata")
        message |= read_fields(content, MESSAGE_TYPES[message["messageType"]], "message")
        message |= {"utc": message["messageTime"], "messageTime": metadata["messageTime"], "message": encode(content)}
        message["message"].encode()  # raises for a lone surrogate
    except ValueError as error:
        why = f"in UTF-8, with finite numbers and whole characters: {str(error).partition(';')[0]}"
        raise HTTPError(400, f"the body must be JSON {why}") from error
    return message


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
            raise OSError("another program, or another version of this one, wrote it")
        if pages * page_size > size + logged:
            raise OSError("a part of it is missing")


def connect(path: str, mode: str = "rw") -> sqlite3.Connection:
    """Open a connection; mode 'rwc' creates the file (sqlite.org/uri.html)."""
    uri = f"{Path(path).absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, timeout=LOCK_PATIENCE, isolation_level=None, uri=True)
    connection.text_factory = bytes  # the JSON that SQLite builds goes out as it is
    connection.execute("PRAGMA journal_mode = WAL")  # reading never waits for writing
    connection.execute("PRAGMA synchronous = FULL")  # success is the disk's word; NORMAL may lose the last commits
    return connection


def unavailable(why: Any) -> HTTPError:
    why = f"the database is not available: {why}; try again (a message that comes twice counts once)"
    return HTTPError(503, why, Retry_After="1")


class Store:
    """The rockets and the log of their messages, in one SQLite file, for the thread that opened it."""

    def __init__(self, path: str, reset: bool = False):
        """Open or create the file; reset empties it. Raise OSError, and leave the file as it was, if that can't be."""
        try:
            inspect(path)
            self.writer = connect(path, "rwc")
            self.writer.executescript(f"BEGIN IMMEDIATE; {RESET if reset else ''} {SCHEMA} COMMIT;")
            self.writer.execute("PRAGMA wal_checkpoint")  # so that inspect() finds the version in the header
            self.writer.execute("PRAGMA busy_timeout = 0")  # to wait for a lock in here would keep all others waiting
            self.reader = connect(path)  # sees only what is committed
            self.reader.execute(HEALTH).fetchone()  # finds damage inside
            self.files = {name: os.stat(name) for name in (path, f"{path}-wal")}
        except (sqlite3.Error, OSError) as error:
            raise OSError(f"cannot use {path} as the database: {error}") from error
        self.within, self.failure = False, None  # a transaction, and what this one or the last one has failed with
        self.posts: list[tuple[str, float]] = []  # outcome and begin of those that are part of it
        self.outcomes = dict.fromkeys(("applied", "duplicate", "conflicting", "rejected", "failed"), 0)
        self.commits, self.durations, self.spent = 0, [0] * len(BUCKETS), 0.0
        self.since: float | None = None  # when the message that is being served began to wait for the lock, if it did
        self.failed_at: float | None = None  # when a message could not be stored, if no new one was since

    def verify(self) -> None:
        """Raise OSError unless the files are those that were opened: what goes to a deleted file is lost."""
        for name, opened in self.files.items():
            if not os.path.samestat(os.stat(name), opened):
                raise OSError(f"another file has the name {name}")

    def read(self, sql: str, **parameters: Any) -> bytes | None:
        """Return the one value that a query yields, or None. Raise HTTPError(503)."""
        try:
            row = self.reader.execute(sql, parameters).fetchone()
            self.verify()
        except (sqlite3.Error, OSError) as error:
            raise unavailable(error) from error
        return row and row[0]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Put on disk what is applied within, all or nothing; be part of the transaction under way, if there is one.

        Raise HTTPError(503) if that failed, or may have failed.
        """
        outermost, before = not self.within, self.writer.total_changes
        try:
            if outermost:
                self.writer.execute("BEGIN IMMEDIATE")
                self.within, self.failure = True, None
            if self.failure is None:
                yield
            if self.failure is not None:  # of a part, whose handler answers the error and goes no further
                raise self.failure
            if outermost:
                self.writer.execute("COMMIT")
                self.verify()
                self.commits += self.writer.total_changes > before
        except Exception as error:  # whatever it is, no half of a message may stay
            self.failure = error
            if self.writer.in_transaction:
                self.writer.execute("ROLLBACK")
            raise unavailable(error) from error
        finally:
            if outermost:
                self.settle(stored=self.failure is None)
                self.within = False

    def apply(self, message: dict) -> str:
        """Count a message, and keep it in the log; return 'applied', 'duplicate' or 'conflicting'."""
        with self.transaction():
            if self.writer.execute(UPSERT, message).rowcount:
                self.writer.execute(KEEP, message)
                return "applied"
            return "duplicate" if self.writer.execute(IS_SAME, message).fetchone()[0] else "conflicting"

    def count(self, outcome: str, began: float) -> None:
        """Count for /metrics what becomes of a POST, as soon as the transaction that it is part of has ended."""
        self.posts.append((outcome, began))
        if not self.within:
            self.settle(stored=True)

    def settle(self, stored: bool) -> None:
        now = time.perf_counter()
        for outcome, began in self.posts:
            result = outcome if stored or outcome == "rejected" else "failed"
            if result == "failed":
                if self.failed_at is None:
                    log.error("messages can't be stored: %a", str(self.failure))
                self.failed_at = now
            elif result == "applied" and self.failed_at is not None:
                log.error("messages are stored again")
                self.failed_at = None
            self.outcomes[result] += 1
            self.durations[bisect_left(BUCKETS, now - began)] += 1
            self.spent += now - began
        self.posts.clear()

    def close(self) -> None:
        """Close both connections; the last one folds the write-ahead log into the file (sqlite.org/wal.html)."""
        self.reader.close()
        self.writer.close()


# HTTP #################################################################################################################

SAFE = {"X-Content-Type-Options": "nosniff"}  # keeps browsers from taking JSON for a page
OPEN = SAFE | {"Access-Control-Allow-Origin": "*"}  # lets every page read what a GET answers


def read_query(rules: dict[str, Rule]) -> dict:
    """Return the query parameters that the rules name. Raise HTTPError(400) if one breaks its rule or comes twice."""
    raw = request.query_string.encode("latin-1").decode(errors="replace")  # WSGI shows bytes as Latin-1 (PEP 3333)
    pairs = parse_qsl(raw, keep_blank_values=True)
    query = dict(pairs)
    if len(query) < len(pairs):
        raise HTTPError(400, "a query parameter must come only once")
    return read_fields(query, {name: rule for name, rule in rules.items() if name in query})


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


def render(status: int, detail: str) -> str:
    return json.dumps({"title": HTTP_CODES[status], "status": status, "detail": detail}) + "\n"


def problem(error: HTTPError) -> str:
    """Render an error of the app as RFC 9457 asks."""
    detail = error.body
    if error.status_code == 405:
        response.headers["Allow"] = allow = response.headers["Allow"].replace("GET", "GET,HEAD")
        detail = f"{request.path} takes {allow}, not {request.method}"
    response.headers.update((SAFE if request.method == "POST" else OPEN) | {"Content-Type": "application/problem+json"})
    return render(error.status_code, detail)


def refuse_other_sites() -> None:
    """Raise HTTPError(403) if a browser posts for a page of another site."""
    site, origin = request.environ.get("HTTP_SEC_FETCH_SITE"), request.environ.get("HTTP_ORIGIN")
    if site is None and origin:  # as browsers have it on plain HTTP to another machine
        site = "same-origin" if origin.partition("://")[2] == request.environ.get("HTTP_HOST") else "cross-site"
    if site in ("cross-site", "same-site"):
        raise HTTPError(403, "a page of another site must not post messages")


def create_app(store: Store) -> Bottle:
    """Return the service on top of a store, as a WSGI application."""
    app = Bottle()
    app.default_error_handler = problem
    app.get("/", callback=partial(answer, (STATIC / "dashboard.html").read_bytes(), "text/html; charset=utf-8"))
    app.get("/openapi.json", callback=partial(answer, (STATIC / "openapi.json").read_bytes()))
    metrics = (STATIC / "metrics.txt").read_text().rstrip()
    head, started = SAFE | {"Content-Type": "application/json"}, time.time()
    applied, duplicate = [HTTPResponse(f'{{"status": "{is_}"}}\n', 202, head) for is_ in ("applied", "duplicate")]

    @app.post("/messages")
    def post_message() -> HTTPResponse:
        began, outcome = store.since or time.perf_counter(), "rejected"
        try:
            refuse_other_sites()
            message = parse_message(request.body.read(MAX_BODY + 1))
            outcome = "failed"
            outcome = store.apply(message)
        finally:
            store.count(outcome, began)
        if outcome == "conflicting":
            known = "message %(messageNumber)d of %(channel)s is known; another one with its number is ignored: "
            log.warning(known + "%(messageType)s %(message)a", message)
        return applied if outcome == "applied" else duplicate

    @app.get("/rockets")
    def get_rockets() -> bytes:
        query = {"sort": "channel", "order": "asc", "status": None, "type": None, "mission": None}
        query |= {"limit": -1, "offset": 0} | read_query(LIST_QUERY)
        return answer(store.read(ROCKETS[query["sort"], query["order"]], **query))

    @app.get("/rockets/<channel>")
    def get_rocket(channel: str) -> bytes:
        return answer(store.read(ROCKET, **read_fields({"channel": channel}, CHANNEL)))

    @app.get("/rockets/<channel>/messages")
    def get_history(channel: str) -> bytes:
        query = read_fields({"channel": channel}, CHANNEL) | {"after": 0, "limit": 1000} | read_query(HISTORY_QUERY)
        return answer(store.read(HISTORY, **query))

    @app.get("/health")
    def get_health() -> bytes:
        if store.failed_at and time.perf_counter() < store.failed_at + TROUBLE_SHOWN:
            raise unavailable("a message could not be stored, and no new one was since")
        return answer(store.read(HEALTH))

    @app.get("/metrics")
    def get_metrics() -> bytes:
        values = store.outcomes | dict(zip(map("le {:g}".format, BUCKETS), accumulate(store.durations), strict=True))
        values |= {"spent": store.spent, "commits": store.commits, "started": started, "version": VERSION}
        values |= json.loads(store.read(FLEET))
        return answer((metrics % values).encode(), "text/plain; version=0.0.4; charset=utf-8")

    return app


# Server ###############################################################################################################

WAITRESS = {
    "ident": "rockets",
    "threads": 0,  # nobody but serve() takes requests from the queue for threads
    "max_request_body_size": MAX_BODY + 1,  # bytes; so many and more are a 413 before they are read
    "outbuf_overflow": sys.maxsize,  # bytes; no answer needs a temporary file, as the disk may be full
    "outbuf_high_watermark": sys.maxsize,  # bytes; to wait for one client to read would keep all others waiting
}


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on the host; 'localhost' is every loopback address there is. Raise OSError."""
    sockets: list[socket.socket] = []
    for address in ("127.0.0.1", "::1") if host == "localhost" else (host,):
        try:
            family = socket.getaddrinfo(address, port)[0][0]
            sockets.append(socket.create_server((address, port), family=family))
        except OSError as error:
            if not sockets or error.errno == errno.EADDRINUSE:  # else there is no IPv6 on this machine
                why = error.strerror.partition(" (")[0]
                raise OSError(f"cannot listen on {address} port {port}: {why}") from error
        port = sockets[0].getsockname()[1]  # the same for both, also where the system has chosen it
    return sockets


class Request(HTTPRequestParser):
    """A request of waitress, mended where that would leave it without an answer."""

    def received(self, data: bytes) -> int:
        consumed = super().received(data)
        self.expect_continue &= not self.completed  # else waitress asks for more of a request that is complete
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of an address or a number that can't be, which closes the connection
            raise ParsingError(str(error)) from error


class Connection(HTTPChannel):
    """A connection of waitress, whose answers can be held back, and replaced as long as they are."""

    parser_class = Request
    holding = False  # for all connections at once
    since: float | None = None  # when its message began to wait for the lock, if it does

    def _flush_some(self, do_close: bool = True) -> bool:
        return not Connection.holding and super()._flush_some(do_close)

    def service(self) -> None:
        """Answer the first request; what waitress refuses by itself would be plain text."""
        if error := self.requests[0].error:
            self.refuse(error.code, TOO_LARGE if error.code == 413 else error.body)
        else:
            super().service()

    def refuse(self, status: int, detail: str) -> None:
        """Answer without the app, as RFC 9457 asks, and close.

        waitress writes the answer to the first of the requests: one that is made up here, and put before all others.
        """
        log.info("%d %a", status, f"{self.addr[0]} {detail}")
        head = [*SAFE.items(), ("Content-Type", "application/problem+json"), *[("Retry-After", "1")] * (status == 503)]
        refused = self.parser_class(self.adj)
        refused.version = "1.1"
        refused.error = SimpleNamespace(
            to_response=lambda ident: (f"{status} {HTTP_CODES[status]}", head, render(status, detail).encode())
        )
        self.requests.insert(0, refused)
        super().service()

    def take_back(self, error: HTTPError) -> None:
        """Put a 503 in the place of the answer that is held back, if that begins with HTTP/1.1 202."""
        if self.outbufs[-1].get(12)[9:12] == b"202":
            self.outbufs[-1].skip(self.total_outbufs_len, True)
            self.total_outbufs_len = 0
            self.refuse(503, error.body)


def serve(app: Bottle, store: Store, sockets: list[socket.socket], greeting: str) -> None:
    """Greet, and serve until SIGTERM or Ctrl-C; then take nothing more, and answer what is under way.

    One thread does everything, in turns: read what has come, let the app answer all of it in one transaction, and send
    the answers when that is on disk. So all messages of a turn share a disk sync, and nobody waits for another thread.
    """
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    connections: dict[int, Any] = {}  # and listeners, by file number
    limit = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 50)  # else accept() fails for ever
    server = waitress.create_server(app, map=connections, sockets=sockets, connection_limit=limit, **WAITRESS)
    for listener in connections.values():
        listener.channel_class = Connection
        listener.pull_trigger = lambda: None  # nobody sleeps while there is something to send
    arrived = server.task_dispatcher.queue  # of connections with a whole request
    waiting: list[Connection] = []  # those whose client must read first, or whose message waits for the lock
    blocked_since: float | None = None  # when another process was first found to have the lock
    deadline = float("inf")  # for all answers, once there is a signal to stop
    poller, stirred, listening = select.poll(), set(), set(connections)

    def receive(seconds: float) -> bool:
        """Let waitress handle what happens, and return whether there may be a new connection. Its own loop asks each
        connection at every turn what it waits for, so that idle ones slow down all; this asks those that something
        happened to, and the listeners, which waitress pauses at its limit of connections."""
        for number in stirred | listening:
            if connection := connections.get(number):
                reads, writes = connection.readable() and select.POLLIN, connection.writable() and select.POLLOUT
                poller.register(number, reads | writes)
            else:
                poller.unregister(number)
        stirred.clear()
        newest = next(reversed(connections))  # the last key of a dict
        for number, events in poller.poll(1000 * seconds):
            wasyncore.readwrite(connections[number], events)
            stirred.update((number, next(reversed(connections))))
        return newest != next(reversed(connections))

    def service_all(ready: list[Connection]) -> None:
        Connection.holding = True
        for connection in ready:
            store.since, connection.since = connection.since, None
            connection.service()
        Connection.holding = False

    def turn() -> None:
        nonlocal blocked_since
        for seconds in (0 if arrived else LOCK_RETRY if waiting else IDLE, *[0] * MAX_LOOKS):
            if not receive(seconds):  # else look again at once: a new connection has sent its request, as a rule
                break
        ready = [connection for connection in (*waiting, *arrived) if connection.socket]  # the others have hung up
        stirred.update(connection.socket.fileno() for connection in ready)
        waiting.clear()
        arrived.clear()
        posts, others = [], []
        for connection in ready:
            unread = connection.total_outbufs_len
            is_post = not unread and getattr(connection.requests[0], "command", None) == "POST"
            (waiting if unread else posts if is_post else others).append(connection)
        service_all(others)
        for connection in others:
            connection.handle_write()
        begun = not posts  # the transaction, which needs the lock
        try:
            if posts:
                with store.transaction():
                    begun = True
                    service_all(posts)
        except HTTPError as error:
            if begun:
                for connection in posts:
                    connection.take_back(error)
            elif time.monotonic() < min((blocked_since or time.monotonic()) + LOCK_PATIENCE, deadline - 0.5):
                waiting.extend(posts)
                for connection in posts:
                    connection.since = connection.since or time.perf_counter()
            else:
                service_all(posts)  # each fails by itself, and says why
        blocked_since = None if begun else blocked_since or time.monotonic()
        for connection in posts:
            connection.handle_write()

    receive(0)  # so that every listener is registered before it is closed
    print(greeting, flush=True)
    while not stopping:
        stirred.update(connections)  # all of them once a second, for waitress's timeouts and for ours
        for connection in [*connections.values()]:
            if getattr(connection, "total_outbufs_len", 0) and connection.last_activity < time.time() - READ_PATIENCE:
                connection.handle_close()
        second = time.monotonic() + 1
        while not stopping and time.monotonic() < second:
            turn()
    stirred.update(connections)
    listening.clear()
    for listener in [connection for connection in connections.values() if connection.accepting]:
        wasyncore.dispatcher.close(listener)
    deadline, busy = time.monotonic() + DRAIN_PATIENCE, True
    while busy and time.monotonic() < deadline:
        turn()
        busy = any(getattr(c, "requests", 0) or getattr(c, "request", 0) or c.writable() for c in connections.values())


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
    option("--threads", metavar="N", type=int, default=1, help="ignored, for scripts that name it: one thread does all")
    option("--reset", action="store_true", help="start from an empty database")
    option("--verbose", action="store_true", help="log every request")
    args = parser.parse_args()
    logging.basicConfig(level="INFO" if args.verbose else "WARNING", format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("waitress").setLevel("ERROR")  # else a line for every request that has to wait a moment
    try:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise OSError(f"SQLite {sqlite3.sqlite_version} is too old, at least {OLDEST_SQLITE} is needed")
        sockets = listen(args.host, args.port)
        store = Store(args.database, args.reset)
        app, found = create_app(store), json.loads(store.read(HEALTH))
    except (OSError, OverflowError, UnicodeError) as error:  # of a port above 65,535, of a host that can't be
        sys.exit(f"rockets: {error}")
    if args.verbose:
        line = "{0.remote_addr} {0.method} {0.path}"
        app.add_hook("after_request", lambda: log.info("%d %a", response.status_code, line.format(request)))
    host = f"[{args.host}]" if ":" in args.host else args.host
    where = f"http://{host}:{sockets[0].getsockname()[1]}"
    holds = f"{args.database} holds {found['rockets']} rockets and {found['messages']} messages"
    serve(app, store, sockets, f"Rockets listens on {where}, {holds}")
    store.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # all is done; Python would die of a second one while it exits


if __name__ == "__main__":
    main()
