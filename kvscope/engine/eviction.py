"""Eviction at the end of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.engine.cache_state import CacheState
from kvscope.engine.occupancy import Occupancy


class Evictor:
    """Evicts the keys with the lowest scores until every cache fits its budget; of equal scores the oldest first.

    Parameters
    ----------
    state : CacheState
        Changed in place.
    bounded : bool
        Whether the policy keeps to a budget. If not, the keys that it scores ``-inf`` are evicted.
    occupancy : Occupancy
        Bounds on the number of keys, so that no step waits for the device.
    """

    def __init__(self, state: CacheState, bounded: bool, occupancy: Occupancy) -> None:
        self._state, self._bounded, self._occupancy = state, bounded, occupancy

    def evict(self, t: int) -> None:
        """Evict at the end of step `t`."""
        state, n = self._state, t + 1
        score = state.score.narrow(-1, 0, n)
        state.nan_scores |= torch.isnan(score).any()
        if not self._bounded:
            self._evict_marked(state.alive[..., :n] & (score == -torch.inf), t)
            return
        state.length_at_eviction.fill_(n)
        most = self._occupancy.evict()
        if most > 0:
            self._evict_lowest(score, state.n_alive - state.budget, most, t)

    def _evict_lowest(self, score: Tensor, surplus: Tensor, most: int, t: int) -> None:
        """Evict the `surplus` lowest-scoring evictable keys of each head ``[R, L, S]``; no surplus exceeds `most`."""
        state, n = self._state, t + 1
        ranked = torch.where(state.evictable(n), score.clamp(max=torch.finfo(score.dtype).max), torch.inf)
        surplus = surplus.unsqueeze(-1)  # [R, L, S, 1]
        if most == 1:
            lowest = ranked.argmin(-1, keepdim=True)  # of equal scores the first, so the oldest
            evicted = surplus > 0
        else:
            lowest = ranked.sort(dim=-1, stable=True).indices[..., :most]  # stable: the same rule for ties
            evicted = torch.arange(most, device=lowest.device) < surplus  # also false where surplus is negative
        alive, leave = state.alive, state.leave
        alive.scatter_(-1, lowest, alive.gather(-1, lowest) > evicted)  # false where it is evicted
        leave.scatter_(-1, lowest, leave.gather(-1, lowest).masked_fill_(evicted, t))
        self._count(evicted.sum(-1))

    def _evict_marked(self, marked: Tensor, t: int) -> None:
        self._state.alive.narrow(-1, 0, t + 1).masked_fill_(marked, False)
        self._state.leave.narrow(-1, 0, t + 1).masked_fill_(marked, t)
        self._count(marked.sum(-1))

    def _count(self, evicted: Tensor) -> None:
        self._state.n_alive -= evicted
        self._state.evictions += evicted
