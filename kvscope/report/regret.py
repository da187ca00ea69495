"""Regret: which evictions cost most attention, and which later query missed each of those keys most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvscope.report.attended import Attended, heaviest
from kvscope.trace.reader import Trace


class Eviction(NamedTuple):
    """One key that was let go.

    ``mass`` is the attention it would still have received, ``missed`` the later query with the largest share of it,
    ``weight`` that share; ``gone`` is the first step without the key.
    """

    layer: int
    head: int
    key: int
    gone: int
    mass: float
    missed: int
    weight: float


def worst_evictions(
    trace: Trace, sequence: int, layers: Mapping[int, Attended], runs: Sequence[str], most: int
) -> dict[str, list[Eviction]]:
    """Return the evictions of each run with the most regret, the worst first; of equal ones the first layer."""
    found = {run: _of_run(layers, run, most) for run in runs}
    missed: dict[tuple[int, int, int, int], tuple[int, float]] = {}
    for layer in layers:
        asked = sorted({each[1:4] for evictions in found.values() for each in evictions if each.layer == layer})
        steps = heaviest(trace, sequence, layer, asked) if asked else []
        missed |= {(layer, *where): step for where, step in zip(asked, steps, strict=True)}
    return {run: [Eviction(*each[:5], *missed[each[:4]]) for each in evictions] for run, evictions in found.items()}


def _of_run(layers: Mapping[int, Attended], run: str, most: int) -> list[Eviction]:
    found = []
    for layer, attended in sorted(layers.items()):
        losses = attended.losses.get(run)
        if losses is None:
            continue
        for at in np.argsort(-losses.mass, kind="stable")[:most]:
            if losses.mass[at] > 0:
                where = (int(losses.head[at]), int(losses.key[at]), int(losses.start[at]))
                found.append(Eviction(layer, *where, float(losses.mass[at]), -1, 0.0))
    return sorted(found, key=lambda each: -each.mass)[:most]
