"""Attention maps for tests: random rows, rows with ties and zeros, one key."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvscope.policies.base import Policy
from kvscope.replay.engine import Scan, Shape


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


def run(
    policy: Policy,
    rows: Tensor,
    budgets: list[int],
    *,
    kv_heads: int,
    prompt: int,
    prefill: str,
    windows: tuple[int | None, ...] = (),
    seed: int = 7,
) -> Scan:
    """Return the scan of a policy over ``[L, H, T, T]`` rows, stepped to the end and checked."""
    layers, heads, length, _ = rows.shape
    shape = Shape(tuple(range(layers)), heads, kv_heads, prompt, length, windows=windows)
    scan = Scan(policy, budgets, shape, prefill, signals(policy, layers, kv_heads, length, seed), dtype=rows.dtype)
    for t in range(length):
        scan.step(t, rows[:, :, t, : t + 1])
    scan.check()
    return scan


def signals(policy: Policy, layers: int, kv_heads: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return random norms for whatever the policy needs; a key's depends on its position, not on `length`."""
    result = {}
    for index, name in enumerate(sorted(policy.needs - {"weights"})):
        generator = torch.Generator().manual_seed(seed + index)
        result[name] = torch.rand(512, layers, kv_heads, generator=generator).permute(1, 2, 0)[..., :length] + 0.5
    return result
