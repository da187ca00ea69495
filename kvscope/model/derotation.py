"""Rotary position embedding, put on keys and queries and taken off again by the model's own code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.model.attention_hook import Call, watching

PROBES = (3, 8)  # positions at which one token is looked at
SLACK = 64  # roundings that two ways to the same position may differ by

Apply = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Derotation:
    """The rotary embedding of one layer.

    Parameters
    ----------
    angles : nn.Module
        The model's own: cosines and sines of positions, scaled as the model scales them.
    apply : callable
        The model's ``apply_rotary_pos_emb``, which knows what part of a head is rotated, and in which pairs.
    layer_type : str or None
        For models whose layers differ in their angles.
    dtype : torch.dtype
        Of the model, in which it makes its cosines.
    """

    def __init__(self, angles: nn.Module, apply: Apply, layer_type: str | None, dtype: torch.dtype) -> None:
        self._angles, self._apply, self._layer_type, self._dtype = angles, apply, layer_type, dtype

    def on(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return states without a position, ``[batch, heads, n, D]``, at positions ``[n]``, in the model's dtype."""
        return self._turn(states, *self._cos_sin(positions)).to(self._dtype)

    def off(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return states ``[batch, heads, n, D]``, which the model rotated to `positions`, without it, in float64.

        The inverse of ``[[c, -s], [s, c]]`` is its transpose over ``c^2 + s^2``, which is not one where the model
        scales its cosines, and not quite one where it rounds them.
        """
        cos, sin = self._cos_sin(positions)
        size = cos * cos + sin * sin
        return self._turn(states, cos / size, -sin / size)

    def _turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        states = states.to(torch.float64)
        return self._apply(states, states, cos, sin)[0]

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=self._dtype, device=positions.device)
        own = () if self._layer_type is None else (self._layer_type,)
        cos, sin = self._angles(like, positions[None], *own)
        return cos.to(torch.float64), sin.to(torch.float64)


def derotations(model: CausalModel, token: Tensor) -> list[Derotation]:
    """Return the rotary embedding of each layer, tried out on one token, ``[1, 1]``.

    A token that reads itself alone has the same hidden states wherever it stands, so its queries and keys at two
    positions differ by the rotation and by nothing else.

    Raises
    ------
    ModelError
        If a layer's keys are not placed by a rotary embedding that can be taken off.
    """
    name = type(model).__name__
    found = [module for path, module in model.named_modules() if path.endswith("rotary_emb")]
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if len(found) != 1 or apply is None:
        raise ModelError(
            f"{name} has no rotary embedding that can be taken off, so its keys cannot move to other positions",
            "Leave the keys at their original positions.",
        )
    calls = [_calls(model, token, position) for position in PROBES]
    by_type = "layer_type" in inspect.signature(found[0].forward).parameters
    types = model.config.get_text_config(decoder=True).layer_types if by_type else [None] * len(calls[0])
    layers = [Derotation(found[0], apply, layer_type, model.dtype) for layer_type in types]
    for rotary, here, there in zip(layers, *calls, strict=True):
        if not all(_moves(rotary, getattr(here, part), getattr(there, part)) for part in ("query", "key")):
            raise ModelError(
                f"layer {here.layer} of {name} does not place its keys by the rotary embedding of the model",
                "Leave the keys at their original positions.",
            )
    return layers


def _calls(model: CausalModel, token: Tensor, position: int) -> list[Call]:
    calls: list[Call] = []
    with watching(model, calls.append):
        model(input_ids=token, position_ids=torch.full_like(token, position), use_cache=False)
    return calls


def _moves(rotary: Derotation, here: Tensor, there: Tensor) -> bool:
    """Return whether taking a position off and putting another on does what the model does."""
    before, after = (torch.tensor([position], device=here.device) for position in PROBES)
    moved = rotary.on(rotary.off(here, before), after)
    slack = SLACK * torch.finfo(there.dtype).eps * float(there.abs().max())
    return float((moved - there).abs().max()) <= slack
