"""Tails of retained mass: steps at which a head lost most of its attention, the worst step, the worst head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.core.summary_records import HeadPlace, StepPlace, Tails

Array = NDArray[Any]
OF = ("retained_mass", "retained_mass_no_sinks")  # metrics whose tails are kept: shares, of which more is better
HALF = 0.5


class TailCounter:
    """Collects retained mass as it is written, and summarises its lowest values.

    Of each metric in `OF` that is there, a run has

    - ``share_below_half``: share of the steps at which a head retains less than half, the mean over steps, then heads,
      layers and sequences, as of any metric;
    - ``worst_step``: the least value of any step of a head, the mean over heads, layers and sequences;
      ``worst_step_at`` says where the very least is, and what;
    - ``worst_head``: the least mean of any head, over its steps, then sequences; ``worst_head_at`` says which.
    """

    def __init__(self) -> None:
        # (run, metric) -> (sequence, layer) -> rows of `_row`, each [H]
        self._found: dict[tuple[int, str], dict[tuple[int, int], NDArray[np.float64]]] = defaultdict(dict)

    def add(self, run: int, sequence: int, layer: int, steps: Array, values: Mapping[str, Array]) -> None:
        """Take values ``[H, S]`` of steps ``[S]``, which are some or all of one layer; NaN means no value."""
        for name in OF:
            if name in values:
                of_run, made = self._found[run, name], _row(np.asarray(steps), values[name])
                before = of_run.get((sequence, layer))
                of_run[sequence, layer] = made if before is None else _joined(before, made)

    def of(self, run: int) -> dict[str, Tails]:
        """Return the tails of a run, by metric; nothing of a metric without a value."""
        found = {name: self._of(run, name) for name in OF if (run, name) in self._found}
        return {name: tails for name, tails in found.items() if tails is not None}

    def _of(self, run: int, name: str) -> Tails | None:
        shares: dict[int, list[float]] = defaultdict(list)  # sequence -> layers
        least: dict[int, list[float]] = defaultdict(list)
        means: dict[tuple[int, int], list[float]] = defaultdict(list)  # (layer, head) -> sequences
        worst: tuple[float, int, int, int, int] | None = None
        for (sequence, layer), (count, below, total, minimum, step) in sorted(self._found[run, name].items()):
            heads: list[int] = np.flatnonzero(count).tolist()
            if not heads:
                continue
            shares[sequence].append(float((below[heads] / count[heads]).mean()))
            least[sequence].append(float(minimum[heads].mean()))
            for head in heads:
                means[layer, head].append(float(total[head] / count[head]))
            lowest = min(heads, key=lambda head: minimum[head])
            here = (float(minimum[lowest]), sequence, layer, lowest, int(step[lowest]))
            worst = here if worst is None else min(worst, here)
        if worst is None:
            return None
        by_head = {place: float(np.mean(values)) for place, values in means.items()}
        place = min(by_head, key=lambda place: (by_head[place], place))
        return Tails(_mean(shares), _mean(least), StepPlace(*worst), by_head[place], HeadPlace(*place))


def _row(steps: Array, values: Array) -> NDArray[np.float64]:
    """Return count, number below half, sum, minimum and its step, of each head: ``[5, H]``."""
    there = ~np.isnan(values)
    low = np.where(there, values, np.inf)
    at = low.argmin(1)
    return np.stack(
        [
            there.sum(1),
            (low < HALF).sum(1),
            np.where(there, values, 0).sum(1, dtype=np.float64),
            np.take_along_axis(low, at[:, None], 1)[:, 0],
            steps[at],
        ]
    ).astype(np.float64)


def _joined(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows of two parts of the steps as one."""
    joined = one + other
    joined[3:] = np.where(other[3] < one[3], other[3:], one[3:])
    return joined


def _mean(layers: Mapping[int, list[float]]) -> float:
    """Return the mean over layers, then sequences."""
    return float(np.mean([np.mean(values) for values in layers.values()]))
