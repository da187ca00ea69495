"""Every command explains itself, and the README tells of the commands that are there."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from kvscope import __version__
from kvscope.cli.app import app
from tests.cli.conftest import Run

ROOT = Path(__file__).parent.parent.parent
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, run: Run) -> None:
    done = run(name, "--help")
    assert done.status == 0
    for parameter in COMMANDS[name].params:
        if parameter.name == "ctx":
            continue
        if parameter.param_type_name == "option":
            assert max(parameter.opts, key=len) in done.out
            assert parameter.help, f"{name} {parameter.opts} has no help"
    assert len(COMMANDS[name].help) > 40


def test_help_answers_in_half_a_second() -> None:
    best = min(_seconds("--help") for _ in range(5))
    assert best < 0.5


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvscope", *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.status, done.out) == (0, f"kvscope {__version__}\n")


def test_no_command_shows_the_help(run: Run) -> None:
    done = run()
    assert done.status == 2
    assert "Commands" in done.out
    assert "error" not in done.err


def test_readme_tells_of_every_command() -> None:
    listed = re.findall(r"^\| `kvscope (\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed == list(COMMANDS)
