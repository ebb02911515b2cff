"""Powercut replays power cuts, and counts those that damage the database or lose a message.

It runs the service under strace while messages come in over several connections, replays what the
service did to its files up to random moments, opens what the disk may hold by then, and compares.

    python tools/powercut.py                        exits 1 if anything was lost
    python tools/powercut.py COPY/rockets.py        tries a copy, which may be broken on purpose

What the last sync of a file has confirmed is there. Of what was written to it since, each sector of
each write was kept or lost by chance, and so was each change of its size that no write has made.
Names that were made or removed are kept or lost the same way, until their folder was synced.
It needs Linux, strace 5.3 or newer, and the service's packages.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from ast import literal_eval
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import launch
from webtest import TestApp

SEED, MESSAGES = 449, 600
SECTOR = 512  # bytes, which a disk writes as a whole or not at all
PADDING = 2000  # characters in a message; SQLite begins a checkpoint after 1,000 pages of 4 KiB

REPLAYED = "openat pwrite64 ftruncate fsync fdatasync ?unlink unlinkat recvfrom sendto".split()
OTHERS = "write writev pwritev fallocate ?rename ?renameat renameat2 sendmsg".split()
STRACE = "strace -D -f -y -qq --seccomp-bpf -s 1000000 -e signal=none".split()
STRACE += ["-e", f"trace={','.join(REPLAYED + OTHERS)}"]  # -D: the child is the service

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

    def left(self, dice: random.Random, share: float) -> bytearray:
        """Return the content after a power cut, with a share of the changes."""
        image = bytearray(self.confirmed)
        for start, content in self.changes:
            if dice.random() < share:
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
        folder.mkdir()
        names = self.confirmed | dict(change for change in self.changes if dice.random() < share)
        for path, file in names.items():
            if file:
                (folder / Path(path).name).write_bytes(file.left(dice, share))


# The trace ########################################################################################


def key(message: dict) -> tuple[str, int]:
    return message["metadata"]["channel"], message["metadata"]["messageNumber"]


def record(program: Path, folder: Path) -> None:
    """Run the service until it has acknowledged all messages, some of them twice; stop it."""
    messages = list(islice(launch.fly(SEED), MESSAGES))
    for message in messages:
        message["message"]["note"] = "x" * PADDING
    sent = launch.disorder(messages, SEED, reorder=20, duplicates=0.1)
    tracer = [*STRACE, "-o", folder / "trace"]
    with launch.Server(*tracer, *launch.service(program), folder / "rockets.db") as server:
        sender = launch.Sender(f"{server.url}/messages", concurrency=4)
        sender.run(json.dumps(message).encode() for message in sent)


def calls(folder: Path) -> Iterator[Call]:
    """Yield what was done to the folder, its files and the connections, in order of the returns."""
    for line in (folder / "trace").open("rb"):
        call = line.split(maxsplit=1)[1]
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


def faults(database: Path, acknowledged: dict[tuple, dict]) -> Iterator[str]:
    """Yield what is wrong with a database, each as a line of text."""
    import rockets  # of the program's folder

    try:
        with closing(rockets.Store(str(database))) as store:
            app = TestApp(rockets.create_app(store))
            found = {rocket["channel"]: rocket for rocket in app.get("/rockets").json["rockets"]}
            paths = [f"/rockets/{channel}/messages" for channel in found]
            histories = [app.get(path).json["messages"] for path in paths]
    except Exception as error:
        yield f"unreadable: {error!r}"
        return
    kept = {key(message): message for history in histories for message in history}
    for message in acknowledged.values():
        if kept.get(key(message)) != message:
            yield "message {1} of {0} is lost".format(*key(message))
    yield from launch.compare(dict(zip(found, map(launch.fold, histories), strict=True)), found)


def cut_often(trace: list[Call], folder: Path, cuts: int) -> int:
    """Cut the power at random moments; return after how many cuts anything was wrong."""
    dice, machine, done, bad_cuts = random.Random(SEED), Machine(folder), 0, 0
    for moment in sorted(dice.choices(range(len(trace) + 1), k=cuts)):
        for call in trace[done:moment]:
            machine.replay(*call)
        done, left = moment, folder / "left"
        machine.cut(dice, left)
        wrong = next(faults(left / "rockets.db", machine.acknowledged), None)
        if wrong:
            bad_cuts += 1
            print(f"after call {moment:,} of {len(trace):,}: {wrong}")
        shutil.rmtree(left)
    return bad_cuts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("program", nargs="?", type=Path, default=launch.SERVICE, help="default: this project's")
    option("--cuts", type=int, default=100, help="at random moments; default: 100")
    args = parser.parse_args()
    sys.path.insert(0, str(args.program.parent))
    with tempfile.TemporaryDirectory(prefix="powercut-") as name:
        folder = Path(name).resolve()
        record(args.program, folder)
        bad_cuts = cut_often(list(calls(folder)), folder, args.cuts)
    print(f"{args.cuts} power cuts in {MESSAGES} messages: {bad_cuts} with faults")
    sys.exit(bad_cuts > 0)


if __name__ == "__main__":
    main()
