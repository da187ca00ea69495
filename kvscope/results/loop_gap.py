"""How far the open loop is from the closed one: do both hold the same keys, and is their mass the same?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BLOCK = 2**24  # entries of a block of held sets


@dataclass(frozen=True)
class Stays:
    """Stays of one run, sequence and layer: each array is ``[N]``; `leave` of -1 is never."""

    kv_head: Array
    key: Array
    enter: Array
    leave: Array

    def held(self, start: int, stop: int, heads: int, length: int) -> NDArray[np.bool_]:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[G, stop - start, T]``."""
        leave = np.where(self.leave < 0, length, self.leave)
        here = (self.enter < stop) & (leave > start)
        head, key = self.kv_head[here], self.key[here]
        change = np.zeros((heads, stop - start + 1, length), np.int8)
        np.add.at(change, (head, np.maximum(self.enter[here], start) - start, key), 1)
        np.add.at(change, (head, np.minimum(leave[here], stop) - start, key), -1)
        held: NDArray[np.bool_] = change[:, :-1].cumsum(1, dtype=np.int8) > 0
        return held


class Gap:
    """Compares the stays of closed runs with those of the open runs they belong to, as they are written.

    Parameters
    ----------
    runs : sequence of mapping
        Of ``run.json``; a closed run names its open one as ``open_run``.
    sequences : sequence of mapping
        Of the trace: ``prompt`` and ``length``.
    heads : int
        Key/value heads.
    """

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._open = {run["run"]: run["open_run"] for run in info["runs"] if run.get("open_run") is not None}
        self._wanted = set(self._open.values())
        self._trace, self._full = info["trace"], info["prefill"] == "full"
        self._kept: dict[tuple[int, int, int], Stays] = {}
        self._overlap: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))  # run -> layer

    def add(self, run: int, sequence: int, layer: int, stays: Stays) -> None:
        """Take the stays of a run; open ones come first and are kept until their closed one has come."""
        if run in self._wanted:
            self._kept[run, sequence, layer] = stays
        elif run in self._open:
            other = self._kept.pop((self._open[run], sequence, layer), None)
            if other is not None:
                self._overlap[run][layer].append(self._shared(sequence, stays, other))

    def of(self, run: int, metrics: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return the gap of a closed run, or None where there is no open one.

        Parameters
        ----------
        metrics : mapping
            Of every run by its number, as in the summary.
        """
        if run not in self._overlap:
            return None
        layers = {layer: float(np.mean(values)) for layer, values in sorted(self._overlap[run].items())}
        open_, closed = (metrics[number].get("retained_mass", {}).get("mean") for number in (self._open[run], run))
        return {
            "held_overlap": float(np.mean(list(layers.values()))),
            "held_overlap_by_layer": {str(layer): value for layer, value in layers.items()},
            "retained_mass": None if open_ is None or closed is None else closed - open_,
        }

    def _shared(self, sequence: int, one: Stays, other: Stays) -> float:
        """Return ``|A & B| / |A | B|`` of the held sets, the mean over heads and the steps from which keys go."""
        length, heads = self._trace["sequences"][sequence]["length"], self._trace["kv_heads"]
        first = self._trace["sequences"][sequence]["prompt"] - 1 if self._full else 0
        size = max(1, BLOCK // (heads * length))
        total, count = 0.0, 0
        for start in range(first, length, size):
            stop = min(start + size, length)
            a, b = (stays.held(start, stop, heads, length) for stays in (one, other))
            total += float(((a & b).sum(-1) / np.maximum((a | b).sum(-1), 1)).sum())
            count += heads * (stop - start)
        return total / count
