"""The dashboard in a real Chromium, on a real service."""

import csv
import io
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "static"
ACTIVE, AWAITING, EXPLODED = (f"{n}0000000-0000-4000-8000-000000000000" for n in (1, 2, 3))
ROWS = "[...document.querySelectorAll('#rows tr')]"
CELLS = f"{ROWS}.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
LISTED = f"{ROWS}.map(row => row.dataset.channel)"
PULSE = "document.getElementById('pulse').dataset.state"


def text_of(name):
    return f"document.getElementById('{name}').textContent.trim()"


@contextmanager
def service(database, port=0):
    """Run the service; yield its address."""
    options = ["--host=127.0.0.1", f"--port={port}", f"--database={database}"]
    command = [sys.executable, str(ROOT / "rockets.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as popen:
        try:
            yield re.search(r"http://[\w.:]+\d", popen.stdout.readline().decode())[0]
        finally:
            popen.terminate()
            popen.wait(60)


def post(url, channel, number, kind, **message):
    metadata = {"channel": channel, "messageNumber": number, "messageType": kind}
    metadata["messageTime"] = datetime.now(timezone.utc).isoformat()
    body = json.dumps({"metadata": metadata, "message": message}).encode()
    urlopen(f"{url}/messages", body).close()  # raises unless it is a 2xx


def launch(url, channel, name="Falcon-9", mission="ARTEMIS", speed=500):
    post(url, channel, 1, "RocketLaunched", type=name, launchSpeed=speed, mission=mission)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no Chromium or Chrome is installed")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def fleet(tmp_path):
    with service(tmp_path / "rockets.db") as url:
        launch(url, ACTIVE)
        post(url, ACTIVE, 2, "RocketSpeedIncreased", by=3000)
        post(url, ACTIVE, 4, "RocketSpeedDecreased", by=1000)
        post(url, AWAITING, 1, "RocketSpeedIncreased", by=5)
        launch(url, EXPLODED, "Saturn", "=1+1", 0)
        post(url, EXPLODED, 2, "RocketExploded", reason="FUEL_LEAK")
        yield url


@pytest.fixture
def page(browser, fleet):
    """The dashboard; whatever comes to the console, violations of its policy too, is a failure."""
    browser.messages.clear()
    browser.resize(1280, 800)
    browser.open(f"{fleet}/")
    browser.wait(LISTED, [ACTIVE, AWAITING, EXPLODED])
    yield browser
    browser.open("about:blank")
    browser.wait("location.href", "about:blank")
    assert browser.messages == []


def test_files_of_the_page_are_there_and_its_policy_lets_them_in():
    page = (STATIC / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "script-src 'self'; style-src 'self'; connect-src 'self';" in " ".join(policy.split())
    assert not re.search(r"<style|\s(style|on\w+)=|<script(?![^>]*\ssrc=)", page)
    named = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page)
    assert [name for name in named if re.match(r"/|\w+:", name)] == []  # all are relative
    for name in named:
        assert not name.startswith("static/") or (ROOT / name).is_file(), name
    ids = set(re.findall(r'\bid="([\w-]+)"', page))
    for module in STATIC.glob("*.js"):
        script = module.read_text()
        for name in re.findall(r'from "([^"]+)"', script):
            assert name.startswith("./") and (STATIC / name).is_file(), (module.name, name)
        assert {name for name in re.findall(r'byId\("([\w-]+)"\)', script)} <= ids, module.name
        assert not re.search(r"""(?:fetch|get)\(["'`]/|innerHTML|\.style\b""", script), module.name


def test_totals_and_list_show_the_fleet_and_mark_what_is_in_doubt(page):
    names = ("rockets", "active", "awaiting_launch", "exploded", "messages", "missing")
    shown = [page.evaluate(text_of(f"total-{name}")) for name in names]
    assert shown == ["3", "1", "1", "1", "6", "1"]
    assert [row[:7] for row in page.evaluate(CELLS)] == [
        [ACTIVE, "Falcon-9", "ARTEMIS", "≈ 2,500", "Active", "4", "1"],
        [AWAITING, "unknown", "unknown", "unknown", "Awaiting launch", "1", "0"],
        [EXPLODED, "Saturn", "=1+1", "0", "Exploded: FUEL_LEAK", "2", "0"],
    ]


def test_search_filter_and_sort_stand_in_the_address(page):
    page.click("#q")
    page.call("Input.insertText", text="fALC")
    page.wait(LISTED, [ACTIVE])
    page.wait("location.hash", "#q=fALC")
    page.click("#clear")
    page.click("[data-sort=missingMessages]")
    page.wait(LISTED, [ACTIVE, AWAITING, EXPLODED])
    page.click("[data-sort=speed]")
    page.wait(LISTED, [ACTIVE, EXPLODED, AWAITING])
    page.evaluate("location.hash = '#status=exploded'")
    page.wait(LISTED, [EXPLODED])
    page.evaluate("location.hash = '#sort=__proto__'")
    page.wait(f"{text_of('notice')}.startsWith('The service says: sort must be one of')")
    page.messages[:] = [said for said in page.messages if "400" not in said]


def test_a_rocket_opens_with_its_history_and_takes_in_what_comes_late(page, fleet):
    lines = "[...document.querySelectorAll('#history tr')].map(row => row.cells[0].textContent)"
    page.click(f"[data-channel='{ACTIVE}']")
    page.wait(lines, ["4", "1 message not received: number 3", "2", "1"])
    page.wait("document.querySelector('#chart canvas').width > 100")
    said = "Speed from 500 to 2,500, at most 3,500; 1 message not received."
    page.wait(f"document.getElementById('chart').ariaLabel.startsWith('{said}')")
    post(fleet, ACTIVE, 3, "RocketMissionChanged", newMission="VOYAGER")
    page.wait(lines, ["4", "3", "2", "1"])
    page.wait(text_of("now-speed"), "2,500")
    page.evaluate(f"location.hash = '#rocket={AWAITING}'")
    page.wait(text_of("now-speed"), "unknown")
    page.evaluate("history.back()")
    page.wait("document.title", "\u2068Falcon-9\u2069 10000000 – Rockets")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    page.wait("document.title", "Rockets")


def test_a_rocket_that_has_not_reported_is_shown_once_it_has(page, fleet):
    channel = ACTIVE.replace("1", "9", 1)
    page.evaluate(f"location.hash = '#rocket={channel}&status=exploded'")
    page.wait(text_of("detail-problem"), "No message has come on this channel yet.")
    launch(fleet, channel)
    page.wait(text_of("now-speed"), "500")
    page.messages[:] = [said for said in page.messages if "404" not in said]


def test_a_click_opens_its_rocket_while_messages_move_the_rows(page, fleet):
    row = f"[data-channel='{ACTIVE}']"
    page.click("[data-sort=updatedAt]")
    page.wait(f"{LISTED}[0]", EXPLODED)
    x, y = page.place(f"{row} .mission")
    page.mouse("mouseMoved", x, y)
    page.mouse("mousePressed", x, y)
    order = page.evaluate(LISTED)
    post(fleet, ACTIVE, 5, "RocketSpeedIncreased", by=7)
    page.wait(f'document.querySelector("{row} .speed").textContent', "≈ 2,507")
    assert page.evaluate(LISTED) == order
    page.mouse("mouseReleased", x, y)
    page.wait("location.hash.includes('rocket=10000000')")
    page.mouse("mouseMoved", 10, 10)
    page.wait(f"{LISTED}[0]", ACTIVE)


def test_an_explosion_is_told_until_its_rocket_is_opened(page, fleet):
    post(fleet, ACTIVE, 3, "RocketExploded", reason="ENGINE_FAILURE")
    page.wait(text_of("explosions-list"), "Falcon-9 10000000 exploded: ENGINE_FAILURE")
    page.wait("document.title", "✖ 1 exploded – Rockets")
    said = "1 rocket exploded. \u2068Falcon-9\u2069 10000000: \u2068ENGINE_FAILURE\u2069"
    page.wait(text_of("announcer"), said)
    page.click("#explosions a")
    page.wait("document.title", "\u2068Falcon-9\u2069 10000000 – Rockets")
    page.wait("document.getElementById('explosions').checkVisibility()", False)


def test_an_outage_is_told_and_the_page_recovers(browser, tmp_path):
    with service(tmp_path / "rockets.db") as url:
        launch(url, ACTIVE)
        browser.open(f"{url}/")
        browser.wait(LISTED, [ACTIVE])
    browser.wait(PULSE, "stale")
    browser.wait("document.body.className", "stale")
    browser.evaluate("location.hash = '#type=Saturn'")
    browser.wait(text_of("notice"), "Your choice has had no answer: the list is as before.")
    browser.click("#rows tr")
    browser.wait(text_of("now-speed"), "500")
    with service(tmp_path / "rockets.db", urlsplit(url).port):
        browser.wait(PULSE, "live")
        browser.wait(LISTED, [])


def test_hostile_names_are_text_and_turn_nothing_around(page, fleet):
    hostile = ["<img src=x onerror='hurt = 1'>", "\u202eevil", "toString", "\u200b"]
    for first, name in enumerate(hostile, 4):
        launch(fleet, f"{first}{ACTIVE[1:]}", name, name)
    page.wait(f"{CELLS}.slice(3).map(row => row[1])", [*hostile[:3], "blank"])
    page.wait("document.querySelector('td img, [onerror]') ?? typeof hurt", "undefined")
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b>')")
    page.messages[:] = [said for said in page.messages if "TrustedHTML" not in said]


def test_csv_runs_no_formula_and_has_its_date_in_its_name(page, fleet):
    page.click("#as-csv")
    saved = page.saved("rockets-*.csv")
    assert re.fullmatch(r"rockets-\d{4}-\d\d-\d\dT\d{6}\.csv", saved.name)
    found = list(csv.DictReader(saved.read_text(encoding="utf-8-sig").splitlines()))
    assert [each["mission"] for each in found] == ["ARTEMIS", "", "'=1+1"]
    assert [each["speed"] for each in found] == ["2500", "", "0"]
    names = ["x;=1+1;y", "a\t @b", "a\n+1", 'x;"=1+1"', "a-b=c", "-1", -1]
    rockets = json.dumps([{"name": name} for name in names])
    text = page.evaluate(f"import('/static/export.js').then(it => it.csv({rockets}))")
    written = [row[0] for row in csv.reader(io.StringIO(text[1:], newline=""))][1:]
    safe = ["x;'=1+1;y", "a\t' @b", "a\n'+1", "x;'\"=1+1\"", "a-b=c", "'-1", "-1"]
    assert written == safe
