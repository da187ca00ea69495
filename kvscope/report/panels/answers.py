"""Right answers: accuracy over budget, over depth and length, and the heads that had evicted the needle."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvscope.core.answer_records import ExampleRef
from kvscope.core.json import JsonDict
from kvscope.report.encoding import rounded, visible
from kvscope.report.needles import evicted_needles
from kvscope.report.panel import panel
from kvscope.report.panels.budget_curve import curve_lines
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput
from kvscope.results.stream import by_sequence

METRICS = ("answer_score", "answer_first", "answer_loss")
WRONG = 0.5  # an answer with a lower score is wrong
DEPTHS = 10  # rows of a map of depth and length at most
Task = tuple[str | None, int | None]


@panel(
    "answers",
    title="Right answers",
    order=15,
    needs=("answers",),
    help="Each line is one policy from its smallest to its largest budget: how often the model answers right under it. "
    "Bars are 95 % intervals over examples; where they overlap, a difference may be chance. The map of depth and "
    "length shows where in the prompt the fact has to be for the answer to be right. The maps of heads show which "
    "share of the fact each head had evicted at the end of the prompt: heads that had evicted it where the answer is "
    "wrong, and not where it is right, are those that the answer needs.",
)
def answers(source: ReportInput) -> JsonDict | None:
    """Return accuracy of every closed run by task and length, by depth, and the evicted needles of wrong answers."""
    runs = [run for run in source.runs if run.info.tasks]
    shown = runs[: source.limits.rows]
    tasks = list(dict.fromkeys((task.task, task.length) for run in shown for task in run.info.tasks))
    metrics = [name for name in METRICS if any(name in task.metrics for run in shown for task in run.info.tasks)]
    if not metrics:
        return None
    ids = {run.id for run in shown}
    lines = [line for line in curve_lines(source) if all(run.id in ids for run in line.runs)]
    depth, heads = _details(source, shown, metrics[0])
    return {
        "metrics": metrics,
        "tasks": [{"name": _name(task)} for task in tasks],
        "lines": [{"name": line.name, "runs": [run.id for run in line.runs]} for line in lines],
        "flat": [run.id for run in shown if run.budget is None],
        "values": {run.id: _values(run, tasks, metrics) for run in shown},
        "depth": depth,
        "heads": heads,
        "notes": _notes(source, runs, shown, heads),
    }


def _name(task: Task) -> str:
    name, length = task
    return visible(" · ".join([name or "no task named", *([] if length is None else [f"{length:,}"])]))


def _values(run: RunView, tasks: Sequence[Task], metrics: Sequence[str]) -> dict[str, list[list[float | None] | None]]:
    """Return for each metric mean, low, high and count over all examples, then of each task."""
    of = {(task.task, task.length): task.metrics for task in run.info.tasks}
    found: dict[str, list[list[float | None] | None]] = {}
    for name in metrics:
        summaries = [run.info.metrics.get(name), *(of.get(task, {}).get(name) for task in tasks)]
        found[name] = [
            None if one is None else [rounded(one.mean), rounded(one.low), rounded(one.high), one.count]
            for one in summaries
        ]
    return found


def _details(
    source: ReportInput, runs: Sequence[RunView], metric: str
) -> tuple[dict[str, JsonDict], dict[str, JsonDict]]:
    """Return for each run the map of depth and length, and the heads that had evicted the needle."""
    depth: dict[str, JsonDict] = {}
    heads: dict[str, JsonDict] = {}
    for replay in source.replays:
        own = [run for run in runs if run.replay is replay and metric in run.info.metrics]
        numbers = [run.number for run in own]
        values, trace = by_sequence(replay, numbers, [metric]), source.trace_of(replay)
        evicting = [run.number for run in own if not run.info.reads]
        evicted = evicted_needles(replay, trace, evicting) if trace is not None and evicting else {}
        for run in own:
            scores = values[run.number, metric]
            made = _over_depth(replay.info.trace.examples, scores)
            if made is not None:
                depth[run.id] = made
            if run.number in evicted:
                found = _evicted(evicted[run.number], scores)
                if found is not None:
                    heads[run.id] = {"layers": list(replay.info.trace.layers), **found}
    return depth, heads


def _over_depth(examples: Sequence[ExampleRef], scores: Mapping[int, float]) -> JsonDict | None:
    """Return mean scores ``[depths, lengths]`` and their counts; None where no depth is known."""
    known = [(one, one.depth) for one in examples if one.depth is not None and one.sequence in scores]
    if not known:
        return None
    exact = sorted({depth for _, depth in known})
    few = len(exact) <= DEPTHS
    names = exact if few else [(at + 0.5) / DEPTHS for at in range(DEPTHS)]
    lengths = sorted({one.length for one, _ in known}, key=lambda length: (length is None, length or 0))
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for one, depth in known:
        row = exact.index(depth) if few else min(int(depth * DEPTHS), DEPTHS - 1)
        cells[row, lengths.index(one.length)].append(scores[one.sequence])
    places = [[cells.get((row, column), []) for column in range(len(lengths))] for row in range(len(names))]
    return {
        "depths": [f"{name:.0%}" for name in names],
        "lengths": ["?" if length is None else f"{length:,}" for length in lengths],
        "means": [[rounded(float(np.mean(found))) if found else None for found in row] for row in places],
        "counts": [[len(found) for found in row] for row in places],
    }


def _evicted(evicted: NDArray[np.float64], scores: Mapping[int, float]) -> JsonDict | None:
    """Return the mean share of the needle that each head had evicted, ``[L, G]``, where answers are wrong, and right.

    None where no sequence with an answer has a needle.
    """
    there = [number for number in sorted(scores) if not np.isnan(evicted[number]).all()]
    sides = {
        "wrong": [number for number in there if scores[number] < WRONG],
        "right": [number for number in there if scores[number] >= WRONG],
    }
    if not there:
        return None
    made: JsonDict = {}
    for side, chosen in sides.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # heads that a layer has not have no mean
            means = np.nanmean(evicted[chosen], 0) if chosen else np.full(evicted.shape[1:], np.nan)
        made[side] = [[None if np.isnan(value) else rounded(float(value)) for value in row] for row in means]
        made[f"{side}_examples"] = len(chosen)
    return made


def _notes(
    source: ReportInput, runs: Sequence[RunView], shown: Sequence[RunView], heads: Mapping[str, JsonDict]
) -> list[str]:
    """Return what the reader should know about the numbers."""
    notes = []
    if len(shown) < len(runs):
        notes.append(f"The page has {len(shown)} of {len(runs)} runs; the others are in summary.json.")
    if not any("answer_score" in run.info.metrics for run in shown):
        notes.append("Nothing was generated: add --generate to the replay to score what the model says.")
    examples = [example for replay in source.replays for example in replay.info.trace.examples]
    without = sum(not example.spans for example in examples)
    if without:
        notes.append(
            f"{without} of {len(examples)} answers are not in the text after the prompt: they have no loss, and "
            "whether they are the first choice is not known."
        )
    if not heads:
        notes.append("No map of heads: the spans of the needles are not known, or the trace was not found.")
    return notes
