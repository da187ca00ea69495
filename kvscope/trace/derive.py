"""From recorded vectors to what a trace of maps would hold: rows, their sums, norms, cosines, mean queries.

Everything comes back as float32 and is computed in float64. The order in which a BLAS or a vector unit adds, and the
last digit of its exponentials, then changes a number only where the error of float64 crosses a rounding of float32,
about once in a hundred million numbers: another processor reads the same rows, and decides the same from them.

Where a query sees little of what is computed, little is computed: blocks of queries end at their last key, and begin
where a sliding window does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvscope.trace.record import LayerAttention, TraceHeader
from kvscope.trace.schema import Which

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
KeptKeys = OrderedDict[tuple[int, int], Floats]
Vectors = Callable[[int, int, Which, int, int], Floats]  # sequence, layer, which, start, stop -> [heads, n, D]

BLOCK_QUERIES = 64  # that share their first and last key: at most this much of each row is computed in vain
BLOCK_BYTES = 64 * 2**20  # of queries that are read at a time, or of rows that are made to be summed up
CACHE_BYTES = 2**30  # of keys that are kept for the next block; those of one layer are kept in any case


def attend(query: Floats, key: Floats, first: int, layer: LayerAttention, rows: Floats) -> Floats:
    """Fill in the attention of some queries and return the sum of each row, float32 ``[H, b]``.

    Parameters
    ----------
    query : array
        ``[H, b, D]``, of positions `first` to ``first + b - 1``.
    key : array
        ``[G, >= first + b, D]``, from position 0 on.
    layer : LayerAttention
        How logits become weights.
    rows : array
        ``[H, b, >= first + b]``, zeros; row ``i`` gets its weights on keys ``0..first + i``.
    """
    count, together = query.shape[1], len(query) // len(key)
    sums = np.empty(query.shape[:2], np.float32)
    for start in range(0, count, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, count)
        last = first + stop
        begin = 0 if layer.sliding_window is None else max(0, first + start - layer.sliding_window + 1)
        for group, own in enumerate(key[:, begin:last]):  # one at a time, as float64 takes twice the memory
            heads = slice(group * together, (group + 1) * together)
            block, asking = rows[heads, start:stop, begin:last], query[heads, start:stop].astype(np.float64)
            sinks = None if layer.sinks is None else np.asarray(layer.sinks, np.float64)[heads]
            block[...], sums[heads, start:stop] = _softmax(
                asking, own.astype(np.float64), first + start - begin, layer, sinks
            )
    return sums


def _softmax(
    query: Doubles, key: Doubles, first: int, layer: LayerAttention, sinks: Doubles | None
) -> tuple[Doubles, Doubles]:
    """Return the rows ``[Q, b, n]`` of the query heads of one key/value head, and their sums ``[Q, b]``.

    `first` is the index of the first query's own key, `sinks` the learned sinks of these heads, ``[Q]``.
    """
    (_, count, _), (keys, _) = query.shape, key.shape
    out: Doubles = (query * layer.scaling) @ key.T
    if layer.softcap is not None:
        out /= layer.softcap
        np.tanh(out, out=out)
        out *= layer.softcap
    np.copyto(out[:, :, first:], -np.inf, where=~np.tri(count, keys - first, dtype=bool))
    if layer.sliding_window is not None:
        gone = max(0, first + count - layer.sliding_window)  # keys that some query no longer sees
        np.copyto(out[:, :, :gone], -np.inf, where=np.tri(count, gone, first - layer.sliding_window, dtype=bool))
    peak = out.max(-1, keepdims=True)  # [Q, b, 1]
    if sinks is not None:
        np.maximum(peak, sinks[:, None, None], out=peak)
    out -= peak
    np.exp(out, out=out)
    total = own = out.sum(-1, keepdims=True)
    if sinks is not None:
        total = own + np.exp(sinks[:, None, None] - peak)
    out /= total
    return out, (own / total)[..., 0]


def norms(vectors: Floats, order: int) -> Doubles:
    """Return the L1 or L2 norm of vectors ``[..., D]``."""
    if order == 1:
        return np.asarray(np.abs(vectors).sum(-1, dtype=np.float64))
    return np.asarray(np.sqrt(np.square(vectors, dtype=np.float64).sum(-1)))


def cosines(key: Floats) -> Floats:
    """Return the cosine of every two keys ``[T, D]`` of a head, ``[T, T]``, 1 on the diagonal."""
    unit = key / np.maximum(norms(key, 2), np.finfo(np.float32).tiny)[:, None]
    result = np.clip(unit @ unit.T, -1, 1).astype(np.float32)
    np.fill_diagonal(result, 1)
    return result


class Derived:
    """What follows from the vectors of a trace, block by block.

    Parameters
    ----------
    header : TraceHeader
        Sizes, and how each layer turns logits into weights.
    lengths : sequence of int
        ``T`` of each sequence.
    vectors : callable
        Reads vectors.
    kept : dict
        Keys that were used last, by sequence and layer; of all that is read, only these are needed again and again.
    """

    def __init__(self, header: TraceHeader, lengths: Sequence[int], vectors: Vectors, kept: KeptKeys) -> None:
        self._header, self._lengths, self._vectors, self._kept = header, lengths, vectors, kept

    def attention(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` - 1, ``[H, stop - start, stop]``."""
        rows = np.zeros((self._header.heads, stop - start, stop), np.float32)
        key, how = self._keys(sequence, layer), self._header.attention_of(layer)
        for first, last, query in self._queries(sequence, layer, start, stop, self._header.head_dim):
            attend(query, key, first, how, rows[:, first - start : last - start])
        return rows

    def row_sums(self, sequence: int, layer: int) -> Floats:
        """Return the sum of every row, ``[H, T]``: one but for learned sinks, so only they cost a pass over rows."""
        length, how = self._lengths[sequence], self._header.attention_of(layer)
        sums = np.ones((self._header.heads, length), np.float32)
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
        """Return the cosine of every two keys, ``[G, T, T]``, 1 on the diagonal."""
        return np.stack([cosines(key) for key in self._keys(sequence, layer)])

    def mean_queries(self, sequence: int, layer: int) -> Floats:
        """Return the mean over the query heads, ``[T, D]``."""
        means = np.empty((self._lengths[sequence], self._header.head_dim), np.float32)
        for first, last, query in self._queries(sequence, layer, 0, len(means), self._header.head_dim):
            means[first:last] = query.mean(0, dtype=np.float64)
        return means

    def _queries(
        self, sequence: int, layer: int, start: int, stop: int, width: int
    ) -> Iterator[tuple[int, int, Floats]]:
        """Yield first and last position and queries of blocks whose ``H`` rows of `width` numbers fit `BLOCK_BYTES`."""
        size = max(1, BLOCK_BYTES // (4 * self._header.heads * width))
        for first in range(start, stop, size):
            last = min(first + size, stop)
            yield first, last, self._vectors(sequence, layer, "queries", first, last)

    def _keys(self, sequence: int, layer: int) -> Floats:
        """Return all keys of a layer, which stay in memory until others take their place."""
        if (sequence, layer) not in self._kept:
            self._kept[sequence, layer] = self._vectors(sequence, layer, "keys", 0, self._lengths[sequence])
            while len(self._kept) > 1 and sum(key.nbytes for key in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((sequence, layer))
        return self._kept[sequence, layer]
