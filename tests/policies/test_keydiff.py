"""KeyDiff against its plain-loop reference."""

from itertools import product

import pytest
import torch

from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.policies.keydiff import KeyDiff
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.keydiff import scores
from tests.reference.policies.loop import evict


@pytest.mark.parametrize(
    ("kv_heads", "prompt", "prefill", "phase"),
    list(product([2, 4], [3, 17], ["full", "stream"], ["step", "every:5"])),
)
def test_decisions_equal_the_plain_loop(kv_heads: int, prompt: int, prefill: str, phase: str) -> None:
    shape = Shape((0, 1), 4, kv_heads, prompt, 30)
    signals = vectors(11, shape)
    plan, budgets = EvictionPlan(KeyDiff(), phase, "uniform"), [2, 6, 30]
    simulation, _ = simulated(plan, budgets, shape, prefill, signals)
    held = simulation.held(0, 30)
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        keys = signals["keys"][layer, head].numpy()
        expected = evict(
            30,
            budget,
            lambda t: plan.compresses(t, prompt, prefill),
            lambda t, visible, keys=keys: scores(keys, visible),
        )
        assert sets(held[run, layer, head]) == expected
    assert (held[0, ..., -1, :] != held[0, :1, :1, -1, :]).any(), "heads decide for themselves"


def test_runs_that_differ_in_keys_do_not_mix() -> None:
    shape = Shape((0,), 2, 2, 4, 20)
    one, other = vectors(1, shape)["keys"], vectors(2, shape)["keys"]
    both, _ = simulated(KeyDiff(), [5, 5], shape, "full", {"keys": torch.stack([one, other])})
    for run, keys in enumerate([one, other]):
        alone, _ = simulated(KeyDiff(), [5], shape, "full", {"keys": keys})
        assert torch.equal(both.state.leave[run], alone.state.leave[0])
    assert not torch.equal(both.state.leave[0], both.state.leave[1])


def test_a_budget_of_one_key_holds_one() -> None:
    """Two keys are equally far from their mean, so which of them stays is up to rounding; how many is not."""
    shape = Shape((0,), 2, 2, 4, 20)
    simulation, _ = simulated(KeyDiff(), [1], shape, "full", vectors(1, shape))
    assert (simulation.held(0, 20).sum(-1)[..., 3:] == 1).all()
    simulation.check()
