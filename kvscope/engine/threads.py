"""The number of threads that torch uses for small steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**20  # elements of the largest tensor of a step; below this a second thread costs more time than it saves


@contextmanager
def few_threads(numbers: int) -> Iterator[None]:
    """Run the block with one torch thread if its largest tensor, of `numbers` elements, is small."""
    before = torch.get_num_threads()
    if before == 1 or numbers >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
