"""CurDKV: keys whose vector and value are long beside those of their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.cache import at, without_gaps
from kvscope.policies.citation import Citation

Combination = Literal["product", "mean", "key", "value"]


@policy("curdkv")
@dataclass(frozen=True)
class CurDKV(Policy):
    """Retain the keys with the highest approximate leverage scores of key and value; no weights are read.

    The keys of the cache are divided into parts of `window` neighbours, counted from the first key. Score of key ``j``:
    ``|k_j|^2 |v_j|^2``, where each of the two factors is divided by its sum over the part that the key is in. With
    ``window=0`` they are not divided. It evicts once, at the end of the prompt. If it must evict later too, the
    retained keys are divided into parts anew.

    arXiv:2509.15038; code NVIDIA/kvpress, ``cur_press.py``. As in that code by default, keys and values are not
    projected on random directions first.

    Example: parts of two keys and no sinks. Keys 0 and 1 each have half of both sums of their part. In the other part
    key 3 has nearly all of both sums.

    >>> from kvscope.replay.example import held
    >>> states = [[2.0, 0.0], [0.0, 2.0], [0.1, 0.1], [1.0, 0.0]]
    >>> rows = [[1.0], [0.5] * 2, [0.3] * 3, [0.25] * 4]
    >>> held(CurDKV(window=2, sinks=0), rows, budget=3, prompt=4, keys=states, values=states)[-1]
    [0, 1, 3]
    """

    needs = frozenset({"keys", "values"})
    phase = "prefill"
    formula = "S[j] = |k_j|^2 * |v_j|^2, each as a share of its part of `window` keys"
    paper = "arXiv:2509.15038"
    citation = Citation(
        key="sengupta2025curdkv",
        title="Value-Guided KV Compression for LLMs via Approximated CUR Decomposition",
        authors="Sengupta, Ayan and Chaudhary, Siddhant and Chakraborty, Tanmoy",
        year=2025,
        arxiv="2509.15038",
    )
    proven = "kvpress's decisions"

    combine: Combination = parameter("product", "score: product or mean of both, or that of key or value alone")
    window: int = parameter(16, "keys in a part, by whose norms a key's norm is divided; 0: no division")
    sinks: int = parameter(4, "first keys, which are never evicted")

    def __post_init__(self) -> None:
        at_least("window", self.window, 0)
        at_least("sinks", self.sinks, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if not (step.compresses and step.exceeds):
            return score
        place, there = without_gaps(step.visible, step.most_visible)
        # In double: the order in which a sum is made must decide nothing.
        keys, values = (self._share(at(place, step.signals[name].double()), there) for name in ("keys", "values"))
        both = {"product": keys * values, "mean": (keys + values) / 2, "key": keys, "value": values}[self.combine]
        shares = both / both.sum(-1, keepdim=True).clamp(min=torch.finfo(both.dtype).tiny)
        return score.scatter(-1, place, torch.where(there, shares, 0).to(score.dtype))

    def _share(self, states: Tensor, there: Tensor) -> Tensor:
        """Return the squared norm of each vector ``[R, L, G, m, D]`` as a share of its part's, ``[R, L, G, m]``."""
        squares = torch.where(there, states.square().sum(-1), 0)
        if not self.window:
            return squares
        padded = functional.pad(squares, (0, -squares.shape[-1] % self.window))
        parts = padded.view(*padded.shape[:-1], -1, self.window)
        shares = parts / parts.sum(-1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)
        return shares.flatten(-2)[..., : squares.shape[-1]]
