"""Keyformer against the published mask, with the same draws."""

import itertools

import numpy as np
import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.draw import Draws
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import HEADS, LENGTH, PROMPTS_BUDGETS, sets
from tests.reference.policies import keyformer as reference

CASES = [(prompt, budget) for prompt, budget in [*PROMPTS_BUDGETS, (14, 4), (22, 13), (8, 16)] if budget >= 4]


def uniform(seed: int, layers: int, heads: int) -> np.ndarray:
    """Return the draws of every layer, head, step and key, ``[L, H, T, T]``."""
    draws = np.full((layers, heads, LENGTH, LENGTH), np.nan)
    for t in range(LENGTH):
        draws[:, :, t, : t + 1] = Draws(0, torch.arange(layers), LENGTH).of_row(seed, heads, t).numpy()
    return draws


@pytest.mark.parametrize(
    ("spec", "tau_init", "tau_delta", "ratio", "seed"),
    [
        ("keyformer", 1.0, 0.01, 0.3, 0),
        ("keyformer:seed=5,tau_init=2,tau_delta=0.5", 2.0, 0.5, 0.3, 5),
        ("keyformer:recent_ratio=0.5,tau_init=0.3", 0.3, 0.01, 0.5, 0),
        ("keyformer:group=max", 1.0, 0.01, 0.3, 0),
        ("keyformer:group=max,reduce=rows", 1.0, 0.01, 0.3, 0),
    ],
)
def test_held_is_what_the_published_mask_shows(spec, tau_init, tau_delta, ratio, seed) -> None:
    policy = parse_policy(spec)
    order = {"group": policy.group, "reduce": policy.reduce}
    for index, ((heads, groups), (prompt, budget)) in enumerate(itertools.product(HEADS, CASES)):
        rows = attention(index, 2, heads, LENGTH)
        simulation = run(policy, rows, [budget], kv_heads=groups, prompt=prompt, prefill="full")
        draws, recent, per = uniform(seed, 2, heads), int(ratio * budget), heads // groups
        for layer, group in itertools.product(range(2), range(groups)):
            own = slice(group * per, (group + 1) * per)
            full, noise = rows[layer, own].numpy(), draws[layer, own]
            seen = reference.mask(full, noise, budget - recent, recent, prompt, tau_init, tau_delta, **order)
            held = sets(simulation.held(0, LENGTH)[0, layer, group])
            first = max(prompt, budget + 1)  # until then the mask shows everything
            assert held[first:] == seen[first:]
            assert all(held[t] == set(range(t + 1)) for t in range(min(prompt - 1, budget)))


def test_the_key_tokens_are_chosen_once() -> None:
    simulation = run(parse_policy("keyformer"), attention(4, 2, 4, 40), [10, 14], kv_heads=2, prompt=20, prefill="full")
    held = simulation.held(0, 40)
    for run_index, recent in enumerate((3, 4)):
        first = held[run_index, :, :, 19, : 20 - recent]
        assert (held[run_index, :, :, 20:, : 20 - recent] == first[:, :, None]).all()
        assert (first.sum(-1) == (10, 14)[run_index] - recent).all()


def test_what_a_sliding_window_forgets_reopens_no_choice() -> None:
    made = parse_policy("keyformer")
    for seed in range(4):
        simulation = run(made, attention(seed, 1, 4, 60), [10], kv_heads=2, prompt=20, prefill="full", windows=(14,))
        leave = simulation.state.leave[0, 0, :, 20:]  # of the keys after the prompt
        stay = leave - torch.arange(20, 60)
        gone = leave < 2**31 - 1
        assert (stay[gone] == 3).any()
        assert ((stay == 3) | (stay == 13) | ~gone).all(), "either it left the recent window or the model forgot it"


def test_without_a_recent_window_the_prompt_stays() -> None:
    simulation = run(parse_policy("keyformer"), attention(4, 1, 2, 20), [3], kv_heads=2, prompt=8, prefill="full")
    held = simulation.held(0, 20)[0, 0, :, 7:]
    assert (held == held[:, :1]).all() and (held.sum(-1) == 3).all()


def test_the_seed_decides_and_the_budget_does_not_touch_the_noise() -> None:
    rows = attention(6, 2, 4, 40)
    together = run(parse_policy("keyformer"), rows, [8, 12], kv_heads=2, prompt=20, prefill="full").state.leave
    alone = run(parse_policy("keyformer"), rows, [12], kv_heads=2, prompt=20, prefill="full").state.leave
    other = run(parse_policy("keyformer:seed=1"), rows, [12], kv_heads=2, prompt=20, prefill="full").state.leave
    assert torch.equal(together[1], alone[0])
    assert (alone != other).any()


def test_rows_without_mass_and_wrong_parameters() -> None:
    rows = attention(7, 1, 2, 12)
    rows[:, :, 3] = 0.0
    run(parse_policy("keyformer"), rows, [4], kv_heads=2, prompt=6, prefill="full")
    for wrong in ("tau_init=0", "tau_delta=-1", "recent_ratio=1.1"):
        with pytest.raises(UsageError, match="out of range"):
            parse_policy(f"keyformer:{wrong}")
