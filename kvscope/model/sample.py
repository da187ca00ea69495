"""A few of a model's weights, by which it is known again whatever it is called and whatever its precision."""

from __future__ import annotations

import torch
from torch import nn

PARAMETERS, ENTRIES = 16, 4  # how many are looked at, and how many numbers of each


def sample(model: nn.Module) -> list[float]:
    """Return `PARAMETERS` x `ENTRIES` numbers of a model: of parameters, and of places in them, evenly apart.

    NaN where a parameter is elsewhere for want of memory.
    """
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    numbers: list[float] = []
    for place in torch.linspace(0, len(parameters) - 1, PARAMETERS).long():
        flat = parameters[place].detach().flatten()
        if flat.is_meta:
            numbers += [torch.nan] * ENTRIES
            continue
        numbers += flat[torch.linspace(0, len(flat) - 1, ENTRIES, dtype=torch.float64).long()].float().tolist()
    return numbers
