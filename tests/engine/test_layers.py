"""Rows that cannot be attention are refused when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.core.errors import ReplayError
from kvscope.engine.layers import RecordedLayers
from kvscope.trace.reader import open_trace


@pytest.mark.parametrize(
    ("weight", "what"), [(-0.5, "negative weights"), (np.nan, "not numbers"), (np.inf, "not numbers")]
)
def test_impossible_weights_are_refused(weight: float, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = open_trace(Path(__file__).parents[2] / "traces" / "example")
    layers = RecordedLayers(trace, trace.sequences[0], trace.layers, torch.device("cpu"))
    whole = trace.attention

    def broken(sequence: int, layer: int, start: int, stop: int) -> np.ndarray:
        rows = whole(sequence, layer, start, stop).copy()
        rows[1, 2, 0] = weight
        return rows

    assert layers.rows(0, 8).min() >= 0
    monkeypatch.setattr(trace, "attention", broken)
    with pytest.raises(ReplayError, match=what) as caught:
        layers.rows(0, 8)
    assert str(trace.path) in caught.value.todo
