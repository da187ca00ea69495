"""Writing a replay; only a finished one gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvscope.core.errors import ResultError
from kvscope.core.output import OutputFolder, checksum
from kvscope.core.printable import encodable
from kvscope.core.records import REPLAY, RUN_FILE, ReplayRecord, RunCounts
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.summary_records import SUMMARY, SUMMARY_FILE, SummaryRecord, summary_of
from kvscope.results.answers import SCORE, Answers
from kvscope.results.digest import Digests
from kvscope.results.latent import LATENT, LatentCounter
from kvscope.results.loop_gap import LoopGapCounter
from kvscope.results.outcome import OUTCOMES, Outcomes
from kvscope.results.schema import MEMBERS, RECORDED, RESIDENCY, SAID, TOKENS, fidelity_schema
from kvscope.results.store import Replay, open_replay
from kvscope.results.summary import Means, bounds
from kvscope.results.table_file import TableFile
from kvscope.results.tables import about_of
from kvscope.results.tails import TailCounter

Array = NDArray[Any]
HELD = "held_keys"  # metric of the cache of a layer, which another layer may read
GROUP_ROWS = 4096  # least number in a Parquet row group: about what one layer of a large model has


class ReplayWriter:
    """Writes one replay into ``PATH.incomplete`` and gives it its name at `finish`; an error removes it.

    Parameters
    ----------
    path : Path
        Folder of the replay.
    record : ReplayRecord
        What ``run.json`` says of the replay before it begins.
    force : bool
        Whether an existing replay may be replaced, once this one is whole.

    Raises
    ------
    ResultError
        If `path` exists, another process is writing it, or the folder cannot be written; with `force` too, if it
        holds anything that no replay has.
    """

    def __init__(self, path: Path, record: ReplayRecord, *, force: bool = False) -> None:
        self.path, self.record = Path(path), record
        self._folder = OutputFolder(self.path, "replay", RUN_FILE, MEMBERS, ResultError, force)
        self.work = self._folder.work
        self.metrics = list(record.metrics)
        self._means = Means(self.metrics, record.trace.near_copies)
        self._tails = TailCounter()
        self._digests = Digests()
        self._outcomes = Outcomes(record.trace.near_copies)
        self._answers = Answers(record.trace.examples, record.trace.near_copies)
        self._gap = LoopGapCounter(record)
        self._latent = LatentCounter(record.trace, record.runs)
        self._files: dict[str, TableFile] = {}
        self._waiting: dict[str, list[pa.Table]] = {}
        try:
            begun = self._folder.begin()
            with self._folder.abandoned_on_error():
                with self._folder.locked():
                    self._write_text(RUN_FILE, REPLAY.text(replace(record, writer=begun)))
                self._open_tables()
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def _open_tables(self) -> None:
        for name, schema in (("residency", RESIDENCY), ("fidelity", fidelity_schema(self.metrics))):
            repeats = name == "residency"  # values of metrics do not: dictionaries make them a third larger
            self._open_table(name, schema, use_dictionary=repeats)

    def _open_table(self, name: str, schema: pa.Schema, *, use_dictionary: bool = True) -> None:
        own = schema.with_metadata(about_of(name, self.record))
        self._files[name] = TableFile(self.work / f"{name}.parquet", own, use_dictionary=use_dictionary)

    def __enter__(self) -> ReplayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()  # does nothing to those of a finished replay
        if kind is not None:
            self._folder.abandon()

    def residency(self, run: int, sequence: int, layer: int, intervals: ResidencyIntervals) -> None:
        """Write all residency intervals of one layer.

        Raises
        ------
        ResultError
            If they are written a second time, or the disk is full.
        """
        head, key, enter, leave = intervals.kv_head, intervals.key, intervals.enter, intervals.stored_leave
        self._digests.add(run, sequence, layer, kv_head=head, key=key, enter=enter, leave=leave)
        self._gap.add(run, sequence, layer, intervals)
        self._latent.add(run, sequence, layer, intervals)
        count = len(key)
        columns = {
            "run": np.full(count, run, np.int32),
            "sequence": np.full(count, sequence, np.int32),
            "layer": np.full(count, layer, np.int32),
            "kv_head": head,
            "key": key,
            "enter": enter,
            "leave": pa.array(leave, pa.int32(), mask=leave < 0),
        }
        self._write("residency", RESIDENCY, columns)

    def fidelity(self, run: int, sequence: int, layer: int, steps: Array, values: Mapping[str, Array]) -> None:
        """Write metrics, each ``[H, S]``, of the steps ``[S]``; NaN is stored as null.

        Keys held are null in a layer that reads the cache of another, so that a mean counts every cache once.

        Raises
        ------
        ResultError
            If a value is infinite, or the disk is full.
        """
        stored = {name: values[name].astype(np.float32) for name in self.metrics}
        if str(layer) in self.record.trace.shared_cache and HELD in stored:
            stored[HELD] = np.full_like(stored[HELD], np.nan)  # its keys are held, and counted, by another layer
        for name, array in stored.items():
            if np.isinf(array).any():
                raise ResultError(
                    f"metric {name} is infinite: run {run}, sequence {sequence}, layer {layer}",
                    "Look for rows or values of zeros in the trace, or omit the metric.",
                )
        heads, count = stored[self.metrics[0]].shape
        columns: dict[str, Any] = {
            "run": np.full(heads * count, run, np.int32),
            "sequence": np.full(heads * count, sequence, np.int32),
            "layer": np.full(heads * count, layer, np.int32),
            "head": np.repeat(np.arange(heads, dtype=np.int32), count),
            "step": np.tile(np.asarray(steps, np.int32), heads),
        }
        for name in self.metrics:
            columns[name] = pa.array(stored[name].ravel(), from_pandas=True)
        self._write("fidelity", fidelity_schema(self.metrics), columns)
        self._means.add(run, sequence, layer, stored)
        self._tails.add(run, sequence, layer, steps, stored)

    def tokens(self, run: int, sequence: int, position: Array, values: Mapping[str, Array]) -> None:
        """Write the losses of all scored tokens of one sequence, each ``[S]``: those that `TOKENS` names.

        Raises
        ------
        ResultError
            If the disk is full.
        """
        self._open_once("tokens", TOKENS)
        place = {"run": run, "sequence": sequence}
        filled = {name: np.full(len(position), number, np.int32) for name, number in place.items()}
        self._write("tokens", TOKENS, {**filled, "position": position, **values})
        self._outcomes.add(run, sequence, values)
        self._answers.add_losses(run, sequence, position, values)

    def answer(self, run: int, sequence: int, text: str, tokens: int, score: float) -> None:
        """Write what the model generated after the prompt of a sequence under a run, and how right it is, 0 to 1.

        Raises
        ------
        ResultError
            If the disk is full.
        """
        self._open_once("answers", SAID)
        row = {"run": run, "sequence": sequence, "tokens": tokens, SCORE: score, "text": encodable(text)}
        self._write("answers", SAID, {name: [value] for name, value in row.items()})
        self._answers.add_score(run, sequence, score)

    def finish(self, counted: Mapping[int, RunCounts] | None = None, *, seconds: float | None = None) -> Replay:
        """Close the files, write the summary, note sizes and checksums, and give the replay its name.

        Parameters
        ----------
        counted : mapping of int to RunCounts, optional
            What is known of each run only at its end, by its number; it joins the record of the run.
        seconds : float, optional
            How long the replay took.
        """
        runs = tuple(
            replace(run, decisions=self._digests.of(run.run), **vars(counted[run.run]) if counted else {})
            for run in self.record.runs
        )
        self.record = replace(self.record, runs=runs)
        for name in list(self._waiting):
            self._flush(name)
        try:
            for file in self._files.values():
                file.close()
            self._write_text(SUMMARY_FILE, SUMMARY.text(self._summary(), ordered=True))
            written = [name for name in RECORDED if (self.work / name).exists()]
            whole = replace(
                self.record,
                complete=True,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                sizes={name: (self.work / name).stat().st_size for name in written},
                checksums={name: checksum(self.work / name) for name in written},
                seconds=seconds,
            )
            with self._folder.locked():
                self._write_text(RUN_FILE, REPLAY.text(whole))
            self._folder.finish()
        except OSError as error:
            raise self._folder.unwritable(error) from error
        return open_replay(self.path)

    def _summary(self) -> SummaryRecord:
        """Return the content of ``summary.json``: fidelity and its tails, of closed runs also outcome and gap."""
        runs = [
            summary_of(
                run,
                metrics=self._means.summaries(run.run)
                | self._outcomes.of(run.run)
                | self._answers.of(run.run)
                | self._latent.of(run.run),
                tails=self._tails.of(run.run),
                tasks=self._answers.by_task(run.run),
            )
            for run in self.record.runs
        ]
        by_number = {run.run: run for run in runs}
        summed = tuple(replace(run, bounds=bounds(run, runs), gap=self._gap.of(run.run, by_number)) for run in runs)
        beside = (OUTCOMES if "tokens" in self._files else {}) | (LATENT if self.record.trace.latent_size else {})
        metrics = {**self.record.metrics, **beside, **self._answers.metrics}
        return SummaryRecord(self.record.trace.summarised, metrics, summed)

    def _open_once(self, name: str, schema: pa.Schema) -> None:
        """Open a table that not every replay has, if it is not open."""
        if name in self._files:
            return
        try:
            self._open_table(name, schema)
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def _write(self, name: str, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
        arrays = [pa.array(columns[column.name]).cast(column.type) for column in schema]
        waiting = self._waiting.setdefault(name, [])
        waiting.append(pa.Table.from_arrays(arrays, schema=schema))
        if sum(table.num_rows for table in waiting) >= GROUP_ROWS:
            self._flush(name)

    def _flush(self, name: str) -> None:
        """Write the rows that wait as one row group: one for each layer of a small model would be mostly metadata."""
        try:
            self._files[name].write(pa.concat_tables(self._waiting.pop(name)))
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def _write_text(self, name: str, text: str) -> None:
        (self.work / name).write_text(text, encoding="utf-8")
