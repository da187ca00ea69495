"""Pooling cells: every sequence counts once, clusters are drawn whole, and who is the best is said with its doubt."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.core.experiment_records import CellRecord, CellRun, CellSequence
from kvscope.core.options import Prefill
from kvscope.core.records import MetricRecord
from kvscope.results.experiment import held_more, pool, sentences
from kvscope.results.statistics import interval, paired

METRICS = {"retained_mass": MetricRecord("higher", (0, 1))}


def cell(
    trace: str,
    values: dict[tuple[str, str], dict[str, list[float | None]]],
    *,
    task: str = "t",
    length: int | None = 64,
    clusters: list[int] | None = None,
    losses: dict[str, list[float]] | None = None,
) -> CellRecord:
    """Return a cell; `values` are those of every policy and budget, by metric; `losses` the mean loss of a policy."""
    count = len(next(iter(next(iter(values.values())).values())))
    runs = []
    for number, ((policy, budget), own) in enumerate(values.items()):
        nll = (losses or {}).get(policy)
        sums = {} if nll is None else {"nll_policy": tuple(10.0 * one for one in nll)}
        rest = {} if nll is None else dict.fromkeys(("nll_full", "kl", "top1_equal", "tokens"), (10.0,) * count)
        runs.append(
            CellRun(
                key="0" * 64,
                policy=policy,
                name=policy,
                params={},
                budget=budget,
                clairvoyant=policy == "belady",
                reads=policy == "quest",
                open_run=number,
                closed_run=None,
                values={name: tuple(of) for name, of in own.items()},
                losses={**sums, **rest},
            )
        )
    sequences = tuple(CellSequence(task, length, (clusters or list(range(count)))[n]) for n in range(count))
    return CellRecord(
        replay=f"{trace}-r",
        trace=trace,
        model="m",
        prefill=Prefill.full,
        steps=("replay",),
        sequences=sequences,
        metrics=METRICS,
        runs=tuple(runs),
        tokens=100,
        seconds=1.0,
    )


def runs_of(*cells: CellRecord) -> list[tuple[CellRecord, CellRun]]:
    return [(one, run) for one in cells for run in one.runs]


def mass(values: list[float | None]) -> dict[str, list[float | None]]:
    return {"retained_mass": values}


def test_every_sequence_counts_once_whatever_its_cell() -> None:
    few, many = cell("a", {("x", "8"): mass([0.0])}), cell("b", {("x", "8"): mass([0.5, 1.0, 1.0])}, task="u")
    found = pool(runs_of(few, many))
    assert [(run.task, run.sequences, run.mean("retained_mass")) for run in found.runs] == [
        ("t", 1, 0.0),
        ("u", 3, pytest.approx(2.5 / 3)),
        (None, 4, pytest.approx(2.5 / 4)),
    ]


def test_one_task_alone_is_not_repeated_as_all() -> None:
    (only,) = pool(runs_of(cell("a", {("x", "8"): mass([0.5])}))).runs
    assert (only.task, only.length) == (None, None)


def test_a_sequence_without_a_value_is_not_zero() -> None:
    (only,) = pool(runs_of(cell("a", {("x", "8"): mass([0.5, None, 0.7])}))).runs
    assert only.metrics["retained_mass"].mean == pytest.approx(0.6) and only.metrics["retained_mass"].count == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=12))
def test_intervals_draw_clusters_of_each_trace(found: list[tuple[int, float]]) -> None:
    """Cluster 0 of one trace is another one than cluster 0 of the next."""
    clusters, values = [number for number, _ in found], [value for _, value in found]
    one = cell("a", {("x", "8"): mass(values)}, clusters=clusters)
    two = cell("b", {("x", "8"): mass(values)}, clusters=clusters)
    (run,) = pool(runs_of(one, two)).runs
    numbers = {number: place for place, number in enumerate(dict.fromkeys(clusters))}  # as they first come
    own = [numbers[number] for number in clusters]
    low, high = interval(np.array(values * 2), clusters=[*own, *(number + len(numbers) for number in own)])
    figure = run.metrics["retained_mass"]
    assert (figure.low, figure.high) == (low, high)
    assert run.clusters == 2 * len(set(clusters)) and run.sequences == 2 * len(values)


def test_perplexity_is_that_of_all_tokens() -> None:
    given_ = cell("a", {("x", "8"): mass([0.5, 0.5])}, losses={"x": [1.0, 3.0]})
    (run,) = pool(runs_of(given_)).runs
    assert run.mean("perplexity") == pytest.approx(np.exp(2.0))
    assert run.mean("perplexity_ratio") == pytest.approx(np.exp(2.0 - 1.0))
    assert run.metrics["perplexity"].count == 20


MANY = [0.1 * n for n in range(8)]


def test_the_best_is_compared_with_the_next_on_the_same_sequences() -> None:
    better, worse = [one + 0.1 for one in MANY], [one - 0.05 for one in MANY]
    found = pool(runs_of(cell("a", {("x", "8"): mass(MANY), ("y", "8"): mass(better), ("z", "8"): mass(worse)})))
    (verdict,) = found.verdicts
    expected = paired(MANY, better)
    assert (verdict.best, verdict.second, verdict.metric) == (("y",), "x", "retained_mass")
    assert (verdict.p, verdict.low, verdict.high) == (expected.p, expected.low, expected.high)
    assert verdict.difference == pytest.approx(0.1)
    assert sentences(found.verdicts) == [f"Best at 8: y by retained mass (p = {expected.p:.2g})."]


def test_lower_is_better_for_losses_and_disagreement_is_said() -> None:
    own = {("x", "8"): mass(MANY), ("y", "8"): mass([one - 0.01 for one in MANY])}
    found = pool(runs_of(cell("a", own, losses={"x": [2.0] * 8, "y": [1.0] * 8})))
    assert {verdict.metric: verdict.best for verdict in found.verdicts} == {
        "perplexity_ratio": ("y",),
        "retained_mass": ("x",),
    }
    (line,) = sentences(found.verdicts)
    assert "y by perplexity" in line and "x by retained mass" in line and line.endswith("; they disagree.")
    agreeing = pool(runs_of(cell("a", own, losses={"x": [1.0] * 8, "y": [2.0] * 8})))
    assert sentences(agreeing.verdicts)[0].endswith("; they agree.")


def test_a_small_difference_is_called_uncertain() -> None:
    noisy = [one + sign * 0.1 for one, sign in zip(MANY, (1, -1) * 4, strict=True)]
    found = pool(runs_of(cell("a", {("x", "8"): mass(MANY), ("y", "8"): mass([*noisy[:-1], 1.0])})))
    assert sentences(found.verdicts) == ["Best at 8: y by retained mass (not certain: x may be as good)."]
    few = pool(runs_of(cell("a", {("x", "8"): mass([0.1]), ("y", "8"): mass([0.2])})))
    assert sentences(few.verdicts) == ["Best at 8: y by retained mass (too few sequences to tell it from x)."]


def test_answers_name_the_best_only_if_one_is_right() -> None:
    own = {("x", "8"): {"answer_score": [0.0] * 8}, ("y", "8"): {"answer_score": [0.0] * 8}}
    assert sentences(pool(runs_of(cell("a", own))).verdicts) == ["Best at 8: none by answers (every answer is wrong)."]
    own["y", "8"] = {"answer_score": [1.0] * 8}
    assert "y by answers (p = 0.0078)" in sentences(pool(runs_of(cell("a", own))).verdicts)[0]


def test_equal_policies_are_both_the_best_and_bounds_and_readers_never() -> None:
    own = {(name, "8"): mass(MANY) for name in ("x", "y")}
    own |= {(name, "8"): mass([1.0] * 8) for name in ("belady", "quest")} | {("full", None): mass([1.0] * 8)}  # type: ignore[dict-item]
    (verdict,) = pool(runs_of(cell("a", own))).verdicts
    assert verdict.best == ("x", "y") and verdict.second is None


def test_the_order_of_cells_makes_no_difference_to_a_figure() -> None:
    cells = [cell(name, {("x", "8"): mass(MANY)}, task=name) for name in "abc"]
    forward, backward = pool(runs_of(*cells)), pool(runs_of(*reversed(cells)))
    figures = lambda found: {run.task: run.mean("retained_mass") for run in found.runs}  # noqa: E731
    assert figures(forward) == pytest.approx(figures(backward))


def test_a_record_with_too_few_values_is_refused() -> None:
    good = cell("a", {("x", "8"): mass([0.5])})
    with pytest.raises(ValueError, match="has 2 values for 1 sequences"):
        replace(good, runs=(replace(good.runs[0], values={"retained_mass": (0.1, 0.2)}),))


def test_policies_that_hold_more_at_the_same_budget_are_named() -> None:
    def held(keys: float) -> dict[str, list[float | None]]:
        return {"held_keys": [keys, keys + 2]}

    own = {("x", "8"): held(9), ("y", "8"): held(9.2), ("snapkv", "8"): held(14), ("snapkv", "16"): held(20)}
    own |= {("x", "16"): held(19), ("quest", "8"): held(40)}
    found = pool(runs_of(cell("a", own), cell("b", own, task="u")))
    assert held_more(found.runs) == [
        "snapkv holds up to 50% more keys than others at the same budget: compare by held keys."
    ]
