"""FINCH against its plain-loop reference, and against the keys that kvpress keeps."""

import itertools

import pytest

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import LENGTH, PROMPTS_BUDGETS, groups, head_sets, simulations
from tests.policies.test_authors_decisions import attention_of_waves
from tests.reference.policies.finch import finch

CASES = [*PROMPTS_BUDGETS, (24, 13), (22, 4), (23, 11), (10, 9)]


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("finch", {"window": 32}),
        ("finch:window=3", {"window": 3}),
        ("finch:window=3,normalise=false", {"window": 3, "normalise": False}),
        ("finch:window=4,group=max", {"window": 4, "group": "max"}),
        ("finch:window=2,chunk=5", {"window": 2, "chunk": 5}),
        ("finch:window=4,chunk=3,normalise=false", {"window": 4, "chunk": 3, "normalise": False}),
        ("finch:window=1,chunk=1", {"window": 1, "chunk": 1}),
    ],
)
def test_decisions_equal_the_plain_loop(spec: str, settings: dict) -> None:
    for rows, visible, held, prompt, budget in simulations(spec, "full", CASES):
        assert (visible, held) == finch(rows, budget, prompt, **settings)


def test_told_to_go_on_it_ranks_what_is_left_of_a_chunk() -> None:
    plan = EvictionPlan.make(parse_policy("finch:window=2,chunk=4"), "every:4")
    for seed, (prompt, budget) in enumerate([(12, 6), (17, 9), (4, 5)]):
        rows, cut = groups(seed, 4, 2, 2, LENGTH)
        simulation = run(plan, rows, [budget], kv_heads=2, prompt=prompt, prefill="full")
        for layer, head in itertools.product(range(2), range(2)):
            at = {"window": 2, "chunk": 4, "when": lambda t, prompt=prompt: plan.compresses(t, prompt, "full")}
            assert head_sets(simulation, layer, head) == finch(cut[layer][head], budget, prompt, **at)


def test_chunks_retain_equal_shares() -> None:
    rows, _ = groups(3, 4, 2, 2, 41)
    held = run(parse_policy("finch:window=3,chunk=10"), rows, [20], kv_heads=2, prompt=40, prefill="full").held(39, 40)
    assert (held[0, :, :, 0].reshape(2, 2, 4, 10).sum(-1) == 5).all()


# Kept by NVIDIA/kvpress @8bb29b9, `FinchPress` without rotation, of the vectors below: phase, prompt, window, chunk,
# budget, normalised -> keys of each key/value head beside those of the window.
PUBLISHED = [
    (
        (24, 60, 8, None, 24, True),
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 19, 47, 48, 49],
            [0, 5, 7, 8, 9, 11, 12, 14, 16, 21, 43, 45, 47, 48, 49, 51],
        ],
    ),
    (
        (36, 60, 6, 20, 30, True),
        [
            [0, 1, 2, 3, 4, 5, 9, 10, 11, 14, 20, 21, 22, 23, 31, 32, 33, 34, 35, 37, 46, 47, 49, 53],
            [0, 3, 5, 8, 9, 11, 12, 14, 18, 19, 21, 22, 23, 26, 29, 30, 35, 36, 37, 38, 40, 45, 46, 47],
        ],
    ),
    (
        (24, 60, 5, 15, 24, True),
        [
            [0, 2, 3, 4, 5, 11, 18, 19, 20, 21, 22, 23, 31, 35, 37, 39, 40, 44, 47],
            [5, 9, 11, 12, 13, 14, 18, 19, 21, 22, 23, 26, 31, 35, 37, 38, 39, 40, 47],
        ],
    ),
    ((36, 50, 4, 25, 8, False), [[0, 3, 9, 12], [9, 10, 19, 20]]),
    ((1, 30, 12, None, 24, True), [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16], [0, 1, 2, 4, 5, 6, 9, 12, 13, 14, 16, 17]]),
    (
        (1, 30, 12, None, 24, False),
        [[0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 16], [0, 1, 2, 4, 5, 6, 9, 12, 13, 14, 16, 17]],
    ),
]


@pytest.mark.parametrize(("case", "expected"), PUBLISHED)
def test_keys_are_those_that_kvpress_keeps(case: tuple, expected: list[list[int]]) -> None:
    phase, prompt, window, chunk, budget, normalise = case
    rows = attention_of_waves(phase, prompt)
    spec = f"finch:window={window},chunk={chunk},normalise={normalise}"
    simulation = run(parse_policy(spec), rows, [budget], kv_heads=2, prompt=prompt, prefill="full")
    for head in range(2):
        assert head_sets(simulation, 0, head)[1][-1] == set(expected[head]) | set(range(prompt - window, prompt))


@pytest.mark.parametrize("setting", ["window=0", "chunk=0"])
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        parse_policy(f"finch:{setting}")
