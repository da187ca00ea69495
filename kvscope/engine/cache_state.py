"""The state of the simulated caches: which keys are held, their scores, and when keys were evicted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvscope.core.residency import NEVER
from kvscope.engine.rows import Shape


@dataclass
class CacheState:
    """State of every cache: ``R`` runs, ``L`` layers, ``S`` deciding heads, ``T`` keys by position.

    ``S`` is the number of key/value heads, or 1 where a layer decides as one.

    Attributes
    ----------
    alive : Tensor
        bool ``[R, L, S, T]``: keys that are in the cache.
    score : Tensor
        float ``[R, L, S, T]``: score of each key; without meaning where a key is not alive.
    leave : Tensor
        int32 ``[R, L, S, T]``: step at whose end the key was evicted, `NEVER` while it is held. A key enters at its
        position.
    n_alive : Tensor
        int64 ``[R, L, S]``: number of keys that are alive.
    evictions : Tensor
        int64 ``[R, L, S]``: keys that the policy evicted, without those that a sliding-window layer forgot; of a
        sparse reader, keys that it did not read, summed over steps.
    budget : Tensor
        int64 ``[R, L, S]``: keys that each deciding head may hold.
    sinks, recent : Tensor
        int64 ``[R]``: how many first and how many newest keys are protected.
    windows : tuple of int
        How many newest keys each layer of the model can see, ``L`` numbers; 0 for all.
    nan_scores : Tensor
        bool ``[]``: whether a score was not a number when keys were to be evicted.
    length_at_eviction : Tensor
        int64 ``[]``: number of positions at the last step at which keys were to be evicted.
    """

    alive: Tensor
    score: Tensor
    leave: Tensor
    n_alive: Tensor
    evictions: Tensor
    budget: Tensor
    sinks: Tensor
    recent: Tensor
    windows: tuple[int, ...]
    nan_scores: Tensor
    length_at_eviction: Tensor

    @classmethod
    def empty(
        cls, shape: Shape, budget: Tensor, protected: Tensor, device: torch.device | str, dtype: torch.dtype
    ) -> CacheState:
        """Return the state of empty caches.

        Parameters
        ----------
        shape : Shape
            Sizes.
        budget : Tensor
            int64 ``[R, L, S]``.
        protected : Tensor
            int64 ``[R, 2]``: how many first and how many newest keys each run protects.
        device, dtype
            Of the state, and of its scores.
        """
        size = (*budget.shape, shape.length)
        return cls(
            alive=torch.zeros(size, dtype=torch.bool, device=device),
            score=torch.zeros(size, dtype=dtype, device=device),
            leave=torch.full(size, NEVER, dtype=torch.int32, device=device),
            n_alive=torch.zeros(budget.shape, dtype=torch.int64, device=device),
            evictions=torch.zeros(budget.shape, dtype=torch.int64, device=device),
            budget=budget,
            sinks=protected[:, 0].contiguous(),
            recent=protected[:, 1].contiguous(),
            windows=tuple(window or 0 for window in shape.windows or (None,) * len(shape.layers)),
            nan_scores=torch.zeros((), dtype=torch.bool, device=device),
            length_at_eviction=torch.zeros((), dtype=torch.int64, device=device),
        )

    def append(self, t: int) -> None:
        """Put key `t` into every cache, and drop what sliding-window layers can no longer see."""
        self.alive[..., t] = True
        self.n_alive += 1
        for layer, window in enumerate(self.windows):
            if 0 < window <= t:
                self._forget(layer, t - window, t - 1)

    def evictable(self, n: int) -> Tensor:
        """Return which of the first `n` keys are alive and not protected, bool ``[R, L, S, n]``."""
        key = torch.arange(n, device=self.alive.device)
        sinks, recent = self._protected
        return self.alive[..., :n] & (key >= sinks) & (key < n - recent)

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[R, L, S, stop - start, stop]``."""
        return self._mask(start, stop, shift=0)

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[R, L, S, stop - start, stop]``."""
        return self._mask(start, stop, shift=1)

    @cached_property
    def _protected(self) -> tuple[Tensor, Tensor]:
        """`sinks` and `recent` as ``[R, 1, 1, 1]``: they are read at every step."""
        return self.sinks[:, None, None, None], self.recent[:, None, None, None]

    def _forget(self, layer: int, key: int, step: int) -> None:
        self.n_alive[:, layer] -= self.alive[:, layer, :, key].to(torch.int64)
        self.alive[:, layer, :, key] = False
        leave = self.leave[:, layer, :, key]
        leave.copy_(torch.where(leave == NEVER, step, leave))

    def _mask(self, start: int, stop: int, shift: int) -> Tensor:
        steps = torch.arange(start, stop, device=self.leave.device)[:, None]
        keys = torch.arange(stop, device=self.leave.device)[None, :]
        return (keys <= steps) & (self.leave[..., None, :stop] >= steps + shift)
