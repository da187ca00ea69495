"""Summaries: means in the stated order, intervals only where sequences carry them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kvscope.results.summary import interval
from tests.results.make import METRICS, make, values


def nested_mean(run: int, lengths: list[int], name: str) -> tuple[float, int]:
    """Mean over steps, then heads, then layers, then sequences, with loops."""
    sequences, count = [], 0
    for sequence, length in enumerate(lengths):
        layers = []
        for layer in (0, 1):
            heads = []
            for row in values(100 * run + 10 * sequence + layer, length)[name]:
                there = [float(value) for value in row if not math.isnan(value)]
                count += len(there)
                if there:
                    heads.append(sum(there) / len(there))
            if heads:
                layers.append(sum(heads) / len(heads))
        sequences.append(sum(layers) / len(layers))
    return sum(sequences) / len(sequences), count


def test_means_equal_plain_loops(tmp_path: Path) -> None:
    summary = make(tmp_path / "r", [9, 5]).summary
    for run in summary["runs"]:
        for name in METRICS:
            mean, count = nested_mean(run["run"], [9, 5], name)
            assert run["metrics"][name]["mean"] == pytest.approx(mean, abs=1e-6)
            assert run["metrics"][name]["count"] == count
            assert run["metrics"][name]["low"] is None
    assert summary["runs"][0]["budget_keys"] == [4, 2]


def test_five_sequences_have_an_interval(tmp_path: Path) -> None:
    metric = make(tmp_path / "r", [6] * 5).summary["runs"][0]["metrics"]["retained_mass"]
    assert metric["low"] < metric["mean"] < metric["high"]
    assert interval(np.arange(6.0)) == interval(np.arange(6.0))
    sample = np.random.default_rng(1).normal(size=400)
    low, high = interval(sample - sample.mean())
    assert low == pytest.approx(-1.96 / 20, abs=0.015)
    assert high == pytest.approx(1.96 / 20, abs=0.015)


def test_a_run_without_values_has_no_mean(tmp_path: Path) -> None:
    from kvscope.results.store import ReplayWriter
    from tests.results.make import info

    with ReplayWriter(tmp_path / "r", info([6], policies=("full",))) as writer:
        writer.fidelity(0, 0, 0, np.arange(6), values(0, 6, empty=True))
        summary = writer.finish().summary
    assert summary["runs"][0]["metrics"]["retained_mass"] == {"mean": None, "low": None, "high": None, "count": 0}
    json.dumps(summary, allow_nan=False)
