"""Rockets takes in the messages that rockets send and serves the state of each rocket as JSON.

Messages arrive out of order and more than once. A 202 means that the message, or an earlier one of
its number, is on disk, counts once and is in every later answer, whatever crash or power cut comes.

The state of a rocket is a function of the set of its messages, not of their order. So each message
is applied as it comes, by one upsert: changes of speed add up, and message numbers decide which
launch, mission and explosion stand. A table of all messages keeps a redelivery from counting again.
`python rockets.py --help` tells how to run it.
"""

import argparse
import errno
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

if sys.version_info < (3, 11) or sqlite3.sqlite_version_info < (3, 38):
    sys.exit("rockets: at least Python 3.11 and SQLite 3.38 are needed")
try:
    from bottle import HTTP_CODES, Bottle, HTTPError, HTTPResponse, request, response, static_file
    from waitress import create_server, wasyncore
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError, TransferEncodingNotImplemented
    from waitress.task import Task, WSGITask
except ImportError as error:
    sys.exit(f"rockets: {error}; install it with: python3 -m pip install -r requirements.txt")

VERSION = "3.0.0"
MAX_NUMBER = 2**53 - 1  # up to here every JSON parser is exact (RFC 8259)
log = logging.getLogger("rockets")

# SQL ##############################################################################################

# The fields of a rocket: the members of its JSON, in this order, and columns of its table.
ROCKET_FIELDS = ("channel", "type", "speed", "mission", "status", "explosionReason")
ROCKET_FIELDS += ("launchedAt", "updatedAt", "lastMessageNumber", "missingMessages")
STATUSES = ("active", "awaiting_launch", "exploded")
NEVER = MAX_NUMBER + 1  # number until a launch or explosion comes: above any (for a mission: 0)
CREATE_MESSAGES = """
CREATE TABLE IF NOT EXISTS messages (
    channel TEXT NOT NULL, messageNumber INTEGER NOT NULL,
    messageTime TEXT NOT NULL, messageType TEXT NOT NULL, message TEXT NOT NULL,
    PRIMARY KEY (channel, messageNumber)
) STRICT, WITHOUT ROWID"""
# A projection: what the messages add up to. json is the rocket as served, remade at each change.
CREATE_ROCKETS = f"""
CREATE TABLE rockets (
    channel TEXT NOT NULL PRIMARY KEY,
    messageCount INTEGER NOT NULL, speedChange INTEGER NOT NULL,
    lastMessageNumber INTEGER NOT NULL, updatedAt TEXT NOT NULL,
    launchNumber INTEGER NOT NULL, type TEXT, launchSpeed INTEGER, launchedAt TEXT,
    missionNumber INTEGER NOT NULL, mission TEXT,
    explosionNumber INTEGER NOT NULL, explosionReason TEXT,
    speed INTEGER AS (launchSpeed + speedChange),
    missingMessages INTEGER AS (lastMessageNumber - messageCount),
    status TEXT AS (iif(explosionReason IS NOT NULL, 'exploded',
        iif(type IS NOT NULL, 'active', 'awaiting_launch'))),
    json TEXT NOT NULL AS (
        json_object({", ".join(f"'{field}', {field}" for field in ROCKET_FIELDS)})) STORED
) STRICT, WITHOUT ROWID"""

# The row does not depend on the order of the messages: sums do not, and the lowest or the highest
# number wins whenever it comes. A field that a message lacks is NULL. Only a launch has a :type.
UPSERT = f"""
INSERT INTO rockets AS old (
    channel, messageCount, speedChange,
    lastMessageNumber, updatedAt,
    launchNumber, type, launchSpeed, launchedAt,
    missionNumber, mission,
    explosionNumber, explosionReason
) VALUES (
    :channel, 1, iif(:messageType = 'RocketSpeedDecreased', -1, 1) * coalesce(:by, 0),
    :messageNumber, :messageTime,
    iif(:type IS NULL, {NEVER}, :messageNumber), :type, :launchSpeed,
    iif(:type IS NULL, NULL, :messageTime),
    iif(coalesce(:mission, :newMission) IS NULL, 0, :messageNumber),
    coalesce(:mission, :newMission),
    iif(:reason IS NULL, {NEVER}, :messageNumber), :reason
)
ON CONFLICT (channel) DO UPDATE SET
    -- sums over all messages
    messageCount = old.messageCount + 1,
    speedChange = old.speedChange + excluded.speedChange,
    -- the message with the highest number
    lastMessageNumber = max(old.lastMessageNumber, excluded.lastMessageNumber),
    updatedAt = iif(excluded.lastMessageNumber > old.lastMessageNumber,
        excluded.updatedAt, old.updatedAt),
    -- the launch with the lowest number
    launchNumber = min(old.launchNumber, excluded.launchNumber),
    type = iif(excluded.launchNumber < old.launchNumber, excluded.type, old.type),
    launchSpeed = iif(excluded.launchNumber < old.launchNumber,
        excluded.launchSpeed, old.launchSpeed),
    launchedAt = iif(excluded.launchNumber < old.launchNumber, excluded.launchedAt, old.launchedAt),
    -- the launch or change of mission with the highest number
    missionNumber = max(old.missionNumber, excluded.missionNumber),
    mission = iif(excluded.missionNumber > old.missionNumber, excluded.mission, old.mission),
    -- the explosion with the lowest number
    explosionNumber = min(old.explosionNumber, excluded.explosionNumber),
    explosionReason = iif(excluded.explosionNumber < old.explosionNumber,
        excluded.explosionReason, old.explosionReason)"""
# WHERE skips the update for a message that is in the table messages, and then no row is returned.
# The insert needs no such check: a channel without a rocket has no messages.
UPSERT_IF_NEW = f"""{UPSERT}
WHERE NOT EXISTS (
    SELECT * FROM messages WHERE channel = :channel AND messageNumber = :messageNumber)
RETURNING channel"""
INSERT_MESSAGE = """
INSERT INTO messages (channel, messageNumber, messageTime, messageType, message)
VALUES (:channel, :messageNumber, :messageTime, :messageType, :message)"""
IS_SAME = """
SELECT messageType = :messageType AND message = :message FROM messages  -- the time may differ
WHERE channel = :channel AND messageNumber = :messageNumber"""
SELECT_ROCKET = "SELECT CAST(json AS BLOB) FROM rockets WHERE channel = :channel"  # BLOB: as bytes
MATCHING = """
FROM rockets WHERE (:status IS NULL OR status = :status) AND (:type IS NULL OR type = :type)
    AND (:mission IS NULL OR mission = :mission)
    AND (:q IS NULL OR contains(:q, channel, type, mission))"""  # contains() is in Storage
COUNT_MATCHING = f"SELECT count(*) {MATCHING}"
SORT_KEYS = {field: field for field in ROCKET_FIELDS if field != "explosionReason"}  # a free text
SORT_KEYS |= {field: f"julianday({field})" for field in ("launchedAt", "updatedAt")}  # by UTC
SELECT_ROCKETS = f"""
SELECT CAST(json AS BLOB) {MATCHING}
ORDER BY %(sort)s %(order)s NULLS LAST, channel LIMIT :limit OFFSET :offset"""
COUNT_MESSAGES = "SELECT sum(messageCount) FROM rockets WHERE channel = :channel"  # NULL if none
SELECT_MESSAGES = """
SELECT messageNumber, CAST('{"metadata":' || json_object(
    'channel', channel, 'messageNumber', messageNumber,
    'messageTime', messageTime, 'messageType', messageType
) || ',"message":' || message || '}' AS BLOB) FROM messages
WHERE channel = :channel AND messageNumber > :after AND messageNumber < :before
ORDER BY messageNumber %(order)s LIMIT :limit + 1"""  # one more tells whether there are more
SUMS_AGREE = """
SELECT (SELECT count(*) FROM messages) = (SELECT coalesce(sum(messageCount), 0) FROM rockets)"""
# missingMessages needs total(), as sum() fails beyond 2**63.
COUNT_ALL = """
SELECT count(*), coalesce(sum(messageCount), 0), CAST(total(missingMessages) AS INTEGER)
FROM rockets"""
COUNT_BY_STATUS = "SELECT status, count(*) FROM rockets GROUP BY status"
COUNT_BY_FIELD = """
SELECT %(field)s, count(*) FROM rockets WHERE %(field)s IS NOT NULL GROUP BY %(field)s
ORDER BY count(*) DESC, %(field)s LIMIT 100"""  # enough for a menu

# Messages #########################################################################################

MAX_BODY = 16 * 1024  # bytes; a real message has about 300
MAX_NAME = 256  # characters
MAX_SPEED = 2**31 - 1
DATE_AND_TIME = r"\d{4}-\d\d-\d\dT([01]\d|2[0-3]):\d\d:\d\d(\.\d+)?"  # no 24:00, by RFC 3339
UTC_OFFSET = r"(Z|[+-](0\d|1[0-3]):[0-5]\d|[+-]14:00)"  # SQLite's julianday() takes no more
TIME_WORDS = "an RFC 3339 time with an offset up to 14:00, such as 2022-02-02T19:39:05+01:00"

# A rule: what a value must be, in words, and a function that returns what is kept of it, or raises.
Rule = tuple[str, Callable]


def whole(lowest: int, highest: int) -> Rule:
    def keep(value: Any) -> int:
        if type(value) not in (int, float) or not lowest <= value <= highest or value % 1:
            raise ValueError  # for a bool, too, as its type is neither
        return int(value)

    return f"a whole number from {lowest} to {highest}", keep


def text(words: str, pattern: str, convert: Callable[[str], Any] = str) -> Rule:
    def keep(value: Any) -> Any:
        if not re.fullmatch(pattern, value):  # raises TypeError if the value is no text
            raise ValueError
        return convert(value)

    return words, keep


def one_of(choices: Collection[str]) -> Rule:
    return text(f"one of {', '.join(choices)}", "|".join(choices))


def digits(lowest: int, highest: int) -> Rule:
    words, keep = whole(lowest, highest)
    return text(words, "[0-9]+", lambda value: keep(int(value)))


def keep_time(value: str) -> str:
    datetime.fromisoformat(value.upper())  # raises ValueError if there is no such time
    return value.upper()


OBJECT = ("an object", dict.copy)  # raises TypeError if the value is no dict
NAME_WORDS = f"a text of 1 to {MAX_NAME} characters, no NUL, no lone surrogate"
NAME = text(NAME_WORDS, rf"[^\0\ud800-\udfff]{{1,{MAX_NAME}}}")
SPEED = whole(0, MAX_SPEED)
MESSAGE_TYPES = {
    "RocketLaunched": {"type": NAME, "launchSpeed": SPEED, "mission": NAME},
    "RocketSpeedIncreased": {"by": SPEED},
    "RocketSpeedDecreased": {"by": SPEED},
    "RocketExploded": {"reason": NAME},
    "RocketMissionChanged": {"newMission": NAME},
}
# Every field of every type, as None. The upsert has a parameter for each; a message gives a few.
NO_FIELDS = dict.fromkeys(field for fields in MESSAGE_TYPES.values() for field in fields)
KEY_RULES = {"channel": text("a UUID", "(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", str.lower)}
METADATA_RULES = KEY_RULES | {
    "messageNumber": whole(1, MAX_NUMBER),
    "messageTime": text(TIME_WORDS, f"(?ai){DATE_AND_TIME}{UTC_OFFSET}", keep_time),
    "messageType": one_of(MESSAGE_TYPES),
}

MAX_PAGE = 1000  # rockets or messages in one answer
MAX_SEARCH = 64  # characters of q, which is looked for in every rocket
PAGE_RULES = {"order": one_of(("asc", "desc")), "limit": digits(1, MAX_PAGE)}
ROCKETS_RULES = PAGE_RULES | {
    "sort": one_of(SORT_KEYS),
    "offset": digits(0, MAX_NUMBER),
    "status": one_of(STATUSES),
    "type": ("a text", str),  # never fails, as a query holds only texts
    "mission": ("a text", str),
    "q": text(f"at most {MAX_SEARCH} characters", f"(?s).{{0,{MAX_SEARCH}}}", str.casefold),
}
MESSAGES_RULES = PAGE_RULES | {"after": digits(0, MAX_NUMBER), "before": digits(1, MAX_NUMBER + 1)}
DEFAULTS = dict.fromkeys(ROCKETS_RULES) | {"sort": "channel", "order": "asc", "limit": MAX_PAGE}
DEFAULTS |= {"offset": 0, "after": 0, "before": MAX_NUMBER + 1}


def read_fields(holder: dict, rules: dict[str, Rule], prefix: str = "") -> dict:
    """Return the fields that the rules name, converted. Raise HTTPError(400) for a bad one."""
    kept = {}
    for field, (words, keep) in rules.items():
        try:
            kept[field] = keep(holder.get(field))
        except (ValueError, TypeError):
            got = json.dumps(holder[field])[:100] if field in holder else "nothing"
            raise HTTPError(400, f"{prefix}{field} must be {words}, got {got}") from None
    return kept


from_json = json.JSONDecoder(parse_constant=int).decode  # int("NaN") raises ValueError
to_json = json.JSONEncoder(  # equal contents become equal texts, for IS_SAME
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True
).encode


def parse_message(body: bytes) -> dict:
    """Return the SQL parameters of a message. Raise HTTPError(400 or 413) for a bad body."""
    if len(body) > MAX_BODY:
        raise HTTPError(413, f"the body must be at most {MAX_BODY} bytes long")
    try:
        sent = read_fields({"body": from_json(body.decode())}, {"body": OBJECT})  # an object?
        parts = read_fields(sent["body"], {"metadata": OBJECT, "message": OBJECT})
        metadata = read_fields(parts["metadata"], METADATA_RULES, "metadata.")
        fields = read_fields(parts["message"], MESSAGE_TYPES[metadata["messageType"]], "message.")
        content = to_json(parts["message"] | fields)  # as converted; unknown fields are kept
        content.encode()  # raises ValueError for a lone surrogate
    except (ValueError, RecursionError) as error:
        must = "the body must be JSON in UTF-8, with finite numbers and no lone surrogates"
        raise HTTPError(400, f"{must}: {str(error)[:100]}") from error
    return NO_FIELDS | fields | metadata | {"message": content}


# Storage ##########################################################################################

OURS = 0x524B_0000  # marks our files: "RK" is the upper half of user_version
SCHEMA_VERSION = OURS + 5  # the lower half counts up; a file of an earlier version is rebuilt
SETTINGS = """
PRAGMA temp_store = MEMORY;  -- sorting and counting need no room on the disk
PRAGMA trusted_schema = ON;  -- allows json_object() in a table; some builds turn it off
PRAGMA secure_delete = OFF;  -- a reset then writes no zeros, which would need room in the WAL
PRAGMA synchronous = FULL;  -- NORMAL may lose the last commits in a power cut
PRAGMA fullfsync = ON;  -- on macOS, empty the drive's cache, too
PRAGMA journal_size_limit = 16777216;  -- bytes; a checkpoint cuts a longer WAL to this"""
BACKUP_HINT = "; if a backup was copied over it, delete its -wal and copy the backup again"


class Unavailable(HTTPError):
    """The database cannot do what it was asked for: it is locked, full, failing or gone."""

    def __init__(self, why: str):
        super().__init__(503, f"the database is not available: {why}; try again", Retry_After="1")


def contains(part: str, *texts: str | None) -> bool:
    """Tell whether a text contains a part, ignoring case. The caller has case-folded the part."""
    return any(part in each.casefold() for each in texts if each)


class Store:
    """One SQLite file, for the thread that opened it. What uses it may raise Unavailable."""

    def __init__(self, path: str):
        """Open or create the file. Raise OSError if it cannot be used."""
        self.is_in_transaction = False  # not connection.in_transaction: SQLite may end it early
        self.commits = 0  # counts those that changed something, for metrics.txt
        self.opened_at, self.checked_at = time.time(), time.monotonic()
        path = os.path.realpath(path)  # SQLite makes its other files beside the target of a link
        wal = f"{path}-wal"
        try:
            if os.path.exists(wal) and not (os.path.exists(path) and os.path.getsize(path)):
                raise OSError(f"it is gone or empty, but {wal} is there; delete that to start anew")
            open(path, "ab").close()  # raises OSError if the file cannot be written
            self.connection = sqlite3.connect(path, isolation_level=None)
            self.close = self.connection.close  # closing moves the WAL into the file
            self.prepare()
            self.inodes = {name: os.stat(name).st_ino for name in (path, wal, f"{path}-shm")}
        except (Unavailable, sqlite3.Error, OSError) as error:  # str() of an Unavailable is its why
            hint = BACKUP_HINT if type(error) is sqlite3.DatabaseError else ""  # means damage
            raise OSError(f"cannot use {path} as the database: {error}{hint}") from error

    def prepare(self) -> None:
        """Set the connection up, and make the tables if need be."""
        self.connection.create_function("contains", -1, contains)
        self.connection.executescript(SETTINGS)
        ((version,),) = self.execute("PRAGMA user_version")
        ((tables,),) = self.execute("SELECT count(*) FROM sqlite_schema")
        is_ours = OURS < version <= SCHEMA_VERSION
        if (tables or version) and not is_ours:  # a new file has neither
            raise OSError("another program, or a later version of this one, wrote it")
        if version < SCHEMA_VERSION:
            say = log.warning if tables else log.debug  # a new file needs no warning
            say("making the rockets anew from the messages")
            with self.transaction():
                self.rebuild(version)
            say("made the rockets anew")
        self.execute("PRAGMA journal_mode = WAL")  # others read while this writes
        if self.execute(SUMS_AGREE) != [(True,)]:
            raise sqlite3.DatabaseError("its rockets do not count all of its messages")
        self.execute("PRAGMA busy_timeout = 0")  # from now on, wait for no other program's lock

    def rebuild(self, version: int) -> None:
        """Make the tables, and all rockets from the messages, without validating these again."""
        self.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # first, as it takes the lock
        if OURS < version < OURS + 5:  # before version 5, these columns had other names
            for old in ("number", "time", "type"):
                self.execute(f"ALTER TABLE messages RENAME COLUMN {old} TO message{old.title()}")
        self.execute(CREATE_MESSAGES)
        self.execute("DROP TABLE IF EXISTS rockets")
        self.execute(CREATE_ROCKETS)
        for *row, content in self.connection.execute("SELECT * FROM messages"):  # one at a time
            metadata = dict(zip(METADATA_RULES, row))  # in the order of the columns
            message = json.loads(content)
            fields = {field: message[field] for field in MESSAGE_TYPES[metadata["messageType"]]}
            self.execute(UPSERT, NO_FIELDS | fields | metadata)

    def reset(self) -> None:
        """Forget all messages and rockets, and give their room back to the disk."""
        with self.transaction():
            self.execute("DELETE FROM messages")
            self.execute("DELETE FROM rockets")
        self.execute("VACUUM")
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def execute(self, sql: str, parameters: dict | tuple = ()) -> list[tuple]:
        """Run a statement and return its rows."""
        try:
            return self.connection.execute(sql, parameters).fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # a mistake in the SQL
                raise
            raise Unavailable(str(error)) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what is done within, or roll it back. Within another transaction, join it."""
        if self.is_in_transaction:
            yield
            return
        self.is_in_transaction, self.callbacks = True, []
        changes = self.connection.total_changes
        try:
            with self.connection:  # rolls back if something fails, COMMIT included
                self.execute("BEGIN")
                yield
                self.execute("COMMIT")  # here, so that most of its errors become Unavailable
        finally:
            self.is_in_transaction = False
        self.commits += self.connection.total_changes > changes
        for callback, *arguments in self.callbacks:
            callback(*arguments)

    def on_commit(self, callback: Callable, *arguments: Any) -> None:
        """Call back after the commit, never after a rollback; at once outside a transaction."""
        if self.is_in_transaction:
            self.callbacks.append((callback, *arguments))
        else:
            callback(*arguments)

    def apply(self, message: dict) -> str:
        """Count and keep a message. Return 'applied', 'duplicate' or 'conflicting'."""
        self.check_files()
        with self.transaction():
            if self.execute(UPSERT_IF_NEW, message):
                self.execute(INSERT_MESSAGE, message)
                return "applied"
            ((is_same,),) = self.execute(IS_SAME, message)
            return "duplicate" if is_same else "conflicting"

    def check_files(self) -> None:
        """Raise Unavailable unless the open files still have their names. Look once a second."""
        if time.monotonic() < self.checked_at + 1:  # a stat() of the WAL slows its next sync
            return
        for name, inode in self.inodes.items():
            if not os.path.exists(name) or os.stat(name).st_ino != inode:
                raise Unavailable("a file of the database was deleted, moved or replaced")
        self.checked_at = time.monotonic()

    def probe(self) -> None:
        """Find out whether messages can be stored, by a write that changes nothing."""
        self.check_files()
        self.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def tag(self) -> str:
        """Return an ETag that changes with each write, of this process or of another one."""
        ((version,),) = self.execute("PRAGMA data_version")  # changes with commits of others
        return f'"{self.opened_at}-{version}-{self.connection.total_changes}"'


# HTTP #############################################################################################

STATIC = Path(__file__).resolve().parent / "static"
PROBLEM = "application/problem+json"
# Other sites' pages may read. Browsers revalidate each time, and do not guess another type.
HEADERS = {"Access-Control-Allow-Origin": "*", "Cache-Control": "no-cache"}
HEADERS |= {"X-Content-Type-Options": "nosniff"}
CONFLICT = "message {messageNumber} of {channel} is known; ignored: {messageType} {message!a:.100}"
NEXT = '<?{}>; rel="next"'  # RFC 8288, relative to the address that was asked for
UNKNOWN = "no message has come on this channel"


def add_headers() -> None:
    """Complete an answer's headers. A 500 by an uncaught exception loses them."""
    response.headers.setdefault("Content-Type", "application/json")
    if request.method != "POST":
        response.headers.update(HEADERS)


def with_array(members: dict, name: str, items: list[bytes]) -> bytes:
    """Return a JSON object that ends with an array of items that are JSON already."""
    head = json.dumps(members | {name: []}).removesuffix("]}")
    return head.encode() + b",".join(items) + b"]}\n"


def problem(error: HTTPError) -> str:
    """Return an error as RFC 9457 asks. For errors of waitress, ask() sets the Content-Type."""
    status, detail = error.status_code, error.body
    if status == 405:
        detail = f"{request.path} takes {response.headers['Allow']}, not {request.method}"
    response.content_type = PROBLEM
    return json.dumps({"title": HTTP_CODES[status], "status": status, "detail": detail}) + "\n"


def read_query(rules: dict[str, Rule]) -> dict:
    """Return the parameters given, converted. Raise HTTPError(400) for a bad or unknown one."""
    given = dict(parse_qsl(request.query_string, keep_blank_values=True))  # not .query: Latin-1
    unknown = sorted(given.keys() - rules.keys())
    if unknown:
        known = ", ".join(rules) or "no parameters"
        raise HTTPError(400, f"parameter {unknown[0]!a:.99} is unknown; this address has {known}")
    return read_fields(given, {name: rules[name] for name in given})


def get_file(path: str) -> HTTPResponse:
    return static_file(path, STATIC, etag=False)  # Bottle's ETag is not valid: it has no quotes


class Api:
    """The handlers of all requests, on top of a store."""

    def __init__(self, store: Store):
        self.store, self.started_at = store, time.time()
        self.outcomes = {"applied": 0, "duplicate": 0, "conflicting": 0, "rejected": 0, "failed": 0}
        self.seconds = 0.0  # that POSTs took, with their commits

    def read_tagged_query(self, rules: dict[str, Rule]) -> dict:
        """Return the parameters given, and set the ETag. Raise a 304 if the client has it."""
        given = read_query(rules)
        tag = self.store.tag()
        if tag in request.environ.get("HTTP_IF_NONE_MATCH", ""):
            raise HTTPResponse(status=304, ETag=tag)
        response.headers["ETag"] = tag
        return given

    def post_message(self) -> str:
        began, client = time.perf_counter(), request.environ["REMOTE_ADDR"]
        try:
            origin = request.environ.get("HTTP_ORIGIN")  # browsers tell it with each POST
            if origin and origin.partition("://")[2] != request.environ.get("HTTP_HOST"):
                raise HTTPError(403, "a page of another site must not post messages")
            message = parse_message(request.body.read(MAX_BODY + 1))
            outcome = self.store.apply(message)
        except HTTPError as error:
            outcome = "failed" if isinstance(error, Unavailable) else "rejected"
            self.store.on_commit(self.report, began, client, outcome, error.body)
            raise
        why = CONFLICT.format_map(message) if outcome == "conflicting" else ""
        self.store.on_commit(self.report, began, client, outcome, why)
        response.status = 202  # also for a conflict: after an error, its sender would repeat it
        return '{"status": "applied"}\n' if outcome == "applied" else '{"status": "duplicate"}\n'

    def report(self, began: float, client: str, outcome: str, why: str) -> None:
        """Count a POST, and log why, if given. On commit: after a rollback, ask() repeats it."""
        self.outcomes[outcome] += 1
        self.seconds += time.perf_counter() - began
        if why:
            log.warning("a message of %s is %s: %.300s", client, outcome, why)

    def get_rockets(self) -> bytes:
        given = self.read_tagged_query(ROCKETS_RULES)
        query = DEFAULTS | given
        sort, order = query["sort"], query["order"]
        select = SELECT_ROCKETS % {"sort": SORT_KEYS[sort], "order": order}
        rockets = [rocket for (rocket,) in self.store.execute(select, query)]
        ((total,),) = self.store.execute(COUNT_MATCHING, query)
        end = query["offset"] + len(rockets)
        if end < total:
            response.headers["Link"] = NEXT.format(urlencode(given | {"offset": end}))
        members = {"count": len(rockets), "total": total, "sort": sort, "order": order}
        return with_array(members, "rockets", rockets)

    def get_rocket(self, channel: str) -> bytes:
        key = read_fields({"channel": channel}, KEY_RULES)
        self.read_tagged_query({})
        for (rocket,) in self.store.execute(SELECT_ROCKET, key):  # at most one
            return rocket + b"\n"
        raise HTTPError(404, UNKNOWN)

    def get_messages(self, channel: str) -> bytes:
        key = read_fields({"channel": channel}, KEY_RULES)
        given = self.read_tagged_query(MESSAGES_RULES)
        ((total,),) = self.store.execute(COUNT_MESSAGES, key)
        if total is None:  # sum() over no row
            raise HTTPError(404, UNKNOWN)
        query = DEFAULTS | given
        order, limit = query["order"], query["limit"]
        rows = self.store.execute(SELECT_MESSAGES % {"order": order}, key | query)
        if len(rows) > limit:
            edge = "after" if order == "asc" else "before"
            response.headers["Link"] = NEXT.format(urlencode(given | {edge: rows[limit - 1][0]}))
        messages = [message for _, message in rows[:limit]]
        members = key | {"count": len(messages), "total": total, "order": order}
        return with_array(members, "messages", messages)

    def count_fleet(self) -> dict:
        """Return the totals, and how many rockets have each status."""
        ((rockets, messages, missing),) = self.store.execute(COUNT_ALL)
        fleet = {"rockets": rockets, "messages": messages, "missingMessages": missing}
        statuses = dict.fromkeys(STATUSES, 0) | dict(self.store.execute(COUNT_BY_STATUS))
        return fleet | {"statuses": statuses}

    def get_fleet(self) -> str:
        self.read_tagged_query({})
        fleet = self.count_fleet()
        for field in ("type", "mission"):
            counts = self.store.execute(COUNT_BY_FIELD % {"field": field})
            fleet[f"{field}s"] = [{field: name, "rockets": count} for name, count in counts]
        return json.dumps(fleet) + "\n"

    def get_health(self) -> str:
        read_query({})
        if self.outcomes["failed"]:  # once a POST has failed, each check writes
            self.store.probe()  # raises Unavailable while nothing can be stored
        ((rockets, messages, _),) = self.store.execute(COUNT_ALL)
        return json.dumps({"status": "ok", "rockets": rockets, "messages": messages}) + "\n"

    def get_metrics(self) -> str:
        read_query({})
        response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        template, posts = (STATIC / "metrics.txt").read_text(), sum(self.outcomes.values())
        return template.format(api=self, posts=posts, version=VERSION, **self.count_fleet())


def create_app(store: Store) -> Bottle:
    """Return the service as a WSGI application."""
    app, api = Bottle(), Api(store)
    app.default_error_handler = problem
    app.add_hook("after_request", add_headers)
    app.post("/messages", callback=api.post_message)
    app.get("/rockets", callback=api.get_rockets)
    app.get("/rockets/<channel>", callback=api.get_rocket)
    app.get("/rockets/<channel>/messages", callback=api.get_messages)
    app.get("/fleet", callback=api.get_fleet)
    app.get("/health", callback=api.get_health)
    app.get("/metrics", callback=api.get_metrics)
    app.get("/static/<path:path>", callback=get_file)
    app.get("/", callback=lambda: get_file("index.html"))
    app.get("/docs", callback=lambda: get_file("docs.html"))
    app.get("/openapi.json", callback=lambda: get_file("openapi.json"))
    return app


# Server ###########################################################################################

MAX_CONNECTIONS = 200  # at a time; macOS allows a process 256 open files
MAX_TURN = 32  # requests answered together
SILENCE = 30  # seconds after which a connection that neither sends nor reads is closed
POLL = 0.2  # seconds that a poll waits; a signal to stop is noticed after it
GRACE_PERIOD = 4  # seconds after a signal to stop in which requests under way are answered
WAITRESS = {
    "threads": 0,  # the loop's own thread does all
    "clear_untrusted_proxy_headers": False,  # the app reads none of them
    "connection_limit": MAX_CONNECTIONS + 3,  # 2 listeners count, and close_silent() needs 1 extra
    "max_request_header_size": 16 * 1024,  # bytes; a larger one gets a 431
    "max_request_body_size": 64 * 1024 + 1,  # bytes; the first size that waitress refuses
    "outbuf_overflow": sys.maxsize,  # bytes; no temporary files, as the disk may be full
    "outbuf_high_watermark": sys.maxsize,  # bytes; nothing waits for a client to read
}


class Request(HTTPRequestParser):
    """A request of waitress, with checks of RFC 9112 that waitress does not make."""

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the first line and the headers. Raise ParsingError for a 400."""
        if b" " * 64 in header_plus.replace(b"\t", b" "):  # in waitress, they take quadratic time
            raise ParsingError("a header must have less than 64 blanks in a row")
        try:
            super().parse_header(header_plus)
        except (ValueError, TransferEncodingNotImplemented) as error:  # bad URL or coding: a 400
            raise ParsingError(str(error)) from error
        head = header_plus.lower().translate(None, b" \t")  # without blanks
        codings = re.findall(rb"\ntransfer-encoding:(.*)\r", head)  # waitress drops this header
        is_alone = codings == [b"chunked"] and "CONTENT_LENGTH" not in self.headers
        if codings and not (is_alone and self.version == "1.1"):
            raise ParsingError("Transfer-Encoding must be chunked, alone, in HTTP/1.1")
        if self.version == "1.1" and head.count(b"\nhost:") != 1:
            raise ParsingError("there must be exactly one Host")


class AnswerTask(Task):
    """Sends the answer of its connection, which waitress calls channel."""

    def execute(self) -> None:
        self.status, self.response_headers, body = self.channel.answer
        self.content_length = len(body)
        head = self.build_response_header()
        self.wrote_header = True  # else finish() writes it again
        self.channel.write_soon(head + body)  # in one packet, if it fits
        error = self.request.error  # set if waitress refused the request, unseen by handlers
        level = logging.WARNING if error else logging.INFO
        what = error.body if error else self.request.first_line
        log.log(level, "%s %s %.300a", self.status[:3], self.channel.addr[0], what)


class Connection(HTTPChannel):
    """A connection of waitress. Its answer (status, headers, body) is held until the commit."""

    parser_class, task_class, error_task_class = Request, AnswerTask, AnswerTask
    handle_expt = HTTPChannel.handle_close  # closes at TCP's urgent data, which HTTP does not use

    def received(self, data: bytes) -> bool:
        """Refuse data that begins with no letter, such as TLS: its header would never end."""
        is_http = self.request or data[:1].isalpha()
        return super().received(data if is_http else b"?\r\n\r\n")  # no start line: a 400

    def is_ready(self) -> bool:
        return not self.writable() or not self.connected  # all is sent, or nobody reads it

    def ask(self) -> int:
        """Ask the app about the first request, hold its answer and return the status."""
        first = self.requests[0]
        if first.error:  # waitress refuses it, and no app sees it
            first.headers["CONNECTION"] = "close"  # build_response_header() looks there
            error = HTTPError(first.error.code, first.error.body)
            self.answer = error.status_line, [("Content-Type", PROBLEM)], problem(error).encode()
            return error.status_code
        environ = WSGITask(self, first).get_environment()
        environ["wsgi.input"].seek(0)  # a second ask() reads the body again
        started: list = []  # status and headers, which the app gives to start_response()
        body = b"".join(self.server.application(environ, lambda *args: started.extend(args)))
        self.answer = started[0], started[1], body
        return int(started[0][:3])


class Server:
    """Serves an app on waitress's own loop, in turns.

    A turn receives what has come, asks the app about all of it in one transaction, commits, and
    only then answers. So messages that come together share a disk sync. If the transaction fails,
    each request is asked about again, by itself. Turns reach 1.3, 3.0 and 14.6 times the rate of
    one thread of waitress that commits each message, with 1, 3 and 20 senders.

    waitress polls, accepts, parses and sends. Three things of it are replaced: its threads by
    turn(), as there is one writer; its tasks by AnswerTask, as an answer waits for the commit; and
    its closing of silent connections by close_silent(), as waitress keeps one that never reads.
    """

    def __init__(self, app: Bottle, store: Store, sockets: list[socket.socket]):
        self.store, self.stopping = store, False
        self.arrived: list[Connection] = []  # have a whole request; waitress appends to this list
        self.map: dict[int, Any] = {}  # what waitress polls, by file descriptor
        create_server(app, map=self.map, sockets=sockets, **WAITRESS)  # puts listeners in the map
        self.listeners = [each for each in self.map.values() if each.accepting]
        for listener in self.listeners:
            listener.channel_class, listener.add_task = Connection, self.arrived.append
            listener.trigger.close()  # there is no other thread to wake
            listener.pull_trigger = lambda: None

    def stop(self, *_: Any) -> None:  # a signal handler
        self.stopping = True

    def run(self) -> None:
        """Serve until stopped. Then answer what is under way, within the grace period."""
        while not self.stopping:
            self.turn()
        self.receive(0)  # accepts the connections that wait
        for listener in self.listeners:
            listener.close()
        end = time.monotonic() + GRACE_PERIOD
        while time.monotonic() < end and any(  # whole requests, part of one, or unsent bytes
            each.requests or each.request or each.writable() for each in self.map.values()
        ):
            self.turn()

    def turn(self) -> None:
        """Receive what comes, and answer what is ready, up to MAX_TURN requests."""
        self.receive(0 if any(each.is_ready() for each in self.arrived) else POLL)
        ready = [each for each in self.arrived if each.is_ready()][:MAX_TURN]
        self.arrived[:] = [each for each in self.arrived if each not in ready]  # waitress appends
        if not ready:
            return
        try:
            with self.store.transaction():
                if any(connection.ask() >= 500 for connection in ready):  # stops at the first
                    raise Unavailable("a request failed")  # rolls back; nobody reads the words
        except (Unavailable, sqlite3.Error):  # COMMIT may raise more than execute() translates
            for connection in ready:
                connection.ask()
        for connection in ready:
            connection.service()  # of waitress: runs an AnswerTask, and drops the request
            if connection.connected:
                connection.handle_write()  # if it is to be closed, closes it now, not a turn later

    def receive(self, seconds: float) -> None:
        """Poll. While polls bring new connections, poll again for their requests."""
        known = 0
        while len(self.map) > known:
            known = len(self.map)
            wasyncore.loop(seconds, use_poll=True, map=self.map, count=1)
            seconds = 0
        # Not in a poll: whoever is accepted then could get a closed one's descriptor and events.
        self.close_silent()

    def close_silent(self) -> None:
        """Close connections silent too long and, if there are too many, the longest idle one."""
        now = time.time()
        connections = [each for each in self.map.values() if not each.accepting]
        for connection in connections:
            if abs(now - connection.last_activity) > SILENCE:  # the clock may be set back
                connection.handle_close()
        idle = [each for each in connections if not each.requests]
        if len(connections) > MAX_CONNECTIONS and idle:
            min(idle, key=lambda each: each.last_activity).handle_close()


# Command line #####################################################################################


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen. localhost is 127.0.0.1, and ::1 if it exists. Raise OSError."""
    sockets = []
    for address in ("127.0.0.1", "::1") if host == "localhost" else (host,):
        try:
            family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
            sockets.append(socket.create_server((address, port), family=family))
        except (OSError, UnicodeError, OverflowError) as error:
            if not sockets or getattr(error, "errno", 0) == errno.EADDRINUSE:  # else: no ::1, fine
                raise OSError(f"cannot listen on {address} port {port}: {error}") from error
        port = sockets[0].getsockname()[1]  # for port 0, what the system chose
    return sockets


def main() -> None:
    """Read the options, and serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(
        description="Take in what rockets send, and serve their state as JSON.",
        epilog="HOST, PORT and DATABASE in the environment stand in for the options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda why: sys.exit(f"rockets: {why}")  # one line, like every other error
    option = parser.add_argument
    option("--host", default=os.environ.get("HOST") or "localhost", help="address to listen on")
    option("--port", default=os.environ.get("PORT") or "8088", type=int, help="0 takes a free one")
    option("--database", default=os.environ.get("DATABASE") or "rockets.db", help="SQLite file")
    option("--reset", action="store_true", help="start from an empty database")
    option("--verbose", action="store_true", help="log each request")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel("INFO" if options.verbose else "WARNING")
    logging.getLogger("waitress").setLevel("ERROR")  # hides its warning of too many connections
    try:
        sockets = listen(options.host, options.port)
        store = Store(options.database)
        if options.reset:
            store.reset()
        ((rockets, messages, _),) = store.execute(COUNT_ALL)
    except (Unavailable, OSError) as error:
        sys.exit(f"rockets: {error}")
    server = Server(create_app(store), store, sockets)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    host = f"[{options.host}]" if ":" in options.host else options.host
    where = f"http://{host}:{sockets[0].getsockname()[1]}"
    found = f"{options.database} holds {rockets} rockets and {messages} messages"
    print(f"Rockets listens on {where}, {found}", flush=True)
    server.run()
    store.close()


if __name__ == "__main__":
    main()
