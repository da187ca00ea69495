"""How papers share out a budget among layers and heads, in plain loops and exact fractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Number = float | Fraction


def largest_remainders(total: int, wish: Sequence[Number], most: int | None = None) -> list[int]:
    """Return whole shares of `total` in proportion to `wish`, none above `most`, the largest remainders rounded up."""
    parts = [Fraction(part) for part in wish]
    if not any(parts):
        parts = [Fraction(1)] * len(parts)
    full: list[int] = []
    while True:
        rest = [place for place in range(len(parts)) if place not in full]
        if not rest:
            return [most or 0] * len(parts)
        left, weight = total - len(full) * (most or 0), sum(parts[place] for place in rest)
        share = {place: left * parts[place] / weight if weight else Fraction(left, len(rest)) for place in rest}
        over = [place for place in rest if most is not None and share[place] > most]
        if not over:
            break
        full += over
    keys = [math.floor(share[place]) if place in share else (most or 0) for place in range(len(parts))]
    growing = sorted((place for place in rest if keys[place] != most), key=lambda place: keys[place] - share[place])
    for place in growing[: total - sum(keys)]:
        keys[place] += 1
    return keys


def pyramid_line(base: int, prompt: int, window: int, layers: int) -> tuple[int, int]:
    """Return what the first and the last layer hold beside the window."""
    low = base // 20
    high = 2 * base - low
    if high >= prompt - window:
        high = prompt - window
        low = 2 * base - high
    return high, low


def pyramid(budget: int, window: int, prompt: int, layers: int) -> list[int]:
    """Return the keys of each layer: a straight line, rounded so that the total is that of a uniform share."""
    base = budget - window
    if layers == 1 or prompt <= budget or prompt < 2 * base:
        return [budget] * layers
    high, low = pyramid_line(base, prompt, window, layers)
    line = [high - Fraction(layer * (high - low), layers - 1) for layer in range(layers)]
    return [window + keys for keys in largest_remainders(base * layers, line)]


def published_pyramid(budget: int, window: int, prompt: int, layers: int) -> list[int]:
    """Return the keys of each layer as the published code steps down: by whole keys, which ends above the line."""
    high, low = pyramid_line(budget - window, prompt, window, layers)
    step = (high - low) // (layers - 1)
    return [window + high - layer * step for layer in range(layers)]


def counted(scores: Sequence[Sequence[float]], base: int) -> list[int]:
    """Return how many of the best ``heads * base`` scores of a layer lie in each head."""
    every = sorted((-score, head, key) for head, own in enumerate(scores) for key, score in enumerate(own))
    best = every[: base * len(scores)]
    return [sum(head == other for _, other, _ in best) for head in range(len(scores))]


def ada(scores: Sequence[Sequence[float]], budget: int, fixed: int, prompt: int) -> list[int]:
    """Return the keys of each head of a layer; `scores` are those of the keys that are not protected."""
    base = budget - fixed
    if prompt <= budget:
        return [budget] * len(scores)
    wish = [Fraction(4, 5) * count + Fraction(1, 5) * base for count in counted(scores, base)]
    return [fixed + keys for keys in largest_remainders(base * len(scores), wish, prompt - fixed)]


def published_ada(scores: Sequence[Sequence[float]], budget: int, fixed: int) -> list[int]:
    """Return the keys of each head as the published code rounds them, each on its own."""
    base = budget - fixed
    return [fixed + round(count * (1 - 0.2) + int(base * 0.2)) for count in counted(scores, base)]


def cake_weight(rows: np.ndarray, prompt: int, window: int = 32) -> float:
    """Return what a layer is worth, from its full rows ``[H, T, T]``: entropy times variance of the last rows."""
    old = prompt - window
    entropy = variance = 0.0
    for head in rows:
        last = [[float(weight) for weight in head[query, :old]] for query in range(old, prompt)]
        entropy -= sum(weight * math.log(weight) for row in last for weight in row if weight > 0)
        for column in zip(*last, strict=True):
            mean = sum(column) / window
            variance += sum((weight - mean) ** 2 for weight in column) / (window - 1)
    return entropy * variance


def cake(layers: Sequence[np.ndarray], budget: int, fixed: int, prompt: int) -> list[int]:
    """Return the keys of each layer, from the full rows ``[H, T, T]`` of all of them."""
    if prompt <= max(budget, 32):
        return [budget] * len(layers)
    weights = [cake_weight(rows, prompt) for rows in layers]
    shares = largest_remainders((budget - fixed) * len(layers), weights, prompt - fixed)
    return [fixed + keys for keys in shares]


def far_weight(rows: np.ndarray, prompt: int, last: int = 32, sinks: int = 4, newest: int = 16) -> float:
    """Return what the last rows of a prompt give to keys between the first and the newest, for one group."""
    total = 0.0
    for head, query in itertools.product(rows, range(max(0, prompt - last), prompt)):
        total += sum(float(head[query, key]) for key in range(sinks, query - newest + 1))
    return total


def heads(
    scores: Sequence[Sequence[float]], budget: int, fixed: int, prompt: int, beta: float = 1.2
) -> list[list[int]]:
    """Return the keys of each head of each layer: a part is its own, the rest is shared in proportion to scores."""
    count = sum(map(len, scores))
    if prompt <= budget:
        return [[budget] * len(own) for own in scores]
    base = budget - fixed
    pool = math.floor(base / beta)
    every = [Fraction(score) for own in scores for score in own]
    total = sum(every)
    wish = [base - pool + (pool * count * score / total if total else pool) for score in every]
    keys = iter(largest_remainders(base * count, wish, prompt - fixed))
    return [[fixed + next(keys) for _ in own] for own in scores]


def published_heads(scores: Sequence[float], base: int, beta: float) -> list[int]:
    """Return the free keys of each head as the published code rounds them, each on its own."""
    pool = base // beta
    return [round(score / sum(scores) * pool * len(scores) + base - pool) for score in scores]


def decay(budget: int, fixed: int, prompt: int, layers: int) -> list[int]:
    """Return the keys of each layer: its share of those of the layer before falls along a cosine from 1 to 0.9."""
    if prompt <= budget:
        return [budget] * layers
    kept, wish = 1.0, []
    for layer in range(layers):
        kept *= 0.9 + (1 - 0.9) * (math.cos(math.pi * layer / layers) + 1) / 2
        wish.append(kept)
    return [fixed + keys for keys in largest_remainders((budget - fixed) * layers, wish, prompt - fixed)]
