"""ChunkKV: whole chunks of neighbouring keys, by what the end of the prompt gives to them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import (
    GroupReduction,
    Phase,
    Policy,
    Protection,
    Scope,
    Step,
    at_least,
    parameter,
    policy,
)
from kvscope.policies.citation import Citation
from kvscope.policies.history import History
from kvscope.policies.snapkv import Pooling, odd, pooled, sum_of_newest, voting


@policy("chunkkv")
@dataclass(frozen=True)
class ChunkKV(Policy):
    """Retain the chunks of neighbouring keys that the last rows of the prompt attend to, and the last keys.

    Chunk ``i`` holds the keys at positions ``i * chunk`` to ``(i + 1) * chunk - 1``. The vote of a key is the sum of
    its weights over the last `window` rows. Every key of a chunk has the same score: the sum of the votes of all its
    keys. The keys of the window are protected, and their votes count for no chunk. So the window can shorten the last
    chunk, as the end of the prompt can.

    arXiv:2502.00299. The paper retains ``B / chunk`` chunks. Here the budget is exact: of the chunk that only fits in
    part, the newest keys are retained, which the paper does not define. The paper's reuse of indices in several layers
    is not reproduced.

    As in the code, NVIDIA/kvpress, ``ChunkKVPress``, one decision holds for a layer. That code pools the votes where
    its base does (``pooling=avg``). It counts a chunk with keys of the window in whole. It compares means
    (``chunk_score=mean``), so that a short last chunk has no disadvantage. It retains whole chunks only, so it holds up
    to one chunk less than the budget. Its default is 20 keys, the paper's 10. The window is at most half of the budget.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.4, .3, .3], [.4, .1, .2, .3], [.4, .1, .3, .1, .1]]
    >>> held("chunkkv:window=1,chunk=2", rows, budget=3, prompt=5)[-1]  # .5 for keys 0 and 1, .4 for 2 and 3
    [0, 1, 4]
    """

    phase: ClassVar[Phase] = "prefill"
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    formula: ClassVar[str] = "S[j] = sum over the chunk of j of the sum of w_q over the last `window` rows"
    paper: ClassVar[str] = "arXiv:2502.00299"
    citation: ClassVar[Citation] = Citation(
        key="liu2025chunkkv",
        title="ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
        authors=(
            "Liu, Xiang and Tang, Zhenheng and Dong, Peijie and Li, Zeyu and Liu, Yue and Li, Bo and Hu, Xuming"
            " and Chu, Xiaowen"
        ),
        booktitle="Advances in Neural Information Processing Systems",
        year=2025,
        arxiv="2502.00299",
    )
    proven: ClassVar[str] = "kvpress's decisions"

    scope: Scope = parameter("layer", "layer: all heads retain the same keys; kv_head: each its own")  # type: ignore[misc]
    chunk: int = parameter(10, "neighbouring keys in a chunk", search=(5, 10, 20))
    chunk_score: Literal["sum", "mean"] = parameter("sum", "score of a chunk: sum or mean of its votes")
    window: int = parameter(
        64, "last rows of the prompt, which give the scores; their keys are protected; at most half of the budget"
    )
    kernel: int = parameter(5, "width of the pooling over neighbouring keys, an odd number")
    pooling: Pooling = parameter("none", "kind of pooling of the votes before they are added: avg, max or none")
    group: GroupReduction = parameter("mean", "scope=kv_head: how a group's rows are reduced to one: mean, max or sum")

    def __post_init__(self) -> None:
        at_least("chunk", self.chunk, 1)
        at_least("window", self.window, 1)
        odd("kernel", self.kernel)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.window, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        history = History.of(step.memory, "rows", self.window)
        history.push(step.layer_weights() if self.scope == "layer" else step.weights(self.group))
        if not step.compresses:
            return score
        used = voting(self, step)
        votes = pooled(sum_of_newest(history.rows, used), step, step.visible, used, self.kernel, self.pooling)
        older = step.visible & (torch.arange(step.t + 1, device=votes.device) <= step.t - used[:, None, None, None])
        return self._of_chunks(votes, older)

    def _of_chunks(self, votes: Tensor, older: Tensor) -> Tensor:
        """Return for every key the score of its chunk, ``[R, L, S, n]``, of which the `older` keys count."""
        n = votes.shape[-1]
        total = self._chunked(votes.double() * older).sum(-1)  # [R, L, S, chunks]
        if self.chunk_score == "mean":
            total = total / self._chunked(older.double()).sum(-1).clamp(min=1)
        return total.repeat_interleave(self.chunk, -1)[..., :n].to(votes.dtype)

    def _chunked(self, values: Tensor) -> Tensor:
        """Return ``[..., n]`` as ``[..., chunks, chunk]``, the last chunk filled up with zeros."""
        padded = functional.pad(values, (0, -values.shape[-1] % self.chunk))
        return padded.reshape(*values.shape[:-1], -1, self.chunk)
