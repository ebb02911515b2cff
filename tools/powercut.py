"""Powercut replays power cuts, and counts the acknowledged messages that are gone after them.

It runs the service under strace while messages come in over several connections, replays what the
service did to its files up to random moments, opens what the disk may hold by then, and compares.

    python tools/powercut.py                        exits 1 if anything was lost
    python tools/powercut.py COPY/rockets.py        tries a copy, which may be broken on purpose

What the last sync of a file has confirmed is there. Of what was written to it since, each sector of
each write was kept or lost by chance, and so was each change of its size that no write has made.
Names that were made or removed are kept or lost the same way, until their folder was synced.

Needs Linux, strace 5.3 or newer, and the service's packages.
"""

import argparse
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from ast import literal_eval
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import launch

SERVICE = Path(__file__).resolve().parent.parent / "rockets.py"
SEED = 449
SECTOR = 512  # bytes, which a disk writes as a whole or not at all
CONNECTIONS = 4  # at a time
DUPLICATES, REORDER = 0.1, 20  # share of the messages, places
PADDING = 2000  # characters in a message; SQLite begins a checkpoint after 1,000 pages of 4 KiB
EARLY = 0.2  # of the cuts come before the first message, where hardly any would be by chance
START_EVERY = 20  # cuts; the others do without a process, for speed

REPLAYED = "openat pwrite64 ftruncate fsync fdatasync ?unlink unlinkat recvfrom sendto".split()
OTHERS = "write writev pwritev fallocate ?rename ?renameat renameat2 sendmsg".split()
STRACE = "strace -D -f -y -qq --seccomp-bpf -s 1000000 -e signal=none -e trace=".split()
STRACE[-1] += ",".join(REPLAYED + OTHERS)  # -D: the child is the service, and strace its grandchild

Call = tuple[str, str, bytes, int]  # name, path or connection, content, last number

# The disk #########################################################################################


def put(image: bytearray, start: int, content: bytes) -> None:
    image.extend(bytes(max(0, start - len(image))))
    image[start : start + len(content)] = content


class File:
    """A file: as programs see it, as the disk has confirmed it, and what was changed since."""

    def __init__(self):
        self.seen, self.confirmed = bytearray(), bytearray()
        self.changes: list[tuple[int, bytes | None]] = []  # start and content of a sector; a size

    def write(self, start: int, content: bytes) -> None:
        put(self.seen, start, content)
        for sector in range(start - start % SECTOR, start + len(content), SECTOR):
            self.changes.append((sector, bytes(self.seen[sector : sector + SECTOR])))

    def truncate(self, size: int) -> None:
        del self.seen[size:]
        put(self.seen, size, b"")
        self.changes.append((size, None))

    def sync(self) -> None:
        self.confirmed = bytearray(self.seen)
        self.changes.clear()

    def left(self, kept: Callable[[], bool]) -> bytearray:
        """Return the content after a power cut."""
        image = bytearray(self.confirmed)
        for start, content in self.changes:
            if kept():
                if content is None:
                    del image[start:]
                put(image, start, content or b"")
        return image


class Machine:
    """The service's folder, what it has received, and the messages it has acknowledged."""

    def __init__(self, folder: Path):
        self.folder = str(folder)
        self.files: dict[str, File] = {}
        self.confirmed: dict[str, File] = {}
        self.changes: list[tuple[str, File | None]] = []  # names made and removed since
        self.received: dict[str, bytes] = defaultdict(bytes)  # by connection
        self.acknowledged: dict[tuple, dict] = {}

    def replay(self, name: str, about: str, content: bytes, number: int) -> None:
        match name:
            case "recvfrom":
                self.received[about] += content
            case "sendto":
                if content.startswith(b"HTTP/1.1 202 "):
                    message = json.loads(self.received[about].partition(b"\r\n\r\n")[2])
                    self.acknowledged[key(message)] = message
            case "fsync" | "fdatasync" if about == self.folder:
                self.confirmed = dict(self.files)
                self.changes.clear()
            case "fsync" | "fdatasync":
                self.files[about].sync()
            case "pwrite64":
                self.files[about].write(number, content)
            case "ftruncate":
                self.files[about].truncate(number)
            case "openat":
                if about not in self.files:
                    self.files[about] = File()
                    self.changes.append((about, self.files[about]))
            case "unlink" | "unlinkat":
                del self.files[about]
                self.changes.append((about, None))
            case _:
                sys.exit(f"powercut: {name} of {about} can't be replayed yet")

    def cut(self, dice: random.Random, folder: Path) -> None:
        """Make a folder with what the disk may hold at this moment."""
        share = dice.random()  # of what is kept: sometimes most, sometimes little

        def kept() -> bool:
            return dice.random() < share

        folder.mkdir()
        names = self.confirmed | dict(change for change in self.changes if kept())
        for path, file in names.items():
            if file:
                (folder / Path(path).name).write_bytes(file.left(kept))


# The trace ########################################################################################


def key(message: dict) -> tuple[str, int]:
    return message["metadata"]["channel"], message["metadata"]["messageNumber"]


def start(service: Path, folder: Path, *strace: str) -> tuple[subprocess.Popen, str]:
    """Start the service; return the process and its URL. Raise OSError if it does not start."""
    options = ["--host=127.0.0.1", "--port=0", f"--database={folder / 'rockets.db'}"]
    command = [*strace, sys.executable, service, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    listens = re.search(r"http://[0-9.:]+", process.stdout.readline())
    if not listens:
        raise OSError(f"the service does not start, and exits with {process.wait()}")
    return process, listens[0]


def record(service: Path, folder: Path, trace: Path, count: int) -> None:
    """Run the service until it has acknowledged so many messages, some of them twice; stop it."""
    process, url = start(service, folder, *STRACE, "-o", str(trace))

    def bodies() -> Iterator[bytes]:
        for message in islice(launch.fly(SEED), count):
            message["message"]["note"] = "x" * PADDING
            yield json.dumps(message).encode()

    disordered = launch.disorder(bodies(), SEED, REORDER, DUPLICATES)
    requests = (launch.http_request("POST", f"{url}/messages", body) for *_, body in disordered)
    try:
        launch.Sender(f"{url}/messages", CONNECTIONS, notice=sys.exit).run(requests)
    finally:
        process.terminate()
        process.communicate()  # until strace, too, has closed stdout, and the trace is complete


def calls(trace: Path, folder: Path) -> Iterator[Call]:
    """Yield what was done to the folder, its files and the connections, in order of the returns."""
    for line in trace.open("rb"):
        call = line.split(maxsplit=1)[1]
        if b"<unfinished ...>" in call:
            sys.exit("powercut: calls of several threads at once can't be replayed yet")
        before, quote, rest = call.partition(b'"')
        content, _, after = rest.rpartition(b'"') if quote else (b"", b"", call)
        # what is written to a file whose name is gone, which "(deleted)" follows, does not matter
        name, target = re.match(rb"(\w+)\((?:\d+<(.*?)>(?!\())?", before).groups(b"")
        about = (content if name.startswith((b"open", b"unlink")) else target).decode()
        returned = re.search(rb"(\d*)\) += \d", after)  # not -1
        # SQLite makes the -shm file anew, so what the disk holds of it does not matter
        inside = about.startswith(("socket:", str(folder))) and not about.endswith("-shm")
        if returned and inside and (name != b"openat" or b"O_CREAT" in after):
            content = literal_eval(f'b"{content.decode()}"')
            yield name.decode(), about, content, int(returned[1] or 0)


# What is left #####################################################################################


def fold(history: list[dict]) -> dict:
    """Return the rocket that the messages of a history add up to."""
    last = history[-1]["metadata"]
    rocket = {"channel": last["channel"], "type": None, "launchedAt": None, "speed": 0}
    rocket |= {"mission": None, "status": "awaiting_launch", "explosionReason": None}
    rocket |= {"missingMessages": last["messageNumber"] - len(history)}
    for message in history:
        launch.fold({last["channel"]: rocket}, message)
    return rocket if rocket["type"] else rocket | {"speed": None}


def faults(service: Path, folder: Path, acknowledged: dict[tuple, dict]) -> tuple[int, int]:
    """Return how many messages are lost, and how many rockets aren't what their messages add up to.

    Raise OSError or ValueError if the database does not open or can't be read.
    """
    rockets = importlib.import_module(service.stem)
    with closing(rockets.Store(str(folder / "rockets.db"))) as store:
        app = rockets.create_app(store)

        def get(path: str, query: str = "") -> dict:
            environ, statuses = {"PATH_INFO": path, "QUERY_STRING": query}, []
            setup_testing_defaults(environ)
            body = b"".join(app(environ, lambda status, *_: statuses.append(status)))
            if not statuses[0].startswith("200 "):
                raise OSError(f"GET {path} is answered {statuses[0]}")
            return json.loads(body)

        found, wrong = {}, 0
        for rocket in get("/rockets")["rockets"]:
            history = get(f"/rockets/{rocket['channel']}/messages", "limit=10000")["messages"]
            found |= {key(message): message for message in history}
            wrong += not history or rocket != fold(history)
    return sum(found.get(key) != message for key, message in acknowledged.items()), wrong


def cut_often(service: Path, trace: list[Call], folder: Path, cuts: int) -> Counter[str]:
    """Cut the power at random moments of the trace, and count what is lost or wrong."""
    dice, machine, totals, done = random.Random(SEED), Machine(folder / "live"), Counter(), 0
    started = next(place for place, (name, *_) in enumerate(trace) if name == "recvfrom")
    early = round(cuts * EARLY)
    moments = dice.choices(range(started), k=early)
    moments += dice.choices(range(len(trace) + 1), k=cuts - early)
    for number, moment in enumerate(sorted(moments), 1):
        for call in trace[done:moment]:
            machine.replay(*call)
        done, left = moment, folder / f"cut {number}"
        machine.cut(dice, left)
        try:
            if number % START_EVERY == 0:
                process, _ = start(service, left)
                process.kill()
                process.communicate()
            lost, wrong = faults(service, left, machine.acknowledged)
        except (OSError, ValueError) as error:
            print(f"powercut: after call {moment} of {len(trace)}: {error}", file=sys.stderr)
            lost, wrong = len(machine.acknowledged), 0
            totals["unreadable"] += 1
        totals += Counter(lost=lost, cuts=lost > 0, wrong=wrong)
        shutil.rmtree(left)
    return totals


def main() -> None:
    """Read the command line, record, cut, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("service", nargs="?", type=Path, default=SERVICE, help="default: this project's")
    option("--messages", metavar="N", type=int, default=600, help="to send; default: 600")
    option("--cuts", metavar="N", type=int, default=100, help="at random moments; default: 100")
    args = parser.parse_args()
    began = time.perf_counter()
    sys.path.insert(0, str(args.service.parent))
    with tempfile.TemporaryDirectory(prefix="powercut-") as name:
        folder = Path(name).resolve()
        live = folder / "live"
        live.mkdir()
        try:
            record(args.service, live, folder / "trace", args.messages)
        except OSError as error:
            sys.exit(f"powercut: {error}")
        trace = list(calls(folder / "trace", live))
        totals = cut_often(args.service, trace, folder, args.cuts)
    syncs = Counter(Path(about).suffix for name, about, *_ in trace if name.endswith("sync"))
    print(
        f"{args.cuts} power cuts in {args.messages} messages,",
        f"{syncs['.db-wal']} syncs of the log and {syncs['.db']} of the database:",
        f"{totals['lost']} messages lost at {totals['cuts']} cuts,",
        f"{totals['wrong']} rockets wrong, {totals['unreadable']} databases unreadable,",
        f"{time.perf_counter() - began:.1f} s",
    )
    sys.exit(1 if totals.total() else 0)


if __name__ == "__main__":
    main()
