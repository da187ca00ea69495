"""R-KV against its plain-loop reference."""

from itertools import product

import pytest
import torch

import kvscope.policies.r_kv as module
from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.policies.r_kv import RKV, redundancy
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.loop import evict
from tests.reference.policies.r_kv import scores


@pytest.mark.parametrize(
    ("kv_heads", "prompt", "prefill", "phase", "mix"),
    list(product([2, 4], [3, 21], ["full", "stream"], ["step", "every:6"], [0.07, 0.9])),
)
def test_decisions_equal_the_plain_loop(kv_heads: int, prompt: int, prefill: str, phase: str, mix: float) -> None:
    length, window, pooling = 34, 4, 3
    shape = Shape((0, 1), 4, kv_heads, prompt, length)
    signals = vectors(21, shape)
    policy, budgets = RKV(window=window, mix_lambda=mix, pooling=pooling), [2, 5, 12, length]
    plan = EvictionPlan(policy, phase, "uniform")
    simulation, _ = simulated(plan, budgets, shape, prefill, signals)
    held, group = simulation.held(0, length), 4 // kv_heads
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        keys = signals["keys"][layer, head].numpy()
        queries = signals["queries"][layer, head * group : (head + 1) * group].numpy()
        recent = min(window, budget // 2)
        expected = evict(
            length,
            budget,
            lambda t: plan.compresses(t, prompt, prefill),
            lambda t, visible, keys=keys, queries=queries, recent=recent: scores(
                keys, queries, t, visible, recent, mix, pooling
            ),
            recent=recent,
        )
        assert sets(held[run, layer, head]) == expected


def test_the_published_settings_at_their_own_size() -> None:
    shape = Shape((0,), 2, 1, 100, 300)
    signals = vectors(2, shape, size=8)
    simulation, _ = simulated(RKV(), [64], shape, "full", signals)
    keys, queries = signals["keys"][0, 0].numpy(), signals["queries"][0].numpy()
    expected = evict(
        300,
        64,
        lambda t: t in (99, 99 + 128),
        lambda t, visible: scores(keys, queries, t, visible, 8, 0.07, 7),
        recent=8,
    )
    assert sets(simulation.held(0, 300)[0, 0, 0]) == expected
    assert [len(expected[t]) for t in (98, 99, 226, 227, 228)] == [99, 64, 191, 64, 65]


def test_a_budget_of_one_key_holds_one() -> None:
    """Of two keys each is as redundant, and pooling levels their attention: which stays is up to rounding."""
    shape = Shape((0,), 2, 2, 4, 20)
    simulation, _ = simulated(EvictionPlan(RKV(), "step", "uniform"), [1], shape, "full", vectors(1, shape))
    assert (simulation.held(0, 20).sum(-1)[..., 3:] == 1).all()
    simulation.check()


def test_redundancy_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(2, 1, 2, 23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = torch.ones(2, 1, 2, 23, dtype=torch.bool)
    there[0, 0, 1, 17:] = False
    whole = redundancy(keys, there, 0.5)
    monkeypatch.setattr(module, "BLOCK", 4 * 23 * 3)
    assert torch.allclose(redundancy(keys, there, 0.5), whole, atol=1e-15)
    assert whole.sum(-1).flatten().tolist() == pytest.approx([1.0] * 4)
    assert (whole[~there] == 0).all()


def test_what_is_remembered_is_the_window() -> None:
    shape = Shape((0,), 2, 1, 4, 40)
    simulation, _ = simulated(RKV(window=3), [10], shape, "full", vectors(2, shape))
    assert simulation._torch._memory["queries"].shape == (1, 1, 2, 3, 4)


def test_parameters_out_of_range() -> None:
    with pytest.raises(UsageError, match="pooling=4 is even"):
        RKV(pooling=4)
    with pytest.raises(UsageError, match="mix_lambda=2"):
        RKV(mix_lambda=2)
