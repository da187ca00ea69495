"""Did fidelity fall? Two summaries side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvscope.errors import ResultError, UsageError
from kvscope.registry import nearest
from kvscope.results.schema import SUMMARY, SUMMARY_KIND, load_json
from kvscope.results.store import open_replay

Verdict = Literal["same", "better", "worse", "changed", "missing", "new"]
REGRESSIONS = ("worse", "changed", "missing")
DEFAULT_TOLERANCE = 0.001
ALIGNED = ("policy", "params", "budget", "prefill", "loop")  # what makes two runs the same run
DECLARED = ("direction", "range", "when_nothing_evicted")


@dataclass(frozen=True)
class Row:
    """One metric of one run on both sides.

    `verdict` is ``worse`` for a fall by more than the tolerance, ``changed`` for a metric without a better direction
    that moved by more (keys read and held), ``missing`` where the new side lacks a run or a value, ``new`` where the
    base does.
    """

    run: str
    metric: str
    base: float | None
    new: float | None
    change: float | None
    tolerance: float
    verdict: Verdict


@dataclass(frozen=True)
class Diff:
    """The comparison of two summaries."""

    base: str
    new: str
    rows: list[Row]

    @property
    def regressions(self) -> list[Row]:
        """Rows that fail a build: worse, changed, missing."""
        return [row for row in self.rows if row.verdict in REGRESSIONS]

    @property
    def regressed(self) -> bool:
        """Whether there is any."""
        return bool(self.regressions)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "kind": "kvscope-diff",
            "schema": 1,
            "base": self.base,
            "new": self.new,
            "regressed": self.regressed,
            "rows": [asdict(row) for row in self.rows],
        }


def load_summary(path: Path | str) -> dict[str, Any]:
    """Return the summary of a replay folder, or of a committed ``summary.json``.

    Raises
    ------
    ResultError
        If it is neither, incomplete, damaged, or of another version.
    """
    path = Path(path)
    summary = load_json(path, SUMMARY_KIND, "summary") if path.is_file() else open_replay(path).summary
    fault = _fault(summary)
    if fault:
        raise ResultError(f"{path} is damaged: {fault}", f"Replay again, and keep its {SUMMARY}.")
    return {"source": str(path), **summary}


def diff(
    base: Mapping[str, Any], new: Mapping[str, Any], tolerance: float | Mapping[str, float] = DEFAULT_TOLERANCE
) -> Diff:
    """Return how `new` differs from `base`, run by run and metric by metric.

    Parameters
    ----------
    base, new : mapping
        Summaries, as `load_summary` gives them.
    tolerance : float or mapping of str to float
        How much a metric may fall; for a mapping, ``""`` is for the metrics that it does not name.

    Raises
    ------
    ResultError
        If the two are of different traces, models or metric definitions.
    UsageError
        If the tolerance names a metric that neither side has.
    """
    _require_same_origin(base, new)
    allowed = {"": float(tolerance)} if isinstance(tolerance, int | float) else {"": DEFAULT_TOLERANCE, **tolerance}
    declared = {**new["metrics"], **base["metrics"]}
    for name in allowed:
        if name and name not in declared:
            raise UsageError(f"tolerance for {name!r}, which no run has", nearest(name, declared))
    before, after = _by_key(base, "base"), _by_key(new, "new")
    rows: list[Row] = []
    for key in [*before, *(key for key in after if key not in before)]:
        rows += _rows(before.get(key), after.get(key), declared, allowed)
    return Diff(str(base.get("source", "base")), str(new.get("source", "new")), rows)


def parse_tolerance(texts: list[str]) -> dict[str, float]:
    """Return tolerances from ``0.01`` (for all metrics) and ``retained_mass=0.001``; ``""`` is for all.

    Raises
    ------
    UsageError
        If one is not a number from 0 up.
    """
    parsed: dict[str, float] = {}
    for part in (piece.strip() for text in texts for piece in text.split(",")):
        name, _, amount = part.rpartition("=")
        try:
            value = float(amount)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UsageError(f"tolerance {part!r} is not a number from 0 up", "Write 0.01, or retained_mass=0.001.")
        parsed[name.strip()] = value
    return parsed


def _rows(
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    declared: Mapping[str, Any],
    allowed: Mapping[str, float],
) -> list[Row]:
    run = before or after
    assert run is not None, "the key is from one of the two sides"
    label = f"{run['label']} {run['budget'] or 'full cache'} {run['prefill']} {run['loop']}"
    return [
        _row(label, name, before, after, str(declared[name]["direction"]), allowed.get(name, allowed[""]))
        for name in declared
        if any(side is not None and name in side["metrics"] for side in (before, after))
    ]


def _row(
    label: str,
    name: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    direction: str,
    tolerance: float,
) -> Row:
    old, new = _mean(before, name), _mean(after, name)
    change = None if old is None or new is None else new - old
    verdict: Verdict
    if after is None or (new is None and old is not None):
        verdict = "missing"
    elif before is None or (old is None and new is not None):
        verdict = "new"
    elif change is None or abs(change) <= tolerance:
        verdict = "same"
    elif direction == "none":
        verdict = "changed"
    else:
        verdict = "better" if (change > 0) == (direction == "higher") else "worse"
    return Row(label, name, old, new, change, tolerance, verdict)


def _mean(run: Mapping[str, Any] | None, name: str) -> float | None:
    """Return the mean of a metric; None where there is no run, no metric, or no finite number."""
    mean = None if run is None else run["metrics"].get(name, {}).get("mean")
    return None if mean is None or not math.isfinite(mean) else float(mean)


def _by_key(summary: Mapping[str, Any], side: str) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for run in summary["runs"]:
        key = json.dumps([run[name] for name in ALIGNED], sort_keys=True)
        if key in found:
            raise ResultError(
                f"{summary.get('source', side)} has two runs of {run['label']} at {run['budget'] or 'full cache'}",
                "Replay each policy and budget once: of two, it is not known which to compare.",
            )
        found[key] = run
    return found


def _fault(summary: Mapping[str, Any]) -> str:
    """Return what a summary lacks; nothing if it can be compared."""
    trace, metrics, runs = (summary.get(name) for name in ("trace", "metrics", "runs"))
    if not isinstance(trace, dict) or "identity" not in trace:
        return "it does not say of which trace it is"
    if not isinstance(metrics, dict) or not all(map(_is_declaration, metrics.values())):
        return "it does not say which way its metrics are better"
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        return "it has no runs"
    for number, run in enumerate(runs):
        lacking = [name for name in (*ALIGNED, "label", "metrics") if name not in run]
        if lacking:
            return f"run {number} has no {lacking[0]}"
        if not isinstance(run["metrics"], dict):
            return f"run {number} has no metrics"
        for name, value in run["metrics"].items():
            if name not in metrics or not isinstance(value, dict) or not _is_mean(value.get("mean")):
                return f"run {number} has no readable {name}"
    return ""


def _is_declaration(value: object) -> bool:
    return isinstance(value, dict) and value.get("direction") in ("higher", "lower", "none")


def _is_mean(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _require_same_origin(base: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for what in ("model", "identity"):
        old, other = base["trace"].get(what), new["trace"].get(what)
        if old != other:
            raise ResultError(
                f"the two are of different traces: {what} {_short(old)} and {_short(other)}",
                "Compare replays of the same trace.",
            )
    for what in ("prefill", "loop"):
        old_set, new_set = ({run[what] for run in side["runs"]} for side in (base, new))
        if old_set != new_set:
            raise ResultError(
                f"the two are of different protocols: {what} {_names(old_set)} and {_names(new_set)}",
                "Replay both with the same --prefill, in the same loop.",
            )
    for name in sorted(base["metrics"].keys() & new["metrics"].keys()):
        for what in DECLARED:
            old, other = (side["metrics"][name].get(what) for side in (base, new))
            if old != other:
                raise ResultError(
                    f"metric {name} is defined differently on the two sides: {what} {old} and {other}",
                    "Replay both with one kvscope.",
                )


def _names(values: set[str]) -> str:
    return "+".join(sorted(values)) or "nothing"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "..." if re.fullmatch("[0-9a-f]{64}", text) else text
