"""SnapKV against its plain-loop reference."""

import itertools

import numpy as np
import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import HEADS, LENGTH, PROMPTS_BUDGETS, groups, head_sets, simulations
from tests.reference.policies import snapkv as reference

# also: a window of half of the budget, fewer older keys than the kernel, a prompt of one key more than fits
CASES = [*PROMPTS_BUDGETS, (24, 13), (22, 4), (8, 7), (10, 9)]


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("snapkv", {"window": 64, "kernel": 5, "pooling": "avg"}),
        ("snapkv:window=3,kernel=3,pooling=max", {"window": 3, "kernel": 3, "pooling": "max"}),
        ("snapkv:window=2,pooling=none", {"window": 2, "kernel": 5, "pooling": "none"}),
        ("snapkv:window=1,kernel=7,group=max", {"window": 1, "kernel": 7, "pooling": "avg", "group": "max"}),
        ("snapkv:window=4,kernel=3,group=max", {"window": 4, "kernel": 3, "pooling": "avg", "group": "max"}),
        (
            "snapkv:window=4,kernel=3,group=max,reduce=rows",
            {"window": 4, "kernel": 3, "pooling": "avg", "group": "max", "reduce": "rows"},
        ),
        ("snapkv:window=4,group=sum", {"window": 4, "kernel": 5, "pooling": "avg", "group": "sum"}),
    ],
)
def test_decisions_equal_the_plain_loop(spec: str, settings: dict) -> None:
    for rows, visible, held, prompt, budget in simulations(spec, "full", CASES):
        assert (visible, held) == reference.snapkv(rows, budget, prompt, **settings)


# Kept by Zefan-Cai/KVCache-Factory @c97f9d7, `_grouped_window_attn_cache` with gqa_score_agg "max" and its top-k, with
# the window of 8 keys: phase of the vectors -> keys of each key/value head.
PUBLISHED = {
    24: [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [6, 7, 10, 12, 13, 14, 15, 16, 47, 49, 50, 51]],
    36: [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 45], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 45, 49]],
}


def waves(heads: int, phase: float) -> np.ndarray:
    """Return vectors ``[heads, 60, 16]`` without ties."""
    h, i, d = np.meshgrid(np.arange(heads), np.arange(60), np.arange(16), indexing="ij")
    return np.sin(phase + 2.3 * h + 0.71 * (i + 1) * (d + 1) + 0.13 * i * i) * 1.5


@pytest.mark.parametrize("phase", PUBLISHED)
def test_the_largest_votes_of_a_group_decide_as_in_the_published_code(phase: int) -> None:
    query, key = waves(4, phase), waves(2, phase + 0.5)[:, ::-1]
    logits = np.einsum("hid,hjd->hij", query, np.repeat(key, 2, 0)) / 4
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * np.tril(np.ones((60, 60)))
    rows = torch.tensor(weights / weights.sum(-1, keepdims=True))[None]
    held = {
        reduce: [
            head_sets(run(parse_policy(spec), rows, [20], kv_heads=2, prompt=60, prefill="full"), 0, head)[1][-1]
            for head in range(2)
        ]
        for reduce in ("scores", "rows")
        if (spec := f"snapkv:window=8,kernel=5,group=max,reduce={reduce}")
    }
    expected = [set(keys) | set(range(52, 60)) for keys in PUBLISHED[phase]]
    assert held["scores"] == expected
    assert held["rows"] != expected


@pytest.mark.parametrize("phase", ["step", "every:4"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_told_to_go_on_it_pools_over_what_is_left(phase: str, pooling: str) -> None:
    plan = EvictionPlan.make(parse_policy(f"snapkv:window=3,kernel=3,pooling={pooling}"), phase)
    for seed, (prompt, budget) in enumerate([(12, 6), (17, 9), (4, 5), (9, 1)]):
        rows, cut = groups(seed, 4, 2, 2, LENGTH)
        simulation = run(plan, rows, [budget], kv_heads=2, prompt=prompt, prefill="full")
        for layer, head in itertools.product(range(2), range(2)):
            expected = reference.snapkv(
                cut[layer][head],
                budget,
                prompt,
                window=3,
                kernel=3,
                pooling=pooling,
                when=lambda t, prompt=prompt: plan.compresses(t, prompt, "full"),
            )
            assert head_sets(simulation, layer, head) == expected


def test_what_is_generated_stays() -> None:
    for _, visible, held, prompt, budget in simulations("snapkv", "full", [(17, 6), (LENGTH - 1, 2)]):
        kept = held[prompt - 1]
        assert len(kept) == budget
        assert held[prompt:] == visible[prompt:] == [kept | set(range(prompt, t + 1)) for t in range(prompt, LENGTH)]


def test_budgets_in_one_scan_equal_one_by_one() -> None:
    """Each has a window of its own."""
    rows, _ = groups(3, 4, 2, 2, 40)
    policy = parse_policy("snapkv:window=5")
    together = run(policy, rows, [1, 6, 25], kv_heads=2, prompt=30, prefill="full")
    for index, budget in enumerate([1, 6, 25]):
        alone = run(policy, rows, [budget], kv_heads=2, prompt=30, prefill="full")
        assert torch.equal(together.state.leave[index], alone.state.leave[0])


@pytest.mark.parametrize(
    ("setting", "why"),
    [("window=0", "window=0 is out of range"), ("kernel=4", "kernel"), ("kernel=0", "kernel=0 is out of range")],
)
def test_what_is_refused(setting: str, why: str) -> None:
    for name in ("snapkv", "pyramidkv", "ada-kv", "cake"):
        with pytest.raises(UsageError, match=why):
            parse_policy(f"{name}:{setting}")


@pytest.mark.parametrize("heads", HEADS)
def test_pooling_changes_decisions(heads: tuple[int, int]) -> None:
    """Were the neighbours forgotten, this alone would tell."""
    rows, _ = groups(8, *heads, 2, 40)
    at = {"kv_heads": heads[1], "prompt": 30, "prefill": "full"}
    kinds = [
        run(parse_policy(f"snapkv:pooling={kind}"), rows, [10], **at).state.leave for kind in ("avg", "max", "none")
    ]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(kinds, 2))


def test_the_defaults_are_those_of_the_codes() -> None:
    known = {
        "snapkv": {"window": 64, "kernel": 5, "pooling": "avg"},
        "pyramidkv": {"window": 64, "kernel": 5, "pooling": "avg"},
        "ada-kv": {"window": 32, "kernel": 7, "pooling": "max"},
        "cake": {"window": 32, "gamma": 200.0, "kernel": 5, "pooling": "avg"},
    }
    for name, expected in known.items():
        assert parse_policy(name).parameters() == {**expected, "group": "mean", "reduce": "scores"}
