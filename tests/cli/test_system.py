"""``kvscope info --system``: what this machine computes with."""

import json

import pytest
import torch

from kvscope import __version__
from kvscope.kernels import OFF, available, system
from tests.cli.conftest import Run


def test_versions_devices_and_kernels(run: Run) -> None:
    found = json.loads(run("info", "--system", "--json").out)
    assert (found["kvscope"], found["torch"]) == (__version__, torch.__version__)
    assert found["kernels on the CPU"] == "numba"
    assert found["device auto"] in ("cuda", "cpu")
    shown = run("info", "--system")
    assert shown.status == 0 and "kernels on a GPU" in shown.out and "cores" in shown.out


def test_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, "1")
    available.cache_clear()
    assert system.system()["kernels on the CPU"] == f"none, torch is used: {OFF} is set"
    monkeypatch.delenv(OFF)
    available.cache_clear()
    monkeypatch.setattr(system, "find_spec", lambda name: None)
    assert system.system()["triton"] == "not installed"


def test_a_trace_and_the_system_are_two_questions(run: Run) -> None:
    what, todo = run("info", "some", "--system").two_lines()
    assert "--system" in what and "Omit" in todo
