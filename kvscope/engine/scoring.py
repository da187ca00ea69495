"""Metrics of a simulation, computed block by block from the keys that were visible and held at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.engine.rows import Shape
from kvscope.kernels import device as devices
from kvscope.metrics import Metric
from kvscope.metrics.base import Rows
from kvscope.metrics.coded import CodedRows
from kvscope.metrics.past import Past

ALWAYS = frozenset({"read_keys", "held_keys", "cache_bytes"})  # defined at every step, also before anything is evicted

# Metrics of the live row, which codes change too: defined at steps that read a code, though nothing may be evicted.
LIVE = frozenset({"full_cosine", "ideal_cosine", "ideal_cosine_flattened", "output_error"})


class CacheHistory(Protocol):
    """Keys that were visible and held at past steps: a `CacheSimulation`, or recorded residency intervals."""

    @property
    def budgets(self) -> list[int]:
        """``B`` of each run."""

    @property
    def shape(self) -> Shape:
        """Sizes."""

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t``, bool ``[R, L, G, stop - start, stop]``."""

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t``, bool ``[R, L, G, stop - start, stop]``."""


class MetricSeries:
    """The values of metrics at every step of one policy under several budgets.

    Parameters
    ----------
    history : CacheHistory
        Keys that were visible and held.
    metrics : sequence of Metric
        The metrics to compute.
    first : int
        First step to score.
    """

    def __init__(self, history: CacheHistory, metrics: Sequence[Metric], first: int) -> None:
        self.history, self.metrics, self.first = history, metrics, first
        self._blocks: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
        self._evicted: list[Tensor] = []
        self._changed: list[Tensor] = []  # bool [R, L, H, b]: steps at which keys were evicted, or read as codes
        self._pooled: dict[str, Tensor] = {}
        self._budgets: Tensor | None = None

    def values(self) -> dict[str, Tensor]:
        """Return ``[R, L, H, S]`` for every metric; NaN at steps at which no key was evicted or a code."""
        counted = [torch.cat(masks, dim=-1) for masks in (self._evicted, self._changed)]
        result = {}
        for metric in self.metrics:
            evicted = counted[metric.name in LIVE]
            if metric.pooled:
                terms = self._pooled[metric.name]
                norm = (terms[..., 1] * terms[..., 2]).sqrt()
                value = (terms[..., 0] / torch.where(norm > 0, norm, 1))[..., None].expand(evicted.shape)
            else:
                value = torch.cat(self._blocks[metric.name], dim=-1)
            if metric.name not in ALWAYS:
                value = torch.where(evicted, value, torch.nan)
            result[metric.name] = value.to(torch.float32)
        return result

    def add(self, rows: Rows) -> None:
        """Compute the metrics of a block of steps; blocks are given in order, without gaps."""
        evicted = self._after_eviction(rows)
        self._evicted.append(evicted)
        changed = evicted if rows.coded is None else evicted | rows.coded.coded
        self._changed.append(changed)
        for metric in self.metrics:
            evicted = changed if metric.name in LIVE else self._evicted[-1]
            value = metric.compute(rows)
            if metric.pooled:
                terms = torch.where(evicted[..., None], value, 0).to(torch.float64).sum(3)  # [R, L, H, 3]
                self._pooled[metric.name] = self._pooled.get(metric.name, torch.zeros_like(terms)) + terms
            else:
                self._blocks[metric.name].append(value.expand(evicted.shape).to(torch.float32))

    def _after_eviction(self, rows: Rows) -> Tensor:
        """Return whether the query sees fewer keys than with a full cache, bool ``[R, L, H, b]``."""
        full = self.history.shape.seen(rows.steps)[:, None, :]  # [L, 1, b]
        return rows.kept.keys < full

    def budgets(self, device: torch.device) -> Tensor:
        """Return ``B`` of each run, int ``[R]``, copied to a device once, since a copy waits for the device."""
        if self._budgets is None or self._budgets.device != device:
            self._budgets = torch.tensor(self.history.budgets, device=device)
        return self._budgets

    def on_cpu(self) -> dict[str, NDArray[np.float32]]:
        """Return `values` as arrays; from a device in one copy."""
        values = self.values()
        if not values or devices.on_cpu(next(iter(values.values())).device):
            return {name: value.numpy() for name, value in values.items()}
        return dict(zip(values, torch.stack(list(values.values())).cpu().numpy(), strict=True))


class BlockScorer:
    """Scores blocks of rows for several series; what depends on the rows alone is computed once for all of them.

    Parameters
    ----------
    series : sequence of MetricSeries
        All with the same first step.
    values : Tensor or None
        ``[L, G, T, D]``, for metrics that need them; with a leading axis ``R`` if the rows have one.
    key_bytes : int
        Bytes of a key and its value in 16 bit, for the size of the cache.
    """

    def __init__(self, series: Sequence[MetricSeries], values: Tensor | None = None, key_bytes: int = 0) -> None:
        self.series, self._key_bytes = list(series), key_bytes
        self._values = values if values is not None and self._needs("values") else None
        prompt = self.series[0].history.shape.prompt if self.series else 0
        self._past = Past([name for name in ("last_attended", "prompt_rank") if self._needs(name)], prompt)

    def add(self, full: Tensor, start: int, missing: Tensor | None = None, coded: CodedRows | None = None) -> None:
        """Score a block of steps that every simulation has completed.

        Parameters
        ----------
        full : Tensor
            Full rows ``[L, H, b, n]`` of steps `start` to ``start + b - 1``, which follow the previous block. With a
            leading axis ``R`` if runs differ; then there must be a single series.
        start : int
            First step of the block.
        missing : Tensor or None
            ``[L, H, b]``: attention mass on a learned sink; with a leading axis ``R`` if the rows have one.
        coded : CodedRows or None
            Of a quantised cache: what the steps attended to; then there must be a single series.
        """
        signals = self._past.add(full, start)
        stop = start + full.shape[-2]
        begin = max(start, min((series.first for series in self.series), default=stop))
        if begin >= stop:
            return
        full = full[..., begin - start :, :]
        signals = {name: signal[..., begin - start :, :] for name, signal in signals.items()}
        if self._values is not None:
            signals["values"] = self._values[..., :stop, :]
        steps = torch.arange(begin, stop, device=full.device)
        shared: dict[tuple[str, tuple[int, ...]], object] = {}
        for series in self.series:
            history = series.history
            rows = Rows(
                full=full,
                visible=history.visible(begin, stop),
                held=history.held(begin, stop),
                budget=series.budgets(full.device),
                budgets=tuple(history.budgets),
                steps=steps,
                missing=None if missing is None else missing[..., begin - start :],
                signals=signals,
                shared=shared,
                coded=None if coded is None else coded.after(begin - start),
                key_bytes=self._key_bytes,
            )
            series.add(rows)

    def _needs(self, signal: str) -> bool:
        return any(signal in metric.needs for series in self.series for metric in series.metrics)
