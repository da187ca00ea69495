"""From steps to one number: means over steps, then heads, layers and sequences, with an interval over sequences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.results.schema import SCHEMA_VERSION, SUMMARY_KIND

BOOTSTRAP = 2000  # resamples
FEWEST = 5  # sequences for an interval


class Means:
    """Collects metric values as they are written, and forms the summary.

    Parameters
    ----------
    metrics : list of str
        Names.
    """

    def __init__(self, metrics: list[str]) -> None:
        self.metrics = metrics
        # run -> metric -> sequence -> means of the layers
        self._layers: dict[int, dict[str, dict[int, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        self._counts: dict[tuple[int, str], int] = defaultdict(int)

    def add(self, run: int, sequence: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Take the values of one layer, each ``[H, S]``; NaN is no value."""
        for name in self.metrics:
            there = ~np.isnan(values[name])
            self._counts[run, name] += int(there.sum())
            heads = there.any(1)
            if heads.any():
                sums = np.where(there, values[name], 0).sum(1, dtype=np.float64)[heads] / there.sum(1)[heads]
                self._layers[run][name][sequence].append(float(sums.mean()))

    def summary(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of ``summary.json`` for the runs of ``run.json``."""
        return {
            "kind": SUMMARY_KIND,
            "schema": SCHEMA_VERSION,
            "trace": {
                key: info["trace"][key] for key in ("name", "identity", "model", "sequences") if key in info["trace"]
            },
            "metrics": info["metrics"],
            "runs": [self._run(run) for run in info["runs"]],
        }

    def _run(self, run: Mapping[str, Any]) -> dict[str, Any]:
        keys = run["budget_keys"]
        same = isinstance(keys, list) and len(set(keys)) == 1
        return {
            **run,
            "budget_keys": keys[0] if same else keys,
            "metrics": {name: self._metric(run["run"], name) for name in self.metrics},
        }

    def _metric(self, run: int, name: str) -> dict[str, Any]:
        sequences = self._layers[run][name]
        means = np.array([np.mean(sequences[number]) for number in sorted(sequences)])
        low, high = interval(means)
        return {
            "mean": None if means.size == 0 else float(means.mean()),
            "low": low,
            "high": high,
            "count": self._counts[run, name],
        }


def interval(means: NDArray[np.float64], seed: int = 0) -> tuple[float | None, float | None]:
    """Return the 95 % percentile-bootstrap interval of the mean over sequences; None with fewer than five."""
    if len(means) < FEWEST:
        return None, None
    draws = np.random.default_rng(seed).integers(0, len(means), (BOOTSTRAP, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return (None, None) if math.isnan(low) else (float(low), float(high))
