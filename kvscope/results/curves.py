"""Metrics of a run over the steps of the text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvscope.core.records import LOSSES
from kvscope.results import outcome
from kvscope.results.store import Replay
from kvscope.results.stream import batches

Floats = NDArray[np.float64]
MOST = 1000  # points of a curve: trackers draw no more, and store every one


class Curve(NamedTuple):
    """A metric at steps, in their order.

    Attributes
    ----------
    steps : int64 array ``[N]``
        Query positions; of several that are one point, the last.
    values : float64 array ``[N]``
        The values there, or their mean.
    """

    steps: NDArray[np.int64]
    values: Floats


def curves(replay: Replay, run: int, most: int = MOST) -> dict[str, Curve]:
    """Return every metric of a run by step, and for a closed run the losses of its tokens; read a run at a time.

    A value is the mean over the layers and heads that have one at the step, then over sequences: the mean of the page's
    curves. More than `most` steps become means of as many neighbours as needed. A metric without values is omitted.

    Parameters
    ----------
    replay : Replay
        Where to read.
    run : int
        Number of the run.
    most : int
        Points of a curve at most.
    """
    found = {name: _mean(values, axis=0) for name, values in _by_sequence(replay, run).items()}  # each [T]
    if LOSSES in replay.info.sizes:
        tokens = replay.tokens(run)
        means = tokens.groupby("position")[list(outcome.LOSSES)].mean()
        for name in outcome.LOSSES if len(means) else ():
            found[name] = np.full(means.index.max() + 1, np.nan)
            found[name][means.index] = means[name]
    drawn = {name: _thinned(values, most) for name, values in found.items()}
    return {name: curve for name, curve in drawn.items() if len(curve.steps)}


def _by_sequence(replay: Replay, run: int) -> dict[str, Floats]:
    """Return each metric ``[sequences, T]``, the mean over layers and heads; NaN where no head has a value."""
    metrics = list(replay.info.metrics)
    lengths = [sequence.length for sequence in replay.info.trace.sequences]
    shape = (len(lengths), max(lengths))
    sums, counts = ({name: np.zeros(shape[0] * shape[1]) for name in metrics} for _ in range(2))
    for table in batches(replay, "fidelity", [run], ["run", "sequence", "step", *metrics]):
        cells = table["sequence"].to_numpy().astype(np.int64) * shape[1] + table["step"].to_numpy()
        for name in metrics:
            values = table[name].to_numpy()
            there = ~np.isnan(values)
            sums[name] += np.bincount(cells[there], values[there], len(sums[name]))
            counts[name] += np.bincount(cells[there], minlength=len(sums[name]))
    return {name: _divided(sums[name], counts[name]).reshape(shape) for name in metrics}


def _thinned(values: Floats, most: int) -> Curve:
    """Return the steps that have a value, or at most `most` means of neighbours."""
    steps = np.flatnonzero(~np.isnan(values))
    width = max(1, -(-len(steps) // most))
    starts = np.arange(0, len(steps), width)
    if not len(steps):
        return Curve(steps, values[steps])
    ends = np.minimum(starts + width, len(steps))
    return Curve(steps[ends - 1], np.add.reduceat(values[steps], starts) / (ends - starts))


def _mean(values: Floats, axis: int) -> Floats:
    """Return means that ignore NaN; NaN where all values are."""
    return _divided(np.nansum(values, axis=axis), (~np.isnan(values)).sum(axis))


def _divided(sums: Floats, counts: NDArray[np.int64] | Floats) -> Floats:
    means = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means
