"""What changed in what two replays decided: which stays of which keys, the earliest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvscope.core.errors import ResultError
from kvscope.core.records import RunSummary
from kvscope.results.store import Replay, open_replay

_KEY = ["sequence", "layer", "kv_head", "key"]
_STEPS = ["enter_base", "leave_base", "enter_new", "leave_new"]
_NEVER = np.iinfo(np.int32).max  # after every other step


@dataclass(frozen=True)
class Moved:
    """One stay of one key that differs.

    Attributes
    ----------
    sequence, layer, kv_head, key : int
        Which key.
    step : int
        First step at which the two sides differ about it.
    base, new : tuple of (int, int or None), or None
        First step at which it is held, and first at which it is gone (None: never); None without such a stay.
    """

    sequence: int
    layer: int
    kv_head: int
    key: int
    step: int
    base: tuple[int, int | None] | None
    new: tuple[int, int | None] | None

    def words(self) -> tuple[str, str]:
        """Return what happened to the key on either side."""
        one, other = (self._words(stay) for stay in (self.base, self.new))
        return one, other

    def _words(self, stay: tuple[int, int | None] | None) -> str:
        if stay is None:
            return "not held"
        enter, leave = stay
        if enter == self.key:
            return "kept" if leave is None else f"evicted at {leave}"
        return f"held from {enter}" if leave is None else f"held {enter} to {leave - 1}"


@dataclass(frozen=True)
class Decisions:
    """The decisions of one run on both sides.

    Attributes
    ----------
    run : str
        Label.
    equal : bool
        Whether both sides decided the same everywhere.
    changed, stays : int or None
        How many stays differ, of how many on the base side; None where only digests were compared.
    first : list of Moved
        The earliest of them: whatever comes later may only follow from these.
    """

    run: str
    equal: bool
    changed: int | None = None
    stays: int | None = None
    first: Sequence[Moved] = ()


def compare_decisions(label: str, base: tuple[str, RunSummary], new: tuple[str, RunSummary], most: int) -> Decisions:
    """Return what one run decided differently on two sides.

    Equal digests settle it. Otherwise the residency is compared if both sides are replay folders; with a committed
    ``summary.json`` it can only be said whether anything differs.

    Parameters
    ----------
    label : str
        What to call the run.
    base, new : (str, RunSummary)
        Path of the replay folder or ``summary.json``, and what its summary says of the run.
    most : int
        How many of the stays that differ to name.

    Raises
    ------
    ResultError
        If a side has neither digest nor residency.
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
                f"{source} does not say what {label} decided: it has no digest",
                "Replay again with this kvscope, or compare replay folders.",
            )
    return Decisions(label, False)


def _compare_residency(label: str, base: tuple[Replay, int], new: tuple[Replay, int], most: int) -> Decisions:
    """Compare two runs sequence by sequence: never more than one is in memory."""
    changed = stays = 0
    first: list[Moved] = []
    for sequence in range(len(base[0].info.trace.sequences)):
        old, later = (_stays(replay, run, sequence) for replay, run in (base, new))
        moved = _moved(old, later)
        changed, stays = changed + len(moved), stays + len(old)
        first += [_named(row) for row in moved.head(most).to_dict("records")]
    first.sort(key=lambda item: item.step)
    return Decisions(label, changed == 0, changed, stays, first[:most])


def _stays(replay: Replay, run: int, sequence: int) -> pd.DataFrame:
    frame = replay.residency(run, sequence).drop(columns="run")
    return frame.assign(leave=frame["leave"].fillna(_NEVER)).astype(np.int64)


def _moved(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Return the stays that differ, earliest first; those of one key are paired in the order in which they began."""
    either = old.merge(new, how="outer", indicator="side")
    sides = []
    for side in ("left_only", "right_only"):
        own = either[either["side"] == side].drop(columns="side").sort_values([*_KEY, "enter"])
        sides.append(own.assign(nth=own.groupby(_KEY).cumcount()))
    pairs = sides[0].merge(sides[1], on=[*_KEY, "nth"], how="outer", suffixes=("_base", "_new"))
    enter_base, leave_base, enter_new, leave_new = pairs[_STEPS].fillna(_NEVER).to_numpy(np.int64).T
    entered = np.minimum(enter_base, enter_new)
    step = np.where(enter_base == enter_new, np.minimum(leave_base, leave_new), entered)
    return pairs.assign(step=step).sort_values(["step", *_KEY, "nth"])


def _named(row: Mapping[Any, Any]) -> Moved:
    def stay(side: str) -> tuple[int, int | None] | None:
        enter, leave = row[f"enter_{side}"], row[f"leave_{side}"]
        return None if pd.isna(enter) else (int(enter), None if leave == _NEVER else int(leave))

    place = {name: int(row[name]) for name in (*_KEY, "step")}
    return Moved(**place, base=stay("base"), new=stay("new"))
