"""A sample of a model's weights, which identifies the model independently of its name and precision."""

from __future__ import annotations

import torch
from torch import nn

PARAMETERS, ENTRIES = 16, 4  # number of parameters in the sample, and of numbers from each


def sample(model: nn.Module) -> list[float]:
    """Return `PARAMETERS` x `ENTRIES` weights of a model, from evenly spaced parameters at evenly spaced indices.

    NaN for a parameter that is offloaded, and so not in memory.
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
