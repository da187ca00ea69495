"""How full the caches can be at most, known on the host without waiting for the device that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.engine.cache_state import CacheState


@dataclass
class EqualCaches:
    """Layers whose caches hold equally many keys at most: with the same reach, smallest and largest budget of a head.

    Attributes
    ----------
    window : int
        How many newest keys the model can attend to; 0 for all.
    chunk : int
        Size of the chunks in which the model attends; 0 for none.
    least, largest : int
        Smallest and largest budget of a head.
    layers : list of int
        Places of the layers in the group of layers that is simulated.
    evicted_at : int
        Keys that had been appended when keys were last evicted; 0: never.
    """

    window: int
    chunk: int
    least: int
    largest: int
    layers: list[int]
    evicted_at: int = 0

    def within(self, keys: int) -> int:
        """Return how many of so many appended keys the model can attend to."""
        keys = (keys - 1) % self.chunk + 1 if self.chunk and keys else keys
        return min(keys, self.window) if self.window else keys

    def surplus(self, n: int) -> int:
        """Return by how many keys a cache exceeds its budget at most after `n` were appended; 0 or less: by none."""
        since = n - self.evicted_at if self.evicted_at else n - self.least
        return min(since, self.within(n) - self.least)

    def most(self, n: int) -> int:
        """Return how many keys a cache holds at most after `n` were appended."""
        return min(self.within(n), self.largest + n - self.evicted_at) if self.evicted_at else self.within(n)


class Occupancy:
    """Bounds on the number of keys in the caches of a `CacheState`, counted along with its steps.

    Every step appends one key and an eviction cuts each cache to its budget, so the numbers follow from the budgets.
    They are exact except where keys slide out of a sliding-window layer that evicts too. The budgets are read from the
    device once, and once more if they are replaced.

    Parameters
    ----------
    state : CacheState
        The caches.
    bounded : bool
        Whether the policy keeps to a budget. If not, any cache may hold every key.
    """

    def __init__(self, state: CacheState, bounded: bool) -> None:
        self._state, self._bounded = state, bounded
        self._windows = [reach for reach in (*state.windows, *state.chunks) if reach]
        self._budget: Tensor | None = None
        self._equal: list[EqualCaches] = []
        self._n = 0  # keys appended
        self._evicted = False

    def append(self) -> None:
        """Count a key that is appended to every cache."""
        self._n += 1

    def evict(self) -> int:
        """Count an eviction that cuts each cache to its budget; returns the largest number of keys it evicts."""
        most = 0
        for caches in self.equal:
            surplus = caches.surplus(self._n)
            if surplus > 0:
                caches.evicted_at, self._evicted = self._n, True
            most = max(most, surplus)
        return most

    @property
    def evicted(self) -> bool:
        """Whether a key has been evicted or has slid out; of a policy without a budget, whether one may have been."""
        slid = any(window < self._n for window in self._windows)
        return slid or self._evicted or (not self._bounded and self._n > 1)

    @property
    def surplus(self) -> int:
        """By how many keys a cache exceeds its budget at most; 0 or less if none does."""
        return max(caches.surplus(self._n) for caches in self.equal)

    @property
    def most(self) -> int:
        """How many keys a cache holds at most."""
        if not self._bounded:
            return self._n
        return max(caches.most(self._n) for caches in self.equal)

    def most_of(self, caches: EqualCaches) -> int:
        """Return how many keys a cache of some layers holds at most; only for policies with a budget."""
        return caches.most(self._n)

    @property
    def equal(self) -> list[EqualCaches]:
        """The layers, those whose caches hold equally many keys together."""
        if self._budget is not self._state.budget:
            self._budget = self._state.budget
            of_layers = self._budget.transpose(0, 1).flatten(1)  # [L, R * S]
            kinds: dict[tuple[int, int, int, int], list[int]] = {}
            chunks = self._state.chunks or (0,) * len(of_layers)
            for layer, bounds in enumerate(torch.stack(of_layers.aminmax(dim=1), 1).tolist()):
                kinds.setdefault((self._state.windows[layer], chunks[layer], *bounds), []).append(layer)
            self._equal = [EqualCaches(*kind, layers) for kind, layers in kinds.items()]
        return self._equal
