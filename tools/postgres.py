"""Serve Rockets from PostgreSQL 15 or later. Any number of processes may share one database.

    python tools/postgres.py postgresql://user:password@host/database --port 8089

It is the app of rockets.py on another store. waitress serves it with threads, so each message is
a transaction of its own. The SQL is that of rockets.py: FUNCTIONS give PostgreSQL what only SQLite
has, and REPLACEMENTS change what it spells in another way.
"""

import argparse
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rockets

try:
    import psycopg
    from psycopg.types.json import set_json_loads
    from psycopg.types.numeric import IntLoader
    from psycopg_pool import ConnectionPool
except ImportError as error:
    sys.exit(f"rockets: {error}; install it with: python3 -m pip install 'psycopg[binary,pool]'")

# SQL ##############################################################################################

FUNCTIONS = r"""
CREATE OR REPLACE FUNCTION iif(boolean, anycompatible, anycompatible) RETURNS anycompatible
IMMUTABLE LANGUAGE SQL AS 'SELECT CASE WHEN $1 THEN $2 ELSE $3 END';
CREATE OR REPLACE FUNCTION max(bigint, bigint) RETURNS bigint
IMMUTABLE LANGUAGE SQL AS 'SELECT greatest($1, $2)';
CREATE OR REPLACE FUNCTION min(bigint, bigint) RETURNS bigint
IMMUTABLE LANGUAGE SQL AS 'SELECT least($1, $2)';
-- not a number of days, but in the same order, to the millisecond; reads at most 6 digits
CREATE OR REPLACE FUNCTION julianday(text) RETURNS timestamptz
STABLE LANGUAGE SQL AS $$
    SELECT CAST(regexp_replace($1, '(\.\d{6})\d+', '\1') AS timestamptz(3)) $$;
-- The columns have the collation "C", in which lower() knows ASCII only.
CREATE OR REPLACE FUNCTION contains(part text, VARIADIC texts text[]) RETURNS boolean
IMMUTABLE LANGUAGE SQL AS $$
    SELECT EXISTS (
        SELECT * FROM unnest(texts) AS text
        WHERE strpos(lower(text COLLATE "und-x-icu"), part) > 0) $$"""
ROCKET = ", ".join(f"'{field}', {field}" for field in rockets.ROCKET_FIELDS)
REPLACEMENTS = {
    r":(\w+)": r"%(\1)s",  # psycopg's way to name a parameter
    r"CREATE TABLE rockets": "CREATE TABLE IF NOT EXISTS rockets",  # another process may be first
    r" STRICT, WITHOUT ROWID": "",  # as all tables of PostgreSQL are
    r"\bINTEGER\b": "BIGINT",  # INTEGER has 32 bits
    r"\bTEXT\b": 'TEXT COLLATE "C"',  # by code point, whatever the language of the database
    r" AS \((.+?)\),\n": r" GENERATED ALWAYS AS (\1) STORED,\n",  # version 15 has no virtual ones
    # A generated column cannot use another one. So the JSON is made by each query.
    r",\s+json TEXT .+ STORED\n": "\n",
    r"CAST\(json AS BLOB\)": f"json_object({ROCKET})",
    r"json_object\(": "json_build_object(",  # PostgreSQL's json_object() takes an array
    r"AS BLOB": "AS JSON",  # comes as bytes, too
    r"CAST\(total\((\w+)\) AS BIGINT\)": r"coalesce(sum(\1), 0)",  # a NUMERIC, without bounds
}
INSERT_IF_NEW = f"{rockets.INSERT_MESSAGE} ON CONFLICT DO NOTHING"
# A snapshot tells which transactions are visible. It can come again only after the server is set
# back to a backup, and then the server has started since.
TAG = "SELECT extract(epoch FROM pg_postmaster_start_time()) || '-' || pg_current_snapshot()"
LOCK_SCHEMA = "SELECT pg_advisory_xact_lock(21067)"  # any number of our own


@cache
def translate(sql: str) -> str:
    """Return a statement of rockets.py as PostgreSQL and psycopg take it."""
    for pattern, replacement in REPLACEMENTS.items():
        sql = re.sub(pattern, replacement, sql, flags=re.DOTALL)
    return sql


# Storage ##########################################################################################

THREADS = 8  # that answer requests, each with a connection to the database
POOL_TIMEOUT = 0.5  # seconds; as each thread has a connection, it only ends if the server is away
CONNECTION = {
    "autocommit": True,
    "cursor_factory": psycopg.ClientCursor,  # the server could not tell the type of a NULL
    "connect_timeout": 2,  # seconds
    "tcp_user_timeout": 5000,  # milliseconds after which a silent server is away
}
SETTINGS = """
SET synchronous_commit = on;  -- a COMMIT that returns is on disk
SET lock_timeout = '1s'  -- a lock that stays is a 503"""
set_json_loads(bytes)  # JSON goes out as it comes
psycopg.adapters.register_loader("numeric", IntLoader)  # each is a sum of whole numbers


class PostgresStore:
    """What create_app() needs of a Store, for several threads, raising the same Unavailable."""

    def __init__(self, address: str):
        """Make the tables if they are not there. Raise psycopg.Error if that fails."""
        with psycopg.connect(address, **CONNECTION) as connection, connection.transaction():
            if connection.info.parameter_status("server_encoding") != "UTF8":
                raise psycopg.NotSupportedError("the encoding of the database must be UTF8")
            self.name = f"{connection.info.dbname} on {connection.info.host}"
            for sql in (LOCK_SCHEMA, FUNCTIONS, rockets.CREATE_MESSAGES, rockets.CREATE_ROCKETS):
                connection.execute(translate(sql))
        self.commits = 0
        self.lock = threading.Lock()
        self.pool = ConnectionPool(
            address, kwargs=CONNECTION, configure=lambda connection: connection.execute(SETTINGS),
            min_size=THREADS, timeout=POOL_TIMEOUT, open=True,
            reconnect_timeout=1,  # seconds; after them, each request is a reason to try again
        )  # fmt: skip

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection]:
        """Lend a connection. The pool replaces one that comes back broken."""
        try:
            with self.pool.connection() as connection:
                yield connection
        except psycopg.DataError as error:  # a NUL in a filter, which no text of PostgreSQL has
            raise rockets.HTTPError(400, str(error)) from error
        except (psycopg.OperationalError, psycopg.InternalError) as error:  # also: it only reads
            raise rockets.Unavailable(one_line(error)) from error

    def execute(self, sql: str, parameters: dict | tuple = ()) -> list[tuple]:
        """Run a query and return its rows."""
        with self.connection() as connection:
            return connection.execute(translate(sql), parameters).fetchall()

    def on_commit(self, callback: Callable, *arguments: Any) -> None:
        """Call back at once, as apply() has committed, but from one thread at a time."""
        with self.lock:
            callback(*arguments)

    def apply(self, message: dict) -> str:
        """Count and keep a message. Return 'applied', 'duplicate' or 'conflicting'.

        The entry comes first. If another process makes the same one, this waits for its commit.
        """
        with self.connection() as connection, connection.transaction():
            if not connection.execute(translate(INSERT_IF_NEW), message).rowcount:
                is_same = connection.execute(translate(rockets.IS_SAME), message).fetchone()
                return "duplicate" if is_same == (True,) else "conflicting"
            connection.execute(translate(rockets.UPSERT), message)
        with self.lock:
            self.commits += 1
        return "applied"

    def probe(self) -> None:
        """Find out whether messages can be stored."""
        with self.connection() as connection:
            connection.execute("DELETE FROM messages WHERE false")  # fails if the server only reads

    def tag(self) -> str:
        """Return an ETag that changes with each commit. It is the same in all processes."""
        ((tag,),) = self.execute(TAG)
        return f'"{tag}"'


# Command line #####################################################################################


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> None:
    """Read the options, and serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve Rockets from PostgreSQL.")
    parser.error = lambda why: sys.exit(f"rockets: {why}")
    parser.add_argument("address", help="postgresql://user:password@host:port/database")
    parser.add_argument("--host", default="localhost", help="address to listen on")
    parser.add_argument("--port", default=8088, type=int, help="0 takes any free one")
    options = parser.parse_args()
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("waitress").setLevel("ERROR")  # no line for each request that waits
    logging.getLogger("psycopg.pool").setLevel("ERROR")  # nor for each attempt to connect
    try:
        sockets = rockets.listen(options.host, options.port)
        store = PostgresStore(options.address)
        ((count, messages, _),) = store.execute(rockets.COUNT_ALL)
    except (psycopg.Error, rockets.Unavailable, OSError) as error:
        sys.exit(f"rockets: {one_line(error)}")
    app, adjustments = rockets.create_app(store), rockets.WAITRESS | {"threads": THREADS}
    server = rockets.create_server(app, sockets=sockets, **adjustments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # ends run()
    where = f"http://{options.host}:{sockets[0].getsockname()[1]}"
    found = f"{store.name} holds {count} rockets and {messages} messages"
    print(f"Rockets listens on {where}, {found}", flush=True)
    server.run()
    store.pool.close()


if __name__ == "__main__":
    main()
