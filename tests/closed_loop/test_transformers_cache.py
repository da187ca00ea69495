"""A cache of kind ``quanto`` is the one that transformers quantises: decoding with its `QuantizedCache` is the same.

What transformers does with a layer's keys and values, and when, is its own code here. How quanto makes codes is written
out, and compared with what quanto 0.2.7 made of the same numbers; where quanto is installed it is used itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer

from kvscope.closed_loop.compile import compile_closed_loop
from kvscope.closed_loop.job import ForwardPass
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import TOLERANCE
from kvscope.core.budget import parse_budgets
from kvscope.core.cache_scheme import CacheScheme, parse_caches
from kvscope.core.options import Loop, Positions, Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.policies.spec import parse_policy
from kvscope.quantisation.layer import read_values
from kvscope.trace.reader import TokenSequence
from tests.model.tiny import build, tokens

LENGTH, PROMPT, GROUP = 26, 12, 4
MADE = json.loads((Path(__file__).parents[1] / "data" / "quanto_codes.json").read_text())


class Formula(QuantizedLayer):
    """Groups of consecutive numbers, each with its least number and a scale, in the dtype of the numbers."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
        assert axis == 0
        groups = tensor.reshape(-1, self.q_group_size)
        low, high = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
        scale = (high - low) / (2**self.nbits - 1)
        codes = torch.round((groups - low) / scale).clamp(0, 2**self.nbits - 1)
        return codes.to(torch.uint8), scale, low, tensor.shape

    def _dequantize(self, coded: tuple[Tensor, Tensor, Tensor, torch.Size]) -> Tensor:
        codes, scale, low, shape = coded
        return (codes * scale + low).reshape(shape)


def layer_of(how: str, bits: int, residual: int) -> Any:
    if how == "formula":
        return Formula(nbits=bits, q_group_size=GROUP, residual_length=residual)
    pytest.importorskip("optimum.quanto")
    from transformers.cache_utils import QuantoQuantizedLayer

    return QuantoQuantizedLayer(nbits=bits, q_group_size=GROUP, residual_length=residual)


def decoded(model: Any, ids: Tensor, prompt: int, cache: Cache) -> Tensor:
    """Return the logits ``[T, V]`` of a text that is decoded token by token after its prompt."""
    made = [model(input_ids=ids[None, :prompt], past_key_values=cache, use_cache=True).logits[0]]
    for t in range(prompt, len(ids)):
        step = model(input_ids=ids[None, t : t + 1], past_key_values=cache, use_cache=True)
        made.append(step.logits[0])
    return torch.cat(made)


@pytest.mark.parametrize("how", ["formula", "quanto"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(("bits", "residual"), [(4, 5), (2, 5), (4, 1), (2, 64)])
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_equal_to_decoding_with_the_cache_of_transformers(
    how: str, name: str, bits: int, residual: int, prefill: str
) -> None:
    model, ids = build(name).double(), tokens(LENGTH)[0]
    text = Passage(TokenSequence(0, PROMPT, LENGTH), ids)
    plan = EvictionPlan.published(parse_policy("full"))
    caches = parse_caches(f"16bit,int{bits}:quanto(group={GROUP},residual={residual})")
    of = runs_of([plan], parse_budgets(str(LENGTH)), Loop.closed, Positions.original, caches)
    with torch.inference_mode():
        job = compile_closed_loop(model, [text], of, [], Prefill(prefill))
        _, plain, closed = ForwardPass(job, text, of).logits()
        layers = [layer_of(how, bits, residual) for _ in range(model.config.num_hidden_layers)]
        prompt = PROMPT if prefill == "full" else 1
        real = decoded(model, ids, prompt, Cache(layers=layers))
    start = PROMPT - 1 if prefill == "full" else 0
    assert float((real[start:-1] - closed).abs().max()) <= TOLERANCE
    assert float((plain - closed).abs().max()) > 1e5 * TOLERANCE  # codes change the logits


@pytest.mark.parametrize("bits", [4, 2])
def test_codes_are_those_of_quanto(bits: int) -> None:
    """Numbers ``sin(7 i) i / 10``, [1, 2, 6, 8], as quanto reads them back, in float64 and in bfloat16."""
    numbers = torch.arange(96, dtype=torch.float64)
    numbers = ((7 * numbers).sin() * numbers / 10).reshape(1, 2, 6, 8)
    scheme = CacheScheme("quanto", bits, GROUP)
    for name, kind, tolerance in (("float64", torch.float64, 1e-12), ("bfloat16", torch.bfloat16, 0)):
        found, _ = read_values(numbers.to(kind).double(), scheme, kind)
        made = torch.tensor(MADE[f"int{bits}"][name], dtype=torch.float64).reshape(1, 2, 6, 8)
        assert float((found - made).abs().max()) <= tolerance
    formula = layer_of("formula", bits, 1)
    made = torch.tensor(MADE[f"int{bits}"]["float64"], dtype=torch.float64).reshape(1, 2, 6, 8)
    assert float((formula._dequantize(formula._quantize(numbers, 0)) - made).abs().max()) <= 1e-12
