"""attention-gate against plain sets: which keys are seen and held for gates that are open or shut."""

import itertools

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run, signals
from tests.policies.decisions import HEADS, LENGTH, head_sets
from tests.reference.policies import attention_gate as reference

PROMPTS = [1, 9, LENGTH - 1]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.2, -0.3])
def test_decisions_equal_the_plain_sets(prefill: str, decode: bool, margin: float) -> None:
    plan = EvictionPlan.published(parse_policy(f"attention-gate:decode={decode},margin={margin}"))
    counts = set()
    for seed, ((heads, groups), prompt) in enumerate(itertools.product(HEADS, PROMPTS)):
        given = signals(plan, 2, heads, groups, LENGTH, seed)
        rows = attention(seed, 2, heads, LENGTH)
        simulation = run(plan, rows, [LENGTH], kv_heads=groups, prompt=prompt, prefill=prefill, given=given)
        for layer, head in itertools.product(range(2), range(groups)):
            shut = (given["gate:demo"][layer, head] <= margin).tolist()
            assert head_sets(simulation, layer, head) == reference.flags(shut, prompt, prefill, decode)
            counts.add(len(head_sets(simulation, layer, head)[1][-1]))
    assert len(counts) > 2, "heads keep different numbers of keys"


def test_a_gate_that_is_wide_open_is_the_full_cache() -> None:
    plan = EvictionPlan.published(parse_policy("attention-gate:decode=true,margin=-1"))
    simulation = run(plan, attention(0, 2, 4, LENGTH), [1], kv_heads=2, prompt=5, prefill="stream")
    assert torch.equal(simulation.held(0, LENGTH)[0, 0, 0], torch.ones(LENGTH, LENGTH).tril().bool())
    assert (simulation.state.evictions == 0).all()


def test_a_gate_at_its_threshold_is_shut() -> None:
    plan = EvictionPlan.published(parse_policy("attention-gate:decode=true"))
    at = {"gate:demo": torch.tensor([[[0.0, 1e-9, 0.0]]])}
    simulation = run(plan, attention(0, 1, 1, 3), [1], kv_heads=1, prompt=1, prefill="stream", given=at)
    assert head_sets(simulation, 0, 0) == ([{0}, {1}, {1, 2}], [set(), {1}, {1}])


def test_traits_and_mistakes() -> None:
    policy = parse_policy("attention-gate:gate=some/file.safetensors")
    assert policy.traits.needs == {"gate:some/file.safetensors"}
    assert not policy.traits.bounded
    with pytest.raises(UsageError, match="no gate some/file"):
        EvictionPlan.published(policy).require("full")
    with pytest.raises(UsageError, match="decides itself how many keys it evicts"):
        EvictionPlan.make(parse_policy("attention-gate"), compress="prefill")
    with pytest.raises(UsageError, match="out of range"):
        parse_policy("attention-gate:margin=2")
