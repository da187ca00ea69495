"""Summaries: means in the stated order, intervals only where sequences carry them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kvscope.core.summary_records import MetricSummary
from kvscope.results.statistics import interval
from kvscope.results.stream import batches, means
from kvscope.results.summary import Means
from kvscope.results.writer import ReplayWriter
from tests.results.make import METRICS, info, make, values


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
    for run in summary.runs:
        for name in METRICS:
            mean, count = nested_mean(run.run, [9, 5], name)
            assert run.metrics[name].mean == pytest.approx(mean, abs=1e-6)
            assert run.metrics[name].count == count
            assert run.metrics[name].low is None
    assert summary.runs[0].budget_keys == (4, 2)


def test_five_sequences_have_an_interval(tmp_path: Path) -> None:
    metric = make(tmp_path / "r", [6] * 5).summary.runs[0].metrics["retained_mass"]
    assert metric.low < metric.mean < metric.high
    assert interval(np.arange(6.0)) == interval(np.arange(6.0))
    sample = np.random.default_rng(1).normal(size=400)
    low, high = interval(sample - sample.mean())
    assert low == pytest.approx(-1.96 / 20, abs=0.015)
    assert high == pytest.approx(1.96 / 20, abs=0.015)


def test_blocks_of_steps_and_the_order_of_layers_change_nothing(tmp_path: Path) -> None:
    """A head's mean is over its steps, not over the means of the blocks in which they came."""
    whole = Means(list(METRICS))
    for layer in (0, 1):
        whole.add(0, 0, layer, values(layer, 9))
    pieces = Means(list(METRICS))
    for layer, start, stop in [(1, 0, 4), (0, 0, 9), (1, 4, 5), (1, 5, 9)]:
        pieces.add(0, 0, layer, {name: array[:, start:stop] for name, array in values(layer, 9).items()})
    one, other = (means.summaries(0) for means in (whole, pieces))
    for name in METRICS:
        assert one[name].count == other[name].count == 2 * 4 * 7
        assert one[name].mean == pytest.approx(other[name].mean, abs=1e-12)


def test_the_summary_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (make(tmp_path / name, [6] * 5).path / "summary.json" for name in ("a", "b"))
    text = first.read_text()
    assert text == second.read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"


def test_a_run_without_values_has_no_mean(tmp_path: Path) -> None:
    with ReplayWriter(tmp_path / "r", info([6], policies=("full",))) as writer:
        writer.fidelity(0, 0, 0, np.arange(6), values(0, 6, empty=True))
        summary = writer.finish().summary
    assert summary.runs[0].metrics["retained_mass"] == MetricSummary(None, None, None, 0)


@pytest.mark.parametrize("rows", [1, 100, 10**6])
def test_what_is_read_back_has_the_means_that_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """However the rows lie in the file: a layer in a group of its own, or several runs in one."""
    monkeypatch.setattr("kvscope.results.writer.GROUP_ROWS", rows)
    replay = make(tmp_path / "r", [9, 5])
    found = means(replay)
    for run in replay.summary.runs:
        for name in METRICS:
            assert found.of(run.run, name, "run")[()] == pytest.approx(run.metrics[name].mean, abs=1e-12)
            assert found.of(run.run, name, "head").keys() == set(np.ndindex(2, 2, 4))
    one = means(replay, [1], ["output_error"])
    assert one.of(0, "output_error", "run") == {}
    assert one.of(1, "output_error", "layer") == found.of(1, "output_error", "layer")


def test_rows_in_any_order_have_the_same_means(tmp_path: Path) -> None:
    replay = make(tmp_path / "r", [9, 5])
    (table,) = batches(replay, "fidelity")
    shuffled = Means(list(METRICS))
    shuffled.add_table(table.take(np.random.default_rng(0).permutation(table.num_rows)), 4)
    for name in METRICS:
        assert shuffled.of(0, name, "head") == pytest.approx(means(replay).of(0, name, "head"), abs=1e-12)
