"""Test the claims of a paper on the cells of an experiment: which setting is better, on the same sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvscope.core.claim_records import Claim, Finding, Keys, Setting, SettingValue
from kvscope.core.experiment_records import CellRecord, CellRun
from kvscope.core.records import MetricRecord
from kvscope.results.answers import OF_ANSWERS
from kvscope.results.outcome import OUTCOMES, Outcomes
from kvscope.results.statistics import interval, paired

Sequenced = tuple[str, int]  # a trace, and a sequence of it
Values = dict[Sequenced, float]


class NoValueError(Exception):
    """A setting has no value; the message says why."""


@dataclass(frozen=True)
class _Run:
    """All that is known of one policy under one budget, over every trace."""

    cells: Sequence[tuple[CellRecord, CellRun]]

    def values(self, metric: str) -> Values:
        """Return the value of every sequence that has one."""
        found: Values = {}
        for cell, run in self.cells:
            of = _outcome(run, metric) if metric in OUTCOMES else dict(enumerate(run.values.get(metric, ())))
            found |= {(cell.trace, number): value for number, value in of.items() if value is not None}
        return found


def _outcome(run: CellRun, metric: str) -> dict[int, float]:
    """Return what the closed loop of a run costs in each sequence."""
    outcomes = Outcomes()
    for number in range(len(run.losses.get("tokens", ()))):
        sums = run.sums(number)
        if sums is not None:
            outcomes.add_sums(0, number, sums)
    return {number: values[metric] for number, values in outcomes.by_sequence(0).items()}


class Results:
    """The cells of an experiment over one model, by policy and budget.

    Parameters
    ----------
    cells : iterable of (CellRecord, CellRun)
        Every run of the experiment.
    """

    def __init__(self, cells: Iterable[tuple[CellRecord, CellRun]]) -> None:
        runs: dict[tuple[str, str | None], list[tuple[CellRecord, CellRun]]] = {}
        self._clusters: dict[Sequenced, tuple[str, int]] = {}
        self.metrics: dict[str, MetricRecord] = {**OUTCOMES, **OF_ANSWERS}
        for cell, run in cells:
            runs.setdefault((run.policy, run.budget), []).append((cell, run))
            self.metrics |= cell.metrics
            for number, sequence in enumerate(cell.sequences):
                self._clusters[cell.trace, number] = (cell.trace, sequence.cluster)
        self._runs = {key: _Run(found) for key, found in runs.items()}

    @property
    def settings(self) -> list[Setting]:
        """Every policy and budget, in order."""
        return [Setting(policy=policy, budget=budget) for policy, budget in self._runs]

    def numbers(self, sequences: Sequence[Sequenced]) -> list[int]:
        """Return the cluster of each sequence, as a number."""
        known = {cluster: number for number, cluster in enumerate(dict.fromkeys(self._clusters.values()))}
        return [known[self._clusters[sequence]] for sequence in sequences]

    def values(self, setting: Setting, metric: str) -> Values:
        """Return the value of every sequence under a setting.

        Raises
        ------
        NoValueError
            If there is no such run, or no sequence has a value.
        """
        run = self._runs.get((setting.policy, setting.budget))
        if run is None:
            raise NoValueError(f"there is no result of {named(setting)}")
        found = run.values(metric)
        if not found:
            raise NoValueError(f"{named(setting)} has no {metric}")
        return found

    def matched(self, policy: str, metric: str, keys: Keys, counts: Values) -> Values:
        """Return what a policy would have with as many keys as `counts`, in each sequence.

        Between the two nearest budgets the metric is taken to be linear in the number of keys. A sequence in which no
        budget gives as many keys, or as few, has no value.

        Raises
        ------
        NoValueError
            If no sequence has a value.
        """
        budgets = [budget for name, budget in self._runs if name == policy and budget is not None]
        curves = [(self._runs[policy, each].values(keys), self._runs[policy, each].values(metric)) for each in budgets]
        found: Values = {}
        for sequence, count in counts.items():
            points = sorted((x[sequence], y[sequence]) for x, y in curves if sequence in x and sequence in y)
            if points and points[0][0] <= count <= points[-1][0]:
                at, of = zip(*points, strict=True)
                found[sequence] = float(np.interp(count, at, of))
        if not found:
            what = keys.replace("_", " ")
            raise NoValueError(f"the budgets of {policy} enclose the {what} of no sequence with a {metric}")
        return found


def named(setting: Setting) -> str:
    """Return what messages call a setting: ``h2o at 20%``."""
    return setting.policy if setting.budget is None else f"{setting.policy} at {setting.budget}"


def evaluate(
    claims: Sequence[Claim], results: Mapping[str, Results], missing: Mapping[str, str]
) -> tuple[Finding, ...]:
    """Return what was found of each claim.

    A claim *agrees* if the better setting is better on the same sequences, by a sign test and by the 95 % interval of
    the mean difference, in both of which near-copies count as one; it *differs* if the other one is better by both.
    Else it is *not certain*, or *missing* if there is no value. Means are over sequences.

    Parameters
    ----------
    claims : sequence of Claim
        The claims, with policies and budgets as in the results.
    results : mapping of str to Results
        The results of each experiment.
    missing : mapping of str to str
        Experiments that were not run, and why.
    """
    return tuple(_finding(claim, results.get(claim.part), missing.get(claim.part, "")) for claim in claims)


def _finding(claim: Claim, results: Results | None, why: str) -> Finding:
    if results is None:
        return Finding(claim=claim, agreement="missing", why=why)
    try:
        better = results.values(claim.better, claim.metric)
        worse = _worse(claim, results)
        both = sorted(better.keys() & worse.keys())
        if not both:
            raise NoValueError("the two settings share no sequence")
    except NoValueError as error:
        return Finding(claim=claim, agreement="missing", why=str(error))
    found = paired([worse[one] for one in both], [better[one] for one in both], results.numbers(both))
    assert found.difference is not None, "at least one sequence"
    gain = -found.difference if results.metrics[claim.metric].direction == "lower" else found.difference
    left = len(better) - len(both)
    return Finding(
        claim=claim,
        agreement="not certain" if not found.significant else "agrees" if gain > 0 else "differs",
        why=f"{left} of {len(better)} sequences have no value of {claim.worse.policy}" if left else "",
        better=found.mean_b,
        worse=found.mean_a,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        sequences=found.sequences,
        clusters=found.clusters,
    )


def _worse(claim: Claim, results: Results) -> Values:
    if claim.equal is None:
        return results.values(claim.worse, claim.metric)
    counts = results.values(claim.better, claim.equal)
    return results.matched(claim.worse.policy, claim.metric, claim.equal, counts)


def all_values(claims: Sequence[Claim], results: Mapping[str, Results]) -> Iterator[SettingValue]:
    """Yield the value of every setting of each experiment by each metric of its claims, where there is one."""
    for part, metric in dict.fromkeys((claim.part, claim.metric) for claim in claims):
        for setting in results[part].settings if part in results else ():
            try:
                found = results[part].values(setting, metric)
            except NoValueError:
                continue  # as the answers of a bound, which runs in the open loop alone
            means = np.array(list(found.values()))
            low, high = interval(means, clusters=results[part].numbers(list(found)))
            yield SettingValue(
                part=part,
                metric=metric,
                setting=setting,
                mean=float(means.mean()),
                low=low,
                high=high,
                sequences=len(found),
            )
