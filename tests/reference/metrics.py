"""Every metric of one query head, as semantics has it: sums over explicit key lists, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Row = Sequence[float]


@dataclass
class Case:
    """Query `t` of one head: all full rows up to it, ``rows[s]`` with ``s + 1`` weights, and what the policy left."""

    rows: Sequence[Row]
    t: int
    visible: set[int]
    held: set[int]
    budget: int
    prompt: int
    values: Sequence[Sequence[float]]

    @property
    def row(self) -> Row:
        return self.rows[self.t]


def heaviest(row: Row, keys: Sequence[int], count: int) -> set[int]:
    """Return the `count` heaviest of the keys; of equal weights the newer is taken."""
    return set(sorted(keys, key=lambda key: (-row[key], -key))[:count])


def ideal_set(case: Case, first: int = 0) -> set[int]:
    """Return the query's own key and the heaviest others from `first` on."""
    return {case.t, *heaviest(case.row, range(first, case.t), case.budget)}


def share(row: Row, keys: set[int], first: int = 0) -> float:
    whole = sum(row[key] for key in range(first, len(row)))
    part = sum(row[key] for key in keys if key >= first)
    return part / whole if whole > 0 else (math.nan if first else 0.0)


def restricted(row: Row, keys: set[int]) -> list[float]:
    total = sum(row[key] for key in keys)
    return [row[key] / total if key in keys and total > 0 else 0.0 for key in range(len(row))]


def cosine(one: Row, other: Row) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    norms = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return dot / norms if norms > 0 else 0.0


def live(case: Case) -> list[float]:
    return restricted(case.row, case.visible)


def ideal(case: Case) -> list[float]:
    return restricted(case.row, ideal_set(case))


def output(weights: Row, values: Sequence[Sequence[float]]) -> list[float]:
    size = len(values[0])
    return [sum(weights[key] * values[key][d] for key in range(len(weights))) for d in range(size)]


def output_error(case: Case) -> float:
    full = output(restricted(case.row, set(range(case.t + 1))), case.values)
    got = output(live(case), case.values)
    size = math.sqrt(sum(x * x for x in full))
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(got, full, strict=True))) / size if size > 0 else math.nan


def late_keys(case: Case) -> set[int]:
    """Return the keys that the head did not want in the 64 steps before: no weight above ``1/n``, no arrival."""
    found = set()
    for key in range(case.t + 1):
        attended = [s for s in range(key, case.t) if case.rows[s][key] > 1 / (s + 1)]
        if case.t - max([key, *attended]) > 64:
            found.add(key)
    return found


def late_retained(case: Case) -> float:
    late = late_keys(case)
    total = sum(case.row[key] for key in late)
    return sum(case.row[key] for key in late & case.visible) / total if total > 0.1 * sum(case.row) else math.nan


def recovered(case: Case, first: int = 0) -> float:
    if case.t < case.prompt:
        return math.nan
    last = case.rows[case.prompt - 1]
    return share(case.row, heaviest(last, range(case.prompt), case.budget), first)


def mask_cosine(case: Case) -> float:
    both = len(case.visible & ideal_set(case))
    return both / math.sqrt(len(case.visible) * len(ideal_set(case)))


PER_STEP: dict[str, Callable[[Case], float]] = {
    "retained_mass": lambda case: share(case.row, case.visible),
    "retained_mass_no_sinks": lambda case: share(case.row, case.visible, 4),
    "ideal_mass": lambda case: share(case.row, ideal_set(case)),
    "ideal_mass_no_sinks": lambda case: share(case.row, ideal_set(case, 4), 4),
    "ideal_cosine": lambda case: cosine(live(case), ideal(case)),
    "full_cosine": lambda case: cosine(live(case), case.row),
    "mask_cosine": mask_cosine,
    "ideal_recall": lambda case: len(case.visible & ideal_set(case)) / len(ideal_set(case)),
    "output_error": output_error,
    "late_mass_retained": late_retained,
    "recovered_mass": recovered,
    "recovered_mass_no_sinks": lambda case: recovered(case, 4),
    "read_keys": lambda case: float(len(case.visible)),
    "held_keys": lambda case: float(len(case.held)),
}


def flattened(cases: Sequence[Case]) -> float:
    """Return one cosine over all steps of a head, whose rows are laid end to end."""
    one = [weight for case in cases for weight in live(case)]
    other = [weight for case in cases for weight in ideal(case)]
    return cosine(one, other)


POOLED: dict[str, Callable[[Sequence[Case]], float]] = {"ideal_cosine_flattened": flattened}
