"""From what a scan left visible to the values of every metric, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvscope.engine.rows import Shape
from kvscope.metrics import Metric
from kvscope.metrics.base import Rows
from kvscope.metrics.past import Past

ALWAYS = frozenset({"read_keys", "held_keys"})  # counted at every step, also before anything is evicted


class Kept(Protocol):
    """What scoring asks of a scan, or of what one has left."""

    budgets: list[int]
    shape: Shape

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t``, bool ``[R, L, G, stop - start, stop]``."""

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t``, bool ``[R, L, G, stop - start, stop]``."""


class Scorer:
    """The metrics of one scan.

    Parameters
    ----------
    scan : Scan or alike
        One policy under several budgets.
    metrics : sequence of Metric
        What to compute.
    first : int
        First step to score.
    """

    def __init__(self, scan: Kept, metrics: Sequence[Metric], first: int) -> None:
        self.scan, self.metrics, self.first = scan, metrics, first
        self._blocks: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
        self._pooled: dict[str, Tensor] = {}

    def values(self) -> dict[str, Tensor]:
        """Return ``[R, L, H, S]`` for every metric; NaN at steps before anything was evicted."""
        scored = torch.cat(self._blocks[_EVICTED], dim=-1)
        result = {}
        for metric in self.metrics:
            if metric.pooled:
                terms = self._pooled[metric.name]
                norm = (terms[..., 1] * terms[..., 2]).sqrt()
                value = (terms[..., 0] / torch.where(norm > 0, norm, 1))[..., None].expand(scored.shape)
            else:
                value = torch.cat(self._blocks[metric.name], dim=-1)
            if metric.name not in ALWAYS:
                value = torch.where(scored, value, torch.nan)
            result[metric.name] = value.to(torch.float32)
        return result

    def add(self, rows: Rows) -> None:
        """Take a block of steps that follows the one before."""
        scored = self._evicted(rows)
        self._blocks.setdefault(_EVICTED, []).append(scored)
        for metric in self.metrics:
            value = metric.compute(rows)
            if metric.pooled:
                terms = torch.where(scored[..., None], value, 0).to(torch.float64).sum(3)  # [R, L, H, 3]
                self._pooled[metric.name] = self._pooled.get(metric.name, torch.zeros_like(terms)) + terms
            else:
                self._blocks[metric.name].append(value.expand(scored.shape).to(torch.float32))

    def _evicted(self, rows: Rows) -> Tensor:
        """Return where the query sees less than the model would show it, bool ``[R, L, H, b]``."""
        reach = torch.tensor(self.scan.shape.reach(), device=rows.full.device)
        could = torch.minimum(rows.steps + 1, reach[:, None])[:, None, :]  # [L, 1, b]
        return rows.kept.keys < could


class Scoring:
    """Scores scans that are stepped over the same rows, block by block; what is of the rows alone is made once.

    Parameters
    ----------
    scorers : sequence of Scorer
        With the same first step.
    values : Tensor or None
        ``[L, G, T, D]``, for metrics that need them; with a leading ``R`` where the rows have one.
    """

    def __init__(self, scorers: Sequence[Scorer], values: Tensor | None = None) -> None:
        self.scorers = list(scorers)
        self._values = values if values is not None and self._need("values") else None
        prompt = self.scorers[0].scan.shape.prompt if self.scorers else 0
        self._past = Past([name for name in ("last_attended", "prompt_rank") if self._need(name)], prompt)

    def add(self, full: Tensor, start: int, missing: Tensor | None = None) -> None:
        """Score a block of steps that every scan has made.

        Parameters
        ----------
        full : Tensor
            Full rows ``[L, H, b, n]`` of steps `start` to ``start + b - 1``, which follow those of the block before;
            with a leading ``R`` where runs differ, which then must be those of a single scorer.
        start : int
            First step of the block.
        missing : Tensor or None
            ``[L, H, b]``: mass that a learned sink takes; with a leading ``R`` as the rows.
        """
        signals = self._past.add(full, start)
        stop = start + full.shape[-2]
        begin = max(start, min((scorer.first for scorer in self.scorers), default=stop))
        if begin >= stop:
            return
        full = full[..., begin - start :, :]
        signals = {name: signal[..., begin - start :, :] for name, signal in signals.items()}
        if self._values is not None:
            signals["values"] = self._values[..., :stop, :]
        steps = torch.arange(begin, stop, device=full.device)
        shared: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        for scorer in self.scorers:
            scan = scorer.scan
            rows = Rows(
                full=full,
                visible=scan.visible(begin, stop),
                held=scan.held(begin, stop),
                budget=torch.tensor(scan.budgets, device=full.device),
                steps=steps,
                missing=None if missing is None else missing[..., begin - start :],
                signals=signals,
                shared=shared,
            )
            scorer.add(rows)

    def _need(self, signal: str) -> bool:
        return any(signal in metric.needs for scorer in self.scorers for metric in scorer.metrics)


_EVICTED = "(evicted)"
