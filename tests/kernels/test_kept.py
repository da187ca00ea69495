"""Rows without evicted keys: the kernel compared with the product with the visible keys."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvscope.engine.quantised_steps as module
from kvscope.engine.rows import Block, Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.kernels import triton_available
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention
from tests.kernels.compiling import require_compiles


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


@pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
@pytest.mark.parametrize("keys", [8, 1024])  # at a time
@pytest.mark.parametrize("spec", ["h2o", "tova"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_rows_on_a_gpu(spec: str, dtype: torch.dtype, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernel runs in Triton's interpreter."""
    from kvscope.kernels import kept_triton

    monkeypatch.setattr(kept_triton, "KEYS", keys)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.stack([attention(seed, 1, 4, 30)[0] for seed in (1, 2)]).to(device, dtype)
    simulation = CacheSimulation(
        parse_policies([spec])[0], [6, 9], Shape((0,), 4, 2, 10, 30), "full", dtype=dtype, device=device
    )
    simulation.block(Block(rows[:, None], 0))
    part, leave = rows[:, :, 12:27, :27], simulation.state.leave[:, 0]
    interpreted = device == "cpu"
    kept, total = kept_triton.kept_rows(part, leave, 12) if interpreted else module.kept_of(simulation, part, 12, 27)
    plain = part * simulation.visible(12, 27)[:, 0].repeat_interleave(2, 1)
    assert torch.equal(kept, plain) and bool((kept == 0).any(-1).all())
    torch.testing.assert_close(total, plain.sum(-1, dtype=torch.float64).to(dtype))


@pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
@pytest.mark.parametrize("reads", [False, True])
def test_the_kernel_of_a_gpu_is_called(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse reader holds keys that it does not see."""
    from kvscope.kernels import kept_triton

    called = []
    monkeypatch.setattr(kept_triton, "kept_rows", lambda *given: called.append(given) or (None, None))
    traits, leave = SimpleNamespace(reads=reads), torch.zeros(1, 1, 2, 4)
    simulation: Any = SimpleNamespace(
        plan=SimpleNamespace(policy=SimpleNamespace(traits=traits)), state=SimpleNamespace(leave=leave)
    )
    simulation.visible = lambda start, stop: torch.ones(1, 1, 2, 2, 4, dtype=torch.bool)
    rows: Any = OnDevice(torch.rand(1, 2, 2, 4), "cuda")
    module.kept_of(simulation, rows, 2, 4)
    assert bool(called) is not reads
    if not reads:
        assert called[0][0] is rows and called[0][2] == 2 and torch.equal(called[0][1], leave[:, 0])


class OnDevice:
    """Rows that say which device they are on, as no tensor can here without a GPU."""

    def __init__(self, rows: torch.Tensor, device: str) -> None:
        self.rows, self.shape, self.device = rows, rows.shape, torch.device(device)

    def detach(self) -> Any:
        """Return the rows."""
        return self

    def __mul__(self, other: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        return self.rows * other


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvscope.kernels.kept_triton import _keep

for kind in ("fp32", "fp64"):
    types = {"rows": "*" + kind, "leave": "*i32", "kept": "*" + kind, "total": "*" + kind, "N": "constexpr"}
    signature = {name: types.get(name, "i32") for name in _keep.arg_names}
    source = ASTSource(_keep, signature, {(_keep.arg_names.index("N"),): 1024})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
"""


@pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for CUDA on Linux only")
def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    require_compiles(COMPILE, tmp_path)
