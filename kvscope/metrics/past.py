"""Signals from earlier rows: when each key was last attended to, and how the prompt's last query ranked it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from kvscope.kernels import device as devices
from kvscope.metrics.base import NOWHERE
from kvscope.metrics.heaviest import ranks


class Past:
    """Computes the signals of `Rows` that follow from earlier rows; `add` takes every row of a sequence in order.

    Parameters
    ----------
    needs : collection of str
        Signals to compute: ``last_attended``, ``prompt_rank``; other names are ignored.
    prompt : int
        ``P``.
    """

    def __init__(self, needs: Collection[str], prompt: int) -> None:
        self._needs, self._prompt = frozenset(needs), prompt
        self._last: Tensor | None = None  # [.., L, H, n], of the step before
        self._rank: Tensor | None = None  # [.., L, H, P]

    def add(self, full: Tensor, start: int) -> dict[str, Tensor]:
        """Return the signals of a block of rows ``[.., L, H, b, n]`` whose first step is `start`."""
        made = {}
        if "last_attended" in self._needs:
            made["last_attended"] = self._last_attended(full, start)
        if "prompt_rank" in self._needs:
            made["prompt_rank"] = self._prompt_rank(full, start)
        return made

    def _last_attended(self, full: Tensor, start: int) -> Tensor:
        *lead, count, n = full.shape
        key = torch.arange(n, dtype=torch.int32, device=full.device)
        last = key.expand(*lead, n).clone()  # a key's arrival counts
        if self._last is not None:
            last[..., :start] = self._last
        if not devices.on_cpu(full.device):
            attended = last_attended(full, start, last)
            self._last = attended[..., -1, :]
            return attended[..., :-1, :]
        result = torch.empty(*lead, count, n, dtype=torch.int32, device=full.device)
        for row in range(count):
            result[..., row, :] = last
            last = torch.where(full[..., row, :] > 1 / (start + row + 1), start + row, last)
        self._last = last
        return result

    def _prompt_rank(self, full: Tensor, start: int) -> Tensor:
        count, n = full.shape[-2:]
        row = self._prompt - 1 - start
        if 0 <= row < count:
            weights = full[..., row : row + 1, : self._prompt]
            later = torch.full((1,), self._prompt, device=full.device)  # so that the query's own key is ranked too
            self._rank = ranks(weights, later)[..., 0, :]
        rank = torch.full((*full.shape[:-2], n), NOWHERE, dtype=torch.int64, device=full.device)
        if self._rank is None:
            return rank[..., None, :].expand(full.shape)
        rank[..., : self._prompt] = self._rank
        step = torch.arange(start, start + count, device=full.device)[:, None]
        return torch.where(step >= self._prompt, rank[..., None, :], NOWHERE)


def last_attended(full: Tensor, start: int, last: Tensor) -> Tensor:
    """Return the last step before each row at which each key was attended to, int32 ``[.., b + 1, n]``.

    The additional last entry is for the step after the block. The number of operations does not depend on that of the
    rows, which matters on a GPU; on a CPU a loop over them is faster.

    Parameters
    ----------
    full : Tensor
        Rows ``[.., b, n]`` of steps `start` to ``start + b - 1``.
    start : int
        First step.
    last : Tensor
        int32 ``[.., n]``: the same before the first row.
    """
    step = torch.arange(start, start + full.shape[-2], dtype=torch.int32, device=full.device)[:, None]
    least = (1 / (step + 1).to(torch.float64)).to(full.dtype)
    attended = torch.where(full > least, step, -1)
    return torch.cat([last[..., None, :], attended], dim=-2).cummax(-2).values
