"""FINCH: the keys that the question at the end of the prompt attends to, the same share of every chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import GroupReduction, Phase, Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.history import History
from kvscope.policies.snapkv import sum_of_newest, voting


@policy("finch")
@dataclass(frozen=True)
class Finch(Policy):
    """Retain the keys that the question attends to, with the same share of every chunk of the context.

    The question is the last `window` tokens of the prompt; its keys are protected. Score of key ``j``: the sum of its
    weights over the rows of the question. Each weight is multiplied by the number of keys before the query
    (`normalise`), because weights are smaller in a row over more keys. With `chunk` the keys are divided into chunks of
    that many neighbours. The score is then the rank of the key in its chunk, as a share of the number of keys there, so
    that all chunks retain equal shares; the question counts as a part of the last chunk. Without `chunk` all keys
    compete.

    arXiv:2408.00167; code NVIDIA/kvpress, ``FinchPress``. There a delimiter in the prompt gives the length of the
    question; here set `window` to it. The paper reads one chunk after the other, each with the question after it and
    the retained keys of earlier chunks before it. Here, as in that code, the prompt is read once. That code rounds the
    share of each chunk down; here the budget is exact, and of equal shares the older key is evicted. That code also
    rotates the keys to the positions of a shorter text; in the closed loop ``--positions compacted`` does this. The
    window is at most half of the budget.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.1, .2, .5, .2], [.1, .2, .4, .1, .2]]
    >>> held("finch:window=1", rows, budget=3, prompt=5)[-1]
    [1, 2, 4]
    """

    phase: ClassVar[Phase] = "prefill"
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    formula: ClassVar[str] = "S[j] = sum of q * w_q[j] over the last `window` rows q"
    paper: ClassVar[str] = "arXiv:2408.00167"
    citation: ClassVar[Citation] = Citation(
        key="corallo2024finch",
        title="FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models",
        authors="Corallo, Giulio and Papotti, Paolo",
        journal="Transactions of the Association for Computational Linguistics",
        volume="12",
        pages="1517--1532",
        year=2024,
        arxiv="2408.00167",
        doi="10.1162/tacl_a_00716",
    )
    proven: ClassVar[str] = "kvpress's decisions"

    window: int = parameter(
        32, "tokens of the question at the end of the prompt, which are protected; at most half of the budget"
    )
    normalise: bool = parameter(True, "whether each row is multiplied by the number of keys before its query")
    chunk: int | None = parameter(
        None, "neighbouring keys in a chunk, each of which retains its share; none: all keys compete"
    )
    group: GroupReduction = parameter("mean", "how the query heads of a group are reduced to one: mean, max or sum")

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        if self.chunk is not None:
            at_least("chunk", self.chunk, 1)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.window, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        history = History.of(step.memory, "rows", self.window)
        weights = step.weights(self.group)
        history.push(weights * step.t if self.normalise else weights)
        if not step.compresses:
            return score
        used = voting(self, step)
        votes = sum_of_newest(history.rows, used)
        if self.chunk is None:
            return votes
        question = torch.arange(step.t + 1, device=votes.device) > step.t - used[:, None, None, None]
        ranked = votes.masked_fill(question, torch.inf).masked_fill(~step.visible, -torch.inf)
        return _rank_in_chunk(ranked, step.visible, self.chunk)


def _rank_in_chunk(votes: Tensor, visible: Tensor, chunk: int) -> Tensor:
    """Return the rank of every visible key in its chunk from the lowest, as a share of the visible keys there."""
    n = votes.shape[-1]
    missing = -n % chunk
    chunks = functional.pad(votes, (0, missing), value=-torch.inf).reshape(*votes.shape[:-1], -1, chunk)
    there = functional.pad(visible, (0, missing)).reshape(chunks.shape).sum(-1, keepdim=True)
    order = chunks.argsort(dim=-1, stable=True).argsort(dim=-1)  # keys that are not visible first, then the lowest
    share = (order - (chunk - there) + 1) / there.clamp(min=1)
    return share.to(votes.dtype).reshape(*votes.shape[:-1], -1)[..., :n]
