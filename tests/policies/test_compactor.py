"""Compactor against its plain-loop reference; kvpress's decisions are in test_kvpress_decisions.py."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.policies.compactor import Compactor, sketch_of
from tests.engine.maps import TURNS
from tests.policies.loops import BUDGET, PROMPT, evicted_in_both, recorded
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.compactor import scores

PAIRS = [(0, 2, 1.0), (1, 3, 0.1)]  # what TURNS says
T, P = 30, 19


def expected(policy: Compactor, plan: EvictionPlan, signals: dict[str, Any], kv_heads: int, budget: int) -> Any:
    """Return the keys of each step of all heads of one layer."""
    kept = policy.protect(budget)
    held: list[set[int]] = [set() for _ in range(kv_heads)]
    steps = []
    keys, values = signals["keys"].numpy(), signals["values"].numpy()
    queries = signals["queries"].view(kv_heads, -1, *signals["queries"].shape[1:]).numpy()
    for t in range(T):
        held = [head | {t} for head in held]
        if plan.compresses(t, P, "full") and len(held[0]) > budget:
            made = scores(
                keys,
                values,
                queries,
                [sorted(head) for head in held],
                PAIRS,
                sketch_of(policy.seed, keys.shape[-1], policy.sketch).numpy(),
                sinks=kept.sinks,
                newest=t - kept.recent,
                budget=budget,
                chunk=policy.chunk,
                blend=policy.blend,
            )
            for head in range(kv_heads):
                free = [key for key in sorted(held[head]) if kept.sinks <= key <= t - kept.recent]
                gone = sorted(free, key=lambda key: made[head][key])[: len(held[head]) - budget]
                held[head] = held[head] - set(gone)
        steps.append(held)
    return steps


@pytest.mark.parametrize(
    ("kv_heads", "phase", "options"),
    list(
        product(
            [2, 4],
            ["prefill", "every:5"],
            [{"chunk": 4, "sinks": 2, "recent": 1}, {"chunk": 64, "sketch": 3, "blend": 0.7, "seed": 4}],
        )
    ),
)
def test_decisions_equal_the_plain_loop(kv_heads: int, phase: str, options: dict[str, Any]) -> None:
    shape = Shape((0, 1), 4, kv_heads, P, T)
    signals = {name: signal for name, signal in vectors(11, shape, 6).items() if name != "mean_query"}
    policy = Compactor(**options)
    plan, budgets = EvictionPlan(policy, phase, "uniform"), [5, 14, T]
    simulation, _ = simulated(plan, budgets, shape, "full", signals | {"rotary": TURNS.repeat(2, 1, 1)})
    held = simulation.held(0, T)
    for (run, budget), layer in product(enumerate(budgets), range(2)):
        own = {name: signal[layer] for name, signal in signals.items()}
        steps = expected(policy, plan, own, kv_heads, budget)
        for head in range(kv_heads):
            assert sets(held[run, layer, head]) == [step[head] for step in steps]
    assert (held[0, ..., -1, :] != held[0, :1, :1, -1, :]).any(), "heads decide for themselves"


def test_leverage_and_attention_both_count() -> None:
    shape = Shape((0, 1), 4, 2, P, T)
    signals = {name: signal for name, signal in vectors(11, shape, 6).items() if name != "mean_query"}
    signals |= {"rotary": TURNS.repeat(2, 1, 1)}
    left = [
        simulated(Compactor(sinks=2, recent=1, **options), [9], shape, "full", signals)[0].state.leave
        for options in ({}, {"blend": 0.0}, {"blend": 9.0}, {"blend": 9.0, "sketch": 2})
    ]
    assert all(not torch.equal(left[one], left[two]) for one in range(4) for two in range(one))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_both_loops_evict_the_same_keys_of_a_prompt(name: str, tmp_path: Path) -> None:
    opened, decoded = evicted_in_both(recorded(tmp_path, name), "compactor:sinks=2,recent=1,chunk=8", tmp_path, name)
    assert np.array_equal(opened, decoded) and (opened.sum(-1) == PROMPT - BUDGET).all()
