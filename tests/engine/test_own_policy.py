"""Faults of a policy from a user's file end in two lines with their place, and never in a replay without results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import indent

import pytest

from kvscope.cli.app import run
from tests.trace.make import record

HEAD = """
import sys
from dataclasses import dataclass
import numpy, torch
from kvscope import Policy
from kvscope.policies.base import Protection, Recurrence

@dataclass(frozen=True)
class Own(Policy):
    "Retain something. More."
"""
FAULTS = {
    "raise ValueError('my bug')": ":11: ValueError: my bug",
    "return self.observe(step, score)": ":11: RecursionError",
    "sys.exit(0)": ":11: sys.exit was called",
    "return None": ":10: observe returned nothing",
    "return numpy.zeros(3)": ":10: observe returned a ndarray",
    "return score[..., :1].sum()": ":10: observe returned the shape ()",
    "return score[..., :2].repeat(1, 1, 1, 2)": ":10: observe returned the shape",
    "return score.bool()": ":10: observe returned torch.bool",
    "return score[None].expand(2, *score.shape)": ":10: observe returned the shape",
}


READS = {
    "return None": ":11: read returned nothing",
    "return step.visible[..., :2]": ":11: read returned the shape",
    "return step.visible.float()": ":11: read returned torch.float32",
    "raise ValueError('my bug')": ":12: ValueError: my bug",
}
OTHERS = {
    "def protect(self, budget): return None": ":10: protect returned nothing",
    "def protect(self, budget): 1 / 0": ":10: ZeroDivisionError",
    "def fit(self, layers, kv_heads, n_layers): sys.exit(0)": ":10: sys.exit was called",
    "def recurrence(self): raise KeyError('x')": ":10: KeyError",
    "def recurrence(self): return Recurrence('none', fixed=lambda keys: 1 / 0)": ":10: ZeroDivisionError",
    "def recurrence(self): return Recurrence('none', fixed=lambda keys: None)": ":10: recurrence returned nothing",
    "def recurrence(self): return Recurrence('none', fixed=lambda keys: keys.positions[1:])": ":10: recurrence",
}


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Replay with a policy of which this is the body, and return the end of what is said of its file."""
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "traces" / "t", lengths=[12])
    file = tmp_path / "own.py"

    def run_with(body: str) -> str:
        file.write_text(f"{HEAD}{indent(body, '    ')}\n".lstrip("\n"))
        assert run(["replay", "t", "-p", f"{file}:Own", "--budget", "4", "-q"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert not list((tmp_path / "reports").glob("*")), "what was written is removed"
        what, _, place = lines[0].partition(str(file))
        assert what == "error: your policy "
        return place

    return run_with


@pytest.mark.parametrize("body", FAULTS)
def test_a_fault_of_observe_is_named_with_its_place(body: str, fault: Callable[[str], str]) -> None:
    assert fault(f"def observe(self, step, score):\n    {body}").startswith(FAULTS[body])


@pytest.mark.parametrize("body", READS)
def test_a_fault_of_read_is_named_with_its_place(body: str, fault: Callable[[str], str]) -> None:
    made = f"reads = True\ndef read(self, step):\n    {body}\ndef observe(self, step, score):\n    return score"
    assert fault(made).startswith(READS[body])


@pytest.mark.parametrize("body", OTHERS)
def test_a_fault_of_any_other_method_is_named_with_its_place(body: str, fault: Callable[[str], str]) -> None:
    observe = "\ndef observe(self, step, score):\n    return score"
    assert fault(body + observe).startswith(OTHERS[body])


def test_a_policy_that_never_evicts_is_called_too(fault: Callable[[str], str]) -> None:
    body = "phase = 'none'\nbounded = False\ndef observe(self, step, score):\n    return None"
    assert fault(body).startswith(":12: observe returned nothing")
