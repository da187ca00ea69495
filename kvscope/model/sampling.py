"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvscope.core.errors import UsageError

Chooser = Callable[[Tensor, Tensor], int]  # from ids [1, t] and logits [1, vocabulary] to the next token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names and meaning as in transformers' ``generate``."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(f"temperature={self.temperature} is not above 0", "For greedy decoding omit --do-sample.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} is out of range", "top_p is above 0 and at most 1.")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} is negative", "top_k is 0 (all tokens) or above.")

    def chooser(self, seed: int) -> Chooser:
        """Return what picks the next token; sampling is seeded."""
        if not self.do_sample:
            return lambda ids, logits: int(logits.argmax(-1))
        warpers: Any = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        generator = torch.Generator().manual_seed(seed)

        def choose(ids: Tensor, logits: Tensor) -> int:
            share = torch.softmax(warpers(ids, logits.float()), -1).cpu()
            return int(torch.multinomial(share, 1, generator=generator))

        return choose
