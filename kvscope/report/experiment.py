"""The page of an experiment: results of every policy and budget, over cache size and over tasks, as one HTML file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvscope.core.errors import ResultError
from kvscope.core.experiment_records import ExperimentRecord, PooledRun
from kvscope.core.json import Json, JsonDict
from kvscope.core.version import __version__
from kvscope.report.encoding import rounded, visible, visible_everywhere
from kvscope.report.page import write_bytes
from kvscope.report.template import EXPERIMENT, document
from kvscope.results.experiment import BY_ANSWERS, BY_LOSS, BY_MASS, held_more, sentences

ALL = "all tasks together"
# Metrics of the table, as far as they are known; the others can be chosen for the plots.
IN_TABLE = (
    "answer_score",
    "answer_first",
    "perplexity",
    BY_LOSS,
    BY_MASS,
    "late_mass_retained",
    "output_error",
    "held_keys",
)


def write_page(record: ExperimentRecord, output: Path) -> Path:
    """Return the path of the self-contained page of an experiment, which replaces an older one.

    The same summary gives the same bytes.

    Raises
    ------
    ResultError
        If there are no results, or the file cannot be written.
    """
    return write_bytes(output, document(page_data(record), [], EXPERIMENT).encode("utf-8"), force=True)


def page_data(record: ExperimentRecord) -> JsonDict:
    """Return everything the page shows as JSON data, without invisible characters.

    Raises
    ------
    ResultError
        If there are no results.
    """
    if not record.runs:
        raise ResultError(f"experiment {record.name} has no results", "See what failed in its summary.")
    parts = list(dict.fromkeys((run.task, run.length) for run in record.runs))
    ranked = [name for name in (*BY_ANSWERS, BY_LOSS, BY_MASS) if name in record.metrics]
    names = [*ranked, *(name for name in record.metrics if name not in ranked)]
    page: JsonDict = {
        "title": record.name,
        "generator": f"kvscope {__version__}",
        "facts": _facts(record),
        "answer": [*sentences(record.verdicts), *held_more(record.runs)],
        "models": _each(run.model for run in record.runs),
        "prefills": _each(str(run.prefill) for run in record.runs),
        "policies": _each(run.policy for run in record.runs),
        "budgets": _each(run.budget for run in record.runs if run.budget is not None) or ["none"],
        "parts": [_part(task, length) for task, length in parts],
        "ranked": list(ranked),
        "metrics": [_metric(record, name) for name in names],
        "runs": [_run(run, parts.index((run.task, run.length))) for run in record.runs],
        "panels": [panel for panel in _panels(record, len(parts)) if panel is not None],
        "notes": [],
    }
    return {visible(name): visible_everywhere(value) for name, value in page.items()}


def _each(values: Iterable[str]) -> list[Json]:
    return list(dict.fromkeys(values))


def _part(task: str | None, length: int | None) -> str:
    if task is None and length is None:
        return ALL
    return " · ".join([task or "no task named", *([] if length is None else [f"{length:,}"])])


def _metric(record: ExperimentRecord, name: str) -> JsonDict:
    about = record.metrics[name]
    return {
        "name": name,
        "title": name.replace("_", " "),
        "direction": about.direction,
        "range": list(about.range),
        "summary": about.summary,
    }


def _run(run: PooledRun, part: int) -> JsonDict:
    return {
        "model": run.model,
        "prefill": str(run.prefill),
        "part": part,
        "policy": run.policy,
        "budget": run.budget,
        "kind": "bound" if run.clairvoyant else "reads some of all keys" if run.reads else "",
        "ranked": not run.clairvoyant and not run.reads and run.budget is not None,
        "sequences": run.sequences,
        "clusters": run.clusters,
        "values": {
            name: [rounded(value.mean), rounded(value.low), rounded(value.high), value.count]
            for name, value in run.metrics.items()
        },
    }


def _facts(record: ExperimentRecord) -> list[Json]:
    """Return the line under the heading."""
    sequences = max(run.sequences for run in record.runs)
    policies = len({run.policy for run in record.runs})
    models = ", ".join(dict.fromkeys(run.model for run in record.runs))
    return [f"model {models}", f"{sequences} sequences", f"{policies} policies", f"{len(record.replays)} replays"]


def _panels(record: ExperimentRecord, parts: int) -> list[JsonDict | None]:
    """Return the panels in order; None for one that has nothing to show."""
    shown: list[Json] = [name for name in IN_TABLE if name in record.metrics]
    failed: list[Json] = [[one.cell, one.what, one.todo] for one in record.failed]
    failed += [
        [label, why, "It is one of all policies: name it alone to see what it needs."]
        for label, why in record.skipped.items()
    ]
    return [
        _panel(
            "results",
            "Results",
            "Each row is one policy under one budget, over the sequences of the chosen tasks. Below a mean is its 95 % "
            "interval over sequences; sequences that are near-copies count as one. The best of a budget is bold: "
            "bounds, which know the future, and policies that hold every key are not ranked.",
            {"metrics": shown},
        ),
        _panel(
            "curves",
            "Over cache size",
            "Each line is one policy from its smallest to its largest budget. Bars are 95 % intervals; where they "
            "overlap, a difference may be chance.",
            {},
        ),
        _panel(
            "tasks",
            "Over tasks",
            "Each row is one policy at the chosen budget, each column a task and length: where a row changes its place "
            "between columns, the best policy depends on the task.",
            {},
        )
        if parts > 1
        else None,
        _panel("missing", "Without a result", "What could not be done, and why.", {"rows": failed}) if failed else None,
    ]


def _panel(name: str, title: str, help: str, data: JsonDict) -> JsonDict:
    return {"name": name, "title": title, "help": help, "detail": False, "notes": [], "data": data}
