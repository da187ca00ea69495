"""Encoding of residency intervals in a page."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvscope.core.json import Json, JsonDict
from kvscope.core.residency import ResidencyIntervals
from kvscope.report.encoding import packed, packed_bytes


def packed_intervals(intervals: ResidencyIntervals) -> JsonDict:
    """Return residency intervals as plain data of packed integers.

    If every key has one interval, only ``leave`` is stored, head by head and key by key. Otherwise ``counts`` is the
    number of intervals of each head, with their ``key``, ``enter`` and ``leave``. If all heads are equal, one is
    stored; ``stored`` is the number of heads that are.
    """
    own = intervals.ordered
    counts = np.bincount(own.kv_head, minlength=own.heads)
    columns = {"key": own.key, "enter": own.enter, "leave": own.leave}
    if (counts == counts[0]).all():
        parts = {name: column.reshape(own.heads, -1) for name, column in columns.items()}
        if all((part == part[0]).all() for part in parts.values()):
            columns, counts = {name: part[0] for name, part in parts.items()}, counts[:1]
    if own.one_per_key:
        columns = {"leave": columns["leave"]}
    return {
        "heads": own.heads,
        "stored": len(counts),
        "counts": None if own.one_per_key else counts.tolist(),
        **{name: packed(column) for name, column in columns.items()},
    }


def packed_intervals_bytes(value: Mapping[str, Json]) -> int:
    """Return the size of packed intervals in the page."""
    return sum(packed_bytes(part) for part in value.values() if isinstance(part, Mapping))
