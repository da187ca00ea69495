"""Gates in the closed loop and in decoding: whether they were trained for the model, and their margins."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.engine.plan import EvictionPlan
from kvscope.gates.module import load_gate
from kvscope.model.attention_hook import Call
from kvscope.model.sample import sample


def require_gates(plan: EvictionPlan, model: CausalModel, kv_heads: Iterable[int]) -> None:
    """Raise an error unless the gates that a plan uses were trained for this model, with ``G`` of each of its layers.

    Raises
    ------
    UsageError
        If they were trained for another model.
    ModelError
        If the layers of the model differ in their heads.
    """
    if not plan.gates:
        return
    config, weights = model.config.get_text_config(decoder=True), sample(model)
    counts = set(kv_heads)
    if len(counts) > 1:
        raise ModelError(
            f"{plan.policy.label} uses a gate, which has equally many heads in every layer, and the layers of "
            f"{type(model).__name__} differ in their heads",
            "Use policies without a gate.",
        )
    for name in plan.gates:
        load_gate(name).require(
            name, layers=config.num_hidden_layers, hidden=config.hidden_size, kv_heads=max(counts), weights=weights
        )


@torch.no_grad()
def margins(name: str, call: Call, hidden: Tensor | None, prompt: int) -> Tensor:
    """Return by how much the gates of a layer exceed their threshold, ``[batch, G, T]``.

    Parameters
    ----------
    name : str
        File of the gate, or ``demo``.
    call : Call
        The attention call of the layer; gives its number, precision and device.
    hidden : Tensor or None
        Inputs of the layer for all tokens so far, ``[batch, T, hidden]``.
    prompt : int
        ``P``.

    Raises
    ------
    ModelError
        If `hidden` is None because the attention module does not expose its input.
    """
    if hidden is None:
        raise ModelError(
            f"layer {call.layer} does not expose the input of its attention, which gates need",
            "Use policies without gates, or another model.",
        )
    return load_gate(name).margins(call.layer, hidden.to(call.exact), prompt).to(call.query.device)
