"""Bench measures what the service costs, and prints it as a Markdown table.

    python tools/bench.py                    everything; about four minutes
    python tools/bench.py --only post lists  some of it

What is compared is run in turn, A B A B, and given as the median of the pairs' ratios, as times on a shared machine
move. There are two ceilings, whose handlers do next to nothing: waitress as it comes, with the service's limit of
connections, and the service's own loop. Each request is a new connection. All files are in a folder of their own,
removed in the end.
"""

import argparse
import http.client
import json
import logging
import os
import platform
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import launch

SERVICE = Path(__file__).resolve().parent.parent / "rockets.py"
sys.path.insert(0, str(SERVICE.parent))

SEED = 444
PAIRS = 7  # of runs to compare
POSTS = 4000  # in each of them, some seconds' worth
GETS = 3000  # in each of them
READS = 200  # of a list; the 99th percentile is the second worst
APPLIED = 2000  # messages to find the cost of one
SMALL, LARGE = 10_000, 1_000_000  # messages stored
FILLING = 5000  # messages in a transaction while a database is filled
FLIGHT = 100_000  # messages, as the test program sends
STARTS = 5
SYNCING = 3  # seconds
PATIENCE = 30  # seconds for a server to start or stop

Row = tuple[str, str, str]  # what is measured, the figure, what it should reach

# Servers ##############################################################################################################


def serve_nothing(way: str) -> None:
    """Serve handlers that do nothing, with waitress as it comes or in the service's own loop."""
    import bottle
    import waitress

    import rockets

    app = bottle.Bottle()

    @app.post("/messages")
    def post_message() -> str:
        bottle.request.body.read()
        bottle.response.status = 202
        return "{}"

    @app.get("/health")
    def get_health() -> str:
        return "{}"

    @app.get("/constant/<size>")
    def get_constant(size: str) -> str:
        return "x" * int(size)

    logging.getLogger("waitress").setLevel("ERROR")
    sockets = rockets.listen("127.0.0.1", 0)
    greeting = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    if way == "waitress":
        print(greeting, flush=True)
        waitress.serve(app, sockets=sockets, _quiet=True, connection_limit=rockets.MAX_CONNECTIONS)
    else:
        rockets.serve(app, SimpleNamespace(transaction=nullcontext), sockets, greeting)


def service(database: Path, port: int = 0) -> AbstractContextManager:
    return running(str(SERVICE), "--host=127.0.0.1", f"--port={port}", f"--database={database}")


def nothing(way: str) -> AbstractContextManager:
    return running(__file__, "serve", way)


@contextmanager
def running(*arguments: str) -> Iterator[tuple[str, int, float]]:
    """Run a server in the background. Yield its URL, its process id, and the seconds until /health answered."""
    began = time.perf_counter()
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        listens = re.search(r"http://[0-9.:]+", process.stdout.readline())
        if not listens:
            sys.exit(f"bench: {' '.join(command)} does not start")
        get(listens[0], "/health")
        yield listens[0], process.pid, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(PATIENCE)
        process.stdout.close()


def get(url: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != 200:
        raise OSError(f"GET {path} was answered {answer.status}")
    return body


# Measuring ############################################################################################################


def posts(url: str, messages: Iterator[dict], count: int) -> list[bytes]:
    """Return the next messages as requests, made beforehand so that only their sending takes time."""
    return [
        launch.http_request("POST", f"{url}/messages", json.dumps(message).encode())
        for message in islice(messages, count)
    ]


def rate(url: str, requests: list[bytes], concurrency: int) -> float:
    """Send requests and return how many a second were answered."""
    return len(requests) / launch.Sender(url, concurrency).run(requests)


def latencies(url: str, path: str) -> list[float]:
    """Return the milliseconds of each of many GETs, one after the other, shortest first."""
    sender = launch.Sender(url, concurrency=1)
    sender.run([launch.http_request("GET", url + path)] * READS)
    return sorted(1000 * seconds for seconds in sender.latencies)


def compared(pairs: list[tuple[float, float]]) -> str:
    """Describe the rates of service and ceiling."""
    ratios = sorted(service / ceiling for service, ceiling in pairs)
    service, ceiling = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} in {len(pairs)} pairs"
    return f"{statistics.median(ratios):.2f} of the ceiling ({spread}): {service:,.0f} of {ceiling:,.0f} a second"


def fill(store, messages: Iterator[dict], count: int) -> set[str]:
    """Store messages without HTTP, many in a transaction, and return their channels."""
    import rockets

    channels = set()
    for done in range(0, count, FILLING):
        batch = islice(messages, min(FILLING, count - done))
        with store.transaction():
            for message in batch:
                parsed = rockets.parse_message(json.dumps(message).encode())
                channels.add(parsed["channel"])
                if store.apply(parsed) != "applied":
                    sys.exit("bench: a message was not applied while a database was filled")
    return channels


def sync_times(folder: Path) -> list[float]:
    """Return the seconds of each of many disk syncs after 4 KiB more of a file, shortest first."""
    times = []
    with open(folder / "sync", "wb", buffering=0) as file:
        while sum(times) < SYNCING:
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return sorted(times)


# Rows #################################################################################################################


def measure_post(folder: Path) -> Iterator[Row]:
    messages = launch.fly(SEED)
    with service(folder / "post.db") as (ours, *_), nothing("waitress") as (stock, *_), nothing("loop") as (loop, *_):
        for concurrency, goal in ((3, 0.70), (20, 0.65)):
            rounds = []
            for _ in range(PAIRS + 1):
                requests = posts(ours, messages, POSTS)
                rounds.append([rate(url, requests, concurrency) for url in (ours, stock, loop)])
            for place, ceiling, reach in (
                (1, "waitress as it comes", f"at least {goal:.2f}, better 0.80"),
                (2, "the service's own loop", ""),
            ):
                pairs = [(figures[0], figures[place]) for figures in rounds[1:]]
                yield f"durable POST, {concurrency} at a time, against {ceiling}", compared(pairs), reach


def measure_growth(folder: Path) -> Iterator[Row]:
    import rockets

    stores = []
    for size in (SMALL, LARGE):
        messages = launch.fly(SEED)
        store = rockets.Store(str(folder / f"{size}.db"))
        fill(store, messages, size)
        stores.append((store, messages, []))
    for _ in range(APPLIED):
        for store, messages, times in stores:
            row = rockets.parse_message(json.dumps(next(messages)).encode())
            began = time.perf_counter()
            store.apply(row)
            times.append(time.perf_counter() - began)
    for store, _, _ in stores:
        store.close()
    (small, large), (small_mean, large_mean) = (
        [1000 * average(times) for _, _, times in stores] for average in (statistics.median, statistics.mean)
    )
    yield (
        f"cost of a message with {LARGE:,} stored, against {SMALL:,}",
        f"{large / small:.2f} times: {large:.2f} ms against {small:.2f} ms"
        f" ({large_mean / small_mean:.2f} times on average, with SQLite's tidying up)",
        "at most 1.25 times",
    )
    size = (folder / f"{LARGE}.db").stat().st_size / (LARGE + APPLIED)
    yield f"size on disk, {LARGE:,} stored", f"{size:.0f} bytes a message", "at most 200"
    starts = []
    for _ in range(STARTS):
        with service(folder / f"{LARGE}.db") as (_, _, seconds):
            starts.append(seconds)
    yield f"start, {LARGE:,} stored, until `/health` answers", f"{statistics.median(starts):.2f} s", "under 1 s"


def measure_memory(folder: Path) -> Iterator[Row]:
    with service(folder / "memory.db") as (url, process, _):
        messages = launch.fly(SEED)
        sender = launch.Sender(url, concurrency=20)
        bodies = (json.dumps(message).encode() for message in islice(messages, FLIGHT))
        sender.run(launch.http_request("POST", f"{url}/messages", body) for body in bodies)
        status = Path(f"/proc/{process}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    yield f"peak memory over {FLIGHT:,} messages, 20 at a time", f"{peak:.0f} MiB", "at most 64 MiB"


def measure_lists(folder: Path) -> Iterator[Row]:
    import rockets

    path = "/rockets?sort=speed&order=desc"
    for fleet in (20, 1000, 10_000):
        database = folder / f"fleet-{fleet}.db"
        store = rockets.Store(str(database))
        for size, messages in ((20, launch.fly(SEED)), (fleet - 20, launch.fly(fleet, fleet - 20))):
            seen = set()
            while len(seen) < size:
                seen |= fill(store, messages, 1000)
        store.close()
        with service(database) as (url, *_):
            alone = latencies(url, path)
            sending = [sys.executable, launch.__file__, f"{url}/messages", f"--seed={SEED}", "--no-verify"]
            sender = subprocess.Popen(sending, stdout=subprocess.DEVNULL)
            try:
                time.sleep(2)  # what was stored above comes again first
                busy = latencies(url, path)
            finally:
                sender.kill()
                sender.wait()
        (p50, p99), (busy_p50, busy_p99) = ((times[READS // 2], times[READS * 99 // 100]) for times in (alone, busy))
        yield (
            f"`GET {path}`, {fleet:,} rockets",
            f"p50 {p50:.1f} ms, p99 {p99:.1f} ms; while posts run {busy_p50:.1f} and {busy_p99:.1f} ms"
            f" ({busy_p99 / p50:.1f} times the p50 alone)",
            f"{'p50 at most 100 ms; ' if fleet == 10_000 else ''}at most 3.0 times",
        )


def measure_rocket(folder: Path) -> Iterator[Row]:
    import rockets

    store = rockets.Store(str(folder / "rocket.db"))
    channel = fill(store, launch.fly(SEED), SMALL).pop()
    store.close()
    with service(folder / "rocket.db") as (ours, *_), nothing("waitress") as (stock, *_), nothing("loop") as (loop, *_):
        path = f"/rockets/{channel}"
        size = len(get(ours, path))
        targets = (f"{ours}{path}", f"{stock}/constant/{size}", f"{loop}/constant/{size}")
        requests = [[launch.http_request("GET", target)] * GETS for target in targets]
        rounds = [
            [rate(url, wanted, 3) for url, wanted in zip((ours, stock, loop), requests, strict=True)]
            for _ in range(PAIRS + 1)
        ]
    for place, ceiling, reach in ((1, "waitress as it comes", "at least 0.80"), (2, "the service's own loop", "")):
        pairs = [(figures[0], figures[place]) for figures in rounds[1:]]
        yield f"`GET /rockets/<channel>`, 3 at a time, against {ceiling}", compared(pairs), reach


ROWS = {
    "post": measure_post,
    "growth": measure_growth,
    "memory": measure_memory,
    "lists": measure_lists,
    "rocket": measure_rocket,
}


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    option = parser.add_argument
    option("--only", metavar="ROW", nargs="+", choices=ROWS, default=list(ROWS), help=f"some of {', '.join(ROWS)}")
    option("--folder", type=Path, default=Path(), help="where to put the databases; its disk is what counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as name:
        folder = Path(name)
        syncs = sync_times(folder)
        print(
            f"Measured on {date.today()}: {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"SQLite {sqlite3.sqlite_version}, a disk sync takes {1000 * statistics.median(syncs):.2f} ms.\n\n"
            "| measured | figure | to reach |\n|---|---|---|\n"
            f"| the disk's own limit: append 4 KiB, `fdatasync` | {len(syncs) / sum(syncs):,.0f} a second | |",
            flush=True,
        )
        for name in args.only:
            for row in ROWS[name](folder):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve_nothing(sys.argv[2])
    else:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)  # the servers are stopped and the files removed by now
