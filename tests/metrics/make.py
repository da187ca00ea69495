"""Scans that never were: any rows, any sets that a policy might have left."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.engine.rows import Shape
from kvscope.engine.scoring import BlockScorer, MetricSeries
from kvscope.metrics import METRICS, Metric

OURS = [metric for _, metric in METRICS.items() if metric.compute.__module__.startswith("kvscope.metrics.")]


class Left:
    """What a policy left: ``V_t`` and ``R_t``, bool ``[R, L, G, T, T]`` each."""

    def __init__(self, visible: Tensor, held: Tensor, budgets: list[int], heads: int, prompt: int) -> None:
        _, layers, groups, length, _ = visible.shape
        self.shape = Shape(tuple(range(layers)), heads, groups, prompt, length)
        self.budgets, self._visible, self._held = budgets, visible, held

    def visible(self, start: int, stop: int) -> Tensor:
        return self._visible[..., start:stop, :stop]

    def held(self, start: int, stop: int) -> Tensor:
        return self._held[..., start:stop, :stop]


def left(seed: int, runs: int, layers: int, groups: int, heads: int, length: int, prompt: int, keep: float) -> Left:
    """Return sets in which each key that may stay does so with probability `keep`; the query's own is always seen."""
    generator = torch.Generator().manual_seed(seed)
    past = torch.ones(length, length, dtype=torch.bool).tril()
    drawn = torch.rand(2, runs, layers, groups, length, length, generator=generator) < keep
    visible = (drawn[0] | torch.eye(length, dtype=torch.bool)) & past
    budgets = [1 + number * length // max(runs, 1) for number in range(runs)]
    return Left(visible, drawn[1] & past, budgets, heads, prompt)


def scored(
    simulation: Left,
    rows: Tensor,
    values: Tensor,
    *,
    metrics: list[Metric] = OURS,
    first: int = 0,
    block: int = 1000,
    missing: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what the series makes of it, ``[R, L, H, S]``, fed block by block."""
    series = MetricSeries(simulation, metrics, first)
    scorer = BlockScorer([series], values)
    length = rows.shape[-1]
    for start in range(0, length, block):
        stop = min(start + block, length)
        lost = None if missing is None else missing[..., start:stop]
        scorer.add(rows[..., start:stop, :stop], start, lost)
    return series.values()
