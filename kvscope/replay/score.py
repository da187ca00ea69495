"""From what a scan left visible to the values of every metric, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvscope.metrics import Metric
from kvscope.metrics.base import Rows, ranks
from kvscope.replay.engine import Scan

ALWAYS = frozenset({"read_keys", "held_keys"})  # counted at every step, also before anything is evicted


class Scorer:
    """The metrics of one scan.

    Parameters
    ----------
    scan : Scan
        One policy under several budgets.
    metrics : sequence of Metric
        What to compute.
    first : int
        First step to score.
    """

    def __init__(self, scan: Scan, metrics: Sequence[Metric], first: int) -> None:
        self.scan, self.metrics, self.first = scan, metrics, first
        self._blocks: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
        self._pooled: dict[str, Tensor] = {}

    @staticmethod
    def score_block(scorers: Sequence[Scorer], full: Tensor, start: int, missing: Tensor | None = None) -> None:
        """Score a block of steps that every scan has made; the ranking of the keys is shared.

        Parameters
        ----------
        scorers : sequence of Scorer
            With the same first step.
        full : Tensor
            Full rows ``[L, H, b, n]`` of steps `start` to ``start + b - 1``; with a leading ``R`` where runs differ,
            which then must be those of a single scorer.
        start : int
            First step of the block.
        missing : Tensor or None
            ``[L, H, b]``: mass that a learned sink takes; with a leading ``R`` as the rows.
        """
        stop = start + full.shape[-2]
        begin = max(start, min(scorer.first for scorer in scorers)) if scorers else stop
        if begin >= stop:
            return
        full = full[..., begin - start :, :]
        steps = torch.arange(begin, stop, device=full.device)
        rank = ranks(full, steps)
        for scorer in scorers:
            scan = scorer.scan
            rows = Rows(
                full=full,
                visible=scan.visible(begin, stop),
                held=scan.held(begin, stop),
                rank=rank,
                budget=torch.tensor(scan.budgets, device=full.device),
                steps=steps,
                missing=None if missing is None else missing[..., begin - start :],
            )
            scorer._add(rows)

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

    def _add(self, rows: Rows) -> None:
        scored = self._evicted(rows)
        self._blocks.setdefault(_EVICTED, []).append(scored)
        for metric in self.metrics:
            value = metric.compute(rows)
            if metric.pooled:
                terms = torch.where(scored[..., None], value, 0).to(torch.float64).sum(3)  # [R, L, H, 3]
                self._pooled[metric.name] = self._pooled.get(metric.name, torch.zeros_like(terms)) + terms
            else:
                self._blocks[metric.name].append(value.expand(scored.shape))

    def _evicted(self, rows: Rows) -> Tensor:
        """Return where the query sees less than the model would show it, bool ``[R, L, H, b]``."""
        reach = torch.tensor(self.scan.shape.reach(), device=rows.full.device)
        could = torch.minimum(rows.steps + 1, reach[:, None])[:, None, :]  # [L, 1, b]
        return rows.seen.sum(-1) < could


_EVICTED = "(evicted)"
