"""Browser drives one page of a headless Chromium over the DevTools protocol, for the tests.

It talks over pipes (--remote-debugging-pipe): JSON with a NUL after each message, and no port.
The methods are described at https://chromedevtools.github.io/devtools-protocol/.
"""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

# Chrome first: where both are installed, it is the one whose sandbox is set up.
NAMES = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
OPTIONS = """--headless --remote-debugging-pipe --window-size=1280,900 --disable-gpu
    --disable-background-networking --disable-dev-shm-usage --no-first-run""".split()
TIMEOUT = 60  # seconds for an answer or a condition; a busy machine may take some
EVENTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")  # of the console


def find_chromium() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser with one page; messages are what its console was told, exceptions included."""

    def __init__(self, folder: Path):
        """Start it, with a folder for its profile and for what is downloaded."""
        self.folder, self.messages = folder, []
        self.target: dict = {}  # goes with every message to the page
        self.count, self.unread = 0, b""
        read_end, self.pipe_in = os.pipe()
        self.pipe_out, write_end = os.pipe()

        def connect_pipes() -> None:  # it reads from 3 and writes to 4; 100 and 101 are free
            for old, new in ((read_end, 100), (write_end, 101), (100, 3), (101, 4)):
                os.dup2(old, new)

        command = [find_chromium(), *OPTIONS, f"--user-data-dir={self.folder / 'profile'}"]
        command += ["--no-sandbox"] * (os.geteuid() == 0)  # which root can't have
        options = {"preexec_fn": connect_pipes, "pass_fds": (3, 4), "stderr": subprocess.DEVNULL}
        self.popen = subprocess.Popen(command, **options)
        os.close(read_end)
        os.close(write_end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.target = self.call("Target.attachToTarget", targetId=target, flatten=True)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        os.close(self.pipe_in)
        os.close(self.pipe_out)

    def call(self, method: str, **params: Any) -> dict:
        """Return the result of a method of the protocol. Raise RuntimeError if it fails."""
        self.count += 1
        body = {"id": self.count, "method": method, "params": params, **self.target}
        os.write(self.pipe_in, json.dumps(body).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            if answer.get("method") in EVENTS:
                self.messages.append(json.dumps(answer["params"]))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.unread:
            ready = select.select([self.pipe_out], [], [], TIMEOUT)[0]
            received = ready and os.read(self.pipe_out, 1 << 20)
            if not received:
                raise RuntimeError("the browser does not answer, or has ended")
            self.unread += received
        first, _, self.unread = self.unread.partition(b"\0")
        return json.loads(first)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression. Raise RuntimeError if it throws."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, expression: str, expected: Any = True) -> None:
        """Wait until an expression has a value. Raise TimeoutError, which tells what it has."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                value = self.evaluate(expression)
            except RuntimeError as error:  # what the expression names is not there yet
                value = error
            if value == expected:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} is {value!r:.500}; console: {self.messages}")
            time.sleep(0.05)

    def saved(self, pattern: str) -> Path:
        """Wait for a file that the page saves; return where. Raise TimeoutError."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            for path in self.folder.glob(pattern):
                if path.stat().st_size:  # an empty one keeps its name free
                    return path
            time.sleep(0.05)
        raise TimeoutError(f"{pattern} was not saved; console: {self.messages}")

    def mouse(self, event: str, x: float, y: float) -> None:
        """Dispatch a real event: "mouseMoved", "mousePressed" or "mouseReleased"."""
        button = "none" if event == "mouseMoved" else "left"
        self.call("Input.dispatchMouseEvent", type=event, x=x, y=y, button=button, clickCount=1)

    def place(self, selector: str) -> tuple[float, float]:
        """Return the middle of an element, in pixels of the viewport."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        return tuple(self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})"))

    def click(self, selector: str) -> None:
        """Click an element as a mouse does."""
        x, y = self.place(selector)
        for event in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(event, x, y)
