"""Comparison of two policies on the same sequences, for every common budget and every metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kvscope.core.budget import NO_BUDGET
from kvscope.core.errors import UsageError
from kvscope.core.near_copies import copies_note
from kvscope.core.records import RunRecord
from kvscope.core.registry import nearest
from kvscope.results.diff import require_same_origin
from kvscope.results.statistics import Paired, paired
from kvscope.results.store import Replay
from kvscope.results.stream import by_sequence

Values = Mapping[tuple[int, str], Mapping[int, float]]  # (run, metric) -> sequence -> value
HELD = "held_keys"  # the metric that shows what a budget means in keys
SAME_COST = 0.01  # relative difference of keys held that is not reported


@dataclass(frozen=True)
class ComparisonRow:
    """One metric of both policies under one budget.

    Attributes
    ----------
    budget : str
        The budget as it was given: ``20%``, ``256``.
    loop : str
        ``open`` or ``closed``.
    metric, direction : str
        The metric, and which way is better: ``higher``, ``lower`` or ``none``.
    paired : Paired
        Means of both, their difference with its interval, and the tests, over the sequences that both have.
    better : str
        ``A`` or ``B`` if the difference is significant; empty if it is not, or if the metric has no better direction.
    """

    budget: str
    loop: str
    metric: str
    direction: str
    paired: Paired
    better: str

    def to_dict(self) -> dict[str, object]:
        """Return JSON data, with all numbers on one level."""
        own = {name: value for name, value in vars(self).items() if name != "paired"}
        return {**own, **asdict(self.paired)}


@dataclass(frozen=True)
class Comparison:
    """Two compared policies.

    Attributes
    ----------
    a, b : str
        Labels of the policies.
    rows : list of ComparisonRow
        One for each common budget and metric.
    warnings : list of str
        What limits the comparison: few sequences, near copies, or different costs, such as numbers of keys held.
    """

    a: str
    b: str
    rows: list[ComparisonRow]
    warnings: list[str]

    def to_dict(self) -> dict[str, object]:
        """Return JSON data for ``--json``."""
        return {
            "kind": "kvscope-comparison",
            "schema": 1,
            "a": self.a,
            "b": self.b,
            "rows": [row.to_dict() for row in self.rows],
            "warnings": self.warnings,
        }


def compare(a: tuple[Replay, str], b: tuple[Replay, str], metrics: Sequence[str] | None = None) -> Comparison:
    """Return how policy B differs from policy A, at every budget that both have.

    Policies are compared sequence by sequence. The value of a sequence is the mean over steps, then heads, then layers,
    as in the summary.

    Parameters
    ----------
    a, b : (Replay, str)
        A replay and one of its policies: its label, its name if no other policy has the same, or the number of a run.
        A policy without a budget is compared with every run of the other.
    metrics : sequence of str, optional
        Names of metrics; by default all that have a better direction and a value.

    Raises
    ------
    ResultError
        If traces, protocols or metric definitions of the replays differ.
    UsageError
        If a policy or metric does not exist, or the policies have no budget in common.

    Example
    -------
    >>> comparison = kvscope.compare((replay, "h2o"), (replay, "tova"), ["output_error"])  # doctest: +SKIP
    >>> [(row.budget, row.better) for row in comparison.rows]  # doctest: +SKIP
    [('20%', 'B')]
    """
    require_same_origin(a[0].summary, b[0].summary)
    declared = {**a[0].info.metrics, **a[0].summary.metrics}  # in the order of the replay
    for name in metrics or ():
        if name not in declared:
            raise UsageError(f"no metric is called {name!r}", nearest(name, declared))
    selected = list(dict.fromkeys(metrics or [name for name, item in declared.items() if item.direction != "none"]))
    pairs = _pairs(runs_named(*a), runs_named(*b))
    copies = a[0].info.trace.near_copies or b[0].info.trace.near_copies  # an older replay does not know them
    read = list(dict.fromkeys([*selected, *([HELD] if HELD in declared else [])]))
    of_a = by_sequence(a[0], {one.run for one, _ in pairs}, read)
    of_b = by_sequence(b[0], {other.run for _, other in pairs}, read)
    rows: list[ComparisonRow] = []
    warnings = [note] if (note := copies_note(copies)) else []
    for one, other in pairs:
        budget = _budget(one, other)
        for name in selected:
            both = _paired(of_a, one, of_b, other, name, copies)
            if both.sequences:
                direction = declared[name].direction
                rows.append(ComparisonRow(budget, str(one.loop), name, direction, both, _better(both, direction)))
        if HELD in declared:
            warnings += _cost_differences(budget, one, other, _paired(of_a, one, of_b, other, HELD, copies))
    warnings += [row.paired.warning for row in rows if row.paired.warning and row.direction != "none"]
    labels = [str(run.label) for run in pairs[0]]
    if a[0].path != b[0].path:
        labels = [f"{label} of {replay.name}" for label, (replay, _) in zip(labels, (a, b), strict=True)]
    return Comparison(labels[0], labels[1], rows, list(dict.fromkeys(warnings)))


def policies(replay: Replay) -> list[str]:
    """Return the labels of the policies of a replay, each once."""
    return list(dict.fromkeys(str(run.label) for run in replay.info.runs))


def runs_named(replay: Replay, policy: str) -> list[RunRecord]:
    """Return the runs that a label, a policy name or a run number selects.

    Raises
    ------
    UsageError
        If there is none, or the name is ambiguous.
    """
    runs = replay.info.runs
    for chosen in (
        [run for run in runs if run.label == policy],
        [run for run in runs if str(run.run) == policy],
        [run for run in runs if run.policy == policy],
    ):
        labels = list(dict.fromkeys(str(run.label) for run in chosen))
        if len(labels) > 1:
            raise UsageError(
                f"{policy} is ambiguous: several policies of {replay.path}",
                f"Name one by its label: {' or '.join(labels)}",
            )
        if chosen:
            return chosen
    raise UsageError(f"{replay.path} has no policy {policy!r}", nearest(policy, policies(replay)))


def _pairs(a: Sequence[RunRecord], b: Sequence[RunRecord]) -> list[tuple[RunRecord, RunRecord]]:
    single = len(a) == len(b) == 1  # two runs that were named by number, with any budgets
    pairs = [
        (one, other)
        for one in a
        for other in b
        if one.loop == other.loop
        and one.prefill == other.prefill
        and (single or one.budget == other.budget or None in (one.budget, other.budget))
    ]
    if not pairs:
        told = " and ".join(f"{side[0].label} at {_names(side)}" for side in (a, b))
        raise UsageError(f"no budget in common: {told}", "Replay both under the same budget and in the same loop.")
    return pairs


def _names(runs: Sequence[RunRecord]) -> str:
    return ", ".join(dict.fromkeys(f"{run.budget or NO_BUDGET} ({run.loop} loop)" for run in runs))


def _budget(one: RunRecord, other: RunRecord) -> str:
    budgets = [str(run.budget or NO_BUDGET) for run in (one, other)]
    return budgets[0] if budgets[0] == budgets[1] else f"{budgets[0]} and {budgets[1]}"


def _paired(
    of_a: Values, one: RunRecord, of_b: Values, other: RunRecord, name: str, near_copies: Sequence[int]
) -> Paired:
    """Return the comparison of two runs over the sequences in which both have a value."""
    a, b = of_a.get((one.run, name), {}), of_b.get((other.run, name), {})
    common = sorted(a.keys() & b.keys())
    clusters = [near_copies[sequence] for sequence in common] if near_copies else ()
    return paired([a[sequence] for sequence in common], [b[sequence] for sequence in common], clusters)


def _better(both: Paired, direction: str) -> str:
    if direction == "none" or not both.significant or both.difference is None:
        return ""
    return "B" if (both.difference > 0) == (direction == "higher") else "A"


def _cost_differences(budget: str, one: RunRecord, other: RunRecord, held: Paired) -> list[str]:
    """Return how two runs differ in cost: when they evict, and how many keys they hold."""
    found = []
    phases = one.phase, other.phase
    if phases[0] != phases[1]:
        found.append(f"A and B evict at different times: {phases[0]} and {phases[1]}")
    if held.mean_a and held.mean_b and abs(held.mean_b - held.mean_a) > SAME_COST * held.mean_a:
        found.append(f"{budget} is not the same for both: A holds {held.mean_a:.1f} keys, B {held.mean_b:.1f}")
    return found
