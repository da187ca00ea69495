"""Rows of attention calls, packed to be written: by a Triton kernel on a GPU, elsewhere by torch."""

from __future__ import annotations

from torch import Tensor

from kvscope.model.attention_hook import Call
from kvscope.model.call_parts import placed
from kvscope.model.kernel_rows import kernel_input, runs_kernel
from kvscope.model.packing import Packer


class PackedRows:
    """Makes and packs rows in the same order and, up to their rounding, with the same numbers on every device."""

    def __init__(self) -> None:
        self._packer = Packer()

    def of(self, call: Call, first: int, start: int, queries: range) -> dict[str, Tensor]:
        """Return ``row_sum`` ``[H, n]`` and ``weights``, float16 ``[H, total]``, of some queries of a call.

        Parameters
        ----------
        call : Call
            Of batch size one.
        first : int
            Position of its first query.
        start : int
            Index of the first query of the block.
        queries : range
            Indices of the queries whose rows are returned, up to the end of the block. The row of position ``t`` has
            ``t + 1`` weights.
        """
        if runs_kernel(call):
            return _fused(call, first, queries)
        rows = placed(call.rows(start, queries.stop)[0], call, first)[..., : first + queries.stop]
        rows = rows[:, queries.start - start :: queries.step]
        lengths = range(first + queries.start + 1, first + queries.stop + 1, queries.step)
        return {"row_sum": rows.sum(-1), "weights": self._packer.packed(rows, lengths)}


def _fused(call: Call, first: int, queries: range) -> dict[str, Tensor]:
    from kvscope.kernels.rows_triton import pack_rows  # loads triton, which only a GPU needs

    sums, weights = pack_rows(kernel_input(call, 0), first, queries.start, queries.stop, queries.step)
    return {"row_sum": sums, "weights": weights}
