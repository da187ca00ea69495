"""What evicted keys would still have received, key by key and step by step, with sets and loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.reference.residency import Stay, resident


@dataclass
class Key:
    """One key of one head: each step that could not see it, with its weight and the step after which it was gone."""

    missed: list[tuple[float, int, int]] = field(default_factory=list)  # weight, step, gone

    @property
    def mass(self) -> float:
        return sum(weight for weight, _, _ in self.missed)

    def most(self, count: int) -> list[tuple[float, int, int]]:
        there = [each for each in self.missed if each[0] > 0]
        return sorted(there, key=lambda each: (-each[0], each[1]))[:count]


def regret(rows: Sequence[Sequence[Sequence[float]]], stays: Sequence[Stay]) -> list[list[Key]]:
    """Return every key of every head; ``rows[head][t][key]`` are full rows, the mean over the head's group."""
    length = len(rows[0])
    held = resident(stays, len(rows), length)
    result = []
    for head, of_head in enumerate(rows):
        keys = [Key() for _ in range(length)]
        for t in range(1, length):
            for key in range(t):
                if key not in held[head][t - 1]:
                    left = [leave for of, k, _, leave in stays if of == head and k == key and leave is not None]
                    gone = max(leave for leave in left if leave < t)
                    keys[key].missed.append((of_head[t][key], t, gone))
        result.append(keys)
    return result


def lags(keys: Sequence[Key], bins: int) -> list[float]:
    """Return the mass by lag: bin ``b`` has ``2**b <= lag < 2**(b+1)``."""
    found = [0.0] * bins
    for key in keys:
        for weight, step, gone in key.missed:
            found[next(b for b in range(bins) if step - gone < 2 ** (b + 1))] += weight
    return found
