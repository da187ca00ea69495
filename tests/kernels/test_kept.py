"""Rows without evicted keys: the kernel compared with the product with the visible keys."""

from __future__ import annotations

import pytest
import torch

import kvscope.engine.quantised_steps as module
from kvscope.engine.rows import Block, Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention


@pytest.mark.parametrize("spec", ["h2o", "tova"])  # decided per head, and per layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_rows(spec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.stack([attention(seed, 1, 4, 30)[0] for seed in (1, 2)]).to(dtype)  # [R, H, T, T]
    simulation = CacheSimulation(parse_policies([spec])[0], [6, 9], Shape((0,), 4, 2, 10, 30), "full", dtype=dtype)
    simulation.block(Block(rows[:, None], 0))
    part = rows[:, :, 12:]
    kept, total = module.kept_of(simulation, part, 12, 30)
    monkeypatch.setattr(module, "available", lambda: False)
    plain, sums = module.kept_of(simulation, part, 12, 30)
    assert torch.equal(kept, plain) and bool((kept == 0).any(-1).all())
    assert torch.allclose(total, sums, rtol=1e-6)
