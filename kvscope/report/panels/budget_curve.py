"""Budget curves: any metric against the keys that were held or read, one line per policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvscope.core.json import JsonDict
from kvscope.report.panel import panel
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

# Metric -> the metric that bounds it at the same number of keys; drawn where no run of the bound was replayed.
REFERENCES = {"retained_mass": "ideal_mass"}
SIZE = "cache_bytes"
EVERY = 0.95  # a policy that reads a part and holds this share of a full cache holds every key

LineKey = tuple[str, ...]  # label, replay, trace, loop, prefill


@dataclass(frozen=True)
class CurveLine:
    """One policy under one protocol: its runs in order of budget, and whether it is shown at first.

    With `sizes` its runs have no budget, and differ in the bits of their caches: a line over bytes alone.
    """

    name: str
    kind: str
    runs: list[RunView]
    usual: bool
    sizes: bool = False

    @property
    def holds_all(self) -> bool:
        """Whether its runs read a part and hold every key: over the keys held they would press all others together."""
        shares = [(run.mean("held_keys") or 0.0) / run.full_keys for run in self.runs]
        return self.kind == "reads a part" and min(shares) >= EVERY


@panel(
    "budget-curve",
    title="Budget curves",
    order=20,
    help="Each line is one policy from its smallest to its largest budget, over the keys that it held or read, the "
    "share of a full cache that it held, or the bytes of its cache, so that policies and caches of different kinds "
    "appear at their cost. Policies that hold every key and read a part of them are in a strip of their own on the "
    "right. A line that is still high at few keys loses little; the distance to the dashed bounds is what a better "
    "choice of keys could gain.",
)
def budget_curve(source: ReportInput) -> JsonDict:
    """Return one line per policy and protocol, as the runs of its budgets, and which of them to show at first."""
    lines = curve_lines(source)
    shown = lines[: source.limits.rows]
    notes = []
    if len(shown) < len(lines):
        notes.append(f"The plot offers {len(shown)} of {len(lines)} lines; the others are in summary.json.")
    drawn = {run.id for line in lines for run in line.runs}
    without = list(dict.fromkeys(run.label for run in source.runs if run.budget_keys is None and run.id not in drawn))
    if without:
        notes.append(f"No line, because they have no budget: {', '.join(without)}.")
    if lines and all(len(line.runs) == 1 for line in lines if not line.sizes):
        notes.append("Only one budget was replayed. Lines need two or more: --budget 10%,20%,40%.")
    return {
        "lines": [
            {
                "name": line.name,
                "kind": line.kind,
                "runs": [run.id for run in line.runs],
                "sizes": line.sizes,
                "all": line.holds_all,
            }
            for line in shown
        ],
        "usual": [place for place, line in enumerate(shown) if line.usual],
        "references": _references(source),
        "notes": notes,
    }


def curve_lines(source: ReportInput) -> list[CurveLine]:
    """Return the lines of all policies and protocols."""
    lines = _lines(source.runs)
    return [
        CurveLine(source.title_of(runs[0]), runs[0].kind, runs, key[0] in source.usual and not _superseded(key, lines))
        for key, runs in lines.items()
    ] + _of_sizes(source)


def _of_sizes(source: ReportInput) -> list[CurveLine]:
    """Return a line for each policy without a budget that ran with several caches, from the smallest cache on."""
    lines: dict[LineKey, list[RunView]] = defaultdict(list)
    for run in source.runs:
        if run.budget_keys is None and run.mean(SIZE) is not None:
            lines[(run.info.policy, run.source, *run.protocol)].append(run)
    closed = {key[2] for key in lines if key[3] == "closed"}
    return [
        CurveLine(
            f"{source.title_of(max(runs, key=_size))}, caches of fewer bits",
            runs[0].kind,
            sorted(runs, key=_size),
            key[3] == "closed" or key[2] not in closed,
            True,
        )
        for key, runs in lines.items()
        if len(runs) > 1
    ]


def _size(run: RunView) -> float:
    return run.mean(SIZE) or 0.0


def _lines(runs: Sequence[RunView]) -> dict[LineKey, list[RunView]]:
    lines: dict[LineKey, list[RunView]] = defaultdict(list)
    for run in runs:
        if run.budget_keys is not None:
            lines[(run.label, run.source, *run.protocol)].append(run)
    return {name: sorted(line, key=lambda run: run.budget_keys or 0.0) for name, line in lines.items()}


def _superseded(name: LineKey, lines: Mapping[LineKey, Sequence[RunView]]) -> bool:
    """Return whether an open-loop line has a closed-loop one, which has all of its metrics and more."""
    label, _, identity, loop, prefill = name
    return loop == "open" and any((other[0], *other[2:]) == (label, identity, "closed", prefill) for other in lines)


def _references(source: ReportInput) -> list[JsonDict]:
    """Return for each bounding metric and protocol the runs that have it, one for each budget."""
    bounds = {str(run.info.policy) for run in source.runs if run.kind == "bound"}
    made: list[JsonDict] = []
    for metric, bound in REFERENCES.items():
        if "ideal" in bounds or metric not in source.metrics:
            continue
        points: dict[tuple[str, ...], dict[float, str]] = defaultdict(dict)
        for run in source.ranking:
            if run.kind == "every step" and run.budget_keys is not None and run.mean(bound) is not None:
                points[run.protocol].setdefault(run.budget_keys, run.id)
        for (_, loop, prefill), runs in points.items():
            ways = (
                (f"{loop} loop", {each[1] for each in points}),
                (f"{prefill} prefill", {each[2] for each in points}),
            )
            name = " · ".join(["ideal", *(way for way, all_ways in ways if len(all_ways) > 1)])
            made.append({"name": name, "metric": metric, "values": bound, "runs": list(runs.values())})
    return made
