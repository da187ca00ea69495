"""Layers that one simulation of the decoder decides for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kvscope.engine.occupancy import EqualCaches
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.short_cache import HeldKeys
from kvscope.policies.base import Step


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
    sums : bool
        Whether the attention that keys receive is summed.
    """

    simulation: CacheSimulation
    groups: list[tuple[EqualCaches, HeldKeys, Tensor]] = field(default_factory=list)
    row: Tensor = field(default_factory=lambda: torch.empty(0))
    sums: bool = False

    @cached_property
    def mass(self) -> Tensor:
        """Attention that each key has received so far, as a mean over the query heads of a group, ``[R, L, G, T]``."""
        alive = self.simulation.state.alive
        size = (self.runs, len(self.simulation.shape.layers), self.simulation.shape.kv_heads, alive.shape[-1])
        return torch.zeros(size, dtype=self.simulation.state.score.dtype, device=alive.device)

    def complete(self, step: Step, row: Tensor) -> None:
        """Let the policy score the keys after a step with rows ``[R, L, H, n]``, or ``[L, H, n]`` for all, and evict.

        Where `sums` is set, the rows are added to `mass` before.
        """
        if self.simulation.inputs.missing_mass is not None:
            self.simulation.inputs.missing_mass[..., step.t] = (1 - row.sum(-1)).clamp(min=0)
        if self.sums:
            grouped = row.view(*row.shape[:-2], self.simulation.shape.kv_heads, -1, row.shape[-1])
            self.mass[..., : row.shape[-1]] += grouped.mean(-2)
        self.simulation.attend(step, row)

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
