"""The kernels that step caches compile for a GPU, which the interpreter does not show."""

import sys
from pathlib import Path

import pytest

from kvscope.kernels import triton_available
from tests.kernels.compiling import require_compiles

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvscope.kernels.step_block_triton import REDUCTIONS, _warps
from kvscope.kernels.triton_registers import step_in_registers as kernel

def compiled(reduce, heads, keys, rows, scores, scaled, missing):
    fixed = {"REDUCE": REDUCTIONS[reduce], "HAS_MISSING": missing, "HAS_SCALE": scaled}
    fixed |= {"QB": heads, "N": keys, "BITS": int(scores.removeprefix("fp"))}
    types = dict.fromkeys(["rows", "missing", "scale"], "*" + rows)
    types |= dict.fromkeys(["fixed", "score", "decay"], "*" + scores)
    types |= dict.fromkeys(["alive", "evicts", "bad"], "*u8") | {"leave": "*i32"}
    types |= dict.fromkeys(["count", "evictions", "budget", "sinks", "recent", "windows"], "*i64")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    options = {"num_warps": _warps(keys, heads), "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for given in (
    ("mean", 1, 2048, "fp32", "fp32", True, True),
    ("mean", 8, 2048, "fp32", "fp32", True, True),
    ("none", 1, 1024, "fp32", "fp32", False, False),
    ("max", 2, 1024, "fp64", "fp64", False, False),
    ("sum", 4, 4096, "fp32", "fp64", False, True),
):
    assert compiled(*given).metadata.shared <= 48 * 1024, given
"""
BOUNDS = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvscope.kernels.step_block_triton import REDUCTIONS, _warps
from kvscope.kernels.triton_bounds import bound_scores, step_by_bounds

def compiled(kernel, warps, **fixed):
    types = dict.fromkeys(["rows", "missing", "bounds", "score", "decay"], "*fp32") | {"totals": "*fp64"}
    types |= dict.fromkeys(["alive", "evicts", "bad"], "*u8") | {"leave": "*i32"}
    types |= dict.fromkeys(["count", "evictions", "budget", "sinks", "recent"], "*i64")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for reduce, missing, heads, keys in (("mean", False, 4, 2048), ("max", True, 2, 8192), ("sum", True, 4, 64)):
    given = {"REDUCE": REDUCTIONS[reduce], "HAS_MISSING": missing, "QB": heads, "N": keys}
    made = compiled(bound_scores, _warps(keys, heads), **given)
    step = compiled(step_by_bounds, _warps(keys, 1), **given, BITS=32, H=32, MOST=64)
    assert max(made.metadata.shared, step.metadata.shared) <= 48 * 1024, given
"""


@pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for CUDA on Linux only")
@pytest.mark.parametrize("script", [COMPILE, BOUNDS], ids=["scores", "bounds"])
def test_it_compiles_for_a_gpu(script: str, tmp_path: Path) -> None:
    """Prevents names that are a number in one branch and an address in another."""
    require_compiles(script, tmp_path)
