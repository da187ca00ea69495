"""LagKV against its plain-loop reference."""

from itertools import product

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.lagkv import LagKV
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.lagkv import scores
from tests.reference.policies.loop import evict


@pytest.mark.parametrize(
    ("kv_heads", "prompt", "phase"),
    list(product([2, 4], [5, 9, 10, 16, 29], ["prefill", "step", "every:7"])),
)
def test_decisions_equal_the_plain_loop(kv_heads: int, prompt: int, phase: str) -> None:
    shape = Shape((0, 1), 4, kv_heads, prompt, 32)
    signals = vectors(5, shape)
    policy, budgets = LagKV(lag=4, sinks=2), [2, 7, 15, 32]
    plan = EvictionPlan(policy, phase, "uniform")
    simulation, _ = simulated(plan, budgets, shape, "full", signals)
    held = simulation.held(0, 32)
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        keys, values = signals["keys"][layer, head].numpy(), signals["values"][layer, head].numpy()
        expected = evict(
            32,
            budget,
            lambda t: plan.compresses(t, prompt, "full"),
            lambda t, visible, keys=keys, values=values: scores(keys, values, visible, 2, 4),
            sinks=2,
        )
        assert sets(held[run, layer, head]) == expected


def test_sinks_and_the_last_part_stay_and_every_part_loses_alike() -> None:
    shape = Shape((0,), 2, 2, 19, 19)  # 3 sinks, three parts of 5, one left over
    simulation, _ = simulated(LagKV(lag=5, sinks=3), [13], shape, "full", vectors(3, shape))
    held = simulation.held(0, 19)[0, 0, :, -1]
    assert held[:, :3].all() and held[:, 13:].all()
    assert held[:, 3:8].sum(-1).tolist() == held[:, 8:13].sum(-1).tolist() == [2, 2]


def test_heads_that_hold_different_numbers_of_keys() -> None:
    """Cuts follow what each head holds; a budget that differs between heads must not shift another head's parts."""
    shape = Shape((0,), 2, 2, 26, 40)
    signals = vectors(8, shape)
    plan = EvictionPlan(LagKV(lag=4, sinks=0), "every:7", "uniform")
    both, rows = simulated(plan, [16], shape, "full", signals)
    uneven = CacheSimulation(plan, [16], shape, "full", signals, dtype=torch.float64)
    uneven.state.budget = torch.tensor([[[16, 9]]])
    for t in range(40):
        uneven.step(t, rows[:, :, t, : t + 1])
    assert torch.equal(uneven.state.leave[0, 0, 0], both.state.leave[0, 0, 0])
    narrow, _ = simulated(plan, [9], shape, "full", signals)
    assert torch.equal(uneven.state.leave[0, 0, 1], narrow.state.leave[0, 0, 1])


def test_a_dimension_without_width_does_not_spoil_the_others() -> None:
    shape = Shape((0,), 1, 1, 12, 12)
    signals = vectors(8, shape)
    signals["keys"][..., 0] = 1.0
    simulation, _ = simulated(LagKV(lag=3, sinks=0), [8], shape, "full", signals)
    keys, values = signals["keys"][0, 0].numpy(), signals["values"][0, 0].numpy()
    expected = evict(12, 8, lambda t: t == 11, lambda t, visible: scores(keys, values, visible, 0, 3))
    assert sets(simulation.held(0, 12)[0, 0, 0]) == expected


def test_no_streaming() -> None:
    with pytest.raises(UsageError, match="streaming prefill"):
        EvictionPlan.published(LagKV()).require(Prefill.stream)


def test_parameters_out_of_range() -> None:
    with pytest.raises(UsageError, match="lag=1 is out of range"):
        LagKV(lag=1)
