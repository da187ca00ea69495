"""Means of metrics for the page: by head, and by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvscope.results.store import Replay

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Means:
    """Means of one replay; NaN where a metric has no value.

    Attributes
    ----------
    runs : dict of int to int
        Number of a run -> its index in the arrays.
    by_head : dict of str to array
        Metric -> ``[R, L, H]``: mean over steps, then over sequences.
    by_step : dict of int to dict of str to array
        Sequence -> metric -> ``[R, T]``: mean over layers and heads that have a value at the step, for the selected
        sequences.
    """

    runs: dict[int, int]
    by_head: dict[str, Floats]
    by_step: dict[int, dict[str, Floats]]


def read_means(replay: Replay, metrics: list[str], sequences: list[int]) -> Means:
    """Return the means of a replay, read once, layer by layer; means by step only for `sequences`."""
    trace = replay.info.trace
    lengths = {number: int(trace.sequences[number].length) for number in sequences}
    runs = {int(run.run): place for place, run in enumerate(replay.info.runs)}
    layers, heads = trace.layers, int(trace.heads)
    by_head = {name: np.full((len(runs), len(layers), heads), np.nan) for name in metrics}
    by_step = {number: {name: _Sums((len(runs), length)) for name in metrics} for number, length in lengths.items()}
    for row, layer in enumerate(layers):
        frame = replay.fidelity(layer=layer)
        numbers, known = pd.factorize(frame["run"])
        place = np.array([runs[int(run)] for run in known], np.int64)[numbers]
        sequence, head, step = (frame[name].to_numpy(np.int64) for name in ("sequence", "head", "step"))
        shown = {number: sequence == number for number in sequences}
        for name in metrics:
            values = frame[name].to_numpy(np.float64)
            of_heads = _Sums((len(runs), len(trace.sequences), heads))
            of_heads.add((place, sequence, head), values)
            by_head[name][:, row] = _mean(of_heads.means, axis=1)
            for number, mine in shown.items():
                by_step[number][name].add((place[mine], step[mine]), values[mine])
    steps = {number: {name: sums.means for name, sums in found.items()} for number, found in by_step.items()}
    return Means(runs, by_head, steps)


class _Sums:
    """Sums and counts of values in the cells of a grid."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.sums, self.counts = (np.zeros(int(np.prod(shape))) for _ in range(2))

    def add(self, where: tuple[NDArray[np.int64], ...], values: Floats) -> None:
        """Add values to cells; NaN is skipped."""
        there = ~np.isnan(values)
        cells = np.ravel_multi_index(where, self.shape)[there]
        self.sums += np.bincount(cells, values[there], len(self.sums))
        self.counts += np.bincount(cells, minlength=len(self.sums))

    @property
    def means(self) -> Floats:
        """Mean of each cell; NaN for an empty one."""
        means = np.full(len(self.sums), np.nan)
        np.divide(self.sums, self.counts, out=means, where=self.counts > 0)
        return means.reshape(self.shape)


def _mean(values: Floats, axis: int) -> Floats:
    """Return means that ignore NaN; NaN where all values are."""
    counts = (~np.isnan(values)).sum(axis)
    means = np.full(counts.shape, np.nan)
    np.divide(np.nansum(values, axis=axis), counts, out=means, where=counts > 0)
    return means
