"""Every registered metric against its declaration and its plain-loop reference.

A metric that is added without a direction, a range, a unit or a reference fails here; so does one whose values leave
its range, whose value with nothing evicted is not the declared one, or which mixes heads, layers, runs or steps.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.engine.scoring import ALWAYS
from kvscope.metrics import METRICS, metric
from tests.engine.maps import KINDS, attention
from tests.metrics.make import OURS, Left, left, scored
from tests.reference import metrics as reference

NAMES = [item.name for item in OURS]
SIZE = 3  # D


def vectors(seed: int, layers: int, groups: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, groups, length, SIZE, generator=generator, dtype=torch.float64)


def everything(layers: int, groups: int, heads: int, length: int, budgets: list[int]) -> Left:
    past = torch.ones(length, length, dtype=torch.bool).tril().expand(len(budgets), layers, groups, -1, -1)
    return Left(past, past, budgets, heads, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_declares_itself(name: str) -> None:
    declared = METRICS.get(name)
    low, high = declared.range
    assert declared.direction in ("higher", "lower", "none")
    assert declared.unit
    assert declared.summary.endswith((".", ":")) and len(declared.summary) > 20
    assert low is None or high is None or low < high
    if declared.when_nothing_evicted is not None:
        assert (low is None or low <= declared.when_nothing_evicted) and (
            high is None or declared.when_nothing_evicted <= high
        )
    record = declared.declaration()
    assert (record.direction, record.range, record.unit) == (declared.direction, declared.range, declared.unit)


def test_every_metric_has_a_reference() -> None:
    assert {item.name for item in OURS if item.pooled} == set(reference.POOLED)
    assert {item.name for item in OURS if not item.pooled} == set(reference.PER_STEP)


def test_every_mass_stands_beside_one_without_sinks() -> None:
    masses = {name for name in NAMES if name.endswith("_mass")}
    assert {"retained_mass", "ideal_mass", "recovered_mass"} <= masses
    assert {f"{name}_no_sinks" for name in masses} <= set(NAMES)


def test_a_need_that_nobody_meets_is_refused() -> None:
    with pytest.raises(UsageError, match="needs logits"):
        metric("x", direction="none", range=(None, None), when_nothing_evicted=None, needs={"logits"})
    assert "x" not in METRICS.names()


@given(
    seed=st.integers(0, 10_000),
    kind=KINDS,
    length=st.integers(1, 12),
    prompt=st.integers(1, 12),
    keep=st.sampled_from([0.0, 0.4, 0.9]),
    block=st.integers(1, 12),
    zeros=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_values_equal_the_plain_loop(seed, kind, length, prompt, keep, block, zeros) -> None:
    prompt = min(prompt, length)
    rows, values = attention(seed, 1, 4, length, kind), vectors(seed, 1, 2, length)
    if zeros:
        rows, values = rows.clone(), values.clone()
        rows[0, :, length // 2] = 0.0
        values[0, 1] = 0.0
    simulation = left(seed, 2, 1, 2, 4, length, prompt, keep)
    got = scored(simulation, rows, values, block=block)
    for run, budget in enumerate(simulation.budgets):
        for head in range(4):
            cases = []
            for t in range(length):
                seen, kept = (
                    set(mask(t, t + 1)[run, 0, head // 2, 0].nonzero().flatten().tolist())
                    for mask in (simulation.visible, simulation.held)
                )
                full = [rows[0, head, s, : s + 1].tolist() for s in range(t + 1)]
                case = reference.Case(full, t, seen, kept, budget, prompt, values[0, head // 2].tolist())
                gone = len(seen) < t + 1
                cases += [case] if gone else []
                for name, function in reference.PER_STEP.items():
                    value = got[name][run, 0, head, t].item()
                    if gone or name in ALWAYS:
                        assert value == pytest.approx(function(case), rel=1e-6, abs=1e-6, nan_ok=True), (name, t)
                    else:
                        assert math.isnan(value), f"{name} has a value where nothing was evicted"
            for name, pooled in reference.POOLED.items():
                for case in cases:
                    assert got[name][run, 0, head, case.t].item() == pytest.approx(pooled(cases), abs=1e-6)


def test_late_keys_equal_the_plain_loop_over_long_rows() -> None:
    """The short rows above have no late mass; here attention fades with distance, and old keys rarely get any."""
    length = 150
    rows, values = attention(5, 1, 2, length), vectors(5, 1, 1, length)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    rows *= torch.exp(-distance / 5)
    rows += 0.2 * (torch.rand(rows.shape, generator=torch.Generator().manual_seed(5)) < 0.008) * (distance > 0)
    rows /= rows.sum(-1, keepdim=True)
    simulation = left(5, 1, 1, 1, 2, length, 20, 0.5)
    got = scored(simulation, rows, values, metrics=[METRICS.get("late_mass_retained")], block=33)["late_mass_retained"]
    between = 0
    for head in range(2):
        full = [rows[0, head, s, : s + 1].tolist() for s in range(length)]
        for t in range(0, length, 3):
            seen = set(simulation.visible(t, t + 1)[0, 0, 0, 0].nonzero().flatten().tolist())
            if len(seen) < t + 1:
                expected = reference.PER_STEP["late_mass_retained"](reference.Case(full, t, seen, set(), 1, 20, []))
                assert got[0, 0, head, t].item() == pytest.approx(expected, abs=1e-6, nan_ok=True)
                between += 0 < expected < 1
    assert between > 5


def test_late_begins_after_64_steps_and_counts_from_a_tenth_of_the_row() -> None:
    """Each key is attended to when it arrives and by the next query; then late queries ask for old keys again."""
    rows = torch.zeros(1, 1, 110, 110, dtype=torch.float64)
    for t in range(110):
        rows[0, 0, t, [t, max(t - 1, 0)]] = 0.5
    for t, row in {
        100: {100: 0.4, 34: 0.2, 35: 0.4},  # last attended to 65 and 64 steps before: only the first is late
        101: {101: 0.89, 20: 0.11},
        102: {102: 0.91, 21: 0.09},
    }.items():
        rows[0, 0, t] = 0.0
        rows[0, 0, t, list(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
    visible = torch.ones(1, 1, 1, 110, 110, dtype=torch.bool).tril()
    visible[..., 100:, 34] = False
    visible[..., 101:, 20] = False
    simulation = Left(visible, visible, [109], 1, 1)
    got = scored(simulation, rows, vectors(1, 1, 1, 110), metrics=[METRICS.get("late_mass_retained")])
    found = got["late_mass_retained"][0, 0, 0]
    assert found[100] == 0.0 and found[101] == 0.0
    assert torch.isnan(found[102]), "less than a tenth of the row"


def test_the_recovered_set_is_that_of_the_last_prompt_query_whatever_the_blocks() -> None:
    rows, values = attention(9, 2, 4, 30), vectors(9, 2, 2, 30)
    simulation = left(9, 2, 2, 2, 4, 30, 13, 0.5)
    names = [METRICS.get(name) for name in ("recovered_mass", "recovered_mass_no_sinks")]
    whole = scored(simulation, rows, values, metrics=names, first=13)
    for block in (1, 7, 13, 14):
        parts = scored(simulation, rows, values, metrics=names, first=13, block=block)
        for name, value in whole.items():
            assert torch.equal(parts[name].nan_to_num(-1), value.nan_to_num(-1))


@given(seed=st.integers(0, 10_000), kind=KINDS, length=st.integers(2, 20), keep=st.sampled_from([0.0, 0.3, 0.95]))
@settings(max_examples=60, deadline=None)
def test_values_lie_in_the_declared_range(seed, kind, length, keep) -> None:
    rows, values = attention(seed, 2, 4, length, kind).float(), vectors(seed, 2, 2, length).float()
    got = scored(left(seed, 2, 2, 2, 4, length, 2, keep), rows, values)
    for name, value in got.items():
        low, high = METRICS.get(name).range
        there = value[~torch.isnan(value)]
        assert not torch.isinf(there).any(), name
        assert low is None or (there >= low).all(), name
        assert high is None or (there <= high).all(), name


@given(seed=st.integers(0, 10_000), kind=KINDS, length=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_value_when_nothing_is_evicted(seed, kind, length) -> None:
    rows, values = attention(seed, 1, 4, length, kind), vectors(seed, 1, 2, length)
    simulation = everything(1, 2, 4, length, [length])
    for item in OURS:
        if item.when_nothing_evicted is None or item.pooled:
            continue
        got = raw(item.name, simulation, rows, values)
        got = got[~torch.isnan(got)]
        assert torch.allclose(got, torch.full_like(got, item.when_nothing_evicted), atol=1e-6), item.name


def raw(name: str, simulation: Left, rows: Tensor, values: Tensor) -> Tensor:
    """Return the values of a metric at all steps, also those before anything was evicted."""
    kept = []

    def keep(block):
        kept.append(METRICS.get(name).compute(block))
        return torch.zeros_like(kept[-1])

    from dataclasses import replace

    scored(simulation, rows, values, metrics=[replace(METRICS.get(name), compute=keep)])
    return torch.cat(kept, -1)


@given(seed=st.integers(0, 10_000), kind=KINDS)
@settings(max_examples=25, deadline=None)
def test_permuting_heads_permutes_the_values(seed, kind) -> None:
    length, groups, heads = 11, 3, 6
    rows, values = attention(seed, 2, heads, length, kind), vectors(seed, 2, groups, length)
    simulation = left(seed, 2, 2, groups, heads, length, 4, 0.5)
    straight = scored(simulation, rows, values)
    of_groups = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    within = torch.tensor([1, 0])
    of_heads = (of_groups[:, None] * 2 + within).flatten()
    moved = Left(simulation._visible[:, :, of_groups], simulation._held[:, :, of_groups], simulation.budgets, heads, 4)
    permuted = scored(moved, rows[:, of_heads], values[:, of_groups])
    for name, value in straight.items():
        torch.testing.assert_close(permuted[name], value[:, :, of_heads], equal_nan=True)


def test_runs_layers_and_blocks_do_not_touch_each_other() -> None:
    rows, values = attention(3, 2, 4, 25), vectors(3, 2, 2, 25)
    simulation = left(3, 3, 2, 2, 4, 25, 6, 0.6)
    whole = scored(simulation, rows, values)
    parts = scored(simulation, rows, values, block=4)
    for run in range(3):
        for layer in range(2):
            one = Left(
                simulation._visible[run : run + 1, layer : layer + 1],
                simulation._held[run : run + 1, layer : layer + 1],
                simulation.budgets[run : run + 1],
                4,
                6,
            )
            alone = scored(one, rows[layer : layer + 1], values[layer : layer + 1])
            for name, value in alone.items():
                torch.testing.assert_close(value[0, 0], whole[name][run, layer], equal_nan=True)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, equal_nan=True)


def test_rows_of_runs_of_their_own_are_scored_as_one_by_one() -> None:
    """In the closed loop every run has its own rows and values, with a leading axis."""
    rows = torch.stack([attention(seed, 1, 4, 15) for seed in (1, 2)])
    values = torch.stack([vectors(seed, 1, 2, 15) for seed in (1, 2)])
    simulation = left(8, 2, 1, 2, 4, 15, 5, 0.5)
    both = scored(simulation, rows, values, block=6)
    for run in range(2):
        one = Left(
            simulation._visible[run : run + 1], simulation._held[run : run + 1], simulation.budgets[run : run + 1], 4, 5
        )
        for name, value in scored(one, rows[run], values[run]).items():
            torch.testing.assert_close(value[0], both[name][run], equal_nan=True)


@given(seed=st.integers(0, 10_000), kind=KINDS)
@settings(max_examples=25, deadline=None)
def test_the_future_changes_nothing(seed, kind) -> None:
    """Cutting the sequence at a step changes no value before it; pooled metrics look at all steps, and do."""
    rows, values = attention(seed, 1, 4, 14, kind), vectors(seed, 1, 2, 14)
    simulation = left(seed, 1, 1, 2, 4, 14, 3, 0.5)
    whole = scored(simulation, rows, values)
    cut = Left(simulation._visible[..., :9, :9], simulation._held[..., :9, :9], simulation.budgets, 4, 3)
    for name, value in scored(cut, rows[..., :9, :9], values[..., :9, :]).items():
        if not METRICS.get(name).pooled:
            torch.testing.assert_close(value, whole[name][..., :9], equal_nan=True)


@given(seed=st.integers(0, 10_000), kind=KINDS)
@settings(max_examples=25, deadline=None)
def test_no_set_of_that_size_beats_the_ideal_one(seed, kind) -> None:
    length, budget = 12, 4
    rows, values = attention(seed, 1, 4, length, kind), vectors(seed, 1, 2, length)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(1, 1, 2, length, length, generator=generator).masked_fill(
        ~torch.ones(length, length, dtype=torch.bool).tril(-1), -1.0
    )
    top = order.argsort(-1, descending=True)[..., :budget]
    drawn = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, top, True) & (order >= 0)
    visible = drawn | torch.eye(length, dtype=torch.bool)
    got = scored(Left(visible, visible, [budget], 4, 1), rows, values)
    for suffix in ("", "_no_sinks"):
        best, own = got[f"ideal_mass{suffix}"], got[f"retained_mass{suffix}"]
        assert ((own <= best + 1e-6) | torch.isnan(own)).all()


def test_what_a_learned_sink_takes_is_not_lost() -> None:
    """A sink's share has no value: it shrinks the full and the live output, and seeing everything is no error."""
    rows, values = attention(2, 1, 4, 10) * 0.6, vectors(2, 1, 2, 10)
    missing = torch.full((1, 4, 10), 0.4, dtype=torch.float64)
    simulation = left(2, 1, 1, 2, 4, 10, 2, 0.5)
    got = scored(simulation, rows, values, missing=missing)["output_error"]
    t = 9
    for head in range(4):
        seen = simulation.visible(t, t + 1)[0, 0, head // 2, 0]
        row = rows[0, head, t]
        live = row * seen / ((row * seen).sum() + 0.4)
        full = row @ values[0, head // 2]
        assert got[0, 0, head, t].item() == pytest.approx((live @ values[0, head // 2] - full).norm() / full.norm())
