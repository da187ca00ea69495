"""Attention maps for tests: random rows, rows with ties and zeros, one key."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvscope.bounds.schedules import schedules
from kvscope.core.options import Prefill
from kvscope.engine.plan import FILTER, GATE, SCORER, EvictionPlan, require_room
from kvscope.engine.rows import Shape
from kvscope.engine.signals import ROWS
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.base import Policy


def attention(seed: int, layers: int, heads: int, length: int, kind: str = "smooth") -> Tensor:
    """Return full rows ``[L, H, T, T]``: causal, summing to one. `kind`: smooth, ties, sparse, half."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, heads, length, length, generator=generator, dtype=torch.float64) * 2
    if kind == "ties":
        logits = logits.round()
    if kind == "sparse":
        logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.4, -torch.inf, logits)
        logits.diagonal(dim1=-2, dim2=-1).fill_(0.0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    rows = torch.softmax(logits.masked_fill(~causal, -torch.inf), -1)
    return rows.half().double() if kind == "half" else rows


KINDS = st.sampled_from(["smooth", "ties", "sparse", "half"])


@torch.inference_mode()
def run(
    policy: Policy | EvictionPlan,
    rows: Tensor,
    budgets: list[int],
    *,
    kv_heads: int,
    prompt: int,
    prefill: str,
    windows: tuple[int | None, ...] = (),
    seed: int = 7,
    given: dict[str, Tensor] | None = None,
) -> CacheSimulation:
    """Return the simulation of a policy over ``[L, H, T, T]`` rows, stepped to the end and checked."""
    plan = policy if isinstance(policy, EvictionPlan) else EvictionPlan.published(policy)
    plan.require(Prefill(prefill))
    for budget in budgets:
        require_room(plan.policy, budget, prompt)
    layers, heads, length, _ = rows.shape
    shape = Shape(tuple(range(layers)), heads, kv_heads, prompt, length, windows=windows)
    given = signals(plan, layers, heads, kv_heads, length, seed) if given is None else given
    if "schedule" in plan.needs:
        best = schedules(lambda layer, a, b: rows[layer, :, a:b], shape, budgets, prefill, plan.policy.traits.scope)
        given = given | {"schedule": best.leaves}
    simulation = CacheSimulation(plan, budgets, shape, prefill, given, dtype=rows.dtype)
    for t in range(length):
        simulation.step(t, rows[:, :, t, : t + 1])
    simulation.check()
    return simulation


NORMS = ("value_l1", "value_l2", "key_l2", "value_out_l1", "reconstruction")
SIZE = 6  # D of the vectors
LONGEST = 512
# rotary embedding of four of the six dimensions: frequencies, partners, signs, factors
TURNS = torch.tensor(
    [[1.0, 0.1, 1.0, 0.1, 0.0, 0.0], [2, 3, 0, 1, 4, 5], [-1, -1, 1, 1, 0, 0], [1.0] * 6], dtype=torch.float64
)


def token_kinds(seed: int, length: int) -> Tensor:
    """Return random classes of tokens ``[T]``: 2 special, 1 punctuation, 0 others; the first is special."""
    drawn = torch.rand(LONGEST, generator=torch.Generator().manual_seed(seed + 100))[:length]
    kinds = (drawn < 0.25).double() + (drawn < 0.1).double()
    kinds[0] = 2
    return kinds


def signals(
    plan: EvictionPlan, layers: int, heads: int, kv_heads: int, length: int, seed: int = 7
) -> dict[str, Tensor]:
    """Return random signals for whatever the plan needs; those of a token depend on its position, not on `length`."""
    shapes = {
        **dict.fromkeys(NORMS, (layers, kv_heads)),
        **dict.fromkeys(("keys", "values"), (layers, kv_heads, SIZE)),
        "queries": (layers, heads, SIZE),
        "mean_query": (layers, SIZE),
        **{GATE + name: (layers, kv_heads) for name in plan.gates},
        **{FILTER + name: (layers, kv_heads) for name in plan.filters},
        **{SCORER + name: (layers, kv_heads) for name in plan.scorers},
    }
    result = {}
    for index, name in enumerate(sorted(plan.needs - ROWS)):
        if name == "rotary":
            result[name] = TURNS.repeat(layers, 1, 1)
            continue
        if name == "token_kinds":
            result[name] = token_kinds(seed, length).expand(layers, kv_heads, -1)
            continue
        generator = torch.Generator().manual_seed(seed + index)
        drawn = torch.randn(LONGEST, *shapes[name], generator=generator, dtype=torch.float64)[:length]
        if name in NORMS:
            result[name] = drawn.abs().permute(1, 2, 0) + 0.5
        elif name == "mean_query":
            result[name] = drawn.permute(1, 0, 2)
        elif name.startswith((FILTER, SCORER)):
            result[name] = drawn.permute(1, 2, 0)
        elif name.startswith(GATE):
            result[name] = torch.tanh(drawn).permute(1, 2, 0) / 2  # at most 1/2, as gate margins
        else:
            result[name] = drawn.permute(1, 2, 0, 3)
    return result
