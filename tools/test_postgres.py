"""The rules of tools/postgres.py, each as a test: real processes on a PostgreSQL of their own."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count, cycle, permutations
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rockets
from test_rockets import Process, exploded, faster, fill, fold, launch, nth, on, renamed, slower
from test_rockets import start_in_vain, wait_until

pytest.importorskip("psycopg_pool", reason="needs psycopg[binary,pool]")
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = pytest.mark.skipif(not BINARIES, reason="needs PostgreSQL as Debian installs it")
TOOL = Path(__file__).with_name("postgres.py")
USER = {"user": "postgres"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root
LIFE = [launch(1), faster(2, 3000), renamed(3), slower(4, 2500), exploded(5)]


@pytest.fixture(scope="module")
def run():
    """Start a server in a folder. Yield a function that runs one of PostgreSQL's programs on it."""
    with tempfile.TemporaryDirectory() as folder:
        if USER:
            shutil.chown(folder, "postgres")
        env = os.environ | {"PGDATA": f"{folder}/data", "PGHOST": folder, "PGUSER": "rockets"}
        common = {"stdout": subprocess.DEVNULL, "check": True, "cwd": folder, "env": env} | USER

        def run(program, *options):
            subprocess.run([BINARIES[-1] / program, *options], **common)

        run.folder, run.names = folder, count(1)
        by_language = ("--locale-provider=icu", "--icu-locale=en")  # how its texts sort
        run("initdb", "--no-sync", "--username=rockets", "--encoding=UTF8", *by_language)
        with open(f"{folder}/data/postgresql.conf", "a") as settings:
            settings.write(f"listen_addresses = ''\nunix_socket_directories = '{folder}'\n")
        run("pg_ctl", "start", "--log=log")
        yield run
        run("pg_ctl", "stop", "--mode=immediate")


@pytest.fixture
def pair(run):
    """Start two processes at once on a new database."""
    name = f"test{next(run.names)}"
    run("createdb", name)
    options = (f"postgresql://rockets@/{name}?host={run.folder}", "--port", "0")
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        processes = [Process(None, *options, program=(TOOL,)) for _ in range(2)]
        yield list(pool.map(stack.enter_context, processes))


def post(process, body):
    """Post a message until the answer is no 503. Return its status member."""
    ask = partial(process.request, "/messages", body)
    return wait_until(lambda: (answer := ask())[0] != 503 and answer[1]["status"])


def deliver(pair, bodies):
    """Post messages to the processes in turn, from several threads. Return the outcomes."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(post, cycle(pair), bodies))


def test_every_permutation_of_a_life_delivered_twice_ends_the_same(pair):
    for number, permutation in enumerate(permutations(LIFE)):
        delivered = [on(nth(number), body) for body in permutation]
        for body in delivered:
            assert [post(process, body) for process in pair] == ["applied", "duplicate"]
        assert pair[1].request(f"/rockets/{nth(number)}") == (200, fold(delivered))


def test_shuffled_streams_over_two_processes_agree_with_the_fold(pair):
    dice, numbers = random.Random(1), range(1, 60)
    kinds = (launch, faster, faster, slower, renamed, exploded)
    streams = [[on(nth(n), dice.choice(kinds)(each)) for each in numbers] for n in range(6)]
    bodies = sum(streams, []) * 2
    dice.shuffle(bodies)
    assert sorted(deliver(pair, bodies)) == ["applied"] * 354 + ["duplicate"] * 354
    for process in pair:
        assert process.request("/rockets")[1]["rockets"] == [fold(stream) for stream in streams]


def test_a_message_that_comes_to_both_at_once_counts_once(pair):
    bodies = [faster(1 + n // 2) for n in range(200)]
    assert sorted(deliver(pair, bodies)) == ["applied"] * 100 + ["duplicate"] * 100
    assert pair[0].request("/rockets")[1]["rockets"] == [fold(bodies)]


NAMES = ["Zeta", "alpha", "Ähre", "ähre 2", "\uffee", "\U0001d49c", 'q"\\', "%", ":q", "%(q)s"]
TIMES = ["0001-01-01T00:00:00Z", "2022-02-02T19:39:05.0019+01:00", "2022-02-02T18:39:05.003Z"]
TIMES += ["9999-12-31T23:59:59.999Z", f"2022-02-02T04:39:05.00{'2' * 200}-14:00"]
VARIED = [on(nth(n), body) for n in range(30) for body in LIFE[n % 5 :]]
VARIED += [renamed(6, name, channel=nth(n), at=TIMES[n % 5]) for n, name in enumerate(NAMES)]
VARIED += [launch(2, channel=nth(n), type=name, at=TIMES[-n % 5]) for n, name in enumerate(NAMES)]
VARIED += [launch(2, channel=nth(50), more=[1e300, 10**30, "\0", {"%s": None}])]
VARIED += [slower(10**12, 2**31 - 1, channel=nth(51))]
QUERIES = [f"sort={key}&order={order}" for key in rockets.SORT_KEYS for order in ("asc", "desc")]
QUERIES += [f"{field}={quote(name)}" for field in ("type", "mission", "q") for name in NAMES]
QUERIES += [f"status={status}&limit=2&offset=1" for status in rockets.STATUSES]
QUERIES += ["q=", "q=%C3%84HRE", "q=-00000000001", f"offset={2**53 - 1}", "sort=x"]
PATHS = ["/fleet", "/health", f"/rockets/{nth(51)}", f"/rockets/{nth(50)}/messages"]
PATHS += [f"/rockets/{nth(1)}/messages?order=desc&limit=2", *(f"/rockets?{q}" for q in QUERIES)]


def test_every_sort_key_and_filter_has_the_same_answer_as_on_sqlite(pair, tmp_path):
    fill(tmp_path / "rockets.db", VARIED)
    assert {post(pair[0], body) for body in VARIED} == {"applied", "duplicate"}
    with Process(tmp_path / "rockets.db") as sqlite:
        for path in PATHS:
            assert (path, pair[1].request(path)) == (path, sqlite.request(path))
    assert pair[1].request("/rockets?type=%00")[0] == 400  # no text of PostgreSQL has a NUL


def test_a_database_that_is_away_is_a_503_and_nothing_is_lost(pair, run):
    bodies = [faster(number) for number in range(1, 401)]
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(deliver, pair, bodies)
        wait_until(lambda: pair[0].request("/health")[1]["messages"] > 50)
        run("pg_ctl", "stop", "--mode=immediate")
        assert [pair[1].request(path)[0] for path in ("/rockets", "/health")] == [503, 503]
        run("pg_ctl", "start", "--log=log")
        sent.result()
    for process in pair:
        assert wait_until(lambda ask=process.request: ask("/health")[0] == 200)
        assert process.request("/rockets")[1]["rockets"] == [fold(bodies)]


def test_an_etag_holds_at_both_processes_until_a_message_is_stored(pair):
    tag = urlopen(f"{pair[0].url}/fleet").headers["ETag"]
    asked = [Request(f"{each.url}/fleet", headers={"If-None-Match": tag}) for each in pair]
    for each in asked:
        with pytest.raises(HTTPError, match="304"):
            urlopen(each)
    post(pair[0], launch())
    assert [urlopen(each).status for each in asked] == [200, 200]
    assert [process.stop() for process in pair] == [0, 0]


@pytest.mark.parametrize("address", ["nowhere", "postgresql://localhost:1/none"])
def test_an_address_without_a_database_is_one_line(address):
    start_in_vain(None, address, "--port", "0", program=(TOOL,))
