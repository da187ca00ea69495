"""Rebuild whole rows from the heaviest keys of every row and sums of columns (store ``topk``).

The trace contains the residual of each row, its mass on keys that are not stored, and, over a stretch of rows, the sum
of what each key received from residuals. The residual of a row is divided among keys in proportion to these sums, so
that sums over many rows, on which most policies decide, are nearly exact. A rebuilt weight is always below the smallest
stored weight of its row, so the heaviest keys of a row are the recorded ones.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvscope.trace.blocks import Array, are_weights
from kvscope.trace.cache import Cache
from kvscope.trace.columns import layer_file
from kvscope.trace.derive import CACHE_BYTES, Floats
from kvscope.trace.files import TraceFiles
from kvscope.trace.record import TraceHeader
from kvscope.trace.row_checks import faults_of_sums, faults_of_weights, misplaced
from kvscope.trace.stretches import stretches

Ints = NDArray[np.integer]
KeptRates = Cache[tuple[int, int, int]]
NOISE = 1e-3  # by which a sum of columns may be below 0 where it is a difference of two sums
LEAST = 1e-30  # below this residual mass, the rate of a key is 0


class Top(NamedTuple):
    """Stored weights of some rows, ``[N]`` each, and each row's residual and smallest stored weight, ``[H, q]``."""

    head: Ints
    query: Ints
    key: Ints
    weight: Floats
    residual: Floats
    least: Floats


class Rebuilt:
    """Rebuilds rows of store ``topk``, block by block.

    Parameters
    ----------
    header : TraceHeader
        Sizes and windows.
    lengths : list of tuple
        ``P`` and ``T`` of each sequence.
    files : TraceFiles
        Files of the trace.
    kept : Cache
        Rates by sequence, layer and end of the stretch.
    """

    def __init__(self, header: TraceHeader, lengths: list[tuple[int, int]], files: TraceFiles, kept: KeptRates) -> None:
        self._header, self._lengths, self._files, self._kept = header, lengths, files, kept

    def attention(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` - 1, ``[H, stop - start, stop]``."""
        rows = np.zeros((self._header.heads_of(layer).heads, stop - start, stop), np.float32)
        ends = stretches(*self._lengths[sequence])
        first = start
        while first < stop:
            number = bisect_right(ends, first)
            begin, end = ends[number - 1] if number else 0, ends[number]
            last = min(end, stop)
            rate = self._rate(sequence, layer, begin, end)
            block = rows[:, first - start : last - start, :last]
            _fill(block, first, rate, self.top(sequence, layer, first, last), self._window(layer))
            first = last
        return rows

    def top(self, sequence: int, layer: int, start: int, stop: int) -> Top:
        """Return the stored weights of rows `start` to `stop` - 1; raises TraceError if a row is not as recorded."""
        name = layer_file("topk", layer)
        names = ["head", "position", "row_sum", "residual", "keys", "weights"]
        table = self._files.rows(name, sequence, start, stop, names)
        position = table["position"].to_numpy()
        table = table.filter(pa.array((position >= start) & (position < stop))).combine_chunks()
        head, position = table["head"].to_numpy(), table["position"].to_numpy()
        fault = misplaced(head, position, self._header.heads_of(layer).heads, np.arange(start, stop))
        if fault is not None:
            raise self._files.damaged(name, fault)
        lists, keys = table["weights"].chunk(0), table["keys"].chunk(0)
        lengths = np.diff(lists.offsets.to_numpy())
        weight = lists.flatten().to_numpy(zero_copy_only=False)
        key, query = keys.flatten().to_numpy(), position - start
        starts = np.cumsum(lengths) - lengths
        fault = self._fault(position, lengths, np.diff(keys.offsets.to_numpy()), key, weight) or _fault_of_sums(
            np.add.reduceat(weight, starts, dtype=np.float32), table, lengths, self._header.learned_sinks
        )
        if fault is not None:
            raise self._files.damaged(name, fault)
        weight = weight.astype(np.float32)
        residual, least = np.zeros((2, self._header.heads_of(layer).heads, stop - start), np.float32)
        residual[head, query] = table["residual"].to_numpy()
        least[head, query] = np.minimum.reduceat(weight, starts)
        return Top(np.repeat(head, lengths), np.repeat(query, lengths), key, weight, residual, least)

    def _fault(self, position: Ints, lengths: Ints, keys: Ints, key: Ints, weight: Array) -> str | None:
        """Return what is wrong with the keys and weights of rows, None if nothing is."""
        most = self._header.top or 0
        if not (np.array_equal(lengths, keys) and np.array_equal(lengths, np.minimum(position + 1, most))):
            return "a row has not as many numbers as it must have"
        if not are_weights(weight):
            return "a weight is negative or not finite"
        ascends = np.diff(key, prepend=-1) > 0
        ascends[np.cumsum(lengths) - lengths] = True  # the first key of a row follows none
        if not (ascends.all() and (key >= 0).all() and (key <= np.repeat(position, lengths)).all()):
            return "the keys of a row are not ascending positions up to its own"
        return None

    def _rate(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        """Return the mass of each key per unit of residual, in rows that see but do not store it, ``[H, stop]``."""
        return self._kept.get(
            (sequence, layer, stop), lambda: self._computed_rate(sequence, layer, start, stop), CACHE_BYTES
        )

    def _computed_rate(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        heads, count = self._header.heads_of(layer).heads, stop - start
        top = self.top(sequence, layer, start, stop)
        residual = top.residual.astype(np.float64)
        before = np.zeros((heads, count + 1))  # sum of the residuals of the rows before each row
        np.cumsum(residual, axis=1, out=before[:, 1:])
        key, window = np.arange(stop), self._window(layer)
        first = np.clip(key - start, 0, count)  # first row that sees the key
        last = np.full(stop, count) if window is None else np.clip(key + window - start, 0, count)  # exclusive
        mass = before[:, last] - before[:, first]  # residual of the rows that see each key, [H, stop]
        stored = np.bincount(top.head * stop + top.key, residual[top.head, top.query], heads * stop)
        mass -= stored.reshape(heads, stop)  # without rows that store the key
        outside = self._outside(sequence, layer, stop)
        return np.where(mass > LEAST, outside / np.maximum(mass, LEAST), 0).astype(np.float32)

    def _outside(self, sequence: int, layer: int, stop: int) -> Floats:
        """Return the column sums of residuals in the stretch that ends before row `stop`, ``[H, stop]``."""
        name = layer_file("columns", layer)
        table = self._files.rows(name, sequence, stop - 1, stop, ["head", "position", "outside"])
        table = table.filter(pa.array(table["position"].to_numpy() == stop - 1)).combine_chunks()
        head = table["head"].to_numpy()
        if not np.array_equal(np.sort(head), np.arange(self._header.heads_of(layer).heads)):
            where = f"sequence {sequence}, layer {layer}"
            raise self._files.damaged(name, f"it lacks the sums of columns up to position {stop - 1} of {where}")
        sums = table["outside"].chunk(0).flatten().to_numpy()
        if len(sums) != len(head) * stop or not (np.isfinite(sums) & (sums >= -NOISE)).all():
            raise self._files.damaged(name, f"the sums of columns up to position {stop - 1} are not {stop} sums each")
        outside = np.zeros((self._header.heads_of(layer).heads, stop), np.float32)
        outside[head] = sums.reshape(-1, stop)
        return outside

    def _window(self, layer: int) -> int | None:
        return self._header.sliding_window[self._header.layers.index(layer)]


def _fault_of_sums(stored: Floats, table: pa.Table, lengths: Ints, learned_sinks: bool) -> str | None:
    """Return what is wrong with the sums of rows of which `stored` are the stored weights, None if nothing is."""
    recorded, residual = (table[name].to_numpy() for name in ("row_sum", "residual"))
    faults = {
        "has a residual that is negative or not finite": ~(np.isfinite(residual) & (residual >= 0)),
        "has another sum than was recorded": faults_of_weights(stored + residual, recorded, lengths),
        **faults_of_sums(recorded, learned_sinks),
    }
    for what, where in faults.items():
        if where.any():
            return f"a row of position {table['position'].to_numpy()[int(where.argmax())]} {what}"
    return None


def _fill(rows: Floats, first: int, rate: Floats, top: Top, window: int | None) -> None:
    """Fill `rows` ``[H, q, n]`` with the rebuilt rows of positions from `first` on."""
    count, n = rows.shape[1:]
    key, position = np.arange(n), np.arange(first, first + count)[:, None]
    unseen = key > position
    if window is not None:
        unseen |= key <= position - window
    rows[:] = rate[:, None, :n]
    np.copyto(rows, 0, where=unseen)
    rows[top.head, top.query, top.key] = 0
    total = rows.sum(-1, dtype=np.float64)  # float64, so that a row does not depend on the width of its block
    rows *= (top.residual / np.where(total > 0, total, 1)).astype(np.float32)[..., None]
    np.minimum(rows, np.nextafter(top.least, np.float32(0))[..., None], out=rows)
    rows[top.head, top.query, top.key] = top.weight
