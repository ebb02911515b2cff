"""Bench measures what the service costs, and prints it as a Markdown table.

    python tools/bench.py                  beside waitress as it comes, and by itself
    python tools/bench.py --against DIR    beside another checkout of this project
    python tools/bench.py --peers PYTHON   beside FastAPI and Flask, as that Python runs them
    python tools/bench.py --only post run  some rows of a table

What is compared runs in turn, A B A B, in slices of a run, and a ratio is the median of the runs'
ratios, as times on a shared machine move. "waitress as it comes" is waitress.serve() around
handlers that do nothing. Each request is a new connection, except where a row says otherwise. All
files are in a folder of their own, removed in the end. Needs Linux.
"""

import argparse
import http.client
import json
import logging
import multiprocessing
import os
import platform
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from itertools import count, islice, repeat
from pathlib import Path
from statistics import fmean, median

import launch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SEED = 444  # of the messages that are posted
FLEET_SEED = 445  # of other rockets, which are there before
SLICES = 8  # in one run, which takes some seconds; whatever else the machine does meets all alike
POSTS = 500  # in one slice
GETS = 400  # of one rocket, or answered with 304, in one slice
FEW, MANY = 20, 10_000  # rockets
LISTS = {FEW: 125, 1000: 25, MANY: 5}  # rockets, and GETs of all of them in one slice
READS = 200  # of a list whose 99th percentile is told
BESIDE = 1000  # messages while a list is read
APPLIED = 2000  # messages to find the cost of one
SMALL, LARGE = 10_000, 1_000_000  # messages stored
FILLING = 5000  # messages in a transaction while a database is filled
DISORDER = ("--reorder=300", "--duplicates=0.1")
DEFAULT_RUN = "the test program's default run, up to 300 places late, a tenth of it twice"
STARTS = 5
SYNCING = 3  # seconds
GRACE = 30  # seconds for a server to answer, or to stop
TICK = os.sysconf("SC_CLK_TCK")  # a second, in the unit of /proc/PID/stat
LIST = "/rockets?sort=speed&order=desc"

ROWS = ("post", "cpu", "rocket", "lists", "unchanged", "latency", "growth", "run")
Row = tuple[str, str]  # what is measured, and the figure

# Servers to compare with ##########################################################################


def serve_nothing(_database: str) -> None:
    """Serve handlers that do nothing with waitress as it comes."""
    import bottle
    import waitress

    app = bottle.Bottle()

    @app.post("/messages")
    def post_message() -> str:
        bottle.request.body.read()
        bottle.response.status = 202
        return "{}"

    @app.get("/rockets")
    def get_nothing_new() -> None:
        bottle.response.status = 304

    @app.get("/rockets/<channel>")
    def get_rocket(channel: str) -> str:
        return channel.ljust(330)  # bytes, as a rocket has

    logging.getLogger("waitress").setLevel("ERROR")  # not a line for each request that waits
    waitress.serve(app, sockets=[listen()], _quiet=True, connection_limit=1000)  # as ours


def listen() -> socket.socket:
    """Return a socket that listens on a free port, after saying where."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    return listener


# The least that keeps messages as safe as the service does: a transaction for each.
PEER_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE messages (channel, number, message, PRIMARY KEY (channel, number)) WITHOUT ROWID;
CREATE TABLE rockets (channel PRIMARY KEY, number, speed, mission, mission_number) WITHOUT ROWID;
"""
PEER_INSERT = "INSERT OR IGNORE INTO messages VALUES (:channel, :number, :message)"
PEER_UPSERT = """
INSERT INTO rockets VALUES (:channel, :number, :change, :mission, :mission_number)
ON CONFLICT (channel) DO UPDATE SET
    number = max(number, excluded.number),
    speed = speed + excluded.speed,
    mission = iif(excluded.mission_number > mission_number, excluded.mission, mission),
    mission_number = max(mission_number, excluded.mission_number)
"""


def open_peer(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    connection.executescript(PEER_SCHEMA)
    return connection


def store(connection: sqlite3.Connection, message: dict) -> dict:
    metadata, content = message["metadata"], message["message"]
    row = {"channel": metadata["channel"], "number": metadata["messageNumber"]}
    row["message"] = json.dumps(content)
    row["change"] = content.get("launchSpeed", content.get("by", 0))
    if metadata["messageType"] == "RocketSpeedDecreased":
        row["change"] *= -1
    row["mission"] = content.get("mission", content.get("newMission"))
    row["mission_number"] = row["number"] if row["mission"] else 0
    connection.execute("BEGIN IMMEDIATE")
    is_new = connection.execute(PEER_INSERT, row).rowcount
    if is_new:
        connection.execute(PEER_UPSERT, row)
    connection.execute("COMMIT")
    return {"status": "applied" if is_new else "duplicate"}


def serve_fastapi(database: str) -> None:
    import fastapi
    import uvicorn

    app, connection = fastapi.FastAPI(), open_peer(database)

    @app.post("/messages", status_code=202)
    async def post_message(request: fastapi.Request) -> dict:  # one thread, so no lock
        return store(connection, await request.json())

    config = uvicorn.Config(app, log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listen()])


def flask_app(database: str) -> Callable:
    import flask

    app, connection, lock = flask.Flask("peer"), open_peer(database), threading.Lock()

    @app.post("/messages")
    def post_message() -> tuple[dict, int]:
        with lock:
            return store(connection, flask.request.json), 202

    return app


def serve_flask(database: str) -> None:
    listener = listen()
    listener.set_inheritable(True)
    options = [f"--bind=fd://{listener.fileno()}", "--threads=8", "--log-level=error"]
    options += [f"--chdir={Path(__file__).parent}", f"bench:flask_app({database!r})"]
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *options])


# Load #############################################################################################


class Server:
    """A server in a process of its own, within the with block; and what is measured of it."""

    def __init__(self, *command: str | Path):
        self.command = [str(part) for part in command]
        self.messages = launch.fly(SEED)

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        listens = re.search(r"http://([0-9.]+):([0-9]+)", self.process.stdout.readline())
        if not listens:
            sys.exit(f"bench: {' '.join(self.command)} does not start")
        self.url, self.address = listens[0], (listens[1], int(listens[2]))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(GRACE)
        self.process.stdout.close()

    def send(self, requests: list[bytes], concurrency: int) -> tuple[float, list[float]]:
        """Return how many a second were answered, and the ms of each answer, shortest first."""
        sender = launch.Sender(self.url, concurrency, notice=sys.exit)  # a failure is no figure
        seconds = sender.run(requests)
        return len(requests) / seconds, sorted(1000 * latency for latency in sender.latencies)

    def posts(self, messages: Iterable[dict], count: int) -> list[bytes]:
        """Return messages as requests, made beforehand so that only their sending takes time."""
        url, some = f"{self.url}/messages", islice(messages, count)
        return [launch.http_request("POST", url, json.dumps(message).encode()) for message in some]

    def gets(self, path: str, count: int) -> list[bytes]:
        return [launch.http_request("GET", self.url + path)] * count

    def launch_rockets(self, fleet: int) -> None:
        messages = launch.fly(FLEET_SEED, fleet)
        launches = (sent for sent in messages if sent["metadata"]["messageNumber"] == 1)
        self.send(self.posts(launches, fleet), concurrency=20)

    def post_rate(self, concurrency: int) -> float:
        return self.send(self.posts(self.messages, POSTS), concurrency)[0]

    def get_rate(self, path: str, count: int, concurrency: int) -> float:
        return self.send(self.gets(path, count), concurrency)[0]

    def post_cost(self) -> float:
        """Return the microseconds of CPU time that a message takes, one at a time."""
        requests = self.posts(self.messages, POSTS)
        before = self.cpu_time()
        self.send(requests, concurrency=1)
        return 1e6 * (self.cpu_time() - before) / POSTS

    def cpu_time(self) -> float:
        """Return the seconds of CPU time that the process has used."""
        numbers = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, numbers[11:13])) / TICK  # utime and stime, see proc(5)

    def peak_memory(self) -> float:
        """Return the MiB that the process has held at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def unchanged_rate(self) -> float:
        """Return how often a second one client is told that the list has not changed."""
        connection = http.client.HTTPConnection(*self.address, timeout=GRACE)
        connection.request("GET", LIST)
        tag = connection.getresponse().headers.get("ETag", "*")
        connection.close()
        host = ":".join(map(str, self.address))
        request = f"GET {LIST} HTTP/1.1\r\nHost: {host}\r\nIf-None-Match: {tag}\r\n\r\n".encode()
        client = None
        began = time.perf_counter()
        for _ in range(GETS):
            client = client or socket.create_connection(self.address, GRACE)
            client.sendall(request)
            answer = client.recv(65536)
            if not answer.startswith(b"HTTP/1.1 304"):
                sys.exit(f"bench: {self.url}{LIST} was answered {answer[:100]!r}, not 304")
            if b"\r\nConnection: close" in answer:
                client.close()
                client = None
        return GETS / (time.perf_counter() - began)


def service(checkout: Path, database: Path) -> Server:
    program = checkout / "rockets.py"
    return Server(sys.executable, program, "--host=127.0.0.1", "--port=0", "--database", database)


def opponent(python: str, name: str, database: Path) -> Server:
    return Server(python, __file__, "serve", name, database)


def read_lists(url: str) -> None:
    """Read the list without pause and without end."""
    launch.Sender(url, concurrency=1).run(repeat(launch.http_request("GET", url + LIST)))


def default_run(server: Server) -> str:
    """Send what the test program sends by default, and return what is wrong then, and the rate."""
    command = [sys.executable, launch.__file__, f"{server.url}/messages", *DISORDER]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    rate = re.search(r"(?m)^rate +(.*)$", said)
    return f"{said.splitlines()[-1]}; {rate[1]}"


def percentiles(latencies: list[float]) -> str:
    p99 = latencies[len(latencies) * 99 // 100]
    return f"p50 {median(latencies):.2f} ms, p99 {p99:.2f} ms"


def filled(database: Path, size: int) -> tuple:
    """Return a store with so many messages, and those that come next, as the store takes them."""
    import rockets

    store = rockets.Store(str(database))
    bodies = (json.dumps(message).encode() for message in launch.fly(SEED))
    messages = map(rockets.parse_message, bodies)
    for _ in range(size // FILLING):
        with store.transaction():
            for message in islice(messages, FILLING):
                store.apply(message)
    return store, messages


def headline(folder: Path) -> str:
    """Return what the figures depend on, with the time of a disk sync, and the table's head."""
    times = []
    with open(folder / "sync", "wb", buffering=0) as file:
        while sum(times) < SYNCING:
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return (
        f"Measured on {date.today()}: {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}; to append 4 KiB to a file and sync it takes "
        f"{1000 * median(times):.2f} ms.\n\n| measured | figure |\n|---|---|"
    )


# Rows #############################################################################################


class Bench:
    """The rows of the tables, each measured on new databases."""

    def __init__(self, folder: Path, pairs: int, opponents: dict[str, Callable[[Path], Server]]):
        self.pairs = pairs
        self.opponents = opponents
        self.databases = (folder / f"{number}.db" for number in count())

    def service(self) -> Server:
        return service(ROOT, next(self.databases))

    @contextmanager
    def side_by_side(self, rockets: int = 0) -> Iterator[list[Server]]:
        """Run the service and its opponents, each with so many rockets."""
        with ExitStack() as stack:
            starts = [start(next(self.databases)) for start in self.opponents.values()]
            servers = [stack.enter_context(server) for server in (self.service(), *starts)]
            for server in servers:
                server.launch_rockets(rockets)
            yield servers

    def compare(
        self, what: str, unit: str, servers: list[Server], measure: Callable, *arguments: object
    ) -> Iterator[Row]:
        """Measure the servers in turn; the first run warms up and doesn't count."""
        runs = []
        for _ in range(self.pairs + 1):
            slices = [[measure(one, *arguments) for one in servers] for _ in range(SLICES)]
            runs.append([fmean(figures) for figures in zip(*slices, strict=True)])
        ours, *others = zip(*runs[1:], strict=True)
        for name, theirs in zip(self.opponents, others, strict=True):
            ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
            times = f"{median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            figures = f"{median(ours):,.0f} against {median(theirs):,.0f} {unit}"
            yield f"{what}, against {name}", f"{times}: {figures}"

    def post(self) -> Iterator[Row]:
        with self.side_by_side() as servers:
            for concurrency in (1, 3, 20):
                what = f"durable POST, {concurrency} at a time"
                yield from self.compare(what, "a second", servers, Server.post_rate, concurrency)

    def cpu(self) -> Iterator[Row]:
        with self.side_by_side() as servers:
            what = "CPU time of a message, 1 at a time"
            yield from self.compare(what, "µs", servers, Server.post_cost)

    def rocket(self) -> Iterator[Row]:
        channel = next(launch.fly(FLEET_SEED))["metadata"]["channel"]
        with self.side_by_side(FEW) as servers:
            request = (f"/rockets/{channel}", GETS, 3)
            what = "`GET /rockets/<channel>`, 3 at a time"
            yield from self.compare(what, "a second", servers, Server.get_rate, *request)

    def lists(self) -> Iterator[Row]:
        for rockets, gets in LISTS.items():
            with self.side_by_side(rockets) as servers:
                what, request = f"list of {rockets:,} rockets", (LIST, gets, 1)
                yield from self.compare(what, "a second", servers, Server.get_rate, *request)

    def unchanged(self) -> Iterator[Row]:
        for rockets in (FEW, MANY):
            with self.side_by_side(rockets) as servers:
                what = f"fitting `If-None-Match`, {rockets:,} rockets, connection kept if it can be"
                yield from self.compare(what, "a second", servers, Server.unchanged_rate)

    def latency(self) -> Iterator[Row]:
        for rockets in LISTS:
            with self.service() as server:
                server.launch_rockets(rockets)
                latencies = server.send(server.gets(LIST, READS), concurrency=1)[1]
                yield f"`GET {LIST}`, {rockets:,} rockets", percentiles(latencies)
        with self.service() as server:
            server.launch_rockets(MANY)
            posts = [server.posts(server.messages, BESIDE) for _ in range(2)]
            alone = server.send(posts[0], concurrency=1)[1]
            reader = multiprocessing.Process(target=read_lists, args=(server.url,), daemon=True)
            reader.start()
            beside = server.send(posts[1], concurrency=1)[1]
            reader.kill()
            reader.join()
        what = f"durable POST, 1 at a time, while one client reads {MANY:,} rockets without pause"
        yield what, f"{percentiles(beside)}; without it {percentiles(alone)}"

    def growth(self) -> Iterator[Row]:
        databases = list(islice(self.databases, 2))
        stores = list(map(filled, databases, (SMALL, LARGE)))
        costs: list[list[float]] = [[], []]
        for _ in range(APPLIED):
            for (store, messages), times in zip(stores, costs, strict=True):
                message = next(messages)
                began = time.perf_counter()
                with store.transaction():
                    store.apply(message)
                times.append(1000 * (time.perf_counter() - began))
        for store, _ in stores:
            store.close()
        small, large = map(median, costs)
        what = f"cost of a message with {LARGE:,} stored, against {SMALL:,}"
        yield what, f"{large / small:.2f} times: {large:.2f} against {small:.2f} ms"
        size = databases[1].stat().st_size / (LARGE + APPLIED)
        yield f"size on disk, {LARGE:,} stored", f"{size:.0f} bytes a message"
        starts = []
        for _ in range(STARTS):
            began = time.perf_counter()
            with service(ROOT, databases[1]) as server:
                server.send(server.gets("/health", 1), concurrency=1)
                starts.append(time.perf_counter() - began)
        what = f"start, {LARGE:,} stored, until `/health` answers"
        yield what, f"{median(starts):.2f} s"

    def run(self) -> Iterator[Row]:
        with self.service() as server:
            yield DEFAULT_RUN, default_run(server)
            yield "peak memory over it", f"{server.peak_memory():.0f} MiB"


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    beside = parser.add_mutually_exclusive_group().add_argument
    beside("--against", metavar="DIR", type=Path, help="compare with the service of that folder")
    beside("--peers", metavar="PYTHON", help="compare with FastAPI and Flask, run by that Python")
    option("--pairs", metavar="N", type=int, default=7, help="runs of each that is compared")
    text = f"some rows of the table: {', '.join(ROWS)}"
    option("--only", metavar="ROW", nargs="+", choices=ROWS, default=ROWS, help=text)
    option("--folder", type=Path, default=Path(), help="for the databases; its disk is what counts")
    args = parser.parse_args()
    if args.against:
        opponents = {args.against.resolve().name: partial(service, args.against.resolve())}
        rows = ("post", "cpu", "rocket", "lists")
    elif args.peers:
        opponents = {
            "FastAPI and uvicorn": partial(opponent, args.peers, "fastapi"),
            "Flask and gunicorn, 8 threads": partial(opponent, args.peers, "flask"),
        }
        rows = ("post",)
    else:
        opponents = {"waitress as it comes": partial(opponent, sys.executable, "nothing")}
        rows = ("post", "rocket", "unchanged", "latency", "growth", "run")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder.resolve()) as name:
        bench = Bench(Path(name), args.pairs, opponents)
        print(headline(Path(name)), flush=True)
        for row in [row for row in rows if row in args.only]:
            for what, figure in getattr(bench, row)():
                print(f"| {what} | {figure} |", flush=True)


SERVERS = {"nothing": serve_nothing, "fastapi": serve_fastapi, "flask": serve_flask}

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        SERVERS[sys.argv[2]](sys.argv[3])
    else:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)  # the servers are stopped and the files removed by now
