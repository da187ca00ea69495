"""Layers that read the cache of an earlier one: which keys the owner's decisions leave them.

One decision holds for all layers that read a cache. It is made as if the layer that owns the cache were alone: from its
rows, keys and values, at the end of each step, after all layers have attended. A mean over the readers, as over the
heads of a group, would need the rows of later layers, which depend on what the owner sees at the same step: then no
pass over the whole text could decide layer by layer, and every policy would have to be decoded token by token.
"""

from __future__ import annotations

from torch import Tensor

from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation


class ReadCaches:
    """The keys that the layers of a group see and hold, of which some read the cache of another.

    Parameters
    ----------
    simulation : CacheSimulation
        Decides for the layers that own a cache.
    cache_of : list of int
        For each of the ``L`` layers the place in `simulation` of the layer whose cache it reads.
    shape : Shape
        Sizes of all the layers.
    """

    def __init__(self, simulation: CacheSimulation, cache_of: list[int], shape: Shape) -> None:
        self._simulation, self._cache_of, self.shape = simulation, cache_of, shape
        self.budgets = simulation.budgets

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``."""
        return self._simulation.visible(start, stop)[:, self._cache_of]

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``."""
        return self._simulation.held(start, stop)[:, self._cache_of]
