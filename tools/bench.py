"""Bench measures what the service costs, and prints it as a Markdown table.

    python tools/bench.py                  beside waitress as it comes, and by itself
    python tools/bench.py --against DIR    beside another checkout of this project
    python tools/bench.py --peers PYTHON   beside FastAPI and Flask, run by that Python
    python tools/bench.py --only post run  some rows of a table

What is compared runs in turn, A B A B, in slices of a run, and a ratio is the median of the runs'
ratios, as times on a shared machine move. "waitress as it comes" is waitress.serve() around
handlers that do nothing. The other peers keep messages in the same store, with a commit for each.
The Python for them needs this project's packages, fastapi, uvicorn, flask and gunicorn. Each
request is a new connection, except where a row says otherwise. The databases are in the current
folder, whose disk counts, and are removed in the end. Needs Linux.
"""

import argparse
import functools
import json
import logging
import os
import platform
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from itertools import chain, islice
from pathlib import Path
from statistics import fmean, median
from urllib.parse import urlsplit

import bottle
import launch
import waitress

ROOT = launch.SERVICE.parent
sys.path.insert(0, str(ROOT))
import rockets  # noqa: E402

SLICES = 8  # in one run, which takes some seconds; whatever else the machine does meets all alike
POSTS = 500  # in one slice
GETS = 400  # of one rocket, or answered with 304, in one slice
LIST = "/rockets?sort=speed&order=desc&limit=1000"
SMALL, LARGE = 10_000, 1_000_000  # messages stored
FILLING = 5000  # messages in a transaction while a database is filled
APPLIED = 2000  # messages to find the cost of one
STARTS = 5
Row = tuple[str, str]  # what is measured, and the figure

# Servers to compare with ##########################################################################


def listen() -> socket.socket:
    """Return a socket that listens on a free port, after saying where."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    return listener


def serve_nothing(_database: str) -> None:
    """Serve handlers that do nothing with waitress as it comes."""
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

    waitress.serve(app, sockets=[listen()], _quiet=True)


def serve_thread(database: str) -> None:
    """Serve the whole app on waitress with one thread of waitress's own, which opens the store."""

    @functools.cache
    def app() -> Callable:
        return rockets.create_app(rockets.Store(database))

    waitress.serve(lambda *call: app()(*call), sockets=[listen()], _quiet=True, threads=1)


def serve_fastapi(database: str) -> None:
    import fastapi
    import uvicorn

    app, store = fastapi.FastAPI(), rockets.Store(database)

    @app.post("/messages", status_code=202)
    async def post_message(request: fastapi.Request) -> dict:
        return {"status": store.apply(rockets.parse_message(await request.body()))}

    config = uvicorn.Config(app, log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listen()])


def flask_app(database: str) -> Callable:
    import flask

    app, store = flask.Flask("peer"), rockets.Store(database)

    @app.post("/messages")
    def post_message() -> tuple[dict, int]:
        return {"status": store.apply(rockets.parse_message(flask.request.get_data()))}, 202

    return app


def serve_flask(database: str) -> None:
    listener = listen()
    listener.set_inheritable(True)
    options = [f"--bind=fd://{listener.fileno()}", "--log-level=error"]
    options += [f"--chdir={Path(__file__).parent}", f"bench:flask_app({database!r})"]
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *options])


PEERS = {
    "waitress as it comes": serve_nothing,
    "waitress's own thread": serve_thread,
    "FastAPI and uvicorn": serve_fastapi,
    "Flask and gunicorn": serve_flask,
}

# Load #############################################################################################


class Server:
    """A server in a process of its own, within the with block; and what is measured of it."""

    def __init__(self, command: list[object]):
        self.command = command
        self.messages = launch.fly(seed=444)

    def __enter__(self) -> "Server":
        self.process, self.url = launch.start(*self.command)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def rate(self, requests: list[bytes], concurrency: int) -> float:
        """Return how many requests a second are answered."""
        sender = launch.Sender(self.url, concurrency)
        seconds = sender.run(requests)
        if sender.retries:
            sys.exit(f"bench: {self.command} answers {sender.retries}")
        return len(requests) / seconds

    def posts(self, messages: Iterator[dict], count: int) -> list[bytes]:
        """Return messages as requests, made beforehand so that only their sending takes time."""
        bodies = [json.dumps(message).encode() for message in islice(messages, count)]
        return [launch.http_request("POST", f"{self.url}/messages", body) for body in bodies]

    def launch_rockets(self, fleet: int) -> None:
        messages = launch.fly(seed=445, fleet=fleet)
        launches = (sent for sent in messages if sent["metadata"]["messageNumber"] == 1)
        self.rate(self.posts(launches, fleet), concurrency=20)

    def post_rate(self, concurrency: int) -> float:
        return self.rate(self.posts(self.messages, POSTS), concurrency)

    def get_rate(self, path: str, count: int, concurrency: int) -> float:
        return self.rate([launch.http_request("GET", self.url + path)] * count, concurrency)

    def unchanged_rate(self) -> float:
        """Return how often a second one client is told that the list has not changed."""
        connection = HTTPConnection(urlsplit(self.url).netloc)

        def ask(tag: str) -> HTTPResponse:
            connection.request("GET", LIST, headers={"If-None-Match": tag})
            with connection.getresponse() as answer:
                answer.read()
                return answer

        tag = ask('"none"').headers.get("ETag", "*")
        began = time.perf_counter()
        if {ask(tag).status for _ in range(GETS)} != {304}:
            sys.exit(f"bench: not every GET of {self.url}{LIST} was answered 304")
        return GETS / (time.perf_counter() - began)

    def peak_memory(self) -> float:
        """Return the MiB that the process has held at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def service(checkout: Path, database: Path) -> Server:
    return Server(launch.service(database, program=checkout / "rockets.py"))


def peer(python: str, name: str, database: Path) -> Server:
    return Server([python, __file__, "serve", name, database])


def filled(database: Path, size: int) -> tuple:
    """Return a store with so many messages, and those that come next, as the store takes them."""
    store = rockets.Store(str(database))
    bodies = (json.dumps(message).encode() for message in launch.fly(seed=444))
    messages = map(rockets.parse_message, bodies)
    for _ in range(size // FILLING):
        with store.transaction():
            for message in islice(messages, FILLING):
                store.apply(message)
    return store, messages


# Rows #############################################################################################

ROCKET = f"/rockets/{next(launch.fly(seed=445))['metadata']['channel']}"


def posting(concurrency: int) -> Callable:
    return partial(Server.post_rate, concurrency=concurrency)


def getting(path: str, count: int, concurrency: int) -> Callable:
    return partial(Server.get_rate, path=path, count=count, concurrency=concurrency)


NOTHING, THREAD, *OTHERS = PEERS
COMPARED = (  # row, what is measured, rockets that are there, how, against whom
    ("post", "durable POST, 1 at a time", 0, posting(1), (NOTHING, THREAD)),
    ("post", "durable POST, 3 at a time", 0, posting(3), (NOTHING, THREAD)),
    ("post", "durable POST, 20 at a time", 0, posting(20), (NOTHING, THREAD)),
    ("rocket", "GET of one rocket, 3 at a time", 20, getting(ROCKET, GETS, 3), (NOTHING,)),
    ("lists", "list of 20 rockets", 20, getting(LIST, 125, 1), ()),
    ("lists", "list of 1,000 rockets", 1000, getting(LIST, 25, 1), ()),
    ("lists", "list of 1,000 of 10,000 rockets", 10_000, getting(LIST, 25, 1), ()),
    ("unchanged", "unchanged list, connection kept", 20, Server.unchanged_rate, (NOTHING,)),
)


def compare(
    what: str, fleet: int, measure: Callable, opponents: dict, folder: Path, pairs: int
) -> Iterator[Row]:
    with ExitStack() as stack:
        servers = []
        for start in (partial(service, ROOT), *opponents.values()):
            database = Path(tempfile.mkdtemp(dir=folder)) / "rockets.db"
            servers.append(stack.enter_context(start(database)))
            servers[-1].launch_rockets(fleet)
        ours, *others = zip(*measure_in_turn(servers, measure, pairs), strict=True)
    if not others:
        yield what, f"{1000 / median(ours):.2f} ms"
    for name, theirs in zip(opponents, others, strict=True):
        ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
        times = f"{median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        figures = f"{median(ours):,.0f} against {median(theirs):,.0f} a second"
        yield f"{what}, against {name}", f"{times}: {figures}"


def measure_in_turn(servers: list[Server], measure: Callable, pairs: int) -> list[list[float]]:
    """Return a figure of each server for each pair of runs. The first run warms up."""
    runs = []
    for _ in range(pairs + 1):
        slices = [[measure(server) for server in servers] for _ in range(SLICES)]
        runs.append([fmean(figures) for figures in zip(*slices, strict=True)])
    return runs[1:]


def measure_growth(folder: Path) -> Iterator[Row]:
    databases = [folder / "small.db", folder / "large.db"]
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
            server.get_rate("/health", 1, 1)
            starts.append(time.perf_counter() - began)
    yield f"start, {LARGE:,} stored, until `/health` answers", f"{median(starts):.2f} s"


def measure_run(folder: Path) -> Iterator[Row]:
    with service(ROOT, folder / "run.db") as server:
        command = [sys.executable, launch.__file__, f"{server.url}/messages"]
        command += ["--reorder=300", "--duplicates=0.1"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        what = "the test program's default run, up to 300 places late, a tenth of it twice"
        yield what, "; ".join(said[-2:])
        yield "peak memory over it", f"{server.peak_memory():.0f} MiB"


ALONE = {"growth": measure_growth, "run": measure_run}


def choose_opponents(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Callable]:
    """Return what starts the servers to compare with, by name."""
    if args.against:
        return {str(args.against): partial(service, args.against.resolve())}
    if args.peers:
        return {name: partial(peer, args.peers, name) for name in OTHERS}
    return {name: partial(peer, sys.executable, name) for name in names}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    beside = parser.add_mutually_exclusive_group().add_argument
    beside("--against", metavar="DIR", type=Path, help="compare with the service of that folder")
    beside("--peers", metavar="PYTHON", help="compare with FastAPI and Flask, run by that Python")
    option("--pairs", metavar="N", type=int, default=7, help="runs of each; default: 7")
    rows = [*dict.fromkeys(row for row, *_ in COMPARED), *ALONE]
    text = f"some rows of the table: {', '.join(rows)}"
    option("--only", metavar="ROW", nargs="+", choices=rows, default=rows, help=text)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    if args.peers:
        args.only = ["post"]
    elif args.against:
        args.only = [row for row in args.only if row not in ALONE]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as name:
        folder = Path(name).resolve()
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
        print(f"{date.today()}, {machine}, SQLite {sqlite3.sqlite_version}\n")
        print("| measured | figure |\n|---|---|", flush=True)
        tables = [
            compare(*how, choose_opponents(args, names), folder, args.pairs)
            for row, *how, names in COMPARED
            if row in args.only
        ]
        tables += [measure(folder) for row, measure in ALONE.items() if row in args.only]
        for what, figure in chain.from_iterable(tables):
            print(f"| {what} | {figure} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        logging.getLogger("waitress").setLevel("ERROR")  # not a line for each request that waits
        PEERS[sys.argv[2]](sys.argv[3])
    else:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)  # the servers are stopped and the files removed by now
