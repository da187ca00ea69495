"""Decoding token by token with a cache in lists, in which what is evicted is merged by hand.

Nothing of the closed loop or of its decoder is used, but the hook into the model's attention and the random numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvscope.core.cache_scheme import CacheScheme
from kvscope.core.merge_scheme import MergeScheme
from kvscope.engine.draw import draws
from kvscope.model.attention_hook import Call
from tests.reference import quantised_decoder
from tests.reference.merging import Head, Merging

POLICIES = quantised_decoder.POLICIES


class Layer(quantised_decoder.Layer):
    """The caches of one layer's heads, which merge what they evict."""

    def __init__(self, scheme: MergeScheme, policy: str, budget: int, numbers: list[list[float]]) -> None:
        super().__init__(CacheScheme("fp8", 8), None, policy, budget)
        self.new = Head
        self.merging = Merging(scheme, numbers)

    def finish(self, tokens: int) -> None:
        stays = [self.retained(group, tokens - 1) for group in range(len(self.heads))]
        self.merging.merge(self.heads, stays)
        for head, kept in zip(self.heads, stays, strict=True):
            head.keep(kept)

    def _observe(self, rows: list[dict[int, float]], share: int) -> None:
        super()._observe(rows, share)
        for group, head in enumerate(self.heads):
            own = rows[group * share : (group + 1) * share]
            for at in own[0]:
                head.mass[at] += sum(row[at] for row in own) / share


def decode(
    model: Any, ids: Tensor, scheme: MergeScheme, policy: str, budget: int, prompt: int, prefill: str
) -> tuple[Tensor, list[quantised_decoder.Layer]]:
    """Return the logits ``[T, V]`` of a text ``[T]``, the first of its trace, and the layers' caches after it."""

    def new(call: Call) -> Layer:
        numbers = draws(scheme.seed, 0, torch.tensor([call.layer]), call.key.shape[1], torch.arange(len(ids)))[0]
        return Layer(scheme, policy, budget, numbers.tolist())

    return quantised_decoder.decode_with(model, ids, new, prompt, prefill)
