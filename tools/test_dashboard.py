"""The dashboard, as a watcher sees it in a real Chromium; and that its files fit together."""

import json
import re
import subprocess
import sys
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "static"
needs_chromium = pytest.mark.skipif(not find_chromium(), reason="there is no Chromium")
A, B, C = (f"00000000-0000-0000-0000-00000000000{digit}" for digit in "abc")
LAUNCH = {"type": "Falcon-9", "launchSpeed": 500, "mission": "ARTEMIS"}
HOSTILE = "<img src=x onerror=document.title='broken'>\u202e"
CHANNELS = "[...document.querySelectorAll('#rows tr')].map((row) => row.dataset.channel)"


def text(selector):
    return f"document.querySelector({json.dumps(selector)}).innerText.trim()"


class Service:
    """The service as a process, and what is posted to it."""

    def __init__(self, folder):
        self.folder, self.port = folder, 0
        self.start()

    def start(self):
        command = [sys.executable, ROOT / "rockets.py", "--host=127.0.0.1", f"--port={self.port}"]
        command.append(f"--database={self.folder / 'rockets.db'}")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = re.search(r"http://\S+(?=,)", self.process.stdout.readline())[0]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self):
        self.process.kill()
        self.process.communicate()

    def post(self, channel, number, kind, content, ago=0):
        sent_at = datetime.now(timezone.utc) - timedelta(seconds=ago)
        metadata = {"channel": channel, "messageNumber": number}
        metadata |= {"messageTime": sent_at.isoformat(), "messageType": kind}
        body = json.dumps({"metadata": metadata, "message": content}).encode()
        urllib.request.urlopen(f"{self.url}/messages", body).close()


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path)
    service.post(A, 1, "RocketLaunched", LAUNCH)
    service.post(A, 2, "RocketSpeedIncreased", {"by": 3000})
    service.post(B, 1, "RocketLaunched", LAUNCH | {"type": HOSTILE, "mission": "VOSTOK"}, 600)
    service.post(B, 3, "RocketSpeedDecreased", {"by": 2500}, 400)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        browser.emulate(1280, 800)
        yield browser


@pytest.fixture
def page(browser, service):
    browser.messages.clear()
    browser.open("about:blank")
    browser.open(service.url)
    browser.wait(CHANNELS, [A, B])
    yield browser
    assert not [each for each in browser.messages if "Failed to load resource" not in each]


@needs_chromium
def test_the_totals_and_the_list_show_what_is_in_doubt_and_who_is_silent(page):
    assert page.evaluate(text("#total-rockets")) == "2"
    assert page.evaluate(text("#total-missing")) == "1"
    assert page.evaluate(text("#rows .speed")) == "3,500"
    assert page.evaluate(text("#rows tr + tr .speed")) == "≈ −2,000"
    assert page.evaluate(text("#rows tr + tr .status small")) == "silent for 6 min"


@needs_chromium
def test_the_list_is_searched_and_sorted_and_the_address_keeps_it(page, service):
    page.evaluate("{q.value = 'artem'; q.dispatchEvent(new InputEvent('input', {bubbles: true}))}")
    page.wait(CHANNELS, [A])
    page.click("#clear")
    page.wait(CHANNELS, [A, B])
    page.click("[data-sort=missingMessages]")
    page.wait(CHANNELS, [B, A])
    assert page.evaluate("location.hash") == "#sort=missingMessages&order=desc"


@needs_chromium
def test_a_rocket_opens_with_its_chart_and_history_and_takes_in_what_comes_late(page, service):
    page.click("#rows tr + tr a")
    page.wait(text("#now-speed"), "≈ −2,000")
    page.wait("document.querySelectorAll('#history tr').length", 2)
    assert "1 gap" in page.evaluate("document.querySelector('#chart').ariaLabel")
    assert page.evaluate("document.querySelectorAll('#chart canvas').length") == 1
    service.post(B, 2, "RocketSpeedIncreased", {"by": 5000}, 500)
    page.wait(text("#now-speed"), "3,000")
    page.wait("document.querySelectorAll('#history tr').length", 3)
    page.press("Escape")
    page.wait("document.querySelector('#detail').hidden")


@needs_chromium
def test_a_deep_link_shows_a_rocket_once_it_has_reported(page, service):
    page.evaluate(f"location.hash = 'rocket={C}'")
    page.wait(f"{text('#detail-problem')}.startsWith('No message has come')")
    service.post(C, 1, "RocketLaunched", LAUNCH)
    page.wait(text("#now-speed"), "500")


@needs_chromium
def test_an_explosion_is_told_until_its_rocket_is_opened(page, service):
    service.post(A, 3, "RocketExploded", {"reason": "FUEL_LEAK"})
    page.wait("document.title.startsWith('✖ 1 exploded')")
    assert "exploded: FUEL_LEAK" in page.evaluate("document.querySelector('#announcer').innerText")
    page.wait(text("#rows .status small"), "FUEL_LEAK")
    page.click("#explosions a")
    page.wait("document.querySelector('#explosions').hidden")
    page.wait(text("#now-status"), "Exploded: \u2068FUEL_LEAK\u2069")


@needs_chromium
def test_no_click_is_lost_while_rows_would_move(page, service):
    page.evaluate("location.hash = 'sort=updatedAt&order=desc'")
    page.wait(CHANNELS, [A, B])
    page.pointer("mouseMoved", f"[data-channel='{B}'] .mission")
    page.pointer("mousePressed", f"[data-channel='{B}'] .mission")
    service.post(B, 4, "RocketSpeedIncreased", {"by": 9000})
    page.evaluate("document.querySelector('#rows').dispatchEvent(new Event('pointermove'))")
    page.pointer("mouseReleased", f"[data-channel='{B}'] .mission")
    page.wait(text("#detail-channel"), B)


@needs_chromium
def test_the_order_holds_while_the_pointer_is_moved_and_values_go_on(page, service):
    page.evaluate("location.hash = 'sort=updatedAt&order=desc'")
    page.wait(CHANNELS, [A, B])
    service.post(B, 4, "RocketSpeedIncreased", {"by": 9000})
    held = f"""(document.querySelector('#rows').dispatchEvent(new Event('pointermove')),
        [...{CHANNELS}, document.querySelector('#rows tr + tr .speed').innerText])"""
    page.wait(held, [A, B, "≈ 7,000"])
    page.wait(CHANNELS, [B, A])


@needs_chromium
def test_an_outage_is_told_and_ends_by_itself(page, service):
    service.stop()
    page.wait(f"{text('#outage')}.startsWith('The service does not answer')")
    service.start()
    page.wait("document.querySelector('#outage').hidden")
    assert page.evaluate(CHANNELS) == [A, B]


@needs_chromium
def test_names_are_shown_as_text_and_isolated(page):
    assert page.evaluate("document.querySelector('#rows tr + tr .type bdi').textContent") == HOSTILE
    assert page.evaluate("document.title") == "Rockets"


@needs_chromium
def test_the_csv_runs_no_formula(page):
    cell = "(value) => import('/static/export.js').then((module) => module.csvCell(value))"
    values = ["=1+1", "x;=1+1;y", "a\t-1", "a\n@b", 'say "x"', -2, None]
    cells = [page.evaluate(f"({cell})({json.dumps(value)})") for value in values]
    safe = ['"\'=1+1"', '"x;\'=1+1;y"', '"a\t\'-1"', '"a\n\'@b"', '"say ""x"""', "-2", ""]
    assert cells == safe
    page.click("#as-csv")
    name = f"rockets-{page.evaluate('new Date().toLocaleDateString(`sv`)')}.csv"
    assert len(page.saved(name).read_text().splitlines()) == 3


@needs_chromium
def test_twenty_rockets_fit_on_a_small_screen(page, service):
    for number in range(18):
        service.post(f"10000000-0000-0000-0000-0000000000{number:02}", 1, "RocketLaunched", LAUNCH)
    page.wait("document.querySelectorAll('#rows tr').length", 20)
    assert page.evaluate("document.querySelector('#rows tr').getBoundingClientRect().top") <= 300
    bottom = "document.querySelector('#rows').lastChild.getBoundingClientRect().bottom"
    assert page.evaluate(bottom) <= 800


def test_every_file_that_the_page_names_is_there_and_the_policy_lets_it_run():
    page = (STATIC / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    files = [name for name in named if name.startswith("static/")]
    assert "static/main.js" in files and all((ROOT / name).is_file() for name in files)
    assert not [name for name in named if name.startswith(("/", "http"))]
    assert re.search(r"script-src 'self';\s+style-src 'self'; connect-src 'self'", page)
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=", page)
    for module in STATIC.glob("*.js"):
        code = module.read_text()
        imported = re.findall(r'from "([^"]+)"', code)
        assert all(name.startswith("./") and (STATIC / name).is_file() for name in imported)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", code)
