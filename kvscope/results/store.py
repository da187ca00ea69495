"""Reading a replay."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from html import escape
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.core.answer_records import ANSWERS
from kvscope.core.checked_files import CheckedFiles
from kvscope.core.counts import count
from kvscope.core.errors import REPLAY_COMMAND, ResultError, UsageError
from kvscope.core.memory import is_library_too_large
from kvscope.core.newest import newest_first
from kvscope.core.records import LOSSES, RUN_FILE, ReplayRecord, RunRecord, read_replay
from kvscope.core.registry import nearest
from kvscope.core.summary_records import SUMMARY_FILE, SummaryRecord, read_summary
from kvscope.results.digest import Digests
from kvscope.results.frames import Per, Table, averaged, summary_frame, with_names
from kvscope.results.tables import fault_of_file, fault_of_rows

# Raised by pyarrow for a file that is not what its checksum says, or whose writer was not kvscope.
UNREADABLE = (OSError, pa.ArrowException, MemoryError, ValueError, OverflowError, KeyError, IndexError)


class Replay:
    """A complete replay on disk: `replay` makes one, `open_replay` opens one.

    Attributes
    ----------
    path : Path
        Its folder.
    info : ReplayRecord
        The content of ``run.json``: runs, metrics, and how the replay was made.
    """

    def __init__(self, path: Path, info: ReplayRecord) -> None:
        self.path, self.info = path, info
        self.files = CheckedFiles(path, info.sizes, info.checksums, self.damaged)
        self._known: set[str] = set()

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @cached_property
    def summary(self) -> SummaryRecord:
        """The content of ``summary.json``."""
        summary = read_summary(self.files.path(SUMMARY_FILE))
        if [(run.run, run.label, run.decisions) for run in summary.runs] != [
            (run.run, run.label, run.decisions) for run in self.info.runs
        ]:
            raise self.damaged(SUMMARY_FILE, f"its runs are not those of {RUN_FILE}")
        return summary

    def __repr__(self) -> str:
        runs, trace = self.info.runs, self.info.trace
        policies, budgets = (len({getattr(run, name) for run in runs}) for name in ("label", "budget"))
        of = f"{trace.model}, {count(len(trace.sequences), 'sequence')}, {count(len(trace.layers), 'layer')}"
        what = f"{count(len(runs), 'run')} ({count(policies, 'policy', 'policies')}, {count(budgets, 'budget')})"
        return f"<Replay {self.path}: {what} over {of}>"

    def _repr_html_(self) -> str:
        """Return the summary as a table, for notebooks."""
        table = self.frame().rename(columns=lambda name: name.replace("_", " "))
        shown = table.to_html(index=False, na_rep="", float_format="{:.4g}".format, border=0)
        return f"<p><b>{escape(self.name)}</b>: {len(table)} runs</p>{shown}"

    def frame(self, table: Table = "summary", per: Per = "row") -> pd.DataFrame:
        """Return a table of the replay with named policies and budgets.

        Parameters
        ----------
        table : {"summary", "fidelity", "residency", "tokens", "answers"}
            ``summary`` has a row for each policy and budget with the mean of every metric; the others are files.
        per : {"row", "step", "head", "layer", "sequence", "run"}
            For ``fidelity``: what has a row of its own; metrics are averaged over everything below it.

        Raises
        ------
        UsageError
            For an unknown name, or if the replay has no such table.
        """
        if table not in get_args(Table):
            raise UsageError(f"a replay has no table {table!r}", nearest(str(table), get_args(Table)))
        if table == "summary":
            return summary_frame(self.summary)
        named = with_names(getattr(self, table)(), self.info.runs)
        return averaged(named, per) if table == "fidelity" else named

    def require_trace(self, identity: str, path: Path) -> None:
        """Raise ResultError unless the replay was made from the trace at `path`, which has this identity."""
        if self.info.trace.identity != identity:
            raise ResultError(f"{self.path} was not made from {path}", "Name the trace of the replay with --trace.")

    def residency(self, run: int | None = None, sequence: int | None = None, layer: int | None = None) -> pd.DataFrame:
        """Return residency intervals: the columns of ``residency.parquet``; ``leave`` is a nullable integer."""
        frame = self._frame("residency", run, sequence, layer).astype({"leave": "Int32"})
        if sequence is None and layer is None:
            require_decisions(self, frame, [each for each in self.info.runs if run in (None, each.run)])
        return frame

    def require_decisions(self) -> None:
        """Raise ResultError unless every run evicted what its recorded digest says; reads a run at a time."""
        for run in self.info.runs:
            self.residency(run.run)

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
        if LOSSES not in self.info.sizes:
            raise UsageError(
                f"replay {self.path} has no run of the closed loop", f"Make one: {REPLAY_COMMAND} --perplexity"
            )
        return self._frame("tokens", run, sequence, None)

    def answers(self, run: int | None = None, sequence: int | None = None) -> pd.DataFrame:
        """Return what closed-loop runs generate after each prompt, and its score: the columns of ``answers.parquet``.

        Raises
        ------
        UsageError
            If no answers were generated.
        """
        if ANSWERS not in self.info.sizes:
            raise UsageError(
                f"replay {self.path} has no generated answers", f"Make one that has: {REPLAY_COMMAND} --generate"
            )
        return self._frame("answers", run, sequence, None)

    def resident(self, run: int, sequence: int, layer: int) -> NDArray[np.bool_]:
        """Return which keys are held after each step, bool ``[G, T, T]``: ``[g, t, k]`` for key ``k`` after step ``t``.

        Raises
        ------
        UsageError
            If the replay has no such run, sequence or layer.
        """
        return self._mask(run, sequence, layer, 0)

    def visible(self, run: int, sequence: int, layer: int) -> NDArray[np.bool_]:
        """Return which keys each query can attend to, bool ``[G, T, T]``: those held after ``t - 1``, and ``t``."""
        return self._mask(run, sequence, layer, 1)

    def _mask(self, run: int, sequence: int, layer: int, shift: int) -> NDArray[np.bool_]:
        self._require(run, sequence, layer)
        frame = self.residency(run, sequence, layer)
        trace = self.info.trace
        length = trace.sequences[sequence].length
        mask = np.zeros((trace.heads_of(layer).kv_heads, length, length), bool)
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
            with self.table(name), _native(self.path / f"{name}.parquet") as source:
                table = pq.read_table(source, filters=filters or None, partitioning=None)
                self.require_rows(name, table)
                frame: pd.DataFrame = table.to_pandas()
        except pa.ArrowMemoryError:
            raise  # the file is not damaged
        except UNREADABLE as error:
            if is_library_too_large(error):
                raise  # it is memory that lacks
            raise self.damaged(f"{name}.parquet", "it cannot be read") from error
        return frame

    @contextmanager
    def table(self, name: str) -> Iterator[pq.ParquetFile]:
        """Open a Parquet file of the replay: ``residency``, ``fidelity``, ``tokens`` or ``answers``.

        Raises
        ------
        ResultError
            If it is not the recorded file, or cannot be read.
        """
        path = self.files.path(f"{name}.parquet")
        summary = self.summary
        try:
            with _native(path) as source, pq.ParquetFile(source) as file:
                fault = None if name in self._known else fault_of_file(file, name, self.info, summary)
                if fault is not None:
                    raise self.damaged(f"{name}.parquet", fault)
                self._known.add(name)
                yield file
        except pa.ArrowMemoryError:
            raise  # the file is not damaged
        except UNREADABLE as error:
            if is_library_too_large(error):
                raise  # it is memory that lacks
            raise self.damaged(f"{name}.parquet", "it cannot be read") from error

    def require_rows(self, name: str, table: pa.Table) -> None:
        """Raise ResultError if a row of a table cannot be one of this replay."""
        fault = fault_of_rows(table, name, self.info)
        if fault is not None:
            raise self.damaged(f"{name}.parquet", fault)

    def damaged(self, name: str, why: str) -> ResultError:
        """Return the error for a damaged file."""
        return ResultError(f"replay {self.path} is damaged: {name}: {why}", "Replay again.")


def open_replay(path: Path | str, *, verify: bool = False) -> Replay:
    """Return a complete replay.

    Parameters
    ----------
    path : Path or str
        Its folder.
    verify : bool
        Whether to check the checksums of all files now; otherwise each file is checked when it is first read.

    Raises
    ------
    ResultError
        If the folder is missing, not a replay, of another version, incomplete or damaged; the message says which.
    """
    path = Path(path)
    replay = Replay(path, read_replay(path))
    replay.files.require_there()
    if verify:
        replay.files.require_same()
        replay.require_decisions()
    return replay


def _native(path: Path) -> pa.OSFile:
    """Return an open file; the name of a file need not be UTF-8, as pyarrow requires of a str."""
    return pa.OSFile(os.fsencode(path))


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


def require_decisions(replay: Replay, frame: pd.DataFrame, runs: Sequence[RunRecord]) -> None:
    """Raise ResultError unless the residency of whole runs has the recorded digests; old replays have none."""
    digests = Digests()
    parts = dict(iter(frame.groupby(["run", "sequence", "layer"])))
    for run in (run for run in runs if run.decisions is not None):
        for sequence in range(len(replay.info.trace.sequences)):
            for layer in replay.info.trace.layers:
                rows = parts.get((run.run, sequence, layer), frame.iloc[:0])
                columns = {name: rows[name].to_numpy(np.int32) for name in ("kv_head", "key", "enter")}
                digests.add(run.run, sequence, layer, **columns, leave=rows["leave"].fillna(-1).to_numpy(np.int32))
        if digests.of(run.run) != run.decisions:
            raise replay.damaged("residency.parquet", f"run {run.run} has other decisions than were recorded")
