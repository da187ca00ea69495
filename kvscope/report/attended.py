"""Recorded attention per key: how much each key received, and how much it would have received while evicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvscope.core.residency import Absences, ResidencyIntervals
from kvscope.trace.reader import Trace

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
_NONE = np.zeros(0, np.int64)
BLOCK = 2**24  # number of weights of a layer in memory at once


@dataclass(frozen=True)
class Losses:
    """Absences of keys, and the full-cache attention on the key during each; one element per absence.

    Attributes
    ----------
    head, key, start, until : array
        Key/value head, position of the key, first step after which it is not held, and the step after which it is held
        again: ``T`` if it never is.
    mass : array
        Sum of the key's weight in the rows that could not see it, mean over the query heads of the group.
    """

    head: Whole
    key: Whole
    start: Whole
    until: Whole
    mass: Floats


@dataclass(frozen=True)
class Attended:
    """One layer of one sequence.

    Attributes
    ----------
    received : array
        Sum of the weights that each key received from its own position on, mean over the group, ``[G, T]``.
    losses : dict of str to Losses
        By the name of the residency intervals that they are of.
    """

    received: Floats
    losses: dict[str, Losses]


def attended(trace: Trace, sequence: int, layer: int, residency: Mapping[str, ResidencyIntervals]) -> Attended:
    """Return what keys received and what was lost, reading every row of the layer once."""
    length = trace.sequences[sequence].length
    absent = {run: intervals.absences() for run, intervals in residency.items()}
    requests = [_sums_at(each, length) for each in absent.values()]
    steps, heads, keys = (np.concatenate(parts) for parts in zip(*requests, strict=True)) if requests else [_NONE] * 3
    found = np.zeros(len(steps))
    order = np.argsort(steps, kind="stable")
    ordered = steps[order]
    total = np.zeros((trace.heads_of(layer).kv_heads, length))
    for first, rows in _blocks(trace, sequence, layer):
        stop = first + rows.shape[1]
        since = first
        for step in np.unique(np.append(ordered[slice(*np.searchsorted(ordered, [first, stop]))], stop - 1)):
            total[:, :stop] += rows[:, since - first : step + 1 - first].sum(axis=1, dtype=np.float64)
            since = step + 1
            these = order[slice(*np.searchsorted(ordered, [step, step + 1]))]
            found[these] = total[heads[these], keys[these]]
    losses, at = {}, 0
    for run, each in absent.items():
        count = len(each.key)
        before, after = found[at : at + count], found[at + count : at + 2 * count]
        losses[run] = Losses(each.head, each.key, each.start, each.until, after - before)
        at += 2 * count
    return Attended(total, losses)


def heaviest(
    trace: Trace, sequence: int, layer: int, gaps: Sequence[tuple[int, int, int, int]]
) -> list[tuple[int, float]]:
    """Return for each (key/value head, key, step, step) the query between the steps with the largest weight on the key.

    A key that is evicted after one step and held again after another is missing for the queries from the first step + 1
    to the second. The query is -1 where none attended to the key.
    """
    best = [(-1, 0.0)] * len(gaps)
    first = min((gone for _, _, gone, _ in gaps), default=0) + 1  # after a full prefill, this skips the prompt
    for start, rows in _blocks(trace, sequence, layer, first):
        for place, (head, key, gone, back) in enumerate(gaps):
            later, stop = max(gone + 1 - start, 0), min(back + 1 - start, rows.shape[1])
            if later >= stop or key >= rows.shape[2]:
                continue
            column = rows[head, later:stop, key]
            at = int(column.argmax())
            if column[at] > best[place][1]:
                best[place] = (start + later + at, float(column[at]))
    return best


def _sums_at(absences: Absences, length: int) -> tuple[Whole, Whole, Whole]:
    """Return where sums are needed: after the first step without the key, then after the last query without it."""
    steps = np.concatenate([absences.start, np.minimum(absences.until, length - 1)])
    return steps, np.tile(absences.head, 2), np.tile(absences.key, 2)


def _blocks(trace: Trace, sequence: int, layer: int, first: int = 0) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the first step and the rows of the key/value heads, ``[G, b, n]``, block by block from `first` on."""
    length = trace.sequences[sequence].length
    own = trace.heads_of(layer)
    size = max(8, BLOCK // (own.heads * length))
    for start in range(first, length, size):
        rows = trace.attention(sequence, layer, start, min(start + size, length))  # [H, b, n]
        alone = own.heads == own.kv_heads
        yield start, rows if alone else rows.reshape(own.kv_heads, -1, *rows.shape[1:]).mean(axis=1)
