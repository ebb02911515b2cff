"""Rockets takes in what rockets in flight report and serves their current state as JSON.

Messages arrive out of order and more than once. A 202 means that this message is on disk, counts exactly once and is
in every later answer; neither a crash nor a power cut takes it back.

The idea: the state of a rocket is a function of the set of its messages, not of their order. So each message counts as
soon as it arrives, by one upsert in which speed changes add up while message numbers decide which launch, mission and
explosion stand. The log of messages, written in the same transaction, keeps a redelivery from counting again.

    python rockets.py         serves http://localhost:8088 from ./rockets.db; --help lists the options
"""

import argparse
import errno
import hashlib
import json
import logging
import operator
import os
import re
import signal
import socket
import sqlite3
import sys
import threading
import time
import uuid
from base64 import b64encode
from bisect import bisect_left
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import waitress
from bottle import HTTP_CODES, Bottle, HTTPError, request, response
from waitress import wasyncore

VERSION = "1.0.0"
SWITCH_INTERVAL = 0.0001  # seconds; with Python's 0.005, a thread back from SQLite waits too long for its turn
STATIC = Path(__file__).resolve().parent / "static"

MAX_BODY = 64 * 1024  # bytes; a real message has about 300, a larger body gets a 413
MAX_BRACKETS = 800  # objects and arrays in a body; a real message has 2, and SQLite reads at most 1,000 levels
MAX_DIGITS = 4000  # of a whole number; Python reads at most 4,300
MAX_TEXT = 256  # characters
MAX_SPEED = 2**31 - 1
MAX_NUMBER = 2**53 - 1  # up to here every JSON parser reads whole numbers exactly (RFC 8259, section 6)
MAX_PAGE = 10_000  # messages in one answer
LOCK_PATIENCE = 4  # seconds to wait for another process's lock; the sender waits 10 for its answer
PLACE_PATIENCE = 0.5  # seconds that a POST waits once only SPARE_THREADS are left
SPARE_THREADS = 4  # serve GETs even while all others wait for the disk
TROUBLE_SHOWN = 30  # seconds that /health tells of a failed write, unless another succeeds
DRAIN_PATIENCE = 4  # seconds after SIGTERM in which requests under way are answered

log = logging.getLogger("rockets")

# SQL ##################################################################################################################

OLDEST_SQLITE = (3, 38, 0)  # the first with STRICT tables and the ->> operator
SCHEMA_VERSION = 0x524B_0001  # in the header of the file: "RK", which no other program has there, and the version
NEVER = MAX_NUMBER + 1  # number of a launch or explosion not known yet; above all others, as the lowest one counts

# launch_number, mission_number and explosion_number are of the messages that the columns before them come from.
# Columns in _utc are the instants of those in _at, spelled so that ORDER BY sorts them.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS rockets (
    channel TEXT NOT NULL PRIMARY KEY,
    type TEXT, launched_at TEXT, launched_utc TEXT, launch_speed INTEGER, launch_number INTEGER NOT NULL,
    speed_change INTEGER NOT NULL,
    mission TEXT, mission_number INTEGER NOT NULL,
    explosion_reason TEXT, explosion_number INTEGER NOT NULL,
    updated_at TEXT NOT NULL, updated_utc TEXT NOT NULL, last_message_number INTEGER NOT NULL,
    messages INTEGER NOT NULL,
    missing_messages INTEGER AS (last_message_number - messages),
    speed INTEGER AS (launch_speed + speed_change),
    status TEXT AS (CASE WHEN explosion_reason IS NOT NULL THEN 'exploded'
                         WHEN type IS NOT NULL THEN 'active'
                         ELSE 'awaiting_launch' END)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
    channel TEXT NOT NULL, number INTEGER NOT NULL, time TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL,
    PRIMARY KEY (channel, number)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""
INSIDE = "SELECT user_version, page_count * page_size, (SELECT count(*) FROM sqlite_schema) FROM pragma_user_version, "
INSIDE += "pragma_page_count, pragma_page_size"
RESET = "DROP TABLE IF EXISTS rockets; DROP TABLE IF EXISTS messages;"

# A batch of messages reaches SQLite as one JSON array: one statement for all costs far less than one for each.
ARRIVED = """
WITH arrived AS (
    SELECT key AS place, value ->> 0 AS channel, value ->> 1 AS number, value ->> 2 AS time, value ->> 3 AS utc,
           value ->> 4 AS type, value -> 5 AS message
    FROM json_each(:batch)
)"""

KNOWN = f"{ARRIVED} SELECT place, messages.type, messages.message FROM arrived JOIN messages USING (channel, number)"

# In whatever order messages come, and however often, they leave the same row: sums don't depend on order, the lowest
# or highest number wins whenever it comes, and the WHERE clause lets no number count that the log already holds.
UPSERT = f"""{ARRIVED}
INSERT INTO rockets (
    channel, updated_at, updated_utc, last_message_number, messages,
    type, launched_at, launched_utc, launch_speed, launch_number,
    speed_change, mission, mission_number, explosion_reason, explosion_number
)
SELECT
    channel, time, utc, number, 1,
    iif(type = 'RocketLaunched', message ->> 'type', NULL),
    iif(type = 'RocketLaunched', time, NULL),
    iif(type = 'RocketLaunched', utc, NULL),
    iif(type = 'RocketLaunched', message ->> 'launchSpeed', NULL),
    iif(type = 'RocketLaunched', number, {NEVER}),
    CASE type WHEN 'RocketSpeedIncreased' THEN message ->> 'by'
              WHEN 'RocketSpeedDecreased' THEN -(message ->> 'by') ELSE 0 END,
    CASE type WHEN 'RocketLaunched' THEN message ->> 'mission'
              WHEN 'RocketMissionChanged' THEN message ->> 'newMission' END,
    iif(type IN ('RocketLaunched', 'RocketMissionChanged'), number, 0),
    iif(type = 'RocketExploded', message ->> 'reason', NULL),
    iif(type = 'RocketExploded', number, {NEVER})
FROM arrived WHERE true
ON CONFLICT (channel) DO UPDATE SET
    updated_at = iif(excluded.last_message_number > last_message_number, excluded.updated_at, updated_at),
    updated_utc = iif(excluded.last_message_number > last_message_number, excluded.updated_utc, updated_utc),
    last_message_number = max(excluded.last_message_number, last_message_number),
    messages = messages + 1,
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
WHERE NOT EXISTS (
    SELECT * FROM messages AS log
    WHERE log.channel = excluded.channel AND log.number = excluded.last_message_number
)"""

LOG = f"""{ARRIVED}
INSERT INTO messages SELECT channel, number, time, type, message FROM arrived WHERE true
ON CONFLICT (channel, number) DO NOTHING
"""

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
SELECT json_object('count', count(*), 'total', (SELECT count(*) {MATCHING}), 'sortBy', '{sort}', 'order', '{order}',
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
FLEET = """
SELECT json_object('rockets_fleet{status="active"}', total(status = 'active'),
                   'rockets_fleet{status="awaiting_launch"}', total(status = 'awaiting_launch'),
                   'rockets_fleet{status="exploded"}', total(status = 'exploded'),
                   'rockets_missing_messages', total(missing_messages)) FROM rockets"""

# Messages #############################################################################################################


# What a value must be, in words, and a function that returns what to keep of it, or None if it isn't that.
Rule = namedtuple("Rule", "words read")


def whole(lowest: int, highest: int) -> Rule:
    def read(value: Any) -> int | None:
        return value if type(value) is int and lowest <= value <= highest else None  # type(), since True is an int

    return Rule(f"a whole number from {lowest} to {highest}", read)


def text(words: str, pattern: str, keep: Callable[[re.Match], Any] = re.Match.group) -> Rule:
    @lru_cache(maxsize=1000)  # rockets name the same channels, types and missions again and again
    def read(value: str) -> Any:
        match = re.fullmatch(pattern, value, re.ASCII)
        return match and keep(match)

    return Rule(words, lambda value: read(value) if type(value) is str and len(value) <= MAX_TEXT else None)


def one_of(choices: Iterable[str]) -> Rule:
    return text(f"one of {', '.join(choices)}", "|".join(choices))


def up_to(highest: int) -> Rule:
    limit = whole(0, highest)
    return text(limit.words, "[0-9]{1,16}", lambda match: limit.read(int(match[0])))


def to_utc(match: re.Match) -> str | None:
    """Return an RFC 3339 time in UTC, spelled so that texts sort as the instants do, to the last digit."""
    date, minute, second, fraction, offset = match.groups()
    try:
        local = datetime.fromisoformat(f"{date}T{minute}{offset.upper().replace('Z', '+00:00')}")
        utc = local.astimezone(UTC).isoformat()[:16]
    except (ValueError, OverflowError):  # no such day, or outside of the years 1 to 9999
        return None
    if second == "60" and not utc.endswith("23:59"):  # a leap second ends a day in UTC
        return None
    return f"{utc}:{second}{(fraction or '').rstrip('0').rstrip('.')}"


UUID = r"(?i)(urn:uuid:)?(\{)?[0-9a-f]{8}(-?)([0-9a-f]{4}\3){3}[0-9a-f]{12}(?(2)\})"
RFC_3339 = r"(?i)(\d{4}-\d\d-\d\d)T((?:[01]\d|2[0-3]):[0-5]\d):([0-5]\d|60)(\.\d+)?(Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
ANY = Rule("a text", str)
OBJECT = Rule("an object", lambda value: value if type(value) is dict else None)
NAME = text(f"a text of 1 to {MAX_TEXT} characters, no NUL, no lone surrogate", r"[^\0\ud800-\udfff]+")
SPEED = whole(0, MAX_SPEED)
CHANNEL = text("a UUID", UUID, lambda match: str(uuid.UUID(match[0].lower())))
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
LIST_QUERY = {
    "sort": one_of(SORT_KEYS),
    "order": one_of(ORDERS),
    "status": one_of(STATUSES),
    "type": ANY,
    "mission": ANY,
    "limit": up_to(MAX_NUMBER),
    "offset": up_to(MAX_NUMBER),
}
HISTORY_QUERY = {"after": up_to(MAX_NUMBER), "limit": up_to(MAX_PAGE)}


def read_fields(holder: dict, rules: dict[str, Rule], path: str = "") -> dict:
    """Return what the rules keep of the fields they name. Raise HTTPError(400) for the first that breaks its rule."""
    kept = {}
    for name, rule in rules.items():
        kept[name] = rule.read(holder.get(name))
        if kept[name] is None:
            got = json.dumps(holder[name])[:100] if name in holder else "nothing"
            raise HTTPError(400, f"{path}{name} must be {rule.words}, got {got}")
    return kept


@dataclass(slots=True)
class Message:
    """A valid message and, in time, its outcome: 'applied', 'duplicate', 'conflicting', or what kept it out."""

    channel: str
    number: int
    type: str
    content: dict
    row: str  # as JSON, for ARRIVED
    outcome: str | Exception | None = None


# A number of too many digits becomes infinity, which no rule takes.
decode = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS else float("inf")).decode
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def parse_message(body: bytes) -> Message:
    """Turn the body of a POST into a valid message. Raise HTTPError(400), which names the field and its rule."""
    if body.count(b"{") + body.count(b"[") > MAX_BRACKETS:
        raise HTTPError(400, f"the body must hold at most {MAX_BRACKETS} opening brackets of objects and arrays")
    try:
        envelope = decode(body.decode())
    except ValueError as error:
        raise HTTPError(400, f"the body must be JSON in UTF-8: {error}") from error
    read_fields({"the body": envelope}, {"the body": OBJECT})
    metadata, content = read_fields(envelope, {"metadata": OBJECT, "message": OBJECT}).values()
    channel, number, utc, kind = read_fields(metadata, METADATA, "metadata.").values()
    read_fields(content, MESSAGE_TYPES[kind], "message.")
    try:
        encode(envelope).encode()  # fields that no rule names may still hold NaN, infinity or a lone surrogate
    except ValueError as error:
        raise HTTPError(400, f"the body must hold finite numbers and whole characters only: {error}") from error
    row = encode([channel, number, metadata["messageTime"], utc, kind, content])
    return Message(channel, number, kind, content, row)


# Storage ##############################################################################################################


def connect(path: str, mode: str, patience: int = LOCK_PATIENCE) -> sqlite3.Connection:
    """Open a connection; mode is SQLite's 'ro', 'rw' or, to create the file, 'rwc' (sqlite.org/uri.html)."""
    uri = f"{Path(path).absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, timeout=patience, isolation_level=None, check_same_thread=False, uri=True)
    connection.text_factory = bytes  # the JSON that SQLite builds goes out as it is
    if not mode.startswith("ro"):
        connection.execute("PRAGMA journal_mode = WAL")  # reading never waits for writing
        connection.execute("PRAGMA synchronous = FULL")  # COMMIT returns with the disk's word; NORMAL may lose the last
        connection.execute(f"PRAGMA busy_timeout = {LOCK_PATIENCE * 1000}")
    return connection


def inspect(path: str) -> None:
    """Raise OSError, and change nothing, if the file holds anything but a whole database of this version."""
    sizes = [os.path.getsize(name) if os.path.exists(name) else 0 for name in (path, f"{path}-wal")]
    if sizes[1] and not sizes[0]:
        raise OSError("it is gone, but its write-ahead log is there")  # which SQLite would delete
    if sizes[0]:
        with open(path, "rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise OSError("it is no SQLite database")
        mode = "ro" if sizes[1] else "ro&immutable=1"  # without a log to read, SQLite need not even create one
        with closing(connect(path, mode)) as connection:
            version, size, tables = connection.execute(INSIDE).fetchone()
        if version != SCHEMA_VERSION and tables:
            raise OSError("another program, or a newer version of this one, wrote it")
        if size > sum(sizes):
            raise OSError("a part of it is missing")


class Store:
    """The rockets and the log of their messages, in one SQLite file, for many threads at once.

    Of the threads that have a message to store, the one that gets the lock commits all that wait by then, with one disk
    sync; the others find theirs done.
    """

    def __init__(self, path: str, places: int, reset: bool = False):
        """Open or create the file, with room for so many threads that wait to store a message; reset empties it.

        Raise OSError, and leave the file as it was, if that can't be.
        """
        self.path = path
        self.places = threading.BoundedSemaphore(places)
        self.committing = threading.Lock()
        self.waiting: deque[Message] = deque()  # for the next commit
        self.idle: list[sqlite3.Connection] = []
        self.patience = PLACE_PATIENCE
        self.trouble: tuple[float, Exception] | None = None  # when and why the last commit failed, if it did
        self.commits = 0
        try:
            inspect(path)
            self.anchor = connect(path, "rwc")  # never lent; while it is open, the files of the log stay
            self.anchor.executescript(f"BEGIN IMMEDIATE; {RESET if reset else ''} {SCHEMA} COMMIT;")
            self.files = {name: os.stat(name) for name in (path, f"{path}-wal")}
        except (sqlite3.Error, OSError) as error:
            raise OSError(f"cannot use {path} as the database: {error}") from error

    @contextmanager
    def lend(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection to one thread, and close it, which rolls back, if it fails. Raise HTTPError(503)."""
        connection = None
        try:
            try:
                connection = self.idle.pop()
            except IndexError:
                self.verify()
                connection = connect(self.path, "rw", 0 if self.trouble else LOCK_PATIENCE)
            yield connection
            self.verify()
        except (sqlite3.Error, OSError) as error:
            if connection:
                connection.close()
            detail = f"the database is not available: {error}; try again, as a message that comes twice counts once"
            raise HTTPError(503, detail, Retry_After="1") from error
        self.idle.append(connection)

    def verify(self) -> None:
        """Raise OSError unless the files are those that were opened. What is written to a deleted file is lost, and
        SQLite would fold the log of one file into another that has taken its name."""
        for name, opened in self.files.items():
            if not os.path.samestat(os.stat(name), opened):
                raise OSError(f"another file has the name {name}")

    def read(self, sql: str, **parameters: Any) -> bytes | None:
        """Return the one value that a query yields, or None. Raise HTTPError(503)."""
        with self.lend() as connection:
            row = connection.execute(sql, parameters).fetchone()
        return row and row[0]

    def apply(self, message: Message) -> None:
        """Put a message on disk and set its outcome. Raise HTTPError(503) if that failed, or may have failed."""
        found = self.places.acquire(timeout=self.patience)
        self.patience = PLACE_PATIENCE if found else 0  # where one has waited in vain, the next need not
        if not found:
            raise HTTPError(503, "too many messages wait for the disk; try again", Retry_After="1")
        try:
            self.waiting.append(message)
            with self.committing:
                if message.outcome is None:
                    self.commit([self.waiting.popleft() for _ in range(len(self.waiting))])
        finally:
            self.places.release()
        if isinstance(message.outcome, Exception):
            raise message.outcome.with_traceback(None)

    def commit(self, batch: list[Message]) -> None:
        """Give each message of a batch its outcome: all together or, lest one's failure fail another, each alone."""
        try:
            self.write(batch)
            self.trouble = None
        except Exception as error:
            self.trouble = (time.monotonic(), error)
            for message in batch:
                message.outcome = error
                if len(batch) > 1:
                    self.commit([message])

    def write(self, batch: list[Message]) -> None:
        """Apply a batch in one transaction, then tell each message what became of it."""
        unique: dict[tuple[str, int], Message] = {}
        for message in batch:
            unique.setdefault((message.channel, message.number), message)
        arrived = {"batch": f"[{','.join([message.row for message in unique.values()])}]"}
        with self.lend() as connection:
            self.begin(connection)
            before = connection.total_changes
            connection.execute(UPSERT, arrived)
            all_new = connection.total_changes - before == len(unique)
            known = [] if all_new else connection.execute(KNOWN, arrived).fetchall()
            connection.execute(LOG, arrived)
            connection.execute("COMMIT")
        self.commits += 1
        keys = list(unique)
        first = {keys[place]: (kind.decode(), json.loads(content)) for place, kind, content in known}
        for message in batch:
            this = (message.type, message.content)
            that = first.setdefault((message.channel, message.number), this)
            message.outcome = "applied" if that is this else "duplicate" if that == this else "conflicting"

    def begin(self, connection: sqlite3.Connection) -> None:
        """Begin to write. Another process's lock is waited for once. Until a commit succeeds again, messages fail at
        once, as every thread that waits is one that serves no GET."""
        if self.trouble:
            connection.execute("PRAGMA busy_timeout = 0")
        connection.execute("BEGIN IMMEDIATE")
        if self.trouble:
            connection.execute(f"PRAGMA busy_timeout = {LOCK_PATIENCE * 1000}")

    def close(self) -> None:
        """Close every connection; the last one folds the write-ahead log into the file (sqlite.org/wal.html)."""
        for connection in (*self.idle, self.anchor):
            connection.close()


# HTTP #################################################################################################################

METRICS = {  # for Prometheus; no name begins with another one
    "rockets_messages_total": ("counter", "Messages posted, by what became of them."),
    "rockets_commits_total": ("counter", "Transactions; each stores all the messages that wait at that moment."),
    "rockets_post_duration_seconds": ("histogram", "Time from the headers of a POST to its answer."),
    "rockets_fleet": ("gauge", "Rockets, by status."),
    "rockets_missing_messages": ("gauge", "Messages not received although a later one of their rocket was."),
    "rockets_build_info": ("gauge", "The version that runs."),
    "process_start_time_seconds": ("gauge", "When the service started, in seconds since 1970."),
}
OUTCOMES = ("applied", "duplicate", "conflicting", "rejected", "failed")
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, float("inf"))  # seconds


def read_query(rules: dict[str, Rule], **defaults: Any) -> dict:
    """Return the query parameters that the rules name. Raise HTTPError(400) if one breaks its rule or comes twice."""
    raw = request.query_string.encode("latin-1").decode(errors="replace")  # WSGI shows bytes as Latin-1 (PEP 3333)
    pairs = parse_qsl(raw, keep_blank_values=True)
    query = dict(pairs)
    if len(query) < len(pairs):
        raise HTTPError(400, "a query parameter must come only once")
    return defaults | read_fields(query, {name: rule for name, rule in rules.items() if name in query})


def answer(body: bytes | None, content_type: str = "application/json", **headers: str) -> bytes:
    """Answer a GET: 404 for no body, 304 if the client has this one already (RFC 9110, section 13.1.2), or else 200."""
    if body is None:
        raise HTTPError(404, "no message has come on this channel")
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    protect()
    response.headers.update({"Content-Type": content_type, "ETag": tag, "Cache-Control": "no-cache"} | headers)
    held = request.environ.get("HTTP_IF_NONE_MATCH", "")
    if held == "*" or tag in re.findall('"[^"]*"', held):
        response.status = 304
    return body + b"\n"


def protect() -> None:
    """Keep browsers from taking JSON for a page, and let every page read what a GET answers."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    if request.method != "POST":
        response.headers["Access-Control-Allow-Origin"] = "*"


def problem(error: HTTPError) -> str:
    """Render an error as RFC 9457 asks; every error comes through here."""
    detail = error.body
    if error.status_code == 405:
        response.headers["Allow"] = allow = response.headers["Allow"].replace("GET", "GET,HEAD")
        detail = f"{request.path} takes {allow}, not {request.method}"
    response.content_type = "application/problem+json"
    protect()
    return json.dumps({"title": HTTP_CODES[error.status_code], "status": error.status_code, "detail": detail}) + "\n"


def create_app(store: Store) -> Bottle:
    """Return the service on top of a store, as a WSGI application."""
    app = Bottle()
    app.default_error_handler = problem
    page, description = [(STATIC / name).read_bytes().strip() for name in ("dashboard.html", "openapi.json")]
    inline = re.findall(rb"(?s)<(?:script|style)>(.*?)</", page)
    hashes = " ".join(f"'sha256-{b64encode(hashlib.sha256(code).digest()).decode()}'" for code in inline)
    policy = f"default-src 'none'; script-src {hashes}; style-src {hashes}; connect-src 'self'; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    started = time.time()
    counting = threading.Lock()
    outcomes = dict.fromkeys(OUTCOMES, 0)
    durations = [0] * len(BUCKETS)
    spent = 0.0

    def count(outcome: str, seconds: float) -> None:
        nonlocal spent
        with counting:
            outcomes[outcome] += 1
            durations[bisect_left(BUCKETS, seconds)] += 1
            spent += seconds

    def receive() -> Message:
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
    def post_message() -> str:
        began, outcome = time.perf_counter(), "rejected"
        try:
            message = receive()
            outcome = "failed"
            store.apply(message)
            outcome = message.outcome
        finally:
            count(outcome, time.perf_counter() - began)
        if outcome == "conflicting":
            log.warning("the first message of this number stands; a different one was ignored: %a", message.row)
        protect()
        response.status = 202
        response.content_type = "application/json"
        return '{"status": "applied"}\n' if outcome == "applied" else '{"status": "duplicate"}\n'

    @app.get("/rockets")
    def get_rockets() -> bytes:
        query = read_query(
            LIST_QUERY, sort="channel", order="asc", status=None, type=None, mission=None, limit=-1, offset=0
        )
        return answer(store.read(ROCKETS[query.pop("sort"), query.pop("order")], **query))

    @app.get("/rockets/<channel>")
    def get_rocket(channel: str) -> bytes:
        return answer(store.read(ROCKET, **read_fields({"channel": channel}, {"channel": CHANNEL})))

    @app.get("/rockets/<channel>/messages")
    def get_history(channel: str) -> bytes:
        query = read_query(HISTORY_QUERY, after=0, limit=1000) | read_fields({"channel": channel}, {"channel": CHANNEL})
        return answer(store.read(HISTORY, **query))

    @app.get("/health")
    def get_health() -> bytes:
        trouble = store.trouble
        if trouble and time.monotonic() < trouble[0] + TROUBLE_SHOWN:
            raise trouble[1].with_traceback(None)
        return answer(store.read(HEALTH))

    @app.get("/metrics")
    def get_metrics() -> bytes:
        with counting:
            samples = {f'rockets_messages_total{{outcome="{outcome}"}}': n for outcome, n in outcomes.items()}
            reached = list(accumulate(durations))
            samples |= {"rockets_post_duration_seconds_sum": spent, "rockets_post_duration_seconds_count": reached[-1]}
        for bound, n in zip(BUCKETS, reached, strict=True):
            samples[f'rockets_post_duration_seconds_bucket{{le="{bound:g}"}}'.replace("inf", "+Inf")] = n
        samples |= json.loads(store.read(FLEET)) | {"rockets_commits_total": store.commits}
        samples |= {f'rockets_build_info{{version="{VERSION}"}}': 1, "process_start_time_seconds": started}
        lines = []
        for name, (kind, meaning) in METRICS.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{sample} {value}" for sample, value in samples.items() if sample.startswith(name)]
        return answer("\n".join(lines).encode(), "text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json")
    def get_openapi() -> bytes:
        return answer(description)

    @app.get("/")
    def get_dashboard() -> bytes:
        return answer(page, "text/html; charset=utf-8", **{"Content-Security-Policy": policy})

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
    channels: dict[int, Any] = {}
    # Beyond its own limit of a body, waitress answers 413 by itself, in plain text.
    limits = {"connection_limit": 1000, "max_request_body_size": 2 * MAX_BODY}
    server = waitress.create_server(app, map=channels, sockets=sockets, threads=threads, ident="rockets", **limits)
    print(greeting, flush=True)
    while not stop.is_set():
        wasyncore.loop(timeout=0.2, use_poll=True, map=channels, count=1)  # select() can't watch so many connections
    for listener in [channel for channel in channels.values() if channel.accepting]:
        wasyncore.dispatcher.close(listener)
    deadline, busy = time.monotonic() + DRAIN_PATIENCE, True
    while busy and time.monotonic() < deadline:
        wasyncore.loop(timeout=0.05, use_poll=True, map=channels, count=1)
        busy = any(getattr(c, "requests", 0) or getattr(c, "request", 0) or c.writable() for c in channels.values())
    server.task_dispatcher.shutdown(timeout=0.5)


def main() -> None:
    """Read the command line and the environment, and serve."""
    environ = os.environ.get
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="HOST, PORT and DATABASE in the environment stand in for the options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda text: sys.exit(f"rockets: {text}")  # one line, as for everything else that can't work
    option = parser.add_argument
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
        found = json.loads(store.read(HEALTH))
    except (OSError, OverflowError, UnicodeError) as error:  # of a port above 65,535, of a host that can't be
        sys.exit(f"rockets: {error}")
    app = create_app(store)
    if args.verbose:
        asked = operator.itemgetter("REQUEST_METHOD", "REQUEST_URI")
        app.add_hook("after_request", lambda: log.info("%d %s %a", response.status_code, *asked(request.environ)))
    host = f"[{args.host}]" if ":" in args.host else args.host
    where = f"http://{host}:{sockets[0].getsockname()[1]}"
    holds = f"{args.database} holds {found['rockets']} rockets and {found['messages']} messages"
    serve(app, sockets, args.threads, f"Rockets listens on {where}, {holds}")
    store.close()


if __name__ == "__main__":
    main()
