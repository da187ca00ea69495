"""The heaviest keys of every row, without ranking all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def heaviest(full: Tensor, steps: Tensor, budgets: Sequence[int], skip: int = 0) -> Tensor:
    """Return where the ``B`` heaviest keys of each row are, its current key aside; of equal weights the newer is in.

    Parameters
    ----------
    full : Tensor
        Rows ``[L, H, b, n]``, or ``[R, L, H, b, n]`` where each run has its own.
    steps : Tensor
        int ``[b]``: position of each query; only older keys are asked.
    budgets : sequence of int
        ``B`` of each run.
    skip : int
        First positions that are left out.

    Returns
    -------
    Tensor
        bool ``[R, L, H, b, n]``. A row with fewer keys has them all.
    """
    key = torch.arange(full.shape[-1], device=full.device)
    others = torch.where((key < steps[:, None]) & (key >= skip), full, -1.0)
    if full.ndim == 5:
        return torch.stack([_top(rows, budget) for rows, budget in zip(others, budgets, strict=True)])
    found = {budget: _top(others, budget) for budget in dict.fromkeys(budgets)}
    return torch.stack([found[budget] for budget in budgets])


def _top(others: Tensor, budget: int) -> Tensor:
    """Return where the `budget` heaviest weights of each row are; a key that does not count has weight -1."""
    n = others.shape[-1]
    if budget >= n:
        return others >= 0
    least = _kth_largest(others, budget)[..., None]
    above = others > least
    tie = (others == least) & (least >= 0)
    room = budget - above.sum(-1, keepdim=True)
    crowded = tie.sum(-1, keepdim=True) > room
    if bool(crowded.any()):
        rows = crowded[..., 0]
        newest = tie[rows].flip(-1).to(torch.int32).cumsum(-1).flip(-1)  # how many equal ones from here on
        tie[rows] &= newest <= room[rows]
    return above | tie


def _kth_largest(rows: Tensor, k: int) -> Tensor:
    """Return the k-th largest of the last axis; NumPy's selection is several times faster than torch's on a CPU."""
    n = rows.shape[-1]
    if rows.device.type != "cpu":
        return rows.kthvalue(n - k + 1, dim=-1).values
    return torch.from_numpy(np.partition(rows.numpy(), n - k, axis=-1)[..., n - k])
