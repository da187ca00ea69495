"""LRU against its plain loop."""

import pytest

import kvscope.policies.lru  # noqa: F401
from tests.policies.decisions import simulations
from tests.reference.policies import lru as reference


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("reduce", ["rows", "scores"])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_decisions_equal_the_plain_loop(prefill: str, group: str, reduce: str) -> None:
    for rows, visible, held, prompt, budget in simulations(f"lru:group={group},reduce={reduce}", prefill):
        assert (visible, held) == reference.lru(rows, budget, prompt, prefill, group, reduce)


def test_the_sum_of_the_heads_is_no_stricter_than_their_mean() -> None:
    for mean, total in zip(simulations("lru", "stream"), simulations("lru:group=sum", "stream"), strict=True):
        assert mean[2] == total[2]
