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

    ``S`` is the number of key/value heads, or 1 where one decision holds for all heads of a layer.

    Attributes
    ----------
    alive : Tensor
        bool ``[R, L, S, T]``: whether the key is in the cache.
    score : Tensor
        float ``[R, L, S, T]``: score of each key; undefined where the key is not in the cache.
    leave : Tensor
        int32 ``[R, L, S, T]``: step at whose end the key was evicted, `NEVER` while it is held. Key ``j`` enters at
        step ``j``.
    n_alive : Tensor
        int64 ``[R, L, S]``: number of keys in the cache.
    evictions : Tensor
        int64 ``[R, L, S]``: keys that the policy evicted, without those that slid out of a sliding-window layer. For a
        sparse reader: keys that it did not read, summed over steps.
    budget : Tensor
        int64 ``[R, L, S]``: keys that each deciding head may hold.
    sinks, recent : Tensor
        int64 ``[R]``: number of first and of newest keys that are protected.
    windows : tuple of int
        For each of the ``L`` layers, how many newest keys the model can attend to; 0 for all.
    chunks : tuple of int
        For each of them, the size of the chunks in which the model attends; 0 for none.
    nan_scores : Tensor
        bool ``[]``: whether any score was NaN at a step that evicts.
    length_at_eviction : Tensor
        int64 ``[]``: number of positions at the last step that evicts.
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
    chunks: tuple[int, ...] = ()

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
            int64 ``[R, 2]``: number of first and of newest keys that each run protects.
        device : torch.device or str
            Device of all tensors.
        dtype : torch.dtype
            Type of the scores.
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
            chunks=tuple(chunk or 0 for chunk in shape.chunks),
        )

    def append(self, t: int) -> None:
        """Add key `t` to every cache, and remove what the model can no longer attend to: see `windows` and `chunks`."""
        self.alive.select(-1, t).fill_(True)  # an assignment would copy the number from the host
        self.n_alive += 1
        for window, layers in self._windowed:
            if window <= t:
                self._slide_out(layers, t - window, t - 1)
        for layer, chunk in enumerate(self.chunks):
            if chunk and t and t % chunk == 0:
                self._leave(layer, t - chunk, t, t - 1)

    def append_block(self, start: int, stop: int) -> None:
        """Add keys `start` to `stop` - 1 to every cache, as `append` for each, where nothing is evicted in between.

        The number of operations does not depend on the number of keys.
        """
        self.alive[..., start:stop] = True
        self.n_alive += stop - start
        for layer, window in enumerate(self.windows):
            first, last = max(0, start - window), stop - window
            if window and first < last:
                alive, leave = self.alive[:, layer, :, first:last], self.leave[:, layer, :, first:last]
                self.n_alive[:, layer] -= alive.sum(-1)
                alive.fill_(False)
                step = torch.arange(first + window - 1, stop - 1, dtype=leave.dtype, device=leave.device)
                leave.copy_(torch.where(leave == NEVER, step, leave))
        for layer, chunk in enumerate(self.chunks):
            for end in range(-(-max(start, 1) // chunk) * chunk, stop, chunk) if chunk else ():
                self._leave(layer, end - chunk, end, end - 1)

    def evictable(self, n: int) -> Tensor:
        """Return which of the first `n` keys are in the cache and not protected, bool ``[R, L, S, n]``."""
        return self.alive.narrow(-1, 0, n) & (self._protected_until.narrow(-1, 0, n) < n)

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[R, L, S, stop - start, stop]``."""
        return self._mask(start, stop, shift=0)

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[R, L, S, stop - start, stop]``."""
        return self._mask(start, stop, shift=1)

    @cached_property
    def _protected_until(self) -> Tensor:
        """Number of keys in the sequence up to which each key is protected, int64 ``[R, 1, 1, T]``."""
        keys = self.alive.shape[-1]
        key = torch.arange(keys, device=self.alive.device)
        until = torch.where(key >= self.sinks[:, None], key + self.recent[:, None], keys)  # [R, T]
        return until[:, None, None, :]

    @cached_property
    def _windowed(self) -> list[tuple[int, Tensor]]:
        """Every size of a sliding window, and which layers have it, bool ``[L, 1]``."""
        sizes = sorted({window for window in self.windows if window})
        layers = torch.tensor(self.windows, device=self.leave.device)[:, None]
        return [(size, layers == size) for size in sizes]

    def _leave(self, layer: int, first: int, last: int, step: int) -> None:
        """Remove keys `first` to `last` - 1 of one layer, whose chunk has ended with `step`."""
        alive, leave = self.alive[:, layer, :, first:last], self.leave[:, layer, :, first:last]
        self.n_alive[:, layer] -= alive.sum(-1)
        leave.masked_fill_(alive & (leave == NEVER), step)
        alive.fill_(False)

    def _slide_out(self, layers: Tensor, key: int, step: int) -> None:
        alive, leave = self.alive[..., key], self.leave[..., key]  # [R, L, S]
        self.n_alive -= (alive & layers).to(torch.int64)
        leave.masked_fill_(layers & (leave == NEVER), step)
        alive.masked_fill_(layers, False)

    def _mask(self, start: int, stop: int, shift: int) -> Tensor:
        steps = torch.arange(start, stop, device=self.leave.device)[:, None]
        keys = torch.arange(stop, device=self.leave.device)[None, :]
        return (keys <= steps) & (self.leave[..., None, :stop] >= steps + shift)
