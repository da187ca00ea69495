"""Blends of two policies against a plain loop."""

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import simulations
from tests.reference.policies.combined import combined, last_row, newest, summed

CASES = [(1, 5), (4, 9), (9, 9), (17, 6), (25, 5), (12, 7), (20, 26), (3, 25)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(
    ("spec", "members", "settings"),
    [
        ("blend(h2o(recent=0), tova(scope=kv_head))", (summed, last_row), {"weight": 0.5}),
        ("blend(a2sf(alpha=0.7), window, weight=0.3)", (lambda: summed(0.7), newest), {"weight": 0.3}),
        (
            "blend(h2o(recent=2), tova(scope=kv_head), weight=0.6, by=sum-to-one)",
            (summed, last_row),
            {"weight": 0.6, "by": "sum-to-one", "recent": 2},
        ),
        (
            "blend(tova(scope=kv_head, sinks=1), window, weight=0.8, by=sum-to-one)",
            (last_row, newest),
            {"weight": 0.8, "by": "sum-to-one", "sinks": 1},
        ),
    ],
)
def test_decisions_equal_the_plain_loop(spec: str, members: tuple, settings: dict, prefill: str) -> None:
    for rows, visible, held, prompt, budget in simulations(spec, prefill, CASES):
        assert (visible, held) == combined(rows, budget, prompt, prefill, members[0](), members[1](), **settings)


def test_all_the_weight_makes_it_one_of_the_two() -> None:
    rows = attention(3, 2, 4, 40)
    at = {"kv_heads": 2, "prompt": 20, "prefill": "full"}
    for weight, member in ((1, "a2sf"), (0, "a2sf(alpha=0.9)")):
        for by in ("rank", "sum-to-one"):
            made = run(parse_policy(f"blend(a2sf, a2sf(alpha=0.9), weight={weight}, by={by})"), rows, [11], **at)
            assert torch.equal(made.visible(0, 40), run(parse_policy(member), rows, [11], **at).visible(0, 40))


def test_negative_scores_are_shares_too() -> None:
    rows = attention(4, 1, 2, 40)
    made = run(
        parse_policy("blend(key-norm, tova, weight=1, by=sum-to-one)"), rows, [9], kv_heads=2, prompt=20, prefill="full"
    )
    alone = run(parse_policy("key-norm"), rows, [9], kv_heads=2, prompt=20, prefill="full")
    assert torch.equal(made.visible(0, 40), alone.visible(0, 40))


@pytest.mark.parametrize("setting", ["weight=1.5", "weight=-0.1", "by=size"])
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        parse_policy(f"blend(h2o, tova, {setting})")
