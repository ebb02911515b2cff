"""The dashboard in a real Chromium, on a real service."""

import csv
import json
import re
import sys
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from browser import Browser, find_chromium
from test_rockets import Process, exploded, faster, launch, slower

STATIC = ROOT / "static"
ACTIVE, AWAITING, EXPLODED = (f"{n}0000000-0000-4000-8000-000000000000" for n in (1, 2, 3))
FLEET = [
    launch(channel=ACTIVE), faster(2, 3000, channel=ACTIVE), slower(4, 1000, channel=ACTIVE),
    faster(1, 5, channel=AWAITING), exploded(2, "FUEL_LEAK", channel=EXPLODED),
    launch(channel=EXPLODED, type="Saturn", mission="=1+1", launchSpeed=0),
]
ROWS = "[...document.querySelectorAll('#rows tr')]"
CELLS = f"{ROWS}.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
LISTED = f"{ROWS}.map(row => row.dataset.channel)"
LINES = "[...document.querySelectorAll('#history tr')].map(row => row.cells[0].textContent)"


def text_of(name):
    return f"document.getElementById('{name}').textContent.trim()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no Chromium or Chrome is installed")
    with closing(Browser(tmp_path_factory.mktemp("browser"))) as browser:
        yield browser


@pytest.fixture
def service(tmp_path):
    with Process(tmp_path / "rockets.db") as service:
        for message in FLEET:
            service.request("/messages", message)
        yield service


@pytest.fixture
def page(browser, service):
    """The dashboard; what comes to the console is a failure, but for requests that fail."""
    browser.messages.clear()
    browser.call("Page.navigate", url=f"{service.url}/")
    browser.wait(LISTED, [ACTIVE, AWAITING, EXPLODED])
    yield browser
    browser.call("Page.navigate", url="about:blank")
    browser.wait("location.href", "about:blank")
    assert [said for said in browser.messages if "Failed to load resource" not in said] == []


def test_files_of_the_page_are_there_and_its_policy_lets_them_in():
    page = (STATIC / "index.html").read_text()
    assert "script-src 'self'; style-src 'self'; connect-src 'self';" in " ".join(page.split())
    assert not re.search(r"<style|\s(style|on\w+)=|<script(?![^>]*\ssrc=)", page)
    assert not re.search(r'(src|href)="(/|\w+:(?!image))', page)  # all addresses are relative
    named = re.findall(r'(?:src|href)="static/([^"]+)"', page)
    for module in STATIC.glob("*.js"):
        script = module.read_text()
        assert not re.search(r"""(fetch|get)\(["'`]/|innerHTML|\.style\b""", script), module.name
        named += re.findall(r'from "\./([^"]+)"', script)
    assert [name for name in named if not (STATIC / name).is_file()] == []


def test_totals_and_list_show_the_fleet_and_mark_what_is_in_doubt(page):
    totals = "[...document.querySelectorAll('.totals dd')].map(it => it.textContent)"
    assert page.evaluate(totals)[:6] == ["3", "1", "1", "1", "6", "1"]
    assert [row[:7] for row in page.evaluate(CELLS)] == [
        [ACTIVE, "Falcon-9", "ARTEMIS", "≈ 2,500", "Active", "4", "1"],
        [AWAITING, "unknown", "unknown", "unknown", "Awaiting launch", "1", "0"],
        [EXPLODED, "Saturn", "=1+1", "0", "Exploded: FUEL_LEAK", "2", "0"],
    ]
    assert page.evaluate(f"{CELLS}[0][7].startsWith('silent for ')")


def test_search_filter_and_sort_stand_in_the_address(page):
    page.click("#q")
    page.call("Input.insertText", text="fALC")
    page.wait(LISTED, [ACTIVE])
    page.wait("location.hash", "#q=fALC")
    page.click("#clear")
    page.click("[data-sort=speed]")
    page.wait(LISTED, [ACTIVE, EXPLODED, AWAITING])
    page.evaluate("location.hash = '#status=exploded'")
    page.wait(LISTED, [EXPLODED])
    page.evaluate("location.hash = '#sort=__proto__'")
    page.wait(f"{text_of('notice')}.startsWith('The service says: sort must be one of')")


def test_a_rocket_opens_with_its_history_and_back_leads_to_the_one_before(page):
    page.click(f"[data-channel='{ACTIVE}']")
    page.wait(LINES, ["4", "1 message not received: number 3", "2", "1"])
    said = "Speed from 500 to 2,500, at most 3,500; 1 message not received."
    page.wait(f"document.getElementById('chart').ariaLabel.startsWith('{said}')")
    page.click(f"[data-channel='{AWAITING}']")
    page.wait(text_of("now-speed"), "unknown")
    page.evaluate("history.back()")
    page.wait("document.title", "\u2068Falcon-9\u2069 10000000 – Rockets")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    page.wait("document.title", "Rockets")


def test_a_message_that_comes_is_read_alone_and_leaves_what_the_pointer_reads(page, service):
    asked = "performance.getEntriesByType('resource').map(it => it.name.split('/messages?')[1])"
    page.evaluate(f"location.hash = '#rocket={ACTIVE}'")
    page.wait(LINES, ["4", "1 message not received: number 3", "2", "1"])
    page.mouse("mouseMoved", *page.place("#chart .u-over"))
    page.wait(f"/ 2: Speed .3,000 . speed 3,500$/.test({text_of('readout')})")
    for number, asks in ((50, ["after=4"]), (3, ["after=4&before=50", "after=2&before=4"])):
        page.evaluate("performance.clearResourceTimings()")
        service.request("/messages", faster(number, channel=ACTIVE))
        page.wait(f"{LINES}.includes('{number}')")
        page.wait(f"{asked}.filter(Boolean)", asks)
        page.wait(f"/ 2: Speed .3,000 . speed 3,500$/.test({text_of('readout')})")


def test_a_rocket_that_has_not_reported_is_no_outage_and_is_shown_once_it_has(page, service):
    channel = ACTIVE.replace("1", "9", 1)
    page.evaluate(f"location.hash = '#rocket={channel}&status=exploded'")
    page.wait(text_of("detail-problem"), "No message has come on this channel yet.")
    page.wait(f"performance.getEntriesByName('{service.url}/rockets/{channel}').length > 1")
    assert page.evaluate(text_of("pulse")) == "Live"
    service.request("/messages", launch(channel=channel))
    page.wait(text_of("now-speed"), "500")


def test_a_click_opens_its_rocket_while_messages_move_the_rows(page, service):
    page.click("[data-sort=updatedAt]")
    page.wait(LISTED, [ACTIVE, EXPLODED, AWAITING])
    x, y = page.place(f"[data-channel='{AWAITING}'] .mission")
    page.mouse("mouseMoved", x, y)
    page.mouse("mousePressed", x, y)
    service.request("/messages", faster(5, channel=AWAITING))
    page.wait(f"{CELLS}[2][5]", "5")
    assert page.evaluate(LISTED) == [ACTIVE, EXPLODED, AWAITING]
    page.mouse("mouseReleased", x, y)
    page.wait("location.hash.includes('rocket=20000000')")
    page.mouse("mouseMoved", 10, 10)
    page.wait(LISTED, [AWAITING, ACTIVE, EXPLODED])


def test_an_explosion_is_told_in_a_hidden_tab_until_its_rocket_is_opened(page, service):
    other = page.call("Target.createTarget", url="about:blank")
    page.wait("document.visibilityState", "hidden")
    service.request("/messages", exploded(3, "ENGINE_FAILURE", channel=ACTIVE))
    page.wait("document.title", "✖ 1 exploded – Rockets")
    page.call("Target.closeTarget", **other)
    page.call("Page.bringToFront")
    page.wait(text_of("explosions-list"), "Falcon-9 10000000 exploded: ENGINE_FAILURE")
    page.wait(f"{text_of('announcer')}.startsWith('1 rocket exploded. ')")
    page.click("#explosions a")
    page.wait("document.title", "\u2068Falcon-9\u2069 10000000 – Rockets")
    page.wait("document.getElementById('explosions').checkVisibility()", False)


def test_an_outage_is_told_and_the_page_recovers(page, service, tmp_path):
    service.stop()
    page.wait("document.body.className", "stale")
    page.evaluate("location.hash = '#type=Saturn'")
    page.wait(text_of("notice"), "Your choice has had no answer: the list is as before.")
    page.evaluate(f"location.hash = '#rocket={ACTIVE.replace('1', '9')}'")
    page.wait(text_of("detail-problem"), "No answer about this rocket yet.")
    page.click("#rows tr")
    page.wait(text_of("now-speed"), "≈ 2,500")
    with Process(tmp_path / "rockets.db", "--port", service.url.rpartition(":")[2]):
        page.wait(text_of("pulse"), "Live")
        page.wait(LINES, ["4", "1 message not received: number 3", "2", "1"])


def test_hostile_names_are_text_and_turn_nothing_around(page, service):
    hostile = ["<img src=x onerror='hurt = 1'>", "\u202eevil", "toString", "\u200b"]
    for first, name in enumerate(hostile, 4):
        launched = launch(channel=f"{first}{ACTIVE[1:]}", type=name, mission=name)
        service.request("/messages", launched)
    page.wait(f"{CELLS}.slice(3).map(row => row[1])", [*hostile[:3], "blank"])
    page.wait("document.querySelector('td img, [onerror]') ?? typeof hurt", "undefined")


def test_csv_runs_no_formula_and_has_its_date_in_its_name(page):
    page.click("#as-csv")
    saved = page.saved("rockets-*.csv")
    assert re.fullmatch(r"rockets-\d{4}-\d\d-\d\dT\d{6}\.csv", saved.name)
    found = list(csv.DictReader(saved.read_text(encoding="utf-8-sig").splitlines()))
    assert [each["mission"] for each in found] == ["ARTEMIS", "", "'=1+1"]
    names = ["x;=1+1;y", "a\t @b", "a\n+1", 'x;"=1+1"', "a-b=c", "-1", -1]
    rockets = json.dumps([{"name": name} for name in names])
    text = page.evaluate(f"import('/static/export.js').then(it => it.csv({rockets}))")
    written = [row[0] for row in csv.reader(text[1:].splitlines(keepends=True))]
    safe = ["x;'=1+1;y", "a\t' @b", "a\n'+1", "x;'\"=1+1\"", "a-b=c", "'-1", "-1"]
    assert written == ["name", *safe]
