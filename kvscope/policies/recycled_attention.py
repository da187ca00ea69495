"""Recycled Attention and RefreshKV: sparse readers that select anew from the whole cache at some steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.core.errors import UsageError
from kvscope.policies.base import GroupReduction, Policy, Step, Traits, at_least, parameter, policy
from kvscope.policies.citation import Citation

Schedule = Literal["fixed", "dynamic"]


@policy("recycled-attention")
@dataclass(frozen=True)
class RecycledAttention(Policy):
    """Read the heaviest keys of the last full row and all later keys; read all keys every `stride` steps.

    A full step sees every key. The ``K = B`` keys with the largest weights in its row are the recycled set; `group`
    reduces the rows of the query heads of a group, which are then max-pooled. A partial step sees that set and the
    current key. Then the current key is added to the set, and while the set has more than ``K`` keys, the one with the
    lowest weight in that full row is removed. Keys generated since that row are removed last, the oldest first. Of
    equal weights the older key is removed first.

    The end of the prompt is a full step (with streaming prefill: step 0). With ``schedule=fixed``, every `stride`-th
    step after it is full too. With ``schedule=dynamic``, each layer compares its query, averaged over query heads, with
    that of its last full step at every `compare_every`-th step after it; the step is partial if their cosine is above
    `threshold`, and full otherwise. Steps in between are partial. The paper does not define whether queries are
    compared before or after the rotary embedding; here it is after.

    arXiv:2411.05787; no code is public. Here a set smaller than ``K`` grows before a key is removed; the paper's
    pseudocode always removes one. In the paper keys are lost if the stride exceeds ``K``; here a sparse reader holds
    all keys.

    Example: budget 2, and a full row (.5 .2 .3) at the end of the prompt. Step 3 reads keys 0, 2 and 3; then key 2 is
    removed from the set. Step 4 reads keys 0, 3 and 4; then key 0 is removed.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.5, 0.5], [0.5, 0.2, 0.3], [0.1, 0.7, 0.1, 0.1], [0.2] * 5, [0.1, 0.5, 0.1, 0.1, 0.1, 0.1]]
    >>> held(RecycledAttention(), rows, budget=2, prompt=3)[3:]
    [[0, 2, 3], [0, 3, 4], [3, 4, 5]]
    """

    reads = True
    needs = frozenset({"weights"})
    formula = "S[j] = w_f[j] of the last full row f"
    paper = "arXiv:2411.05787 (first version)"
    citation = Citation(
        key="xu2024recycled",
        title="Recycled Attention: Efficient inference for long-context language models",
        authors="Xu, Fangyuan and Goyal, Tanya and Choi, Eunsol",
        year=2024,
        arxiv="2411.05787v1",
    )
    proven = "paper"

    stride: int = parameter(50, "steps from one full step to the next, with schedule=fixed")
    schedule: Schedule = parameter("fixed", "when all keys are read: fixed (every stride steps) or dynamic")
    compare_every: int = parameter(5, "steps from one comparison of queries to the next, with schedule=dynamic")
    threshold: float = parameter(0.8, "cosine of queries above which a compared step is partial")
    pooling: int = parameter(1, "width of the max-pooling of the full row, odd; 1: none")
    group: GroupReduction = parameter("max", "how the query heads of a group are reduced to one: mean, max or sum")

    def __post_init__(self) -> None:
        at_least("stride", self.stride, 1)
        at_least("compare_every", self.compare_every, 1)
        at_least("threshold", self.threshold, -1, 1)
        at_least("pooling", self.pooling, 1)
        if self.pooling % 2 == 0:
            raise UsageError(f"pooling={self.pooling} is even", "pooling must be odd: a key in the middle.")

    @property
    def traits(self) -> Traits:
        dynamic = self.schedule == "dynamic"
        return self.with_traits(needs=frozenset({"weights", "mean_query"} if dynamic else {"weights"}))

    def read(self, step: Step) -> Tensor:
        full = self._full(step)
        step.memory["full"] = full
        if "chosen" not in step.memory:
            return step.visible
        chosen = _with_current(step.memory["chosen"], True)
        return step.visible & (chosen | full[..., None, None])

    def observe(self, step: Step, score: Tensor) -> Tensor:
        full = step.memory.pop("full", None)
        if full is None:  # a row of the prompt: it sees everything, and is a full step only at the end
            if not step.compresses:
                return score
            full = self._full(step)
        self._partial(step)
        if self._may_be_full(step):
            self._choose(step, full)
        return score

    def _may_be_full(self, step: Step) -> bool:
        """Return whether this step is full in any run and layer, or may be where queries are compared."""
        since: int = step.t - step.memory["start"]
        return since % (self.stride if self.schedule == "fixed" else self.compare_every) == 0

    def _full(self, step: Step) -> Tensor:
        """Return in which runs and layers this is a full step, bool ``[R, L]``."""
        shape = step.visible.shape[:2]
        since = step.t - step.memory.setdefault("start", step.t)
        if since == 0:
            return step.visible.new_ones(shape)
        if self.schedule == "fixed" or not self._may_be_full(step):
            return step.visible.new_full(shape, self._may_be_full(step))
        similarity = functional.cosine_similarity(step.signals["mean_query"], step.memory["query"], dim=-1)
        return similarity <= self.threshold

    def _partial(self, step: Step) -> None:
        """Let the current key join the recycled set, and the lowest of the last full row leave it."""
        memory = step.memory
        if "chosen" not in memory:
            memory["chosen"] = torch.zeros_like(step.visible)
            memory["rank"] = torch.zeros(step.visible.shape, dtype=torch.int32, device=step.visible.device)
            return
        chosen = _with_current(memory["chosen"], True) & step.visible
        rank = _with_current(memory["rank"], step.t)
        lowest = rank.masked_fill(~chosen, step.length).argmin(-1, keepdim=True)
        kept = chosen.gather(-1, lowest) & (chosen.sum(-1) <= step.budget)[..., None]
        memory["chosen"], memory["rank"] = chosen.scatter(-1, lowest, kept), rank

    def _choose(self, step: Step, full: Tensor) -> None:
        """Make the keys with the largest weights in this row the recycled set, in the runs and layers of `full`."""
        memory, now = step.memory, full[..., None, None]
        weights = step.weights(self.group).masked_fill(~step.visible, -torch.inf)
        if self.pooling > 1:
            flat = weights.flatten(0, 2)
            pooled = functional.max_pool1d(flat, self.pooling, stride=1, padding=self.pooling // 2)
            weights = pooled.view_as(weights).masked_fill(~step.visible, -torch.inf)
        order = weights.argsort(dim=-1, stable=True)  # of equal weights the older ranks lower
        places = torch.arange(step.t + 1, dtype=torch.int32, device=order.device).expand_as(order)
        rank = torch.zeros_like(places).scatter(-1, order, places)
        chosen = step.visible & (rank > step.t - step.budget[..., None])
        memory["rank"] = torch.where(now, rank, memory["rank"])
        memory["chosen"] = torch.where(now, chosen, memory["chosen"])
        if self.schedule == "dynamic":
            query = step.signals["mean_query"].expand(*full.shape, -1)
            memory["query"] = torch.where(full[..., None], query, memory.get("query", query))


@policy("refreshkv")
@dataclass(frozen=True)
class RefreshKV(RecycledAttention):
    """Read as Recycled Attention does, but pool the full row, and compare queries to decide when to read all keys.

    The rule is that of `RecycledAttention`, where the full row is max-pooled over 7 keys, and ``schedule=dynamic``:
    queries are compared at every 10th step, and a cosine of at most .85 makes the step full. The paper uses .85 for
    Llama-3.1-8B and .95 for Qwen2-7B, and compares every 5 or 10 steps. RefreshKV, ACL 2025 (arXiv:2411.05787), figure
    2 and section 2.2; no code is public.

    Example: with ``compare_every=1`` the query changes its direction at step 4, which therefore reads every key.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.5, 0.5], [0.5, 0.2, 0.3], [0.1, 0.7, 0.1, 0.1], [0.2] * 5]
    >>> query = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]
    >>> held(RefreshKV(compare_every=1, pooling=1), rows, budget=2, prompt=3, mean_query=query)[3:]
    [[0, 2, 3], [0, 1, 2, 3, 4]]
    """

    needs = frozenset({"weights", "mean_query"})
    formula = "S[j] = max of w_f[i] of the last full row f, over the `pooling` neighbours i of j"
    paper = "RefreshKV, ACL 2025 (arXiv:2411.05787) section 2.2"
    citation = Citation(
        key="xu2025refreshkv",
        title="RefreshKV: Updating Small KV Cache During Long-form Generation",
        authors="Xu, Fangyuan and Goyal, Tanya and Choi, Eunsol",
        booktitle="Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics",
        year=2025,
        arxiv="2411.05787",
        doi="10.18653/v1/2025.acl-long.1211",
    )
    proven = "paper"

    schedule: Schedule = parameter("dynamic", "when all keys are read: fixed (every stride steps) or dynamic")
    compare_every: int = parameter(10, "steps from one comparison of queries to the next, with schedule=dynamic")
    threshold: float = parameter(0.85, "cosine of queries above which a compared step is partial")
    pooling: int = parameter(7, "width of the max-pooling of the full row, odd; 1: none")


def _with_current(values: Tensor, current: float) -> Tensor:
    """Return stored values of the older keys, with `current` appended for the current key."""
    return functional.pad(values, (0, 1), value=current)
