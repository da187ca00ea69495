"""Random vectors for policies that look at keys, values and queries, and a simulation that is given them."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor

from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.base import Policy
from tests.engine.maps import attention


def vectors(seed: int, shape: Shape, size: int = 4) -> dict[str, Tensor]:
    """Return keys, values and queries in float64; one direction is shared, so that cosines are not all near zero."""
    generator = torch.Generator().manual_seed(seed)
    layers, length = len(shape.layers), shape.length

    def draw(heads: int) -> Tensor:
        common = torch.randn(layers, heads, 1, size, generator=generator, dtype=torch.float64)
        return torch.randn(layers, heads, length, size, generator=generator, dtype=torch.float64) + 0.5 * common

    queries = draw(shape.heads)
    made = {"keys": draw(shape.kv_heads), "values": draw(shape.kv_heads), "queries": queries}
    return made | {"mean_query": queries.mean(1)}


@torch.inference_mode()
def simulated(
    policy: Policy | EvictionPlan,
    budgets: list[int],
    shape: Shape,
    prefill: str,
    signals: dict[str, Tensor],
    seed: int = 0,
) -> tuple[CacheSimulation, Tensor]:
    """Return a simulation stepped to the end over random rows, and the rows ``[L, H, T, T]``."""
    rows = attention(seed, len(shape.layers), shape.heads, shape.length)
    simulation = CacheSimulation(policy, budgets, shape, prefill, signals, dtype=torch.float64)
    for t in range(shape.length):
        simulation.step(t, rows[:, :, t, : t + 1])
    assert not bool(simulation.state.nan_scores)
    return simulation, rows


def sets(masks: Tensor) -> list[set[int]]:
    """Return the key sets of every step, from ``[steps, n]``."""
    return [set(compress(range(len(row)), row)) for row in masks.tolist()]
