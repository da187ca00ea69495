"""Stays of keys: which keys a run held when, in one layer of one sequence, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvscope.report.encoding import packed, packed_bytes
from kvscope.results.store import Replay

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Stays:
    """Every stay of every key: held exactly when ``enter <= t < leave``. Of a sparse reader: what it reads.

    Attributes
    ----------
    heads, length : int
        ``G`` and ``T``.
    head, key, enter, leave : array
        int32 ``[N]``, sorted by head, key and step; ``leave`` is ``T`` where the key is held to the end.
    """

    heads: int
    length: int
    head: Ints
    key: Ints
    enter: Ints
    leave: Ints

    @classmethod
    def of(cls, frame: pd.DataFrame, heads: int, length: int) -> Stays:
        """Return the stays in rows of ``residency.parquet``; ``leave`` is null or negative where a key never left."""
        head, key, enter = (frame[name].to_numpy(dtype=np.int32) for name in ("kv_head", "key", "enter"))
        leave = frame["leave"].fillna(-1).to_numpy(dtype=np.int32)
        order = np.lexsort((enter, key, head))
        return cls(heads, length, head[order], key[order], enter[order], np.where(leave < 0, length, leave)[order])

    @cached_property
    def once(self) -> bool:
        """Whether every key of every head stays exactly once, from its own position on."""
        grid = np.arange(self.heads * self.length) % self.length
        return len(self.key) == len(grid) and np.array_equal(self.key, grid) and np.array_equal(self.enter, grid)

    @cached_property
    def cell(self) -> NDArray[np.int64]:
        """Number of the key among all keys of all heads, int64 ``[N]``."""
        return self.head.astype(np.int64) * self.length + self.key

    def holding(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many heads hold each key after each of the rising `steps`, int64 ``[S, T]``."""
        size = (len(steps) + 1, self.length)
        change = np.zeros(size[0] * size[1], np.int64)
        for when, sign in ((self.enter, 1), (self.leave, -1)):
            place = np.searchsorted(steps, when) * self.length + self.key
            change += sign * np.bincount(place, minlength=len(change))
        return np.asarray(change.reshape(size)[:-1].cumsum(0))

    def gone(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return head, key, first step without the key and last such step + 1, of every absence after a stay."""
        last = np.append(self.cell[1:] != self.cell[:-1], True)
        until = np.where(last, self.length, np.append(self.enter[1:], 0))
        away = self.leave < until
        return tuple(each[away].astype(np.int64) for each in (self.head, self.key, self.leave, until))  # type: ignore[return-value]

    def held(self, step: int) -> NDArray[np.bool_]:
        """Return which keys are held after a step, bool ``[G * T]``."""
        there = (self.enter <= step) & (step < self.leave)
        if self.once:
            return there
        mask = np.zeros(self.heads * self.length, bool)
        mask[self.cell[there]] = True
        return mask

    def packed(self) -> dict[str, Any]:
        """Return the stays as the page carries them.

        Where every key stays once, ``leave`` alone is given, head by head and key by key. Otherwise ``counts`` says
        how many stays each head has, and ``key``, ``enter`` and ``leave`` give them. If all heads agree, one of them
        is given; ``stored`` says how many are.
        """
        counts = np.bincount(self.head, minlength=self.heads)
        columns = {"key": self.key, "enter": self.enter, "leave": self.leave}
        if (counts == counts[0]).all():
            parts = {name: column.reshape(self.heads, -1) for name, column in columns.items()}
            if all((part == part[0]).all() for part in parts.values()):
                columns, counts = {name: part[0] for name, part in parts.items()}, counts[:1]
        if self.once:
            columns = {"leave": columns["leave"]}
        return {
            "heads": self.heads,
            "stored": len(counts),
            "counts": None if self.once else counts.tolist(),
            **{name: packed(column) for name, column in columns.items()},
        }


def packed_stays_bytes(value: dict[str, Any]) -> int:
    """Return the size of packed stays in the page."""
    return sum(packed_bytes(value[name]) for name in ("key", "enter", "leave") if name in value)


def read_stays(replay: Replay, sequence: int, layer: int) -> dict[int, Stays]:
    """Return the stays of every run in one layer of one sequence, by number of the run."""
    trace = replay.info["trace"]
    heads, length = int(trace["kv_heads"]), int(trace["sequences"][sequence]["length"])
    frame = replay.residency(sequence=sequence, layer=layer)
    return {int(str(run)): Stays.of(rows, heads, length) for run, rows in frame.groupby("run")}
