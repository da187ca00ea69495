"""Policies from other packages: found when installed, and named, not fatal, when broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1] / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the example package is installed."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(place), str(PLUGIN)], check=True)
    return os.environ | {"PYTHONPATH": str(place)}


def kvscope(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvscope", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_an_installed_policy_is_found(installed: dict[str, str]) -> None:
    done = kvscope(installed, "policies", "every-other", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"] == "Keep even positions before odd ones."


def test_a_broken_one_is_named_and_stops_nothing(installed: dict[str, str]) -> None:
    assert kvscope(installed, "--help").returncode == 0
    listed = kvscope(installed, "policies")
    assert listed.returncode == 0 and "every-other" in listed.stdout
    assert "broken-one" in listed.stderr and "no module that it needs" in listed.stderr
    asked = kvscope(installed, "policies", "broken-one")
    assert asked.returncode == 2
    assert "broken" in asked.stderr and "kvscope-example" in asked.stderr and "Traceback" not in asked.stderr
