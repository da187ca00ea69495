"""kvpress's own live run of a press, and what it retains: found without kvscope, for comparison with a replay."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import kvscope
from kvscope.presses.build import kvpress
from kvscope.presses.support import SUPPORTED

needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason="kvpress is not installed: make test-kvpress")
DEMO = Path(kvscope.__file__).parent / "model" / "demo"
RATIOS = (0.5, 0.8)
OWN_SIZE = [name for name, support in SUPPORTED.items() if support.kind == "own size"]
SIZED = [name for name in SUPPORTED if name not in OWN_SIZE]  # their ratio is set


def press_of(name: str, ratio: float | None = None) -> Any:
    """Return the press of the table's example, at a ratio unless it states its own size."""
    made = eval(SUPPORTED[name].example, dict(vars(kvpress())))
    if ratio is not None:
        made.compression_ratio = ratio
    return made


def model_of(kernel: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Return the bundled model."""
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, attn_implementation=kernel).eval()


@torch.no_grad()
def live(model: Any, ids: Tensor, press: Any, seed: int = 0) -> tuple[list[Tensor], DynamicCache]:
    """Return bool ``[G, P]`` for each layer, what ``with press(model)`` retains of ids ``[P]``, and its cache."""
    full, cut = DynamicCache(), DynamicCache()
    model(ids[None], past_key_values=full, use_cache=True)
    modules = [layer.self_attn for layer in model.model.layers]
    for module in modules:
        module.masked_key_indices = None
    torch.manual_seed(seed)
    with press(model):
        model(ids[None], past_key_values=cut, use_cache=True)
    kept = []
    for module, whole, left in zip(modules, full.layers, cut.layers, strict=True):
        here = torch.zeros(whole.keys.shape[1], len(ids), dtype=torch.bool)
        for head in range(len(here)):
            same = (left.keys[0, head][:, None] == whole.keys[0, head]).all(-1)  # [n, P]
            assert (same.sum(1) == 1).all(), "each key that is left is one of the full cache"
            here[head, same.int().argmax(1)] = True
        if module.masked_key_indices is not None:
            _, heads, positions = module.masked_key_indices
            here[heads, positions] = False
        kept.append(here)
    return kept, cut
