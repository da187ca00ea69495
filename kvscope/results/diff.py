"""Comparison of two summaries: which metrics became worse, and whether decisions changed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from kvscope.core.budget import NO_BUDGET
from kvscope.core.errors import ResultError, UsageError
from kvscope.core.records import Direction, MetricRecord
from kvscope.core.registry import nearest
from kvscope.core.summary_records import RunSummary, SummaryRecord
from kvscope.results.decisions import Decisions, compare_decisions
from kvscope.results.tolerance import Tolerance

Verdict = Literal["worse", "missing", "changed", "new", "better", "same"]  # the most important first
REGRESSIONS = ("worse", "missing")
DECLARED = ("direction", "range", "when_nothing_evicted")
ALIGNED = (
    "policy",
    "budget",
    "prefill",
    "loop",
    "phase",
    "allocate",
    "cache",
    "merge",
    "accumulate",
)  # equal for runs that are compared
FEW = 15  # rows that are all shown, whether they changed or not: as many as one run has
NOTHING_COMMON = "The two have no run in common; to compare two policies, use: kvscope compare"
FIRST = 10  # differences that are listed for each run


DEFAULT_TOLERANCE = Tolerance(0.001)


@dataclass(frozen=True)
class DiffRow:
    """One metric of one run on both sides.

    `verdict` is ``worse`` for a fall by more than the tolerance, ``changed`` for a larger change of a metric without a
    better direction (keys read and held), ``missing`` where the new side has no such run or value, ``new`` where the
    base has none. `tolerance` is the largest tolerated change, `stated` the tolerance as given: ``0.001`` or ``1%``.
    """

    run: str
    metric: str
    base: float | None
    new: float | None
    change: float | None
    tolerance: float
    stated: str
    verdict: Verdict

    @property
    def fails(self) -> bool:
        """Whether the row makes a CI regression check fail."""
        return self.verdict in REGRESSIONS


@dataclass(frozen=True)
class Diff:
    """The comparison of two summaries, as a CI regression check uses it.

    Attributes
    ----------
    base, new : str
        Where the summaries are from.
    rows : list of DiffRow
        One for each run and metric.
    decisions : list of Decisions or None
        For each run, where its evictions differ; None if decisions were not compared.
    """

    base: str
    new: str
    rows: list[DiffRow]
    decisions: list[Decisions] | None = None

    @property
    def regressions(self) -> list[DiffRow]:
        """The rows that make a CI regression check fail: those that are ``worse`` or ``missing``."""
        return [row for row in self.rows if row.fails]

    @property
    def changed_decisions(self) -> list[Decisions]:
        """The runs whose decisions differ, which also makes a CI regression check fail."""
        return [run for run in self.decisions or () if not run.equal]

    @property
    def regressed(self) -> bool:
        """Whether the CI regression check fails."""
        return bool(self.regressions or self.changed_decisions)

    def shown(self, everything: bool = False) -> list[DiffRow]:
        """Return the rows to show: all if `everything` or if they are few, otherwise those that changed."""
        if everything or len(self.rows) <= FEW:
            return self.rows
        return [row for row in self.rows if row.verdict != "same"]

    def verdict(self) -> str:
        """Return the result in one line."""
        counts = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in get_args(Verdict)}
        text = f"{len(self.rows)} values: {', '.join(f'{count} {name}' for name, count in counts.items() if count)}."
        if self.decisions is not None:
            text += f" Decisions differ in {len(self.changed_decisions)} of {len(self.decisions)} runs."
        if self.rows and {row.verdict for row in self.rows} <= {"missing", "new"}:
            text += f" {NOTHING_COMMON}"
        return text

    def to_dict(self) -> dict[str, object]:
        """Return JSON data for ``--json``."""
        return {
            "kind": "kvscope-diff",
            "schema": 1,
            "base": self.base,
            "new": self.new,
            "regressed": self.regressed,
            "rows": [asdict(row) for row in self.rows],
            "decisions": None if self.decisions is None else [asdict(run) for run in self.decisions],
        }


def diff(
    base: SummaryRecord,
    new: SummaryRecord,
    tolerance: float | Tolerance | Mapping[str, float | Tolerance] = DEFAULT_TOLERANCE,
    *,
    decisions: bool = False,
    first: int = FIRST,
    sources: tuple[str, str] = ("base", "new"),
) -> Diff:
    """Return how the summary of one replay differs from that of another, by run and metric.

    Parameters
    ----------
    base, new : SummaryRecord
        The summaries: ``replay.summary``, or what `load_summary` reads from a file.
    tolerance : float, Tolerance, or mapping of str to these
        How much a metric may become worse: one for all metrics, or a mapping from their names, in which ``""`` is for
        metrics without an entry.
    decisions : bool
        Whether to compare also at which step each key was evicted.
    first : int
        Number of differences to list for each run.
    sources : (str, str)
        Paths of the replay folders or ``summary.json`` files, for messages; decisions are compared interval by interval
        if both are folders.

    Raises
    ------
    ResultError
        If traces, models, protocols or metric definitions differ, or there is no digest of the decisions.
    UsageError
        If the tolerance names a metric that neither side has.
    """
    require_same_origin(base, new)
    given = tolerance if isinstance(tolerance, Mapping) else {"": tolerance}
    allowed = {"": DEFAULT_TOLERANCE} | {name: _tolerance(value) for name, value in given.items()}
    declared = {**new.metrics, **base.metrics}
    for name in allowed:
        if name and name not in declared:
            raise UsageError(f"the tolerance is for metric {name!r}, which no run has", nearest(name, declared))
    rows: list[DiffRow] = []
    decided: list[Decisions] = []
    for old, later in _pairs(_each_once(base, sources[0]), _each_once(new, sources[1])):
        rows += _rows(old, later, declared, allowed)
        if decisions and old is not None and later is not None:
            decided.append(compare_decisions(_label(old), (sources[0], old), (sources[1], later), first))
    return Diff(*sources, rows, decided if decisions else None)


def require_same_origin(base: SummaryRecord, new: SummaryRecord) -> None:
    """Raise ResultError unless two summaries have the same trace, model, protocol and metric definitions."""
    origins = (("model", base.trace.model, new.trace.model), ("identity", base.trace.identity, new.trace.identity))
    for what, old, other in origins:
        if old != other:
            raise ResultError(
                f"the replays are of different traces: {what} {_short(old)} and {_short(other)}",
                "Compare replays of the same trace.",
            )
    for what in ("prefill", "loop"):
        old_set, new_set = ({str(getattr(run, what)) for run in side.runs} for side in (base, new))
        if old_set != new_set:
            raise ResultError(
                f"the replays have different protocols: {what} {_names(old_set)} and {_names(new_set)}",
                "Replay both with the same --prefill and in the same loop.",
            )
    for name in sorted(base.metrics.keys() & new.metrics.keys()):
        for what in DECLARED:
            one, another = (getattr(side.metrics[name], what) for side in (base, new))
            if one != another:
                raise ResultError(
                    f"the definitions of metric {name} differ: {what} {one} and {another}",
                    "Replay both with the same version of kvscope.",
                )


def _tolerance(value: float | Tolerance) -> Tolerance:
    return value if isinstance(value, Tolerance) else Tolerance(float(value))


def _rows(
    before: RunSummary | None,
    after: RunSummary | None,
    declared: Mapping[str, MetricRecord],
    allowed: Mapping[str, Tolerance],
) -> list[DiffRow]:
    run = before or after
    assert run is not None, "the key is from one of the two sides"
    return [
        _row(_label(run), name, before, after, declared[name].direction, allowed.get(name, allowed[""]))
        for name in declared
        if any(side is not None and name in side.metrics for side in (before, after))
    ]


def _row(
    label: str,
    name: str,
    before: RunSummary | None,
    after: RunSummary | None,
    direction: Direction,
    tolerance: Tolerance,
) -> DiffRow:
    old, new = _mean(before, name), _mean(after, name)
    change = None if old is None or new is None else new - old
    verdict: Verdict
    if after is None or (new is None and old is not None):
        verdict = "missing"
    elif before is None or (old is None and new is not None):
        verdict = "new"
    elif change is None or abs(change) <= tolerance.of(old):
        verdict = "same"
    elif direction == "none":
        verdict = "changed"
    else:
        verdict = "better" if (change > 0) == (direction == "higher") else "worse"
    return DiffRow(label, name, old, new, change, tolerance.of(old), str(tolerance), verdict)


def _label(run: RunSummary) -> str:
    return f"{run.label} {run.budget or NO_BUDGET} {run.prefill} {run.loop}"


def _mean(run: RunSummary | None, name: str) -> float | None:
    """Return the mean of a metric; None where there is no run, no metric, or no finite number."""
    mean = None if run is None else run.mean(name)
    return None if mean is None or not math.isfinite(mean) else mean


def _each_once(summary: SummaryRecord, source: str) -> list[RunSummary]:
    found: set[str] = set()
    for run in summary.runs:
        key = json.dumps([getattr(run, name) for name in (*ALIGNED, "params")], sort_keys=True)
        if key in found:
            raise ResultError(
                f"{source} has two runs of {run.label} at {run.budget or NO_BUDGET}",
                "Replay each policy and budget once, so that runs can be paired.",
            )
        found.add(key)
    return list(summary.runs)


def _pairs(base: list[RunSummary], new: list[RunSummary]) -> list[tuple[RunSummary | None, RunSummary | None]]:
    """Return the runs of both sides in pairs, and those that only one side has: first the base's, then the others."""
    rest, pairs = list(new), []
    for old in base:
        later = next((run for run in rest if _same_run(old, run)), None)
        if later is not None:
            rest.remove(later)
        pairs.append((old, later))
    return [*pairs, *((None, later) for later in rest)]


def _same_run(old: RunSummary, later: RunSummary) -> bool:
    """Return whether two runs have the same policy, settings and budget.

    A version of kvscope may know a parameter that another does not. It then has its default, since the label, which
    names all that differ from it, is the same.
    """
    if any(getattr(old, name) != getattr(later, name) for name in ALIGNED):
        return False
    if old.params.keys() != later.params.keys() and old.label != later.label:
        return False
    return all(old.params[name] == later.params[name] for name in old.params.keys() & later.params.keys())


def _names(values: set[str]) -> str:
    return "+".join(sorted(values)) or "nothing"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "..." if re.fullmatch("[0-9a-f]{64}", text) else text
