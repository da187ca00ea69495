"""Regret: the attention that evicted keys would still have received, by key, token, kind of token and lag.

The regret of a key is the sum of its full-cache weights at the steps that could not see it; see
`kvscope.analysis.missed_attention`. The lag of an eviction is the number of steps from it to the step of the largest
weight that was missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from kvscope.analysis.missed_attention import BINS, MissedAttention
from kvscope.analysis.token_kinds import KINDS, TokenInContext, TokenKinds


class EvictionRegret(TokenInContext):
    """An `Eviction` with its lag and its token."""

    sequence: int
    layer: int
    kv_head: int
    key: int
    mass: float
    gone: int
    wanted: tuple[int, ...]
    weights: tuple[float, ...]
    lag: int


class TokenRegret(TokenInContext):
    """Regret of a token, summed over layers and heads, and how many heads missed it."""

    sequence: int
    key: int
    mass: float
    share: float
    heads: int


class KindRegret(TypedDict):
    """Regret of all tokens of one kind."""

    kind: str
    tokens: int
    mass: float
    share: float
    mass_per_token: float


class SpanRegret(TypedDict):
    """Regret of all tokens in the spans of one name; a token in several spans counts in each."""

    name: str
    tokens: int
    mass: float
    share: float
    mass_per_token: float


# Regret by the steps since the eviction; `keys` counts those whose largest missed weight has that lag.
LagRegret = TypedDict("LagRegret", {"from": int, "to": int, "mass": float, "share": float, "keys": int})


class Regret(TypedDict):
    """All regret of one run."""

    mass: float
    per_step: float
    worst: list[EvictionRegret]
    tokens: list[TokenRegret]
    kinds: list[KindRegret]
    spans: list[SpanRegret]
    lags: list[LagRegret]


@dataclass(frozen=True)
class Eviction:
    """One evicted key of one head, and the attention that was missed because of it.

    Attributes
    ----------
    sequence, layer, kv_head, key : int
        Which key.
    mass : float
        Its regret.
    evicted_at : int
        Step at which the key was evicted before the largest missed weight.
    missed_at : tuple of int
        Steps of the largest missed weights, the largest first.
    weights : tuple of float
        Full-cache weights of the key at these steps.
    """

    sequence: int
    layer: int
    kv_head: int
    key: int
    mass: float
    evicted_at: int
    missed_at: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def lag(self) -> int:
        """Steps from the eviction to the largest missed weight."""
        return self.missed_at[0] - self.evicted_at


class RegretCollector:
    """Sums the regret of one run, layer by layer.

    Parameters
    ----------
    top : int
        Number of evictions and tokens to list.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._worst: list[Eviction] = []
        self._tokens: dict[int, list[NDArray[np.float64]]] = defaultdict(
            list
        )  # sequence -> [2, T]: mass, heads that missed it
        self._lags = np.zeros((2, BINS))  # mass, and keys by their lag

    def add(self, sequence: int, layer: int, missed: MissedAttention) -> None:
        """Add one layer of one sequence."""
        mass = missed.mass
        self._tokens[sequence].append(np.stack([mass.sum(0), (mass > 0).sum(0)]))
        there = mass > 0
        lag = (missed.step[0] - missed.evicted_at[0])[there]
        self._lags += np.stack([missed.lags, np.bincount(np.frexp(lag)[1] - 1, minlength=BINS)])
        for place in np.argsort(-mass, axis=None, kind="stable")[: self._top]:
            head, key = np.unravel_index(place, mass.shape)
            if mass[head, key] > 0:
                self._worst.append(_eviction(sequence, layer, int(head), int(key), missed))
        self._worst.sort(key=lambda each: -each.mass)
        del self._worst[self._top :]

    def result(self, tokens: Mapping[int, TokenKinds], steps: int) -> Regret:
        """Return the totals, the worst evictions and tokens, and the regret by kind of token and by lag.

        Parameters
        ----------
        tokens : mapping of int to TokenKinds
            Tokens of every sequence.
        steps : int
            Number of steps of key/value heads at which attention may have been missed, over layers and sequences.
        """
        by_token = {sequence: np.sum(parts, 0) for sequence, parts in self._tokens.items()}
        total = float(sum(mass.sum() for mass, _ in by_token.values()))
        return {
            "mass": total,
            "per_step": total / max(steps, 1),
            "worst": [self._named(each, tokens[each.sequence]) for each in self._worst],
            "tokens": self._by_token(by_token, tokens, total),
            "kinds": _by_kind(by_token, tokens, total),
            "spans": _by_span(by_token, tokens, total),
            "lags": self._by_lag(total),
        }

    def _named(self, each: Eviction, tokens: TokenKinds) -> EvictionRegret:
        return {
            "sequence": each.sequence,
            "layer": each.layer,
            "kv_head": each.kv_head,
            "key": each.key,
            "mass": each.mass,
            "gone": each.evicted_at,
            "wanted": each.missed_at,
            "weights": each.weights,
            "lag": each.lag,
            **tokens.named(each.key),
        }

    def _by_token(
        self, by_token: Mapping[int, NDArray[np.float64]], tokens: Mapping[int, TokenKinds], total: float
    ) -> list[TokenRegret]:
        found = [
            (float(mass[key]), sequence, int(key), int(heads[key]))
            for sequence, (mass, heads) in by_token.items()
            for key in np.argsort(-mass, kind="stable")[: self._top]
            if mass[key] > 0
        ]
        found.sort(key=lambda each: (-each[0], *each[1:]))
        return [
            {
                "sequence": sequence,
                "key": key,
                "mass": mass,
                "share": mass / total,
                "heads": heads,
                **tokens[sequence].named(key),
            }
            for mass, sequence, key, heads in found[: self._top]
        ]

    def _by_lag(self, total: float) -> list[LagRegret]:
        last = int(np.flatnonzero(self._lags.any(0)).max(initial=-1))
        return [
            {"from": 2**b, "to": 2 ** (b + 1) - 1, "mass": mass, "share": mass / total, "keys": int(keys)}
            for b, (mass, keys) in enumerate(self._lags.T[: last + 1].tolist())
        ]


def _by_kind(
    by_token: Mapping[int, NDArray[np.float64]], tokens: Mapping[int, TokenKinds], total: float
) -> list[KindRegret]:
    mass: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    count: dict[str, int] = dict.fromkeys(KINDS, 0)
    for sequence, (masses, _) in by_token.items():
        for kind, value in zip(tokens[sequence].kinds, masses.tolist(), strict=True):
            mass[kind] += value
            count[kind] += 1
    return [
        {
            "kind": kind,
            "tokens": count[kind],
            "mass": mass[kind],
            "share": mass[kind] / total if total else 0.0,
            "mass_per_token": mass[kind] / count[kind] if count[kind] else 0.0,
        }
        for kind in KINDS
    ]


def _by_span(
    by_token: Mapping[int, NDArray[np.float64]], tokens: Mapping[int, TokenKinds], total: float
) -> list[SpanRegret]:
    """Return the regret of the spans of each name, over all sequences, in the order of their names' first use."""
    mass: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for sequence, (masses, _) in by_token.items():
        for name, keys in tokens[sequence].spans.items():
            mass[name] += float(masses[list(keys)].sum())
            count[name] += len(keys)
    return [
        {
            "name": name,
            "tokens": tokens_of,
            "mass": mass[name],
            "share": mass[name] / total if total else 0.0,
            "mass_per_token": mass[name] / tokens_of if tokens_of else 0.0,
        }
        for name, tokens_of in count.items()
    ]


def _eviction(sequence: int, layer: int, head: int, key: int, missed: MissedAttention) -> Eviction:
    steps, weights = missed.step[:, head, key], missed.weight[:, head, key]
    there = steps >= 0
    return Eviction(
        sequence,
        layer,
        head,
        key,
        float(missed.mass[head, key]),
        int(missed.evicted_at[0, head, key]),
        tuple(steps[there].tolist()),
        tuple(weights[there].tolist()),
    )
