"""Stays of keys as they were recorded: all runs of one layer of one sequence, or one."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from kvscope.results.loop_gap import Stays
from kvscope.results.store import Replay


def read_stays(replay: Replay, sequence: int, layer: int, runs: Collection[int] | None = None) -> dict[int, Stays]:
    """Return the stays of runs in one layer of one sequence, by number of the run; of all runs by default.

    Raises
    ------
    ResultError
        If the file cannot be read.
    """
    frame = replay.residency(sequence=sequence, layer=layer)
    wanted = [int(run["run"]) for run in replay.info["runs"]] if runs is None else list(runs)
    parts = {int(str(run)): part for run, part in frame.groupby("run")}
    return {run: _stays(parts.get(run, frame.iloc[:0])) for run in wanted}


def _stays(frame: pd.DataFrame) -> Stays:
    head, key, enter = (frame[name].to_numpy(np.int64) for name in ("kv_head", "key", "enter"))
    return Stays(head, key, enter, frame["leave"].fillna(-1).to_numpy(np.int64))
