"""Gates in the closed loop and in decoding: whether they belong to the model, and what they say of its layer inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.engine.plan import EvictionPlan
from kvscope.gates.module import load_gate
from kvscope.model.attention_hook import Call
from kvscope.model.sample import sample


def require_gates(plan: EvictionPlan, model: Any) -> None:
    """Raise UsageError unless the gates that a plan asks were trained for this model."""
    if not plan.gates:
        return
    config, weights = model.config.get_text_config(decoder=True), sample(model)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for name in plan.gates:
        load_gate(name).require(
            name, layers=config.num_hidden_layers, hidden=config.hidden_size, kv_heads=kv_heads, weights=weights
        )


@torch.no_grad()
def margins(name: str, call: Call, hidden: Tensor | None, prompt: int) -> Tensor:
    """Return by how much the gates of a layer are above their threshold, ``[batch, G, T]``.

    Parameters
    ----------
    name : str
        File of the gate, or ``demo``.
    call : Call
        Of the layer: its number, its precision and where it is.
    hidden : Tensor or None
        The inputs of the layer from the first token on, ``[batch, T, hidden]``.
    prompt : int
        ``P``.

    Raises
    ------
    ModelError
        If there are no inputs: the module of the attention does not show them.
    """
    if hidden is None:
        raise ModelError(
            f"layer {call.layer} does not show the input of its attention, from which gates decide", "Leave them out."
        )
    return load_gate(name).margins(call.layer, hidden.to(call.exact), prompt).to(call.query.device)
