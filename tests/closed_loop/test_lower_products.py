"""Products of matrices below float64 are noticed, and those of rotary positions are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvscope.closed_loop.lower_products import LowerProducts
from tests.model.tiny import MODELS, build, tokens
from tests.models.build import build as built


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", False), ("gemma3", False), ("gpt2", False), ("opt", False), ("mimo_v2_flash", True)],
)
def test_a_router_in_float32_is_found(name: str, expected: bool) -> None:
    model = (build(name) if name in MODELS else built(name)).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # as a model is loaded in float64
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), LowerProducts() as lower:
            model(input_ids=tokens(6))
        assert lower.found is expected


def test_what_is_computed_stays_the_same() -> None:
    model = build("llama").double()
    with torch.no_grad():
        plain = model(input_ids=tokens(6)).logits
        with LowerProducts():
            watched = model(input_ids=tokens(6)).logits
    assert torch.equal(plain, watched)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    ("dtype", "entries", "expected"),
    [(torch.float32, 2, True), (torch.bfloat16, 2, True), (torch.float64, 2, False), (torch.float32, 1, False)],
)
def test_products_by_dtype_and_entries(mode: Any, dtype: torch.dtype, entries: int, expected: bool) -> None:
    """A product over one entry, as rotary positions are made, adds nothing."""
    one, other = torch.ones(3, entries, dtype=dtype), torch.ones(entries, 4, dtype=dtype)
    bias = torch.ones(4, dtype=dtype)
    products = [
        lambda: one @ other,
        lambda: one[None] @ other[None],
        lambda: torch.nn.functional.linear(one, other.T),
        lambda: torch.nn.functional.linear(one, other.T, bias),
        lambda: torch.addmm(bias, one, other),
        lambda: torch.baddbmm(bias, one[None], other[None]),
    ]
    for product in products:
        with mode(), LowerProducts() as lower:
            product()
        assert lower.found is expected
