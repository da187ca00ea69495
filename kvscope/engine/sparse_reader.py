"""Sparse readers: policies that hold every key and read only some of them at each step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.cache_state import CacheState
from kvscope.policies.base import Policy, Step
from kvscope.policies.own import read_of


class SparseReader:
    """Restricts each step to the keys that the policy reads, and records them.

    Parameters
    ----------
    policy : Policy
        A policy with the trait ``reads``.
    state : CacheState
        Its `evictions` are increased by the number of keys that are not read.
    first_eviction : int
        Last step at which all keys are read.
    """

    def __init__(self, policy: Policy, state: CacheState, first_eviction: int) -> None:
        self._read, self._state, self._first_eviction = read_of(policy), state, first_eviction
        self.log = ReadLog(state.alive.shape, state.alive.device)

    def read(self, step: Step) -> Step:
        """Return the step with only the keys visible that the policy reads."""
        if step.t > self._first_eviction:
            step = replace(step, visible=self._read(step) & step.visible)
        alive = self._state.alive[..., : step.t + 1]
        self.log.add(step.t, step.visible.expand(alive.shape))
        self._state.evictions += (alive & ~step.visible).sum(-1)
        return step


class ReadLog:
    """The keys that a sparse reader read: masks of recent steps, and residency intervals of all steps.

    A key that is read at steps ``a`` to ``b`` gets the interval that enters at ``a - 1`` (at ``a`` if the key was
    appended at that step) and leaves at ``b - 1``. So ``V_t`` is key ``t`` plus the keys held after step ``t - 1``, as
    for a cache that holds exactly the visible keys.

    Parameters
    ----------
    size : torch.Size
        ``(R, L, S, T)``.
    device : torch.device
        Device of the masks.
    """

    def __init__(self, size: torch.Size, device: torch.device) -> None:
        self._size = size
        self._since = torch.zeros(size, dtype=torch.int32, device=device)
        self._last = torch.zeros(size, dtype=torch.bool, device=device)
        self._masks: dict[int, Tensor] = {}
        self._closed: list[Tensor] = []

    def add(self, t: int, mask: Tensor) -> None:
        """Record that step `t` read `mask`, bool ``[R, L, S, t + 1]``."""
        n = t + 1
        before = self._last[..., :n]
        self._close(before & ~mask, t - 1)
        self._since[..., :n] = torch.where(mask & ~before, t - 1, self._since[..., :n])
        self._since[..., t] = t
        self._last[..., :n] = mask
        self._masks[t] = mask.clone()  # the mask may be a view of CacheState.alive, which changes later

    def forget_before(self, t: int) -> None:
        """Drop the masks of steps before `t`."""
        for step in [step for step in self._masks if step < t]:
            del self._masks[step]

    def masks(self, start: int, stop: int) -> Tensor:
        """Return the keys that steps `start` to `stop` - 1 read, bool ``[R, L, S, stop - start, stop]``."""
        size = (*self._size[:3], stop - start, stop)
        result = torch.zeros(size, dtype=torch.bool, device=self._last.device)
        for t in range(start, stop):
            result[..., t - start, : t + 1] = self._masks[t]
        return result

    def residency(self, run: int, layer: int, kv_heads: int) -> ResidencyIntervals:
        """Return the intervals of one run and layer, repeated for every key/value head if the layer decides as one."""
        open_ = self._last[run, layer].nonzero()
        since = self._since[run, layer][self._last[run, layer]].to(torch.int64)
        rows = [torch.cat([open_, since[:, None], torch.full_like(since, -1)[:, None]], dim=1)]
        if self._closed:
            closed = torch.cat(self._closed)
            rows.append(closed[(closed[:, 0] == run) & (closed[:, 1] == layer)][:, 2:])
        every = torch.cat(rows)
        every = every[(every[:, 0] * (self._size[3] + 1) + every[:, 1]).argsort(stable=True)]
        head, key, enter, leave = every.cpu().numpy().T
        if self._size[2] != kv_heads:
            head = np.repeat(np.arange(kv_heads), len(key))
            key, enter, leave = (np.tile(column, kv_heads) for column in (key, enter, leave))
        return ResidencyIntervals.of(
            kv_head=head, key=key, enter=enter, leave=leave, heads=kv_heads, length=self._size[3]
        )

    def _close(self, ended: Tensor, t: int) -> None:
        where = ended.nonzero()  # [N, 4]: run, layer, head, key
        if len(where):
            since = self._since[tuple(where.unbind(1))].to(torch.int64)
            self._closed.append(torch.cat([where, since[:, None], torch.full_like(since, t)[:, None]], dim=1))
