"""Policies from other packages: found when installed, and named, not fatal, when broken."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.forks import Forks

PLUGIN = Path(__file__).parents[1] / "plugin"


Kvscope = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def kvscope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kvscope]:
    """The command line of an interpreter in which the example package is installed."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(place), str(PLUGIN)], check=True)
    code = f"import sys; sys.path.insert(0, {str(place)!r}); from kvscope.__main__ import main; main()"
    with Forks("torch", "typer", "rich.table") as forks:
        yield partial(forks.run, code)


def test_an_installed_policy_is_found(kvscope: Kvscope) -> None:
    done = kvscope("policies", "every-other", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"] == "Keep even positions before odd ones."


def test_a_broken_one_is_named_and_stops_nothing(kvscope: Kvscope) -> None:
    assert kvscope("--help").returncode == 0
    listed = kvscope("policies")
    assert listed.returncode == 0 and "every-other" in listed.stdout
    assert "broken-one" in listed.stderr and "no module that it needs" in listed.stderr
    asked = kvscope("policies", "broken-one")
    assert asked.returncode == 2
    assert "broken" in asked.stderr and "kvscope-example" in asked.stderr and "Traceback" not in asked.stderr
