"""FastGen of one key/value head: rules as sets, and the mass that each retains of every row of the prompt."""

from __future__ import annotations

import math

import numpy as np

from tests.reference.policies.evict import Sets


def retained(
    rule: int, keys: list[int], sums: dict[int, float], kinds: list[int], n: int, frequent: float, local: float
) -> set[int]:
    """Return which of `keys` one of the five rules retains when there are `n` keys so far."""
    if rule == 4:
        return set(keys)
    named = {key for key in keys if kinds[key] == 2 or (rule > 0 and kinds[key] == 1)}
    if rule < 2:
        return named
    newest = {key for key in keys if rule == 3 and key >= n - math.ceil(local * n)}
    others = [key for key in keys if key not in named and key not in newest]
    most = sorted(others, key=lambda key: (-sums[key], -key))[: math.ceil(frequent * n)]
    return named | newest | set(most)


def chosen_rule(rows: np.ndarray, prompt: int, kinds: list[int], recover: float, frequent: float, local: float) -> int:
    """Return the first rule under which the rows ``[T, T]`` of a prompt retain enough of their mass on average."""
    keys = list(range(prompt))
    sums = {key: sum(float(rows[q, key]) for q in range(key, prompt)) for key in keys}
    for rule in range(4):
        kept = retained(rule, keys, sums, kinds, prompt, frequent, local)
        newest = set(range(prompt - math.ceil(local * prompt), prompt)) if rule == 3 else set()
        mass = 0.0
        for q in range(prompt):
            for key in range(q + 1):
                near = rule == 3 and key > q - math.ceil(local * prompt)
                if near or key in kept - newest or (key in newest and kinds[key] > 0):
                    mass += float(rows[q, key])
        if mass / prompt >= recover:
            return rule
    return 4


def fastgen(
    rows: np.ndarray, prompt: int, kinds: list[int], recover: float, frequent: float, local: float
) -> tuple[Sets, Sets, int]:
    """Return ``V_t``, ``R_t`` and the rule of a key/value head with the full rows ``[Q, T, T]`` of its query heads."""
    rule = chosen_rule(rows.mean(0), prompt, kinds, recover, frequent, local)
    held: set[int] = set()
    sums: dict[int, float] = {}
    all_visible, all_held = [], []
    for t in range(rows.shape[1]):
        visible = held | {t}
        for row in rows[:, t]:
            live = sum(float(row[key]) for key in visible)
            for key in visible:
                sums[key] = sums.get(key, 0.0) + float(row[key]) / live / len(rows)
        held = visible
        if t >= prompt - 1:
            held = retained(rule, sorted(visible), sums, kinds, t + 1, frequent, local)
        all_visible.append(visible)
        all_held.append(held)
    return all_visible, all_held, rule
