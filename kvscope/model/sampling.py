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

Chooser = Callable[[Tensor], Tensor]  # logits [1, vocabulary] -> next token [1, 1], int64 on the same device


def chooser(sampling: Sampling, seed: int) -> Chooser:
    """Return the function that chooses the next token: the likeliest one, or a random one from a seeded generator.

    The likeliest one is found on the device, and the host does not wait for it. A random one is drawn on the CPU, so
    that a seed draws the same tokens on every device.
    """
    if not sampling.do_sample:
        return lambda logits: logits.argmax(-1, keepdim=True)
    warpers = LogitsProcessorList()
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator().manual_seed(seed)
    unused = torch.empty(1, 0, dtype=torch.long)  # earlier tokens, which none of these warpers reads

    def choose(logits: Tensor) -> Tensor:
        probabilities = torch.softmax(warpers(unused, logits.float()), -1).cpu()  # type: ignore[arg-type]  # LongTensor
        return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)

    return choose
