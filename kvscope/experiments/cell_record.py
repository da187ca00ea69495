"""The record of a cell: the figures of every sequence of its replay, from which experiments are pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvscope.core.experiment_records import LOSSES, CellRecord, CellRun, CellSequence
from kvscope.core.options import Loop
from kvscope.engine.runs import RunSpec
from kvscope.experiments.plan import ReplayUnit
from kvscope.policies import Policy
from kvscope.results.answers import OF_ANSWERS
from kvscope.results.outcome import OUTCOMES
from kvscope.results.store import Replay
from kvscope.results.stream import by_sequence


def cell_record(
    made: Replay, unit: ReplayUnit, runs: Sequence[RunSpec], keys: Mapping[tuple[Policy, str | None], str]
) -> CellRecord:
    """Return the record of the cell that a replay is.

    Parameters
    ----------
    made : Replay
        The replay.
    unit : ReplayUnit
        What it was made for.
    runs : sequence of RunSpec
        Its runs.
    keys : mapping of (Policy, str or None) to str
        Key of each policy and budget.
    """
    info = made.info
    closed: dict[int | None, int] = {}
    closed |= {run.open_run: run.number for run in runs if run.loop is Loop.closed and run.open_run is not None}
    # A run of the closed loop alone stands for its open run: its figures are of the attention in the model.
    opened = [run for run in runs if run.loop is Loop.open or run.open_run is None]
    closed |= {run.number: run.number for run in opened if run.loop is Loop.closed}
    figures = _figures(made, [run.number for run in opened], closed)
    cell_runs = []
    for run in opened:
        about, twin = info.run(run.number), closed.get(run.number)
        cell_runs.append(
            CellRun(
                key=keys[run.plan.policy, about.budget],
                policy=about.label,
                name=about.policy,
                params=about.params,
                budget=about.budget,
                clairvoyant=about.clairvoyant,
                reads=about.reads,
                open_run=run.number,
                closed_run=twin,
                values=figures[run.number],
                losses={} if twin is None else _losses(made, twin),
            )
        )
    return CellRecord(
        replay=made.path.name,
        trace=unit.cell.path.name,
        model=unit.cell.model.title,
        prefill=unit.prefill,
        steps=unit.experiment.loop_steps,
        sequences=_sequences(made, unit),
        metrics=dict(made.summary.metrics),
        runs=tuple(cell_runs),
        tokens=sum(sequence.length for sequence in info.trace.sequences),
        seconds=info.seconds or 0.0,
    )


def _sequences(made: Replay, unit: ReplayUnit) -> tuple[CellSequence, ...]:
    """Return task, length and cluster of every sequence, as its dataset says; without one the prompts' own name."""
    trace, texts = made.info.trace, unit.cell.texts
    examples = {example.sequence: example for example in trace.examples}
    clusters = trace.near_copies or tuple(range(len(trace.sequences)))
    found = []
    for number, cluster in enumerate(clusters):
        example = examples.get(number)
        task = (example.task if example else None) or texts.task or texts.name
        length = texts.length if example is None or example.length is None else example.length
        found.append(CellSequence(task, length, cluster))
    return tuple(found)


def _figures(
    made: Replay, opened: Sequence[int], closed: Mapping[int | None, int]
) -> dict[int, dict[str, tuple[float | None, ...]]]:
    """Return of each open run the value of every sequence, by metric; those of answers are from its closed run."""
    metrics = list(made.summary.metrics)
    of_open = [name for name in metrics if name not in OUTCOMES and name not in OF_ANSWERS]
    of_closed = [name for name in metrics if name in OF_ANSWERS]
    count = len(made.info.trace.sequences)
    values = by_sequence(made, opened, of_open)
    answers = by_sequence(made, list(closed.values()), of_closed) if of_closed else {}
    found: dict[int, dict[str, tuple[float | None, ...]]] = {}
    for run in opened:
        own = {name: values[run, name] for name in of_open}
        if run in closed:
            own |= {name: answers[closed[run], name] for name in of_closed}
        found[run] = {name: tuple(map(of.get, range(count))) for name, of in own.items() if of}
    return found


def _losses(made: Replay, run: int) -> dict[str, tuple[float, ...]]:
    """Return sums of the losses of every sequence of a closed run, and the number of scored tokens."""
    tokens = made.tokens(run)
    count = range(len(made.info.trace.sequences))
    of = {number: rows for number in count if len(rows := tokens[tokens["sequence"] == number])}
    sums: dict[str, tuple[float, ...]] = {
        name: tuple(float(np.sum(of[n][name].to_numpy(), dtype=np.float64)) if n in of else 0.0 for n in count)
        for name in LOSSES
    }
    return {**sums, "tokens": tuple(float(len(of[n])) if n in of else 0.0 for n in count)}
