"""Merging gives the keys and values that the authors' code gave for the same vectors, rows and evictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvscope.core.merge_scheme import parse_merge
from kvscope.engine.draw import draws
from kvscope.merging.layer import MergingLayer

CASES = json.loads((Path(__file__).parents[1] / "data" / "merging_decisions.json").read_text())["cases"]


def vectors(kind: str, phase: float, heads: int, length: int, size: int) -> Tensor:
    """Return vectors ``[heads, length, size]`` by one of the formulas that the file of cases gives."""
    head, place, channel = (torch.arange(many, dtype=torch.float64) for many in (heads, length, size))
    head, place, channel = head[:, None, None], place[:, None], channel + 1
    if kind == "waves":
        return 1.5 * torch.sin(phase + 2.3 * head + 0.71 * (place + 1) * channel + 0.13 * place**2)
    return 1.5 * torch.sin(phase + 2.3 * head + 0.37 * channel + 0.19 * place + 0.05 * torch.sin(1.7 * place * channel))


def merged(case: dict[str, Any]) -> tuple[dict[str, list[Tensor]], Tensor, Tensor, MergingLayer]:
    """Return the sums at the steps of a case, the last keys and values, and the layer."""
    heads, length, phase = case["heads"], case["length"], case["phase"]
    scheme = parse_merge(case["rule"])
    assert scheme is not None
    key, value = (vectors(case["vectors"], phase + part, heads, length, case["size"])[None] for part in (0.5, 1))
    logits = vectors("waves", phase, heads, length, 16) @ vectors("waves", phase + 0.5, heads, length, 16).flip(1).mT
    drawn = draws(scheme.seed, 0, torch.tensor([0]), heads, torch.arange(length))[0]
    layer = MergingLayer(scheme, drawn, 1, torch.float64, torch.float64)
    held, found = torch.ones(length, dtype=torch.bool), {name: list[Tensor]() for name in case["sums"]}
    for t in range(length):
        n = t + 1
        layer.observe(torch.softmax(logits[:, t, :n].masked_fill(~held[:n], -torch.inf), -1)[None])
        evicted = torch.zeros(n, dtype=torch.bool)
        evicted[case["evicted"].get(str(t), [])] = True
        held[:n] &= ~evicted
        if evicted.any():
            masks = (mask.expand(1, heads, n) for mask in (torch.arange(n), evicted, held[:n]))
            layer.merge(key[:, :, :n], value[:, :, :n], *masks)
        for name, sums in case["sums"].items():
            if str(t) in sums:
                found[name].append({"key": key, "value": value}[name][0, :, :n][:, held[:n]].sum(-1))
    return found, key, value, layer


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['source'].split('@')[0]}-{case['phase']}")
def test_sums_are_those_of_the_authors_code(case: dict[str, Any]) -> None:
    found, *_ = merged(case)
    for name, sums in case["sums"].items():
        for made, expected in zip(found[name], sums.values(), strict=True):
            torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['source'].split('@')[0]}-{case['phase']}")
def test_the_cases_merge_and_discard(case: dict[str, Any]) -> None:
    """Guards the test above: what the code discards changes nothing there, so a case must have both."""
    every = {**case, "rule": "d2o(beta=1)" if case["rule"].startswith("d2o") else "cam(seed=77)"}
    found, *_ = merged(case)
    other, *_ = merged(every)
    assert any(not torch.equal(one, two) for one, two in zip(found["value"], other["value"], strict=True))
    plain = vectors(case["vectors"], case["phase"] + 1, case["heads"], case["length"], case["size"])
    assert not torch.isin(found["value"][-1], plain.sum(-1)).all()
