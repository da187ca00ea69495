"""Rows of attention calls by the Triton kernel that makes them on a GPU, where it can; elsewhere by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvscope.kernels import triton_available
from kvscope.model.attention_hook import Call

if TYPE_CHECKING:
    from kvscope.kernels.rows_triton import RowsOf


def runs_kernel(call: Call) -> bool:
    """Return whether the kernel makes the rows of a call; it computes in 32 bit, which float64 is not meant for."""
    return call.query.is_cuda and call.exact == torch.float32 and triton_available()


def kernel_input(call: Call, entry: int) -> RowsOf:
    """Return what the kernel makes the rows of one entry of the batch of."""
    from kvscope.kernels.rows_triton import RowsOf  # loads triton, which only a GPU needs

    mask = None if call.mask is None else call.mask[min(entry, len(call.mask) - 1)]
    query, key = call.query[entry], call.key[entry]
    return RowsOf(query, key, mask, call.sinks, call.scaling, call.softcap, call.sliding_window)


def causal_rows(call: Call, start: int, stop: int) -> Tensor:
    """Return ``call.rows(start, stop, stop)`` of a call on a whole text, without a gradient, ``[R, H, b, stop]``.

    On a GPU the kernel makes them of 16-bit vectors and writes each weight once; torch writes it four times. Tensor
    cores do not multiply 32-bit vectors exactly: their rows are made by torch.
    """
    if not runs_kernel(call) or call.query.dtype != call.key.dtype or call.query.dtype == torch.float32:
        return call.rows(start, stop, stop)
    from kvscope.kernels.rows_triton import whole_rows

    runs, heads = call.query.shape[:2]
    rows = torch.empty((runs, heads, stop - start, stop), dtype=torch.float32, device=call.query.device)
    for entry, out in enumerate(rows):
        whole_rows(kernel_input(call, entry), out, start)
    return rows
