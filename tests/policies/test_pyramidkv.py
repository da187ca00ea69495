"""PyramidKV against its plain-loop reference: SnapKV's choice, within budgets that shrink from layer to layer."""

import itertools

import pytest

from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import HEADS, groups, head_sets
from tests.reference.policies import allocations
from tests.reference.policies.snapkv import snapkv

LENGTH, LAYERS = 48, 4
# all of the line; a first layer that would hold more than there is; too short for a pyramid; one that fits; the ends
CASES = [(36, 12), (33, 17), (30, 15), (30, 16), (20, 18), (9, 9), (3, 12), (20, LENGTH), (38, 1), (38, 2), (25, 3)]
CASES += [(45, 20), (46, 24)]  # a twentieth is a key


@pytest.mark.parametrize(("window", "group"), [(1, "mean"), (4, "mean"), (64, "mean"), (4, "max")])
@pytest.mark.parametrize("heads", HEADS)
def test_decisions_and_budgets_equal_the_plain_loop(heads: tuple[int, int], window: int, group: str) -> None:
    policy = parse_policy(f"pyramidkv:window={window},group={group}")
    for seed, (prompt, budget) in enumerate(CASES):
        rows, cut = groups(seed, *heads, LAYERS, LENGTH)
        simulation = run(policy, rows, [budget], kv_heads=heads[1], prompt=prompt, prefill="full")
        width = min(window, budget // 2)
        shares = allocations.pyramid(budget, width, prompt, LAYERS)
        assert sum(shares) == budget * LAYERS
        assert simulation.state.budget[0].tolist() == [[keys] * heads[1] for keys in shares]
        for layer, head in itertools.product(range(LAYERS), range(heads[1])):
            settings = {"window": window, "kernel": 5, "pooling": "avg", "group": group}
            expected = snapkv(cut[layer][head], budget, prompt, capacity=shares[layer], **settings)
            assert head_sets(simulation, layer, head) == expected


def test_pyramids_of_each_kind_are_among_the_cases() -> None:
    """Of the prompts above some give a whole line, some one cut at the first layer, some none."""
    kinds = set()
    for (prompt, budget), window in itertools.product(CASES, (1, 4)):
        width = min(window, budget // 2)
        shares = allocations.pyramid(budget, width, prompt, LAYERS)
        kinds.add("even" if shares == [budget] * LAYERS else "cut" if shares[0] == prompt else "whole")
    assert kinds == {"even", "cut", "whole"}


@pytest.mark.parametrize(("budget", "window", "prompt"), [(64, 8, 500), (128, 32, 1000), (100, 10, 185), (45, 3, 400)])
@pytest.mark.parametrize("layers", [2, 5, 32])
def test_the_published_steps_end_above_the_line(budget: int, window: int, prompt: int, layers: int) -> None:
    ours = allocations.pyramid(budget, window, prompt, layers)
    published = allocations.published_pyramid(budget, window, prompt, layers)
    assert ours[0] == published[0]
    assert all(-1 <= more - keys <= layer for layer, (keys, more) in enumerate(zip(ours, published, strict=True)))
    assert sum(published) >= sum(ours) == budget * layers
