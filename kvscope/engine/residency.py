"""Which keys stood when: the stays of a run, from the steps at which keys left or from the sets that were read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = 2**31 - 1  # the `leave` of a key that is held to the end


@dataclass(frozen=True)
class Stays:
    """Stays of one run and layer, as they are written: key `key` of head `kv_head` from `enter` up to before `leave`.

    Each is int64 ``[N]``; `leave` is -1 where the stay lasts to the end.
    """

    kv_head: Tensor
    key: Tensor
    enter: Tensor
    leave: Tensor


def from_leave(leave: Tensor) -> Stays:
    """Return the stays of keys that enter at their position and leave once, from ``[G, T]``."""
    heads, length = leave.shape
    key = torch.arange(length, device=leave.device).expand(heads, length).reshape(-1)
    head = torch.arange(heads, device=leave.device)[:, None].expand(heads, length).reshape(-1)
    gone = leave.reshape(-1).to(torch.int64)
    return Stays(head, key, key, torch.where(gone == NEVER, -1, gone))


class ReadLog:
    """What a sparse reader read, step by step: masks of the newest steps, and every stay.

    A key that is read at steps ``a`` to ``b`` stays from ``a - 1`` (its own position, if it was just born) up to before
    ``b``: so ``V_t = {t} and what stays at t - 1``, exactly as for a cache that holds what is visible.

    Parameters
    ----------
    size : tuple of int
        ``(R, L, S, T)``.
    device : torch.device
        Where the masks live.
    """

    def __init__(self, size: tuple[int, int, int, int], device: torch.device | str) -> None:
        self._size = size
        self._since = torch.zeros(size, dtype=torch.int32, device=device)
        self._last = torch.zeros(size, dtype=torch.bool, device=device)
        self._masks: dict[int, Tensor] = {}
        self._closed: list[Tensor] = []
        self._steps = 0

    def add(self, t: int, mask: Tensor) -> None:
        """Note that step `t` read ``mask``, bool ``[R, L, S, t + 1]``."""
        n = t + 1
        before = self._last[..., :n]
        self._close(before & ~mask, t - 1)
        self._since[..., :n] = torch.where(mask & ~before, t - 1, self._since[..., :n])
        self._since[..., t] = t
        self._last[..., :n] = mask
        self._masks[t] = mask.clone()  # it may be a view of what is alive, which changes
        self._steps = n

    def forget_before(self, t: int) -> None:
        """Drop the masks of steps before `t`."""
        for step in [step for step in self._masks if step < t]:
            del self._masks[step]

    def masks(self, start: int, stop: int) -> Tensor:
        """Return what steps `start` to `stop` - 1 read, bool ``[R, L, S, stop - start, stop]``."""
        size = (*self._size[:3], stop - start, stop)
        result = torch.zeros(size, dtype=torch.bool, device=self._last.device)
        for t in range(start, stop):
            result[..., t - start, : t + 1] = self._masks[t]
        return result

    def stays(self, run: int, layer: int) -> Stays:
        """Return the stays of one run and layer."""
        open_ = self._last[run, layer].nonzero()
        since = self._since[run, layer][self._last[run, layer]].to(torch.int64)
        rows = [torch.cat([open_, since[:, None], torch.full_like(since, -1)[:, None]], dim=1)]
        if self._closed:
            closed = torch.cat(self._closed)
            rows.append(closed[(closed[:, 0] == run) & (closed[:, 1] == layer)][:, 2:])
        every = torch.cat(rows)
        every = every[(every[:, 0] * (self._size[3] + 1) + every[:, 1]).argsort(stable=True)]
        return Stays(*every.unbind(1))

    def _close(self, gone: Tensor, t: int) -> None:
        where = gone.nonzero()  # [N, 4]: run, layer, head, key
        if len(where):
            since = self._since[tuple(where.unbind(1))].to(torch.int64)
            self._closed.append(torch.cat([where, since[:, None], torch.full_like(since, t)[:, None]], dim=1))
