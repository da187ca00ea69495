"""The plan of an experiment and its results, in the terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kvscope.cli.answers import cell
from kvscope.cli.console import ALWAYS, Column, fail, note, show_json, show_pairs, show_table, warn, working
from kvscope.cli.skipped import skipped_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvscope.core.experiment_records import ExperimentRecord, Failure, PooledRun
    from kvscope.experiments.cells import Done
    from kvscope.experiments.plan import ExperimentPlan

# Metric, header, digits, and `Column.keep`: how late the column is dropped on a narrow terminal.
_METRICS = (
    ("answer_score", "answer\nscore", 2, ALWAYS),
    ("answer_first", "answer\nfirst", 2, 60),
    ("perplexity_ratio", "perplexity\nratio", 3, 98),
    ("retained_mass", "retained\nmass", 3, 97),
    ("output_error", "output\nerror", 3, 70),
    ("held_keys", "held", 1, 65),
)
MOST = 5  # failures that are printed in full


@dataclass(frozen=True)
class PlanFacts:
    """What an experiment would do: how much is there, how much is to be done, and what that takes."""

    traces: int
    traces_to_do: int
    runs: int
    runs_to_do: int
    trace_bytes: int
    seconds: float | None
    estimated: str
    steps: tuple[str, ...]


def plan_facts(plan: ExperimentPlan, *, quiet: bool) -> PlanFacts:
    """Return what an experiment would do; how long that takes is measured on short examples."""
    from kvscope.experiments.cells import Done
    from kvscope.experiments.estimate import estimate
    from kvscope.experiments.run import in_order
    from kvscope.experiments.workload import trace_bytes

    with working("measuring one short example", quiet=quiet):
        time = estimate(plan, in_order(plan))
        traces = [unit.cell for unit in plan.traces()]
        needed = trace_bytes(plan, traces)
    return PlanFacts(
        traces=len(plan.cells),
        traces_to_do=len(traces),
        runs=sum(len(requests) for requests in plan.requests.values()),
        runs_to_do=sum(len(unit.requests) for unit in plan.replays(Done(plan.store))),
        trace_bytes=needed,
        seconds=time.seconds,
        estimated=time.why,
        steps=plan.experiment.steps,
    )


def show_plan(plan: ExperimentPlan, *, as_json: bool, quiet: bool) -> None:
    """Print what an experiment would do: cells, those that are done, space and time."""
    facts = plan_facts(plan, quiet=quiet)
    if as_json:
        show_json(asdict(facts))
    else:
        show_facts(plan, facts)


def show_facts(plan: ExperimentPlan, facts: PlanFacts) -> None:
    """Print the facts of a plan, and its traces."""
    from kvscope.core.output import size
    from kvscope.experiments.cells import Done
    from kvscope.trace.space import free_bytes

    done = Done(plan.store)
    took = "not known: " if facts.seconds is None else f"about {duration(facts.seconds)}, "
    free = size(free_bytes(plan.store.traces))
    show_pairs(
        [
            ("steps", ", ".join(facts.steps)),
            ("traces", f"{facts.traces}, of which {facts.traces - facts.traces_to_do} are done"),
            ("runs", f"{facts.runs} policies x budgets x traces, of which {facts.runs - facts.runs_to_do} are done"),
            ("space", f"about {size(facts.trace_bytes)} of traces to write, {free} free"),
            ("time", took + facts.estimated),
        ],
        title=plan.experiment.name,
    )
    show_table(
        [
            Column("trace", [cell.title for cell in plan.cells], wrap=24),
            Column("done", ["yes" if cell.done else "no" for cell in plan.cells]),
            Column("runs to do", [str(_to_do(plan, cell.address, done)) for cell in plan.cells], numeric=True),
        ]
    )


def _to_do(plan: ExperimentPlan, address: str, done: Done) -> int:
    units = plan.replays(done)
    return sum(len(unit.requests) for unit in units if unit.cell.address == address)


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_experiment(record: ExperimentRecord, file: Path, *, as_json: bool) -> None:
    """Print the results of an experiment: a row for each policy and budget, then the best of each."""
    from kvscope.core.experiment_records import EXPERIMENT
    from kvscope.results.experiment import held_more, sentences

    if as_json:
        show_json(EXPERIMENT.plain(record))
        return
    if not record.runs:
        note(f"{file}: no results")
        return
    rows = [run for run in record.runs if run.task is None and run.length is None]
    show_table(
        _columns(rows), title=str(file), notes=[*_notes(record, rows), *held_more(rows), *sentences(record.verdicts)]
    )


def _columns(rows: Sequence[PooledRun]) -> list[Column]:
    table = []
    if len({run.model for run in rows}) > 1:
        table.append(Column("model", [run.model for run in rows], wrap=16))
    if len({run.prefill for run in rows}) > 1:
        table.append(Column("prefill", [run.prefill for run in rows]))
    table += [
        Column("policy", [run.policy for run in rows], wrap=16),
        Column("budget", [run.budget or "-" for run in rows], numeric=True),
    ]
    for name, header, digits, keep in _METRICS:
        if any(name in run.metrics for run in rows):
            cells = [cell(run.metrics.get(name), digits) for run in rows]
            table.append(Column(header, cells, keep=keep, numeric=True))
    table.append(Column("sequences", [str(run.sequences) for run in rows], keep=50, numeric=True))
    return table


def _notes(record: ExperimentRecord, rows: Sequence[PooledRun]) -> list[str]:
    parts = {(run.task, run.length) for run in record.runs if run.task is not None}
    lines = []
    if parts:
        lines.append(f"Means over all {len(parts)} tasks and lengths; --json and the report show each of them.")
    copies = [run for run in rows if run.clusters < run.sequences]
    if copies:
        lines.append(f"{copies[0].sequences} sequences count as {copies[0].clusters}: the others are near-copies.")
    if any(value.low is not None for run in rows for value in run.metrics.values()):
        lines.append("Second line of a cell: 95 % interval over sequences.")
    return lines


def report_failures(record: ExperimentRecord) -> bool:
    """Print what has no result, each reason once, and return whether there is any."""
    from kvscope.core.experiment_records import NO_TRACE

    if record.skipped:
        warn(skipped_line(record.skipped, {}, "Name one under policies in the file to see what it needs."))
    reasons = Counter((failure.what, failure.todo) for failure in record.failed if failure.what != NO_TRACE)
    for (what, todo), count in list(reasons.items())[:MOST]:
        fail(f"{_named(record.failed, what, count)}: {what}", todo)
    if len(reasons) > MOST:
        note(f"and {len(reasons) - MOST} other reasons, in the summary")
    return bool(reasons)


def _named(failed: Sequence[Failure], what: str, count: int) -> str:
    first = next(failure.cell for failure in failed if failure.what == what)
    return first if count == 1 else f"{first} and {count - 1} more"
