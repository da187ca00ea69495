"""Key norm against its plain-loop references."""

import itertools

import numpy as np
import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run, signals
from tests.policies.decisions import HEADS, LENGTH, PROMPTS_BUDGETS, sets
from tests.reference.policies import key_norm as reference


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_the_smallest_norms_stay(prefill: str) -> None:
    policy = parse_policy("key-norm")
    for seed, ((heads, groups), (prompt, budget)) in enumerate(itertools.product(HEADS, PROMPTS_BUDGETS)):
        rows = attention(seed, 2, heads, LENGTH)
        norms = signals(EvictionPlan.published(policy), 2, heads, groups, LENGTH, seed)["key_l2"]
        simulation = run(policy, rows, [budget], kv_heads=groups, prompt=prompt, prefill=prefill, seed=seed)
        for layer, group in itertools.product(range(2), range(groups)):
            visible, held = reference.plain(rows[layer].numpy(), norms[layer, group].tolist(), budget, prompt, prefill)
            assert sets(simulation.visible(0, LENGTH)[0, layer, group]) == visible
            assert sets(simulation.held(0, LENGTH)[0, layer, group]) == held


@pytest.mark.parametrize(("prompt", "budget"), [(18, 6), (5, 9), (25, 1)])
def test_one_choice_at_the_end_of_the_prompt(prompt: int, budget: int) -> None:
    plan = EvictionPlan.make(parse_policy("key-norm"), "prefill")
    norms = signals(plan, 2, 3, 3, LENGTH)["key_l2"]
    simulation = run(plan, attention(0, 2, 3, LENGTH), [budget], kv_heads=3, prompt=prompt, prefill="full")
    for layer, head in itertools.product(range(2), range(3)):
        kept = reference.kvpress(norms[layer, head].tolist(), budget, prompt)
        held = sets(simulation.held(0, LENGTH)[0, layer, head])
        assert held[prompt - 1 :] == [kept | set(range(prompt, t + 1)) for t in range(prompt - 1, LENGTH)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("prompt", "ratio", "after"), [(1, 0.9, 10), (18, 0.9, 10), (18, 0.5, 20), (12, 0.0, 5)])
def test_the_published_saw(prompt: int, ratio: float, after: int, tied: bool) -> None:
    policy = parse_policy(f"key-norm:variant=l2compress,keep_ratio={ratio},prune_after={after}")
    norms = np.random.default_rng(prompt).normal(size=(2, 3, LENGTH)) ** 2
    if tied:
        norms = norms.round()
    rows, given = attention(0, 2, 3, LENGTH), {"key_l2": torch.from_numpy(norms)}
    simulation = run(policy, rows, [LENGTH], kv_heads=3, prompt=prompt, prefill="full", given=given)
    for layer, head in itertools.product(range(2), range(3)):
        expected = reference.released(norms[layer, head].tolist(), prompt, ratio, after)
        assert sets(simulation.held(0, LENGTH)[0, layer, head]) == expected
    assert simulation.held(0, LENGTH).sum(-1)[..., prompt - 1 :].max() < max(after, LENGTH)


def test_skipped_layers_keep_everything() -> None:
    policy = parse_policy("key-norm:variant=l2compress,keep_ratio=0.5,prune_after=4,skip_layers=1")
    simulation = run(policy, attention(1, 2, 2, 12), [12], kv_heads=2, prompt=3, prefill="full")
    assert simulation.held(0, 12)[0, 0, :, -1].all()
    assert not simulation.held(0, 12)[0, 1, :, -1].all()


def test_of_equal_norms_the_oldest_goes_at_a_budget() -> None:
    given = {"key_l2": torch.tensor([[[2.0, 1.0, 2.0, 1.0, 2.0]]])}
    simulation = run(
        parse_policy("key-norm"), attention(2, 1, 1, 5), [3], kv_heads=1, prompt=1, prefill="full", given=given
    )
    assert sets(simulation.held(0, 5)[0, 0, 0]) == [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}, {1, 3, 4}]


def test_traits_and_mistakes() -> None:
    assert parse_policy("key-norm").traits.bounded
    published = parse_policy("key-norm:variant=l2compress").traits
    assert not published.bounded and published.published
    with pytest.raises(UsageError, match=r"keep_ratio=1\.5 is out of range"):
        parse_policy("key-norm:keep_ratio=1.5")
