"""Which recorded layers read the cache of an earlier one, and so follow one decision."""

from __future__ import annotations

from kvscope.trace.record import TraceHeader


def owner_of(header: TraceHeader, layer: int) -> int:
    """Return the layer whose cache a layer reads: itself, unless it reads that of an earlier one."""
    return header.shared_cache.get(str(layer), layer)


def caches_of(header: TraceHeader) -> dict[int, list[int]]:
    """Return for each cache, by the layer that owns it, the recorded layers that read it, in order."""
    readers: dict[int, list[int]] = {}
    for layer in header.layers:
        readers.setdefault(owner_of(header, layer), []).append(layer)
    return readers
