"""Choose the next token, greedily or at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvscope.core.recording_options import Sampling

Chooser = Callable[[Tensor, Tensor], int]  # (ids [1, t], logits [1, vocabulary]) -> next token


def chooser(sampling: Sampling, seed: int) -> Chooser:
    """Return the function that chooses the next token: the likeliest one, or a random one from a seeded generator."""
    if not sampling.do_sample:
        return lambda ids, logits: int(logits.argmax(-1))
    warpers = LogitsProcessorList()
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator().manual_seed(seed)

    def choose(ids: Tensor, logits: Tensor) -> int:
        probabilities = torch.softmax(warpers(ids, logits.float()), -1).cpu()  # type: ignore[arg-type]  # LongTensor
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return choose
