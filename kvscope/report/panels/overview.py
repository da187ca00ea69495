"""Overview: the best policy of each kind at each budget and its cost, then every run with all its metrics."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.core.json import JsonDict
from kvscope.core.near_copies import copies_note
from kvscope.report.encoding import rounded
from kvscope.report.headline import near, shown_groups, span, winners
from kvscope.report.panel import panel
from kvscope.report.runs import MetricFacts, ends
from kvscope.report.source import ReportInput
from kvscope.results.ranking import HEADLINES, agree

# Columns of the table until the reader selects all metrics.
USUAL = (
    "retained_mass",
    "ideal_cosine",
    "output_error",
    "perplexity_ratio",
    "share_of_belady",
    "read_keys",
    "held_keys",
    "latent_entries",
    "latent_bytes",
    "cache_bytes",
)
IDEAL = "ideal_mass"  # what the ideal set retains with as many keys


@panel(
    "overview",
    title="Overview",
    order=10,
    help="The upper table names the best policy of each kind at each budget, with the keys it holds and reads: "
    "policies are ranked only within a kind, since a cache that grows or that is read in part has another cost. In "
    "the lower table, each row is one policy under one budget; ★ marks the best and ▽ the last of its kind, budget "
    "and protocol. A number is the mean over steps, then heads, layers and sequences, with its 95 % interval for five "
    "or more sequences.",
)
def overview(source: ReportInput) -> JsonDict:
    """Return the best of each group, and rows in the order of budget and of the first metric that has a best end."""
    metrics = source.metric_facts()
    runs = source.ranking
    shown = runs[: source.limits.rows]
    marks = _marks(source, metrics)
    notes = []
    if len(shown) < len(runs):
        notes.append(f"The table shows {len(shown)} of {len(runs)} rows; summary.json has the others.")
    if not any(value.low is not None for run in shown for value in run.metrics.values()):
        notes.append("No intervals are shown: they need five or more sequences.")
    copied = {replay.name: copies_note(replay.info.trace.near_copies) for replay in source.replays}
    notes += [f"{name}: {note}." for name, note in copied.items() if note]
    if len({run.protocol[1] for run in runs}) > 1:
        notes.append("The upper table shows the closed loop where it was replayed, the lower table both loops.")
    return {
        "usual": [name for name in USUAL if name in source.metrics],
        "headlines": [name for name in HEADLINES if name in source.metrics],
        "rows": [{"run": run.id, "marks": marks[run.id]} for run in shown],
        "best": _best(source, [metric for metric in metrics if metric.name in HEADLINES]),
        "notes": notes,
    }


def _marks(source: ReportInput, metrics: Sequence[MetricFacts]) -> dict[str, dict[str, str]]:
    """Return for each run the metrics in which it is the best or the last of its group."""
    marks: dict[str, dict[str, str]] = {run.id: {} for run in source.runs}
    for group in source.groups.values():
        if group[0].kind == "bound":
            continue
        for metric in metrics:
            found = ends(group, metric)
            for run in group if found else []:
                value = rounded(run.mean(metric.name))
                if found and value == found[0]:
                    marks[run.id][metric.name] = "best"
                elif found and value == found[1] and len(group) > 2:
                    marks[run.id][metric.name] = "last"
    return marks


def _best(source: ReportInput, metrics: Sequence[MetricFacts]) -> list[JsonDict]:
    """Return one line for each budget and kind: the best runs in each metric, the number of runs, and the cost."""
    lines: list[JsonDict] = []
    for group in shown_groups(source):
        first = group[0]
        by = {metric.name: winners(group, metric) for metric in metrics}
        best = [run for _, found in by.values() for run in found]
        if best:
            lines.append(
                {
                    "run": first.id,
                    "of": len(group),
                    "best": {
                        name: {"value": value, "runs": [run.id for run in found], "near": near(group, found, name)}
                        for name, (value, found) in by.items()
                    },
                    "agree": agree([run.label for run in found] for _, found in by.values() if found),
                    "held": span(best, "held_keys"),
                    "read": span(best, "read_keys"),
                    "full": rounded(first.full_keys),
                    "ideal": rounded(first.mean(IDEAL)) if first.kind == "every step" else None,
                }
            )
    return lines
