"""Perplexity and its kin from losses, and the gap between the loops from residency intervals."""

from dataclasses import replace

import numpy as np
import pytest

from kvscope.core.options import Prefill
from kvscope.core.records import ReplayRecord, SequenceRef
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.summary_records import MetricSummary, RunSummary, summary_of
from kvscope.results.loop_gap import LoopGapCounter
from kvscope.results.outcome import OUTCOMES, Outcomes
from tests.results.make import info


def losses(seed: int, count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    full = random.gamma(2, size=count)
    return {
        "nll_full": full,
        "nll_policy": full + random.gamma(1, size=count),
        "kl": random.gamma(1, size=count),
        "top1_equal": random.random(count) < 0.7,
    }


def test_outcomes_are_those_of_all_tokens_together() -> None:
    given, parts = Outcomes(), [losses(0, 30), losses(1, 70)]
    for sequence, values in enumerate(parts):
        given.add(4, sequence, values)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = given.of(4)
    assert set(found) == set(OUTCOMES)
    full, policy = np.exp(joined["nll_full"].mean()), np.exp(joined["nll_policy"].mean())
    expected = {
        "perplexity": policy,
        "perplexity_full": full,
        "perplexity_delta": policy - full,
        "perplexity_ratio": policy / full,
        "token_kl": joined["kl"].mean(),
        "top1_agreement": joined["top1_equal"].mean(),
    }
    assert {name: value.mean for name, value in found.items()} == pytest.approx(expected)
    assert {value.count for value in found.values()} == {100}
    assert {(value.low, value.high) for value in found.values()} == {(None, None)}
    assert given.of(3) == {}


def test_five_sequences_have_an_interval() -> None:
    given = Outcomes()
    for sequence in range(4):
        given.add(0, sequence, losses(sequence, 50))
    assert {value.low for value in given.of(0).values()} == {None}
    given.add(0, 4, losses(4, 50))
    for value in given.of(0).values():
        assert value.low < value.mean < value.high


def random_intervals(seed: int, heads: int, length: int) -> ResidencyIntervals:
    """Return residency intervals of which some keys come back."""
    random = np.random.default_rng(seed)
    rows = []
    for head in range(heads):
        for key in range(length):
            t = key
            while t < length and len(rows) < 10_000:
                leave = t + int(random.integers(0, 6))
                rows.append((head, key, t, leave if leave < length else -1))
                t = leave + int(random.integers(1, 9))
    head, key, enter, leave = np.array(rows).T
    return ResidencyIntervals.of(kv_head=head, key=key, enter=enter, leave=leave, heads=heads, length=length)


@pytest.mark.parametrize("seed", range(5))
def test_held_sets_are_those_of_the_definition(seed: int) -> None:
    heads, length = 2, 17
    intervals = random_intervals(seed, heads, length)
    expected = np.zeros((heads, length, length), bool)
    for head, key, enter, leave in zip(
        intervals.kv_head, intervals.key, intervals.enter, intervals.stored_leave, strict=True
    ):
        for t in range(length):
            expected[head, t, key] |= enter <= t and (leave < 0 or leave > t)
    assert (intervals.held(0, length) == expected).all()
    assert (intervals.held(4, 9) == expected[:, 4:9]).all()


def record(prefill: str, length: int) -> ReplayRecord:
    """Return the record of an open run, its closed run, and a run apart, over one sequence."""
    made = info([length], policies=("h2o", "h2o", "tova"))
    runs = tuple(replace(run, open_run={1: 0}.get(run.run)) for run in made.runs)
    sequences = (SequenceRef(5, length),)
    return replace(made, runs=runs, prefill=Prefill(prefill), trace=replace(made.trace, sequences=sequences))


def summaries(*masses: float | None) -> dict[int, RunSummary]:
    """Return runs of which only the retained mass is known."""
    runs = record("full", 19).runs
    figures = [{} if mass is None else {"retained_mass": MetricSummary(mass)} for mass in masses]
    return {number: summary_of(runs[number], metrics=own) for number, own in enumerate(figures)}


@pytest.mark.parametrize(("prefill", "first"), [("full", 4), ("stream", 0)])
def test_the_gap_is_the_mean_overlap(monkeypatch: pytest.MonkeyPatch, prefill: str, first: int) -> None:
    heads, length = 2, 19
    monkeypatch.setattr("kvscope.results.loop_gap.BLOCK", 3 * heads * length)  # several blocks
    gap = LoopGapCounter(record(prefill, length))
    layers = []
    for layer in (0, 1):
        pair = [random_intervals(10 * layer + side, heads, length) for side in (0, 1)]
        for run, intervals in enumerate(pair):
            gap.add(run, 0, layer, intervals)
        a, b = (intervals.held(first, length) for intervals in pair)
        layers.append(np.mean((a & b).sum(-1) / np.maximum((a | b).sum(-1), 1)))
    found = gap.of(1, summaries(0.5, 0.4))
    assert found is not None
    assert found.held_overlap_by_layer == pytest.approx({"0": layers[0], "1": layers[1]})
    assert found.held_overlap == pytest.approx(np.mean(layers))
    assert found.retained_mass == pytest.approx(-0.1)
    assert gap.of(0, {}) is None and gap.of(2, {}) is None


def test_equal_decisions_overlap_wholly() -> None:
    gap = LoopGapCounter(record("full", 19))
    for run in (0, 1):
        gap.add(run, 0, 0, random_intervals(3, 2, 19))
    found = gap.of(1, summaries(None, None))
    assert found is not None and found.held_overlap == 1 and found.retained_mass is None
