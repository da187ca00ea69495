"""Recompute from recorded vectors what a trace of store maps contains: rows, their sums, norms, cosines, mean queries.

Results are float32, computed in float64. The order in which a BLAS adds, or the last digit of an exponential, then
changes a result only where the error of float64 crosses a rounding boundary of float32, about once in a hundred million
numbers. So other processors get the same rows, and policies make the same decisions.

Only keys that some query of a block sees are computed: from the start of the sliding window to the last query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvscope.trace.cache import Cache
from kvscope.trace.layer_records import LayerAttention
from kvscope.trace.record import TraceHeader
from kvscope.trace.schema import Which

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
KeptKeys = Cache[tuple[int, int]]
Vectors = Callable[[int, int, Which, int, int], Floats]  # sequence, layer, which, start, stop -> [heads, n, D]

BLOCK_QUERIES = 64  # queries computed together; at most this many numbers of a row are computed and masked
BLOCK_BYTES = 64 * 2**20  # bytes of queries read at a time, or of rows computed to be summed
CACHE_BYTES = 2**30  # limit on the bytes of cached keys; the keys of the last used layer are cached in any case


def attend(query: Floats, key: Floats, first: int, layer: LayerAttention, rows: Floats) -> Floats:
    """Write the attention of some queries into `rows`, and return the sum of each row, float32 ``[H, b]``.

    Parameters
    ----------
    query : array
        ``[H, b, D]``, queries of positions `first` to ``first + b - 1``.
    key : array
        ``[G, >= first + b, D]``, keys from position 0 on.
    layer : LayerAttention
        How the layer turns logits into weights.
    rows : array
        Zeros ``[H, b, >= first + b]``; row ``i`` is filled with the weights on keys ``0..first + i``.
    """
    count, group_size = query.shape[1], len(query) // len(key)
    sums = np.empty(query.shape[:2], np.float32)
    for start in range(0, count, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, count)
        last = first + stop
        begin = 0 if layer.sliding_window is None else max(0, first + start - layer.sliding_window + 1)
        for group, visible in enumerate(key[:, begin:last]):  # one at a time, as float64 takes twice the memory
            heads = slice(group * group_size, (group + 1) * group_size)
            block, queries = rows[heads, start:stop, begin:last], query[heads, start:stop].astype(np.float64)
            sinks = None if layer.sinks is None else np.asarray(layer.sinks, np.float64)[heads]
            block[...], sums[heads, start:stop] = _softmax(
                queries, visible.astype(np.float64), first + start - begin, layer, sinks
            )
    return sums


def _softmax(
    query: Doubles, key: Doubles, first: int, layer: LayerAttention, sinks: Doubles | None
) -> tuple[Doubles, Doubles]:
    """Return the rows ``[Q, b, n]`` of the query heads of one key/value head, and their sums ``[Q, b]``.

    `first` is the index of the first query's key, `sinks` the learned sinks of these heads, ``[Q]``.
    """
    (_, count, _), (keys, _) = query.shape, key.shape
    out: Doubles = (query * layer.scaling) @ key.T
    if layer.softcap is not None:
        out /= layer.softcap
        np.tanh(out, out=out)
        out *= layer.softcap
    np.copyto(out[:, :, first:], -np.inf, where=~np.tri(count, keys - first, dtype=bool))
    if layer.sliding_window is not None:
        outside = max(0, first + count - layer.sliding_window)  # keys that are outside the window of some query
        hidden = np.tri(count, outside, first - layer.sliding_window, dtype=bool)
        np.copyto(out[:, :, :outside], -np.inf, where=hidden)
    peak = out.max(-1, keepdims=True)  # [Q, b, 1]
    if sinks is not None:
        np.maximum(peak, sinks[:, None, None], out=peak)
    out -= peak
    np.exp(out, out=out)
    total = on_keys = out.sum(-1, keepdims=True)
    if sinks is not None:
        total = on_keys + np.exp(sinks[:, None, None] - peak)
    out /= total
    return out, (on_keys / total)[..., 0]


def norms(vectors: Floats, order: int) -> Doubles:
    """Return the L1 or L2 norm of vectors ``[..., D]``."""
    if order == 1:
        return np.asarray(np.abs(vectors).sum(-1, dtype=np.float64))
    return np.asarray(np.sqrt(np.square(vectors, dtype=np.float64).sum(-1)))


def cosines(key: Floats) -> Floats:
    """Return the cosines of all pairs of keys ``[T, D]`` of a head, ``[T, T]``, 1 on the diagonal."""
    unit = key / np.maximum(norms(key, 2), np.finfo(np.float32).tiny)[:, None]
    result = np.clip(unit @ unit.T, -1, 1).astype(np.float32)
    np.fill_diagonal(result, 1)
    return result


class Derived:
    """Recomputes signals from the vectors of a trace, block by block.

    Parameters
    ----------
    header : TraceHeader
        Sizes, and how each layer turns logits into weights.
    lengths : sequence of int
        ``T`` of each sequence.
    vectors : callable
        Reads vectors from the trace.
    kept : Cache
        Keys by sequence and layer; every block of queries needs them.
    """

    def __init__(self, header: TraceHeader, lengths: Sequence[int], vectors: Vectors, kept: KeptKeys) -> None:
        self._header, self._lengths, self._vectors, self._kept = header, lengths, vectors, kept

    def attention(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` - 1, ``[H, stop - start, stop]``."""
        rows = np.zeros((self._header.heads_of(layer).heads, stop - start, stop), np.float32)
        key, how = self._keys(sequence, layer), self._header.attention_of(layer)
        for first, last, query in self._queries(sequence, layer, start, stop, self._header.heads_of(layer).head_dim):
            attend(query, key, first, how, rows[:, first - start : last - start])
        return rows

    def row_sums(self, sequence: int, layer: int) -> Floats:
        """Return the sum of every row, ``[H, T]``; without learned sinks all are 1, and no row is computed."""
        length, how = self._lengths[sequence], self._header.attention_of(layer)
        sums = np.ones((self._header.heads_of(layer).heads, length), np.float32)
        if how.sinks is None:
            return sums
        key = self._keys(sequence, layer)
        for first, last, query in self._queries(sequence, layer, 0, length, length):
            rows = np.empty((len(sums), last - first, last), np.float32)
            sums[:, first:last] = attend(query, key, first, how, rows)
        return sums

    def norms(self, column: str, sequence: int, layer: int) -> Floats:
        """Return ``value_l1``, ``value_l2`` or ``key_l2``, ``[G, T]``."""
        which: Which = "keys" if column.startswith("key") else "values"
        vectors = self._vectors(sequence, layer, which, 0, self._lengths[sequence])
        return norms(vectors, 1 if column.endswith("l1") else 2).astype(np.float32)

    def similarity(self, sequence: int, layer: int) -> Floats:
        """Return the cosines of all pairs of keys, ``[G, T, T]``, 1 on the diagonal."""
        return np.stack([cosines(key) for key in self._keys(sequence, layer)])

    def mean_queries(self, sequence: int, layer: int) -> Floats:
        """Return the mean query over the query heads, ``[T, D]``."""
        means = np.empty((self._lengths[sequence], self._header.heads_of(layer).head_dim), np.float32)
        for first, last, query in self._queries(sequence, layer, 0, *means.shape):
            means[first:last] = query.mean(0, dtype=np.float64)
        return means

    def _queries(
        self, sequence: int, layer: int, start: int, stop: int, width: int
    ) -> Iterator[tuple[int, int, Floats]]:
        """Yield start, stop and queries of blocks whose ``H`` rows of `width` numbers fit in `BLOCK_BYTES`."""
        size = max(1, BLOCK_BYTES // (4 * self._header.heads_of(layer).heads * width))
        for first in range(start, stop, size):
            last = min(first + size, stop)
            yield first, last, self._vectors(sequence, layer, "queries", first, last)

    def _keys(self, sequence: int, layer: int) -> Floats:
        """Return all keys of a layer, from the cache if they are in it."""
        length = self._lengths[sequence]
        return self._kept.get((sequence, layer), lambda: self._vectors(sequence, layer, "keys", 0, length), CACHE_BYTES)
