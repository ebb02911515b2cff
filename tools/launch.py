"""Launch sends a fleet's messages to the service and checks what the service made of them.

It stands in for the challenge's test program, with the same flags: a new connection for every
message, a retry 500 ms after any answer but a 2xx, and the same messages for the same seed. It can
also send them out of order and some of them twice. At the end it compares every rocket that the
service serves with what its messages add up to, and exits 1 if there is a difference.

    python tools/launch.py launch "http://localhost:8088/messages" --message-delay=500ms
    python tools/launch.py http://localhost:8088/messages --duplicates=0.1 --reorder=300
    python tools/launch.py --demo    starts a service of its own, and kills it five times
"""

import argparse
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import urljoin, urlsplit
from urllib.request import ProxyHandler, build_opener

# Messages #########################################################################################

TYPES = "Falcon-9 Falcon-Heavy Saturn-V Ariane-5 Soyuz-2 Atlas-V Delta-IV Electron".split()
MISSIONS = "ARTEMIS SHUTTLE_MIR APOLLO GEMINI SKYLAB VOYAGER CASSINI ROSETTA VOSTOK".split()
REASONS = "PRESSURE_VESSEL_FAILURE ENGINE_FAILURE FUEL_LEAK GUIDANCE_FAILURE".split()
SPEED_STEP = 500  # all speeds are multiples of it, and none is below it


def fly(seed: int, fleet: int = 20) -> Iterator[dict]:
    """Yield the messages of a fleet without end; each rocket's in the order of their numbers."""
    dice = random.Random(seed)
    names = [f"rocket {place} of seed {seed}" for place in range(fleet)]
    flying = [str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in names]
    lifetimes = {channel: dice.randint(300, 4500) for channel in flying[:6]}  # the others fly on
    numbers: Counter[str] = Counter()  # of messages, by channel
    speeds: Counter[str] = Counter()
    while True:
        channel = dice.choice(flying)
        numbers[channel] += 1
        change = SPEED_STEP * dice.randint(1, 8)
        if numbers[channel] == 1:
            message_type, speeds[channel] = "RocketLaunched", change
            content = {"type": dice.choice(TYPES), "launchSpeed": change}
            content["mission"] = dice.choice(MISSIONS)
        elif numbers[channel] == lifetimes.get(channel):
            message_type, content = "RocketExploded", {"reason": dice.choice(REASONS)}
            flying.remove(channel)
        elif dice.random() < 0.1:
            message_type, content = "RocketMissionChanged", {"newMission": dice.choice(MISSIONS)}
        elif dice.random() < 0.5 and speeds[channel] > change:
            message_type, content = "RocketSpeedDecreased", {"by": change}
            speeds[channel] -= change
        else:
            message_type, content = "RocketSpeedIncreased", {"by": change}
            speeds[channel] += change
        sent_at = datetime.now().astimezone().isoformat(timespec="microseconds")
        metadata = {"channel": channel, "messageNumber": numbers[channel]}
        metadata |= {"messageTime": sent_at, "messageType": message_type}
        yield {"metadata": metadata, "message": content}


def disorder(messages: Iterable, seed: int, reorder: int, duplicates: float) -> Iterator:
    """Yield messages at most so many places late, and a share of them twice."""
    dice = random.Random(f"order {seed}")
    due: dict[int, list] = defaultdict(list)  # messages by the place at which they come
    for place, message in enumerate(messages):
        due[place + dice.randint(0, reorder)].append(message)
        if dice.random() < duplicates:
            due[place + dice.randint(0, reorder + 300)].append(message)  # a copy may be later
        yield from due.pop(place, [])
    for place in sorted(due):
        yield from due[place]


def fold(messages: Iterable[dict]) -> dict:
    """Return the rocket, as it is served, that messages of one channel add up to in any order."""
    by_number = {message["metadata"]["messageNumber"]: message for message in messages}
    last = by_number[max(by_number)]["metadata"]
    launch, mission, reason, change = None, None, None, 0
    for _, message in sorted(by_number.items()):
        content = message["message"]
        match message["metadata"]["messageType"]:
            case "RocketLaunched":
                launch, mission = launch or message, content["mission"]
            case "RocketMissionChanged":
                mission = content["newMission"]
            case "RocketExploded":
                reason = reason or content["reason"]
            case "RocketSpeedIncreased":
                change += content["by"]
            case "RocketSpeedDecreased":
                change -= content["by"]
    return {
        "channel": last["channel"],
        "type": launch and launch["message"]["type"],
        "speed": launch and launch["message"]["launchSpeed"] + change,
        "mission": mission,
        "status": "exploded" if reason else "active" if launch else "awaiting_launch",
        "explosionReason": reason,
        "launchedAt": launch and launch["metadata"]["messageTime"],
        "updatedAt": last["messageTime"],
        "lastMessageNumber": last["messageNumber"],
        "missingMessages": last["messageNumber"] - len(by_number),
    }


def compare(expected: dict[str, dict], served: dict[str, dict]) -> Iterator[str]:
    """Yield the differences between rockets by channel, each as a line of text."""
    for channel, rocket in expected.items():
        for field, right in rocket.items():
            got = served.get(channel, {}).get(field)
            if got != right:
                yield f"{channel} {field} is {json.dumps(got)}, not {json.dumps(right)}"


# Sending ##########################################################################################

RETRY_AFTER = 0.5  # seconds, as the test program waits
TIMEOUT = 10  # seconds until an answer is given up
IS_TERMINAL = sys.stdout.isatty()
SAY_EVERY = 0.1 if IS_TERMINAL else 10  # seconds


def http_request(method: str, url: str, body: bytes = b"") -> bytes:
    """Return a request to send as it is; it asks to close the connection after the answer."""
    parts = urlsplit(url)
    target = url.partition(parts.netloc)[2]
    head = f"{method} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Sender:
    """Sends requests, each on a new connection, until each is answered with a 2xx."""

    def __init__(self, url: str, concurrency: int):
        parts = urlsplit(url)
        self.address = (parts.hostname, parts.port or 80)
        self.concurrency = concurrency  # requests under way at a time
        self.turn = Lock()  # to take the next request
        self.lock = Lock()  # for what is counted
        self.done = self.duplicates = self.retries = 0
        self.failure = ""  # reason of the last retry

    def run(self, requests: Iterable[bytes], watch: Callable | None = None) -> float:
        """Send all requests, calling watch(self) now and then; return the seconds that it took."""
        began = time.perf_counter()
        shared, threads = iter(requests), []
        for _ in range(self.concurrency):
            threads.append(Thread(target=self.work, args=[shared], daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(SAY_EVERY)
            while thread.is_alive():
                if watch:
                    watch(self)
                thread.join(SAY_EVERY)
        return time.perf_counter() - began

    def work(self, requests: Iterator[bytes]) -> None:
        while True:
            with self.turn:
                request = next(requests, None)
            if not request:
                return
            while not self.deliver(request):
                time.sleep(RETRY_AFTER)

    def deliver(self, request: bytes) -> bool:
        """Send a request once, and tell whether it was answered with a 2xx."""
        answer, failure = b"", "closed without an answer"
        try:
            with socket.create_connection(self.address, TIMEOUT) as connection:
                connection.sendall(request)
                while received := connection.recv(1 << 16):
                    answer += received
        except OSError as error:
            failure = str(error)
        status = answer.partition(b"\r\n")[0].partition(b" ")[2].decode()
        is_done = status.startswith("2")
        with self.lock:
            self.done += is_done
            self.duplicates += b'"duplicate"' in answer
            self.retries += not is_done
            if not is_done:
                self.failure = status or failure
        return is_done


# The service ######################################################################################

SERVICE = Path(__file__).resolve().parent.parent / "rockets.py"


def service(database: Path, port: int = 0, program: Path = SERVICE) -> list[object]:
    """Return the command that runs the service, by default on a free port."""
    return [sys.executable, program, "--host=127.0.0.1", f"--port={port}", "--database", database]


def start(*command: object) -> tuple[subprocess.Popen, str]:
    """Run a server that prints where it listens; return the process and its URL. Raise OSError."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    listens = re.search(r"http://[\w.:]+", process.stdout.readline())
    if not listens:
        raise OSError(f"{command[-1]} does not start, and exits with {process.wait()}")
    return process, listens[0]


class Service:
    """The service as a process of its own."""

    def __init__(self, database: Path):
        self.database = database
        self.process, self.url = start(*service(database))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def restart(self) -> None:
        self.kill()
        self.process, _ = start(*service(self.database, urlsplit(self.url).port))


def read_rockets(url: str) -> dict[str, dict]:
    """Return the rockets that changed last, 1,000 at most, by channel. Raise OSError."""
    page = urljoin(url, "rockets?sort=updatedAt&order=desc&limit=1000")
    opener = build_opener(ProxyHandler({}))  # no proxy, as the messages take none
    with opener.open(page, timeout=TIMEOUT) as answer:
        return {rocket["channel"]: rocket for rocket in json.load(answer)["rockets"]}


# Command line #####################################################################################

BAR = 10  # characters
KILLS = 5
DEMO = {"max_messages": 20_000, "duplicates": 0.1, "reorder": 20_000, "concurrency_level": 20}
OVERTAKEN = "not compared: the service holds later messages of this seed; start it with --reset"


def say(line: str, end: str = "\n") -> None:
    """Print a line, on a terminal in place of the progress bar."""
    print(f"\r\x1b[K{line}" if IS_TERMINAL else line, end=end, flush=True)


class Run:
    """Messages to send, and what the service should make of them."""

    def __init__(self, args: argparse.Namespace, url: str, kill: Callable | None = None):
        """Call kill(), if there is one, KILLS times while messages are sent."""
        self.args, self.url, self.kill = args, url, kill
        self.total = round(args.max_messages * (1 + args.duplicates))  # about, with the copies
        self.sent: dict[str, list[dict]] = defaultdict(list)  # messages by channel

    def requests(self) -> Iterator[bytes]:
        args, part = self.args, self.total // KILLS
        messages = islice(fly(args.seed), args.max_messages)
        disordered = disorder(messages, args.seed, args.reorder, args.duplicates)
        for place, message in enumerate(disordered):
            if self.kill and place % part == part // 2:
                self.kill()
                say(f"kill {place // part + 1} of {KILLS} after {place:,} messages")
            time.sleep(args.message_delay)
            self.sent[message["metadata"]["channel"]].append(message)
            yield http_request("POST", self.url, json.dumps(message).encode())

    def say_progress(self, sender: Sender) -> None:
        bar = "#" * (BAR * sender.done // self.total)
        line = f"{sender.done:,} messages, {sender.retries:,} retries {sender.failure}"
        say(f"{bar:.<{BAR}} {line}", end="" if IS_TERMINAL else "\n")

    def send(self) -> bool:
        """Send all, compare, and tell whether all is right."""
        held = {}
        with suppress(OSError):  # the service may not run yet
            held = read_rockets(self.url)
        sender = Sender(self.url, self.args.concurrency_level)
        took = sender.run(self.requests(), self.say_progress)
        line = f"{sender.done:,} messages in {took:,.1f} s, {sender.done / took:,.0f} a second, "
        say(f"{line}{sender.duplicates:,} duplicates, {sender.retries:,} retries")
        return self.verify(held)

    def verify(self, held: dict[str, dict]) -> bool:
        """Say where the service differs, given the rockets that it held at the start."""
        rockets = {channel: fold(messages) for channel, messages in self.sent.items()}
        for channel in rockets.keys() & held.keys():
            if held[channel]["lastMessageNumber"] > rockets[channel]["lastMessageNumber"]:
                say(OVERTAKEN)
                return False
            del rockets[channel]["launchedAt"], rockets[channel]["updatedAt"]  # of an earlier run
        differences = list(compare(rockets, read_rockets(self.url)))
        for line in differences:
            say(line)
        say(f"{len(rockets)} rockets, {len(differences):,} differences")
        return not differences


def run_demo(args: argparse.Namespace) -> bool:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        running = Service(Path(folder) / "rockets.db")
        try:
            is_right = Run(args, f"{running.url}/messages", running.restart).send()
        finally:
            running.kill()
    say(f"the demo took {time.perf_counter() - began:.1f} s")
    return is_right


def seconds(text: str) -> float:
    """Read a duration such as 500ms, 1.5s or 0."""
    if text.endswith("ms"):
        return float(text[:-2]) / 1000
    return float(text.removesuffix("s"))


def read_arguments(words: list[str]) -> argparse.Namespace:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=style)
    option = parser.add_argument
    option("url", nargs="?", help="where to post, such as http://localhost:8088/messages")
    option("--message-delay", type=seconds, default="0", help="pause, such as 500ms")
    option("--concurrency-level", type=int, default=3, help="messages on their way at a time")
    option("--max-messages", type=int, default=100_000, help="to send, copies not counted")
    option("--seed", type=int, default=444, help="the same one gives the same messages")
    option("--duplicates", type=float, default=0, help="share of the messages to send twice")
    option("--reorder", type=int, default=0, help="places that a message is late at most")
    option("--demo", action="store_true", help="start a service, and kill it while messages come")
    if "--demo" in words:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(words[1:] if words[:1] == ["launch"] else words)
    if not args.demo and urlsplit(args.url or "").scheme != "http":
        parser.error("a URL is needed, such as http://localhost:8088/messages")
    return args


def main() -> None:
    args = read_arguments(sys.argv[1:])
    try:
        is_right = run_demo(args) if args.demo else Run(args, args.url).send()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"launch: {error}")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
