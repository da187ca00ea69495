"""The path of a GPU, taken on a CPU: the same decisions and metrics, few copies, and nothing waits for the device."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kvscope.core.errors import TraceError
from kvscope.engine import read_ahead
from kvscope.engine.rows import Block
from kvscope.kernels import device as devices
from kvscope.replay.layer_group import LayerGroup
from kvscope.replay.reading import BlockReader, GroupSpec
from kvscope.replay.run import replay
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace, open_trace
from tests.trace.test_derive import record as record_vectors

POLICIES = ["h2o", "a2sf", "tova", "window", "belady", "random"]
ORDER = ["run", "sequence", "layer", "head", "kv_head", "step", "key", "enter"]


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(Path(__file__).parents[2] / "traces" / "example")


def tables(made: Replay) -> list[pd.DataFrame]:
    frames = [pd.read_parquet(made.path / file) for file in ("residency.parquet", "fidelity.parquet")]
    return [frame.sort_values([name for name in ORDER if name in frame]).reset_index(drop=True) for frame in frames]


def same(one: Replay, other: Replay) -> None:
    """Compare decisions exactly, and metrics up to the order of summation."""
    (stays, metrics), (other_stays, other_metrics) = tables(one), tables(other)
    pd.testing.assert_frame_equal(stays, other_stays, check_exact=True)
    pd.testing.assert_frame_equal(metrics, other_metrics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 2**28])
def test_a_trace_of_rows(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    one = replay(example, POLICIES, "20%,40%", output=tmp_path / "cpu")
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    monkeypatch.setattr(read_ahead, "LIMIT_BYTES", limit)
    same(one, replay(example, POLICIES, "20%,40%", output=tmp_path / "device"))


@pytest.mark.parametrize("sinks", [False, True])
def test_a_trace_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinks: bool) -> None:
    trace = record_vectors(tmp_path / "t", sinks=sinks)
    one = replay(trace, POLICIES, "3,6", output=tmp_path / "cpu")
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    same(one, replay(trace, POLICIES, "3,6", output=tmp_path / "device"))


def test_a_group_can_be_read_again(example: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    sequence = example.sequences[0]
    groups = [GroupSpec(sequence, [layer], sequence.length // 3) for layer in example.layers[:3]]
    whole = [example.attention(0, layer) for layer in example.layers[:3]]
    with BlockReader(example, groups, torch.device("cpu")) as reader:
        next(reader.blocks(0))  # as if memory did not suffice for the rest
        for number in (0, 0, 1, 1, 2):
            for block in reader.blocks(number):
                rows = block.place().rows[0].numpy()
                assert np.array_equal(rows, whole[number][:, block.start : block.stop, : block.stop])


def test_fewer_runs_at_a_time_give_the_same(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory does not suffice for all runs, the rows of a group are read again."""
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    one = replay(example, POLICIES, "20%,40%", output=tmp_path / "all")
    score = LayerGroup.score

    def short(self: LayerGroup, block: Block) -> None:
        if sum(len(each.runs) for each in self.plan_runs) > 4 and block.start:
            raise MemoryError
        score(self, block)

    monkeypatch.setattr(LayerGroup, "score", short)
    same(one, replay(example, POLICIES, "20%,40%", output=tmp_path / "parts"))


def test_errors_of_the_reader_reach_the_caller(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = example.stored_rows

    def broken(sequence: int, layer: int, start: int, stop: int) -> object:
        if start:
            raise TraceError("it is damaged", "Record it again.")
        return whole(sequence, layer, start, stop)

    monkeypatch.setattr(example, "stored_rows", broken)
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    with pytest.raises(TraceError, match="it is damaged"):
        replay(example, ["h2o"], "20%", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvscope-read")]
