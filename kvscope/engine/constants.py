"""Small tensors of whole numbers that many layers need, on their device once: a copy to a GPU waits for its work."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def constant(values: tuple[int | tuple[int, ...], ...], device: torch.device | str) -> Tensor:
    """Return an int64 tensor of `values`, which must not be modified; on a GPU the same one for the same values."""
    where = torch.device(device)
    return _on_gpu(values, where) if where.type == "cuda" else torch.tensor(values, dtype=torch.int64, device=where)


@lru_cache(maxsize=4096)
def _on_gpu(values: tuple[int | tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # such a tensor could not be used outside of that mode
        return torch.tensor(values, dtype=torch.int64, device=device)
