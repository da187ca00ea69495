"""The tails of a metric: loops over sequences, layers, heads and steps; None is no value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Values = Mapping[tuple[int, int], Sequence[Sequence[float | None]]]  # (sequence, layer) -> [head][step]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tails(values: Values) -> dict[str, float]:
    """Return ``share_below_half``, ``worst_step`` and ``worst_head``."""
    below: dict[int, list[float]] = {}
    least: dict[int, list[float]] = {}
    of_head: dict[tuple[int, int], list[float]] = {}
    for (sequence, layer), heads in sorted(values.items()):
        there = {head: [x for x in row if x is not None] for head, row in enumerate(heads)}
        there = {head: row for head, row in there.items() if row}
        if not there:
            continue
        below.setdefault(sequence, []).append(mean([mean([x < 0.5 for x in row]) for row in there.values()]))
        least.setdefault(sequence, []).append(mean([min(row) for row in there.values()]))
        for head, row in there.items():
            of_head.setdefault((layer, head), []).append(mean(row))
    return {
        "share_below_half": mean([mean(layers) for layers in below.values()]),
        "worst_step": mean([mean(layers) for layers in least.values()]),
        "worst_head": min(mean(sequences) for sequences in of_head.values()),
    }
