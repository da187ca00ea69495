"""H2O's three published rules: dropped keys, the generation mask, and FlexGen's slots."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import REDUCE, Rows, Score, Sets, live, loop, of_heads


def drop(
    rows: Rows, budget: int, prompt: int, prefill: str, recent: int, group: str = "mean", reduce: str = "scores"
) -> tuple[Sets, Sets]:
    def make() -> Score:
        gathered = np.zeros(rows.shape[-1])

        def score(t: int, visible: set[int], row: np.ndarray) -> np.ndarray:
            gathered[: t + 1] += row
            return gathered[: t + 1].copy()

        return score

    score = make() if reduce == "rows" else of_heads(rows, make, group)
    return loop(rows, score, budget, prompt, prefill, recent=recent, group=group)


def mask(rows: Rows, heavy: int, recent: int, prompt: int, group: str = "mean", reduce: str = "scores") -> Sets:
    """Return what every query sees; the mask for the next query is made at the end of each step."""
    length = rows.shape[-1]
    if reduce == "rows":
        sums = REDUCE[group](rows[:, :prompt, :prompt], axis=0).sum(0)[None]
    else:
        sums = rows[:, :prompt, :prompt].sum(1)  # of each query head
    seen: Sets = [set(range(query + 1)) for query in range(prompt)]
    for query in range(prompt, length):
        n = query  # keys that exist when the mask for this query is made
        shown = np.ones(n + 1, dtype=bool)
        if n > heavy + recent:
            shown[: n + 1 - recent] = False
            candidates = list(range(n - recent))
            candidates.sort(key=lambda key: REDUCE[group](sums[:, key]), reverse=True)
            shown[candidates[:heavy]] = True
        keep = shown[:n].copy()
        keep[n - recent : n] = True
        sums = sums * keep
        visible = set(np.flatnonzero(shown).tolist())
        each = [live(rows[head : head + 1], query, visible) for head in range(len(rows))]
        each = [REDUCE[group](np.array(each), axis=0)] if reduce == "rows" else each
        sums = np.concatenate([sums, np.zeros((len(sums), 1))], 1) + np.array(each)
        seen.append(visible)
    return seen


def flexgen(rows: Rows, hh: int, prompt: int, group: str = "mean") -> tuple[Sets, Sets]:
    """`hh` heavy slots and a ring of ``hh - 1`` newest keys, as arrays of key numbers; ``2 hh - 1`` keys in all."""
    length = rows.shape[-1]
    of_head = {key: rows[:, :prompt, key].sum(1) for key in range(prompt)}  # of each key, the sum of every query head
    sums = {key: float(REDUCE[group](each)) for key, each in of_head.items()}
    heavy, ring = list(range(prompt)), []
    if prompt > 2 * hh - 1:
        cut = prompt - hh + 1
        heavy = sorted(range(cut), key=lambda key: sums[key], reverse=True)[:hh]
        ring = list(range(cut, prompt))
    all_visible = [set(range(t + 1)) for t in range(prompt)]
    all_held = [set(range(t + 1)) for t in range(prompt - 1)] + [set(heavy + ring)]
    for t in range(prompt, length):
        visible = set(heavy + ring) | {t}
        each = [live(rows[head : head + 1], t, visible) for head in range(len(rows))]
        of_head[t] = np.zeros(len(rows))
        for key in visible:
            of_head[key] = of_head[key] + np.array([row[key] for row in each])
            sums[key] = float(REDUCE[group](of_head[key]))
        if not ring:  # a short prompt: nothing goes before there are 2 hh keys
            heavy.append(t)
            if len(heavy) == 2 * hh:
                heavy.remove(min(heavy[:hh], key=lambda key: sums[key]))
                heavy, ring = heavy[:hh], heavy[hh:]
        else:
            slot = heavy.index(min(heavy, key=lambda key: sums[key]))
            heavy[slot] = ring.pop(0)
            ring.append(t)
        all_visible.append(visible)
        all_held.append(set(heavy + ring))
    return all_visible, all_held
