"""The check before the first run that the closed loop, without eviction, equals the model."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.closed_loop.forward import ClosedLoop, logits_of
from kvscope.closed_loop.losses import compare_logits
from kvscope.closed_loop.pass_shape import PassShape, RunBatch
from kvscope.core.errors import ModelError, ReplayError
from kvscope.core.model_types import CausalModel
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.model.attention_hook import replace_attention
from kvscope.model.obstacles import require_registry
from kvscope.model.selfcheck import layers_without_attention
from kvscope.policies.window import Window

PROBE = 128  # tokens
# Largest mean KL, in nats, between the model's own kernel and a run that evicts nothing. A model in float64 may make
# its softmax in float32, which changes logits by 1e-6.
CLOSE = {torch.float64: 1e-11, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def self_check(model: CausalModel, ids: Tensor, prefill: Prefill) -> list[int]:
    """Return the layers whose attention was called in a pass over the first tokens of ids ``[T]``.

    Raises
    ------
    ReplayError
        If a run that evicts nothing does not give the model's own logits.
    ModelError
        If no layer has attention or one calls it several times, or a layer keeps keys and its attention is not seen.
    """
    require_registry(model)
    ids = ids[:PROBE].to(model.get_input_embeddings().weight.device)
    count = len(ids)
    text = PassShape(max(1, count // 2), count, 0, (), prefill)
    budgets = [count, max(1, count // 4)] if count > 2 else [count]  # the first evicts nothing, the second does
    loop = ClosedLoop([RunBatch(EvictionPlan.published(Window()), budgets)], text, [], lambda *_: None)
    with replace_attention(model, loop, inputs=False):
        logits = logits_of(model, ids.expand(1 + len(budgets), -1), slice(None))
    if not loop.layers or len(set(loop.layers)) < len(loop.layers):
        raise ModelError(
            f"attention of {type(model).__name__} was called in layers {loop.layers}, not once in each that has it",
            "Use a model that calls attention once in a layer.",
        )
    layers_without_attention(model, ids[None], loop.layers)
    difference = compare_logits(logits[:1], logits[1], ids.new_zeros(count))["kl"].mean().item()
    if not difference <= CLOSE[model.dtype]:
        raise ReplayError(
            f"a cache that evicts nothing differs from {type(model).__name__}'s own attention by {difference:.3g} nats",
            "Use --dtype float32; if that does not help, please report the model.",
        )
    return sorted(loop.layers)
