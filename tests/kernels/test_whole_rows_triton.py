"""Whole rows of the closed loop by the Triton kernel, beside torch; without a GPU it runs in Triton's interpreter."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvscope.closed_loop.compile import evaluate
from kvscope.kernels import triton_available
from kvscope.model import kernel_rows
from kvscope.model.attention_hook import Call
from kvscope.model.kernel_rows import causal_rows, runs_kernel
from tests.closed_loop.test_closed_loop import Kept, passage, runs
from tests.model.tiny import build

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draw a call of a batch on a whole text."""
    runs, groups, together = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length, size = draw(st.integers(1, 40)), draw(st.sampled_from([3, 16, 40]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    window = draw(st.sampled_from([None, 1, 4, 17, 100]))
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def vectors(heads: int) -> Tensor:
        wide = torch.randn(runs, length, heads, 2 * size, generator=made) * draw(st.sampled_from([0.1, 1, 20]))
        return wide[..., ::2].transpose(1, 2).to(DEVICE, dtype)

    heads, mask = groups * together, None
    if draw(st.booleans()):
        position, key = torch.arange(length)[:, None], torch.arange(length)
        seen = (key <= position) & ((window is None) | (key > position - (window or 0)))
        mask = seen.expand(draw(st.sampled_from([1, runs])), draw(st.sampled_from([1, heads])), -1, -1).to(DEVICE)
        if draw(st.booleans()):
            mask = torch.zeros(mask.shape, dtype=dtype, device=DEVICE).masked_fill(~mask, -torch.inf)
    return Call(
        layer=0,
        query=vectors(heads),
        key=vectors(groups),
        value=torch.empty(0),
        mask=mask,
        scaling=0.25,
        softcap=draw(st.sampled_from([None, 5.0])),
        sinks=torch.randn(heads, generator=made).to(DEVICE, dtype) if draw(st.booleans()) else None,
        sliding_window=window,
    )


@given(call=calls(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_torch(call: Call, data: st.DataObject) -> None:
    length = call.query.shape[2]
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_rows, "runs_kernel", lambda call: True)
        got = causal_rows(call, start, stop)
    expected = call.rows(start, stop, stop)
    assert (got.dtype, got.shape) == (torch.float32, expected.shape)
    # logits are up to some hundred, and sums in another order change their last digits
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-7)
    assert (got[call.logits(start, stop, stop) == -torch.inf] == 0).all()


def test_several_tiles_of_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers are written, those above the diagonal and before the window too."""
    monkeypatch.setattr(kernel_rows, "runs_kernel", lambda call: True)
    monkeypatch.setattr(torch, "empty", lambda size, **how: torch.full(size, torch.nan, **how))
    made = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 200, 16, generator=made).to(DEVICE, torch.float16) for heads in (2, 1))
    for window in (None, 65):
        call = Call(0, query, key, key, mask=None, scaling=0.25, sliding_window=window)
        for start, stop in ((0, 200), (70, 150)):
            got = causal_rows(call, start, stop)
            torch.testing.assert_close(got, call.rows(start, stop, stop), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_closed_loop_over_rows_of_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = build(name).half().to(DEVICE), runs(("h2o", "6"), ("h2o", "9"), ("tova", "6"))
    by_torch, by_kernel, called = Kept(), Kept(), list[int]()
    evaluate(model, [passage()], chosen, [], "stream", by_torch)
    monkeypatch.setattr(kernel_rows, "runs_kernel", lambda call: called.append(call.layer) is None)
    evaluate(model, [passage()], chosen, [], "stream", by_kernel)
    assert set(called) == {0, 1}
    for run, values in by_torch.losses.items():
        assert np.abs(values["nll_policy"] - by_kernel.losses[run]["nll_policy"]).max() < 2e-3  # numbers of 16 bit
        assert values["nll_policy"].tolist() != values["nll_full"].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_vectors_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvscope.kernels import rows_triton

    monkeypatch.setattr(kernel_rows, "runs_kernel", lambda call: call.exact == torch.float32)
    monkeypatch.setattr(rows_triton, "whole_rows", lambda *_: pytest.fail("the kernel was called"))
    vectors = torch.randn(1, 2, 5, 16, dtype=dtype)
    call = Call(0, vectors, vectors, vectors, mask=None, scaling=0.25)
    assert torch.equal(causal_rows(call, 0, 5), call.rows(0, 5, 5))


@pytest.mark.parametrize(
    ("cuda", "exact", "triton", "expected"),
    [
        (True, torch.float32, True, True),
        (True, torch.float64, True, False),
        (True, torch.float32, False, False),
        (False, torch.float32, True, False),
    ],
)
def test_which_calls_the_kernel_takes(
    cuda: bool, exact: torch.dtype, triton: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_rows, "triton_available", lambda: triton)
    call: Any = SimpleNamespace(query=SimpleNamespace(is_cuda=cuda), exact=exact)
    assert runs_kernel(call) is expected
