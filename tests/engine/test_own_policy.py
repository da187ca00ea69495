"""Faults of a policy from a user's file end in two lines with their place, and never in a replay without results."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvscope.cli.app import run
from kvscope.core.errors import ReplayError
from kvscope.policies.spec import parse_policy
from tests.trace.make import record

HEAD = """
import sys
from dataclasses import dataclass
import numpy, torch
from kvscope import Policy
from kvscope.policies.base import Protection

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


@pytest.mark.parametrize("body", FAULTS)
def test_a_fault_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "traces" / "t", lengths=[12])
    (tmp_path / "own.py").write_text(f"{HEAD}    def observe(self, step, score):\n        {body}\n".lstrip("\n"))
    assert run(["replay", "t", "-p", f"{tmp_path / 'own.py'}:Own", "--budget", "4", "-q"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"error: your policy {tmp_path / 'own.py'}{FAULTS[body]}")
    assert not list((tmp_path / "reports").glob("*")), "what was written is removed"


@pytest.mark.parametrize(
    ("body", "expected"),
    {"return None": ":10: protect returned nothing", "1 / 0": ":11: ZeroDivisionError"}.items(),
)
def test_protection_is_checked_too(tmp_path: Path, body: str, expected: str) -> None:
    from kvscope.policies.own import protection_of

    (tmp_path / "own.py").write_text(f"{HEAD}    def protect(self, budget):\n        {body}\n".lstrip("\n"))
    with pytest.raises(ReplayError, match="your policy") as caught:
        protection_of(parse_policy(f"{tmp_path / 'own.py'}:Own"), 4)
    assert expected in caught.value.what
