"""Make tensors ready to be copied to the host: rows without the numbers above the diagonal, vectors in their own type.

What is packed on the device need not be copied, and no function here waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import torch
from torch import Tensor

from kvscope.trace.columns import VectorType

VECTOR_DTYPES: Final[dict[VectorType, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
KEPT = 8  # indices of recent blocks that are kept: the layers of a step have blocks of the same shape


class Packer:
    """Packs rows of different lengths, head by head, in float16: only they are copied to the host."""

    def __init__(self) -> None:
        self._indices: OrderedDict[tuple[range, int, torch.device], Tensor] = OrderedDict()

    def packed(self, rows: Tensor, lengths: range) -> Tensor:
        """Return the first ``lengths[i]`` numbers of each row ``[heads, i]``, float16 ``[heads, sum(lengths)]``.

        Parameters
        ----------
        rows : Tensor
            ``[heads, len(lengths), >= max(lengths)]``, of any dtype.
        lengths : range
            Length of each row, ascending.
        """
        return pack_slices(rows, lengths) if rows.device.type == "cpu" else self.pack_gathered(rows, lengths)

    def pack_gathered(self, rows: Tensor, lengths: range) -> Tensor:
        """Return the same by one gather, which suits a device: few launches, and the size is known on the host."""
        key = lengths, rows.shape[-1], rows.device
        if key not in self._indices:
            self._indices[key] = _index(*key)
            if len(self._indices) > KEPT:
                self._indices.popitem(last=False)
        self._indices.move_to_end(key)
        return rows.half().flatten(1).index_select(1, self._indices[key])


def pack_slices(rows: Tensor, lengths: range) -> Tensor:
    """Return the same as `Packer.packed` by copying slices, which suits a CPU: each is contiguous."""
    packed = rows.new_empty(len(rows), sum(lengths), dtype=torch.float16)
    stop = 0
    for row, length in enumerate(lengths):
        start, stop = stop, stop + length
        packed[:, start:stop] = rows[:, row, :length]
    return packed


def _index(lengths: range, width: int, device: torch.device) -> Tensor:
    """Return the places ``row * width + column`` of the numbers to pack, in order, int64 ``[sum(lengths)]``."""
    total = sum(lengths)
    length = torch.arange(lengths.start, lengths.stop, lengths.step, device=device)
    row = torch.arange(len(lengths), device=device)
    skipped = row * width - (length.cumsum(0) - length)  # places before each row that are not packed
    return torch.arange(total, device=device) + skipped.repeat_interleave(length, output_size=total)


def copied_vectors(vectors: Tensor, kind: VectorType) -> Tensor:
    """Return a copy of vectors ``[heads, n, D]`` in this type, as it is written; a model may reuse its memory.

    bfloat16 comes as its bits, uint16, as NumPy does not have it. The copy is contiguous as ``[n, heads, D]``.
    """
    copy = vectors.transpose(0, 1).to(VECTOR_DTYPES[kind], copy=True, memory_format=torch.contiguous_format)
    return (copy.view(torch.uint16) if kind == "bfloat16" else copy).transpose(0, 1)


def fits(dtype: torch.dtype, kind: VectorType) -> bool:
    """Return whether a vector type represents every number of a dtype exactly; float32 takes float64 too."""
    return kind == "float32" or dtype == VECTOR_DTYPES[kind]
