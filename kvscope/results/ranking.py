"""Which runs may be ranked among each other, and which of them is the best by each metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvscope.core.records import MetricRecord, RunRecord
from kvscope.core.summary_records import RunSummary

Named = TypeVar("Named")

# Kind -> what it means. Runs of one kind have the same kind of cost, so only these are ranked among each other.
KINDS = {
    "every step": "evicts at every step, so that the cache never exceeds its budget",
    "prompt only": "compresses the prompt once and retains all later tokens, so that the cache grows",
    "every N steps": "evicts every few steps; between these the cache grows",
    "reads a part": "holds every key and reads some of them: saves reading, not memory",
    "own size": "decides by itself how many keys to retain",
    "no eviction": "retains everything",
    "bound": "uses the future, which no policy can: a limit on what any policy can reach",
}
# The metrics that name a best policy, the most telling first.
HEADLINES = ("answer_score", "perplexity_ratio", "output_error", "late_mass_retained", "retained_mass")
DIGITS = 4  # means that are equal in so many decimals are equal


@dataclass(frozen=True)
class Best:
    """The best policies of one kind at one budget.

    Attributes
    ----------
    budget, kind, loop, prefill : str
        What the runs have in common.
    count : int
        Number of runs.
    winners : mapping of str to tuple
        For each metric of `HEADLINES` that they have: its best mean and the labels that have it.
    """

    budget: str
    kind: str
    loop: str
    prefill: str
    count: int
    winners: Mapping[str, tuple[float, tuple[str, ...]]]

    @property
    def agree(self) -> bool:
        """Whether one policy is among the best by every metric."""
        return agree(labels for _, labels in self.winners.values())


def kind_of(run: RunRecord) -> str:
    """Return which of `KINDS` a run is."""
    if run.clairvoyant:
        return "bound"
    if run.reads:
        return "reads a part"
    if run.phase == "none":
        return "no eviction"
    if not run.bounded:
        return "own size"
    return {"step": "every step", "prefill": "prompt only"}.get(run.phase, "every N steps")


def ends(values: Sequence[float], direction: str) -> tuple[float, float] | None:
    """Return the best and the worst of some values; None if no direction is better, or all are equal."""
    if direction == "none" or len(set(values)) < 2:
        return None
    low, high = min(values), max(values)
    return (high, low) if direction == "higher" else (low, high)


def best_among(means: Sequence[tuple[float, Named]], direction: str) -> tuple[float, tuple[Named, ...]] | None:
    """Return the best mean, rounded to `DIGITS`, and who has it; None if no direction is better, or all are equal."""
    rounded = [(round(mean, DIGITS), name) for mean, name in means]
    found = ends([mean for mean, _ in rounded], direction)
    return None if found is None else (found[0], tuple(name for mean, name in rounded if mean == found[0]))


def agree(winners: Iterable[Iterable[Named]]) -> bool:
    """Return whether one policy is among the best by every metric; the winners of each metric are given."""
    sets = [set(names) for names in winners]
    return not sets or bool(set.intersection(*sets))


def best_of(runs: Sequence[RunSummary], declared: Mapping[str, MetricRecord]) -> list[Best]:
    """Return the best policies of each kind at each budget, in the order of budgets and kinds; bounds are no policies.

    Kinds with a single run have no best. Where a closed loop was run, its runs are ranked and those of the open loop
    are not.
    """
    closed = any(run.loop == "closed" for run in runs)
    groups: dict[tuple[str, str, str, str], list[RunSummary]] = defaultdict(list)
    for run in runs:
        if run.budget is not None and not run.clairvoyant and (run.loop == "closed") == closed:
            groups[run.budget, kind_of(run), str(run.loop), str(run.prefill)].append(run)
    order = {budget: place for place, budget in enumerate(dict.fromkeys(run.budget for run in runs))}
    kinds = list(KINDS)
    found = [
        Best(*common, len(group), winners)
        for common, group in groups.items()
        if len(group) > 1 and (winners := _winners(group, declared))
    ]
    return sorted(found, key=lambda best: (order[best.budget], kinds.index(best.kind), best.prefill))


def _winners(
    group: Sequence[RunSummary], declared: Mapping[str, MetricRecord]
) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Return for each metric that distinguishes the runs its best mean, and the labels of those that have it."""
    winners = {}
    for name in HEADLINES:
        means = [(mean, run.label) for run in group if (mean := run.mean(name)) is not None]
        found = best_among(means, declared[name].direction) if means else None
        if found is not None:
            winners[name] = found
    return winners
