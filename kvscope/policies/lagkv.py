"""LagKV: keys and values that vary most when measured by the part of the prompt that follows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.cache import at, without_gaps
from kvscope.policies.citation import Citation


@policy("lagkv")
@dataclass(frozen=True)
class LagKV(Policy):
    """Retain the keys of each part of the prompt that vary most when scaled by the next part; no weights are read.

    After the sinks the prompt is divided into parts of `lag` keys. Every dimension of the keys of a part is scaled by
    its minimum and maximum in the next part. The standard deviation of a key over its dimensions, passed through a
    softmax over the part, is its key score. Values are scored in the same way, and the two scores are averaged. The
    final score of a key is its rank in its part, 0 for the lowest. The last whole part and the remainder have no next
    part: they rank above all others, the newest key highest. With fewer than two whole parts this holds for all keys.
    It evicts once, at the end of the prompt. If it must evict later too, the retained keys are divided into parts anew.

    arXiv:2504.04704; code NVIDIA/kvpress, ``lagkv_press.py``. That code retains a share of the prompt; here it is `B`
    keys. That code breaks ties arbitrarily, among equal ranks and among the keys at the end; here the oldest key is
    evicted first. A dimension that is constant in the next part is not scaled; that code divides by zero there.

    Example: parts of two keys and no sinks. Of keys 0 and 1, key 1 varies more over its dimensions.

    >>> from kvscope.replay.example import held
    >>> states = [[0.5, 0.5], [0.1, 0.9], [0.0, 0.0], [1.0, 1.0]]
    >>> rows = [[1.0], [0.5] * 2, [0.3] * 3, [0.25] * 4]
    >>> held(LagKV(lag=2, sinks=0), rows, budget=3, prompt=4, keys=states, values=states)[-1]
    [1, 2, 3]
    """

    needs = frozenset({"keys", "values"})
    phase = "prefill"
    formula = "S[j] = rank in its part of softmax(std(scaled k_j)) + softmax(std(scaled v_j))"
    paper = "arXiv:2504.04704 section 2"
    citation = Citation(
        key="liang2025lagkv",
        title="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
        authors="Liang, Manlai and Zhang, JiaMing and Li, Xiong and Li, Jinlong",
        year=2025,
        arxiv="2504.04704",
    )
    proven = "kvpress's code, read"

    lag: int = parameter(128, "number of keys in a part")
    sinks: int = parameter(4, "first keys, which are never evicted")

    def __post_init__(self) -> None:
        at_least("lag", self.lag, 2)
        at_least("sinks", self.sinks, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if not (step.compresses and step.exceeds):
            return score
        held = step.visible.sum(-1, keepdim=True)  # [R, L, G, 1]
        place, there = without_gaps(step.visible, step.most_visible)
        order = torch.arange(place.shape[-1], device=score.device)
        ranked = self.sinks + ((held - self.sinks) // self.lag - 1) * self.lag  # keys before the last whole part
        new = order.to(score.dtype).expand_as(place)  # without a rank: above all ranks, at least `lag`
        parts = (place.shape[-1] - self.sinks) // self.lag
        if parts >= 2:
            keys, values = (at(place, step.signals[name].double()) for name in ("keys", "values"))
            spread = (self._spread(keys, parts) + self._spread(values, parts)).to(score.dtype)
            rank = spread.argsort(dim=-1, stable=True).argsort(-1).flatten(-2)
            rank = functional.pad(rank, (self.sinks, place.shape[-1] - self.sinks - rank.shape[-1]))
            new = torch.where((order >= self.sinks) & (order < ranked), rank, new)
        return score.scatter(-1, place, torch.where(there, new, 0))

    def _spread(self, states: Tensor, parts: int) -> Tensor:
        """Return the score of the keys of all parts but the last, ``[R, L, G, parts - 1, lag]``."""
        cut = states[..., self.sinks : self.sinks + parts * self.lag, :]
        cut = cut.reshape(*states.shape[:-2], parts, self.lag, states.shape[-1])
        low, high = cut[..., 1:, :, :].amin(-2, keepdim=True), cut[..., 1:, :, :].amax(-2, keepdim=True)
        width = torch.where(high > low, high - low, 1)
        deviation = ((cut[..., :-1, :, :] - low) / width).std(-1)
        return deviation.softmax(-1)
