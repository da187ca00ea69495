"""The policies whose rule is one line: full, window and random."""

import itertools

import pytest
import torch

from kvscope.engine.draw import Draws
from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import HEADS, LENGTH, PROMPTS_BUDGETS, groups, head_sets, simulations
from tests.reference.policies.evict import loop


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_full_keeps_everything(prefill: str) -> None:
    for _, visible, held, _, _ in simulations("full", prefill):
        assert visible == held == [set(range(t + 1)) for t in range(LENGTH)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_window_keeps_the_newest(prefill: str) -> None:
    for _, visible, held, prompt, budget in simulations("window", prefill):
        first = prompt - 1 if prefill == "full" else 0
        assert held == [set(range(max(0, t + 1 - budget) if t >= first else 0, t + 1)) for t in range(LENGTH)]
        assert visible == [{t} | (held[t - 1] if t else set()) for t in range(LENGTH)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("seed", [0, 3])
def test_random_keeps_the_largest_draws(prefill: str, seed: int) -> None:
    policy = parse_policy(f"random:seed={seed}")
    for (heads, kv_heads), (prompt, budget) in itertools.product(HEADS, PROMPTS_BUDGETS):
        rows, cut = groups(1, heads, kv_heads, 2, LENGTH)
        simulation = run(policy, rows, [budget], kv_heads=kv_heads, prompt=prompt, prefill=prefill)
        drawn = torch.stack(
            [Draws(0, torch.arange(2), LENGTH).of_key(seed, kv_heads, t) for t in range(LENGTH)], -1
        )  # [L, G, T]
        for layer, head in itertools.product(range(2), range(kv_heads)):
            own = drawn[layer, head].tolist()
            expected = loop(cut[layer][head], lambda t, visible, row, own=own: own, budget, prompt, prefill)
            assert head_sets(simulation, layer, head) == expected
