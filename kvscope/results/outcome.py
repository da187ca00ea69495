"""What a policy costs in tokens: perplexity, divergence and agreement, from the losses of the closed loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.core.records import Direction, MetricRecord
from kvscope.core.summary_records import MetricSummary
from kvscope.results.statistics import resampled

Array = NDArray[Any]
LOSSES = ("nll_full", "nll_policy", "kl", "top1_equal")  # columns of tokens.parquet


def _declared(
    direction: Direction, low: float | None, high: float | None, untouched: float | None, what: str
) -> MetricRecord:
    return MetricRecord(direction, (low, high), untouched, summary=what)


OUTCOMES: dict[str, MetricRecord] = {
    "perplexity": _declared("lower", 1, None, None, "exp of the mean loss of the scored tokens under the policy."),
    "perplexity_full": _declared("none", 1, None, None, "exp of their mean loss with the full cache."),
    "perplexity_delta": _declared("lower", None, None, 0.0, "perplexity minus that of the full cache."),
    "perplexity_ratio": _declared("lower", 0, None, 1.0, "perplexity divided by that of the full cache."),
    "token_kl": _declared("lower", 0, None, 0.0, "Mean KL(full || policy) of the next-token distributions, in nats."),
    "top1_agreement": _declared("higher", 0, 1, 1.0, "Share of tokens at which both have the same first choice."),
}


class Outcomes:
    """Collects losses as they are written, and forms the outcome of every run."""

    def __init__(self, near_copies: Sequence[int] = ()) -> None:
        self._near_copies = near_copies  # cluster of every sequence; empty if each is its own
        # run -> sequence -> sums of the losses and number of tokens, [5]
        self._sums: dict[int, dict[int, NDArray[np.float64]]] = defaultdict(dict)

    def add(self, run: int, sequence: int, values: Mapping[str, Array]) -> None:
        """Take the losses of all scored tokens of one sequence."""
        sums = [float(np.sum(values[name], dtype=np.float64)) for name in LOSSES]
        self.add_sums(run, sequence, [*sums, len(values["kl"])])

    def add_sums(self, run: int, sequence: int, sums: Sequence[float]) -> None:
        """Take the sums of the losses over the scored tokens of one sequence, and the number of these tokens."""
        self._sums[run][sequence] = np.array(sums, np.float64)

    def of(self, run: int) -> dict[str, MetricSummary]:
        """Return every outcome of a run with its 95 % bootstrap interval over sequences; nothing for an open run."""
        if run not in self._sums:
            return {}
        sums = np.array(list(self._sums[run].values()))  # [sequences, 5]
        values = _outcomes(sums.sum(0))
        count = int(sums[:, -1].sum())
        low: Mapping[str, float | None] = dict.fromkeys(values)
        high = low
        clusters = [self._near_copies[number] for number in self._sums[run]] if self._near_copies else ()
        resamples = resampled(sums, clusters=clusters)
        if resamples is not None:
            drawn = _outcomes(resamples[0].T)  # each [BOOTSTRAP]
            low, high = ({name: float(np.quantile(v, q)) for name, v in drawn.items()} for q in (0.025, 0.975))
        return {name: MetricSummary(float(value), low[name], high[name], count) for name, value in values.items()}

    def by_sequence(self, run: int) -> dict[int, dict[str, float]]:
        """Return every outcome of each sequence of a run; nothing for an open run."""
        sequences = self._sums.get(run, {})
        return {
            number: {name: float(value) for name, value in _outcomes(sums).items()}
            for number, sums in sequences.items()
        }


def _outcomes(sums: NDArray[np.float64]) -> dict[str, Any]:
    """Return the outcomes of sums ``[5, ...]``."""
    full, policy, kl, equal = sums[:4] / sums[4]
    return {
        "perplexity": np.exp(policy),
        "perplexity_full": np.exp(full),
        "perplexity_delta": np.exp(policy) - np.exp(full),
        "perplexity_ratio": np.exp(policy - full),
        "token_kl": kl,
        "top1_agreement": equal,
    }
