"""Before the first run: whether the closed loop with a full cache is the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvscope.closed_loop.forward import ClosedLoop, PassShape, RunBatch, logits_of
from kvscope.closed_loop.losses import compare_logits
from kvscope.core.errors import ModelError, ReplayError
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.model.attention_hook import replace_attention, require_registry
from kvscope.policies.full import Full
from kvscope.policies.window import Window

PROBE = 128  # tokens
# Largest mean KL, in nats, between the model's own kernel and a run that evicts nothing.
CLOSE = {torch.float64: 1e-15, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def self_check(model: Any, ids: Tensor, prefill: Prefill) -> list[int]:
    """Return the layers whose attention was called, after a pass over the first tokens of ids ``[T]``.

    A run that evicts nothing must give the model's own logits, and one that does must not leave layers out.

    Raises
    ------
    ReplayError
        If it does not.
    ModelError
        If the model has layers without attention, or its attention cannot be watched.
    """
    require_registry(model)
    ids = ids[:PROBE]
    count = len(ids)
    text = PassShape(max(1, count // 2), count, 0, 0, prefill)
    batches = [RunBatch(EvictionPlan.published(Full()), [count])]
    if count > 2:
        batches.append(RunBatch(EvictionPlan.published(Window()), [max(1, count // 4)]))
    loop = ClosedLoop(batches, text, [], lambda *_: None)
    with replace_attention(model, loop):
        logits = logits_of(model, ids.expand(1 + len(batches), -1), slice(None))
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(loop.layers) != list(range(expected)):
        raise ModelError(
            f"{type(model).__name__} has {expected} layers, and attention was called in {sorted(loop.layers)}",
            "The closed loop needs a model whose every layer has attention.",
        )
    difference = compare_logits(logits[:1], logits[1], ids.new_zeros(count))["kl"].mean().item()
    if not difference <= CLOSE[model.dtype]:
        raise ReplayError(
            f"a cache that evicts nothing differs from {type(model).__name__}'s own attention by {difference:.3g} nats",
            "Try --dtype float32; if it stays, please report the model.",
        )
    return sorted(loop.layers)
