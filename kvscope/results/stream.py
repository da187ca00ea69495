"""Reading a replay in pieces: its tables may be larger than the memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvscope.core.residency import ResidencyIntervals
from kvscope.results.answers import OF_ANSWERS, SCORE, Answers
from kvscope.results.latent import LATENT, LatentCounter
from kvscope.results.outcome import LOSSES, OUTCOMES, Outcomes
from kvscope.results.store import Replay
from kvscope.results.summary import Means


def batches(
    replay: Replay, name: str, runs: Collection[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of a table, one row group at a time: no more than that is in memory.

    Parameters
    ----------
    replay : Replay
        Where to read.
    name : str
        ``residency``, ``fidelity``, ``tokens`` or ``answers``.
    runs : collection of int, optional
        All by default.
    columns : sequence of str, optional
        All by default; with `runs`, ``run`` must be one of them.

    Raises
    ------
    ResultError
        If the file cannot be read.
    """
    with replay.table(name) as file:
        if not file.num_row_groups:
            yield file.schema_arrow.empty_table()
        for group in range(file.num_row_groups):
            numbers = file.metadata.row_group(group).column(0).statistics  # of the column `run`
            if runs is not None and numbers and not any(numbers.min <= run <= numbers.max for run in runs):
                continue
            table = file.read_row_group(group, columns)
            replay.require_rows(name, table)
            yield table if runs is None else table.filter(pc.is_in(table["run"], pa.array(runs, pa.int32())))


def means(replay: Replay, runs: Collection[int] | None = None, metrics: Sequence[str] | None = None) -> Means:
    """Return the means of every level of a replay; of all runs and metrics by default."""
    found = Means(list(replay.info.metrics if metrics is None else metrics))
    for table in batches(replay, "fidelity", runs, ["run", "sequence", "layer", "head", *found.metrics]):
        found.add_table(table, replay.info.trace.heads)
    return found


def by_sequence(
    replay: Replay, runs: Collection[int], metrics: Sequence[str]
) -> dict[tuple[int, str], dict[int, float]]:
    """Return the value of every sequence that has one, by run and metric.

    It is the mean over steps, then heads, then layers; for what a closed loop costs in tokens, that of its tokens; for
    right answers, that of the example.
    """
    fidelity = [name for name in metrics if name in replay.info.metrics]
    found = means(replay, runs, fidelity)
    values = {
        (run, name): {sequence: mean for (sequence,), mean in found.of(run, name, "sequence").items()}
        for run in runs
        for name in fidelity
    }
    if any(name in LATENT for name in metrics):
        values |= _latent(replay, runs, metrics)
    outcomes = [name for name in metrics if name in OUTCOMES]
    losses = Outcomes()
    for run in runs if outcomes else ():
        tokens = replay.tokens(run)
        for sequence in sorted(set(tokens["sequence"].tolist())):
            rows = tokens[tokens["sequence"] == sequence]
            losses.add(run, sequence, {name: rows[name].to_numpy() for name in LOSSES})
        of_run = losses.by_sequence(run)
        values |= {(run, name): {number: value[name] for number, value in of_run.items()} for name in outcomes}
    return values | _of_answers(replay, runs, [name for name in metrics if name in OF_ANSWERS])


def _of_answers(
    replay: Replay, runs: Collection[int], metrics: Sequence[str]
) -> dict[tuple[int, str], dict[int, float]]:
    """Return the values of the answers of every example that has them, by run and metric."""
    answers = Answers(replay.info.trace.examples)
    for run in runs if metrics else ():
        tokens = replay.tokens(run)
        for sequence in sorted(set(tokens["sequence"].tolist())):
            rows = tokens[tokens["sequence"] == sequence]
            columns = {name: rows[name].to_numpy() for name in ("top1_correct", "nll_policy")}
            answers.add_losses(run, sequence, rows["position"].to_numpy(), columns)
        if SCORE in metrics:
            said = replay.answers(run)
            for sequence, score in zip(said["sequence"], said[SCORE], strict=True):
                answers.add_score(run, int(sequence), float(score))
    return {(run, name): answers.by_sequence(run).get(name, {}) for run in runs for name in metrics}


def _latent(replay: Replay, runs: Collection[int], metrics: Sequence[str]) -> dict[tuple[int, str], dict[int, float]]:
    """Return what runs hold in a latent cache in each sequence, by run and metric."""
    trace, counter = replay.info.trace, LatentCounter(replay.info.trace, replay.info.runs)
    for run in runs:
        frame = replay.residency(run)
        places = frame[["sequence", "layer"]].drop_duplicates().to_numpy(np.int64).tolist()
        for sequence, layer in places:
            rows = frame[(frame["sequence"] == sequence) & (frame["layer"] == layer)]
            columns = {name: rows[name].to_numpy(np.int32) for name in ("kv_head", "key", "enter")}
            length, heads = trace.sequences[sequence].length, trace.heads_of(layer).kv_heads
            leave = rows["leave"].fillna(-1).to_numpy(np.int32)
            intervals = ResidencyIntervals.of(**columns, leave=leave, heads=heads, length=length)
            counter.add(run, sequence, layer, intervals)
    return {
        (run, name): {sequence: found[name] for sequence, found in counter.by_sequence(run).items()}
        for run in runs
        for name in metrics
        if name in LATENT
    }
