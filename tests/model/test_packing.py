"""Rows are packed the same by slices and by a gather, and vectors are copied in their own type."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvscope.model.packing import KEPT, Packer, copied_vectors, fits, pack_slices


def plain(rows: torch.Tensor, lengths: range) -> list[list[float]]:
    """Return the packed numbers of each head in plain loops."""
    halves = rows.half()
    return [
        [halves[head, row, column].item() for row, length in enumerate(lengths) for column in range(length)]
        for head in range(len(rows))
    ]


@given(
    heads=st.integers(1, 3),
    first=st.integers(0, 5),
    count=st.integers(1, 7),
    step=st.integers(1, 3),
    more=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_packed_rows_are_those_of_a_plain_loop(
    heads: int, first: int, count: int, step: int, more: int, dtype: torch.dtype
) -> None:
    lengths = range(first, first + step * count, step)
    width = lengths[-1] + more
    rows = torch.randn(heads, count, width, dtype=dtype)
    for packed in (pack_slices(rows, lengths), Packer().pack_gathered(rows, lengths), Packer().packed(rows, lengths)):
        assert (packed.dtype, packed.shape) == (torch.float16, (heads, sum(lengths)))
        assert packed.tolist() == plain(rows, lengths)


def test_rows_that_are_a_view_of_others() -> None:
    rows = torch.randn(2, 9, 12)[:, 2::3, :8]
    lengths = range(2, 8, 3)
    rows = rows[:, : len(lengths)]
    assert Packer().pack_gathered(rows, lengths).tolist() == pack_slices(rows, lengths).tolist() == plain(rows, lengths)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_index_is_made_once_for_the_blocks_of_a_step_and_none_for_ever() -> None:
    packer = Packer()
    for _ in range(3):
        with Operations() as made:
            packer.pack_gathered(torch.randn(2, 4, 10), range(7, 11))
    assert "arange" not in made.names
    assert made.names.count("index_select") == 1
    for width in range(20, 20 + 2 * KEPT):
        packer.pack_gathered(torch.randn(2, 4, width), range(7, 11))
    assert len(packer._indices) == KEPT


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_vectors_are_copied_bit_for_bit_and_are_no_views(kind: str) -> None:
    dtype = getattr(torch, kind)
    cache = torch.randn(1, 2, 9, 4).to(dtype)
    own = cache[0, :, -5:][:, 1:4]
    before = own.clone()
    copy = copied_vectors(own, kind)
    cache.zero_()
    assert copy.dtype == (torch.uint16 if kind == "bfloat16" else dtype)
    assert torch.equal(copy.view(dtype), before)
    assert copy.transpose(0, 1).is_contiguous(), "the order of the file"


def test_what_fits() -> None:
    assert fits(torch.bfloat16, "bfloat16") and fits(torch.float16, "float16") and fits(torch.bfloat16, "float32")
    assert not fits(torch.float32, "bfloat16") and not fits(torch.bfloat16, "float16")


@pytest.mark.gpu
def test_a_device_packs_the_same() -> None:
    rows, lengths = torch.randn(3, 40, 70), range(25, 65)
    packed = Packer().packed(rows.cuda(), lengths)
    assert packed.is_cuda
    assert torch.equal(packed.cpu(), pack_slices(rows, lengths))
