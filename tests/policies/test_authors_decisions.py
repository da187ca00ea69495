"""Decisions of authors' code, run on the vectors of a formula, and those of the policies on the same vectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.outputs import OutputProjection
from kvscope.policies.spec import parse_policy

CASES = json.loads((Path(__file__).parents[1] / "data" / "authors_decisions.json").read_text())["cases"]
SIZE = 16
HALF = torch.arange(SIZE // 2, dtype=torch.float64)
TURNED = torch.stack(  # the rotary embedding of a Llama of base 10000
    [
        (10000 ** (-HALF / HALF.numel())).repeat(2),
        torch.cat([HALF + HALF.numel(), HALF]),
        torch.tensor([-1.0, 1.0]).repeat_interleave(SIZE // 2),
        torch.ones(SIZE),
    ]
)


def waves(heads: int, phase: float, length: int, size: int = SIZE) -> torch.Tensor:
    """Return vectors ``[heads, length, 16]`` in float64, whose weights have no ties."""
    h, i, d = np.meshgrid(np.arange(heads), np.arange(length), np.arange(size), indexing="ij")
    return torch.tensor(np.sin(phase + 2.3 * h + 0.71 * (i + 1) * (d + 1) + 0.13 * i * i) * 1.5)


def causal(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the causal attention ``[L, H, T, T]`` of queries ``[L, H, T, D]`` over keys ``[L, G, T, D]``."""
    logits = queries @ keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1).transpose(-1, -2) / SIZE**0.5
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def attention_of_waves(phase: float, length: int) -> torch.Tensor:
    """Return the causal attention of four query heads over two key/value heads of such vectors, ``[1, 4, T, T]``."""
    return causal(waves(4, phase, length)[None], waves(2, phase + 0.5, length).flip(1)[None])


def projected(phase: float, values: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the norms ``[G, T]`` of values ``[G, T, 16]`` after an output projection of the formula, to 96 numbers."""
    weight = waves(1, phase + 2, heads * SIZE, 96)[0].view(heads, SIZE, 96)
    return OutputProjection(weight).norms(values)


def along_filters(keys: torch.Tensor) -> torch.Tensor:
    """Return the products ``[G, T]`` of keys ``[G, T, 16]`` with filters of the formula, of the sign of kvscope."""
    return -(keys * waves(1, 0.7, len(keys))[0][:, None]).sum(-1)


def simulated(case: dict[str, Any]) -> CacheSimulation:
    """Return the simulation of a case's policy over the causal attention of its vectors."""
    length, heads, kv_heads = case["length"], case["heads"], case["kv_heads"]
    phases = [case["phase"] + layer for layer in range(case["layers"])]
    queries = torch.stack([waves(heads, phase, length) for phase in phases])
    keys = torch.stack([waves(kv_heads, phase + 0.5, length).flip(1) for phase in phases])
    values = torch.stack([waves(kv_heads, phase + 1, length) for phase in phases])
    rows = causal(queries, keys)
    signals = {
        "keys": keys,
        "values": values,
        "queries": queries,
        "mean_query": queries.mean(1),
        "key_l2": keys.norm(dim=-1),
        "value_l1": values.abs().sum(-1),
        "value_l2": values.norm(dim=-1),
        "value_out_l1": torch.stack(list(map(projected, phases, values, [heads] * len(phases)))),
        "filter:demo": torch.stack([along_filters(own) for own in keys]),
        "rotary": TURNED.repeat(len(phases), 1, 1),
    }
    policy = parse_policy(case["policy"])
    needed = {name: signal for name, signal in signals.items() if name in policy.traits.needs}
    shape = Shape(tuple(range(len(phases))), heads, kv_heads, case["prompt"], length)
    simulation = CacheSimulation(policy, [case["budget"]], shape, case["prefill"], needed, dtype=torch.float64)
    for t in range(length):
        simulation.step(t, rows[:, :, t, : t + 1])
    simulation.check()
    return simulation


@pytest.mark.parametrize("case", CASES, ids=[f"{case['policy']} {case['phase']}" for case in CASES])
def test_the_decisions_are_those_of_the_authors_code(case: dict[str, Any]) -> None:
    simulation = simulated(case)
    masks = simulation.visible(0, case["length"]) if case["what"] == "visible" else simulation.held(0, case["length"])
    for step, layers in case["kept"].items():
        made = [[head[int(step)].nonzero().flatten().tolist() for head in layer] for layer in masks[0]]
        if case["policy"].startswith("quest"):  # there the query's own key is seen only if its page is selected
            made, layers = (without(int(step), made), without(int(step), layers))
        assert made == layers, f"step {step}"


def without(key: int, layers: list[list[list[int]]]) -> list[list[list[int]]]:
    """Return lists of keys without one of them."""
    return [[[each for each in head if each != key] for head in layer] for layer in layers]


def test_each_case_evicts() -> None:
    for case in CASES:
        last = max(case["kept"], key=int)
        assert all(len(head) <= int(last) for layer in case["kept"][last] for head in layer), case["policy"]
