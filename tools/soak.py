"""Soak proves at full length what the tests can only show in short: that nothing acknowledged is lost.

    python tools/soak.py                     about a minute; exits 1 if anything was lost or refused

It runs the service on a database of its own and kills it again and again while messages come in, sends a burst, and
crowds it with connections that do nothing, hardly anything, or never read. Each message comes on a new connection and
again until it is acknowledged; then every rocket and every entry of its log is compared with what was sent.

Needs Linux, and the service's packages.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from pathlib import Path

import bench
import launch

SEED = 444
KILLS = 20
LIFE = (0.2, 1.0)  # seconds from start to kill
MESSAGES = 20_000  # at least, while the service is killed
BURST, BURST_WIDTH = 5000, 200  # messages, and connections at a time
IDLE, SLOW = 500, 200  # connections that send nothing, and a byte a second
ROUNDS = 5  # of measuring without and with them
POSTS = 2000  # in each round
SETTLING = 2  # seconds until the service has seen that they are gone
CONCURRENCY = 8  # messages on their way at a time

Row = tuple[str, str, int]  # what was done, the figures, how many messages were lost, wrong or refused


class Flight:
    """All that was sent to one database, and the comparison of what it holds with that."""

    def __init__(self):
        self.messages = launch.fly(SEED)
        self.departure = launch.local_time()
        self.rockets: dict[str, dict] = {}
        self.sent = 0

    def requests(self, url: str) -> Iterator[bytes]:
        """Yield the next messages as requests, without end."""
        for message in self.messages:
            launch.fold(self.rockets, message)
            self.sent += 1
            yield launch.http_request("POST", f"{url}/messages", json.dumps(message).encode())

    def faults(self, url: str) -> int:
        """Return how many fields of rockets, and entries of their logs, are not as they should be; print them."""
        wrong = list(launch.compare(self.rockets, launch.read_rockets(f"{url}/"), self.departure))
        for channel, rocket in self.rockets.items():
            numbers: list[int] = []
            while page := json.loads(bench.get(url, f"/rockets/{channel}/messages?after={len(numbers)}"))["messages"]:
                numbers += [message["metadata"]["messageNumber"] for message in page]
            if numbers != list(range(1, rocket["lastMessageNumber"] + 1)):
                wrong.append(f"{channel} has {len(numbers)} messages, not {rocket['lastMessageNumber']}")
        print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
        return len(wrong)


def progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def send_while_killed(flight: Flight, database: Path, port: int) -> Iterator[Row]:
    """Send messages while the service is killed with SIGKILL and started again."""
    url = f"http://127.0.0.1:{port}"
    dice = random.Random(SEED)
    sender = launch.Sender(url, CONCURRENCY, notice=lambda line: None)
    survived = threading.Event()

    def requests() -> Iterator[bytes]:
        for request in flight.requests(url):
            yield request
            if flight.sent >= MESSAGES and survived.is_set():
                return

    sending = threading.Thread(target=sender.run, args=(requests(),), daemon=True)
    sending.start()
    for kill in range(KILLS):
        with bench.service(database, port) as (_, process, _):
            time.sleep(dice.uniform(*LIFE))
            os.kill(process, signal.SIGKILL)
            progress(f"{kill + 1} of {KILLS} kills, {flight.sent:,} messages")
    survived.set()
    with bench.service(database, port):
        while sending.is_alive():
            progress(f"{KILLS} kills, {flight.sent:,} messages")
            sending.join(0.1)
        again = f"{sender.retries.total():,} sent again, {sender.duplicates:,} of them stored already"
        yield f"SIGKILL at {KILLS} random moments", f"{flight.sent:,} messages, {again}", flight.faults(url)


def send_burst(flight: Flight, url: str) -> Iterator[Row]:
    """Send many messages at once; each must be answered with a 2xx at the first try."""
    progress("burst")
    sender = launch.Sender(url, BURST_WIDTH, notice=lambda line: print(line, file=sys.stderr))
    took = sender.run(islice(flight.requests(url), BURST))
    slowest = max(sender.latencies)
    yield (
        f"{BURST:,} messages over {BURST_WIDTH} connections at once",
        f"{len(sender.latencies):,} answered at the first try in {took:.1f} s, the slowest after {slowest:.2f} s",
        sender.retries.total() + flight.faults(url),
    )


@contextmanager
def crowd(flight: Flight, port: int) -> Iterator[None]:
    """Hold connections that send nothing, some that send a byte a second, and one that asks and never reads."""
    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", port)))

        for _ in range(IDLE):
            connect()
        slow = [connect() for _ in range(SLOW)]
        for connection in slow:
            connection.sendall(b"POST /messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n")
        never_reads = connect()
        never_reads.setblocking(False)
        with suppress(BlockingIOError):
            for channel in flight.rockets:
                never_reads.send(f"GET /rockets/{channel}/messages HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 50)
        gone = threading.Event()

        def drip() -> None:
            for place in count():
                if gone.wait(1 / SLOW):
                    return
                slow[place % SLOW].send(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            yield
        finally:
            gone.set()
            dripping.join()


def send_through_crowd(flight: Flight, url: str, port: int, process: int) -> Iterator[Row]:
    """Measure the sender's and a reader's latency without and with the crowd, in turn."""

    def files() -> int:
        return len(os.listdir(f"/proc/{process}/fd"))

    def medians() -> tuple[float, float]:
        sender = launch.Sender(url, concurrency=3)
        sender.run(islice(flight.requests(url), POSTS))
        reads = bench.latencies(url, "/rockets?sort=speed&order=desc")
        return 1000 * statistics.median(sender.latencies), statistics.median(reads)

    pairs, before = [], files()
    for number in range(ROUNDS):
        progress(f"round {number + 1} of {ROUNDS} without and with {IDLE + SLOW + 1} idle and slow connections")
        alone = medians()
        with crowd(flight, port):
            time.sleep(1)
            pairs.append((alone, medians()))
            during = files()
        time.sleep(SETTLING)
    peak = int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    for side, name in enumerate(("POST", "`GET /rockets`")):
        alone, crowded = (statistics.median(pair[which][side] for pair in pairs) for which in (0, 1))
        times = statistics.median(pair[1][side] / pair[0][side] for pair in pairs)
        figures = f"median {crowded:.2f} ms with them, {alone:.2f} ms without: {times:.2f} times"
        yield f"{name} beside {IDLE} idle, {SLOW} slow connections, one that never reads", figures, 0
    figures = f"{before} open files before, {during} during, {files()} after; {peak:.0f} MiB at most"
    yield "what the service held for them", figures, flight.faults(url)


def main() -> None:
    """Read the command line, run everything, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    option = parser.add_argument
    option("--port", metavar="N", type=int, default=8288, help="a free port")
    option("--folder", type=Path, default=Path(), help="where to put the database; its disk is what counts")
    args = parser.parse_args()
    lost = 0
    print("| done | measured | lost, wrong or refused |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=args.folder) as folder:
        flight, database = Flight(), Path(folder) / "soak.db"

        def rows() -> Iterator[Row]:
            yield from send_while_killed(flight, database, args.port)
            with bench.service(database, args.port) as (url, process, _):
                yield from send_burst(flight, url)
                yield from send_through_crowd(flight, url, args.port, process)

        for done, measured, faults in rows():
            progress("")
            print(f"| {done} | {measured} | {faults} |", flush=True)
            lost += faults
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the service is stopped and its files are removed by now
