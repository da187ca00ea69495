"""Every allocator with policies other than its published one, compared with plain-loop references."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import groups, head_sets
from tests.reference.policies import a2sf, allocations, h2o, tova
from tests.reference.policies.evict import Sets

LENGTH, LAYERS = 50, 3
CASES = [(44, 12), (38, 25), (36, 35), (20, 9), (9, 9), (3, 12), (40, LENGTH), (47, 1), (40, 2), (34, 3)]
SPECS = ["h2o", "h2o:recent=0", "a2sf:alpha=0.5,sinks=1", "tova:scope=kv_head", "tova"]
Rows = np.ndarray


def decide(spec: str, rows: Rows, keys: int, recent: int, prompt: int) -> tuple[Sets, Sets]:
    """Return the reference's visible and held sets of one head, or one layer, with a budget of `keys`."""
    if spec.startswith("h2o"):
        return h2o.drop(rows, keys, prompt, "full", recent)
    if spec.startswith("a2sf"):
        return a2sf.drop(rows, keys, prompt, "full", alpha=0.5, sinks=1)
    return tova.tova(rows, keys, prompt, "full")


def scores(spec: str, rows: Rows, prompt: int) -> list[float]:
    """Return the scores of the prompt's keys at its end."""
    mean = rows.mean(0)[:prompt, :prompt]
    if spec.startswith("h2o"):
        return mean.sum(0).tolist()
    if spec.startswith("a2sf"):
        return sum(0.5 ** (prompt - 1 - query) * mean[query] for query in range(prompt)).tolist()
    return mean[prompt - 1].tolist()


def protects(spec: str, budget: int) -> tuple[int, int]:
    """Return how many first and newest keys are protected."""
    return int(spec.startswith("a2sf")), budget // 2 if spec == "h2o" else 0


def pyramid(spec: str, cut: list[list[Rows]], budget: int, prompt: int) -> list[list[int]]:
    shares = allocations.pyramid(budget, sum(protects(spec, budget)), prompt, LAYERS)
    return [[keys] * len(own) for keys, own in zip(shares, cut, strict=True)]


def cake(spec: str, cut: list[list[Rows]], budget: int, prompt: int) -> list[list[int]]:
    shares = allocations.cake([np.concatenate(own) for own in cut], budget, sum(protects(spec, budget)), prompt)
    return [[keys] * len(own) for keys, own in zip(shares, cut, strict=True)]


def ada(spec: str, cut: list[list[Rows]], budget: int, prompt: int) -> list[list[int]]:
    sinks, recent = protects(spec, budget)
    free = [[scores(spec, rows, prompt)[sinks : max(prompt - recent, sinks)] for rows in own] for own in cut]
    return [allocations.ada(own, budget, sinks + recent, prompt) for own in free]


def heads(spec: str, cut: list[list[Rows]], budget: int, prompt: int) -> list[list[int]]:
    weights = [[allocations.far_weight(rows, prompt) for rows in own] for own in cut]
    return allocations.heads(weights, budget, sum(protects(spec, budget)), prompt)


def decay(spec: str, cut: list[list[Rows]], budget: int, prompt: int) -> list[list[int]]:
    shares = allocations.decay(budget, sum(protects(spec, budget)), prompt, LAYERS)
    return [[keys] * len(own) for keys, own in zip(shares, cut, strict=True)]


PER_LAYER = ("tova", "heads")  # a layer that decides as one has no heads to give keys to

SHARES: dict[str, Callable[[str, list[list[Rows]], int, int], list[list[int]]]] = {
    "pyramid": pyramid,
    "cake": cake,
    "ada": ada,
    "heads": heads,
    "decay": decay,
}


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize(
    ("spec", "name"), [pair for pair in itertools.product(SPECS, SHARES) if pair not in (("tova", "ada"), PER_LAYER)]
)
def test_budgets_and_decisions_equal_the_plain_loop(heads: tuple[int, int], spec: str, name: str) -> None:
    plan = EvictionPlan.make(parse_policy(spec), None, name)
    moved = 0
    for seed, (prompt, budget) in enumerate(CASES):
        rows, cut = groups(seed, *heads, LAYERS, LENGTH)
        rows[1] *= 0.3  # in place, so in `cut` too: a layer that attends mostly to its first key
        rows[1, ..., 0] += 0.7
        if spec == "tova":
            cut = [[layer.numpy()] for layer in rows]
        simulation = run(plan, rows, [budget], kv_heads=heads[1], prompt=prompt, prefill="full")
        expected = SHARES[name](spec, cut, budget, prompt)
        assert simulation.state.budget[0].tolist() == expected
        assert sum(map(sum, expected)) == budget * LAYERS * len(cut[0]), "the total is conserved"
        moved += expected != [[budget] * len(cut[0])] * LAYERS
        for layer, head in itertools.product(range(LAYERS), range(len(cut[0]))):
            keys, recent = expected[layer][head], protects(spec, budget)[1]
            assert head_sets(simulation, layer, head) == decide(spec, cut[layer][head], keys, recent, prompt)
    assert moved > (1 if name == "decay" else 3)  # it is nearly uniform in three layers


@pytest.mark.parametrize("name", ["pyramidkv", "ada-kv:window=64,kernel=5,pooling=avg"])
def test_the_uniform_allocation_is_snapkv(name: str) -> None:
    rows = attention(2, LAYERS, 4, LENGTH)
    at = {"kv_heads": 2, "prompt": 40, "prefill": "full"}
    even = run(EvictionPlan.make(parse_policy(name), None, "uniform"), rows, [7, 16], **at)
    assert torch.equal(even.state.leave, run(parse_policy("snapkv"), rows, [7, 16], **at).state.leave)
    assert not torch.equal(even.state.leave, run(parse_policy(name), rows, [7, 16], **at).state.leave)


@pytest.mark.parametrize("name", sorted(SHARES))
def test_budgets_in_one_simulation_equal_one_by_one(name: str) -> None:
    rows = attention(3, LAYERS, 4, LENGTH)
    plan = EvictionPlan.make(parse_policy("h2o"), None, name)
    together = run(plan, rows, [1, 8, 30, LENGTH], kv_heads=2, prompt=40, prefill="full")
    for index, budget in enumerate([1, 8, 30, LENGTH]):
        alone = run(plan, rows, [budget], kv_heads=2, prompt=40, prefill="full")
        assert torch.equal(together.state.leave[index], alone.state.leave[0])
        assert torch.equal(together.state.budget[index], alone.state.budget[0])
