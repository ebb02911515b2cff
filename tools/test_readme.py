"""The README's commands do what it shows."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from test_rockets import Process

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_run_and_test_commands_are_those_of_ci():
    run, test = BLOCKS[0].splitlines()
    install = "python3 -m venv .venv && .venv/bin/pip install -qr requirements.txt"
    assert run.startswith(f"{install} && .venv/bin/python rockets.py")
    assert test.startswith(f"{install} && .venv/bin/python -m pytest -q")
    assert f"{install} && .venv/bin/python -m pytest -q" in (ROOT / ".ci/run").read_text()


def test_each_command_of_the_readme_prints_what_stands_below_it(tmp_path):
    (block,) = [block for block in BLOCKS if "curl" in block]
    expected = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
    with Process(tmp_path / "rockets.db") as process:
        script = block.replace("localhost:8088", process.url)
        printed = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True)
    assert printed.stdout.splitlines() == expected and not printed.stderr


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:tools|static)/[\w./]+)`|\((static/[\w./]+)\)", text)
    missing = [path for pair in named for path in pair if path and not (ROOT / path).exists()]
    assert named and not missing
