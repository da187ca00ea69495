"""The kernel's sums compared with those of its fallback."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvscope.metrics.moments as module
from kvscope.metrics.moments import moments
from tests.engine.maps import KINDS, attention


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), KINDS, st.integers(1, 24), st.sampled_from([1, 2, 4]), st.booleans(), st.data())
def test_the_same_sums(seed: int, kind: str, length: int, groups: int, with_other: bool, data: Any) -> None:
    start = data.draw(st.integers(0, length - 1))
    steps = torch.arange(start, length)
    rows = attention(seed, 2, 4, length, kind)[:, :, start:].to(torch.float32)
    if data.draw(st.booleans()):
        rows = torch.stack([rows, rows.flip(1), rows.flip(0)])
    generator = torch.Generator().manual_seed(seed)
    past = torch.arange(length) <= steps[:, None]
    mask = (torch.rand(3, 2, groups, len(steps), length, generator=generator) < 0.6) & past
    other = (torch.rand(3, 2, 4, len(steps), length, generator=generator) < 0.5) & past if with_other else None
    compiled = moments(rows, mask, steps, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "available", lambda: False)
        plain = moments(rows, mask, steps, other)
    for field in dataclasses.fields(plain):
        one, two = getattr(compiled, field.name), getattr(plain, field.name)
        assert one.shape == two.shape == (3, 2, 4, len(steps))
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-15), field.name
    assert torch.equal(compiled.keys, plain.keys)
