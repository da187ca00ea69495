"""Every command explains itself, and the README tells of the commands that are there."""

import re
import resource
import subprocess
import sys
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


@pytest.mark.parametrize("name", [*COMMANDS, "gate train"])
def test_help_fits_a_narrow_terminal(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list of choices is folded inside a word, and the usage says once that something repeats."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    wide = run(*name.split(), "--help").out
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    narrow = run(*name.split(), "--help").out
    assert max(map(len, narrow.splitlines())) == 80
    assert [kind for kind in re.findall(r"<\S+>", wide) if kind not in narrow] == []
    usage = next(line for line in wide.splitlines() if "Usage:" in line)
    assert "...}..." not in usage and "[[" not in usage


def test_help_answers_in_half_a_second() -> None:
    """Counted in processor time, which a busy machine stretches less than the clock on the wall."""
    assert min(_seconds("--help") for _ in range(3)) < 0.5


def _seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "kvscope", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
