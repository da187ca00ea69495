"""CAKE against its plain-loop reference: budgets of layers, the choice after the prompt and at each step."""

import itertools

import pytest
import torch

from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import LENGTH, PROMPTS_BUDGETS, groups, head_sets, simulations
from tests.reference.policies import allocations
from tests.reference.policies.cake import cake

LAYERS = 3
LONG, LONG_CASES = 52, [(45, 12), (45, 30), (40, 3), (36, 2), (34, 33), (45, 45), (33, 1), (40, 52)]
SETTINGS = [
    ("cake", {"window": 32, "gamma": 200.0, "kernel": 5, "pooling": "avg"}),
    ("cake:window=3,gamma=5,kernel=3,pooling=max", {"window": 3, "gamma": 5.0, "kernel": 3, "pooling": "max"}),
    ("cake:window=2,gamma=0,kernel=1", {"window": 2, "gamma": 0.0, "kernel": 1, "pooling": "avg"}),
    ("cake:window=4,group=max", {"window": 4, "gamma": 200.0, "kernel": 5, "pooling": "avg", "group": "max"}),
    (
        "cake:window=4,group=max,reduce=rows",
        {"window": 4, "gamma": 200.0, "kernel": 5, "pooling": "avg", "group": "max", "reduce": "rows"},
    ),
    (
        "cake:window=4,pooling=max,reduce=rows",
        {"window": 4, "gamma": 200.0, "kernel": 5, "pooling": "max", "reduce": "rows"},
    ),
    ("cake:window=4,group=sum", {"window": 4, "gamma": 200.0, "kernel": 5, "pooling": "avg", "group": "sum"}),
]


@pytest.mark.parametrize(("spec", "settings"), SETTINGS)
def test_decisions_equal_the_plain_loop(spec: str, settings: dict) -> None:
    """Prompts up to 32 keys give every layer the same."""
    for rows, visible, held, prompt, budget in simulations(spec, "full", [*PROMPTS_BUDGETS, (24, 13), (8, 7)]):
        assert (visible, held) == cake(rows, budget, prompt, **settings)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize(("spec", "settings"), SETTINGS[:2])
def test_decisions_and_budgets_of_longer_prompts(heads: tuple[int, int], spec: str, settings: dict) -> None:
    differ = 0
    for seed, (prompt, budget) in enumerate(LONG_CASES):
        rows, cut = groups(seed, *heads, LAYERS, LONG)
        rows[1] *= 0.3  # a layer that mostly looks at the first key
        rows[1, ..., 0] += 0.7
        simulation = run(parse_policy(spec), rows, [budget], kv_heads=heads[1], prompt=prompt, prefill="full")
        width = min(settings["window"], budget // 2)
        shares = allocations.cake([layer.numpy() for layer in rows], budget, width, prompt)
        assert sum(shares) == budget * LAYERS
        assert simulation.state.budget[0].tolist() == [[keys] * heads[1] for keys in shares]
        differ += len(set(shares)) > 1
        for layer, head in itertools.product(range(LAYERS), range(heads[1])):
            expected = cake(cut[layer][head], budget, prompt, capacity=shares[layer], **settings)
            assert head_sets(simulation, layer, head) == expected
    assert differ >= 4


def test_a_layer_that_cannot_use_its_share_passes_it_on() -> None:
    rows = attention(5, LAYERS, 2, LONG)
    rows[0] = rows[0] ** 4
    rows[0] /= rows[0].sum(-1, keepdim=True)
    rows[2] = torch.ones(2, LONG, LONG, dtype=torch.float64).tril()
    rows[2] /= rows[2].sum(-1, keepdim=True)  # nothing changes there but the number of keys
    shares = allocations.cake([layer.numpy() for layer in rows], 34, 4, 45)
    assert max(shares) == 45
    simulation = run(parse_policy("cake:window=4"), rows, [34], kv_heads=2, prompt=45, prefill="full")
    assert simulation.state.budget[0, :, 0].tolist() == shares


def test_budgets_in_one_scan_equal_one_by_one() -> None:
    rows = attention(3, LAYERS, 4, LONG)
    policy = parse_policy("cake:window=6")
    together = run(policy, rows, [1, 9, 26], kv_heads=2, prompt=45, prefill="full")
    for index, budget in enumerate([1, 9, 26]):
        alone = run(policy, rows, [budget], kv_heads=2, prompt=45, prefill="full")
        assert torch.equal(together.state.leave[index], alone.state.leave[0])


def test_the_variance_and_the_newest_row_decide() -> None:
    rows = attention(4, 1, 2, LENGTH)
    at = {"kv_heads": 2, "prompt": 16, "prefill": "full"}
    steady, changing = (run(parse_policy(f"cake:gamma={gamma}"), rows, [6], **at).state.leave for gamma in (0, 200))
    assert not torch.equal(steady, changing)
