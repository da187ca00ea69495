"""Layers that one simulation of the decoder decides for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvscope.engine.occupancy import EqualCaches
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.short_cache import HeldKeys


@dataclass
class LikeLayers:
    """Layers with the same heads, which one simulation decides for.

    Attributes
    ----------
    simulation : CacheSimulation
        Decides which keys leave.
    groups : list of tuple
        Layers with room for equally many keys: how full they are, what they hold, and their places in the simulation.
    row : Tensor
        Rows of the current step, ``[R, L, H, t + 1]``.
    """

    simulation: CacheSimulation
    groups: list[tuple[EqualCaches, HeldKeys, Tensor]] = field(default_factory=list)
    row: Tensor = field(default_factory=lambda: torch.empty(0))

    def place(self, layer: int) -> int:
        """Return the place of a layer in the simulation."""
        return self.simulation.shape.layers.index(layer)

    @property
    def runs(self) -> int:
        """``R``: budgets that are decoded as one batch."""
        return len(self.simulation.budgets)

    def by_kv_head(self, values: Tensor) -> Tensor:
        """Return a view ``[R, G, Q, .]`` of ``[R, H, .]``."""
        return values.view(len(values), self.simulation.shape.kv_heads, -1, values.shape[-1])
