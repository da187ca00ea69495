"""Reading a replay."""

from __future__ import annotations

from functools import cached_property
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.core.errors import REPLAY_COMMAND, ResultError, UsageError
from kvscope.core.newest import newest_first
from kvscope.core.output import checksum
from kvscope.core.records import RUN_FILE, ReplayRecord, read_replay
from kvscope.core.summary_records import SUMMARY_FILE, SummaryRecord, read_summary
from kvscope.results.schema import LOSSES


class Replay:
    """A complete replay on disk. Open one with `open_replay`.

    Attributes
    ----------
    path : Path
        Its folder.
    info : ReplayRecord
        All of ``run.json``.
    """

    def __init__(self, path: Path, info: ReplayRecord) -> None:
        self.path, self.info = path, info

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @cached_property
    def summary(self) -> SummaryRecord:
        """The content of ``summary.json``."""
        return read_summary(self.path / SUMMARY_FILE)

    def _repr_html_(self) -> str:
        """Return the summary as a table, for notebooks: the mean of every metric of every run."""
        rows = [
            {"policy": run.label, "budget": run.budget or "", "loop": run.loop}
            | {name.replace("_", " "): value.mean for name, value in run.metrics.items()}
            for run in self.summary.runs
        ]
        table = pd.DataFrame(rows).to_html(index=False, na_rep="", float_format="{:.4g}".format, border=0)
        return f"<p><b>{escape(self.name)}</b>: {len(rows)} runs</p>{table}"

    def require_trace(self, identity: str, path: Path) -> None:
        """Raise ResultError unless the replay was made from the trace at `path`, which has this identity."""
        if self.info.trace.identity != identity:
            raise ResultError(f"{self.path} was not made from {path}", "Name the trace of the replay with --trace.")

    def residency(self, run: int | None = None, sequence: int | None = None, layer: int | None = None) -> pd.DataFrame:
        """Return residency intervals: the columns of ``residency.parquet``; ``leave`` is a nullable integer."""
        return self._frame("residency", run, sequence, layer).astype({"leave": "Int32"})

    def fidelity(self, run: int | None = None, sequence: int | None = None, layer: int | None = None) -> pd.DataFrame:
        """Return metrics of every step and query head: the columns of ``fidelity.parquet``."""
        return self._frame("fidelity", run, sequence, layer)

    def tokens(self, run: int | None = None, sequence: int | None = None) -> pd.DataFrame:
        """Return losses of the scored tokens of closed-loop runs: the columns of ``tokens.parquet``.

        Raises
        ------
        UsageError
            If no run of the replay is closed.
        """
        if not (self.path / LOSSES).exists():
            raise UsageError(
                f"replay {self.path} has no run of the closed loop", f"Make one: {REPLAY_COMMAND} --perplexity"
            )
        return self._frame("tokens", run, sequence, None)

    def resident(self, run: int, sequence: int, layer: int) -> NDArray[np.bool_]:
        """Return ``R_t`` for every step, bool ``[G, T, T]``: whether key ``k`` is held after step ``t``.

        Raises
        ------
        UsageError
            If the replay has no such run, sequence or layer.
        """
        return self._mask(run, sequence, layer, 0)

    def visible(self, run: int, sequence: int, layer: int) -> NDArray[np.bool_]:
        """Return ``V_t`` for every step, bool ``[G, T, T]``: what was held after ``t - 1``, and key ``t``."""
        return self._mask(run, sequence, layer, 1)

    def _mask(self, run: int, sequence: int, layer: int, shift: int) -> NDArray[np.bool_]:
        self._require(run, sequence, layer)
        frame = self.residency(run, sequence, layer)
        trace = self.info.trace
        length = trace.sequences[sequence].length
        mask = np.zeros((trace.kv_heads, length, length), bool)
        leave = frame["leave"].fillna(length).to_numpy(int)
        intervals = zip(frame["kv_head"], frame["key"], frame["enter"] + shift, leave + shift, strict=True)
        for head, key, start, stop in intervals:
            mask[head, start:stop, key] = True
        if shift:
            steps = np.arange(length)
            mask[:, steps, steps] = True
        return mask

    def _require(self, run: int, sequence: int, layer: int) -> None:
        trace = self.info.trace
        there = {
            "run": (run, [item.run for item in self.info.runs]),
            "sequence": (sequence, list(range(len(trace.sequences)))),
            "layer": (layer, list(trace.layers)),
        }
        for what, (number, known) in there.items():
            if number not in known:
                raise UsageError(f"replay {self.path} has no {what} {number}", f"It has: {', '.join(map(str, known))}.")

    def _frame(self, name: str, run: int | None, sequence: int | None, layer: int | None) -> pd.DataFrame:
        selected = {"run": run, "sequence": sequence, "layer": layer}
        filters = [(column, "=", value) for column, value in selected.items() if value is not None]
        try:
            frame: pd.DataFrame = pq.read_table(self.path / f"{name}.parquet", filters=filters or None).to_pandas()
        except pa.ArrowMemoryError:
            raise  # the file is not damaged
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.path, name) from error
        return frame


def open_replay(path: Path | str, *, verify: bool = False) -> Replay:
    """Return a complete replay.

    Parameters
    ----------
    path : Path or str
        Its folder.
    verify : bool
        Whether to compare the checksum of every file too; sizes are compared always.

    Raises
    ------
    ResultError
        If the folder is missing, not a replay, of another version, incomplete or damaged; the message says which.
    """
    path = Path(path)
    info = read_replay(path)
    for name, size in info.sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ResultError(f"replay {path} is damaged: {name} is missing or has another size", "Replay again.")
        if verify and checksum(file) != info.checksums[name]:
            raise ResultError(f"replay {path} is damaged: the checksum of {name} differs", "Replay again.")
    return Replay(path, info)


def newest_replay(folder: Path = Path("reports")) -> Path:
    """Return the newest complete replay under `folder`.

    Raises
    ------
    ResultError
        If there is none.
    """
    for candidate in newest_first(folder, RUN_FILE):
        try:
            open_replay(candidate)
        except ResultError:
            continue  # unfinished, foreign, damaged or of another version: not a complete replay
        return candidate
    raise ResultError(f"no complete replay under {folder}/", f"Make one: {REPLAY_COMMAND}")


def unreadable(path: Path, name: str) -> ResultError:
    """Return the error for a Parquet file of a replay that cannot be read."""
    return ResultError(f"replay {path} is damaged: {name}.parquet cannot be read", "Replay again.")
