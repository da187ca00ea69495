"""Compactor: keys that differ from the others, and keys that the tokens around them attend to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.cache import at, without_gaps
from kvscope.policies.citation import Citation
from kvscope.policies.expected_attention import past_queries
from kvscope.policies.rotation import Rotation

JITTER = 0.01  # added to the diagonal that is inverted, as in the code


@policy("compactor")
@dataclass(frozen=True)
class Compactor(Policy):
    """Retain the keys with a high leverage score, or with much attention from earlier and later queries nearby.

    Leverage: ``X`` is the matrix of the keys before their rotary embedding, minus their mean, times a random matrix of
    `sketch` columns. The leverage of key ``j`` is ``x_j (X'X)^-1 x_j``.

    Attention: the keys are divided into chunks of `chunk`. In each chunk the weights of all its queries on all its keys
    are added up, without a causal mask and without a factor of the logits. The sums are averaged over the query heads
    of a group, multiplied by the norm of the value, and averaged over three neighbours.

    Both are scaled to mean 0 and deviation 1 over the heads of a layer. The score is `blend` times the leverage, plus
    the attention. The first `sinks` keys (at most two thirds of the budget) and the newest `recent` (at most a third)
    are protected, and have no part in either. It evicts once, at the end of the prompt. If it must evict later too, the
    retained keys and their queries have a part.

    arXiv:2507.08143; code NVIDIA/kvpress, ``compactor_press.py``. As in that code, `blend` is by default the share of
    the keys that is evicted, and the last chunk is filled with zeros, which attend and are attended to. Ours: one
    random matrix for all heads.

    Example: no rotation, and one chunk. All queries have the direction of keys 1 and 3. Key 0 is the only one with
    another direction, but no query attends to it: with ``blend=0`` it is evicted.

    >>> from kvscope.replay.example import held
    >>> keys, still = [[0.0, 3.0], [1.0, 0.0], [0.1, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    >>> given = {"keys": keys, "queries": [[2.0, -1.0]] * 4, "values": [[1.0, 0.0]] * 4, "rotary": still}
    >>> rows = [[1], [0.5] * 2, [0.3] * 3, [0.25] * 4]
    >>> held("compactor:sinks=0,recent=0,chunk=4,blend=0", rows, budget=3, prompt=4, **given)[-1]
    [1, 2, 3]
    """

    needs = frozenset({"keys", "values", "queries", "rotary"})
    phase = "prefill"
    formula = "S[j] = blend * z(x_j (X'X)^-1 x_j) + z(|v_j| * sum of q in j's chunk of softmax(q K)[j])"
    paper = "arXiv:2507.08143"
    citation = Citation(
        key="chari2025compactor",
        title="Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
        authors="Chari, Vivek and Van Durme, Benjamin",
        year=2025,
        arxiv="2507.08143",
    )
    proven = "kvpress's decisions"

    sinks: int = parameter(8, "first keys, which are never evicted; at most two thirds of the budget")
    recent: int = parameter(4, "newest keys, which are never evicted; at most a third of the budget")
    chunk: int = parameter(256, "keys of a chunk, whose queries attend to them")
    sketch: int = parameter(48, "columns of the random matrix")
    blend: float | None = parameter(None, "factor of the leverage; none: the share of evicted keys")
    seed: int = parameter(0, "seed of the random matrix")

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)
        at_least("recent", self.recent, 0)
        at_least("chunk", self.chunk, 1)
        at_least("sketch", self.sketch, 1)
        at_least("blend", 0 if self.blend is None else self.blend, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=min(self.sinks, budget * 2 // 3), recent=min(self.recent, budget // 3))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        past = past_queries(step.memory, step.signals["queries"])
        if not (step.compresses and step.exceeds):
            return score
        place, there = without_gaps(step.visible, step.most_visible)
        plain = Rotation(step.signals["rotary"]).off(step.signals["keys"], 0)
        states = [plain, step.signals["keys"].double(), step.signals["values"].double()]
        queries = torch.stack(past, -2).double()  # [., L, H, n, D]
        scores = []
        for run, budget in enumerate(step.budgets):  # the protection differs, and with it what a chunk is
            kept = self.protect(budget)
            own = place[run : run + 1, ..., kept.sinks :]
            free = there[run : run + 1, ..., kept.sinks :] & (own <= step.t - kept.recent)
            vectors = [at(own, _of_run(each, run)) * free[..., None] for each in states]  # [1, L, G, m, D]
            asked = at(own.repeat_interleave(queries.shape[2] // own.shape[2], 2), _of_run(queries, run))
            held = step.visible[run : run + 1].sum(-1, keepdim=True)  # [1, L, G, 1]
            blend = 1 - step.budget[run : run + 1, ..., None] / held if self.blend is None else self.blend
            mixed = blend * standard(self._leverage(vectors[0], free), free)
            mixed = mixed + standard(self._attention(asked, vectors[1], vectors[2], free), free)
            scores.append(functional.pad(torch.where(free, mixed, 0), (kept.sinks, 0)))
        return score.scatter(-1, place, torch.cat(scores).to(score.dtype))

    def _leverage(self, keys: Tensor, free: Tensor) -> Tensor:
        """Return the approximate leverage of each key ``[1, L, G, m, D]``, ``[1, L, G, m]``."""
        centred = (keys - keys.sum(-2, keepdim=True) / free.sum(-1)[..., None, None].clamp(min=1)) * free[..., None]
        sketched = centred @ sketch_of(self.seed, keys.shape[-1], self.sketch).to(keys.device)
        squares = sketched.mT @ sketched + JITTER * torch.eye(self.sketch, dtype=keys.dtype, device=keys.device)
        inverse = torch.cholesky_solve(sketched.mT, torch.linalg.cholesky(squares))
        return (sketched * inverse.mT).sum(-1).clamp(min=0)

    def _attention(self, queries: Tensor, keys: Tensor, values: Tensor, free: Tensor) -> Tensor:
        """Return how much the queries of a key's chunk attend to it, times its value's norm, ``[1, L, G, m]``."""
        heads, count = keys.shape[2], keys.shape[3]
        asked = (queries * free.repeat_interleave(queries.shape[2] // heads, 2)[..., None]).unflatten(2, (heads, -1))  # type: ignore[no-untyped-call]
        padding = (0, 0, 0, -count % self.chunk)
        asked, keys = functional.pad(asked, padding), functional.pad(keys, padding)
        asked = asked.view(*asked.shape[:4], -1, self.chunk, asked.shape[-1])  # [1, L, G, Q, c, chunk, D]
        keys = keys.view(*keys.shape[:3], 1, -1, self.chunk, keys.shape[-1])
        sums = (asked @ keys.mT).softmax(-1).sum(-2).flatten(-2).mean(3)[..., :count]  # [1, L, G, m]
        return functional.avg_pool1d((sums * values.norm(dim=-1)).flatten(1, 2), 3, 1, 1).view_as(free)


def _of_run(signal: Tensor, run: int) -> Tensor:
    """Return the part of a signal that a run has; all runs share one that has a leading axis of size 1."""
    return signal if len(signal) == 1 else signal[run : run + 1]


def standard(score: Tensor, free: Tensor) -> Tensor:
    """Return scores ``[1, L, G, m]`` with mean 0 and deviation 1 over the free keys of all heads of each layer."""
    count = free.sum((-2, -1), keepdim=True)
    mean = torch.where(free, score, 0).sum((-2, -1), keepdim=True) / count.clamp(min=1)
    squares = torch.where(free, score - mean, 0).square().sum((-2, -1), keepdim=True)
    return (score - mean) / (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-6)


def sketch_of(seed: int, size: int, columns: int) -> Tensor:
    """Return the random matrix, float64 ``[D, columns]``: normal numbers of variance ``1 / columns``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)
