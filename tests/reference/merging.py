"""Merging on eviction by hand: rules over numbers in lists and dictionaries by position, one head at a time.

Written from docs/merging.md. Nothing of `kvscope.merging` is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvscope.core.merge_scheme import MergeScheme

Vector = list[float]


@dataclass
class Head:
    """What a head holds: keys and values by position, and the attention that each key has received."""

    key: dict[int, Vector] = field(default_factory=dict)
    value: dict[int, Vector] = field(default_factory=dict)
    mass: dict[int, float] = field(default_factory=dict)

    def add(self, position: int, key: Vector, value: Vector) -> None:
        self.key[position], self.value[position], self.mass[position] = key, value, 0.0

    def keep(self, held: set[int]) -> None:
        for part in (self.key, self.value, self.mass):
            for position in set(part) - held:
                del part[position]


@dataclass
class Merging:
    """A rule, for the heads of one layer; `draws` are the numbers of each head and position."""

    scheme: MergeScheme
    draws: Sequence[Sequence[float]] = ()
    threshold: float | None = None

    def merge(self, heads: Sequence[Head], stays: Sequence[set[int]]) -> None:
        """Add what each head evicts to what stays; the evicted keys are still there afterwards."""
        if self.scheme.kind == "d2o":
            self._d2o(heads, stays)
            return
        for number, (head, kept) in enumerate(zip(heads, stays, strict=True)):
            if self.scheme.kind == "cam":
                self._cam(head, kept, self.draws[number])
            else:
                self._kvmerger(head, kept)

    def _cam(self, head: Head, stays: set[int], draws: Sequence[float]) -> None:
        before = {position: list(value) for position, value in head.value.items()}
        for evicted in sorted(set(head.key) - stays):
            following = [position for position in sorted(stays) if position > evicted][: self.scheme.tokens]
            mean = sum(head.mass[position] for position in following) / len(following) if following else 0.0
            usual = max(head.mass.values()) if self.scheme.chance == "max" else mean
            chance = min(1.0, head.mass[evicted] / usual) if usual else float(head.mass[evicted] > 0)
            if draws[evicted] < chance:
                for position in following:
                    head.value[position] = [
                        own + part / len(following)
                        for own, part in zip(head.value[position], before[evicted], strict=True)
                    ]

    def _d2o(self, heads: Sequence[Head], stays: Sequence[set[int]]) -> None:
        nearest: dict[tuple[int, int], tuple[float, int]] = {}  # head, evicted key -> cosine, key that stays
        for number, (head, kept) in enumerate(zip(heads, stays, strict=True)):
            for evicted in sorted(set(head.key) - kept):
                cosines = {position: cosine(head.key[evicted], head.key[position]) for position in sorted(kept)}
                best = max(cosines, key=lambda position: cosines[position])
                nearest[number, evicted] = cosines[best], best
        if not nearest:
            return
        mean = sum(similar for similar, _ in nearest.values()) / len(nearest)
        beta = self.scheme.beta
        self.threshold = mean if self.threshold is None else (1 - beta) * self.threshold + beta * mean
        for number, head in enumerate(heads):
            parts: dict[int, dict[int, float]] = {}
            for (of, evicted), (similar, best) in nearest.items():
                if of == number and similar >= self.threshold:
                    parts.setdefault(best, {})[evicted] = similar
            for best, weights in parts.items():
                add(head, best, weights, 1 + len(weights))

    def _kvmerger(self, head: Head, stays: set[int]) -> None:
        runs: list[list[int]] = []
        for position in sorted(head.key):
            if runs and cosine(head.key[runs[-1][-1]], head.key[position]) >= self.scheme.threshold:
                runs[-1].append(position)
            else:
                runs.append([position])
        for run in runs:
            kept, gone = [at for at in run if at in stays], [at for at in run if at not in stays]
            if not kept or not gone:
                continue
            pivot = max(kept, key=lambda at: (head.mass[at], -at))
            distances = {at: math.dist(head.key[at], head.key[pivot]) for at in gone}
            mean = sum(distances.values()) / len(gone)
            weights = {at: math.exp(-((far / mean) ** 2)) if mean else 1.0 for at, far in distances.items()}
            add(head, pivot, weights, 1 + sum(weights.values()))


def add(head: Head, target: int, weights: Mapping[int, float], whole: float) -> None:
    """Replace the key and value at `target` by the weighted sum of it and others, divided by `whole`."""
    for part in (head.key, head.value):
        part[target] = [
            (own + sum(weight * part[at][channel] for at, weight in weights.items())) / whole
            for channel, own in enumerate(part[target])
        ]


def cosine(one: Vector, other: Vector) -> float:
    return sum(map(math.prod, zip(one, other, strict=True))) / (math.hypot(*one) * math.hypot(*other))
