"""DMS: a gate decides on every key when it arrives, and a key that it rejects is evicted some steps later."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Step, Traits, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("dms")
@dataclass(frozen=True)
class DMS(Policy):
    """Evict the keys whose learned gates are closed, each after `window` newer keys; there is no budget.

    Dynamic memory sparsification decides when a key arrives whether it is evicted, but evicts it `window` steps later,
    so that the queries in between still see it. This holds for the keys of the prompt and for later ones. A key is
    retained if its gate exceeds the threshold of its training plus `margin`.

    arXiv:2506.05345; code NVIDIA/kvpress, ``dms_press.py``, which has the same delay and the same default of `window`.
    The paper trains the model itself to decide. Ours: the decisions are those of a gate that ``kvscope gate train``
    made, for a model that does not change; with ``--distill`` the gate learns from recorded attention. The trace must
    contain layer inputs: ``kvscope trace --hidden``.

    Example: the gates of keys 0 and 1 are closed; each is evicted when two newer keys exist.

    >>> from kvscope.replay.example import held
    >>> shut = {"gate:demo": [-0.2, -0.1, 0.1, 0.4]}
    >>> held("dms:window=2", [[1], [0.5] * 2, [0.3] * 3, [0.25] * 4], budget=9, prompt=1, **shut)
    [[0], [0, 1], [1, 2], [2, 3]]
    """

    bounded = False
    formula = "evict j after step j + window if g[j] <= threshold + margin"
    paper = "arXiv:2506.05345"
    citation = Citation(
        key="lancucki2025dms",
        title="Inference-Time Hyper-Scaling with KV Cache Compression",
        authors=("{\\L}a{\\'n}cucki, Adrian and Staniszewski, Konrad and Nawrot, Piotr and Ponti, Edoardo M."),
        booktitle="Advances in Neural Information Processing Systems",
        year=2025,
        arxiv="2506.05345",
    )
    proven = "kvpress's code, read"

    gate: str = parameter("demo", "file of the gate, or demo for the gate of the bundled model")
    window: int = parameter(128, "number of newer keys after which a rejected key is evicted")
    margin: float = parameter(0.0, "number added to the threshold: above 0 evicts more keys, below 0 fewer")

    def __post_init__(self) -> None:
        at_least("window", self.window, 0)
        at_least("margin", self.margin, -1, 1)

    @property
    def traits(self) -> Traits:
        return self.with_traits(needs=frozenset({self._signal}))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        above = step.signals[self._signal].expand(score.shape)
        older = torch.arange(step.t + 1, device=score.device) <= step.t - self.window
        return torch.where((above <= self.margin) & older, -torch.inf, above)

    @property
    def _signal(self) -> str:
        return f"gate:{self.gate}"
