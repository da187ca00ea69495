"""Recycled Attention and RefreshKV against their plain-loop references."""

from itertools import product

import numpy as np
import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.recycled_attention import RecycledAttention, RefreshKV
from tests.engine.maps import attention
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.recycled_attention import full_by_queries, read

REDUCE = {"max": max, "mean": np.mean, "sum": sum}
LENGTH = 34
BUDGETS = [1, 6, 15, LENGTH]


def compare(policy: RecycledAttention, shape: Shape, prefill: str, seed: int = 41) -> CacheSimulation:
    """Assert that every run, layer and head reads what the reference reads; return the simulation."""
    signals = vectors(seed, shape)
    simulation, rows = simulated(policy, BUDGETS, shape, prefill, signals, seed)
    visible, size = simulation.visible(0, shape.length), shape.heads // shape.kv_heads
    start = shape.prompt - 1 if prefill == "full" else 0
    for (run, budget), layer, head in product(enumerate(BUDGETS), range(len(shape.layers)), range(shape.kv_heads)):
        if policy.schedule == "fixed":

            def is_full(t: int) -> bool:
                return (t - start) % policy.stride == 0
        else:
            queries = signals["queries"][layer].numpy()
            is_full = full_by_queries(queries, start, policy.compare_every, policy.threshold)
        window = shape.windows[layer] if shape.windows else None
        own = rows[layer, head * size : (head + 1) * size].numpy()
        expected = read(own, budget, start, is_full, policy.pooling, REDUCE[policy.group], window)
        assert sets(visible[run, layer, head]) == expected
    return simulation


@pytest.mark.parametrize(
    ("kv_heads", "prompt", "prefill", "pooling", "group"),
    list(product([2, 4], [1, 3, 17], ["full", "stream"], [1, 7], ["max", "mean", "sum"])),
)
def test_fixed_reads_equal_the_plain_loop(kv_heads: int, prompt: int, prefill: str, pooling: int, group: str) -> None:
    policy = RecycledAttention(stride=7, pooling=pooling, group=group)
    simulation = compare(policy, Shape((0, 1), 4, kv_heads, prompt, LENGTH), prefill)
    assert simulation.held(0, LENGTH).sum(-1)[0, 0, 0].tolist() == list(range(1, LENGTH + 1)), (
        "a reader holds everything"
    )


@pytest.mark.parametrize(
    ("prompt", "prefill", "every", "threshold", "pooling"),
    list(product([3, 17], ["full", "stream"], [1, 3], [-0.2, 0.4, 0.85], [1, 5])),
)
def test_dynamic_reads_equal_the_plain_loop(
    prompt: int, prefill: str, every: int, threshold: float, pooling: int
) -> None:
    policy = RefreshKV(compare_every=every, threshold=threshold, pooling=pooling)
    simulation = compare(policy, Shape((0, 1, 2), 4, 2, prompt, LENGTH), prefill)
    counts = simulation.visible(0, LENGTH)[0, :, 0].sum(-1)  # [L, T]
    if threshold == 0.4 and every == 1:
        assert (counts[0] != counts[1]).any(), "layers decide for themselves when to read all"
        assert (counts[:, prompt:] == 2).any() and (counts[:, prompt:] > 2).any()


def test_a_stride_beyond_the_budget_reads_what_came_since() -> None:
    policy = RecycledAttention(stride=20)
    simulation = compare(policy, Shape((0,), 2, 2, 8, LENGTH), "full")
    at_six = simulation.visible(0, LENGTH)[1, 0, 0, 16]  # nine steps after the full one, six keys: the newest alone
    assert at_six.nonzero().flatten().tolist() == list(range(10, 17))


def test_a_sliding_window_forgets_part_of_the_set() -> None:
    shape = Shape((0, 1), 4, 2, 9, LENGTH, windows=(8, None))
    compare(RecycledAttention(stride=9), shape, "full")
    compare(RecycledAttention(stride=9, pooling=3), shape, "stream")


def test_of_equal_weights_the_newer_is_recycled() -> None:
    rows = torch.full((1, 1, 8, 8), 0.125, dtype=torch.float64)
    simulation = CacheSimulation(RecycledAttention(), [3], Shape((0,), 1, 1, 6, 8), dtype=torch.float64)
    for t in range(8):
        simulation.step(t, rows[:, :, t, : t + 1])
    assert sets(simulation.visible(0, 8)[0, 0, 0])[6:] == [{3, 4, 5, 6}, {4, 5, 6, 7}]


def test_runs_that_differ_do_not_mix() -> None:
    """Closed loop: each run has rows and queries of its own, and its own full steps."""
    shape = Shape((0,), 4, 2, 5, LENGTH)
    policy = RefreshKV(compare_every=2, threshold=0.3, pooling=3)
    queries = [vectors(seed, shape)["mean_query"] for seed in (1, 2)]
    rows = [attention(seed, 1, 4, LENGTH) for seed in (1, 2)]
    both = CacheSimulation(policy, [6, 6], shape, "full", {"mean_query": torch.stack(queries)}, dtype=torch.float64)
    for t in range(LENGTH):
        both.step(t, torch.stack(rows)[:, :, :, t, : t + 1])
    for run in range(2):
        alone = CacheSimulation(policy, [6], shape, "full", {"mean_query": queries[run]}, dtype=torch.float64)
        for t in range(LENGTH):
            alone.step(t, rows[run][:, :, t, : t + 1])
        assert torch.equal(both.visible(0, LENGTH)[run], alone.visible(0, LENGTH)[0])
    counts = both.visible(0, LENGTH).sum(-1)
    assert (counts[0] != counts[1]).any()


def test_what_the_names_mean() -> None:
    assert RecycledAttention().traits.needs == {"weights"}
    assert RecycledAttention(schedule="dynamic").traits.needs == {"weights", "mean_query"}
    assert RefreshKV().traits.needs == RefreshKV.needs == {"weights", "mean_query"}
    assert RefreshKV(schedule="fixed").traits.needs == {"weights"}
    same = RecycledAttention(schedule="dynamic", compare_every=10, threshold=0.85, pooling=7)
    assert RefreshKV().parameters() == same.parameters()
    assert RefreshKV().label == "refreshkv"


@pytest.mark.parametrize("bad", [{"stride": 0}, {"compare_every": 0}, {"threshold": 1.5}, {"pooling": 6}])
def test_parameters_out_of_range(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        RecycledAttention(**bad)
