"""Keyformer as the published mask: H2O's generation mask over noisy sums, each mask ANDed with the one before."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import REDUCE, Rows, Sets


def gumbel_softmax(weights: np.ndarray, uniform: np.ndarray, shown: np.ndarray, tau: float) -> np.ndarray:
    """Return the noisy softmax over the shown keys of one row."""
    noisy = (np.log(weights) - np.log(-np.log(uniform))) / tau
    noisy = np.where(shown, noisy, -np.inf)
    exponentials = np.exp(noisy - noisy.max())
    return exponentials / exponentials.sum()


def mask(
    rows: Rows,
    uniform: np.ndarray,
    key_tokens: int,
    recent: int,
    prompt: int,
    tau_init: float,
    tau_delta: float,
    group: str = "mean",
    reduce: str = "scores",
) -> Sets:
    """Return what every query sees, itself included; `uniform` is ``[heads, T, T]``."""
    heads, length, _ = rows.shape
    sums = np.zeros((heads, prompt))

    def add(t: int, shown: np.ndarray, tau: float) -> None:
        row = [gumbel_softmax(rows[head, t, : t + 1], uniform[head, t, : t + 1], shown, tau) for head in range(heads)]
        noisy = np.array(row)
        sums[:, : t + 1] += REDUCE[group](noisy, axis=0) if reduce == "rows" else noisy

    for t in range(prompt):
        add(t, np.ones(t + 1, dtype=bool), tau_init)
    seen: Sets = [set(range(t + 1)) for t in range(prompt)]
    discard = np.ones(prompt, dtype=bool)
    for query in range(prompt, length):
        n = query
        shown = np.ones(n + 1, dtype=bool)
        if n > key_tokens + recent:
            if recent > 0:
                shown[: n + 1 - recent] = False
            candidates = sorted(range(n - recent), key=lambda key: REDUCE[group](sums[:, key]), reverse=True)
            shown[candidates[:key_tokens]] = True
        shown[:n] &= discard
        sums = np.concatenate([sums * shown[:n], np.zeros((heads, 1))], 1)
        discard = shown
        add(query, shown, tau_init + (query - prompt + 1) * tau_delta)
        seen.append(set(np.flatnonzero(shown).tolist()))
    return seen
