"""The rotary embedding of a model as numbers: which dimensions are turned, in which pairs, and how fast."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.model.derotation import Derotation, derotations
from kvscope.trace.layer_records import RotaryRecord

PROBES = (1, 7, 1000)  # positions at which the numbers are compared with the model's rotation
TOLERANCE = 64  # allowed difference, in units of the dtype's eps, beside one unit for each position


def rotary_records(model: CausalModel, token: Tensor) -> list[RotaryRecord]:
    """Return the rotary embedding of all layers with attention, those together that have the same.

    Parameters
    ----------
    model : CausalModel
        The model.
    token : Tensor
        One token, ``[1, 1]``.

    Raises
    ------
    ModelError
        If a layer has none, or one that depends on more than the position: its frequencies change with the length.
    """
    found: list[RotaryRecord] = []
    for layer, rotary in derotations(model, token).items():
        own = _record(rotary, layer, model)
        same = next((record for record in found if replace(record, layers=[layer]) == own), None)
        if same is None:
            found.append(own)
        else:
            same.layers.append(layer)
    return found


def _record(rotary: Derotation, layer: int, model: CausalModel) -> RotaryRecord:
    """Return the numbers of one layer, compared with the rotation of the model."""
    eps = max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps)  # angles are at most float32
    size, turned, known = rotary.size, rotary.matrix(1).cpu(), rotary.frequencies
    beside = turned - torch.diag(turned.diagonal())
    partners = torch.where(beside.any(1), beside.abs().argmax(1), torch.arange(size))
    own, sine = turned.diagonal(), beside.gather(1, partners[:, None])[:, 0]
    pairs = partners != torch.arange(size)
    if not len(known) or not pairs.any():
        raise _unknown(model, layer)
    angles = torch.atan2(torch.where(partners > torch.arange(size), sine, -sine), own)
    nearest = known[(known - angles[:, None]).abs().argmin(1)]  # [D]
    scale = torch.hypot(own, sine)[pairs].mean()
    scale = scale.round() if abs(scale - scale.round()) < TOLERANCE * eps else scale
    record = RotaryRecord([layer], torch.where(pairs, nearest, 0).tolist(), partners.tolist(), float(scale))
    for position in PROBES:
        allowed = (TOLERANCE + position) * eps * float(scale)
        if (matrix(record, position) - rotary.matrix(position).cpu()).abs().max() > allowed:
            raise _unknown(model, layer)
    return record


def matrix(record: RotaryRecord, position: int) -> Tensor:
    """Return the rotation at a position, float64 ``[D, D]``, as `Derotation.matrix`."""
    partners, angles = torch.tensor(record.partners), torch.tensor(record.frequencies, dtype=torch.float64) * position
    place = torch.arange(len(partners))
    pairs, result = partners != place, torch.diag(angles.cos())
    result[place, partners] += torch.where(pairs, torch.where(partners > place, 1, -1) * angles.sin(), 0)
    return result * torch.where(pairs, record.scale, 1)[:, None]


def _unknown(model: CausalModel, layer: int) -> ModelError:
    return ModelError(
        f"layer {layer} of {type(model).__name__} has no rotary embedding with fixed frequencies",
        "Use policies that do not read the rotary embedding.",
    )
