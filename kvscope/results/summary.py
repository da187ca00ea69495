"""From steps to one number: means over steps, then heads, layers and sequences, with an interval over sequences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvscope.core.records import RunRecord
from kvscope.core.summary_records import BoundShares, MetricSummary, RunSummary
from kvscope.results.statistics import interval

Array = NDArray[Any]
Level = Literal["run", "sequence", "layer", "head"]
LEVELS: tuple[Level, ...] = ("run", "sequence", "layer", "head")  # of which each is the mean over the next
_PLACE = ("run", "sequence", "layer")


class Means:
    """Collects metric values as they are written or read, and forms means of every level.

    Parameters
    ----------
    metrics : list of str
        Names.
    near_copies : sequence of int
        Cluster of every sequence; empty if each is its own.
    """

    def __init__(self, metrics: list[str], near_copies: Sequence[int] = ()) -> None:
        self.metrics, self._near_copies = metrics, near_copies
        # (run, metric) -> (sequence, layer) -> sums and counts of the heads, each [H]
        self._heads: dict[tuple[int, str], dict[tuple[int, int], tuple[Array, Array]]] = defaultdict(dict)

    def add(self, run: int, sequence: int, layer: int, values: Mapping[str, Array]) -> None:
        """Take values ``[H, S]`` of some or all steps of one layer; NaN means no value."""
        for name in self.metrics:
            there = ~np.isnan(values[name])
            sums, counts = np.where(there, values[name], 0).sum(1, dtype=np.float64), there.sum(1)  # [H] each
            self._add(run, sequence, layer, name, sums, counts)

    def add_table(self, table: pa.Table, heads: int) -> None:
        """Take rows of ``fidelity.parquet``, in any order, of a model with so many query heads; null means no value."""
        head = table["head"].to_numpy()
        columns = {name: table[name].to_numpy() for name in self.metrics}
        for place, rows in _stretches(table):
            for name, column in columns.items():
                values = column[rows]
                there = ~np.isnan(values)
                of_head = head[rows][there]
                sums = np.bincount(of_head, values[there], heads)
                self._add(*place, name, sums, np.bincount(of_head, minlength=heads))

    def of(self, run: int, name: str, level: Level) -> dict[tuple[int, ...], float]:
        """Return the means of a metric in a run, by ``(sequence, layer, head)`` or as much of it as `level` has.

        What has no value is omitted: a head, a layer in which no head has one, and so on.
        """
        places = sorted(self._heads[run, name].items(), key=lambda item: item[0])
        if level == "head":
            return {
                (*place, int(head)): float(sums[head] / counts[head])
                for place, (sums, counts) in places
                for head in np.flatnonzero(counts)
            }
        found: dict[tuple[int, ...], float] = {
            place: float((sums[counts > 0] / counts[counts > 0]).mean())
            for place, (sums, counts) in places
            if counts.any()
        }
        for _ in range(LEVELS.index("layer") - LEVELS.index(level)):
            groups: dict[tuple[int, ...], list[float]] = defaultdict(list)
            for place, mean in found.items():
                groups[place[:-1]].append(mean)
            found = {place: float(np.mean(means)) for place, means in groups.items()}
        return found

    def summaries(self, run: int) -> dict[str, MetricSummary]:
        """Return every metric of a run with its interval and the number of its values."""
        return {name: self._metric(run, name) for name in self.metrics}

    def _add(self, run: int, sequence: int, layer: int, name: str, sums: Array, counts: Array) -> None:
        of_run = self._heads[run, name]
        before = of_run.get((sequence, layer))
        of_run[sequence, layer] = (sums, counts) if before is None else (before[0] + sums, before[1] + counts)

    def _metric(self, run: int, name: str) -> MetricSummary:
        count = sum(int(counts.sum()) for _, counts in self._heads[run, name].values())
        of_sequence = self.of(run, name, "sequence")
        means = np.array(list(of_sequence.values()))
        clusters = [self._near_copies[sequence] for (sequence,) in of_sequence] if self._near_copies else ()
        low, high = interval(means, clusters=clusters)
        return MetricSummary(None if means.size == 0 else float(means.mean()), low, high, count)


def bounds(run: RunSummary, runs: Sequence[RunSummary]) -> BoundShares:
    """Return how far a run gets, and how far any could, from the runs of the bounds at its budget.

    ``share_of_belady`` is its retained mass divided by that of ``belady``: how well it predicts. It can pass one where
    a run holds more keys at some steps, or lets them come back. ``belady_of_ideal`` is what evicting for good leaves of
    the ideal set's mass, whoever decides. None where the replay has no such run; of several, with another ``scope``,
    the highest counts.
    """

    def most(policy: str) -> float | None:
        at_its_budget = (one for one in runs if one.policy == policy and _at(one) == _at(run))
        return max((mass for one in at_its_budget if (mass := one.mean("retained_mass")) is not None), default=None)

    def ratio(part: float | None, whole: float | None) -> float | None:
        return part / whole if part is not None and whole else None

    belady = most("belady")
    return BoundShares(ratio(run.mean("retained_mass"), belady), ratio(belady, most("ideal")))


def _at(run: RunRecord) -> tuple[str | None, str, str]:
    """Return what a run shares with the run that is its bound."""
    return run.budget, run.prefill, run.loop


def _stretches(table: pa.Table) -> Iterator[tuple[tuple[int, int, int], slice]]:
    """Yield (run, sequence, layer) of every stretch of rows that share them, and the rows."""
    if not table.num_rows:
        return
    places = np.stack([table[name].to_numpy() for name in _PLACE])  # [3, N]
    starts = [0, *(np.flatnonzero((np.diff(places) != 0).any(0)) + 1).tolist(), table.num_rows]
    for start, stop in pairwise(starts):
        run, sequence, layer = places[:, start].tolist()
        yield (run, sequence, layer), slice(start, stop)
