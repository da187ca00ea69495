"""The heaviest keys of every row: on a CPU without ranking all keys, elsewhere from one ranking for all budgets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvscope.kernels import available
from kvscope.kernels.top import top_masks


def ranks(full: Tensor, steps: Tensor) -> Tensor:
    """Return the rank of each key in its row, int64 ``[..., b, n]``: 0 for the heaviest, the current key last.

    Of equal weights the newer key comes first, as in eviction the oldest is evicted first.
    """
    n = full.shape[-1]
    key = torch.arange(n, device=full.device)
    others = torch.where(key < steps[:, None], full, -1.0)
    order = others.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, key.expand_as(order).contiguous())
    return rank.flip(-1)


def heaviest_by_rank(rank: Tensor, steps: Tensor, budget: Tensor, skip: int = 0) -> Tensor:
    """Return what `heaviest` returns, from ranks that serve every budget: one comparison for each run.

    Parameters
    ----------
    rank : Tensor
        int ``[L, H, b, n]``, or ``[R, L, H, b, n]`` where each run has its own rows: what `ranks` returns.
    steps : Tensor
        int ``[b]``: position of each query.
    budget : Tensor
        int ``[R]``: ``B`` of each run.
    skip : int
        Number of first positions that are skipped.

    Returns
    -------
    Tensor
        bool ``[R, L, H, b, n]``.
    """
    key = torch.arange(rank.shape[-1], device=rank.device)
    among = rank  # the keys that count
    for skipped in range(min(skip, len(key))):
        among = among - (rank[..., skipped, None] < rank).to(rank.dtype)
    return (among < budget[:, None, None, None, None]) & (key < steps[:, None]) & (key >= skip)


def heaviest(full: Tensor, steps: Tensor, budgets: Sequence[int], skip: int = 0) -> Tensor:
    """Return a mask of the ``B`` heaviest keys of each row but the current one; of equal weights the newer is in.

    It runs on a CPU.

    Parameters
    ----------
    full : Tensor
        Rows ``[L, H, b, n]``, or ``[R, L, H, b, n]`` where each run has its own.
    steps : Tensor
        int ``[b]``: position of each query; only older keys count.
    budgets : sequence of int
        ``B`` of each run.
    skip : int
        Number of first positions that are skipped.

    Returns
    -------
    Tensor
        bool ``[R, L, H, b, n]``. A row with fewer keys has them all.
    """
    key = torch.arange(full.shape[-1], device=full.device)
    others = torch.where((key < steps[:, None]) & (key >= skip), full, -1.0)
    if full.ndim == 5:
        return torch.cat([_tops(rows, [budget]) for rows, budget in zip(others, budgets, strict=True)])
    different = list(dict.fromkeys(budgets))
    found = _tops(others, different)
    return found if different == list(budgets) else found[[different.index(budget) for budget in budgets]]


def _tops(others: Tensor, budgets: Sequence[int]) -> Tensor:
    """Return a mask of the heaviest weights of each row, ``[R, ..., n]``; a key that does not count has weight -1."""
    least = _kth_largest(others, budgets)
    if available():
        return torch.from_numpy(top_masks(others.numpy(), least.numpy(), np.array(budgets)))
    return torch.stack([_top(others, one, budget) for one, budget in zip(least, budgets, strict=True)])


def _top(others: Tensor, least: Tensor, budget: int) -> Tensor:
    """Return a mask of the `budget` heaviest weights of each row, the smallest of which is `least`, ``[..., n]``."""
    above = others > least[..., None]
    tie = (others == least[..., None]) & (others >= 0)
    room = budget - above.sum(-1, keepdim=True)
    newest = tie.flip(-1).to(torch.int32).cumsum(-1).flip(-1)  # how many equal ones from here on
    return (above | (tie & (newest <= room))) & (others >= 0)


def _kth_largest(rows: Tensor, budgets: Sequence[int]) -> Tensor:
    """Return the k-th largest of the last axis for each budget, ``[R, ...]``, or -1 where there are fewer.

    NumPy's selection is several times faster than torch's on a CPU.
    """
    n = rows.shape[-1]
    least = torch.full((len(budgets), *rows.shape[:-1]), -1.0, dtype=rows.dtype, device=rows.device)
    inside = [(place, n - budget) for place, budget in enumerate(budgets) if budget <= n]
    if inside:
        selected = np.partition(rows.numpy(), sorted({index for _, index in inside}), axis=-1)
        for place, index in inside:
            least[place] = torch.from_numpy(selected[..., index])
    return least
