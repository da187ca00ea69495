"""Scissorhands against plain loops, and its released code against the set that code decided."""

import itertools

import pytest
import torch

import kvscope.policies.scissorhands  # noqa: F401
from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention, run
from tests.policies.decisions import HEADS, LENGTH, golden, golden_simulation, heads_at, sets, simulations
from tests.reference.policies import scissorhands as reference


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(("history", "recent"), [(400, 10), (4, 2), (1, 0), (7, 3)])
def test_decisions_equal_the_plain_loop(prefill: str, history: int, recent: int) -> None:
    for rows, visible, held, prompt, budget in simulations(f"scissorhands:history={history},recent={recent}", prefill):
        assert (visible, held) == reference.counters(rows, budget, prompt, prefill, history, recent)


@pytest.mark.parametrize("reduce", ["rows", "scores"])
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_other_group_reductions(group: str, reduce: str) -> None:
    spec = f"scissorhands:history=5,recent=2,group={group},reduce={reduce}"
    for rows, visible, held, prompt, budget in simulations(spec, "full"):
        assert (visible, held) == reference.counters(rows, budget, prompt, "full", 5, 2, group, reduce)


def test_a_threshold_has_no_scores_to_reduce() -> None:
    with pytest.raises(UsageError, match="has a threshold and no scores"):
        parse_policies(["scissorhands:variant=released,reduce=scores"])


@pytest.mark.parametrize(("lru_window", "position_window", "start"), [(5, 2, 6), (3, 0, 0), (1, 1, 4), (40, 3, 10)])
@pytest.mark.parametrize("length", [9, LENGTH, 45])
def test_released_decisions_equal_the_published_loop(
    lru_window: int, position_window: int, start: int, length: int
) -> None:
    spec = f"variant=released,lru_window={lru_window},position_window={position_window},start={start}"
    policy = parse_policies([f"scissorhands:{spec}"])[0]
    cut = 0
    for seed, (heads, groups) in enumerate(HEADS):
        rows = attention(seed, 2, heads, length)
        simulation = run(policy, rows, [length], kv_heads=groups, prompt=1, prefill="stream")
        per = heads // groups
        for layer, group in itertools.product(range(2), range(groups)):
            own = rows[layer, group * per : (group + 1) * per].numpy()
            expected = reference.released(own, lru_window, position_window, start)
            assert sets(simulation.visible(0, length)[0, layer, group]) == expected
            cut += sum(len(keys) <= t for t, keys in enumerate(expected))
    assert cut > 0 or lru_window == 40, "nothing was cut, so nothing was compared"


def test_released_golden() -> None:
    expected = golden("scissorhands", "released")
    spec = "scissorhands:variant=released,lru_window=5,position_window=2,start=6"
    simulation = golden_simulation(spec, 20, "stream")
    assert heads_at(simulation.visible(0, 20), 19) == expected["visible"]["19"]


def test_released_has_no_budget_and_streams_alone() -> None:
    policy = parse_policies(["scissorhands:variant=released"])[0]
    assert not policy.traits.bounded and policy.traits.published
    with pytest.raises(UsageError, match="not defined for full prefill"):
        run(policy, torch.ones(1, 1, 2, 2), [2], kv_heads=1, prompt=1, prefill="full")


@pytest.mark.parametrize("setting", ["history=0", "recent=-1", "lru_window=0", "position_window=-1", "start=-1"])
def test_out_of_range(setting: str) -> None:
    with pytest.raises(UsageError, match="out of range"):
        parse_policies([f"scissorhands:{setting}"])
