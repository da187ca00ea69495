"""Sparse readers: policies that hold every key and read only some of them at each step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

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

    What changed is read from the device once for each released block of steps: how many intervals there are depends on
    the data, and the masks of all steps would need memory that grows with the square of their number.

    Parameters
    ----------
    size : torch.Size
        ``(R, L, S, T)``.
    device : torch.device
        Device of the masks.
    """

    def __init__(self, size: torch.Size, device: torch.device) -> None:
        self._size = size
        self._last = torch.zeros(size, dtype=torch.bool, device=device)  # what the last released step read
        self._masks: dict[int, Tensor] = {}  # of the steps that are not released, in order
        self._changes: list[NDArray[np.int64]] = []  # [N, 5] each: run, layer, head, key and the step that differs

    def add(self, t: int, mask: Tensor) -> None:
        """Record that step `t` read `mask`, bool ``[R, L, S, t + 1]``."""
        self._masks[t] = mask.clone()  # the mask may be a view of CacheState.alive, which changes later

    def forget_before(self, t: int) -> None:
        """Drop the masks of steps before `t`, and remember where each of them differs from the step before it."""
        steps = [step for step in self._masks if step < t]
        if not steps:
            return
        read = self.masks(steps[0], steps[-1] + 1)  # [R, L, S, b, n]
        n = read.shape[-1]
        changed = torch.cat([self._last[..., None, :n], read[..., :-1, :]], -2) ^ read
        found = changed.transpose(-1, -2).nonzero().cpu().numpy()  # [N, 5]
        found[:, 4] += steps[0]
        self._changes.append(found)
        self._last[..., :n] = read[..., -1, :]
        for step in steps:
            del self._masks[step]

    def masks(self, start: int, stop: int) -> Tensor:
        """Return the keys that steps `start` to `stop` - 1 read, bool ``[R, L, S, stop - start, stop]``."""
        rows = [functional.pad(self._masks[t], (0, stop - 1 - t)) for t in range(start, stop)]
        return torch.stack(rows, -2)

    def residency(self, run: int, layer: int, kv_heads: int) -> ResidencyIntervals:
        """Return the intervals of one run and layer, repeated for every key/value head if the layer decides as one."""
        self.forget_before(self._size[3])
        head, key, enter, leave = self._intervals(run, layer)
        if self._size[2] != kv_heads:
            head = np.repeat(np.arange(kv_heads), len(key))
            key, enter, leave = (np.tile(column, kv_heads) for column in (key, enter, leave))
        return ResidencyIntervals.of(
            kv_head=head, key=key, enter=enter, leave=leave, heads=kv_heads, length=self._size[3]
        )

    def _intervals(self, run: int, layer: int) -> tuple[NDArray[np.int64], ...]:
        """Return head, key, ``enter`` and ``leave`` of each interval, of one key those that are open first."""
        every = np.concatenate([each[(each[:, 0] == run) & (each[:, 1] == layer)][:, 2:] for each in self._changes])
        head, key, step = every[np.lexsort((every[:, 2], every[:, 1], every[:, 0]))].T
        cell = head * self._size[3] + key
        first = np.flatnonzero(np.append(True, cell[1:] != cell[:-1]))  # of each key
        begins = (np.arange(len(cell)) - np.repeat(first, np.diff(np.append(first, len(cell))))) % 2 == 0
        closed = np.append(cell[1:] == cell[:-1], False)[begins]  # a change after the one that begins it ends it
        enter = np.where(step == key, step, step - 1)[begins]
        leave = np.where(closed, np.append(step[1:], 0)[begins] - 1, -1)
        order = np.lexsort((closed, cell[begins]))
        return head[begins][order], key[begins][order], enter[order], leave[order]
