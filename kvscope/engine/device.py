"""The device to compute on."""

from __future__ import annotations

import torch

from kvscope.core.errors import UsageError


def torch_device(name: str) -> torch.device:
    """Return the device called `name`; raises UsageError if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {error}".splitlines()[0], "Use --device cpu.") from error
    return device
