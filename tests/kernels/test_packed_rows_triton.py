"""The Triton kernel that makes and packs rows, beside torch: the same rows, up to their rounding to 16 bit.

Where there is no GPU it runs in Triton's interpreter, on shapes that are small because that is slow.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvscope.core.errors import TraceError
from kvscope.kernels import triton_available
from kvscope.model import packed_rows
from kvscope.model.attention_hook import Call
from kvscope.model.generate import trace
from kvscope.model.packed_rows import PackedRows
from kvscope.trace.reader import open_trace
from tests.kernels.compiling import require_compiles
from tests.model.tiny import saved

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A weight is rounded to 16 bit after sums in another order: half a step of the rounding, and of its smallest numbers.
RELATIVE, ABSOLUTE = 2.0**-10, 2.0**-24


def both(call: Call, first: int, start: int, wanted: range) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the packed rows of the kernel and of torch."""
    by_torch = {name: tensor.cpu() for name, tensor in _by_torch(call, first, start, wanted).items()}
    by_kernel = packed_rows._fused(call, first, wanted)
    return {name: tensor.cpu() for name, tensor in by_kernel.items()}, by_torch


def _by_torch(call: Call, first: int, start: int, wanted: range) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_rows, "runs_kernel", lambda call: False)
        return PackedRows().of(call, first, start, wanted)


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert (got["weights"].dtype, got["weights"].shape) == (torch.float16, expected["weights"].shape)
    assert (got["row_sum"].dtype, got["row_sum"].shape) == (torch.float32, expected["row_sum"].shape)
    for name, absolute in (("weights", ABSOLUTE), ("row_sum", 1e-5)):
        torch.testing.assert_close(got[name], expected[name], rtol=RELATIVE, atol=absolute, equal_nan=True)


def causal(queries: int, keys: int, window: int | None) -> Tensor:
    """Return which keys of a cache the newest queries see, bool ``[1, 1, q, k]``."""
    position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    return ((key <= position) & ((window is None) | (key > position - (window or 0))))[None, None]


@st.composite
def calls(draw: st.DrawFn) -> tuple[Call, int]:
    """Draw a call and the position of its first query."""
    groups, together, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([3, 16, 40]))
    queries = draw(st.integers(1, 20))
    earlier = draw(st.integers(0, 40))  # keys in the cache before the first query
    forgotten = draw(st.sampled_from([0, 0, 5, 21]))  # keys that are no longer in the cache
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    window = draw(st.sampled_from([None, 1, 4, 17, 100]))
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def vectors(heads: int, count: int) -> Tensor:
        wide = torch.randn(1, count, heads, 2 * size, generator=made) * draw(st.sampled_from([0.1, 1, 20]))
        return wide[..., ::2].transpose(1, 2).to(DEVICE, dtype)  # strides as views of projections have, and worse

    heads = groups * together
    kind = draw(st.sampled_from(["none", "bool", "added", "each head"]))
    mask = None
    if kind != "none":
        mask = causal(queries, earlier + queries, window).expand(1, heads if kind == "each head" else 1, -1, -1)
        if kind == "added":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        extra = draw(st.sampled_from([0, 3]))  # transformers pads masks of a static cache
        mask = torch.nn.functional.pad(mask, (0, extra), value=False).to(DEVICE)
    call = Call(
        layer=0,
        query=vectors(heads, queries),
        key=vectors(groups, earlier + queries),
        value=torch.empty(0),
        mask=mask,
        scaling=draw(st.sampled_from([0.125, 1.0])),
        softcap=draw(st.sampled_from([None, 5.0])),
        sinks=torch.randn(heads, generator=made).to(DEVICE, dtype) if draw(st.booleans()) else None,
        sliding_window=window,
    )
    return call, earlier + forgotten


@given(made=calls(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_torch(made: tuple[Call, int], data: st.DataObject) -> None:
    call, first = made
    queries = call.query.shape[2]
    start = data.draw(st.integers(0, queries - 1))
    stop = data.draw(st.integers(start + 1, queries))
    wanted = range(data.draw(st.integers(start, stop - 1)), stop, data.draw(st.sampled_from([1, 1, 2, 5])))
    equal(*both(call, first, start, wanted))


def of_sizes(heads: int, groups: int, queries: int, keys: int, size: int, **more: Any) -> Call:
    made = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, count, size, generator=made) for n, count in ((heads, queries), (groups, keys)))
    return Call(0, query.to(DEVICE), key.to(DEVICE), key.to(DEVICE), mask=None, scaling=size**-0.5, **more)


@pytest.mark.parametrize("size", [8, 64, 128, 256, 512])
def test_several_tiles_of_queries_and_keys(size: int) -> None:
    call = of_sizes(2, 1, 70, 150, size, sliding_window=65)
    equal(*both(call, 93, 0, range(70)))


def test_a_key_beyond_the_window_has_no_weight_and_one_that_is_not_cached_too() -> None:
    """Prevents numbers of memory that nobody wrote: what a query does not see is 0, not left out."""
    call = of_sizes(2, 1, 3, 6, 16, sliding_window=4)
    weights = packed_rows._fused(call, 100, range(3))["weights"].cpu()
    for head in weights:
        for query, row in enumerate(head.split([101, 102, 103])):
            assert (row[: 101 + query - 4] == 0).all() and (row[101 + query - 4 :] > 0).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter, which is NumPy
def test_a_row_that_sees_no_key_is_not_a_number_as_in_torch() -> None:
    call = replace(of_sizes(1, 1, 2, 2, 16), mask=torch.tensor([[[[True, False], [False, False]]]], device=DEVICE))
    got, expected = both(call, 0, 0, range(2))
    equal(got, expected)
    assert got["weights"][0, 1:].isnan().all() and got["weights"][0, 0] == 1


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_number_that_is_not_finite_shows_in_the_row() -> None:
    call = of_sizes(1, 1, 4, 4, 16)
    call.key[0, 0, 1, 3] = torch.nan
    equal(*both(call, 0, 0, range(4)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("mistral", "float16"),
        ("gemma2", "bfloat16"),
        ("gemma3", "float32"),
        ("gpt_oss", "bfloat16"),
    ],
)
def test_a_trace_that_the_kernel_made(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(17)))
    folder = str(saved(tmp_path / "model", name))
    options: dict[str, Any] = {"max_new_tokens": 4, "query_block": 9, "dtype": dtype, "prefill_chunk": 9}
    by_torch = trace(folder, [tmp_path / "p.txt"], output=tmp_path / "torch", **options)
    used = []
    monkeypatch.setattr(packed_rows, "runs_kernel", lambda call: used.append(call.layer) is None)
    trace(folder, [tmp_path / "p.txt"], output=tmp_path / "kernel", **options)
    by_kernel = open_trace(tmp_path / "kernel", verify=True)
    assert set(used) == {0, 1}
    for layer in (0, 1):
        rows, expected = by_kernel.attention(0, layer), by_torch.attention(0, layer)
        assert np.allclose(rows, expected, rtol=RELATIVE, atol=ABSOLUTE)
        assert np.allclose(by_kernel.row_sums(0, layer), by_torch.row_sums(0, layer), atol=1e-5)


def test_a_weight_of_the_kernel_that_is_no_number_ends_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("w1 w2 w3")
    folder, fused = str(saved(tmp_path / "model")), packed_rows._fused

    def broken(call: Call, first: int, wanted: range) -> dict[str, Tensor]:
        made = fused(call, first, wanted)
        made["weights"][1, 4] = torch.nan
        return made

    monkeypatch.setattr(packed_rows, "runs_kernel", lambda call: True)
    monkeypatch.setattr(packed_rows, "_fused", broken)
    with pytest.raises(TraceError, match="layer 0, head 1, position 2: weight nan on key 1"):
        trace(folder, [tmp_path / "p.txt"], output=tmp_path / "t", max_new_tokens=0)
    assert not (tmp_path / "t").exists()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvscope.kernels import rows_triton as own

def compiled(dtype, mask, size, sinks, capped, whole=False):
    rows, columns, depth = own._sizes(size, dtype != "fp32")
    fixed = {"MASK": mask, "HAS_SINKS": sinks, "HAS_SOFTCAP": capped, "NARROW": dtype != "fp32"}
    fixed |= {"M": rows, "N": columns, "D": depth, "WHOLE": whole}
    types = {"query": "*" + dtype, "key": "*" + dtype, "sinks": "*" + dtype, "sums": "*fp32"}
    types |= {"weights": "*fp32" if whole else "*fp16"}
    types |= {"mask": "*u8" if mask == own.BOOL else "*" + dtype, "scaling": "fp32", "softcap": "fp32"}
    names = own._make_rows.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    source = ASTSource(own._make_rows, signature, {(names.index(name),): value for name, value in fixed.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

narrow = compiled("bf16", own.NO_MASK, 128, False, False)
assert "mma" in narrow.asm["ptx"], "16-bit vectors are multiplied by tensor cores"
whole = compiled("bf16", own.NO_MASK, 128, False, False, whole=True)
for made in (narrow, whole, compiled("fp32", own.ADDED, 64, True, True), compiled("fp16", own.BOOL, 64, True, False)):
    assert made.metadata.shared <= 99 * 1024, "the shared memory of a small GPU"
    assert "st.local" not in made.asm["ptx"], "registers are enough"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for CUDA on Linux only")
def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Prevents what only the interpreter takes: numbers whose type depends on a branch, tiles that do not fit."""
    require_compiles(COMPILE, tmp_path)
