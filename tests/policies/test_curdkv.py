"""CurDKV against its plain-loop reference; kvpress's decisions are in test_kvpress_decisions.py."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.policies.curdkv import CurDKV
from tests.policies.loops import BUDGET, PROMPT, evicted_in_both, recorded
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.curdkv import scores
from tests.reference.policies.loop import evict


@pytest.mark.parametrize(
    ("kv_heads", "phase", "combine", "window", "sinks"),
    [
        (*pair, *rest)
        for pair, rest in product(product([2, 4], ["prefill", "every:5"]), [("product", 4, 2), ("key", 7, 0)])
    ]
    + [(2, "step", "mean", 0, 4), (2, "prefill", "value", 16, 4)],
)
def test_decisions_equal_the_plain_loop(kv_heads: int, phase: str, combine: str, window: int, sinks: int) -> None:
    shape = Shape((0, 1), 4, kv_heads, 17, 30)
    signals = vectors(11, shape)
    policy = CurDKV(combine=combine, window=window, sinks=sinks)  # type: ignore[arg-type]
    plan, budgets = EvictionPlan(policy, phase, "uniform"), [5, 9, 30]
    given = {name: signals[name] for name in ("keys", "values")}
    simulation, _ = simulated(plan, budgets, shape, "full", given)
    held = simulation.held(0, 30)
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        keys, values = (signals[name][layer, head].numpy() for name in ("keys", "values"))
        expected = evict(
            30,
            budget,
            lambda t: plan.compresses(t, 17, "full"),
            lambda t, visible, k=keys, v=values: scores(k, v, visible, combine=combine, window=window),
            sinks=sinks,
        )
        assert sets(held[run, layer, head]) == expected
    assert (held[1, ..., -1, :] != held[1, :1, :1, -1, :]).any(), "heads decide for themselves"


def test_both_loops_evict_the_same_keys_of_a_prompt(tmp_path: Path) -> None:
    opened, decoded = evicted_in_both(recorded(tmp_path), "curdkv:window=4,sinks=1", tmp_path)
    assert np.array_equal(opened, decoded) and (opened.sum(-1) == PROMPT - BUDGET).all()
