"""Bench measures how fast the service is, and prints it as a Markdown table.

    python tools/bench.py                  beside waitress as it comes, and by itself
    python tools/bench.py --against DIR    beside another checkout of this project
    python tools/bench.py --peers PYTHON   beside FastAPI and Flask, run by that Python

What is compared runs in turn, A B A B, in slices of a run, and a ratio is the median of the runs'
ratios, as times on a shared machine move. "waitress as it comes" is waitress.serve() around a
handler that does nothing. The other peers keep messages in the same store, with a commit for each.
The Python for them needs this project's packages, fastapi, uvicorn, flask and gunicorn. Each
request is a new connection. The databases are in the current folder, whose disk counts, and are
removed in the end. Needs Linux.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import bottle
import launch
import waitress

sys.path.insert(0, str(launch.SERVICE.parent))
import rockets

# Servers to compare with ##########################################################################


def listen() -> socket.socket:
    """Return a socket that listens on a free port, after saying where."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    return listener


def serve_nothing(_database: str) -> None:
    app = bottle.Bottle()

    @app.post("/messages")
    def post_message() -> str:
        bottle.request.body.read()
        bottle.response.status = 202
        return "{}"

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

# What is measured #################################################################################

SLICES = 8  # in one run, which takes some seconds; whatever else the machine does meets all alike
POSTS = 500  # in one slice
LIST = "/rockets?sort=speed&order=desc&limit=1000"
ROCKET = f"/rockets/{next(launch.fly(seed=445))['metadata']['channel']}"


class Server:
    """A server in a process of its own, within the with block."""

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
            sys.exit(f"bench: {self.command} answers {sender.failure}")
        return len(requests) / seconds

    def launch_rockets(self, fleet: int) -> None:
        messages = launch.fly(seed=445, fleet=fleet)
        launches = (sent for sent in messages if sent["metadata"]["messageNumber"] == 1)
        self.rate(as_posts(self, islice(launches, fleet)), concurrency=20)


def as_posts(server: Server, messages: Iterable[dict]) -> list[bytes]:
    bodies = [json.dumps(message).encode() for message in messages]
    return [launch.http_request("POST", f"{server.url}/messages", body) for body in bodies]


def posts(server: Server) -> list[bytes]:
    return as_posts(server, islice(server.messages, POSTS))


def gets(path: str, count: int) -> Callable[[Server], list[bytes]]:
    return lambda server: [launch.http_request("GET", server.url + path)] * count


class Row(NamedTuple):
    name: str
    what: str
    fleet: int  # rockets that are there
    requests: Callable[[Server], list[bytes]]  # of one slice
    concurrency: int
    peers: tuple[str, ...] = ()


NOTHING, THREAD, *OTHERS = PEERS
ROWS = (
    Row("post", "durable POST, 1 at a time", 0, posts, 1, (NOTHING, THREAD)),
    Row("post", "durable POST, 3 at a time", 0, posts, 3, (NOTHING, THREAD)),
    Row("post", "durable POST, 20 at a time", 0, posts, 20, (NOTHING, THREAD)),
    Row("get", "GET of one rocket, 3 at a time", 20, gets(ROCKET, 400), 3),
    Row("get", "list of 20 rockets", 20, gets(LIST, 125), 1),
    Row("get", "list of 1,000 rockets", 1000, gets(LIST, 25), 1),
    Row("get", "list of 1,000 of 10,000 rockets", 10_000, gets(LIST, 25), 1),
)


def compare(row: Row, opponents: dict[str, Callable], folder: Path, pairs: int) -> Iterator[tuple]:
    """Yield what was measured and the figure, for each opponent."""
    with ExitStack() as stack:
        servers = []
        for command in (launch.service, *opponents.values()):
            database = Path(tempfile.mkdtemp(dir=folder)) / "rockets.db"
            servers.append(stack.enter_context(Server(command(database))))
            servers[-1].launch_rockets(row.fleet)
        ours, *others = zip(*measure_in_turn(servers, row, pairs), strict=True)
    if not others:
        yield row.what, f"{1000 / median(ours):.2f} ms"
    for name, theirs in zip(opponents, others, strict=True):
        ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
        times = f"{median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        figures = f"{median(ours):,.0f} against {median(theirs):,.0f} a second"
        yield f"{row.what}, against {name}", f"{times}: {figures}"


def measure_in_turn(servers: list[Server], row: Row, pairs: int) -> list[list[float]]:
    """Return the rate of each server for each pair of runs. The first run warms up."""
    runs = []
    for _ in range(pairs + 1):
        slices = [
            [server.rate(row.requests(server), row.concurrency) for server in servers]
            for _ in range(SLICES)
        ]
        runs.append([fmean(rates) for rates in zip(*slices, strict=True)])
    return runs[1:]


def measure_run(folder: Path) -> Iterator[tuple]:
    """Yield what the test program's default run takes, as compare() does."""
    with Server(launch.service(folder / "run.db")) as server:
        command = [sys.executable, launch.__file__, f"{server.url}/messages"]
        command += ["--reorder=300", "--duplicates=0.1"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        yield "default run, up to 300 places late, a tenth of it twice", "; ".join(said[-2:])
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0])
        yield "peak memory over it", f"{peak / 1024:.0f} MiB"


# Command line #####################################################################################


def peer(python: str, name: str, database: Path) -> list[object]:
    return [python, __file__, "serve", name, database]


def choose_opponents(args: argparse.Namespace, row: Row) -> dict[str, Callable]:
    """Return what makes the commands of the servers to compare with, by name."""
    if args.against:
        program = args.against.resolve() / "rockets.py"
        return {str(args.against): partial(launch.service, program=program)}
    if args.peers:
        return {name: partial(peer, args.peers, name) for name in OTHERS}
    return {name: partial(peer, sys.executable, name) for name in row.peers}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--against", metavar="DIR", type=Path, help="compare with the service of that folder")
    option("--peers", metavar="PYTHON", help="compare with FastAPI and Flask, run by that Python")
    option("--pairs", metavar="N", type=int, default=3, help="runs of each; default: 3")
    option("--only", choices=["post", "get", "run"], help="a part of the table")
    return parser.parse_args()


def measure(args: argparse.Namespace, folder: Path) -> Iterator[tuple]:
    for row in ROWS:
        is_for_peers = row.name == "post" or not args.peers
        if args.only in (row.name, None) and is_for_peers:
            yield from compare(row, choose_opponents(args, row), folder, args.pairs)
    if args.only in ("run", None) and not args.against and not args.peers:
        yield from measure_run(folder)


def main() -> None:
    args = read_arguments()
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{date.today()}, {machine}, SQLite {sqlite3.sqlite_version}\n")
    print("| measured | figure |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as name:
        for what, figure in measure(args, Path(name).resolve()):
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
