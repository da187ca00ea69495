"""What the tests of single policies share: comparing a simulation with sets of keys, and the golden input."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention, run

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())
Sets = list[set[int]]
HEADS = [(4, 2), (3, 3), (4, 1)]  # query heads, key/value heads
LENGTH = 26
# prompts shorter than the budget, equal to it and longer; a single key and the whole text
PROMPTS_BUDGETS = [(1, 5), (4, 9), (9, 9), (17, 6), (LENGTH - 1, 1), (12, 2), (20, LENGTH), (3, LENGTH - 1)]


def sets(mask: torch.Tensor) -> Sets:
    """Return the keys of each step, from ``[t, n]``."""
    return [set(itertools.compress(range(len(row)), row)) for row in mask.tolist()]


def simulations(
    spec: str, prefill: str, cases: list[tuple[int, int]] = PROMPTS_BUDGETS
) -> Iterator[tuple[np.ndarray, Sets, Sets, int, int]]:
    """Yield, for many maps: the rows of the query heads that decide as one, ``V_t``, ``R_t``, prompt and budget."""
    policy = parse_policies([spec])[0]
    for seed, ((heads, groups), (prompt, budget)) in enumerate(itertools.product(HEADS, cases)):
        rows = attention(seed, 2, heads, LENGTH)
        simulation = run(policy, rows, [budget], kv_heads=groups, prompt=prompt, prefill=prefill)
        whole = policy.traits.scope == "layer"
        per = heads // groups
        visible, held = simulation.visible(0, LENGTH)[0], simulation.held(0, LENGTH)[0]
        for layer, group in itertools.product(range(2), range(groups)):
            shared = rows[layer] if whole else rows[layer, group * per : (group + 1) * per]
            yield shared.numpy(), sets(visible[layer, group]), sets(held[layer, group]), prompt, budget


def groups(
    seed: int, heads: int, kv_heads: int, layers: int, length: int
) -> tuple[torch.Tensor, list[list[np.ndarray]]]:
    """Return random rows ``[L, H, T, T]``, and those of each layer and key/value head by themselves."""
    rows, per = attention(seed, layers, heads, length), heads // kv_heads
    cut = [[layer[head * per : (head + 1) * per].numpy() for head in range(kv_heads)] for layer in rows]
    return rows, cut


def head_sets(simulation: CacheSimulation, layer: int, head: int) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` of one head of a simulation of one budget."""
    length = simulation.shape.length
    return sets(simulation.visible(0, length)[0, layer, head]), sets(simulation.held(0, length)[0, layer, head])


def golden(policy: str, variant: str, **params: float) -> dict[str, Any]:
    """Return the golden case of a policy."""
    return next(
        case
        for case in GOLDEN["cases"]
        if case["policy"] == policy and variant in case.get("variant", "") and params.items() <= case["params"].items()
    )


def golden_rows(length: int = GOLDEN["tokens"]) -> torch.Tensor:
    """Return the fixed input as full rows ``[1, H, length, length]`` in float64."""
    heads = GOLDEN["heads"]
    h, q, k = torch.meshgrid(torch.arange(heads), torch.arange(length), torch.arange(length), indexing="ij")
    z = (37 * q + 61 * k + 17 * q * k + 101 * h * (k + 1) + 29 * (k**2 % 7)) % 997 / 250
    return torch.softmax(torch.where(k <= q, z.double(), -torch.inf), -1)[None]


@torch.inference_mode()
def golden_simulation(
    policy: str | Policy, budget: int, prefill: str, length: int = GOLDEN["tokens"]
) -> CacheSimulation:
    """Return a policy's simulation of the fixed input."""
    rows = golden_rows(length)
    heads = rows.shape[1]
    shape = Shape(layers=(0,), heads=heads, kv_heads=heads, prompt=GOLDEN["prompt"], length=length)
    simulation = CacheSimulation(parse_policies([policy])[0], [budget], shape, prefill, dtype=torch.float64)
    for t in range(length):
        simulation.step(t, rows[:, :, t, : t + 1])
    simulation.check()
    return simulation


def heads_at(mask: torch.Tensor, step: int) -> list[list[int]]:
    """Return the key lists of the heads at one step, from ``[1, 1, G, t, n]``."""
    return [head.nonzero().flatten().tolist() for head in mask[0, 0, :, step]]
