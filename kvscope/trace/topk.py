"""Rebuild whole rows from the heaviest keys of every row and sums of columns (store ``topk``).

The trace contains the residual of each row, its mass on keys that are not stored, and, over a stretch of rows, the sum
of what each key received from residuals. The residual of a row is divided among keys in proportion to these sums, so
that sums over many rows, on which most policies decide, are nearly exact. A rebuilt weight is always below the smallest
stored weight of its row, so the heaviest keys of a row are the recorded ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvscope.core.errors import TraceError
from kvscope.trace.columns import layer_file
from kvscope.trace.derive import CACHE_BYTES, Floats
from kvscope.trace.record import TraceHeader
from kvscope.trace.schema import STRETCH

Ints = NDArray[np.integer]
Read = Callable[[str, int, int, int, list[str]], pa.Table]  # file, sequence, start, stop, columns; may return more rows
KeptRates = OrderedDict[tuple[int, int, int], Floats]
LEAST = 1e-30  # below this residual mass, the rate of a key is 0


def stretches(prompt: int, length: int) -> list[int]:
    """Return the ends (exclusive) of the stretches of rows over which columns are summed."""
    return sorted({*range(STRETCH, length, STRETCH), prompt, length})


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
    read : callable
        Reads rows of a file.
    kept : dict
        Cache of rates by sequence, layer and end of the stretch, least recently used first.
    """

    def __init__(self, header: TraceHeader, lengths: list[tuple[int, int]], read: Read, kept: KeptRates) -> None:
        self._header, self._lengths, self._read, self._kept = header, lengths, read, kept

    def attention(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` - 1, ``[H, stop - start, stop]``."""
        rows = np.zeros((self._header.heads, stop - start, stop), np.float32)
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
        """Return the stored weights of rows `start` to `stop` - 1."""
        names = ["head", "position", "residual", "keys", "weights"]
        table = self._read(layer_file("topk", layer), sequence, start, stop, names)
        position = table["position"].to_numpy()
        table = table.filter(pa.array((position >= start) & (position < stop))).combine_chunks()
        head, query = table["head"].to_numpy(), table["position"].to_numpy() - start
        lists = table["weights"].chunk(0)
        lengths = np.diff(lists.offsets.to_numpy())
        weight = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        residual, least = np.zeros((2, self._header.heads, stop - start), np.float32)
        residual[head, query] = table["residual"].to_numpy()
        least[head, query] = np.minimum.reduceat(weight, np.cumsum(lengths) - lengths)
        key = table["keys"].chunk(0).flatten().to_numpy()
        return Top(np.repeat(head, lengths), np.repeat(query, lengths), key, weight, residual, least)

    def _rate(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        """Return the mass of each key per unit of residual, in rows that see but do not store it, ``[H, stop]``."""
        if (sequence, layer, stop) not in self._kept:
            self._kept[sequence, layer, stop] = self._computed_rate(sequence, layer, start, stop)
            while len(self._kept) > 1 and sum(rate.nbytes for rate in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((sequence, layer, stop))
        return self._kept[sequence, layer, stop]

    def _computed_rate(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        heads, count = self._header.heads, stop - start
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
        table = self._read(layer_file("columns", layer), sequence, stop - 1, stop, ["head", "position", "outside"])
        table = table.filter(pa.array(table["position"].to_numpy() == stop - 1)).combine_chunks()
        if table.num_rows < self._header.heads:
            raise TraceError(
                f"a trace of store topk lacks the sums of columns up to position {stop - 1} of sequence {sequence}, "
                f"layer {layer}",
                "Record it again.",
            )
        outside = np.zeros((self._header.heads, stop), np.float32)
        outside[table["head"].to_numpy()] = table["outside"].chunk(0).flatten().to_numpy().reshape(-1, stop)
        return outside

    def _window(self, layer: int) -> int | None:
        return self._header.sliding_window[self._header.layers.index(layer)]


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
