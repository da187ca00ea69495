"""Regret: the evictions that lost most attention, and the later query that missed each of these keys most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvscope.report.attended import Attended, heaviest
from kvscope.trace.reader import Trace


class Eviction(NamedTuple):
    """One eviction of one key.

    ``gone`` is the first step after which the key is not held, ``back`` the step after which it is held again: ``T`` if
    it never is. ``mass`` is the full-cache attention on the key between the two, ``missed`` the query with the largest
    part of it, ``weight`` that part.
    """

    layer: int
    head: int
    key: int
    gone: int
    back: int
    mass: float
    missed: int
    weight: float


def worst_evictions(
    trace: Trace, sequence: int, layers: Mapping[int, Attended], runs: Sequence[str], most: int
) -> dict[str, list[Eviction]]:
    """Return the evictions of each run with the most regret, the worst first; of equal ones that of the first layer."""
    found = {run: _of_run(layers, run, most) for run in runs}
    missed: dict[tuple[int, ...], tuple[int, float]] = {}
    for layer in layers:
        gaps = sorted({each[1:5] for evictions in found.values() for each in evictions if each.layer == layer})
        steps = heaviest(trace, sequence, layer, gaps) if gaps else []
        missed |= {(layer, *where): step for where, step in zip(gaps, steps, strict=True)}
    return {run: [Eviction(*each[:6], *missed[each[:5]]) for each in evictions] for run, evictions in found.items()}


def _of_run(layers: Mapping[int, Attended], run: str, most: int) -> list[Eviction]:
    found = []
    for layer, attended in sorted(layers.items()):
        losses = attended.losses.get(run)
        if losses is None:
            continue
        for at in np.argsort(-losses.mass, kind="stable")[:most]:
            if losses.mass[at] > 0:
                head, key, gone, back = (
                    int(each[at]) for each in (losses.head, losses.key, losses.start, losses.until)
                )
                found.append(Eviction(layer, head, key, gone, back, float(losses.mass[at]), -1, 0.0))
    return sorted(found, key=lambda each: -each.mass)[:most]
