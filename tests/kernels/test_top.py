"""The kernel's masks of the largest weights compared with those of its fallback."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvscope.metrics.heaviest as module
from tests.engine.maps import KINDS, attention


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 999),
    KINDS,
    st.integers(1, 20),
    st.lists(st.integers(1, 24), min_size=1, max_size=4),
    st.sampled_from([0, 4]),
    st.booleans(),
)
def test_the_same_masks(seed: int, kind: str, length: int, budgets: list[int], skip: int, own: bool) -> None:
    rows = attention(seed, 1, 3, length, kind).float()
    rows = torch.stack([rows, rows.flip(1), rows, rows][: len(budgets)]) if own else rows
    compiled = module.heaviest(rows, torch.arange(length), budgets, skip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "available", lambda: False)
        plain = module.heaviest(rows, torch.arange(length), budgets, skip)
    assert torch.equal(compiled, plain)
    assert int(compiled.sum(-1).amax()) <= max(budgets)
