"""ChunkKV against its plain-loop reference, and against the keys that kvpress keeps."""

import itertools

import pytest

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import LENGTH, PROMPTS_BUDGETS, groups, head_sets, simulations
from tests.policies.test_authors_decisions import attention_of_waves
from tests.reference.policies.chunkkv import chunkkv

CASES = [*PROMPTS_BUDGETS, (24, 13), (22, 4), (23, 11), (10, 9)]


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("chunkkv", {"chunk": 10, "window": 64}),
        ("chunkkv:chunk=3,window=2", {"chunk": 3, "window": 2}),
        ("chunkkv:chunk=4,window=3,chunk_score=mean", {"chunk": 4, "window": 3, "mean": True}),
        ("chunkkv:chunk=1,window=2,scope=kv_head", {"chunk": 1, "window": 2}),
        ("chunkkv:chunk=3,window=2,scope=kv_head,group=max", {"chunk": 3, "window": 2, "group": "max"}),
        ("chunkkv:chunk=3,window=3,pooling=avg,kernel=3", {"chunk": 3, "window": 3, "pooling": "avg", "kernel": 3}),
        ("chunkkv:chunk=5,window=1,pooling=max", {"chunk": 5, "window": 1, "pooling": "max"}),
    ],
)
def test_decisions_equal_the_plain_loop(spec: str, settings: dict) -> None:
    for rows, visible, held, prompt, budget in simulations(spec, "full", CASES):
        assert (visible, held) == chunkkv(rows, budget, prompt, **settings)


def test_told_to_go_on_it_counts_what_is_left_of_a_chunk() -> None:
    policy = "chunkkv:chunk=3,window=2,scope=kv_head"
    plan = EvictionPlan.make(parse_policy(policy), "every:4")
    for seed, (prompt, budget) in enumerate([(12, 6), (17, 9), (4, 5)]):
        rows, cut = groups(seed, 4, 2, 2, LENGTH)
        simulation = run(plan, rows, [budget], kv_heads=2, prompt=prompt, prefill="full")
        for layer, head in itertools.product(range(2), range(2)):
            at = {"chunk": 3, "window": 2, "when": lambda t, prompt=prompt: plan.compresses(t, prompt, "full")}
            assert head_sets(simulation, layer, head) == chunkkv(cut[layer][head], budget, prompt, **at)


def test_whole_chunks_and_the_newest_keys_of_the_one_that_is_cut() -> None:
    rows, _ = groups(2, 4, 2, 2, 30)
    simulation = run(parse_policy("chunkkv:chunk=5,window=3"), rows, [14], kv_heads=2, prompt=28, prefill="full")
    for layer in range(2):
        kept = head_sets(simulation, layer, 0)[1][27] - {25, 26, 27}
        chunks = [sorted(key for key in kept if key // 5 == chunk) for chunk in range(6)]
        whole = [part for part in chunks if len(part) == 5]
        (cut,) = [part for part in chunks if 0 < len(part) < 5]
        assert len(whole) == 2 and cut == list(range(cut[-1] - len(cut) + 1, cut[-1] + 1)) and cut[-1] % 5 == 4


# Kept by NVIDIA/kvpress @8bb29b9, `ChunkKVPress` over `SnapKVPress.score` of the vectors below, with a window that ends
# and begins a chunk: phase, prompt, window, kernel, chunk, compression ratio -> first keys of the whole chunks.
PUBLISHED = [
    ((24, 60, 10, 5, 10, 0.5), [0, 10, 50]),
    ((36, 60, 10, 5, 10, 0.66), [0, 50]),
    ((24, 60, 8, 1, 4, 0.6), [0, 4, 12, 48, 52, 56]),
    ((36, 67, 7, 5, 10, 0.55), [10, 50, 60]),
    ((24, 53, 3, 1, 5, 0.7), [0, 40, 50]),
]


@pytest.mark.parametrize(("case", "first"), PUBLISHED)
def test_chunks_are_those_that_kvpress_keeps(case: tuple[int, int, int, int, int, float], first: list[int]) -> None:
    phase, prompt, window, kernel, chunk, _ = case
    rows = attention_of_waves(phase, prompt)
    expected = {key for start in first for key in range(start, min(start + chunk, prompt))}
    spec = f"chunkkv:window={window},kernel={kernel},pooling=avg,chunk={chunk},chunk_score=mean"
    simulation = run(parse_policy(spec), rows, [len(expected)], kv_heads=2, prompt=prompt, prefill="full")
    assert head_sets(simulation, 0, 0)[1][-1] == head_sets(simulation, 0, 1)[1][-1] == expected


def test_what_is_generated_stays() -> None:
    for _, visible, held, prompt, budget in simulations("chunkkv", "full", [(17, 6), (LENGTH - 1, 2)]):
        kept = held[prompt - 1]
        assert len(kept) == budget
        assert held[prompt:] == visible[prompt:] == [kept | set(range(prompt, t + 1)) for t in range(prompt, LENGTH)]


@pytest.mark.parametrize("setting", ["chunk=0", "window=0", "kernel=4"])
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        parse_policy(f"chunkkv:{setting}")
