"""The sums of the Triton kernel beside those of torch; without a GPU it runs in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kvscope.metrics.moments as module
from kvscope.kernels import triton_available
from kvscope.metrics.moments import SINKS, Moments, moments
from tests.engine.maps import KINDS, attention

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # a failing case takes minutes to shrink
@given(st.integers(0, 999), KINDS, st.integers(1, 20), st.sampled_from([1, 2, 4]), st.booleans(), st.data())
def test_the_same_sums(seed: int, kind: str, length: int, groups: int, with_other: bool, data: st.DataObject) -> None:
    from kvscope.kernels import moments_triton

    start = data.draw(st.integers(max(0, length - 4), length - 1))
    steps = torch.arange(start, length)
    rows = attention(seed, 1, 4, length, kind)[:, :, start:].to(
        data.draw(st.sampled_from([torch.float32, torch.float64]))
    )
    rows = torch.stack([rows, rows.flip(1)]) if data.draw(st.booleans()) else rows[None]
    generator = torch.Generator().manual_seed(seed)
    past = torch.arange(length) <= steps[:, None]
    mask = (torch.rand(2, 1, groups, len(steps), length, generator=generator) < 0.6) & past
    if groups == 1 and data.draw(st.booleans()):
        mask = mask.expand(-1, -1, 2, -1, -1)  # a decision for the whole layer
    other = torch.rand(data.draw(st.sampled_from([1, 2])), 1, 4, len(steps), length, generator=generator) < 0.5
    other = other & past if with_other else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "available", lambda: False)
        plain = moments(rows, mask, steps, other)
        patch.setattr(moments_triton, "KEYS", data.draw(st.sampled_from([4, 1024])))
        given_ = [None if tensor is None else tensor.to(DEVICE) for tensor in (rows, mask, other, steps)]
        sums = moments_triton.masked_sums(*given_, SINKS)
    made = Moments(*sums.cpu().unbind(-1))
    for field in dataclasses.fields(plain):
        one, two = getattr(made, field.name), getattr(plain, field.name)
        assert one.shape == (2, 1, 4, len(steps))
        assert torch.allclose(one, two.cpu(), rtol=1e-12, atol=1e-15), field.name
    assert torch.equal(made.keys, plain.keys)
