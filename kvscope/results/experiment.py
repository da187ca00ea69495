"""From the cells of an experiment to its summary: figures pooled over sequences, and the best policy at each budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvscope.core.experiment_records import CellRecord, CellRun, PooledRun, Verdict
from kvscope.core.records import MetricRecord
from kvscope.core.summary_records import MetricSummary
from kvscope.results.answers import OF_ANSWERS
from kvscope.results.outcome import OUTCOMES, Outcomes
from kvscope.results.statistics import interval, is_significant, paired

# Metrics by which the best policy is named, and what a sentence calls them. Of the first two the first that is known.
BY_ANSWERS = ("answer_score", "answer_first")
BY_LOSS = "perplexity_ratio"
BY_MASS = "retained_mass"
HELD = "held_keys"
MORE = 0.05  # share of keys by which a policy may exceed another one without a word
CALLED = {
    "answer_score": "answers",
    "answer_first": "answers as first choices",
    BY_LOSS: "perplexity",
    BY_MASS: "retained mass",
}
Who = tuple[str, str, str, str | None]  # model, prefill, policy, budget
What = tuple[str | None, int | None]  # task, length; both None for all


@dataclass
class _Pool:
    """The sequences of one row of the summary.

    Attributes
    ----------
    run : CellRun
        One of the pooled runs, for what all have in common.
    clusters : list of tuple
        Trace and cluster of every sequence.
    values : dict of str to dict
        Of each metric, the value of every sequence that has one, by number in the pool.
    sums : dict of int to list of float
        Losses and number of tokens of every sequence with a closed run, as `CellRun.sums` has them.
    """

    run: CellRun
    clusters: list[tuple[str, int]] = field(default_factory=list)
    values: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    sums: dict[int, list[float]] = field(default_factory=dict)

    def add(self, cell: CellRecord, run: CellRun, sequence: int) -> None:
        number = len(self.clusters)
        self.clusters.append((cell.trace, cell.sequences[sequence].cluster))
        for name, values in run.values.items():
            value = values[sequence]
            if value is not None:
                self.values[name][number] = value
        sums = run.sums(sequence)
        if sums is not None:
            self.sums[number] = sums

    @property
    def numbers(self) -> list[int]:
        """The cluster of every sequence, as a number."""
        known = {cluster: number for number, cluster in enumerate(dict.fromkeys(self.clusters))}
        return [known[cluster] for cluster in self.clusters]

    def metrics(self) -> dict[str, MetricSummary]:
        """Return every figure with its interval over clusters; the count is that of sequences, of losses of tokens."""
        numbers = self.numbers
        found = {}
        for name, values in self.values.items():
            means = np.array(list(values.values()))
            clusters = [numbers[sequence] for sequence in values]
            found[name] = MetricSummary(float(means.mean()), *interval(means, clusters=clusters), len(means))
        return found | self._outcomes(numbers).of(0)

    def by_sequence(self, metric: str) -> dict[int, float]:
        """Return the value of every sequence that has one."""
        if metric not in OUTCOMES:
            return self.values.get(metric, {})
        return {number: values[metric] for number, values in self._outcomes(()).by_sequence(0).items()}

    def _outcomes(self, clusters: Sequence[int]) -> Outcomes:
        outcomes = Outcomes(clusters)
        for number, sums in self.sums.items():
            outcomes.add_sums(0, number, sums)
        return outcomes


@dataclass(frozen=True)
class Pooled:
    """What `pool` returns: rows of the summary, the best policies, and the declarations of all metrics."""

    runs: tuple[PooledRun, ...]
    verdicts: tuple[Verdict, ...]
    metrics: Mapping[str, MetricRecord]


def pool(cells: Iterable[tuple[CellRecord, CellRun]]) -> Pooled:
    """Return the figures of runs of an experiment over all sequences with the same task and length, and over all.

    A mean is over sequences, each of which counts the same; perplexity is exp of the mean loss of all tokens. Intervals
    draw clusters of near-copies, which are found within each trace. Rows are in the order of the runs; those of all
    tasks together come last, unless there is only one.
    """
    parts: dict[tuple[Who, What], _Pool] = {}
    whole: dict[Who, _Pool] = {}
    metrics: dict[str, MetricRecord] = {}
    for cell, run in cells:
        metrics |= cell.metrics
        who: Who = (cell.model, cell.prefill, run.policy, run.budget)
        for number, sequence in enumerate(cell.sequences):
            parts.setdefault((who, (sequence.task, sequence.length)), _Pool(run)).add(cell, run, number)
            whole.setdefault(who, _Pool(run)).add(cell, run, number)
    several = len({what for _, what in parts}) > 1
    rows = [_row(who, what, own) for (who, what), own in parts.items()] if several else []
    rows += [_row(who, (None, None), own) for who, own in whole.items()]
    order = {metric: place for place, metric in enumerate((*metrics, *OUTCOMES, *OF_ANSWERS))}
    known = {name for row in rows for name in row.metrics}
    declared = {**OUTCOMES, **OF_ANSWERS, **metrics}
    listed = sorted(known & declared.keys(), key=order.__getitem__)
    return Pooled(tuple(rows), tuple(_verdicts(whole, declared)), {name: declared[name] for name in listed})


def _row(who: Who, what: What, own: _Pool) -> PooledRun:
    model, prefill, policy, budget = who
    task, length = what
    return PooledRun(
        model=model,
        prefill=prefill,  # type: ignore[arg-type]  # as the record of its cell has it
        task=task,
        length=length,
        policy=policy,
        budget=budget,
        clairvoyant=own.run.clairvoyant,
        reads=own.run.reads,
        sequences=len(own.clusters),
        clusters=len(set(own.clusters)),
        metrics=own.metrics(),
    )


def _verdicts(whole: Mapping[Who, _Pool], declared: Mapping[str, MetricRecord]) -> Iterator[Verdict]:
    """Yield the best policy at each budget by each of the main metrics that are known.

    Bounds are not ranked, because no policy can be one; nor are sparse readers, which hold every key at any budget.
    """
    fields: dict[tuple[str, str, str], dict[str, _Pool]] = defaultdict(dict)
    for (model, prefill, policy, budget), own in whole.items():
        if budget is not None and not own.run.clairvoyant and not own.run.reads:
            fields[model, prefill, budget][policy] = own
    for place, policies in fields.items():
        answers = [name for name in BY_ANSWERS if any(name in own.values for own in policies.values())]
        for metric in (*answers[:1], BY_LOSS, BY_MASS):
            found = _best(place, metric, policies, declared)
            if found is not None:
                yield found


def _best(
    place: tuple[str, str, str], metric: str, policies: Mapping[str, _Pool], declared: Mapping[str, MetricRecord]
) -> Verdict | None:
    """Return the best policy by a metric, and how it differs from the next on the sequences that both have."""
    values = {policy: own.by_sequence(metric) for policy, own in policies.items()}
    means = {policy: own.metrics()[metric].mean for policy, own in policies.items() if values[policy]}
    ranked = {policy: mean for policy, mean in means.items() if mean is not None}
    if not ranked:
        return None
    lower = declared[metric].direction == "lower"
    order = sorted(ranked, key=lambda policy: ranked[policy] if lower else -ranked[policy])
    best = [policy for policy in order if ranked[policy] == ranked[order[0]]]
    model, prefill, budget = place
    common = {"model": model, "prefill": prefill, "budget": budget, "metric": metric}
    rest = [policy for policy in order if policy not in best]
    if not rest:
        return Verdict(best=tuple(best), value=ranked[best[0]], **common)  # type: ignore[arg-type]
    a, b = values[rest[0]], values[best[0]]
    both = sorted(a.keys() & b.keys())
    numbers = policies[best[0]].numbers
    difference = paired([a[n] for n in both], [b[n] for n in both], [numbers[n] for n in both])
    return Verdict(
        best=tuple(best),
        value=ranked[best[0]],
        second=rest[0],
        difference=difference.difference,
        low=difference.low,
        high=difference.high,
        p=difference.p,
        **common,  # type: ignore[arg-type]
    )


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """Return in sentences which policy is the best at each budget, and where metrics disagree."""
    groups: dict[tuple[str, str, str], list[Verdict]] = defaultdict(list)
    for each in verdicts:
        groups[each.model, each.prefill, each.budget].append(each)
    several = len({(model, prefill) for model, prefill, _ in groups}) > 1
    lines = []
    for (model, prefill, budget), found in groups.items():
        where = f"{model}, {prefill} prefill, {budget}" if several else budget
        useless = [each for each in found if each.metric in BY_ANSWERS and each.value == 0]
        named = [f"none by {CALLED[each.metric]} (every answer is wrong)" for each in useless]
        found = [each for each in found if each not in useless]
        named += [f"{' and '.join(each.best)} by {CALLED[each.metric]}{_certainty(each)}" for each in found]
        agree = set.intersection(*(set(each.best) for each in found)) if found else set()
        end = "" if len(found) < 2 else "; they agree" if agree else "; they disagree"
        lines.append(f"Best at {where}: {', '.join(named)}{end}.")
    return lines


def held_more(runs: Sequence[PooledRun]) -> list[str]:
    """Return a sentence for each policy that holds more keys than another one at the same budget, 5 % or more."""
    held: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for run in runs:
        keys = run.mean(HELD)
        if run.task is None and run.length is None and run.budget is not None and not run.reads and keys is not None:
            held[run.model, run.prefill, run.budget][run.policy] = keys
    most: dict[str, float] = {}
    for of in held.values():
        for policy, keys in of.items():
            most[policy] = max(most.get(policy, 1.0), keys / min(of.values()))
    return [
        f"{policy} holds up to {ratio - 1:.0%} more keys than others at the same budget: compare by held keys."
        for policy, ratio in most.items()
        if ratio >= 1 + MORE
    ]


def _certainty(verdict: Verdict) -> str:
    """Return whether the best differs from the next by more than chance, in parentheses."""
    if verdict.second is None:
        return ""
    if verdict.low is None or verdict.high is None or verdict.p is None:
        return f" (too few sequences to tell it from {verdict.second})"
    clear = is_significant(verdict.p, verdict.low, verdict.high)
    return f" (p = {verdict.p:.2g})" if clear else f" (not certain: {verdict.second} may be as good)"
