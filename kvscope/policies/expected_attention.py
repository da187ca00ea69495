"""Expected Attention: keys that the queries to come are expected to attend to, times the norm of their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.cache import at, without_gaps
from kvscope.policies.citation import Citation
from kvscope.policies.rotation import Rotation


@policy("expected-attention")
@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Retain the keys that future queries are expected to attend to, if their distribution is that of past queries.

    The past queries are taken before their rotary embedding, without those of the first `sinks` tokens. Their mean and
    covariance are turned by the mean rotation of the next `future` positions; the results are ``m`` and ``C``. The
    expected logit of key ``k`` is ``k m / sqrt(D) + k C k / (2 D)``. A softmax over the keys after the sinks gives
    weights, which are averaged over the query heads of a group. Score of a key: this weight plus `epsilon`, times the
    L2 norm of its value. It evicts once, at the end of the prompt. If it must evict later too, all queries so far
    count.

    arXiv:2510.00636; code by its authors, NVIDIA/kvpress, ``expected_attention_press.py``. As in that code, logits are
    divided by ``sqrt(D)``. The model must have a rotary embedding with fixed frequencies, which may rotate only some of
    the dimensions.

    Example: no rotation (frequencies 0), and every query is (0, 2). Key 1 has the opposite direction and is evicted.

    >>> from kvscope.replay.example import held
    >>> keys, still = [[0.0, 1.0], [0.0, -1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    >>> given = {"keys": keys, "queries": [[0.0, 2.0]] * 3, "values": [[1.0, 0.0]] * 3, "rotary": still}
    >>> held("expected-attention:sinks=0", [[1], [0.5] * 2, [0.3] * 3], budget=2, prompt=3, **given)[-1]
    [0, 2]
    """

    needs = frozenset({"keys", "values", "queries", "rotary"})
    phase = "prefill"
    formula = "S[j] = (softmax_j(k_j m / sqrt(D) + k_j C k_j / 2D) + epsilon) * |v_j|"
    paper = "arXiv:2510.00636"
    citation = Citation(
        key="devoto2025expectedattention",
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        authors="Devoto, Alessio and Jeblick, Maximilian and J{\\'e}gou, Simon",
        year=2025,
        arxiv="2510.00636",
    )
    proven = "authors' decisions"

    future: int = parameter(512, "positions after the newest one, over which the rotation is averaged")
    sinks: int = parameter(4, "first keys, which are never evicted and whose queries do not count")
    covariance: bool = parameter(True, "whether to use the covariance of the queries too, not only their mean")
    epsilon: float = parameter(0.0, "added to the expected attention before it is multiplied by the value's norm")
    values: bool = parameter(True, "whether the expected attention is multiplied by the norm of the value")

    def __post_init__(self) -> None:
        at_least("future", self.future, 1)
        at_least("sinks", self.sinks, 0)
        at_least("epsilon", self.epsilon, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        queries = past_queries(step.memory, step.signals["queries"])
        if not (step.compresses and step.exceeds):
            return score
        place, there = without_gaps(step.visible, step.most_visible)
        keys, values = (at(place, step.signals[name].double()) for name in ("keys", "values"))
        past = torch.stack(queries[self.sinks :], -2)  # [., L, H, n, D]
        mean, covariance = self._expected(past, Rotation(step.signals["rotary"]), step.t)
        heads, size = keys.shape[2], keys.shape[-1]
        keys = keys[:, :, :, None]  # [R, L, G, 1, m, D]
        mean = mean.view(*mean.shape[:2], heads, -1, size, 1)  # [., L, G, Q, D, 1]
        logits = (keys @ mean)[..., 0] / math.sqrt(size)  # [R, L, G, Q, m]
        if self.covariance:
            spread = keys @ covariance.view(*covariance.shape[:2], heads, -1, size, size)  # [R, L, G, Q, m, D]
            logits = logits + (spread * keys).sum(-1) / size / 2
        free = there & (place >= self.sinks)
        expected = logits.masked_fill(~free[..., None, :], -torch.inf).softmax(-1).mean(-2)  # [R, L, G, m]
        if self.values:
            expected = (expected + self.epsilon) * values.norm(dim=-1)
        return score.scatter(-1, place, torch.where(free, expected, 0).to(score.dtype))

    def _expected(self, queries: Tensor, rotation: Rotation, t: int) -> tuple[Tensor, Tensor]:
        """Return mean ``[., L, H, D]`` and covariance ``[., L, H, D, D]`` of the queries after position `t`."""
        plain = rotation.off(queries, self.sinks)  # [., L, H, n, D]
        mean = plain.mean(-2, keepdim=True)
        centred = plain - mean
        turn = rotation.mean(t + 1, self.future)[:, :, None]  # [., L, 1, D, D]
        covariance = centred.transpose(-1, -2) @ centred / plain.shape[-2]
        return (mean @ turn.mT)[..., 0, :], turn @ covariance @ turn.mT


def past_queries(memory: dict[str, Any], newest: Tensor) -> list[Tensor]:
    """Return all queries so far, ``[., L, H, D]`` each, the newest last, and keep them in the memory of a sequence."""
    queries: list[Tensor] = memory.setdefault("queries", [])
    queries.append(newest)
    return queries
