"""How many threads torch takes for steps that are small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**20  # numbers in the largest tensor of a step, below which waking a second thread costs more than it does


@contextmanager
def few_threads(numbers: int) -> Iterator[None]:
    """Let torch work with one thread meanwhile, where tensors have no more than so many `numbers`."""
    usual = torch.get_num_threads()
    if usual == 1 or numbers >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
