"""Launch sends a fleet's messages to the service and checks what the service made of them.

It stands in for the challenge's test program, with the same flags: a new connection for every
message, a retry 500 ms after any answer but a 2xx, and the same messages for the same seed. At the
end it compares every rocket with what its messages add up to, and exits 1 if there is a difference.

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
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from urllib.parse import urljoin, urlsplit
from urllib.request import ProxyHandler, build_opener

# Messages #########################################################################################

TYPES = "Falcon-9 Falcon-Heavy Saturn-V Ariane-5 Soyuz-2 Atlas-V Delta-IV Electron".split()
MISSIONS = "ARTEMIS SHUTTLE_MIR APOLLO GEMINI SKYLAB VOYAGER CASSINI ROSETTA VOSTOK".split()
REASONS = "PRESSURE_VESSEL_FAILURE ENGINE_FAILURE FUEL_LEAK GUIDANCE_FAILURE".split()


def fly(seed: int, fleet: int = 20) -> Iterator[dict]:
    """Yield the messages of a fleet without end; each rocket's in the order of their numbers."""
    dice = random.Random(seed)
    flying = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{seed}/{n}")) for n in range(fleet)]
    lifetimes = {channel: dice.randint(300, 4500) for channel in flying[:6]}  # the others fly on
    numbers, speeds = Counter(), Counter()  # by channel
    while True:
        channel = dice.choice(flying)
        numbers[channel] += 1
        change = 500 * dice.randint(1, 8)  # all speeds are multiples of 500, and none is below it
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


# The service ######################################################################################

SERVICE = Path(__file__).resolve().parent.parent / "rockets.py"
TIMEOUT = 10  # seconds until an answer is given up
IS_TERMINAL = sys.stdout.isatty()
SAY_EVERY = 0.1 if IS_TERMINAL else 10  # seconds


def service(program: Path = SERVICE) -> list[Path | str]:
    """Return the command that runs the service on a free port; the database's path follows it."""
    return [sys.executable, program, "--host=127.0.0.1", "--port=0", "--database"]


class Server(subprocess.Popen):
    """A server in a process of its own, within the with block. Raises OSError."""

    def __init__(self, *command: Path | str):
        super().__init__(command, stdout=subprocess.PIPE, text=True)
        listens = re.search(r"http://[\w.:]+", self.stdout.readline())
        if not listens:
            raise OSError(f"the server does not start, and exits with {self.wait()}")
        self.url = listens[0]

    def __exit__(self, *_: object) -> None:
        self.terminate()
        self.communicate()  # until it has closed stdout

    def restart(self) -> None:
        """Kill it, and start it again on the same port."""
        self.kill()
        self.communicate()
        self.__init__(*self.args, f"--port={urlsplit(self.url).port}")  # as a new process


class Sender:
    """Sends bodies of requests, each on a new connection, until each is answered with a 2xx."""

    def __init__(self, url: str, concurrency: int, method: str = "POST"):
        parts = urlsplit(url)
        path = url.partition(parts.netloc)[2]  # with the query
        self.head = f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        self.address = (parts.hostname, parts.port or 80)
        self.concurrency = concurrency  # requests under way at a time
        self.turn = Lock()  # to take the next body
        self.lock = Lock()  # for what is counted
        self.done = self.duplicates = self.retries = 0
        self.failure = ""  # reason of the last retry

    def run(self, bodies: Iterable[bytes], watch: Callable = lambda sender: None) -> float:
        """Send all bodies, calling watch(self) now and then; return the seconds that it took."""
        began = time.perf_counter()
        shared, threads = iter(bodies), []
        for _ in range(self.concurrency):
            threads.append(Thread(target=self.work, args=[shared], daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(SAY_EVERY)
            while thread.is_alive():
                watch(self)
                thread.join(SAY_EVERY)
        return time.perf_counter() - began

    def work(self, bodies: Iterator[bytes]) -> None:
        while True:
            with self.turn:
                body = next(bodies, None)
            if body is None:
                return
            while not self.deliver(body):
                time.sleep(0.5)  # as the test program waits

    def deliver(self, body: bytes) -> bool:
        """Send a body once, and tell whether it was answered with a 2xx."""
        answer = b""
        with suppress(OSError), socket.create_connection(self.address, TIMEOUT) as connection:
            connection.sendall(f"{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while received := connection.recv(1 << 16):
                answer += received
        status = answer.partition(b"\r\n")[0].partition(b" ")[2].decode()
        is_done = status.startswith("2")
        with self.lock:
            self.done += is_done
            self.duplicates += b'"duplicate"' in answer
            self.retries += not is_done
            if not is_done:
                self.failure = status or "no answer"
        return is_done


def read_rockets(url: str) -> dict[str, dict]:
    """Return the rockets that changed last, 1,000 at most, by channel. Raise OSError."""
    page = urljoin(url, "rockets?sort=updatedAt&order=desc&limit=1000")
    with build_opener(ProxyHandler({})).open(page, timeout=TIMEOUT) as answer:  # without a proxy
        return {rocket["channel"]: rocket for rocket in json.load(answer)["rockets"]}


# Command line #####################################################################################

KILLS = 5


def say(line: str, end: str = "\n") -> None:
    """Print a line, on a terminal in place of the progress bar."""
    print(f"\r\x1b[K{line}" if IS_TERMINAL else line, end=end, flush=True)


def run(args: argparse.Namespace, server: Server | None = None) -> bool:
    """Send messages, killing the server if there is one; tell whether anything is wrong then."""
    total = round(args.max_messages * (1 + args.duplicates))  # about, with the copies
    kills = {total * number // (KILLS + 1): number for number in range(1, KILLS + 1)}  # by place
    sent: dict[str, list[dict]] = defaultdict(list)  # by channel

    def bodies() -> Iterator[bytes]:
        messages = islice(fly(args.seed), args.max_messages)
        disordered = disorder(messages, args.seed, args.reorder, args.duplicates)
        for place, message in enumerate(disordered):
            if server and place in kills:
                server.restart()
                say(f"kill {kills[place]} of {KILLS} after {place:,} messages")
            time.sleep(args.message_delay)
            sent[message["metadata"]["channel"]].append(message)
            yield json.dumps(message).encode()

    def say_progress(sender: Sender) -> None:
        bar = "#" * (10 * sender.done // total)
        line = f"{bar:.<10} {sender.done:,} messages, {sender.retries:,} retries {sender.failure}"
        say(line, end="" if IS_TERMINAL else "\n")

    held = read_rockets(args.url)
    sender = Sender(args.url, args.concurrency_level)
    took = sender.run(bodies(), say_progress)
    is_wrong = verify(sent, held, read_rockets(args.url))
    line = f"{sender.done:,} messages in {took:,.1f} s, {sender.done / took:,.0f} a second, "
    say(f"{line}{sender.duplicates:,} duplicates, {sender.retries:,} retries")
    return is_wrong


def verify(sent: dict[str, list], held: dict[str, dict], served: dict[str, dict]) -> bool:
    """Say what is wrong with the rockets served, and tell whether anything is."""
    rockets = {channel: fold(messages) for channel, messages in sent.items()}
    for channel in rockets.keys() & held.keys():
        if held[channel]["lastMessageNumber"] > rockets[channel]["lastMessageNumber"]:
            sys.exit("not compared: the service holds later messages of this seed; use its --reset")
        del rockets[channel]["launchedAt"], rockets[channel]["updatedAt"]  # of an earlier run
    differences = list(compare(rockets, served))
    for line in [*differences, f"{len(rockets)} rockets, {len(differences):,} differences"]:
        say(line)
    return bool(differences)


def run_demo(args: argparse.Namespace) -> bool:
    with TemporaryDirectory() as folder, Server(*service(), f"{folder}/rockets.db") as server:
        args.url = f"{server.url}/messages"
        return run(args, server)


def seconds(text: str) -> float:
    """Read a duration such as 500ms, 1.5s or 0."""
    if text.endswith("ms"):
        return float(text[:-2]) / 1000
    return float(text.removesuffix("s"))


def read_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("url", nargs="?", default="", help="such as http://localhost:8088/messages")
    option("--message-delay", type=seconds, default="0", help="pause, such as 500ms; default: 0")
    option("--concurrency-level", type=int, default=3, help="messages under way; default: 3")
    option("--max-messages", type=int, default=100_000, help="not counting copies; default: 100000")
    option("--seed", type=int, default=444, help="same seed, same messages; default: 444")
    option("--duplicates", type=float, default=0, help="share of them to send twice; default: 0")
    option("--reorder", type=int, default=0, help="places that one is late at most; default: 0")
    option("--demo", action="store_true", help="start a service, and kill it while messages come")
    if "--demo" in words:
        parser.set_defaults(max_messages=20000, duplicates=0.1, reorder=20000, concurrency_level=20)
    args = parser.parse_args(words[1:] if words[:1] == ["launch"] else words)
    if not args.demo and urlsplit(args.url).scheme != "http":
        parser.error("a URL is needed, such as http://localhost:8088/messages")
    return args


def main() -> None:
    args = read_arguments(sys.argv[1:])
    try:
        sys.exit(run_demo(args) if args.demo else run(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"launch: {error}")


if __name__ == "__main__":
    main()
