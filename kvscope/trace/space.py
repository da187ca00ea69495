"""Estimate the size of a trace, and check that the disk has enough space."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kvscope.core.errors import TraceError
from kvscope.core.output import size
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.schema import MAPS, STORES, STRETCH, TOP, TOPK, VECTORS


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, or of its nearest parent that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: Path, needed: int) -> None:
    """Raise TraceError if the disk of `path` has fewer than `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise TraceError(
            f"the trace needs about {size(needed)}, and the disk of {path} has {size(free)} free",
            "Write to another disk (--output), or record less: vectors alone (--store qkv), the heaviest keys (--store "
            "topk), fewer layers (--layers) or a shorter prompt.",
        )


def estimate_bytes(
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: Sequence[int],
    stored: Collection[str] = STORES[MAPS],
    number_bytes: float = 4,
    hidden: int = 0,
    top: int = TOP,
    query_stride: int = 1,
) -> int:
    """Return the estimated bytes of a trace on disk.

    Parameters
    ----------
    layers, heads, kv_heads, head_dim : int
        Recorded layers, ``H``, ``G`` and ``D``.
    lengths : sequence of int
        ``T`` of each sequence.
    stored : collection of str
        Stored signals, as in the header.
    number_bytes : float
        Bytes of one number of a vector on disk: about 2 for models of 16 bit.
    hidden : int
        Size of a layer input, if these are stored.
    top, query_stride : int
        As in the header.
    """
    vectors = [name for name in VECTORS if f"vectors:{name}" in stored]
    numbers = sum(head_dim * (heads if name == "queries" else kv_heads) for name in vectors)
    norms = {"value_l1", "value_l2", "key_l2", "similarity"} & set(stored)
    total = 0.0
    for length in lengths:
        pairs = length * (length + 1) // 2
        total += layers * heads * (2 * pairs + 24 * length) / query_stride if "maps" in stored else 0
        total += layers * heads * _topk_bytes(length, top) if TOPK in stored else 0
        total += layers * kv_heads * (28 * length + (2 * pairs if "similarity" in stored else 0)) if norms else 0
        total += layers * length * (4 * head_dim + 12) if "queries" in stored else 0
        total += layers * length * (number_bytes * numbers + 12) if vectors else 0
        total += layers * length * (number_bytes * hidden + 12) if "hidden" in stored else 0
        total += layers * kv_heads * 20 * length if "value_out_l1" in stored else 0
        total += layers * kv_heads * 20 * length if "reconstruction" in stored else 0
        total += 32 * length
    return int(total) + 4096 * (1 + 3 * layers)


def estimate_layers(layers: Sequence[LayerHeads], *, lengths: Sequence[int], **rest: Any) -> int:
    """Return the estimated bytes of a trace whose layers may differ in their heads; `rest` as `estimate_bytes`."""
    shared = estimate_bytes(layers=0, heads=1, kv_heads=1, head_dim=1, lengths=lengths, **rest)
    parts = [
        estimate_bytes(
            layers=count, heads=own.heads, kv_heads=own.kv_heads, head_dim=own.head_dim, lengths=lengths, **rest
        )
        for own, count in Counter(layers).items()
    ]
    return shared + sum(part - shared for part in parts)


def _topk_bytes(length: int, top: int) -> float:
    """Return the estimated bytes of a head: per weight 2 and 1 for its position, per column 4 for each of two sums."""
    kept = sum(min(top, position + 1) for position in range(length))
    return 3 * kept + 16 * length + 8 * length * (length / STRETCH + 1) / 2
