"""LaCache against its plain-loop reference; test_authors_decisions.py compares it with the authors' code."""

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.lacache import LaCache
from kvscope.policies.spec import parse_policy
from tests.policies.decisions import sets
from tests.reference.policies.lacache import lacache


def simulate(policy: LaCache | EvictionPlan, shape: Shape, budgets: list[int], prefill: str) -> CacheSimulation:
    simulation = CacheSimulation(policy, budgets, shape, prefill, {}, dtype=torch.float64)
    for t in range(shape.length):
        simulation.step(t, torch.full((len(shape.layers), shape.heads, t + 1), 1 / (t + 1), dtype=torch.float64))
    simulation.check()
    return simulation


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(
    ("layers", "span", "overlap", "sinks"),
    [(4, 2, 0, 4), (6, 2, 0, 1), (6, 3, 1, 4), (8, 4, 3, 4), (7, 2, 1, 0), (2, 1, 0, 4), (9, 6, 0, 3)],
)
def test_keys_equal_the_plain_loop(layers: int, span: int, overlap: int, sinks: int, prefill: str) -> None:
    policy = LaCache(span=span, overlap=overlap, sinks=sinks)
    for prompt, budgets in [(1, [1, 2, 5]), (12, [3, 7, 12, 13]), (40, [9, 24, 31, 60])]:
        shape = Shape(tuple(range(layers)), 2, 1, prompt, 60)
        simulation = simulate(policy, shape, budgets, prefill)
        for run, budget in enumerate(budgets):
            for layer in range(layers):
                at = {"span": span, "overlap": overlap, "sinks": sinks}
                expected = lacache(layer, layers, budget, prompt, 60, prefill, **at)
                assert sets(simulation.held(0, 60)[run, layer, 0]) == expected


def test_layers_hold_other_keys_whatever_group_they_are_stepped_in() -> None:
    whole = simulate(LaCache(), Shape((0, 1, 2, 3), 1, 1, 20, 40), [12], "full").state.leave
    assert not torch.equal(whole[0, 0], whole[0, 1])
    for places in [(1,), (2, 3)]:
        shape = Shape(tuple(10 + place for place in places), 1, 1, 20, 40, n_layers=4, places=places)
        alone = simulate(LaCache(), shape, [12], "full").state.leave
        assert torch.equal(alone[0], whole[0, list(places)])


def test_ladders_thin_out_older_keys_and_together_hold_more_of_them() -> None:
    shape = Shape(tuple(range(4)), 1, 1, 1, 200)
    held = simulate(LaCache(), shape, [40], "stream").held(199, 200)[0, :, 0, 0]
    spans = [held[0, start : start + 40].sum().item() for start in range(0, 200, 40)]
    assert spans[-1] == max(spans) and min(spans) > 0
    assert held.any(0).sum() > held[0].sum() + 15


def test_told_to_evict_at_other_steps_it_keeps_its_order() -> None:
    shape = Shape((0, 1), 1, 1, 20, 40)
    each = simulate(LaCache(), shape, [12], "full")
    fifth = simulate(EvictionPlan.make(LaCache(), "every:5"), shape, [12], "full")
    for t in range(19, 40, 5):
        assert torch.equal(each.held(t, t + 1), fifth.held(t, t + 1))


@pytest.mark.parametrize(
    ("spec", "layers", "why"),
    [
        ("lacache:span=8", 8, "makes no ladder in a model of 8 layers"),
        ("lacache:overlap=1", 2, "makes no ladder in a model of 2 layers"),
    ],
)
def test_a_span_that_makes_no_ladder(spec: str, layers: int, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_policy(spec).fit((0,), 1, layers)
    parse_policy("lacache:span=7").fit((0,), 1, 8)
    parse_policy("lacache").fit((0,), 1, 1)


@pytest.mark.parametrize("setting", ["overlap=-1", "sinks=-1", "span=0", "overlap=3,span=3"])
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match="out of range"):
        parse_policy(f"lacache:{setting}")
