"""Overview: the best policy of each kind at each budget and its cost, then every run with all its metrics."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.core.json import JsonDict
from kvscope.core.near_copies import copies_note
from kvscope.report.encoding import rounded
from kvscope.report.panel import panel
from kvscope.report.runs import MetricFacts, RunView, ends
from kvscope.report.source import ReportInput
from kvscope.results.ranking import KINDS

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
HEADLINES = ("retained_mass", "ideal_cosine", "output_error", "perplexity_ratio")
ANSWERS = {
    "retained_mass": "the highest retained mass ({:.3f})",
    "perplexity_ratio": "the lowest perplexity ({:.2f}x full cache)",
}
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


def answer(source: ReportInput) -> str:
    """Return one sentence that names the best policies of the kind and budget of the first run, and their cost."""
    first = source.first
    comparable = (first.protocol[0], first.protocol[2], first.budget, first.kind, first.phase)
    groups = [
        group
        for group in _shown_groups(source)
        if (group[0].protocol[0], group[0].protocol[2], group[0].budget, group[0].kind, group[0].phase) == comparable
    ]
    if not groups:
        return ""
    group, said = groups[0], []
    for name, words in ANSWERS.items():
        value, best = _winners(group, MetricFacts.of(name, source.metrics.get(name, {})))
        if value is not None:
            near = _near(group, best, name)
            names = " and ".join(run.label for run in best[:2]) + (" and others" if len(best) > 2 else "")
            verb = "has" if len(best) == 1 else "have"
            also = f" ({near} more within its interval)" if near else ""
            said.append(f"{names} {verb} {words.format(value)}{also}")
    keys = _span(group, "held_keys")
    held = "" if keys is None else f", {keys[0]:.0f} of {group[0].full_keys:.0f} keys held"
    many = f"of {len(group)} policies (kind: {first.kind}), " if len(group) > 1 else ""
    return f"At budget {first.budget}{held}: {many}{'; '.join(said)}." if said else ""


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
    for group in _shown_groups(source):
        first = group[0]
        winners = {metric.name: _winners(group, metric) for metric in metrics}
        best = [run for _, found in winners.values() for run in found]
        if best:
            lines.append(
                {
                    "run": first.id,
                    "of": len(group),
                    "best": {
                        name: {"value": value, "runs": [run.id for run in found], "near": _near(group, found, name)}
                        for name, (value, found) in winners.items()
                    },
                    "held": _span(best, "held_keys"),
                    "read": _span(best, "read_keys"),
                    "full": rounded(first.full_keys),
                    "ideal": rounded(first.mean(IDEAL)) if first.kind == "every step" else None,
                }
            )
    return lines


def _shown_groups(source: ReportInput) -> list[list[RunView]]:
    """Return groups by trace and prefill, then budget and kind; without bounds, nor open groups with a closed one."""
    groups = [group for group in source.groups.values() if group[0].kind != "bound"]
    closed = {_apart_from_loop(group[0]) for group in groups if group[0].protocol[1] == "closed"}
    shown = [group for group in groups if group[0].protocol[1] != "open" or _apart_from_loop(group[0]) not in closed]
    kinds = list(KINDS)

    def place(group: Sequence[RunView]) -> tuple[str, str, float | None, str, int, str]:
        identity, loop, prefill = group[0].protocol
        return identity, prefill, group[0].budget_keys, loop, kinds.index(group[0].kind), group[0].phase

    return sorted(shown, key=place)


def _apart_from_loop(run: RunView) -> tuple[str, ...]:
    identity, _, prefill = run.protocol
    return (identity, prefill, run.phase, run.kind, run.budget or "")


def _winners(group: Sequence[RunView], metric: MetricFacts) -> tuple[float | None, list[RunView]]:
    """Return the best value and the runs that have it; a run without competitors is the best."""
    found = ends(group, metric)
    value = found[0] if found else (rounded(group[0].mean(metric.name)) if len(group) == 1 else None)
    if value is None:
        return None, []
    return value, [run for run in group if rounded(run.mean(metric.name)) == value]


def _near(group: Sequence[RunView], best: Sequence[RunView], metric: str) -> int:
    """Return how many other runs have a mean inside the interval of the best: their difference is not significant."""
    value = best[0].metrics[metric] if best else None
    if value is None or value.low is None or value.high is None:
        return 0
    low, high = value.low, value.high
    others = (run.mean(metric) for run in group if run not in best)
    return sum(mean is not None and low <= mean <= high for mean in others)


def _span(runs: Sequence[RunView], metric: str) -> list[float] | None:
    """Return the smallest and the largest mean of some runs."""
    values = [value for run in runs if (value := rounded(run.mean(metric), 4)) is not None]
    return [min(values), max(values)] if values else None
