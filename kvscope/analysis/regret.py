"""Regret: the attention that evicted keys would still have received, key by key, and where and when it was missed.

The regret of a key is the sum of its full-cache weights at the steps that could not see it, the mean over the query
heads of its group. For a policy that evicts for good these are all steps after the eviction; for a sparse reader, whose
keys come back, those at which it was not read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.core.residency import ResidencyIntervals

Array = NDArray[Any]
MOST = 3  # steps that are kept of each key: those at which it was wanted most
KINDS = ("first", "digits", "punctuation", "rare", "other")
BINS = 32  # of lags: bin b is 2**b to 2**(b+1) - 1 steps
CONTEXT = 4  # tokens on either side that are shown of a token


@dataclass(frozen=True)
class Missed:
    """What a run could not see of one layer of one sequence.

    Attributes
    ----------
    mass : array
        Regret of each key, ``[G, T]``.
    step, weight, gone : array
        ``[MOST, G, T]``, the heaviest first: steps at which the key was wanted most while it was out of sight, its
        weight then, and the first step without it; -1, 0, -1 where there is none. Of equal weights the earlier step
        comes first.
    lags : array
        Mass by the number of steps since the key had gone, ``[BINS]``.
    """

    mass: NDArray[np.float64]
    step: NDArray[np.int64]
    weight: NDArray[np.float64]
    gone: NDArray[np.int64]
    lags: NDArray[np.float64]


class Missing:
    """Adds up what a run could not see, over blocks of rows that come in order.

    Parameters
    ----------
    intervals : ResidencyIntervals
        Of the layer.
    """

    def __init__(self, intervals: ResidencyIntervals) -> None:
        self._intervals = intervals
        heads, length = intervals.heads, intervals.length
        self._gone = np.full((heads, length), -1, np.int64)  # last step at which each key went
        self._mass = np.zeros((heads, length))
        self._best = np.zeros((3, MOST, heads, length))  # weight, step, gone
        self._best[1:] = -1
        self._lags = np.zeros(BINS)

    def add(self, start: int, rows: Array) -> None:
        """Take full rows of steps from `start` on, mean over each group, ``[G, b, n]`` with ``n = start + b``."""
        count, n = rows.shape[1:]
        step, key = np.arange(start, start + count)[:, None], np.arange(n)
        held = self._intervals.held(start - 1, start + count - 1)[..., :n]
        gone = self._went(start, count, n)  # [G, b, n]
        lost = np.where(~held & (key < step), rows, 0).astype(np.float64)
        if not lost.any():
            return
        self._mass[:, :n] += lost.sum(1)
        there = lost > 0
        lag = (step - gone)[there]
        self._lags += np.bincount(np.frexp(lag)[1] - 1, lost[there], BINS)
        self._keep_best(start, lost, gone)

    def result(self) -> Missed:
        """Return what was missed in all blocks."""
        weight, step, gone = self._best
        return Missed(self._mass, step.astype(np.int64), weight, gone.astype(np.int64), self._lags)

    def _went(self, start: int, count: int, n: int) -> NDArray[np.int64]:
        """Return the last step before each query at which each key went, ``[G, b, n]``; -1 for none."""
        own = self._intervals
        these = (own.leave >= max(start - 1, 0)) & (own.leave < start + count - 1)
        gone = np.full((own.heads, count, n), -1, np.int64)
        gone[own.kv_head[these], own.leave[these] + 1 - start, own.key[these]] = own.leave[these]
        gone[:, 0] = np.maximum(gone[:, 0], self._gone[:, :n])
        gone = np.maximum.accumulate(gone, axis=1)
        self._gone[:, :n] = gone[:, -1]
        return gone

    def _keep_best(self, start: int, lost: NDArray[np.float64], gone: NDArray[np.int64]) -> None:
        n = lost.shape[-1]
        found = [self._best[..., :n]]
        for _ in range(MOST):
            at = lost.argmax(1)[:, None]  # [G, 1, n]: the first of equal weights
            weight = np.take_along_axis(lost, at, 1)
            of = np.stack([weight, at + start, np.take_along_axis(gone, at, 1)])  # [3, G, 1, n]
            of[1:, weight == 0] = -1
            found.append(of.transpose(0, 2, 1, 3))
            np.put_along_axis(lost, at, 0, 1)
        every = np.concatenate(found, 1)  # [3, 2 * MOST, G, n], earlier steps first
        order = np.argsort(-every[0], axis=0, kind="stable")[:MOST]
        self._best[..., :n] = np.take_along_axis(every, order[None], 1)


@dataclass(frozen=True)
class Eviction:
    """One key of one head and what it cost to be without it.

    Attributes
    ----------
    sequence, layer, kv_head, key : int
        Which key.
    mass : float
        Its regret.
    gone : int
        First step without it: of the absence in which it was wanted most.
    wanted : tuple of int
        Steps at which it was wanted most, the most first.
    weights : tuple of float
        Its full-cache weights at these steps.
    """

    sequence: int
    layer: int
    kv_head: int
    key: int
    mass: float
    gone: int
    wanted: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def lag(self) -> int:
        """Steps between its going and the one at which it was wanted most."""
        return self.wanted[0] - self.gone


class Regrets:
    """Collects what one run missed, layer by layer, and keeps the worst of it.

    Parameters
    ----------
    top : int
        Evictions and tokens to name.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._worst: list[Eviction] = []
        self._tokens: dict[int, list[Array]] = defaultdict(list)  # sequence -> [2, T]: mass, heads that missed it
        self._lags = np.zeros((2, BINS))  # mass, and keys by the lag at which they were wanted most

    def add(self, sequence: int, layer: int, missed: Missed) -> None:
        """Take one layer of one sequence."""
        mass = missed.mass
        self._tokens[sequence].append(np.stack([mass.sum(0), (mass > 0).sum(0)]))
        there = mass > 0
        lag = (missed.step[0] - missed.gone[0])[there]
        self._lags += np.stack([missed.lags, np.bincount(np.frexp(lag)[1] - 1, minlength=BINS)])
        for place in np.argsort(-mass, axis=None, kind="stable")[: self._top]:
            head, key = np.unravel_index(place, mass.shape)
            if mass[head, key] > 0:
                self._worst.append(_eviction(sequence, layer, int(head), int(key), missed))
        self._worst.sort(key=lambda each: -each.mass)
        del self._worst[self._top :]

    def result(self, tokens: Mapping[int, Tokens], steps: int) -> dict[str, Any]:
        """Return plain data: totals, the worst evictions and tokens, kinds of tokens, lags.

        Parameters
        ----------
        tokens : mapping of int to Tokens
            Of every sequence.
        steps : int
            Steps of key/value heads at which something may have been missed, of all layers and sequences.
        """
        by_token = {sequence: np.sum(parts, 0) for sequence, parts in self._tokens.items()}
        total = float(sum(mass.sum() for mass, _ in by_token.values()))
        return {
            "mass": total,
            "per_step": total / max(steps, 1),
            "worst": [self._named(each, tokens[each.sequence]) for each in self._worst],
            "tokens": self._by_token(by_token, tokens, total),
            "kinds": _by_kind(by_token, tokens, total),
            "lags": self._by_lag(total),
        }

    def _named(self, each: Eviction, tokens: Tokens) -> dict[str, Any]:
        return {**vars(each), "lag": each.lag, **tokens.named(each.key)}

    def _by_token(
        self, by_token: Mapping[int, Array], tokens: Mapping[int, Tokens], total: float
    ) -> list[dict[str, Any]]:
        found = [
            (float(mass[key]), sequence, int(key), int(heads[key]))
            for sequence, (mass, heads) in by_token.items()
            for key in np.argsort(-mass, kind="stable")[: self._top]
            if mass[key] > 0
        ]
        found.sort(key=lambda each: (-each[0], *each[1:]))
        return [
            {"sequence": sequence, "key": key, "mass": mass, "share": mass / total, "heads": heads}
            | tokens[sequence].named(key)
            for mass, sequence, key, heads in found[: self._top]
        ]

    def _by_lag(self, total: float) -> list[dict[str, Any]]:
        last = int(np.flatnonzero(self._lags.any(0)).max(initial=-1))
        return [
            {"from": 2**b, "to": 2 ** (b + 1) - 1, "mass": mass, "share": mass / total, "keys": int(keys)}
            for b, (mass, keys) in enumerate(self._lags.T[: last + 1].tolist())
        ]


class Tokens:
    """The tokens of one sequence, with their kinds.

    A token's kind is the first of these that it is: the ``first`` of the sequence; with ``digits``; ``punctuation``,
    which has neither letters nor digits, blanks and line ends too; ``rare``, once in the sequence; any ``other``, and
    those whose text is not known.

    Parameters
    ----------
    texts : sequence of str
        What each adds to the text, ``[T]``.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [str(text) for text in texts]
        often = Counter(text.strip() for text in self.texts)
        self.kinds = [_kind(key, text, often[text.strip()]) for key, text in enumerate(self.texts)]

    def named(self, key: int) -> dict[str, Any]:
        """Return text, kind and context of a token."""
        before, after = self.texts[max(0, key - CONTEXT) : key], self.texts[key + 1 : key + 1 + CONTEXT]
        return {
            "text": self.texts[key],
            "kind": self.kinds[key],
            "before": "".join(before),
            "after": "".join(after),
        }


def _kind(key: int, text: str, often: int) -> str:
    if key == 0:
        return "first"
    if any(sign.isdigit() for sign in text):
        return "digits"
    if text and not any(sign.isalpha() for sign in text):
        return "punctuation"
    return "rare" if text and often == 1 else "other"


def _by_kind(by_token: Mapping[int, Array], tokens: Mapping[int, Tokens], total: float) -> list[dict[str, Any]]:
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


def _eviction(sequence: int, layer: int, head: int, key: int, missed: Missed) -> Eviction:
    steps, weights = missed.step[:, head, key], missed.weight[:, head, key]
    there = steps >= 0
    return Eviction(
        sequence,
        layer,
        head,
        key,
        float(missed.mass[head, key]),
        int(missed.gone[0, head, key]),
        tuple(steps[there].tolist()),
        tuple(weights[there].tolist()),
    )
