"""From steps to one number: means over steps, then heads, layers and sequences, with an interval over sequences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.results.schema import SCHEMA_VERSION, SUMMARY_KIND

Array = NDArray[Any]

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
        # (run, metric) -> (sequence, layer) -> sums and counts of the heads, each [H]
        self._heads: dict[tuple[int, str], dict[tuple[int, int], tuple[Array, Array]]] = defaultdict(dict)

    def add(self, run: int, sequence: int, layer: int, values: Mapping[str, Array]) -> None:
        """Take values ``[H, S]`` of some or all steps of one layer; NaN is no value."""
        for name in self.metrics:
            there = ~np.isnan(values[name])
            sums, counts = np.where(there, values[name], 0).sum(1, dtype=np.float64), there.sum(1)  # [H] each
            of_run = self._heads[run, name]
            before = of_run.get((sequence, layer))
            of_run[sequence, layer] = (sums, counts) if before is None else (before[0] + sums, before[1] + counts)

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
        layers: dict[int, list[float]] = defaultdict(list)  # sequence -> means of its layers
        count = 0
        for (sequence, _), (sums, counts) in sorted(self._heads[run, name].items(), key=lambda item: item[0]):
            count += int(counts.sum())
            if counts.any():
                layers[sequence].append(float((sums[counts > 0] / counts[counts > 0]).mean()))
        means = np.array([np.mean(of_sequence) for of_sequence in layers.values()])
        low, high = interval(means)
        return {"mean": None if means.size == 0 else float(means.mean()), "low": low, "high": high, "count": count}


def interval(means: NDArray[np.float64], seed: int = 0) -> tuple[float | None, float | None]:
    """Return the 95 % percentile-bootstrap interval of the mean over sequences; None with fewer than five."""
    if len(means) < FEWEST:
        return None, None
    draws = np.random.default_rng(seed).integers(0, len(means), (BOOTSTRAP, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)
