"""Quest: a sparse reader of the pages of keys that could matter most to the query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import GroupReduction, Policy, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("quest")
@dataclass(frozen=True)
class Quest(Policy):
    """Read the pages of `page_size` neighbouring keys with the largest upper bound on their logits; hold all keys.

    Bound of a page for a query head: ``sum_d max(q_d * low_d, q_d * high_d)``, with ``low`` and ``high`` the smallest
    and largest value of each dimension among the page's keys (after rotary embedding). The
    ``max(fewest_pages, B // page_size)`` pages with the largest bounds are read; of equal bounds, the newer page. All
    keys are read in the prompt, in the first `skip_layers` layers, and at a step whose keys fit the budget. The last
    page may be shorter than the others.

    arXiv:2406.10774, section 3.3; code mit-han-lab/Quest, ``evaluation/quest_attention.py``. That code selects pages
    for every query head; here a key/value head selects them, with the bounds of its query heads reduced by `group`.
    That code reads the current key only if its page is selected; here it is always read, if necessary without its
    page. If the budget is below ``fewest_pages`` pages, more keys than the budget are read.

    Example: two pages of one key each are read. Keys 0 and 2 have the query's direction, key 1 the opposite one.

    >>> from kvscope.replay.example import held
    >>> keys, queries = [[1.0], [-1.0], [0.5], [-0.5]], [[1.0]] * 4
    >>> reader = Quest(page_size=1, fewest_pages=2, skip_layers=0)
    >>> held(reader, [[1.0], [0.5] * 2, [0.3] * 3, [0.25] * 4], budget=2, prompt=3, keys=keys, queries=queries)[3]
    [0, 2, 3]
    """

    reads = True
    needs = frozenset({"keys", "queries"})
    formula = "bound of a page = sum over d of max(q_d * low_d, q_d * high_d)"
    paper = "arXiv:2406.10774 section 3.3"
    citation = Citation(
        key="tang2024quest",
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        authors="Tang, Jiaming and Zhao, Yilong and Zhu, Kan and Xiao, Guangxuan and Kasikci, Baris and Han, Song",
        booktitle="International Conference on Machine Learning",
        year=2024,
        arxiv="2406.10774",
    )
    proven = "authors' decisions"

    page_size: int = parameter(16, "number of keys in a page")
    fewest_pages: int = parameter(3, "smallest number of pages to read, whatever the budget")
    skip_layers: int = parameter(2, "first layers of the model, which read everything")
    group: GroupReduction = parameter("max", "how the bounds of a group's query heads are reduced: mean, max or sum")

    def __post_init__(self) -> None:
        at_least("page_size", self.page_size, 1)
        at_least("fewest_pages", self.fewest_pages, 1)
        at_least("skip_layers", self.skip_layers, 0)

    def read(self, step: Step) -> Tensor:
        bound = step.grouped(self._bounds(step), self.group)  # [., L, G, pages]
        bound = bound.expand(step.visible.shape[0], -1, -1, -1)
        outside = ~self._paged(step.visible, False).any(-1)  # pages wholly before a sliding window
        order = bound.masked_fill(outside, -torch.inf).argsort(dim=-1, stable=True)
        pages = order.shape[-1]
        most = (step.budget // self.page_size).clamp(min=self.fewest_pages)[..., None]
        best = torch.arange(pages, device=order.device) >= pages - most
        chosen = torch.zeros_like(outside).scatter(-1, order, best)
        reads = chosen.repeat_interleave(self.page_size, -1)[..., : step.t + 1]
        reads[..., -1].fill_(True)
        whole = (step.layers < self.skip_layers)[:, None] | (step.t < step.budget)  # [R, L, S]
        return step.visible & (reads | whole[..., None])

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return score

    def _bounds(self, step: Step) -> Tensor:
        """Return the bound of every page for every query head, ``[., L, H, pages]``."""
        low, high = self._extremes(step)
        queries = step.signals["queries"].double()  # the order in which a product adds must decide nothing
        runs, layers, heads, size = queries.shape
        grouped = queries.reshape(runs, layers, step.kv_heads, -1, size)
        bound = grouped.clamp(min=0) @ high.transpose(-1, -2) + grouped.clamp(max=0) @ low.transpose(-1, -2)
        return bound.reshape(bound.shape[0], layers, heads, -1).to(step.signals["queries"].dtype)

    def _extremes(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest values of each page, ``[., L, G, pages, D]``, and remember them."""
        keys, memory = step.signals["keys"], step.memory
        first = memory.get("pages_end", 0) // self.page_size  # the first page that has changed
        new = keys[..., first * self.page_size :, :].transpose(-1, -2)  # [., L, G, D, keys of the new pages]
        low = self._paged(new, torch.inf).amin(-1).transpose(-1, -2)
        high = self._paged(new, -torch.inf).amax(-1).transpose(-1, -2)
        low, high = low.double(), high.double()
        if first:
            low = torch.cat([memory["low"][..., :first, :], low], -2)
            high = torch.cat([memory["high"][..., :first, :], high], -2)
        memory["pages_end"], memory["low"], memory["high"] = step.t + 1, low, high
        return low, high

    def _paged(self, values: Tensor, fill: float) -> Tensor:
        """Return ``[..., n]`` as ``[..., pages, page_size]``, the last page filled up with `fill`."""
        missing = -values.shape[-1] % self.page_size
        padded = functional.pad(values, (0, missing), value=fill)
        return padded.reshape(*values.shape[:-1], -1, self.page_size)
