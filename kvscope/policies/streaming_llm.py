"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Protection, Recurrence, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("streaming-llm")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Retain the first few keys, the attention sinks, and the newest keys.

    Score of key ``j``: its position ``j``; the first `sinks` keys are protected. arXiv:2309.17453, section 3.2;
    code mit-han-lab/streaming-llm, ``kv_cache.py``, whose ``start_size + recent_size`` is the budget here. That code
    also renumbers positions inside the cache. An open-loop replay uses the weights recorded at the original positions;
    in the closed loop ``--positions compacted`` renumbers them.

    Example: budget 3, one sink.

    >>> from kvscope.replay.example import held
    >>> held(StreamingLLM(sinks=1), [[1 / n] * n for n in range(1, 7)], budget=3)
    [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
    """

    needs = frozenset()
    scope = "layer"
    formula = "S[j] = j; the first `sinks` keys are protected"
    paper = "arXiv:2309.17453 section 3.2"
    citation = Citation(
        key="xiao2024streamingllm",
        title="Efficient Streaming Language Models with Attention Sinks",
        authors="Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and Lewis, Mike",
        booktitle="International Conference on Learning Representations",
        year=2024,
        arxiv="2309.17453",
    )
    proven = "authors' decisions"

    sinks: int = parameter(4, "first keys that are never evicted")

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks)

    def recurrence(self) -> Recurrence:
        return Recurrence("none")

    def observe(self, step: Step, score: Tensor) -> Tensor:
        score[..., -1].fill_(step.t)
        return score
