"""TOVA: token omission via attention. The least attended key of the newest row is evicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import (
    GroupReduction,
    Policy,
    Protection,
    Recurrence,
    Scope,
    Step,
    at_least,
    parameter,
    policy,
    variant_parameter,
)
from kvscope.policies.citation import Citation


@policy("tova")
@dataclass(frozen=True)
class TOVA(Policy):
    """Retain the keys that the newest query attends to most.

    Score of key ``j``: its weight in row ``t``, averaged over all query heads; one decision per layer.
    arXiv:2401.06104, section 4.2 and algorithm 1; code schwartz-lab-NLP/TOVA, ``tova_cache.py``. No key is protected:
    even the current one can be evicted. As in that code, a prompt that exceeds the budget is evicted from once, at its
    end; the paper's evaluation (appendix E) uses streaming prefill. We do not reproduce its compressed positions for
    long texts. In its ablations each head decides (``scope=kv_head``; with grouped heads that is EasyKV's rule in
    decoding), or the first keys are protected (`sinks`).

    Example
    -------
    >>> from kvscope.replay.example import held
    >>> held(TOVA(), [[1], [0.6, 0.4], [0.5, 0.2, 0.3]], 2)
    [[0], [0, 1], [0, 2]]
    """

    formula = "S[j] = mean over the query heads h of w_t[h, j]"
    paper = "arXiv:2401.06104 section 4.2"
    citation = Citation(
        key="oren2024tova",
        title="Transformers are Multi-State RNNs",
        authors="Oren, Matanel and Hassid, Michael and Yarden, Nir and Adi, Yossi and Schwartz, Roy",
        booktitle="Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
        year=2024,
        arxiv="2401.06104",
        doi="10.18653/v1/2024.emnlp-main.1043",
    )
    proven = "authors' decisions"

    scope: Scope = parameter("layer", "layer: all heads retain the same keys; kv_head: each its own")  # type: ignore[misc]
    sinks: int = parameter(0, "first keys that are never evicted")
    group: GroupReduction = parameter("mean", "scope=kv_head: how a group's query heads are reduced: mean, max or sum")
    variant: str = variant_parameter()

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks)

    def recurrence(self) -> Recurrence:
        return Recurrence("mean" if self.scope == "layer" else self.group)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return step.layer_weights() if self.scope == "layer" else step.weights(self.group)
