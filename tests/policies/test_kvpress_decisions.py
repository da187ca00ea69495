"""Decisions of kvpress for rules of others, and those of the policies on the same vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvscope.policies import compactor
from tests.policies.test_authors_decisions import simulated, waves

CASES = json.loads((Path(__file__).parents[1] / "data" / "kvpress_decisions.json").read_text())["cases"]


def sketch(_: int, size: int, columns: int) -> torch.Tensor:
    """Return the matrix that kvpress was given in place of its random numbers."""
    return waves(1, 0.3, size, columns)[0]


@pytest.mark.parametrize("case", CASES, ids=[f"{case['policy']} {case['phase']} {case['budget']}" for case in CASES])
def test_the_decisions_are_those_of_kvpress(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compactor, "sketch_of", sketch)
    held = simulated(case).held(0, case["length"])[0]
    for step, layers in case["kept"].items():
        assert [[head[int(step)].nonzero().flatten().tolist() for head in layer] for layer in held] == layers
