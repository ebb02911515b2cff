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
from functools import cache
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

    @cache
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
LIST = "/rockets?sort=speed&order=desc&limit=1000"
ROCKET = f"/rockets/{next(launch.fly(seed=445))['metadata']['channel']}"


class Row(NamedTuple):
    what: str
    method: str
    path: str
    count: int  # requests in one slice
    concurrency: int
    fleet: int = 0  # rockets that are there
    peers: tuple[str, ...] = ()


NOTHING, THREAD, *OTHERS = PEERS
ROWS = (
    Row("durable POST, 1 at a time", "POST", "/messages", 500, 1, peers=(NOTHING, THREAD)),
    Row("durable POST, 3 at a time", "POST", "/messages", 500, 3, peers=(NOTHING, THREAD)),
    Row("durable POST, 20 at a time", "POST", "/messages", 500, 20, peers=(NOTHING, THREAD)),
    Row("GET of one rocket, 3 at a time", "GET", ROCKET, 400, 3, fleet=20),
    Row("list of 20 rockets", "GET", LIST, 125, 1, fleet=20),
    Row("list of 1,000 rockets", "GET", LIST, 25, 1, fleet=1000),
    Row("list of 1,000 of 10,000 rockets", "GET", LIST, 25, 1, fleet=10_000),
)


def as_bodies(messages: Iterable[dict]) -> list[bytes]:
    return [json.dumps(message).encode() for message in messages]


def rate(sender: launch.Sender, bodies: list[bytes]) -> float:
    """Return how many requests a second are answered."""
    seconds = sender.run(bodies)
    if sender.retries:
        sys.exit(f"bench: a request is answered with {sender.failure}")
    return len(bodies) / seconds


def launch_rockets(url: str, fleet: int) -> None:
    messages = launch.fly(seed=445, fleet=fleet)
    launches = (sent for sent in messages if sent["metadata"]["messageNumber"] == 1)
    rate(launch.Sender(f"{url}/messages", concurrency=20), as_bodies(islice(launches, fleet)))


def measure_in_turn(senders: list[launch.Sender], row: Row, pairs: int) -> list[list[float]]:
    """Return the rate of each sender for each pair of runs. The first run warms up."""
    messages, runs = launch.fly(seed=444), []
    for _ in range(pairs + 1):
        slices = []
        for _ in range(SLICES):
            bodies = [b""] * row.count
            if row.method == "POST":
                bodies = as_bodies(islice(messages, row.count))
            slices.append([rate(sender, bodies) for sender in senders])
        runs.append([fmean(rates) for rates in zip(*slices, strict=True)])
    return runs[1:]


def compare(row: Row, opponents: dict[str, list], folder: Path, pairs: int) -> Iterator[tuple]:
    """Yield what was measured and the figure, for each opponent."""
    with ExitStack() as stack:
        senders = []
        for command in (launch.service(), *opponents.values()):
            database = Path(tempfile.mkdtemp(dir=folder)) / "rockets.db"
            server = stack.enter_context(launch.Server(*command, database))
            launch_rockets(server.url, row.fleet)
            senders.append(launch.Sender(server.url + row.path, row.concurrency, row.method))
        ours, *others = zip(*measure_in_turn(senders, row, pairs), strict=True)
    if not others:
        yield row.what, f"{1000 / median(ours):.2f} ms"
    for name, theirs in zip(opponents, others, strict=True):
        ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
        times = f"{median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        figures = f"{median(ours):,.0f} against {median(theirs):,.0f} a second"
        yield f"{row.what}, against {name}", f"{times}: {figures}"


def measure_run(folder: Path) -> Iterator[tuple]:
    """Yield what the test program's default run takes, as compare() does."""
    with launch.Server(*launch.service(), folder / "run.db") as server:
        command = [sys.executable, launch.__file__, f"{server.url}/messages"]
        command += ["--reorder=300", "--duplicates=0.1"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        yield "default run, up to 300 places late, a tenth of it twice", "; ".join(said[-2:])
        status = Path(f"/proc/{server.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0])
        yield "peak memory over it", f"{peak / 1024:.0f} MiB"


# Command line #####################################################################################


def choose_opponents(args: argparse.Namespace, row: Row) -> dict[str, list]:
    """Return the commands of the servers to compare with, but for the database, by name."""
    if args.against:
        return {str(args.against): launch.service(args.against.resolve() / "rockets.py")}
    names = OTHERS if args.peers else row.peers
    return {name: [args.peers or sys.executable, __file__, "serve", name] for name in names}


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
        is_for_peers = row.method == "POST" or not args.peers
        if args.only in (row.method.lower(), None) and is_for_peers:
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
