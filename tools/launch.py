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
import math
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from functools import partial
from heapq import heappop, heappush
from http.client import HTTPException
from itertools import count, islice
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.request import ProxyHandler, build_opener

# Messages #########################################################################################

TYPES = "Falcon-9 Falcon-Heavy Saturn-V Ariane-5 Soyuz-2 Atlas-V Delta-IV Electron".split()
MISSIONS = "ARTEMIS SHUTTLE_MIR APOLLO GEMINI SKYLAB VOYAGER CASSINI ROSETTA VOSTOK".split()
REASONS = "PRESSURE_VESSEL_FAILURE ENGINE_FAILURE FUEL_LEAK GUIDANCE_FAILURE".split()
SPEED_STEP = 500  # all speeds are multiples of it, and none is below it
DOOMED = 0.3  # of the fleet: 6 of 20 rockets
LIFETIMES = (300, 4500)  # messages of a doomed rocket
COPY_LATE = 300  # places that a copy comes at most after its message


def fly(seed: int, fleet: int = 20) -> Iterator[dict]:
    """Yield the messages of a fleet without end; each rocket's in the order of their numbers."""
    dice = random.Random(seed)
    names = [f"rocket {place} of seed {seed}" for place in range(fleet)]
    flying = [str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in names]
    doomed = dice.sample(flying, round(DOOMED * fleet))
    lifetimes = {channel: dice.randint(*LIFETIMES) for channel in doomed}
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
        elif dice.random() < 0.5 and speeds[channel] - change >= SPEED_STEP:
            message_type, content = "RocketSpeedDecreased", {"by": change}
            speeds[channel] -= change
        else:
            message_type, content = "RocketSpeedIncreased", {"by": change}
            speeds[channel] += change
        sent_at = datetime.now().astimezone().isoformat(timespec="microseconds")
        metadata = {"channel": channel, "messageNumber": numbers[channel]}
        metadata |= {"messageTime": sent_at, "messageType": message_type}
        yield {"metadata": metadata, "message": content}


def disorder(
    bodies: Iterable[bytes], seed: int, reorder: int, duplicates: float
) -> Iterator[bytes]:
    """Yield each body at most so many places late, and a share of them twice."""
    dice = random.Random(f"order {seed}")
    waiting: list[tuple[int, int, bytes]] = []  # a heap of (place at which it is due, order, body)
    for place, body in enumerate(bodies):
        due = place + dice.randint(0, reorder)
        heappush(waiting, (due, -place, body))  # of those due at one place, the last goes first
        if dice.random() < duplicates:
            heappush(waiting, (due + dice.randint(1, COPY_LATE), -place, body))
        while waiting and waiting[0][0] <= place:
            yield heappop(waiting)[2]
    while waiting:
        yield heappop(waiting)[2]


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


# Sending ##########################################################################################

RETRY_AFTER = 0.5  # seconds, as the test program waits
TIMEOUT = 10  # seconds until an answer is given up
STEP = 0.02  # seconds


def http_request(method: str, url: str, body: bytes = b"") -> bytes:
    """Return a request to send as it is; it asks to close the connection after the answer."""
    parts = urlsplit(url)
    target = url.partition(parts.netloc)[2] or "/"
    head = f"{method} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Sender:
    """Sends requests, each on a new connection, until each is answered with a 2xx."""

    def __init__(self, url: str, concurrency: int = 3, delay: float = 0):
        """Use so many threads, with so many seconds from one new request to the next."""
        parts = urlsplit(url)
        self.address = (parts.hostname, parts.port or 80)
        self.concurrency, self.delay = concurrency, delay
        self.turn = threading.Lock()  # to take the next request
        self.requests: Iterator[bytes] = iter(())
        self.ready = 0.0  # when the next one may be sent, a second of time.perf_counter()
        self.repeats: deque[tuple[float, bytes]] = deque()  # when they are due, and requests
        self.lock = threading.Lock()  # for what is counted
        self.done = 0  # requests
        self.duplicates = 0  # answers that say so
        self.retries: Counter[str] = Counter()  # by reason

    def run(self, requests: Iterable[bytes], watcher: Iterator = iter(())) -> float:
        """Send all requests, and return the seconds that it took.

        The watcher is asked for its next item at each STEP, while requests are under way.
        """
        self.requests = iter(requests)
        began = time.perf_counter()
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(self.concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                next(watcher, None)
                thread.join(STEP)
        return time.perf_counter() - began

    def work(self) -> None:
        while request := self.take():
            if not self.deliver(request):
                self.repeats.append((time.perf_counter() + RETRY_AFTER, request))

    def take(self) -> bytes:
        """Return the next request when it may be sent; an empty one if none is left."""
        with self.turn:
            due, request = self.repeats[0] if self.repeats else (math.inf, b"")
            if due > time.perf_counter() and (new := next(self.requests, b"")):
                sleep_until(self.ready)
                self.ready = time.perf_counter() + self.delay
                return new
            if request:
                self.repeats.popleft()
                sleep_until(due)
            return request

    def deliver(self, request: bytes) -> bool:
        """Send a request once, and tell whether it was answered with a 2xx."""
        answer, failure = b"", "Closed without an answer"
        try:
            with socket.create_connection(self.address, TIMEOUT) as connection:
                connection.sendall(request)
                while received := connection.recv(1 << 16):
                    answer += received
        except OSError as error:
            failure = error.strerror or str(error)
        status = answer.partition(b"\r\n")[0].partition(b" ")[2].decode()
        with self.lock:
            if status.startswith("2"):
                self.done += 1
                self.duplicates += b'"duplicate"' in answer
                return True
            self.retries[status or failure] += 1
            return False


def sleep_until(moment: float) -> None:
    time.sleep(max(0, moment - time.perf_counter()))


# The service ######################################################################################

SERVICE = Path(__file__).resolve().parent.parent / "rockets.py"


def start(*command: object) -> tuple[subprocess.Popen, str]:
    """Run a server that prints where it listens; return the process and its URL. Raise OSError."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    listens = re.search(r"http://[\w.:]+", process.stdout.readline())
    if not listens:
        raise OSError(f"{command[-1]} does not start, and exits with {process.wait()}")
    return process, listens[0]


def stop(process: subprocess.Popen) -> None:
    """Kill a server, if it still runs."""
    process.kill()
    process.wait()
    process.stdout.close()


def service(database: Path, port: int = 0, program: Path = SERVICE) -> list[object]:
    """Return the command that runs the service, by default on a free port."""
    return [sys.executable, program, "--host=127.0.0.1", f"--port={port}", "--database", database]


def read_rockets(url: str) -> dict[str, dict]:
    """Return all of the service's rockets by channel.

    Raise OSError, ValueError, LookupError or HTTPException if that can't be done.
    """
    rockets, page = {}, urljoin(url, "rockets?limit=1000")
    opener = build_opener(ProxyHandler({}))  # no proxy, as the messages take none
    while page:
        with opener.open(page, timeout=TIMEOUT) as answer:
            rockets |= {rocket["channel"]: rocket for rocket in json.load(answer)["rockets"]}
            following = re.search(r'<([^>]*)>; *rel="next"', answer.headers.get("Link", ""))
        page = following and urljoin(page, following[1])
    return rockets


def compare(expected: dict[str, dict], served: dict[str, dict]) -> Iterator[str]:
    """Yield the differences, each as a line of text."""
    for channel, rocket in expected.items():
        if channel not in served:
            yield f"{channel} is missing"
            continue
        for name, right in rocket.items():
            got = served[channel].get(name, "left out")
            if got != right:
                yield f"{channel} {name} is {json.dumps(got)}, not {json.dumps(right)}"


# Command line #####################################################################################

BAR = 24  # characters, so that the line has at most 80
IS_TERMINAL = sys.stdout.isatty()
SAY_EVERY = 0.1 if IS_TERMINAL else 10  # seconds
KILLS = 5
DEMO = {"max_messages": 20_000, "duplicates": 0.1, "reorder": 20_000, "concurrency_level": 20}
FAILURES = (OSError, ValueError, LookupError, HTTPException)  # of read_rockets()


def say(line: str, end: str = "\n") -> None:
    """Print a line, on a terminal in place of the progress bar."""
    print(f"\r\x1b[K{line}" if IS_TERMINAL else line, end=end, flush=True)


def progress(sender: Sender, expected: int) -> Iterator[None]:
    """Say now and then how far the sender is with the expected number of requests."""
    began = time.perf_counter()
    for moment in count(began + SAY_EVERY, SAY_EVERY):
        while time.perf_counter() < moment:
            yield
        done = sender.done
        left = max(0, expected - done) * (moment - began) / max(1, done)
        line = f"{done:,} messages, {sender.retries.total():,} retries, {left:,.0f} s left"
        if IS_TERMINAL:
            bar = "█" * min(BAR, BAR * done // expected)
            say(f"{bar:░<{BAR}} {line}", end="")
        else:
            say(line)


def with_kills(
    process: subprocess.Popen,
    command: list,
    stack: ExitStack,
    contents: Iterator[bytes],
    total: int,
) -> Iterator[bytes]:
    """Yield requests, and after each part of them kill the service and start it again."""
    parts = [total * number // (KILLS + 1) for number in range(1, KILLS + 1)]
    for place, content in enumerate(contents):
        if place in parts:
            began = time.perf_counter()
            stop(process)
            process, _ = start(*command)
            stack.callback(stop, process)
            took = time.perf_counter() - began
            number = parts.index(place) + 1
            say(f"kill {number} of {KILLS} after {place:,} messages, back in {took:.2f} s")
        yield content


def requests(args: argparse.Namespace, url: str, sent: dict[str, list[dict]]) -> Iterator[bytes]:
    """Yield all requests in the order in which to send them, and note their messages."""

    def note(message: dict) -> bytes:
        sent[message["metadata"]["channel"]].append(message)
        return json.dumps(message).encode()

    bodies = map(note, islice(fly(args.seed), args.max_messages))
    for body in disorder(bodies, args.seed, args.reorder, args.duplicates):
        yield http_request("POST", url, body)


def send_all(args: argparse.Namespace, url: str, interrupt: Callable) -> bool:
    """Send what interrupt() makes of all requests, compare, and tell whether all is right."""
    sent: dict[str, list[dict]] = defaultdict(list)  # messages by channel, without copies
    total = round(args.max_messages * (1 + args.duplicates))  # about, with the copies
    sender = Sender(url, args.concurrency_level, args.message_delay)
    held = {}
    with suppress(*FAILURES):  # the service may not run yet
        held = read_rockets(url)
    flight = islice(fly(args.seed), args.max_messages)
    last = Counter(message["metadata"]["channel"] for message in flight)
    there = last.keys() & held.keys()
    is_overtaken = any(held[channel]["lastMessageNumber"] > last[channel] for channel in there)
    if is_overtaken:
        say(f"the service holds later messages of seed {args.seed} than this run sends")
    began = time.perf_counter()
    try:
        sender.run(interrupt(requests(args, url, sent), total), progress(sender, total))
    finally:  # after Ctrl-C as well
        summarize(sender, time.perf_counter() - began)
    if is_overtaken:
        say("not compared: start the service with --reset, or take another --seed")
        return False
    return verify(url, sent, held)


def summarize(sender: Sender, took: float) -> None:
    done, retries = sender.done, sender.retries
    line = f"{done:,} messages in {took:,.1f} s, {done / took:,.0f} a second, "
    say(f"{line}{sender.duplicates:,} duplicates, {retries.total():,} retries")
    for reason, times in retries.items():
        say(f"  {times:,} after: {reason}")


def verify(url: str, sent: dict[str, list[dict]], held: dict[str, dict]) -> bool:
    """Say where the service differs from what the messages add up to."""
    rockets = {channel: fold(messages) for channel, messages in sent.items()}
    for channel in rockets.keys() & held.keys():  # their times are of an earlier run
        del rockets[channel]["launchedAt"], rockets[channel]["updatedAt"]
    differences = list(compare(rockets, read_rockets(url)))
    for line in differences:
        say(line)
    say(f"{len(rockets)} rockets, {len(differences):,} differences")
    return not differences


def seconds(text: str) -> float:
    """Read a duration such as 500ms, 1.5s or 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)", "0s" if text == "0" else text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 500ms, 1s or 0")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60}[match[2]]


OPTIONS = (
    ("--message-delay", "TIME", seconds, "0", "pause between messages, such as 500ms"),
    ("--concurrency-level", "N", int, 3, "messages on their way at a time"),
    ("--max-messages", "N", int, 100_000, "messages to send, copies not counted"),
    ("--seed", "N", int, 444, "the same one gives the same messages"),
    ("--duplicates", "SHARE", float, 0, "share of the messages to send twice, 0 to 1"),
    ("--reorder", "PLACES", int, 0, "send each message up to so many places late"),
)


def read_arguments(words: list[str]) -> argparse.Namespace:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=style)
    option = parser.add_argument
    option("url", nargs="?", help="where to post, such as http://localhost:8088/messages")
    for name, metavar, read, default, text in OPTIONS:
        option(name, metavar=metavar, type=read, default=default, help=text)
    option("--demo", action="store_true", help="start a service, and kill it while messages come")
    if "--demo" in words:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(words[1:] if words[:1] == ["launch"] else words)
    if not args.demo and urlsplit(args.url or "").scheme != "http":
        parser.error("a URL is needed, such as http://localhost:8088/messages")
    if min(args.concurrency_level, args.max_messages) < 1 or args.reorder < 0:
        parser.error("N must be at least 1, and PLACES at least 0")
    return args


def run_demo(args: argparse.Namespace) -> bool:
    """Kill a service with a database of its own while it is sent all messages."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="launch-") as folder, ExitStack() as stack:
        database = Path(folder) / "rockets.db"
        process, url = start(*service(database))
        stack.callback(stop, process)
        again = service(database, urlsplit(url).port)
        is_right = send_all(args, f"{url}/messages", partial(with_kills, process, again, stack))
    say(f"the demo took {time.perf_counter() - began:.1f} s")
    return is_right


def main() -> None:
    args = read_arguments(sys.argv[1:])
    if args.demo:
        is_right = run_demo(args)
    else:
        is_right = send_all(args, args.url, lambda contents, _: contents)
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except FAILURES as error:
        sys.exit(f"launch: {error}")
