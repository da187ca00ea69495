"""Residency intervals as they were recorded: of all runs in one layer of one sequence, or of some."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from kvscope.core.residency import ResidencyIntervals
from kvscope.results.store import Replay


def read_residency(
    replay: Replay, sequence: int, layer: int, runs: Collection[int] | None = None
) -> dict[int, ResidencyIntervals]:
    """Return the residency intervals of runs in one layer of one sequence, by number of the run.

    Parameters
    ----------
    replay : Replay
        Where to read.
    sequence, layer : int
        Their numbers.
    runs : collection of int, optional
        Numbers of the runs; all by default.

    Raises
    ------
    ResultError
        If the file cannot be read.
    """
    trace = replay.info.trace
    heads, length = trace.heads_of(layer).kv_heads, trace.sequences[sequence].length
    frame = replay.residency(sequence=sequence, layer=layer)
    selected = [run.run for run in replay.info.runs] if runs is None else list(runs)
    parts = {int(str(run)): part for run, part in frame.groupby("run")}
    return {run: _intervals(parts.get(run, frame.iloc[:0]), heads, length) for run in selected}


def _intervals(rows: pd.DataFrame, heads: int, length: int) -> ResidencyIntervals:
    head, key, enter = (rows[name].to_numpy(np.int32) for name in ("kv_head", "key", "enter"))
    leave = rows["leave"].fillna(-1).to_numpy(np.int32)
    return ResidencyIntervals.of(kv_head=head, key=key, enter=enter, leave=leave, heads=heads, length=length)
