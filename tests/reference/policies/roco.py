"""RoCo: mean and deviation of a key's weights; at a budget, and as the published decoding mode."""

from __future__ import annotations

import math

import numpy as np

from tests.reference.policies.evict import REDUCE, Rows, Sets, live, loop


def moments(weights: np.ndarray, keys: list[int], group: str) -> tuple[dict[int, float], dict[int, float]]:
    """Return mean and deviation of each key from its weights [heads, steps, T]; of several heads variances are one."""
    steps = weights.shape[1]
    there = np.arange(steps)[:, None] >= np.array(keys)  # [steps, keys]: a key has weights from its own step on
    count, own = there.sum(0), weights[:, :, keys]
    means = own.sum(1) / count  # [heads, keys]
    variances = (np.where(there, own - means[:, None], 0.0) ** 2).sum(1) / count
    if len(weights) > 1:  # of one head nothing is to be reduced
        means, variances = (REDUCE[group](values, axis=0)[None] for values in (means, variances))
    mean, deviation = (dict(zip(keys, values[0].tolist(), strict=True)) for values in (means, np.sqrt(variances)))
    return mean, deviation


def plain(
    rows: Rows,
    budget: int,
    prompt: int,
    prefill: str,
    *,
    ratio: float = 0.3,
    recent: int = 10,
    group: str = "mean",
    reduce: str = "rows",
) -> tuple[Sets, Sets]:
    """All but the ``int(ratio * B) + 1`` largest deviations are within reach; the protected ones count as largest."""
    length = rows.shape[-1]
    past = np.zeros((1 if reduce == "rows" else len(rows), length, length))  # [heads, steps, keys]
    recent = min(recent, budget // 2)

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        shown = [row] if reduce == "rows" else [live(rows[h : h + 1], t, visible) for h in range(len(rows))]
        past[:, t, : t + 1] = shown
        mean, deviation = moments(past[:, : t + 1], sorted(visible), group)
        free = sorted((key for key in visible if key <= t - recent), key=lambda key: (deviation[key], key))
        feasible = free[: len(visible) - int(ratio * budget) - 1]
        return [mean[key] if key in feasible else math.inf for key in range(t + 1)]

    return loop(rows, score, budget, prompt, prefill, recent=recent, group=group)


def easykv(rows: Rows, budget: int, prompt: int, newest: int = 10) -> tuple[Sets, Sets]:
    """`budget` generated keys beside the whole prompt; slots of a list, as the published code has them."""
    slots: list[int] = []
    sums: list[float] = []
    squares: list[float] = []
    counts: list[int] = []
    all_visible: Sets = [set(range(t + 1)) for t in range(prompt)]
    all_held = list(all_visible)
    for t in range(prompt, rows.shape[-1]):
        for values in (slots, sums, squares, counts):
            values.append(0)
        slots[-1] = t
        visible = set(range(prompt)) | set(slots)
        row = live(rows, t, visible)
        for slot, key in enumerate(slots):
            sums[slot] += row[key]
            squares[slot] += row[key] ** 2
            counts[slot] += 1
        if len(slots) > budget:
            window = int(0.3 * budget)
            std = []
            for slot in range(len(slots)):
                variance = squares[slot] / counts[slot] - (sums[slot] / counts[slot]) ** 2
                std.append(math.sqrt(variance) if variance >= 0 else math.inf)  # NaN sorts last there
            std = [1e9 if slot >= len(slots) - newest else value for slot, value in enumerate(std)]
            feasible = sorted(range(len(slots)), key=lambda slot: std[slot])[: budget - window]
            gone = min(sorted(feasible), key=lambda slot: sums[slot] / counts[slot])
            for values in (slots, sums, squares, counts):
                del values[gone]
        all_visible.append(visible)
        all_held.append(set(range(prompt)) | set(slots))
    return all_visible, all_held
