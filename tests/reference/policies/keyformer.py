"""Keyformer as the published mask: H2O's generation mask over noisy sums, each mask ANDed with the one before."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Rows, Sets


def gumbel_softmax(weights: np.ndarray, uniform: np.ndarray, shown: np.ndarray, tau: float) -> np.ndarray:
    """Return the noisy softmax over the shown keys of one row."""
    noisy = (np.log(weights) - np.log(-np.log(uniform))) / tau
    noisy = np.where(shown, noisy, -np.inf)
    exponentials = np.exp(noisy - noisy.max())
    return exponentials / exponentials.sum()


def mask(
    rows: Rows, uniform: np.ndarray, key_tokens: int, recent: int, prompt: int, tau_init: float, tau_delta: float
) -> Sets:
    """Return what every query sees, itself included; `uniform` is ``[heads, T, T]``."""
    heads, length, _ = rows.shape
    sums = np.zeros(prompt)
    for head in range(heads):
        for t in range(prompt):
            everything = np.ones(t + 1, dtype=bool)
            noisy = gumbel_softmax(rows[head, t, : t + 1], uniform[head, t, : t + 1], everything, tau_init)
            sums[: t + 1] += noisy / heads
    seen: Sets = [set(range(t + 1)) for t in range(prompt)]
    discard = np.ones(prompt, dtype=bool)
    for query in range(prompt, length):
        n = query
        shown = np.ones(n + 1, dtype=bool)
        if n > key_tokens + recent:
            if recent > 0:
                shown[: n + 1 - recent] = False
            candidates = sorted(range(n - recent), key=lambda key: sums[key], reverse=True)
            shown[candidates[:key_tokens]] = True
        shown[:n] &= discard
        sums = sums * shown[:n]
        discard = shown
        noisy = np.zeros(n + 1)
        tau = tau_init + (query - prompt + 1) * tau_delta
        for head in range(heads):
            noisy += gumbel_softmax(rows[head, query, : n + 1], uniform[head, query, : n + 1], shown, tau) / heads
        sums = np.append(sums, 0.0) + noisy
        seen.append(set(np.flatnonzero(shown).tolist()))
    return seen
