"""Decisions on a GPU are those on a CPU, from stored rows and from recomputed ones, and so are the metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kvscope.engine.layers import RecordedLayers
from kvscope.replay.run import replay
from kvscope.trace.reader import Trace, open_trace
from tests.trace.layers import record as record_layers
from tests.trace.test_derive import record as record_vectors

POLICIES = ["h2o", "a2sf:alpha=0.7", "tova", "vatp", "scissorhands", "streaming-llm"]
STAY = ["run", "sequence", "layer", "kv_head", "key", "enter"]


def same(trace: Trace, policies: list[str], budgets: str, prefill: str, place: Path) -> None:
    """Compare decisions exactly, and metrics up to the order of summation."""
    made = [
        replay(trace, policies, budgets, output=place / device, prefill=prefill, device=device)
        for device in ("cpu", "cuda")
    ]
    one, other = (
        pd.read_parquet(run.path / "residency.parquet").sort_values(STAY).reset_index(drop=True) for run in made
    )
    pd.testing.assert_frame_equal(one, other)
    for cpu, cuda in zip(made[0].summary.runs, made[1].summary.runs, strict=True):
        for name, value in cpu.metrics.items():
            assert cuda.metrics[name].mean == pytest.approx(value.mean, abs=1e-5, nan_ok=True)


@pytest.mark.gpu
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_the_same_keys_are_evicted(prefill: str, tmp_path: Path) -> None:
    trace = open_trace(Path(__file__).parents[2] / "traces" / "example")
    same(trace, POLICIES, "20%,40%", prefill, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("sinks", [False, True])
def test_the_same_keys_are_evicted_from_recomputed_rows(sinks: bool, tmp_path: Path) -> None:
    trace = record_vectors(tmp_path / "t", lengths=(160,), sinks=sinks)
    same(trace, ["h2o", "a2sf", "tova", "streaming-llm"], "12,40", "stream", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["maps+vectors", "qkv"])
def test_the_same_keys_are_evicted_where_layers_differ_in_their_heads(store: str, tmp_path: Path) -> None:
    same(record_layers(tmp_path / "t", store=store), ["h2o", "tova", "cake", "ada-kv"], "8,13", "full", tmp_path)


@pytest.mark.gpu
def test_rows_are_equal_on_both_devices(tmp_path: Path) -> None:
    stored = open_trace(Path(__file__).parents[2] / "traces" / "example")
    for trace, ulps in ((stored, 0), (record_vectors(tmp_path / "t"), 1)):
        sequence = trace.sequences[0]
        cpu, cuda = (RecordedLayers(trace, sequence, trace.layers, torch.device(name)) for name in ("cpu", "cuda"))
        for start in range(0, sequence.length, 7):
            stop = min(start + 7, sequence.length)
            one, other = cpu.rows(start, stop).numpy(), cuda.rows(start, stop).cpu().numpy()
            np.testing.assert_array_max_ulp(one, other, maxulp=ulps)
