"""Apply the rotary position embedding of a model to keys and queries, and invert it, with the model's own code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.model.attention_hook import Call, observe_attention

PROBES = (3, 8)  # positions at which the rotation of one token is compared
CHANGING = ("dynamic", "longrope")  # kinds whose frequencies depend on the length of the text
TOLERANCE = 64  # allowed difference, in units of the dtype's eps

Apply = Callable[..., Tensor | tuple[Tensor, Tensor]]


class Derotation:
    """The rotary embedding of one layer.

    Parameters
    ----------
    angles : nn.Module
        The model's module that returns cosines and sines of positions, scaled as the model scales them.
    apply : callable
        The model's ``apply_rotary_pos_emb``, which defines which dimensions of a head are rotated, and in which pairs.
    layer_type : str or None
        Type of the layer, in models where the angles depend on it.
    dtype : torch.dtype
        Dtype of the model, in which it computes its cosines.
    size : int
        ``D``.
    """

    def __init__(self, angles: nn.Module, apply: Apply, layer_type: str | None, dtype: torch.dtype, size: int) -> None:
        self._single = list(inspect.signature(apply).parameters)[1] == "cos"  # of queries or keys, not of both at once
        self.size = size
        self._angles, self._apply, self._layer_type, self._dtype = angles, apply, layer_type, dtype

    def on(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return unrotated states ``[batch, heads, n, D]`` rotated to positions ``[n]``, in the model's dtype."""
        return self._rotate(states, *self._cos_sin(positions)).to(self._dtype)

    def off(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return states ``[batch, heads, n, D]`` that the model rotated to `positions`, unrotated, in float64.

        The inverse of ``[[c, -s], [s, c]]`` is its transpose divided by ``c^2 + s^2``, which differs from one where the
        model scales its cosines, and slightly where it rounds them.
        """
        cos, sin = self._cos_sin(positions)
        size = cos * cos + sin * sin
        return self._rotate(states, cos / size, -sin / size)

    def matrix(self, position: int) -> Tensor:
        """Return the rotation at a position, float64 ``[D, D]``: row ``d`` is what becomes of dimension ``d``."""
        device = next(iter(self._angles.buffers())).device
        units = torch.eye(self.size, dtype=torch.float64, device=device)[None, None]
        return self._rotate(units, *self._cos_sin(torch.full((self.size,), position, device=device)))[0, 0]

    @property
    def frequencies(self) -> Tensor:
        """The frequencies that the model's module has, radians per position, float64; empty if they can change."""
        kinds = str(getattr(self._angles, "rope_type", ""))
        if any(kind in kinds for kind in CHANGING):
            return torch.empty(0, dtype=torch.float64)
        found = [part.flatten() for name, part in self._angles.named_buffers() if name.endswith("inv_freq")]
        return torch.cat(found).to("cpu", torch.float64) if found else torch.empty(0, dtype=torch.float64)

    def _rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        states = states.to(torch.float64)
        given = (states, cos, sin) if self._single else (states, states, cos, sin)
        rotated = self._apply(*given)
        return rotated if isinstance(rotated, Tensor) else rotated[0]

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=self._dtype, device=positions.device)
        layer_type = () if self._layer_type is None else (self._layer_type,)
        cos, sin = self._angles(like, positions[None], *layer_type)
        return cos.to(torch.float64), sin.to(torch.float64)


def derotations(
    model: CausalModel, token: Tensor, otherwise: str = "Use the original positions: --positions original."
) -> dict[int, Derotation]:
    """Return the rotary embedding of each layer with attention, checked on one token, ``[1, 1]``.

    A single token has the same hidden states at every position, so its queries and keys at two positions differ only
    by the rotation. `otherwise` says what to do if there is none.

    Raises
    ------
    ModelError
        If the position of a layer's keys is not encoded by a rotary embedding that can be inverted.
    """
    name = type(model).__name__
    found = [module for path, module in model.named_modules() if path.endswith("rotary_emb")]
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if len(found) != 1 or apply is None:
        raise ModelError(
            f"{name} has no rotary embedding that can be inverted, so its keys cannot be moved to other positions",
            otherwise,
        )
    apply, calls = _of_pairs(apply), [_calls(model, token, position) for position in PROBES]
    by_type = "layer_type" in inspect.signature(found[0].forward).parameters
    types = model.config.get_text_config(decoder=True).layer_types if by_type else None
    layers = {}
    for here, there in zip(*calls, strict=True):
        layer_type = None if types is None else types[here.layer]
        rotary = layers[here.layer] = Derotation(found[0], apply, layer_type, model.dtype, here.query.shape[-1])
        if not all(_agrees(rotary, getattr(here, part), getattr(there, part)) for part in ("query", "key")):
            raise ModelError(
                f"layer {here.layer} of {name} does not use the rotary embedding of the model for its keys",
                otherwise,
            )
    return layers


def _of_pairs(apply: Callable[..., Any]) -> Apply:
    """Return the function for queries and keys; that of some models takes one of them at a time."""
    if list(inspect.signature(apply).parameters)[1:3] != ["cos", "sin"]:
        return apply
    return lambda query, key, cos, sin: (apply(query, cos, sin), apply(key, cos, sin))


def _calls(model: CausalModel, token: Tensor, position: int) -> list[Call]:
    calls: list[Call] = []
    with observe_attention(model, calls.append):
        model(input_ids=token, position_ids=torch.full_like(token, position), use_cache=False)
    return calls


def _agrees(rotary: Derotation, here: Tensor, there: Tensor) -> bool:
    """Return whether moving states from the first of `PROBES` to the second gives what the model computes there."""
    before, after = (torch.tensor([position], device=here.device) for position in PROBES)
    try:
        moved = rotary.on(rotary.off(here, before), after)
    except RuntimeError:  # the model rotates a part of each head, and its function takes that part alone
        return False
    tolerance = TOLERANCE * torch.finfo(there.dtype).eps * float(there.abs().max())
    return float((moved - there).abs().max()) <= tolerance
