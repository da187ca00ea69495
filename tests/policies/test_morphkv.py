"""MorphKV against a loop over the logits of its last queries."""

import itertools

import numpy as np
import pytest
import torch

from kvscope.core.residency import NEVER
from kvscope.kernels import device as devices
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import HEADS, LENGTH, PROMPTS_BUDGETS, sets
from tests.reference.policies import morphkv as reference

CASES = [*[case for case in PROMPTS_BUDGETS if case[1] >= 2], (2, 3), (23, 14)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(
    ("spec", "window", "fuse"),
    [("morphkv", 200, "max"), ("morphkv:window=2", 2, "max"), ("morphkv:window=3,fuse=sum", 3, "sum")],
)
def test_the_last_queries_decide(spec: str, window: int, fuse: str, prefill: str) -> None:
    for seed, ((heads, groups), (prompt, budget)) in enumerate(itertools.product(HEADS, CASES)):
        rows = attention(seed, 2, heads, LENGTH)
        simulation = run(parse_policy(spec), rows, [budget], kv_heads=groups, prompt=prompt, prefill=prefill)
        shift = np.random.default_rng(seed).normal(size=(2, heads, LENGTH, 1))  # logits are known up to a constant
        with np.errstate(divide="ignore"):
            logits = np.log(rows.numpy()) + shift
        per = heads // groups
        for layer, group in itertools.product(range(2), range(groups)):
            own = logits[layer, group * per : (group + 1) * per]
            visible, held = reference.held(own, budget - 1, min(window, budget // 2), prompt, prefill, fuse)
            assert sets(simulation.visible(0, LENGTH)[0, layer, group]) == visible
            assert sets(simulation.held(0, LENGTH)[0, layer, group]) == held


def test_budgets_in_one_scan_equal_one_by_one() -> None:
    """Each has a window of its own."""
    rows = attention(3, 2, 4, 40)
    for spec in ("morphkv", "morphkv:window=4,fuse=sum"):
        together = run(parse_policy(spec), rows, [1, 2, 7, 16], kv_heads=2, prompt=10, prefill="full")
        for index, budget in enumerate([1, 2, 7, 16]):
            alone = run(parse_policy(spec), rows, [budget], kv_heads=2, prompt=10, prefill="full")
            assert torch.equal(together.state.leave[index], alone.state.leave[0])


def test_two_keys_are_a_window() -> None:
    rows = attention(3, 1, 2, 20)
    for budget in (1, 2):
        made = run(parse_policy("morphkv"), rows, [budget], kv_heads=2, prompt=5, prefill="full")
        window = run(parse_policy("window"), rows, [budget], kv_heads=2, prompt=5, prefill="full")
        assert torch.equal(made.held(0, 20), window.held(0, 20))


def test_weights_of_zero_are_no_accident() -> None:
    """Recorded weights underflow: a row that has nothing for any candidate says nothing about them."""
    rows = attention(9, 2, 4, 30, "sparse")
    rows[:, :, 10] = 0.0
    rows[:, :, 10, 10] = 1.0
    run(parse_policy("morphkv:window=3"), rows, [8], kv_heads=2, prompt=6, prefill="full")


def test_tiny_shares_are_no_accident() -> None:
    """One over the smallest float32 is infinite, and infinity times nothing is no number."""
    rows = attention(5, 1, 2, 12)
    rows *= torch.where(torch.eye(12, dtype=torch.bool), 1.0, 3e-20)  # of two heads, a product that float32 just holds
    run(parse_policy("morphkv"), rows.float(), [6], kv_heads=1, prompt=6, prefill="full")


@pytest.mark.parametrize("spec", ["morphkv", "morphkv:window=4,fuse=sum"])
def test_runs_one_by_one_decide_as_runs_padded_to_one_size(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first form is for a CPU, the second for a GPU; a GPU is never asked how many keys there are."""
    forms = []
    for on_cpu in (True, False):
        monkeypatch.setattr(devices, "on_cpu", lambda device, answer=on_cpu: answer)
        simulations = [
            run(parse_policy(spec), rows, [1, 2, 7, 16, 40], kv_heads=2, prompt=prompt, prefill=prefill)
            for kind in ("dense", "sparse")
            for rows in [attention(11, 2, 4, 60, kind)]
            for prompt, prefill in ((10, "full"), (45, "full"), (1, "stream"))
        ]
        forms.append([simulation.state.leave for simulation in simulations])
    assert all(torch.equal(one, padded) for one, padded in zip(*forms, strict=True))
    assert all((leave < NEVER).any() for leave in forms[0])
