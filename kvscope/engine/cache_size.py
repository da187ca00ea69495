"""The size of a cache in bytes, as a metric: what an evicted and a quantised cache have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvscope.core.cache_scheme import CacheScheme
from kvscope.metrics import Metric
from kvscope.metrics.base import Rows

NAME = "cache_bytes"


def cache_bytes(rows: Rows) -> Tensor:
    """Bytes that each key/value head's cache takes after a step: keys and values held, in 16 bit or as codes.

    Of a quantised cache codes, scales, zero points, outliers and what is still in full precision count: see
    `kvscope.quantisation.layer.QuantisedLayer.bits`. Every query head of a key/value head has that head's number.
    """
    if rows.coded is not None:
        return rows.coded.size
    heads = rows.full.shape[-3] // rows.held.shape[2]
    return (rows.held.sum(-1) * float(rows.key_bytes)).repeat_interleave(heads, dim=2)


CACHE_BYTES = Metric(
    NAME, "none", (0.0, None), None, cache_bytes, summary=(cache_bytes.__doc__ or "").split("\n", 1)[0], unit="bytes"
)


def with_size(metrics: Sequence[Metric], caches: Sequence[CacheScheme | None]) -> list[Metric]:
    """Return metrics, with the size of the cache where caches are named: also of those in 16 bit, to compare with."""
    return [*metrics, CACHE_BYTES] if caches else list(metrics)
