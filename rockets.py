"""Rockets takes in what rockets in flight report and serves their current state as JSON.

Messages arrive out of order and more than once. A 202 means that this message (or the first one
with its number) is on disk, counts exactly once and is in every later answer; neither a crash nor
a power cut takes it back.

The idea: the state of a rocket is a function of the set of its messages, not of their order. So
each message counts as it comes, by one upsert: changes of speed add up, and message numbers decide
which launch, mission and explosion stand. A log of all messages, written in the same transaction,
keeps a redelivery from counting again. `python rockets.py --help` tells how to run it.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import sys
import time
import uuid
import zlib
from bisect import bisect_left
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from bottle import HTTP_CODES, Bottle, HTTPError, HTTPResponse, request, response
from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError, TransferEncodingNotImplemented
from waitress.task import Task, WSGITask
from waitress.utilities import BadRequest, RequestEntityTooLarge

try:
    import resource
except ImportError:  # on Windows
    resource = None

VERSION = "2.0.0"
STATIC = Path(__file__).resolve().parent / "static"

MAX_BODY = 64 * 1024  # bytes; a real message has about 300, a larger body gets a 413
TOO_LARGE = f"the body must be at most {MAX_BODY} bytes long"
MAX_READ = 1024 * 1024  # bytes of a body that are read, so that its sender comes to see the 413
MAX_DEPTH = 800  # levels of objects and arrays; SQLite reads at most 1,000
MAX_TEXT = 256  # characters
MAX_SPEED = 2**31 - 1
MAX_NUMBER = 2**53 - 1  # up to here every JSON parser reads whole numbers exactly (RFC 8259, 6)
MAX_PAGE = 10_000  # rockets or messages in one answer; all others wait while it is made
MAX_HISTORY = 4 * 1024 * 1024  # bytes; an answer of messages ends with the one that exceeds it
MAX_TURN = 32  # requests answered together, lest a crowd that asks for lists stop all else
MAX_CONNECTIONS = 1000 if resource else 500  # at a time; select() on Windows takes 512
MAX_POLLS = 100  # in a row, while each brings a new connection
OTHER_FILES = 25  # file descriptors that are opened beside those of connections, at most
CHANNEL_TIMEOUT = 120  # seconds in which a client neither sends nor reads anything
IDLE = 0.2  # seconds until a signal to stop is noticed while nothing comes
GRACE_PERIOD = 4  # seconds after a signal to stop in which requests under way are answered
BUSY_TIMEOUT = 4  # seconds that a start waits for another process's lock; requests don't
CLOCK_STEP = 3 * 10**9  # nanoseconds; more than the coarsest time of a file system (FAT: 2 s)
LOOK_AGAIN = 10**8  # nanoseconds until files are looked at though their folder is unchanged
FAILURE_SHOWN = 30  # seconds that /health tells of a failed write, unless another succeeds

log = logging.getLogger("rockets")

# SQL ##############################################################################################

SCHEMA_VERSION = 0x524B_0004  # the user_version: "RK" marks our files, 16 bits are the version
NO_NUMBER = MAX_NUMBER + 1  # of a launch or explosion not known yet, as the lowest number wins

MESSAGES_TABLE = """
CREATE TABLE messages (
    channel TEXT NOT NULL, number INTEGER NOT NULL, time TEXT NOT NULL, type TEXT NOT NULL,
    message TEXT NOT NULL, PRIMARY KEY (channel, number)
) STRICT, WITHOUT ROWID"""

# The projection of the log. Each _number tells which message the columns up to the next _number
# come from. Each _utc is the _at before it in UTC, spelled so that ORDER BY sorts instants. json is
# the rocket as it is served, made once for each message rather than for each answer.
ROCKETS_TABLE = """
CREATE TABLE rockets (
    channel TEXT NOT NULL PRIMARY KEY, messages INTEGER NOT NULL, speed_change INTEGER NOT NULL,
    last_number INTEGER NOT NULL, updated_at TEXT NOT NULL, updated_utc TEXT NOT NULL,
    launch_number INTEGER NOT NULL,
    type TEXT, launch_speed INTEGER, launched_at TEXT, launched_utc TEXT,
    mission_number INTEGER NOT NULL, mission TEXT,
    explosion_number INTEGER NOT NULL, reason TEXT,
    missing INTEGER AS (last_number - messages),
    speed INTEGER AS (launch_speed + speed_change),
    status TEXT AS (
        iif(reason NOTNULL, 'exploded', iif(type NOTNULL, 'active', 'awaiting_launch'))),
    json TEXT NOT NULL AS (json_object(
        'channel', channel, 'type', type, 'speed', speed, 'mission', mission, 'status', status,
        'explosionReason', reason, 'launchedAt', launched_at, 'updatedAt', updated_at,
        'lastMessageNumber', last_number, 'missingMessages', missing)) STORED
) STRICT, WITHOUT ROWID"""

# In whatever order messages come, they leave the same row: sums don't depend on order, and the
# lowest or highest number wins whenever it comes.
UPSERT = f"""
INSERT INTO rockets (
    channel, messages, speed_change,
    last_number, updated_at, updated_utc,
    launch_number, type, launch_speed,
    launched_at, launched_utc,
    mission_number, mission,
    explosion_number, reason
) VALUES (
    :channel, 1, iif(:messageType = 'RocketSpeedDecreased', -1, 1) * ifnull(:by, 0),
    :messageNumber, :messageTime, :utc,
    iif(:type ISNULL, {NO_NUMBER}, :messageNumber), :type, :launchSpeed,
    iif(:type ISNULL, NULL, :messageTime), iif(:type ISNULL, NULL, :utc),
    iif(ifnull(:mission, :newMission) ISNULL, 0, :messageNumber), ifnull(:mission, :newMission),
    iif(:reason ISNULL, {NO_NUMBER}, :messageNumber), :reason
)
ON CONFLICT (channel) DO UPDATE SET
    -- sums over all messages
    messages = messages + 1,
    speed_change = speed_change + excluded.speed_change,
    -- the message with the highest number
    last_number = max(last_number, excluded.last_number),
    updated_at = iif(excluded.last_number > last_number, excluded.updated_at, updated_at),
    updated_utc = iif(excluded.last_number > last_number, excluded.updated_utc, updated_utc),
    -- the launch with the lowest number
    launch_number = min(launch_number, excluded.launch_number),
    type = iif(excluded.launch_number < launch_number, excluded.type, type),
    launch_speed = iif(excluded.launch_number < launch_number, excluded.launch_speed, launch_speed),
    launched_at = iif(excluded.launch_number < launch_number, excluded.launched_at, launched_at),
    launched_utc = iif(excluded.launch_number < launch_number, excluded.launched_utc, launched_utc),
    -- the launch or mission change with the highest number
    mission_number = max(mission_number, excluded.mission_number),
    mission = iif(excluded.mission_number > mission_number, excluded.mission, mission),
    -- the explosion with the lowest number
    explosion_number = min(explosion_number, excluded.explosion_number),
    reason = iif(excluded.explosion_number < explosion_number, excluded.reason, reason)"""
# WHERE guards the update; a channel that has no row yet has no message to repeat either.
UPSERT_IF_NEW = f"""{UPSERT}
WHERE NOT EXISTS (SELECT * FROM messages WHERE channel = :channel AND number = :messageNumber)"""

ADD_TO_LOG = """
INSERT INTO messages (channel, number, time, type, message)
VALUES (:channel, :messageNumber, :messageTime, :messageType, :message)"""
# A time of the log as it is served; an earlier version also kept leap seconds, and t and z.
LOGGED_TIME = "upper(replace(time, ':60', ':59'))"
SELECT_LOG = f"SELECT channel, number, {LOGGED_TIME}, type, message FROM messages"
IS_SAME = """
SELECT type = :messageType AND message = :message FROM messages
WHERE channel = :channel AND number = :messageNumber"""
LOG_AND_ROCKETS_AGREE = """
WITH logged AS (SELECT channel, count(*), max(number) FROM messages GROUP BY channel),
    projected AS (SELECT channel, messages, last_number FROM rockets)
SELECT NOT EXISTS (SELECT * FROM logged EXCEPT SELECT * FROM projected)
    AND NOT EXISTS (SELECT * FROM projected EXCEPT SELECT * FROM logged)"""

STATUSES = ("active", "awaiting_launch", "exploded")
ORDERS = ("asc", "desc")
# What GET /rockets can sort by, with the column to ORDER BY.
SORT_KEYS = {name: name for name in ("channel", "type", "speed", "mission", "status")}
SORT_KEYS |= {"launchedAt": "launched_utc", "updatedAt": "updated_utc"}
SORT_KEYS |= {"lastMessageNumber": "last_number"}

# What goes out as it is, is a BLOB, lest it be decoded.
SELECT_ROCKET = "SELECT CAST(json AS BLOB) FROM rockets WHERE channel = :channel"
MATCHING = """
FROM rockets WHERE (:status ISNULL OR status = :status) AND (:type ISNULL OR type = :type)
    AND (:mission ISNULL OR mission = :mission)
    AND (:q ISNULL OR contains(:q, channel, type, mission))"""
COUNT_MATCHING = f"SELECT count(*) {MATCHING}"
SELECT_ROCKETS = {  # for each of SORT_KEYS and ORDERS; nothing in it comes from a request
    (sort, order): f"""SELECT CAST(json AS BLOB) {MATCHING}
ORDER BY {column} {order} NULLS LAST, channel LIMIT :limit OFFSET :offset"""
    for sort, column in SORT_KEYS.items()
    for order in ORDERS
}
SELECT_HISTORY = f"""
SELECT CAST(json_object('metadata', json_object('channel', channel, 'messageNumber', number,
    'messageTime', {LOGGED_TIME}, 'messageType', type), 'message', json(message)) AS BLOB)
FROM messages WHERE channel = :channel AND number > :after ORDER BY number LIMIT :limit"""
COUNT_ALL = "SELECT count(*), ifnull(sum(messages), 0) FROM rockets"
COUNT_BY_STATUS = "SELECT status, count(*) FROM rockets GROUP BY status"
COUNT_MISSING = "SELECT CAST(total(missing) AS INTEGER) FROM rockets"  # sum() fails beyond 2**63

# Messages #########################################################################################

# words: what a value must be; read(value): what to keep of it, or None if it breaks the rule.
Rule = namedtuple("Rule", "words read")


def whole(lowest: int, highest: int) -> Rule:
    def read(value: Any) -> int | None:
        return value if type(value) is int and lowest <= value <= highest else None  # no bool

    return Rule(f"a whole number from {lowest} to {highest}", read)


def text(words: str, pattern: str, keep: Callable[[re.Match], Any] = re.Match.group) -> Rule:
    fullmatch = re.compile(pattern, re.ASCII).fullmatch

    def read(value: Any) -> Any:
        match = fullmatch(value) if type(value) is str and len(value) <= MAX_TEXT else None
        return match and keep(match)

    return Rule(words, read)


def one_of(choices: Iterable[str]) -> Rule:
    return text(f"one of {', '.join(choices)}", "|".join(choices))


def digits_up_to(highest: int) -> Rule:
    limit = whole(0, highest)
    return text(limit.words, "[0-9]{1,16}", lambda match: limit.read(int(match[0])))


UUID = r"(?i)(?:urn:uuid:)?(\{)?[0-9a-f]{8}(-?)(?:[0-9a-f]{4}\2){3}[0-9a-f]{12}(?(1)\})"
HH_MM = r"(?:[01]\d|2[0-3]):[0-5]\d"
RFC_3339 = rf"(?i)(\d{{4}}-\d\d-\d\d)T({HH_MM}):([0-5]\d)(\.\d+)?(Z|[+-]{HH_MM})"


def read_uuid(match: re.Match) -> str:
    return str(uuid.UUID(match[0].lower()))


def read_time(match: re.Match) -> tuple[str, str] | None:
    """Return a time as it is served, and in UTC, spelled so that texts sort as the instants do."""
    date, clock, second, fraction, offset = match.groups("")
    try:
        instant = datetime.fromisoformat(f"{date}T{clock}{offset.upper()}")
        utc = instant.astimezone(timezone.utc).isoformat()[:16]  # to the minute
    except (ValueError, OverflowError):  # no such day, or outside of the years 1 to 9999
        return None
    return match[0].upper(), f"{utc}:{second}{fraction.rstrip('0.')}"  # datetime cuts at six digits


TIME_WORDS = "an RFC 3339 time with an offset and no leap second, such as 2022-02-02T19:39:05+01:00"
ANY = text(f"a text of at most {MAX_TEXT} characters", r"(?s).*")
OBJECT = Rule("an object", lambda value: value if type(value) is dict else None)
NAME_WORDS = f"a text of 1 to {MAX_TEXT} characters, no NUL, no lone surrogate"
NAME = text(NAME_WORDS, r"[^\0\ud800-\udfff]+")
SPEED = whole(0, MAX_SPEED)
MESSAGE_TYPES = {
    "RocketLaunched": {"type": NAME, "launchSpeed": SPEED, "mission": NAME},
    "RocketSpeedIncreased": {"by": SPEED},
    "RocketSpeedDecreased": {"by": SPEED},
    "RocketExploded": {"reason": NAME},
    "RocketMissionChanged": {"newMission": NAME},
}
# UPSERT wants every parameter; a message has only those of its type.
NO_FIELDS = dict.fromkeys(field for fields in MESSAGE_TYPES.values() for field in fields)
CHANNEL = {"channel": text("a UUID", UUID, read_uuid)}
ENVELOPE = {"metadata": OBJECT, "message": OBJECT}
METADATA = CHANNEL | {
    "messageNumber": whole(1, MAX_NUMBER),
    "messageTime": text(TIME_WORDS, RFC_3339, read_time),
    "messageType": one_of(MESSAGE_TYPES),
}
LIST_QUERY = {
    "sort": one_of(SORT_KEYS),
    "order": one_of(ORDERS),
    "status": one_of(STATUSES),
    **dict.fromkeys(("type", "mission", "q"), ANY),
    "limit": digits_up_to(MAX_PAGE),
    "offset": digits_up_to(MAX_NUMBER),
}
LIST_DEFAULTS = {"sort": "channel", "order": "asc", "limit": MAX_PAGE, "offset": 0}
HISTORY_DEFAULTS = {"after": 0, "limit": 1000}
HISTORY_QUERY = {"after": digits_up_to(MAX_NUMBER), "limit": digits_up_to(MAX_PAGE)}


def read_fields(holder: Any, rules: dict[str, Rule], name: str = "") -> dict:
    """Return what rules keep of the fields they name. Raise HTTPError(400) for one they refuse."""
    if type(holder) is not dict:
        raise HTTPError(400, f"the body must be an object, got {json.dumps(holder)[:100]}")
    kept = {field: rule.read(holder.get(field)) for field, rule in rules.items()}
    for field, value in kept.items():
        if value is None:
            got = json.dumps(holder[field])[:100] if field in holder else "nothing"
            where = f"{name}.{field}" if name else field
            raise HTTPError(400, f"{where} must be {rules[field].words}, got {got}")
    return kept


def read_number(digits: str) -> int | float:
    """Read a number with a fraction or an exponent; `7.0` is whole, as JSON Schema has it."""
    number = float(digits)
    return int(number) if number.is_integer() and abs(number) <= MAX_NUMBER else number


def depth(body: bytes) -> int:
    """Return how many objects and arrays lie within each other; brackets in texts don't count."""
    brackets = re.findall(rb"[\[\]{}]", re.sub(rb'(?s)"(?:[^"\\]|\\.)*"?', b"", body))
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


# int("NaN") raises ValueError, as NaN and Infinity are no JSON.
decode = json.JSONDecoder(parse_constant=int, parse_float=read_number).decode
dump = json.JSONEncoder(separators=(",", ":")).encode
dump_sorted = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True
).encode


def parse_message(body: bytes) -> dict:
    """Turn the body of a POST into the parameters of UPSERT_IF_NEW and ADD_TO_LOG.

    Raise HTTPError(400 or 413) that names the field and the rule it breaks.
    """
    if len(body) > MAX_BODY:
        raise HTTPError(413, TOO_LARGE)
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and depth(body) > MAX_DEPTH:
        raise HTTPError(400, f"the body must have at most {MAX_DEPTH} levels of objects and arrays")
    try:
        envelope = read_fields(decode(body.decode("utf-8-sig")), ENVELOPE)  # without a BOM
        metadata = read_fields(envelope["metadata"], METADATA, "metadata")
        rules = MESSAGE_TYPES[metadata["messageType"]]
        fields = read_fields(envelope["message"], rules, "message")
        sent, utc = metadata["messageTime"]
        content = dump_sorted(envelope["message"])
        content.encode()  # raises for a lone surrogate
    except ValueError as error:
        reason = str(error).partition(";")[0]  # without Python's advice on long numbers
        why = f"in UTF-8, with finite numbers and whole characters: {reason}"
        raise HTTPError(400, f"the body must be JSON {why}") from error
    return NO_FIELDS | fields | metadata | {"messageTime": sent, "utc": utc, "message": content}


def parse_logged(row: tuple[str, int, str, str, str]) -> dict:
    """Turn an entry of the log into the parameters of UPSERT. Raise OSError if it is damaged."""
    channel, number, sent, kind, message = row
    try:
        content = decode(message)
        fields = {name: content[name] for name in MESSAGE_TYPES[kind]}
        sent, utc = METADATA["messageTime"].read(sent)
    except (ValueError, TypeError, LookupError) as error:
        raise OSError(f"message {number} of {channel} in its log is damaged: {error!r}") from error
    metadata = {"channel": channel, "messageNumber": number, "messageType": kind}
    return NO_FIELDS | fields | metadata | {"messageTime": sent, "utc": utc}


# Storage ##########################################################################################


def contains(part: str, *texts: str | None) -> bool:
    """Tell whether a text holds a part of it, whatever the case (Unicode's case folding)."""
    return any(part.casefold() in text.casefold() for text in texts if text)


def connect(path: str, options: str) -> sqlite3.Connection:
    """Open a connection, with options of sqlite.org/uri.html."""
    uri = f"{Path(path).as_uri()}?{options}"
    connection = sqlite3.connect(uri, timeout=BUSY_TIMEOUT, isolation_level=None, uri=True)
    connection.create_function("contains", -1, contains)
    connection.execute("PRAGMA temp_store = MEMORY")  # for sorting, as the disk may be full
    connection.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits
    connection.execute("PRAGMA fullfsync = ON")  # on macOS, empty the drive's cache, too
    connection.execute("PRAGMA checkpoint_fullfsync = ON")
    return connection


def is_as_made(connection: sqlite3.Connection, statement: str) -> bool | None:
    """Tell whether a table is as a statement makes it; None if no table has its name."""
    name = statement.split()[2]
    found = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", [name]).fetchone()
    return found and found[0].split() == statement.split()


def inspect(path: str) -> None:
    """Raise OSError or sqlite3.Error unless the file can be the database; leave it as it is."""
    folder, wal = os.path.dirname(path), f"{path}-wal"
    if not os.access(folder, os.W_OK):
        why = "may not be written" if os.path.isdir(folder) else "does not exist"
        raise OSError(f"the folder {folder} {why}")
    size, wal_size = (os.path.exists(each) and os.path.getsize(each) for each in (path, wal))
    if size and not os.access(path, os.W_OK):
        raise OSError("it may not be written")
    if wal_size and not size:
        raise OSError(f"it is gone, but {wal} is there")  # which SQLite would delete
    has_journal = os.path.exists(f"{path}-journal")
    if not size or (size <= 4096 and has_journal):  # new, or cut short at its first page
        return
    # immutable makes no files beside the database, but reads neither its WAL nor its journal
    with closing(connect(path, "mode=ro" if wal_size else "immutable=1")) as connection:
        check(connection)
        # application_id is a random number of each file; here without the WAL (fileformat2.html)
        with open(path, "rb") as file:
            id_in_file = int.from_bytes(file.read(72)[68:], "big")  # 0: it is only in the WAL yet
        ((id_with_wal,),) = connection.execute("PRAGMA application_id")
        if wal_size and (id_in_file not in (0, id_with_wal) or not is_sound(connection)):
            why = f"{wal} does not belong to it, or one of them is damaged"
            raise OSError(f"{why}; to restore a backup, delete {wal} first")


def check(connection: sqlite3.Connection) -> None:
    """Raise OSError unless a database is empty, or one of ours that this version can read."""
    ((version,),) = connection.execute("PRAGMA user_version")
    ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master")
    if version >> 16 != SCHEMA_VERSION >> 16 and (version or tables):
        raise OSError("another program wrote it")
    if version > SCHEMA_VERSION:
        raise OSError("a later version of this program wrote it")
    if is_as_made(connection, MESSAGES_TABLE) is False:
        raise OSError("its log of messages has a form that this version does not know")


def is_sound(connection: sqlite3.Connection) -> bool:
    """Tell whether SQLite finds no damage, and the rockets agree with the log of messages."""
    try:
        if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            return False
        if not is_as_made(connection, ROCKETS_TABLE):
            return True  # they will be rebuilt
        return bool(connection.execute(LOG_AND_ROCKETS_AGREE).fetchone()[0])
    except sqlite3.OperationalError:  # of the disk, say
        raise
    except sqlite3.DatabaseError:  # damage
        return False


class Store:
    """The rockets and the log of their messages in one SQLite file, for the thread that opened it.

    Its methods raise sqlite3.Error or OSError if the database can't do what they ask for.
    """

    def __init__(self, path: str):
        """Open or create the file. Raise OSError, and leave the file as it was, if that fails."""
        self.callbacks: list[Callable[[], None]] | None = None  # None: no transaction under way
        self.files: dict[str, os.stat_result] = {}  # for verify(), once they are all there
        self.seen: tuple[int, ...] = ()  # what verify() saw when the files were last in place
        self.commits = 0
        path = os.path.realpath(path)  # SQLite makes its files beside the target of a link
        self.folder = os.path.dirname(path)
        try:
            inspect(path)
            self.connection = connect(path, "mode=rwc")
            check(self.connection)  # again: opening it may have rolled back a hot journal
            self.connection.execute("PRAGMA journal_mode = WAL")  # others may read meanwhile
            self.prepare()
            self.read(COUNT_ALL)  # finds damage inside
            self.files = {name: os.stat(name) for name in (path, f"{path}-wal")}
            self.connection.execute("PRAGMA busy_timeout = 0")  # one thread serves all
        except (sqlite3.Error, OSError) as error:
            raise OSError(f"cannot use {path} as the database: {error}") from error

    def prepare(self) -> None:
        """Make the tables; rockets that another version made are rebuilt from the log."""
        version = self.connection.execute("PRAGMA user_version").fetchone()
        tables = (MESSAGES_TABLE, ROCKETS_TABLE)
        if version == (SCHEMA_VERSION,) and all(is_as_made(self.connection, t) for t in tables):
            return
        began = time.monotonic()
        with self.transaction():
            self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # takes the lock
            if is_as_made(self.connection, MESSAGES_TABLE) is None:
                random_id = int.from_bytes(os.urandom(3), "big")
                self.connection.execute(f"PRAGMA application_id = {random_id}")
                self.connection.execute(MESSAGES_TABLE)
            self.connection.execute("DROP TABLE IF EXISTS rockets")
            self.connection.execute(ROCKETS_TABLE)
            ((count,),) = self.read("SELECT count(*) FROM messages")
            logged = map(parse_logged, self.connection.execute(SELECT_LOG))
            self.connection.executemany(UPSERT, show_progress(logged, count))
        if count:
            took = time.monotonic() - began
            log.warning("rebuilt the rockets from %d messages in %.1f s", count, took)

    def reset(self) -> None:
        """Forget all rockets and all messages."""
        with self.transaction():
            self.connection.execute("DELETE FROM rockets")
            self.connection.execute("DELETE FROM messages")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what is done within, or roll it back; be part of the transaction under way."""
        if self.callbacks is not None:
            yield
            return
        self.connection.execute("BEGIN")
        callbacks = self.callbacks = []
        changes = self.connection.total_changes
        try:
            yield
            self.connection.execute("COMMIT")
            self.verify()  # last, as the files may be replaced until the commit is done
        finally:
            self.callbacks = None
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
        self.commits += self.connection.total_changes > changes
        for callback in callbacks:
            callback()

    def on_commit(self, callback: Callable[[], None]) -> None:
        """Call back once the transaction under way is committed, never if that fails.

        At once if there is none, as when a request is asked about by itself.
        """
        if self.callbacks is None:
            callback()
        else:
            self.callbacks.append(callback)

    def verify(self) -> None:
        """Raise OSError unless the files are those that were opened, lest a deleted one be used.

        They are looked at if their folder has changed, and once per LOOK_AGAIN. Not each time: a
        file gets a new timestamp with its first write after a stat(), which is 7 % of a commit.
        """
        now, folder = time.time_ns(), os.stat(self.folder)
        seen = folder.st_dev, folder.st_ino, folder.st_ctime_ns, now // LOOK_AGAIN
        if seen == self.seen:
            return
        for name, opened in self.files.items():
            if not os.path.samestat(os.stat(name), opened):
                raise OSError(f"another file has the name {name}")
        if folder.st_ctime_ns < now - CLOCK_STEP:  # else the next change may have the same time
            self.seen = seen

    def apply(self, message: dict) -> str:
        """Count and keep a message; return 'applied', 'duplicate' or 'conflicting'."""
        with self.transaction():
            if self.connection.execute(UPSERT_IF_NEW, message).rowcount:
                self.connection.execute(ADD_TO_LOG, message)
                return "applied"
            ((same,),) = self.connection.execute(IS_SAME, message)
            return "duplicate" if same else "conflicting"

    def read(self, sql: str, **parameters: Any) -> list[tuple]:
        """Return the rows that a query yields."""
        rows = self.connection.execute(sql, parameters).fetchall()
        self.verify()
        return rows

    def read_json(self, sql: str, budget: float = float("inf"), **parameters: Any) -> list[bytes]:
        """Return the JSON texts that a query yields; stop after the one that exceeds the budget."""
        texts: list[bytes] = []
        for (text,) in self.connection.execute(sql, parameters):
            texts.append(text)
            budget -= len(text)  # bytes
            if budget < 0:
                break
        self.verify()
        return texts

    def state(self) -> str:
        """Return a text that changes with each commit, be it of this process or of another one."""
        ((others,),) = self.read("PRAGMA data_version")
        return f"{others}-{self.connection.total_changes}"

    def close(self) -> None:
        """Close the connection, which folds the write-ahead log into the file."""
        self.connection.close()


def show_progress(items: Iterable, count: int) -> Iterator:
    """Yield the items; on a terminal, show once a second how many of them are done."""
    shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() >= shown + 1 and sys.stderr.isatty():
            shown = time.monotonic()
            bar = "#" * (40 * done // count)
            line = f"[{bar:40}] {done:,} of {count:,} messages"
            print(line, end="\r", file=sys.stderr, flush=True)


# HTTP #############################################################################################

OUTCOMES = ("applied", "duplicate", "conflicting", "rejected", "failed")  # of a message
BUCKETS = "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 +Inf".split()  # seconds
TITLES = HTTP_CODES | {413: "Content Too Large"}  # as RFC 9110 has it; Python before 3.13 has not
JSON, PROBLEM = "application/json", "application/problem+json"
HTML, METRICS = "text/html; charset=utf-8", "text/plain; version=0.0.4; charset=utf-8"
BASE_HEADERS = {"X-Content-Type-Options": "nosniff"}  # keeps browsers from taking JSON for a page
PUBLIC_HEADERS = BASE_HEADERS | {"Access-Control-Allow-Origin": "*"}
PUBLIC_HEADERS |= {"Access-Control-Expose-Headers": "ETag, Link"}
CONFLICT = "message %(messageNumber)d of %(channel)s is known; ignored: %(messageType)s %(message)a"


class Outcomes:
    """What became of messages, by their final answers: for /metrics, /health and the log."""

    def __init__(self):
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.durations = [0] * len(BUCKETS)
        self.seconds = 0.0
        self.failed_at: float | None = None  # time of the last failure; None once one is stored

    def add(self, outcome: str, began: float, about: Any) -> None:
        """Count an outcome, and log what needs attention; about: the message, or its error."""
        now = time.perf_counter()
        self.counts[outcome] += 1
        self.durations[bisect_left(BUCKETS, now - began, key=float)] += 1  # key: of BUCKETS
        self.seconds += now - began
        if outcome == "conflicting":
            log.warning(CONFLICT, about)
        elif outcome == "failed":
            if self.failed_at is None:
                log.error("messages can't be stored: %a", str(about))
            self.failed_at = now
        elif outcome == "applied" and self.failed_at is not None:
            log.warning("messages are stored again")
            self.failed_at = None


def failures_are_503(handler: Callable) -> Callable:
    """Make failures of the database a 503, but not our own mistakes. A Bottle plugin."""

    def handle(**arguments: str) -> Any:
        try:
            return handler(**arguments)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:  # wrong SQL
                raise
            why = f"the database is not available: {error}; try again (messages count only once)"
            raise HTTPError(503, why, Retry_After="1") from error

    return handle


def render(status: int, detail: str) -> str:
    return json.dumps({"title": TITLES[status], "status": status, "detail": detail}) + "\n"


def problem(error: HTTPError) -> str:
    """Render an error as RFC 9457 asks; answer OPTIONS, which is no error but has no route."""
    status, detail = error.status_code, error.body
    allow = response.headers.get("Allow", "").replace("GET", "GET,HEAD")  # Bottle's, of a 405
    is_public = request.method != "POST" and allow != "POST"  # to post is for our own pages
    response.headers.update(PUBLIC_HEADERS if is_public else BASE_HEADERS)
    response.headers["Content-Type"] = PROBLEM
    if status == 405:
        response.headers["Allow"] = allow
        detail = f"{request.path} takes {allow}, not {request.method}"
        if request.method == "OPTIONS":
            response.status = 204  # so Bottle drops what is returned
            response.headers["Access-Control-Allow-Headers"] = "*" if is_public else ""
    return render(status, detail)


def read_query(rules: dict[str, Rule]) -> dict:
    """Return the query parameters that the rules name. Raise HTTPError(400) for one that is bad."""
    pairs = parse_qsl(request.query_string, keep_blank_values=True)
    query = dict(pairs)
    if len(query) < len(pairs):
        raise HTTPError(400, "a query parameter must come only once")
    return read_fields(query, {name: rule for name, rule in rules.items() if name in query})


def check_headers() -> None:
    """Raise HTTPError for a POST by a page of another site, or with a body that is not for us."""
    header = request.environ.get
    site, origin = header("HTTP_SEC_FETCH_SITE"), header("HTTP_ORIGIN")
    if site is None and origin:  # over plain HTTP, browsers send Sec-Fetch-Site to localhost only
        own = origin.partition("://")[2] == header("HTTP_HOST")
        site = "same-origin" if own else "cross-site"
    if site in ("cross-site", "same-site"):
        raise HTTPError(403, "a page of another site must not post messages")
    if (coding := header("HTTP_CONTENT_ENCODING", "").lower()) not in ("", "identity"):
        why = f"the body must come as it is, not as {coding}"
        raise HTTPError(415, why, Accept_Encoding="identity")
    if request.content_length > MAX_BODY:  # before Bottle reads it, into a file if it is large
        raise HTTPError(413, TOO_LARGE)


def getter(make: Callable, kind: str = JSON, tag: Callable[[], str] = lambda: "") -> Callable:
    """Return a handler that answers a GET with what make() returns, or a 404 if that is empty.

    If the client holds the tag, the answer is a 304 (RFC 9110, 13.1.2) without a call of make().
    """

    def handle(**arguments: str) -> bytes:
        current = tag()  # "" is in no If-None-Match
        if_none_match = request.environ.get("HTTP_IF_NONE_MATCH", "")
        is_current = current in re.findall('"[^"]*"', if_none_match)
        body = b"" if is_current else make(**arguments)
        if not body and not is_current:
            raise HTTPError(404, "no message has come on this channel")
        response.headers.update(PUBLIC_HEADERS)
        response.headers.update({"Content-Type": kind, "Cache-Control": "no-cache"})
        if current:
            response.headers["ETag"] = current
        if is_current or (current and if_none_match.strip() == "*"):  # "*": make() found something
            response.status = 304
        return body + b"\n"

    return handle


def with_array(members: dict, name: str, items: list[bytes]) -> bytes:
    """Return a JSON object with an array of items that are JSON already as its last member."""
    return b'%b,"%b":[%b]}' % (dump(members)[:-1].encode(), name.encode(), b",".join(items))


def samples(name: str, label: str, values: dict[str, int]) -> str:
    """Return the lines of a metric that has a value for each value of a label."""
    return "\n".join(f'{name}{{{label}="{key}"}} {value}' for key, value in values.items())


class Api:
    """The handlers of all that the store answers."""

    def __init__(self, store: Store):
        self.store, self.outcomes, self.started = store, Outcomes(), time.time()
        self.metrics = (STATIC / "metrics.txt").read_text().rstrip()
        head = BASE_HEADERS | {"Content-Type": JSON}
        self.applied = HTTPResponse('{"status": "applied"}\n', 202, head)
        self.duplicate = HTTPResponse('{"status": "duplicate"}\n', 202, head)

    def tag(self) -> str:
        """Return an ETag of this address, this state, and this life of the process."""
        address = zlib.crc32(f"{request.path}?{request.query_string}".encode())
        return f'"{self.started}-{self.store.state()}-{address}"'

    def post_message(self) -> HTTPResponse:
        began, outcome, about = time.perf_counter(), "rejected", None
        try:
            check_headers()
            about = parse_message(request.body.read(MAX_BODY + 1))
            outcome = "failed"  # unless apply() returns
            outcome = self.store.apply(about)
        except Exception as error:
            about = error
            raise
        finally:
            self.store.on_commit(partial(self.outcomes.add, outcome, began, about))
        return self.applied if outcome == "applied" else self.duplicate

    def get_rockets(self) -> bytes:
        given = read_query(LIST_QUERY)
        query = dict.fromkeys(LIST_QUERY) | LIST_DEFAULTS | given
        sort, order, limit, offset = map(query.get, ("sort", "order", "limit", "offset"))
        rockets = self.store.read_json(SELECT_ROCKETS[sort, order], **query)
        count = len(rockets)
        total = end = offset + count
        if count in (0, limit):  # the offset may be past the end, or more may follow
            ((total,),) = self.store.read(COUNT_MATCHING, **query)
        if count and end < total:
            rest = urlencode(given | {"offset": end})
            response.headers["Link"] = f'</rockets?{rest}>; rel="next"'  # RFC 8288
        members = {"count": count, "total": total, "sortBy": sort, "order": order}
        return with_array(members, "rockets", rockets)

    def get_rocket(self, channel: str) -> bytes:
        key = read_fields({"channel": channel}, CHANNEL)
        return b"".join(self.store.read_json(SELECT_ROCKET, **key))

    def get_history(self, channel: str) -> bytes:
        key = read_fields({"channel": channel}, CHANNEL)
        query = HISTORY_DEFAULTS | read_query(HISTORY_QUERY)
        messages = self.store.read_json(SELECT_HISTORY, MAX_HISTORY, **key, **query)
        if not messages and not self.store.read_json(SELECT_ROCKET, **key):
            return b""
        return with_array(key | {"count": len(messages)}, "messages", messages)

    def get_health(self) -> bytes:
        failed = self.outcomes.failed_at
        if failed is not None and time.perf_counter() < failed + FAILURE_SHOWN:
            raise OSError("a message could not be stored, and no new one was since")
        ((rockets, messages),) = self.store.read(COUNT_ALL)
        return dump({"status": "ok", "rockets": rockets, "messages": messages}).encode()

    def get_metrics(self) -> bytes:
        fleet = dict(self.store.read(COUNT_BY_STATUS))
        buckets = dict(zip(BUCKETS, accumulate(self.outcomes.durations), strict=True))
        values = {
            "messages": samples("rockets_messages_total", "outcome", self.outcomes.counts),
            "commits": self.store.commits,
            "buckets": samples("rockets_post_duration_seconds_bucket", "le", buckets),
            "seconds": self.outcomes.seconds,
            "count": buckets["+Inf"],
            "fleet": samples("rockets_fleet", "status", dict.fromkeys(STATUSES, 0) | fleet),
            "missing": self.store.read(COUNT_MISSING)[0][0],
            "version": VERSION,
            "started": self.started,
        }
        return (self.metrics % values).encode()


def create_app(store: Store) -> Bottle:
    """Return the service on top of a store, as a WSGI application."""
    app, api = Bottle(), Api(store)
    app.default_error_handler = problem
    app.install(failures_are_503)
    app.post("/messages", callback=api.post_message)
    app.get("/rockets", callback=getter(api.get_rockets, JSON, api.tag))
    app.get("/rockets/<channel>", callback=getter(api.get_rocket, JSON, api.tag))
    app.get("/rockets/<channel>/messages", callback=getter(api.get_history, JSON, api.tag))
    app.get("/health", callback=getter(api.get_health))
    app.get("/metrics", callback=getter(api.get_metrics, METRICS))
    for path, file, kind in ("/", "dashboard.html", HTML), ("/openapi.json", "openapi.json", JSON):
        page = (STATIC / file).read_bytes().rstrip()
        tag = f'"{zlib.crc32(page)}"'
        app.get(path, callback=getter(lambda page=page: page, kind, lambda tag=tag: tag))
    return app


# Server ###########################################################################################

WAITRESS = {
    "ident": "rockets",
    "clear_untrusted_proxy_headers": False,  # the app reads none of them
    "threads": 0,  # the loop's own thread does all
    "max_request_body_size": MAX_READ + 1,  # bytes; waitress refuses so many and more
    "inbuf_overflow": sys.maxsize,  # bytes; no temporary files, as the disk may be full
    "outbuf_overflow": sys.maxsize,
    "outbuf_high_watermark": sys.maxsize,  # bytes; nothing waits for a client to read
}
NO_HTTP = "this is neither HTTP/1.0 nor HTTP/1.1"
REQUEST_LINE = re.compile(rb"[!-~]+ [!-~\x80-\xff]+ HTTP/1\.[01]\r\n")
REQUEST_LINE_SO_FAR = re.compile(rb"[!-~]*( [!-~\x80-\xff]*( [/.01HPT]{0,8}\r?)?)?")  # roughly
CODINGS = re.compile(rb"(?m)^transfer-encoding:(.*)\r$")  # waitress drops it from the headers


class Request(HTTPRequestParser):
    """A request of waitress that also keeps the rules of RFC 9112 which waitress leaves out."""

    def received(self, data: bytes) -> int:
        consumed = super().received(data)
        if not self.headers_finished:
            head = self.header_plus.lstrip(b"\r\n")  # all that has come so far
            if not (REQUEST_LINE.match(head) or REQUEST_LINE_SO_FAR.fullmatch(head)):
                self.error, self.completed = BadRequest(NO_HTTP), True  # a TLS greeting, say
        if self.expect_continue and self.content_length > MAX_BODY:  # a 413 in place of the 100
            self.error, self.completed = RequestEntityTooLarge(TOO_LARGE), True
        if self.completed:
            self.expect_continue = False  # else waitress sends a 100, and takes it for incomplete
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        if not REQUEST_LINE.match(header_plus):
            raise ParsingError(NO_HTTP)
        if b"\r\n " in header_plus or b"\r\n\t" in header_plus:
            raise ParsingError("a header must not be folded (RFC 9112, 5.2)")
        try:
            super().parse_header(header_plus)
        except (ValueError, TransferEncodingNotImplemented) as error:  # 400, not a crash or a 501
            raise ParsingError(str(error)) from error
        headers, is_old = self.headers, self.version == "1.0"
        host = headers.get("HOST")
        codings = [coding.strip(b" \t") for coding in CODINGS.findall(header_plus.lower())]
        if (host is None and not is_old) or re.search(r"[\s,/?#@]", host or ""):  # two get a comma
            raise ParsingError("there must be exactly one Host (RFC 9112, 3.2)")
        if codings and (is_old or codings != [b"chunked"] or "CONTENT_LENGTH" in headers):
            raise ParsingError("this is no way to frame a body (RFC 9112, 6.1)")
        option = headers.get("CONNECTION", "").lower()
        if "," in option:  # a list (RFC 9112, 9.6), of which waitress knows one word
            known = {"close", "keep-alive"}.intersection(re.split(r"[ \t,]+", option))
            headers["CONNECTION"] = min(known, default="")  # close, where both are there


class AnswerTask(Task):
    """Sends the answer that its connection holds."""

    def execute(self) -> None:
        self.status, self.response_headers, body = self.channel.answer
        line = getattr(self.request, "first_line", b"")  # there is none in what is no HTTP
        log.info("%s %s %a", self.status[:3], self.channel.addr[0], line)
        self.content_length = len(body)
        if self.request.error:
            self.request.headers["CONNECTION"] = "close"  # for build_response_header()
        head = self.build_response_header()
        self.wrote_header = True
        self.channel.write_soon(head + body)  # in one packet, if it fits

    def set_close_on_finish(self) -> None:
        """Close after the answer; build_response_header() calls this.

        It does so for each 204 and 304, too, as they have no length; those stay open here.
        """
        option = self.request.headers.get("CONNECTION", "").lower()
        is_wanted = option != "keep-alive" if self.version == "1.0" else option == "close"
        if self.has_body or is_wanted:
            super().set_close_on_finish()
        elif self.version == "1.0":
            self.response_headers.append(("Connection", "Keep-Alive"))  # waitress does if has_body


class Connection(HTTPChannel):
    """A connection of waitress that holds the answer to its first request until it may be sent."""

    parser_class, task_class, error_task_class = Request, AnswerTask, AnswerTask
    handle_expt = HTTPChannel.handle_close  # TCP's urgent data, which HTTP does not have
    answer: tuple[str, list[tuple[str, str]], bytes]  # status with its title, headers, body

    def add_channel(self, map: dict | None = None) -> None:
        """Be counted as a new connection; waitress calls this."""
        super().add_channel(map)
        self.server.task_dispatcher.accepted += 1  # the listener's dispatcher is our Server

    def is_ready(self) -> bool:
        """Tell whether the next answer may be made: the one before is sent, or nobody is there."""
        return not self.connected or not self.writable()

    def is_busy(self) -> bool:
        """Tell whether a request is under way, or an answer not sent."""
        return bool(self.requests or self.request or self.writable())

    def ask(self) -> int:
        """Ask the app about the first request, and hold its answer; return the status.

        What waitress found to be wrong has its answer without the app.
        """
        first = self.requests[0]
        if first.error:
            status, detail = first.error.code, first.error.body
            title = f"{status} {TITLES[status]}"
            headers = [*BASE_HEADERS.items(), ("Content-Type", PROBLEM)]
            body = render(status, TOO_LARGE if status == 413 else detail).encode()
        else:
            environ = WSGITask(self, first).get_environment()
            environ["wsgi.input"].seek(0)  # it may have been read before
            begun: list = []
            body = b"".join(self.server.application(environ, lambda *given: begun.extend(given)))
            title, headers, _ = begun  # Bottle always passes exc_info, too
        self.answer = title, headers, body
        return int(title[:3])


class Server:
    """Serves an app on waitress's own loop, in turns.

    A turn receives what has come, asks the app about all of it in one transaction, commits, and
    only then answers. So messages that come together share a disk sync, and no answer has to be
    taken back. If the transaction fails, each request is asked about again, by itself.
    """

    def __init__(self, app: Bottle, store: Store, sockets: list[socket.socket], limit: int):
        self.store, self.stopping = store, False
        self.arrived: list[Connection] = []  # each with a whole request, in order of arrival
        self.accepted = 0  # connections so far
        self.map: dict[int, Any] = {}  # what waitress polls
        limit += len(sockets)  # as waitress counts the listeners, too
        create_server(app, map=self.map, sockets=sockets, connection_limit=limit, **WAITRESS)
        self.listeners = [each for each in self.map.values() if each.accepting]
        for listener in self.listeners:
            listener.channel_class, listener.task_dispatcher = Connection, self
            listener.trigger.close()  # there is no other thread to wake
            listener.pull_trigger = lambda: None
            listener.maintenance = self.close_silent

    def add_task(self, connection: Connection) -> None:
        """Take a connection with a whole request; waitress calls this."""
        self.arrived.append(connection)

    def close_silent(self, now: float) -> None:
        """Close what was silent for too long, unread answers included; waitress calls this."""
        for each in [*self.map.values()]:
            if not each.accepting and each.last_activity < now - CHANNEL_TIMEOUT:
                each.handle_close()

    def stop(self, *_: Any) -> None:
        """End run() after this turn and what is under way; a signal handler."""
        self.stopping = True

    def run(self) -> None:
        """Serve until stopped; then take in what has come, and answer what is under way."""
        while not self.stopping:
            self.turn()
        while self.receive(0):
            pass  # more have connected
        for listener in self.listeners:
            listener.close()
        end = time.monotonic() + GRACE_PERIOD
        while time.monotonic() < end and any(each.is_busy() for each in self.map.values()):
            self.turn()

    def receive(self, seconds: float) -> bool:
        """Poll, again while connections come, which bring a request; tell whether more may wait."""
        for wait in [seconds] + [0] * MAX_POLLS:
            known = self.accepted
            wasyncore.loop(wait, use_poll=True, map=self.map, count=1)
            if self.accepted == known:
                return False
        return True

    def turn(self) -> None:
        """Receive what comes, and answer what is ready, up to MAX_TURN requests."""
        self.receive(0 if any(each.is_ready() for each in self.arrived) else IDLE)
        ready = [each for each in self.arrived if each.is_ready()][:MAX_TURN]
        self.arrived = [each for each in self.arrived if each not in ready]
        if len(ready) < 2 or not self.ask_together(ready):
            for connection in ready:
                connection.ask()
        for connection in ready:
            connection.service()
            if connection.connected:
                connection.handle_write()

    def ask_together(self, ready: list[Connection]) -> bool:
        """Ask about all requests in one transaction; return whether it could be committed."""
        try:
            with self.store.transaction():
                if not all(connection.ask() < 500 for connection in ready):
                    raise OSError("a request failed")  # to roll back
        except (sqlite3.Error, OSError):
            return False
        return True


# Command line #####################################################################################


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on a host; localhost is every loopback address. Raise OSError."""
    sockets: list[socket.socket] = []
    for address in ("127.0.0.1", "::1") if host == "localhost" else (host,):
        try:
            family = socket.getaddrinfo(address, port)[0][0]
            sockets.append(socket.create_server((address, port), family=family))
        except (OSError, UnicodeError) as error:
            if not sockets or error.errno == errno.EADDRINUSE:  # else there is no IPv6 here
                why = getattr(error, "strerror", str(error)).partition(" (while attempting")[0]
                raise OSError(f"cannot listen on {address} port {port}: {why}") from error
        port = sockets[0].getsockname()[1]  # the same for both, also where the system chose it
    return sockets


def connection_limit() -> int:
    """Raise the limit of open files as far as needed and allowed; return what it allows for."""
    limit = soft = MAX_CONNECTIONS
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        others = OTHER_FILES + len(os.listdir("/dev/fd"))
        needed = MAX_CONNECTIONS + others
        if 0 <= soft < needed:  # "unlimited" is -1
            soft = needed if hard < 0 else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            limit = soft - others
    if limit < 1:
        raise OSError(f"too few open files are allowed (ulimit -n is {soft})")
    if limit < 100:
        log.warning("there can be only %d connections at a time (ulimit -n is %d)", limit, soft)
    return limit


def greet(greeting: str) -> None:
    """Print the greeting; the service is there even if stdout doesn't take it."""
    try:
        if sys.stdout:
            sys.stdout.reconfigure(errors="backslashreplace")
        print(greeting, flush=True)
    except OSError as error:
        log.warning("%s (stdout: %s)", greeting, error.strerror)


DEFAULTS = {"host": "localhost", "port": "8088", "database": "rockets.db"}


def read_options() -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the options, and for each that the environment set, a note for its errors."""
    found = {name: os.environ.get(name.upper()) for name in DEFAULTS}
    parser = argparse.ArgumentParser(
        description="Take in what rockets report, and serve their state as JSON.",
        epilog="HOST, PORT and DATABASE in the environment stand in for the options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = lambda why: sys.exit(f"rockets: {why}")  # one line, as for all that can't work
    option = parser.add_argument
    option("--host", help="address to listen on; localhost is every loopback address")
    option("--port", help="port to listen on; 0 takes any free one")
    option("--database", metavar="FILE", help="SQLite file to keep all in")
    option("--reset", action="store_true", help="start from an empty database")
    option("--verbose", action="store_true", help="log every request")
    parser.set_defaults(**{name: found[name] or DEFAULTS[name] for name in DEFAULTS})
    options = parser.parse_args()
    used = [name for name in DEFAULTS if found[name] == getattr(options, name)]
    return options, {name: f" (from {name.upper()} in the environment)" for name in used}


def handle_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


class Sparing(logging.Filter):
    """Lets a warning pass once a minute; waitress repeats that there are too many connections."""

    silent_until = 0.0  # seconds since 1970

    def filter(self, record: logging.LogRecord) -> bool:
        passes = record.levelno != logging.WARNING or record.created >= self.silent_until
        if passes and record.levelno == logging.WARNING:
            self.silent_until = record.created + 60
        return passes


def main() -> None:
    """Read the options, and serve until SIGTERM or Ctrl-C."""
    if sys.version_info < (3, 11) or sqlite3.sqlite_version_info < (3, 38):
        sys.exit("rockets: at least Python 3.11 and SQLite 3.38 are needed")
    handle_signals(lambda *_: sys.exit(0))  # while it starts
    options, sources = read_options()
    level = "INFO" if options.verbose else "WARNING"
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("waitress").addFilter(Sparing())
    tried: tuple[str, ...] = ()  # the options that an error is about
    try:
        limit = connection_limit()
        tried = ("host", "port")
        ports = digits_up_to(65535)
        port = ports.read(options.port)
        if port is None:
            raise OSError(f"the port must be {ports.words}, got {options.port}")
        sockets = listen(options.host, port)
        tried = ("database",)
        store = Store(options.database)
        tried = ()
        server = Server(create_app(store), store, sockets, limit)
        if options.reset:
            store.reset()
        ((rockets, messages),) = store.read(COUNT_ALL)
    except (sqlite3.Error, OSError) as error:
        sys.exit(f"rockets: {error}{''.join(sources.get(name, '') for name in tried)}")
    handle_signals(server.stop)
    host = f"[{options.host}]" if ":" in options.host else options.host
    where = f"http://{host}:{sockets[0].getsockname()[1]}"
    found = f"{options.database} holds {rockets} rockets and {messages} messages"
    gc.freeze()  # what is there by now stays, and need not be looked at for garbage again
    greet(f"Rockets listens on {where}, {found}")
    server.run()
    store.close()
    handle_signals(signal.SIG_IGN)  # Python would die of another one while it exits


if __name__ == "__main__":
    main()
