"""Quest against its plain-loop reference."""

from itertools import product

import numpy as np
import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.rows import Shape
from kvscope.policies.quest import Quest
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.quest import read

REDUCE = {"max": max, "mean": np.mean, "sum": sum}


@pytest.mark.parametrize(
    ("kv_heads", "prompt", "prefill", "page", "group"),
    list(product([2, 4], [1, 3, 17], ["full", "stream"], [1, 4], ["max", "mean", "sum"])),
)
def test_reads_equal_the_plain_loop(kv_heads: int, prompt: int, prefill: str, page: int, group: str) -> None:
    length, budgets = 31, [1, 9, 16, 31]
    shape = Shape((2, 5), 4, kv_heads, prompt, length)
    signals = vectors(31, shape)
    simulation, _ = simulated(Quest(page_size=page, fewest_pages=2, group=group), budgets, shape, prefill, signals)
    visible, size = simulation.visible(0, length), 4 // kv_heads
    first = prompt if prefill == "full" else 1
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        keys = signals["keys"][layer, head].numpy()
        queries = signals["queries"][layer, head * size : (head + 1) * size].numpy()
        expected = [
            set(range(t + 1)) if t < first else read(keys[: t + 1], queries[:, t], budget, page, 2, REDUCE[group])
            for t in range(length)
        ]
        assert sets(visible[run, layer, head]) == expected
    assert simulation.held(0, length).sum(-1)[0, 0, 0].tolist() == list(range(1, length + 1)), (
        "a reader holds everything"
    )


def test_the_first_layers_read_everything() -> None:
    shape = Shape((0, 1, 2), 2, 2, 4, 40)
    simulation, _ = simulated(Quest(page_size=2), [6], shape, "full", vectors(1, shape))
    read_keys = simulation.visible(0, 40)[0, :, 0, -1].sum(-1)
    assert read_keys.tolist()[:2] == [40, 40] and read_keys[2] <= 7


def test_the_published_page_floor() -> None:
    shape = Shape((7,), 1, 1, 90, 100)
    simulation, _ = simulated(Quest(), [20], shape, "full", vectors(1, shape))
    counts = simulation.visible(0, 100)[0, 0, 0, 90:].sum(-1)
    assert counts.min() >= 2 * 16 + 3 and counts.max() <= 3 * 16 + 1


def test_a_sliding_window_leaves_pages_behind() -> None:
    length = 30
    shape = Shape((2,), 2, 2, 5, length, windows=(10,))
    signals = vectors(4, shape)
    simulation, _ = simulated(Quest(page_size=3, fewest_pages=2), [6], shape, "full", signals)
    visible = simulation.visible(0, length)[0, 0]
    for head, t in product(range(2), range(5, length)):
        keys, query = signals["keys"][0, head, : t + 1].numpy(), signals["queries"][0, head : head + 1, t].numpy()
        assert sets(visible[head])[t] == read(keys, query, 6, 3, 2, first=max(0, t - 9))


def test_runs_that_differ_in_vectors_do_not_mix() -> None:
    shape = Shape((2,), 2, 1, 6, 40)
    one, other = vectors(1, shape), vectors(2, shape)
    quest = Quest(page_size=3, fewest_pages=2)
    stacked = {name: torch.stack([one[name], other[name]]) for name in ("keys", "queries")}
    both, _ = simulated(quest, [7, 7], shape, "full", stacked)
    for run, signals in enumerate([one, other]):
        alone, _ = simulated(quest, [7], shape, "full", signals)
        assert torch.equal(both.visible(0, 40)[run], alone.visible(0, 40)[0])


def test_parameters_out_of_range() -> None:
    with pytest.raises(UsageError, match="page_size=0"):
        Quest(page_size=0)
