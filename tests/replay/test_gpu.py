"""Decisions on a GPU are those on a CPU."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from kvscope.replay.run import replay
from kvscope.trace.reader import open_trace

POLICIES = ["h2o", "a2sf:alpha=0.7", "tova", "vatp", "scissorhands", "streaming-llm"]
STAY = ["run", "sequence", "layer", "kv_head", "key", "enter"]


@pytest.mark.gpu
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_the_same_keys_are_evicted(prefill: str, tmp_path: Path) -> None:
    trace = open_trace(Path(__file__).parents[2] / "traces" / "example")
    made = [
        replay(trace, POLICIES, "20%,40%", output=tmp_path / device, prefill=prefill, device=device)  # type: ignore[arg-type]
        for device in ("cpu", "cuda")
    ]
    one, other = (
        pd.read_parquet(run.path / "residency.parquet").sort_values(STAY).reset_index(drop=True) for run in made
    )
    pd.testing.assert_frame_equal(one, other)
    for cpu, cuda in zip(made[0].summary.runs, made[1].summary.runs, strict=True):
        for name, value in cpu.metrics.items():
            assert cuda.metrics[name].mean == pytest.approx(value.mean, abs=1e-5, nan_ok=True)
