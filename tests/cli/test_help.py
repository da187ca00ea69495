"""Every command explains itself, and the documentation tells of the commands that are there."""

import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from kvscope import __version__
from kvscope.cli.app import program
from kvscope.cli.help_page import WIDEST, examples_of, takes
from kvscope.cli.panels import ALONE, PANELS
from tests.cli.conftest import Run

ROOT = Path(__file__).parent.parent.parent
COMMANDS = typer.main.get_command(program()).commands  # type: ignore[attr-defined]
GROUPS = {name: one for name, one in COMMANDS.items() if hasattr(one, "commands")}
EVERY = {name: one for name, one in COMMANDS.items() if name not in GROUPS} | {
    f"{group} {name}": one for group, of in GROUPS.items() for name, one in of.commands.items()
}
KNOWN = {*(name for names in PANELS.values() for name in names), *ALONE}


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


def test_only_the_options_of_the_typed_command_are_read() -> None:
    """To read those of all takes a seventh of the time of ``kvscope --help``; everything else is as with them."""
    typed = typer.main.get_command(program(["gate", "trace", "x.txt"])).commands  # type: ignore[attr-defined]
    assert list(typed) == list(COMMANDS)
    for name, one in typed.items():
        full = COMMANDS[name]
        assert (one.help, one.epilog, one.hidden, type(one)) == (full.help, full.epilog, full.hidden, type(full))
        if name == "gate":
            assert list(one.commands) == list(full.commands)
        elif name == "trace":
            assert [each.opts for each in one.params] == [each.opts for each in full.params]
        else:
            assert not one.params and not getattr(one, "commands", {})


@pytest.mark.parametrize("name", EVERY)
def test_help_fits_a_narrow_terminal(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No flag, choice or example is folded, the usage says once that something repeats, and flags take nothing."""
    monkeypatch.setenv("COLUMNS", "200")
    wide = run(*name.split(), "--help").out
    assert max(map(len, wide.splitlines())) <= WIDEST, "longer lines are hard to read"
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run(*name.split(), "--help").out
    assert max(map(len, narrow.splitlines())) == 80
    command = EVERY[name]
    for one in command.params:
        if one.param_type_name == "option":
            flags = re.escape(", ".join(sorted(one.opts, key=len, reverse=True)))
            expected = rf"{flags}  +\S" if one.is_flag else rf"{flags} {re.escape(takes(one))} "
            assert re.search(expected, narrow), expected
    assert "<" not in wide.replace("<=", "") or name == "import"
    usage = next(line for line in wide.splitlines() if "Usage:" in line)
    assert "...}..." not in usage and "[[" not in usage


@pytest.mark.parametrize("name", EVERY)
def test_every_command_has_two_examples_that_it_takes(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = EVERY[name]
    examples = examples_of(command)
    assert len(examples) == 2
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(*name.split(), "--help").out
    for example in examples:
        assert f" {example} " in shown, "it is on one line, to copy"
        words = shlex.split(example)
        assert words[: 1 + len(name.split())] == ["kvscope", *name.split()]
        with command.make_context(name, words[1 + len(name.split()) :], resilient_parsing=False) as context:
            assert not [word for word in context.args if word.startswith("-")], context.args


def test_every_option_has_a_panel() -> None:
    """An option in none of the panels would be in the last one, beside --help."""
    for name, command in EVERY.items():
        lacking = [one.name for one in command.params if one.param_type_name == "option" and one.name not in KNOWN]
        assert not lacking, f"{name}: add {lacking} to a panel in kvscope/cli/panels.py"
    named = [one for names in PANELS.values() for one in names]
    assert len(named) == len(set(named)), "an option is in two panels"
    used = {one.name for command in EVERY.values() for one in command.params}
    assert set(named) <= used, "a panel names an option that no command has"


def test_options_are_in_panels(run: Run) -> None:
    out = run("trace", "--help").out
    titles = re.findall(r"╭─ ([A-Z][\w ]+) ─", out)
    assert titles == ["Examples", "Arguments", "Model", "Text", "Generation", "What is stored", "Output", "Options"]
    model = out.partition("─ Model ─")[2].partition("╰")[0]
    assert "--dtype" in model and "--store" not in model


def test_help_takes_little_more_than_its_libraries() -> None:
    """Beside importing Typer and Rich: a busy machine stretches both. `benchmarks/help.py` has the seconds."""
    pairs = [(_seconds("-m", "kvscope", "--help"), _seconds("-c", "import typer, rich.table")) for _ in range(7)]
    assert statistics.median(help_ / libraries for help_, libraries in pairs) < 3


def _seconds(*arguments: str) -> float:
    """Return the processor seconds of a Python process, which may keep compiled modules for the next."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
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


def test_the_documentation_tells_of_every_command() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`kvscope (\w+)", page, re.MULTILINE)
    assert list(dict.fromkeys(listed)) == list(COMMANDS)
    described = re.findall(r"^## kvscope (\w+)", page, re.MULTILINE)
    assert described == listed
