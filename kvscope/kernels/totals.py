"""Totals of rows that do not depend on the order of additions, which differs between torch, numba and Triton.

Rows in 32 bit are added in double. For rows in double no wider type is left: each weight is split into a multiple of
``2 ** -40``, whose sums are exact in any order, and a rest, whose sum is so small that its error is lost in rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT = 1.5 * 2.0**12  # adding it rounds a weight below 2 ** 11 to a multiple of 2 ** -40; subtracting it is exact


def row_totals(rows: Tensor) -> Tensor:
    """Return the sum over the last axis in float64, ``[..., 1]``."""
    if rows.dtype != torch.float64:
        return rows.sum(-1, keepdim=True, dtype=torch.float64)
    upper = (rows + SPLIT).sub_(SPLIT)
    return upper.sum(-1, keepdim=True).add_((rows - upper).sum(-1, keepdim=True))
