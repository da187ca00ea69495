"""H2O's three published rules: dropped keys, the generation mask, and FlexGen's slots."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Rows, Sets, live, loop


def drop(rows: Rows, budget: int, prompt: int, prefill: str, recent: int, group: str = "mean") -> tuple[Sets, Sets]:
    gathered = np.zeros(rows.shape[-1])

    def score(t: int, visible: set[int], row: np.ndarray) -> np.ndarray:
        gathered[: t + 1] += row
        return gathered

    return loop(rows, score, budget, prompt, prefill, recent=recent, group=group)


def mask(rows: Rows, heavy: int, recent: int, prompt: int) -> Sets:
    """Return what every query sees; the mask for the next query is made at the end of each step."""
    length = rows.shape[-1]
    sums = rows[:, :prompt, :prompt].sum(1).mean(0)
    seen: Sets = [set(range(query + 1)) for query in range(prompt)]
    for query in range(prompt, length):
        n = query  # keys that exist when the mask for this query is made
        shown = np.ones(n + 1, dtype=bool)
        if n > heavy + recent:
            shown[: n + 1 - recent] = False
            candidates = list(range(n - recent))
            candidates.sort(key=lambda key: sums[key], reverse=True)
            shown[candidates[:heavy]] = True
        keep = shown[:n].copy()
        keep[n - recent : n] = True
        sums = sums * keep
        visible = set(np.flatnonzero(shown).tolist())
        sums = np.append(sums, 0.0) + live(rows, query, visible)
        seen.append(visible)
    return seen


def flexgen(rows: Rows, hh: int, prompt: int) -> tuple[Sets, Sets]:
    """`hh` heavy slots and a ring of ``hh - 1`` newest keys, as arrays of key numbers; ``2 hh - 1`` keys in all."""
    length = rows.shape[-1]
    sums = {key: float(rows[:, :prompt, key].sum(1).mean()) for key in range(prompt)}
    heavy, ring = list(range(prompt)), []
    if prompt > 2 * hh - 1:
        cut = prompt - hh + 1
        heavy = sorted(range(cut), key=lambda key: sums[key], reverse=True)[:hh]
        ring = list(range(cut, prompt))
    all_visible = [set(range(t + 1)) for t in range(prompt)]
    all_held = [set(range(t + 1)) for t in range(prompt - 1)] + [set(heavy + ring)]
    for t in range(prompt, length):
        visible = set(heavy + ring) | {t}
        row = live(rows, t, visible)
        sums[t] = 0.0
        for key in visible:
            sums[key] += row[key]
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
