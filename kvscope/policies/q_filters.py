"""Q-Filters: keys that point where the queries of their head point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Protection, Recurrence, Step, Traits, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("q-filters")
@dataclass(frozen=True)
class QFilters(Policy):
    """Retain the newest keys, and those with the largest dot product with their head's filter; no weights are read.

    A filter is the principal direction of a model's queries, computed once. It is the first right singular vector of
    the queries of a query head, with the sign that most of them have, averaged over the query heads of a group.
    ``kvscope gate filters TRACE`` makes the file from a trace with vectors; ``filters=demo`` are those of the bundled
    model.

    arXiv:2503.02812; code NathanGodey/qfilters, ``make_filters.py`` and ``hf_cache.py``, which evicts at every step and
    retains the newest keys. NVIDIA/kvpress, ``qfilter_press.py``, evicts once and protects none: ``recent=0`` and
    ``--compress prefill``. The files of filters of both have the opposite sign. A model is identified by its sizes, and
    by a sample of its weights where both traces contain it (``--hidden``).

    Example: budget 2; the products of the keys with the filter are 2, -1, 1 and 0.5.

    >>> from kvscope.replay.example import held
    >>> products = {"filter:demo": [2.0, -1.0, 1.0, 0.5]}
    >>> held("q-filters:recent=1", [[1], [0.5] * 2, [0.3] * 3, [0.25] * 4], budget=2, prompt=1, **products)
    [[0], [0, 1], [0, 2], [0, 3]]
    """

    formula = "S[j] = k_j f, with f the principal direction of the queries of the head"
    paper = "arXiv:2503.02812"
    citation = Citation(
        key="godey2025qfilters",
        title="Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression",
        authors=(
            "Godey, Nathan and Devoto, Alessio and Zhao, Yu and Scardapane, Simone and Minervini, Pasquale and "
            "de la Clergerie, {\\'E}ric and Sagot, Beno{\\^i}t"
        ),
        year=2025,
        arxiv="2503.02812",
    )
    proven = "kvpress's decisions"

    filters: str = parameter("demo", "file of the filters, or demo for the filters of the bundled model")
    recent: int = parameter(64, "newest keys that are never evicted, at most half of the budget")

    def __post_init__(self) -> None:
        at_least("recent", self.recent, 0)

    @property
    def traits(self) -> Traits:
        return self.with_traits(needs=frozenset({self._signal}))

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.recent, budget // 2))

    def recurrence(self) -> Recurrence:
        return Recurrence("none", fixed=lambda keys: keys.signals[self._signal])

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return step.signals[self._signal].expand(step.visible.shape).to(score.dtype)

    @property
    def _signal(self) -> str:
        return f"filter:{self.filters}"
