"""Launch sends a fleet's messages to the service, badly ordered if you like, and checks what the service made of them.

It stands in for the challenge's test program, whose flags and habits it shares: a new connection for every message, a
retry after 500 ms on anything but a 2xx, the same messages whenever the seed is the same. At the end it reads
GET /rockets back, compares every rocket with what the messages add up to, and exits 1 if there is a difference. (After
a longer flight with the same seed there must be some: the service then knows more than this one sent.)

    python tools/launch.py http://localhost:8088/messages
    python tools/launch.py http://localhost:8088/messages --message-delay=500ms --concurrency-level=1
    python tools/launch.py http://localhost:8088/messages --duplicates=0.1 --reorder=300 --seed=7
"""

import argparse
import errno
import http.client
import json
import random
import re
import selectors
import socket
import sys
import time
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from heapq import heappop, heappush
from itertools import islice
from urllib.parse import urljoin, urlsplit

RETRY_AFTER = 0.5  # seconds, as the original waits
TIMEOUT = 10  # seconds until an answer is given up
MOST_WAITING = 100  # retries; with more, nothing new is sent, lest an outage use up all messages
COPY_LATE = 300  # places that a copy comes at most after its message, unless --reorder is more
LONGEST_NAP = 0.02  # seconds; a retry is at most that much late
REDRAW = 0.1  # seconds between two states of the progress bar
BAR = 30  # characters

# Messages #############################################################################################################

TYPES = ("Falcon-9", "Falcon-Heavy", "Saturn-V", "Ariane-5", "Soyuz-2", "Atlas-V", "Delta-IV", "Electron")
MISSIONS = ("ARTEMIS", "SHUTTLE_MIR", "APOLLO", "GEMINI", "SKYLAB", "VOYAGER", "CASSINI", "ROSETTA", "VOSTOK")
REASONS = ("PRESSURE_VESSEL_FAILURE", "ENGINE_FAILURE", "FUEL_LEAK", "GUIDANCE_FAILURE", "STRUCTURAL_FAILURE")
SPEED_STEP = 500  # all speeds are multiples of it, and none is below it
DOOMED = 0.3  # of the fleet: 6 of 20 rockets
LIFETIMES = (300, 6000)  # messages of a doomed rocket; of 100,000, one that lasts gets about 6,300


def local_time() -> str:
    return datetime.now().astimezone().isoformat(timespec="microseconds")


def fly(seed: int, fleet: int = 20) -> Iterator[dict]:
    """Yield the messages of a fleet without end; each rocket's come in the order of their numbers."""
    dice = random.Random(seed)
    flying = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"rocket {place} of seed {seed}")) for place in range(fleet)]
    doomed = dice.sample(flying, round(DOOMED * fleet))
    shortest, longest = LIFETIMES
    ends = {channel: round(shortest * (longest / shortest) ** dice.random()) for channel in doomed}
    numbers = dict.fromkeys(flying, 0)
    speeds = dict.fromkeys(flying, 0)
    while True:
        channel = dice.choice(flying)
        numbers[channel] += 1
        change = SPEED_STEP * dice.randint(1, 8)
        if numbers[channel] == 1:
            speeds[channel] = change
            kind = "RocketLaunched"
            content = {"type": dice.choice(TYPES), "launchSpeed": change, "mission": dice.choice(MISSIONS)}
        elif numbers[channel] == ends.get(channel):
            flying.remove(channel)
            kind, content = "RocketExploded", {"reason": dice.choice(REASONS)}
        elif dice.random() < 0.1:
            kind, content = "RocketMissionChanged", {"newMission": dice.choice(MISSIONS)}
        elif dice.random() < 0.5 and speeds[channel] - change >= SPEED_STEP:
            speeds[channel] -= change
            kind, content = "RocketSpeedDecreased", {"by": change}
        else:
            speeds[channel] += change
            kind, content = "RocketSpeedIncreased", {"by": change}
        metadata = {
            "channel": channel,
            "messageNumber": numbers[channel],
            "messageTime": local_time(),
            "messageType": kind,
        }
        yield {"metadata": metadata, "message": content}


def fold(rockets: dict[str, dict], message: dict) -> None:
    """Add a message to what is known of its rocket; for messages in the order of their numbers."""
    metadata, content = message["metadata"], message["message"]
    rocket = rockets.setdefault(metadata["channel"], {"explosionReason": None, "missingMessages": 0})
    rocket |= {"lastMessageNumber": metadata["messageNumber"], "updatedAt": metadata["messageTime"]}
    match metadata["messageType"]:
        case "RocketLaunched":
            rocket |= {"channel": metadata["channel"], "launchedAt": metadata["messageTime"], "status": "active"}
            rocket |= {"type": content["type"], "speed": content["launchSpeed"], "mission": content["mission"]}
        case "RocketSpeedIncreased":
            rocket["speed"] += content["by"]
        case "RocketSpeedDecreased":
            rocket["speed"] -= content["by"]
        case "RocketMissionChanged":
            rocket["mission"] = content["newMission"]
        case "RocketExploded":
            rocket |= {"status": "exploded", "explosionReason": content["reason"]}


def disorder(messages: Iterable[bytes], seed: int, reorder: int, duplicates: float) -> Iterator[tuple]:
    """Yield each message up to so many places late, and a share of them twice: (due, -place, is a copy, message)."""
    dice = random.Random(f"order {seed}")
    waiting: list[tuple[int, int, bool, bytes]] = []  # a heap; of those due at one place, the last goes first
    for place, message in enumerate(messages):
        late = int((reorder + 1) * dice.random() ** 6)  # most by little, or else all would be late alike
        heappush(waiting, (place + late, -place, False, message))
        if dice.random() < duplicates:
            heappush(waiting, (place + dice.randint(1, max(reorder, COPY_LATE)), -place, True, message))
        while waiting and waiting[0][0] <= place:
            yield heappop(waiting)
    while waiting:
        yield heappop(waiting)


# Sending ##############################################################################################################


def http_request(method: str, url: str, body: bytes = b"") -> bytes:
    """Return a request to send as it is; it asks for the connection to be closed after the answer."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = f"{method} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Request:
    """A request on its way: where it was sent, what is still to send, and what has come back."""

    __slots__ = ("address", "answer", "began", "connection", "content", "due", "unsent", "untried")

    def __init__(self, content: bytes):
        self.content = content
        self.untried: list[tuple] = []  # addresses


class Sender:
    """Sends requests to one server, each on a connection of its own, until every one has been answered with a 2xx.

    One thread with sockets that never block: several would spend more time on waiting for one another.
    """

    def __init__(self, url: str, concurrency: int = 3, delay: float = 0, notice: Callable[[str], None] = print):
        """Get ready for so many requests at a time, with a pause of so many seconds between them.

        Each new reason to send something again is told to notice(). Raise OSError if nobody knows the URL's host.
        """
        parts = urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        self.addresses = [(family, address) for family, _, _, _, address in found]  # the last that answered comes first
        self.concurrency = concurrency
        self.delay = delay
        self.notice = notice
        self.selector = selectors.DefaultSelector()
        self.flying: dict[Request, None] = {}  # oldest first
        self.waiting: deque[Request] = deque()  # to be sent again, soonest first
        self.retries: Counter[str] = Counter()  # by reason
        self.duplicates = 0  # answers that say so
        self.latencies = array("d")  # seconds from connecting to the whole answer, for each 2xx

    def run(self, contents: Iterable[bytes], show: Callable[[], None] = lambda: None) -> float:
        """Send all requests and return the seconds that it took; show() is called many times in each of them."""
        contents = iter(contents)
        more = True
        began = ready = time.perf_counter()
        while more or self.flying or self.waiting:
            now = time.perf_counter()
            while len(self.flying) < self.concurrency:
                if self.waiting and self.waiting[0].due <= now:
                    self.start(self.waiting.popleft())
                elif more and ready <= now and len(self.waiting) < MOST_WAITING:
                    content = next(contents, None)
                    more = content is not None
                    if more:
                        self.start(Request(content))
                        ready = now + self.delay
                else:
                    break
            for key, _ in self.selector.select(min(ready - now, LONGEST_NAP) if ready > now else LONGEST_NAP):
                self.advance(key.data)
            while self.flying and (oldest := next(iter(self.flying))).began < now - TIMEOUT:
                self.fail(oldest, f"No answer within {TIMEOUT} s")
            show()
        return time.perf_counter() - began

    def start(self, request: Request) -> None:
        request.untried = request.untried or list(self.addresses)
        request.address = request.untried.pop(0)
        request.unsent, request.answer = request.content, bytearray()
        request.began = time.perf_counter()
        request.connection = socket.socket(request.address[0])
        request.connection.setblocking(False)
        self.flying[request] = None
        self.selector.register(request.connection, selectors.EVENT_WRITE, request)
        request.connection.connect_ex(request.address[1])  # advance() meets the error, if there is one
        self.advance(request)  # within one machine, the connection is there at once

    def advance(self, request: Request) -> None:
        """Send or receive as much as goes at the moment."""
        try:
            if request.unsent:
                request.unsent = request.unsent[request.connection.send(request.unsent) :]
                if not request.unsent:
                    self.selector.modify(request.connection, selectors.EVENT_READ, request)
                return
            received = request.connection.recv(1 << 20)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOTCONN):  # not connected yet
                self.fail(request, error.strerror)
            return
        request.answer += received
        body = request.answer.find(b"\r\n\r\n") + 4
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", request.answer[:body])
        if body > 3 and (len(request.answer) >= body + int(length[1]) if length else not received):
            self.finish(request, request.answer[:body].decode("latin-1"), request.answer[body:])
        elif not received:
            self.fail(request, "Answer broken off")

    def finish(self, request: Request, head: str, body: bytearray) -> None:
        status = head.partition("\r\n")[0].partition(" ")[2]
        if status.startswith("2"):
            self.latencies.append(time.perf_counter() - request.began)
            self.duplicates += b'"duplicate"' in body
            if request.address != self.addresses[0]:
                self.addresses.remove(request.address)
                self.addresses.insert(0, request.address)
            self.stop(request)
        else:
            self.fail(request, status, body[:500].decode(errors="replace"))

    def fail(self, request: Request, reason: str, details: str = "") -> None:
        """Try the next address at once if this one could not be reached, or else all of them after a while."""
        self.stop(request)
        if request.untried and request.unsent == request.content:
            self.start(request)
        else:
            request.untried = []
            request.due = time.perf_counter() + RETRY_AFTER
            self.waiting.append(request)
            self.retries[reason] += 1
            if self.retries[reason] == 1:
                self.notice(f"{reason}; trying again every {RETRY_AFTER * 1000:g} ms. {details}".strip())

    def stop(self, request: Request) -> None:
        self.selector.unregister(request.connection)
        request.connection.close()
        del self.flying[request]


# What the service made of it ##########################################################################################


def read_rockets(url: str) -> dict[str, dict]:
    """Return the service's rockets by channel. Raise OSError, ValueError or HTTPException if that can't be done."""
    parts = urlsplit(urljoin(url, "rockets"))
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT)
    connection.request("GET", parts.path)
    answer = connection.getresponse()
    if answer.status != 200:
        raise OSError(f"GET /rockets was answered {answer.status} {answer.reason}")
    return {rocket["channel"]: rocket for rocket in json.load(answer)["rockets"]}


def compare(rockets: dict[str, dict], served: dict[str, dict], departure: str) -> Iterator[str]:
    """Yield the differences, each as a line of text, but for times before the departure: those of an earlier flight."""
    for channel, rocket in rockets.items():
        if channel not in served:
            yield f"{channel} is missing"
            continue
        for field, right in rocket.items():
            got = served[channel].get(field, "left out")
            if got != right and not (field in ("launchedAt", "updatedAt") and str(got) < departure):
                yield f"{channel} {field} is {json.dumps(got)}, not {json.dumps(right)}"


# Command line #########################################################################################################


def seconds(text: str) -> float:
    """Read a duration such as 500ms, 1.5s or 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)|0", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 500ms, 1s or 0")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60}[match[2]] if match[2] else 0


def notice(line: str) -> None:
    """Print a line, in place of the progress bar if there is one."""
    print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, flush=True)


def bar(sender: Sender, expected: float) -> Callable[[], None]:
    """Return a function that draws the progress on a terminal, now and then."""
    began = drawn = time.perf_counter()

    def draw() -> None:
        nonlocal drawn
        now = time.perf_counter()
        if now < drawn + REDRAW or not sys.stdout.isatty():
            return
        drawn = now
        done = len(sender.latencies)
        rate = done / (now - began)
        full = min(BAR, int(BAR * done / expected))
        line = f"{'█' * full}{'░' * (BAR - full)} {done:,} messages, {rate:,.0f}/s, {sender.retries.total():,} retries"
        line += f", {max(0, expected - done) / rate:,.0f} s left" if rate else ""
        print(f"\r\x1b[K{line}", end="", flush=True)

    return draw


def report(sender: Sender, copies: int, took: float) -> str:
    done = len(sender.latencies)
    latencies = sorted(sender.latencies) or [0.0]
    p50, p95, p99 = (latencies[int(done * part)] * 1000 for part in (0.5, 0.95, 0.99))
    reasons = ", ".join(f"{reason}: {times:,}" for reason, times in sender.retries.most_common())
    return f"""\
messages    {done:,}
duplicates  {copies:,} sent, {sender.duplicates:,} answered as such
retries     {sender.retries.total():,}{f" ({reasons})" if reasons else ""}
seconds     {took:,.1f}
rate        {done / took:,.0f} messages a second
latency     p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, max {latencies[-1] * 1000:.1f} ms"""


def main() -> None:
    """Read the command line, send everything, report and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    option = parser.add_argument
    option("url", help="where to post, such as http://localhost:8088/messages")
    option("--message-delay", metavar="TIME", type=seconds, default="0", help="pause between messages, such as 500ms")
    option("--concurrency-level", metavar="N", type=int, default=3, help="messages on their way at a time")
    option("--max-messages", metavar="N", type=int, default=100_000, help="messages to send, copies not counted")
    option("--seed", metavar="N", type=int, default=444, help="the same one gives the same messages")
    option("--duplicates", metavar="SHARE", type=float, default=0, help="share of the messages to send twice, 0 to 1")
    option("--reorder", metavar="PLACES", type=int, default=0, help="send each message up to so many places late")
    option("--no-verify", action="store_true", help="don't compare what the service serves with what was sent")
    args = parser.parse_args()
    if urlsplit(args.url).scheme != "http":
        parser.error(f"the URL must begin with http://, not {args.url}")
    if min(args.concurrency_level, args.max_messages) < 1 or args.reorder < 0 or not 0 <= args.duplicates <= 1:
        parser.error("N must be at least 1, PLACES at least 0, and SHARE from 0 to 1")
    try:
        sender = Sender(args.url, args.concurrency_level, args.message_delay, notice)
    except (OSError, ValueError) as error:
        sys.exit(f"launch: cannot send to {args.url}: {error}")

    rockets: dict[str, dict] = {}
    copies = 0

    def bodies() -> Iterator[bytes]:
        for message in islice(fly(args.seed), args.max_messages):
            fold(rockets, message)
            yield json.dumps(message).encode()

    def requests() -> Iterator[bytes]:
        nonlocal copies
        for _, _, is_copy, body in disorder(bodies(), args.seed, args.reorder, args.duplicates):
            copies += is_copy
            yield http_request("POST", args.url, body)

    departure, began = local_time(), time.perf_counter()
    stopped = False
    try:
        sender.run(requests(), bar(sender, args.max_messages * (1 + args.duplicates)))
    except KeyboardInterrupt:
        stopped = True
    notice(report(sender, copies, time.perf_counter() - began))
    if stopped or args.no_verify:
        sys.exit(130 if stopped else 0)  # 130, as after any Ctrl-C
    try:
        differences = list(compare(rockets, read_rockets(args.url), departure))
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        sys.exit(f"launch: cannot compare, as GET /rockets failed: {error}")
    print(*differences, f"{len(rockets)} rockets, {len(differences):,} differences", sep="\n")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
