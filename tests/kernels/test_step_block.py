"""The kernel compared with the torch stepper: the same keys are evicted at the same steps, in any precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvscope.engine.simulation as engine
from kvscope.core.errors import ReplayError
from kvscope.engine.numba_stepper import NumbaStepper
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block, Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.kernels import OFF, available
from kvscope.policies.a2sf import A2SF
from kvscope.policies.base import Policy, Step, recurrence_of
from kvscope.policies.spec import parse_policies
from tests.engine.maps import KINDS, attention, signals

SPECS = [
    "h2o",
    "h2o:group=max,reduce=rows",
    "h2o:recent=0",
    "a2sf",
    "a2sf:alpha=0.93,group=sum,recent=2",
    "a2sf:sinks=2,alpha=0",
    "tova",
    "tova:sinks=1",
    "tova:scope=kv_head,group=max",
    "window",
    "streaming-llm:sinks=2",
    "key-norm",
    "random:seed=3",
    "vatp",
    "vatp:base=a2sf,norm=l2",
    "vatp:base=a2sf,norm=none",
]


def both(
    monkeypatch: pytest.MonkeyPatch, plan: EvictionPlan, rows: Tensor, blocks: list[int], windows: Any = (), **how: Any
) -> list[CacheSimulation]:
    """Return two simulations of a plan stepped block by block: with the kernel and with torch."""
    layers, heads, length = rows.shape[-4:-1]
    kv_heads, prompt, prefill = how["kv_heads"], how["prompt"], how["prefill"]
    shape = Shape(tuple(range(layers)), heads, kv_heads, prompt, length, windows=windows)
    known = {name: value.to(rows.dtype) for name, value in signals(plan, layers, heads, kv_heads, length).items()}
    missing = how.get("missing")
    simulations = []
    for compiled in (True, False):
        monkeypatch.setattr(engine, "available", lambda compiled=compiled: compiled)
        simulation = CacheSimulation(
            plan, how["budgets"], shape, prefill, known, missing_mass=missing, dtype=rows.dtype
        )
        assert isinstance(simulation.stepper, NumbaStepper) == compiled
        for start, stop in zip([0, *blocks], [*blocks, length], strict=True):
            lost = None if missing is None else missing[..., start:stop]
            simulation.block(Block(rows[..., start:stop, :stop], start, lost))
        simulation.check()
        simulations.append(simulation)
    return simulations


def same(simulations: list[CacheSimulation]) -> None:
    one, other = (simulation.state for simulation in simulations)
    for name in ("alive", "leave", "n_alive", "evictions"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.allclose(one.score[one.alive], other.score[one.alive], rtol=1e-5, atol=0)


def test_numba_is_installed() -> None:
    assert available(), "the tests compare kernels, so they need numba"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("prefill", ["full", "stream"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), KINDS, st.integers(1, 30), st.sampled_from([1, 2, 4]), st.booleans(), st.data())
def test_the_same_keys_are_evicted(
    spec: str, prefill: str, seed: int, kind: str, length: int, kv_heads: int, exact: bool, data: Any
) -> None:
    rows = attention(seed, 2, 4, length, kind).to(torch.float64 if exact else torch.float32)
    blocks = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
    prompt = data.draw(st.integers(1, length))
    budgets = data.draw(st.lists(st.integers(4, length + 5), min_size=1, max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        same(
            both(
                patch,
                EvictionPlan.published(parse_policies([spec])[0]),
                rows,
                blocks,
                kv_heads=kv_heads,
                prompt=prompt,
                prefill=prefill,
                budgets=budgets,
            )
        )


@pytest.mark.parametrize("seed", [30, 106, 143, 164])  # each fails where a total is added in any order
def test_ties_of_rows_in_double(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Totals that differ in the last digit, by the order of additions, would order keys of equal weight."""
    rows = attention(seed, 2, 4, 29, "ties")
    plan = EvictionPlan.published(parse_policies(["tova:scope=kv_head,group=max"])[0])
    same(both(monkeypatch, plan, rows, [], kv_heads=2, prompt=1, prefill="stream", budgets=[4]))


@pytest.mark.parametrize("spec", SPECS)
def test_windows_sinks_and_rows_that_differ_between_runs(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.stack([attention(seed, 2, 4, 40, "half").float() for seed in (1, 2)])  # [R, L, H, T, T]
    rows[:, 1] = rows[:, 1].triu(-8)  # the second layer sees nine keys
    missing = torch.rand(2, 2, 4, 40, generator=torch.Generator().manual_seed(3))
    plan = EvictionPlan.published(parse_policies([spec])[0])
    for prefill in ("full", "stream"):
        how = {"kv_heads": 2, "prompt": 20, "prefill": prefill, "budgets": [6, 11], "missing": missing}
        same(both(monkeypatch, plan, rows, [13, 29], (None, 9), **how))


@pytest.mark.parametrize("compress", ["prefill", "every:3"])
def test_phases(compress: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EvictionPlan.make(parse_policies(["h2o"])[0], compress=compress)
    rows = attention(5, 2, 4, 40).float()
    same(both(monkeypatch, plan, rows, [25], kv_heads=2, prompt=22, prefill="full", budgets=[8, 16]))


def test_uneven_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EvictionPlan.make(parse_policies(["a2sf"])[0], allocate="pyramid")
    rows = attention(5, 3, 4, 60).float()
    simulations = both(monkeypatch, plan, rows, [31], kv_heads=2, prompt=40, prefill="full", budgets=[16])
    assert len(simulations[0].state.budget.unique()) > 1
    same(simulations)


@pytest.mark.parametrize("compiled", [True, False])
def test_nan_weights_are_found(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = attention(1, 1, 2, 12).float()
    rows[0, 1, 7, 7] = torch.nan
    monkeypatch.setattr(engine, "available", lambda: compiled)
    simulation = CacheSimulation(parse_policies(["h2o"])[0], [4], Shape((0,), 2, 1, 1, 12), "stream")
    assert isinstance(simulation.stepper, NumbaStepper) == compiled
    simulation.block(Block(rows, 0))
    with pytest.raises(ReplayError, match="not numbers"):
        simulation.check()


def test_a_subclass_with_another_score_does_not_use_the_kernel() -> None:
    @dataclass(frozen=True)
    class Other(A2SF):
        def observe(self, step: Step, score: Tensor) -> Tensor:
            return -super().observe(step, score)

    @dataclass(frozen=True)
    class Named(A2SF):
        pass

    assert recurrence_of(Other()) is None
    assert recurrence_of(Named()) == recurrence_of(A2SF())


@pytest.mark.parametrize(
    "spec",
    ["lru", "snapkv", "key-norm:variant=l2compress", "vatp:base=tova", "h2o:variant=mask", "a2sf:normalise=lifetime"],
)
def test_a_score_that_is_no_recurrence_does_not_use_the_kernel(spec: str) -> None:
    policy: Policy = parse_policies([spec])[0]
    assert recurrence_of(policy) is None


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    available.cache_clear()
    monkeypatch.setenv(OFF, "1")
    try:
        assert not available()
    finally:
        monkeypatch.undo()
        available.cache_clear()
