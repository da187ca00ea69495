"""Differences between the evictions of two replays: residency intervals that differ, the earliest first."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kvscope.core.errors import ResultError
from kvscope.core.summary_records import RunSummary
from kvscope.results.store import Replay, open_replay

_KEY = ["sequence", "layer", "kv_head", "key"]
_STEPS = ["enter_base", "leave_base", "enter_new", "leave_new"]
_NEVER = np.iinfo(np.int32).max  # after every other step


@dataclass(frozen=True)
class ResidencyChange:
    """One residency interval of one key that differs.

    Attributes
    ----------
    sequence, layer, kv_head, key : int
        Which key.
    step : int
        First step at which the two sides differ.
    base, new : tuple of (int, int or None), or None
        First step after which it is held, and first step after which it is evicted (None: never); None without such an
        interval.
    """

    sequence: int
    layer: int
    kv_head: int
    key: int
    step: int
    base: tuple[int, int | None] | None
    new: tuple[int, int | None] | None

    def words(self) -> tuple[str, str]:
        """Return a description of each interval."""
        one, other = (self._words(interval) for interval in (self.base, self.new))
        return one, other

    def _words(self, interval: tuple[int, int | None] | None) -> str:
        if interval is None:
            return "not held"
        enter, leave = interval
        if enter == self.key:
            return "retained" if leave is None else f"evicted at {leave}"
        return f"held from {enter}" if leave is None else f"held {enter} to {leave - 1}"


@dataclass(frozen=True)
class Decisions:
    """Whether one run evicted the same keys on both sides.

    Attributes
    ----------
    run : str
        Label.
    equal : bool
        Whether all residency intervals are the same.
    changed, stays : int or None
        Number of residency intervals that differ, and of all intervals of the base; None where only digests were
        compared.
    first : list of ResidencyChange
        The earliest differences: later ones may be consequences of these.
    """

    run: str
    equal: bool
    changed: int | None = None
    stays: int | None = None
    first: Sequence[ResidencyChange] = ()


def compare_decisions(label: str, base: tuple[str, RunSummary], new: tuple[str, RunSummary], most: int) -> Decisions:
    """Return in which residency intervals one run differs between two replays.

    With equal digests nothing differs. Otherwise the intervals are compared if both sides are replay folders; a
    ``summary.json`` has the digest alone, which does not tell what differs.

    Parameters
    ----------
    label : str
        Name of the run in messages.
    base, new : (str, RunSummary)
        Path of the replay folder or ``summary.json``, and the run in its summary.
    most : int
        Number of differences to list.

    Raises
    ------
    ResultError
        If a side has neither a digest nor residency intervals.
    """
    digests = [run.decisions for _, run in (base, new)]
    if None not in digests and digests[0] == digests[1]:
        return Decisions(label, True)
    folders = [Path(source) for source, _ in (base, new)]
    if all(folder.is_dir() for folder in folders):
        one, other = (open_replay(folder) for folder in folders)
        return _compare_residency(label, (one, base[1].run), (other, new[1].run), most)
    for (source, _), digest in zip((base, new), digests, strict=True):
        if digest is None:
            raise ResultError(
                f"{source} has no digest of the decisions of {label}",
                "Replay again with this version of kvscope, or compare replay folders.",
            )
    return Decisions(label, False)


def _compare_residency(label: str, base: tuple[Replay, int], new: tuple[Replay, int], most: int) -> Decisions:
    """Compare two runs sequence by sequence, so that only one sequence is in memory."""
    changed = total = 0
    first: list[ResidencyChange] = []
    for sequence in range(len(base[0].info.trace.sequences)):
        old, later = (_intervals(replay, run, sequence) for replay, run in (base, new))
        changes = _changes(old, later)
        changed, total = changed + len(changes), total + len(old)
        first += [_change(row) for row in changes.head(most).to_dict("records")]
    first.sort(key=lambda item: item.step)
    return Decisions(label, changed == 0, changed, total, first[:most])


def _intervals(replay: Replay, run: int, sequence: int) -> pd.DataFrame:
    frame = replay.residency(run, sequence).drop(columns="run")
    return frame.assign(leave=frame["leave"].fillna(_NEVER)).astype(np.int64)


def _changes(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Return the intervals that differ, earliest first; those of one key are paired in the order of their steps."""
    either = old.merge(new, how="outer", indicator="side")
    sides = []
    for side in ("left_only", "right_only"):
        rows = either[either["side"] == side].drop(columns="side").sort_values([*_KEY, "enter"])
        sides.append(rows.assign(nth=rows.groupby(_KEY).cumcount()))
    pairs = sides[0].merge(sides[1], on=[*_KEY, "nth"], how="outer", suffixes=("_base", "_new"))
    enter_base, leave_base, enter_new, leave_new = pairs[_STEPS].fillna(_NEVER).to_numpy(np.int64).T
    entered = np.minimum(enter_base, enter_new)
    step = np.where(enter_base == enter_new, np.minimum(leave_base, leave_new), entered)
    return pairs.assign(step=step).sort_values(["step", *_KEY, "nth"])


def _change(row: Mapping[Hashable, float]) -> ResidencyChange:
    def interval(side: str) -> tuple[int, int | None] | None:
        enter, leave = row[f"enter_{side}"], row[f"leave_{side}"]
        return None if pd.isna(enter) else (int(enter), None if leave == _NEVER else int(leave))

    place = {name: int(row[name]) for name in (*_KEY, "step")}
    return ResidencyChange(**place, base=interval("base"), new=interval("new"))
