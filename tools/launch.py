"""Launch sends a fleet's messages to the service and checks what the service made of them.

It stands in for the challenge's test program, whose flags and habits it shares: a new connection
for every message, a retry after 500 ms on anything but a 2xx, the same messages whenever the seed
is the same. It can also send them out of order and some of them twice. At the end it reads
GET /rockets back, compares every rocket with what the messages add up to, and exits 1 if there is
a difference. (After a longer flight with the same seed there must be some: the service then knows
more than this one sent.)

    python tools/launch.py http://localhost:8088/messages
    python tools/launch.py http://localhost:8088/messages --message-delay=500ms
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
from dataclasses import dataclass, field
from datetime import datetime
from heapq import heappop, heappush
from itertools import islice
from urllib.parse import urljoin, urlsplit

RETRY_AFTER = 0.5  # seconds, as the original waits
TIMEOUT = 10  # seconds until an answer is given up
MAX_WAITING = 100  # retries; with more, nothing new is sent, so that an outage uses up no messages
COPY_LATE = 300  # places that a copy comes at most after its message, unless --reorder is more
MAX_NAP = 0.02  # seconds; a retry is at most that much late
REDRAW = 0.1  # seconds between two states of the progress bar
BAR = 30  # characters

# Messages #########################################################################################

TYPES = (
    "Falcon-9", "Falcon-Heavy", "Saturn-V", "Ariane-5",
    "Soyuz-2", "Atlas-V", "Delta-IV", "Electron",
)
MISSIONS = (
    "ARTEMIS", "SHUTTLE_MIR", "APOLLO", "GEMINI", "SKYLAB",
    "VOYAGER", "CASSINI", "ROSETTA", "VOSTOK",
)
REASONS = (
    "PRESSURE_VESSEL_FAILURE", "ENGINE_FAILURE", "FUEL_LEAK",
    "GUIDANCE_FAILURE", "STRUCTURAL_FAILURE",
)
SPEED_STEP = 500  # all speeds are multiples of it, and none is below it
DOOMED = 0.3  # of the fleet: 6 of 20 rockets
LIFETIMES = (300, 6000)  # messages of a doomed rocket; of 100,000, one that lasts gets about 6,300


def local_time() -> str:
    return datetime.now().astimezone().isoformat(timespec="microseconds")


@dataclass
class Rocket:
    """A rocket in flight."""

    channel: str
    last_number: int | None = None  # of the message that tells of its explosion; None if it lasts
    number: int = 0  # of its newest message
    speed: int = 0

    def is_gone(self) -> bool:
        return self.number == self.last_number

    def report(self, dice: random.Random) -> tuple[str, dict]:
        """Return the type and the content of its next message."""
        self.number += 1
        change = SPEED_STEP * dice.randint(1, 8)
        if self.number == 1:
            self.speed = change
            type_, mission = dice.choice(TYPES), dice.choice(MISSIONS)
            return "RocketLaunched", {"type": type_, "launchSpeed": change, "mission": mission}
        if self.is_gone():
            return "RocketExploded", {"reason": dice.choice(REASONS)}
        if dice.random() < 0.1:
            return "RocketMissionChanged", {"newMission": dice.choice(MISSIONS)}
        if dice.random() < 0.5 and self.speed - change >= SPEED_STEP:
            self.speed -= change
            return "RocketSpeedDecreased", {"by": change}
        self.speed += change
        return "RocketSpeedIncreased", {"by": change}


def fly(seed: int, fleet: int = 20) -> Iterator[dict]:
    """Yield the messages of a fleet without end; each rocket's in the order of their numbers."""
    dice = random.Random(seed)
    names = [f"rocket {place} of seed {seed}" for place in range(fleet)]
    flying = [Rocket(str(uuid.uuid5(uuid.NAMESPACE_URL, name))) for name in names]
    shortest, longest = LIFETIMES
    for rocket in dice.sample(flying, round(DOOMED * fleet)):
        rocket.last_number = round(shortest * (longest / shortest) ** dice.random())
    while True:
        rocket = dice.choice(flying)
        message_type, content = rocket.report(dice)
        metadata = {
            "channel": rocket.channel,
            "messageNumber": rocket.number,
            "messageTime": local_time(),
            "messageType": message_type,
        }
        yield {"metadata": metadata, "message": content}
        if rocket.is_gone():
            flying.remove(rocket)


def fold(rockets: dict[str, dict], message: dict) -> None:
    """Add a message to what is known of its rocket; for messages in the order of their numbers."""
    metadata, content = message["metadata"], message["message"]
    channel, sent_at = metadata["channel"], metadata["messageTime"]
    rocket = rockets.setdefault(channel, {"channel": channel, "missingMessages": 0})
    rocket |= {"lastMessageNumber": metadata["messageNumber"], "updatedAt": sent_at}
    match metadata["messageType"]:
        case "RocketLaunched":
            rocket |= {"status": "active", "explosionReason": None, "launchedAt": sent_at}
            rocket |= {"type": content["type"], "mission": content["mission"]}
            rocket["speed"] = content["launchSpeed"]
        case "RocketSpeedIncreased":
            rocket["speed"] += content["by"]
        case "RocketSpeedDecreased":
            rocket["speed"] -= content["by"]
        case "RocketMissionChanged":
            rocket["mission"] = content["newMission"]
        case "RocketExploded":
            rocket |= {"status": "exploded", "explosionReason": content["reason"]}


def disorder(
    messages: Iterable[bytes], seed: int, reorder: int, duplicates: float
) -> Iterator[tuple[bool, bytes]]:
    """Yield (is it a copy, message): each up to so many places late, a share of them twice."""
    dice = random.Random(f"order {seed}")
    # A heap of (place at which it is due, order among those, is it a copy, message). Of those that
    # are due at one place the last goes first, so that one place late already changes the order.
    waiting: list[tuple[int, int, bool, bytes]] = []
    for place, message in enumerate(messages):
        late = int((reorder + 1) * dice.random() ** 6)  # most of them by little
        heappush(waiting, (place + late, -place, False, message))
        if dice.random() < duplicates:
            late = dice.randint(1, max(reorder, COPY_LATE))
            heappush(waiting, (place + late, -place, True, message))
        while waiting and waiting[0][0] <= place:
            yield heappop(waiting)[2:]
    while waiting:
        yield heappop(waiting)[2:]


class Flight:
    """What is sent in one run, and what it adds up to."""

    def __init__(self, seed: int, messages: int):
        self.seed = seed
        self.messages = messages  # to send, copies not counted
        self.copies = 0  # sent so far
        self.rockets: dict[str, dict] = {}  # as they should be served, by channel
        self.departure = local_time()

    def bodies(self) -> Iterator[bytes]:
        for message in islice(fly(self.seed), self.messages):
            fold(self.rockets, message)
            yield json.dumps(message).encode()

    def requests(self, url: str, reorder: int, duplicates: float) -> Iterator[bytes]:
        """Yield all requests in the order in which they are to be sent."""
        for is_copy, body in disorder(self.bodies(), self.seed, reorder, duplicates):
            self.copies += is_copy
            yield http_request("POST", url, body)


# Sending ##########################################################################################


def http_request(method: str, url: str, body: bytes = b"") -> bytes:
    """Return a request to send as it is; it asks to close the connection after the answer."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = f"{method} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


@dataclass(slots=True, eq=False)
class Request:
    """A request until it is answered: where it goes, what is still to send, what came back."""

    content: bytes
    connection: socket.socket | None = None
    address: tuple | None = None  # (family, address), where it was sent
    untried: list[tuple] = field(default_factory=list)  # further addresses
    unsent: bytes = b""
    answer: bytearray = field(default_factory=bytearray)
    began: float = 0  # when it was sent; like the next, a second of time.perf_counter()
    due: float = 0  # when to send it again


class Sender:
    """Sends requests to one server, each on a new connection, until each is answered with a 2xx.

    One thread whose sockets never block: several would mostly wait for one another.
    """

    def __init__(
        self,
        url: str,
        concurrency: int = 3,
        delay: float = 0,
        notice: Callable[[str], None] = print,
    ):
        """Get ready for so many requests at a time, with so many seconds from one to the next.

        notice() is told each new reason to send something again. Raise OSError or ValueError if
        nobody knows the URL's host or it has no proper port.
        """
        parts = urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        # The one that answered last comes first.
        self.addresses = [(family, address) for family, _, _, _, address in found]
        self.concurrency = concurrency
        self.delay = delay
        self.notice = notice
        self.selector = selectors.DefaultSelector()
        self.contents: Iterator[bytes] = iter(())  # of requests that were never sent
        self.has_more = False
        self.ready = 0.0  # when something new may be sent
        self.flying: dict[Request, None] = {}  # sent and not answered yet; a dict keeps their order
        self.waiting: deque[Request] = deque()  # to be sent again, soonest first
        self.retries: Counter[str] = Counter()  # by reason
        self.duplicates = 0  # answers that say so
        self.latencies = array("d")  # seconds from connecting to the whole answer, for each 2xx

    def run(self, contents: Iterable[bytes], show: Callable[[], None] = lambda: None) -> float:
        """Send all requests, and return the seconds that it took.

        show() is called many times in each of them.
        """
        self.contents, self.has_more = iter(contents), True
        began = self.ready = time.perf_counter()
        while self.has_more or self.flying or self.waiting:
            now = time.perf_counter()
            while len(self.flying) < self.concurrency and (request := self.next_request(now)):
                self.start(request)
            pause = self.ready - now
            for key, _ in self.selector.select(min(pause, MAX_NAP) if pause > 0 else MAX_NAP):
                self.advance(key.data)
            for request in [late for late in self.flying if late.began < now - TIMEOUT]:
                self.fail(request, f"No answer within {TIMEOUT} s")
            show()
        return time.perf_counter() - began

    def next_request(self, now: float) -> Request | None:
        """Return a retry that is due, else something new if it may be sent, else None."""
        if self.waiting and self.waiting[0].due <= now:
            return self.waiting.popleft()
        if not self.has_more or self.ready > now or len(self.waiting) >= MAX_WAITING:
            return None
        content = next(self.contents, None)
        if content is None:
            self.has_more = False
            return None
        self.ready = now + self.delay
        return Request(content)

    def start(self, request: Request) -> None:
        if not request.untried:
            request.untried = list(self.addresses)
        request.address = request.untried.pop(0)
        request.unsent, request.answer = request.content, bytearray()
        request.began = time.perf_counter()
        family, address = request.address
        request.connection = socket.socket(family)
        request.connection.setblocking(False)
        self.flying[request] = None
        self.selector.register(request.connection, selectors.EVENT_WRITE, request)
        request.connection.connect_ex(address)  # advance() meets the error, if there is one
        self.advance(request)  # within one machine, the connection is there at once

    def advance(self, request: Request) -> None:
        """Send or receive as much as goes at the moment."""
        try:
            if request.unsent:
                sent = request.connection.send(request.unsent)
                request.unsent = request.unsent[sent:]
                if not request.unsent:
                    self.selector.modify(request.connection, selectors.EVENT_READ, request)
                return
            received = request.connection.recv(1 << 20)
        except OSError as error:
            # The first two say that nothing goes now, the third that it is not connected yet.
            if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOTCONN):
                self.fail(request, error.strerror)
            return
        request.answer += received
        head_end = request.answer.find(b"\r\n\r\n") + 4
        head = request.answer[:head_end]
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        end = head_end + int(length[1]) if length else None  # without it, the connection's end
        is_whole = len(request.answer) >= end if end else not received
        if head and is_whole:
            self.finish(request, head.decode("latin-1"), request.answer[head_end:])
        elif not received:
            self.fail(request, "Answer broken off")

    def finish(self, request: Request, head: str, body: bytearray) -> None:
        """Count an answer that is a 2xx, and send the request again after any other."""
        status = head.partition("\r\n")[0].partition(" ")[2]
        if not status.startswith("2"):
            self.fail(request, status, body[:500].decode(errors="replace"))
            return
        self.latencies.append(time.perf_counter() - request.began)
        self.duplicates += b'"duplicate"' in body
        if request.address != self.addresses[0]:
            self.addresses.remove(request.address)
            self.addresses.insert(0, request.address)
        self.stop(request)

    def fail(self, request: Request, reason: str, details: str = "") -> None:
        """Try the next address at once if this one was not reached, else all of them later."""
        self.stop(request)
        if request.untried and request.unsent == request.content:
            self.start(request)
            return
        request.untried = []
        request.due = time.perf_counter() + RETRY_AFTER
        self.waiting.append(request)
        self.retries[reason] += 1
        if self.retries[reason] == 1:
            pause = f"{RETRY_AFTER * 1000:g} ms"
            self.notice(f"{reason}; trying again every {pause}. {details}".strip())

    def stop(self, request: Request) -> None:
        self.selector.unregister(request.connection)
        request.connection.close()
        del self.flying[request]


# What the service made of it ######################################################################


def next_page(link: str) -> str | None:
    """Return where the link with rel="next" leads, if a Link header (RFC 8288) has one."""
    for target, parameters in re.findall(r"<([^>]*)>([^<]*)", link):
        relations = re.search(r';\s*rel\s*=\s*"?([^";,]*)', parameters, re.IGNORECASE)
        if relations and "next" in relations[1].lower().split():
            return target
    return None


def read_rockets(url: str) -> dict[str, dict]:
    """Return all of the service's rockets by channel, from one page or more.

    Raise OSError, ValueError, LookupError or HTTPException if that can't be done.
    """
    rockets: dict[str, dict] = {}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    page: str | None = urljoin(url, "rockets")
    while page:
        parts = urlsplit(page)
        connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""))
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise OSError(f"it was answered {answer.status} {answer.reason}")
        for rocket in json.loads(body)["rockets"]:
            if rocket["channel"] in rockets:
                raise ValueError(f"{rocket['channel']} came twice")
            rockets[rocket["channel"]] = rocket
        link = next_page(", ".join(answer.headers.get_all("Link", [])))
        page = link and urljoin(page, link)
    connection.close()
    return rockets


def compare(rockets: dict[str, dict], served: dict[str, dict], departure: str) -> Iterator[str]:
    """Yield the differences, each as a line of text.

    Times before the departure are those of an earlier flight, and no difference.
    """
    for channel, rocket in rockets.items():
        if channel not in served:
            yield f"{channel} is missing"
            continue
        for name, right in rocket.items():
            got = served[channel].get(name, "left out")
            if name in ("launchedAt", "updatedAt") and str(got) < departure:
                continue
            if got != right:
                yield f"{channel} {name} is {json.dumps(got)}, not {json.dumps(right)}"


# Command line #####################################################################################


class Progress:
    """A bar on a terminal that shows how far a sender has come; nothing elsewhere."""

    def __init__(self, sender: Sender, expected: float):
        self.sender = sender
        self.expected = expected  # messages
        self.began = self.drawn = time.perf_counter()

    def show(self) -> None:
        """Draw the bar, unless it was drawn just now."""
        now = time.perf_counter()
        if now >= self.drawn + REDRAW and sys.stdout.isatty():
            self.drawn = now
            print(f"\r\x1b[K{self.line(now - self.began)}", end="", flush=True)

    def line(self, took: float) -> str:
        done = len(self.sender.latencies)
        full = min(BAR, int(BAR * done / self.expected))
        line = f"{'█' * full}{'░' * (BAR - full)} {done:,} messages, {done / took:,.0f}/s, "
        line += f"{self.sender.retries.total():,} retries"
        if done:
            line += f", {max(0, self.expected - done) * took / done:,.0f} s left"
        return line


def notice(line: str) -> None:
    """Print a line, in place of the progress bar if there is one."""
    print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, flush=True)


def report(sender: Sender, copies: int, took: float) -> str:
    done = len(sender.latencies)
    latencies = [1000 * seconds for seconds in sorted(sender.latencies)] or [0.0]
    p50, p95, p99 = (latencies[int(done * part)] for part in (0.5, 0.95, 0.99))
    reasons = ", ".join(f"{reason}: {times:,}" for reason, times in sender.retries.most_common())
    return f"""\
messages    {done:,}
duplicates  {copies:,} sent, {sender.duplicates:,} answered as such
retries     {sender.retries.total():,}{f" ({reasons})" if reasons else ""}
seconds     {took:,.1f}
rate        {done / took:,.0f} messages a second
latency     p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, max {latencies[-1]:.1f} ms"""


def seconds(text: str) -> float:
    """Read a duration such as 500ms, 1.5s or 0."""
    if text == "0":
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 500ms, 1s or 0")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60}[match[2]]


OPTIONS = (
    ("--message-delay", "TIME", seconds, "0", "pause between messages, such as 500ms"),
    ("--concurrency-level", "N", int, "3", "messages on their way at a time"),
    ("--max-messages", "N", int, "100000", "messages to send, copies not counted"),
    ("--seed", "N", int, "444", "the same one gives the same messages"),
    ("--duplicates", "SHARE", float, "0", "share of the messages to send twice, 0 to 1"),
    ("--reorder", "PLACES", int, "0", "send each message up to so many places late"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("url", help="where to post, such as http://localhost:8088/messages")
    for name, metavar, read, default, text in OPTIONS:
        parser.add_argument(name, metavar=metavar, type=read, default=default, help=text)
    text = "don't compare what the service serves with what was sent"
    parser.add_argument("--no-verify", action="store_true", help=text)
    args = parser.parse_args()
    if urlsplit(args.url).scheme != "http":
        parser.error(f"the URL must begin with http://, not {args.url}")
    if min(args.concurrency_level, args.max_messages) < 1:
        parser.error("N must be at least 1")
    if args.reorder < 0 or not 0 <= args.duplicates <= 1:
        parser.error("PLACES must be at least 0, and SHARE from 0 to 1")
    return args


def main() -> None:
    """Read the command line, send everything, report and compare."""
    args = parse_arguments()
    try:
        sender = Sender(args.url, args.concurrency_level, args.message_delay, notice)
    except (OSError, ValueError) as error:
        sys.exit(f"launch: cannot send to {args.url}: {error}")
    flight = Flight(args.seed, args.max_messages)
    progress = Progress(sender, args.max_messages * (1 + args.duplicates))
    stopped = False
    try:
        sender.run(flight.requests(args.url, args.reorder, args.duplicates), progress.show)
    except KeyboardInterrupt:
        stopped = True
    notice(report(sender, flight.copies, time.perf_counter() - progress.began))
    if stopped:
        sys.exit(130)  # as after any Ctrl-C
    if args.no_verify:
        return
    try:
        differences = list(compare(flight.rockets, read_rockets(args.url), flight.departure))
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        sys.exit(f"launch: cannot compare, as GET /rockets failed: {error}")
    for difference in differences:
        print(difference)
    print(f"{len(flight.rockets)} rockets, {len(differences):,} differences")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
