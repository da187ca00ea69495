"""Gates and scorers in the closed loop and in decoding: whether they are for the model, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.engine.plan import EvictionPlan
from kvscope.gates.module import LearnedGate, load_gate
from kvscope.gates.scorers import KeyScorers, load_scorers
from kvscope.model.attention_hook import Call
from kvscope.model.sample import sample


def require_gates(plan: EvictionPlan, model: CausalModel, kv_heads: Iterable[int]) -> None:
    """Raise an error unless the gates and scorers of a plan were trained for this model, with ``G`` of each layer.

    Raises
    ------
    UsageError
        If they were trained for another model.
    ModelError
        If the layers of the model differ in their heads.
    """
    if not plan.gates and not plan.scorers:
        return
    config, weights = model.config.get_text_config(decoder=True), sample(model)
    counts = set(kv_heads)
    if len(counts) > 1:
        raise ModelError(
            f"{plan.policy.label} uses a gate or scorers that need equally many heads in every layer, but the layers "
            f"of "
            f"{type(model).__name__} differ in their heads",
            "Use policies without them.",
        )
    for name, found in ((name, load(name)) for names, load in _files(plan) for name in names):
        found.require(
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
    given = _exposed(call, hidden, "gates")
    return load_gate(name).margins(call.layer, given, prompt).to(call.query.device)


@torch.no_grad()
def scores(name: str, call: Call) -> Tensor:
    """Return the scores of the new keys of a layer, ``[batch, G, q]``, of the scorers in file `name`, or ``demo``.

    Raises
    ------
    ModelError
        If the attention module does not expose its input.
    """
    return load_scorers(name).scores(call.layer, _exposed(call, call.hidden, "scorers")).to(call.query.device)


def _exposed(call: Call, hidden: Tensor | None, what: str) -> Tensor:
    """Return the inputs of a layer in the precision of scores; raises ModelError if there are none."""
    if hidden is None:
        raise ModelError(
            f"layer {call.layer} does not expose the input of its attention, which {what} need",
            f"Use policies without {what}, or another model.",
        )
    return hidden.to(call.exact)


def _files(plan: EvictionPlan) -> tuple[tuple[list[str], Callable[[str], LearnedGate | KeyScorers]], ...]:
    """Return the names of gates and of scorers that a plan uses, and how each is loaded."""
    return (plan.gates, load_gate), (plan.scorers, load_scorers)
