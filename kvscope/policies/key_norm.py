"""Key norm: keys with a small norm are retained, since queries tend to attend to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Recurrence, Step, at_least, parameter, policy, variant_parameter
from kvscope.policies.citation import Citation


@policy("key-norm")
@dataclass(frozen=True)
class KeyNorm(Policy):
    """Retain the keys with the smallest L2 norm; no weights are read and nothing is protected.

    Score of key ``j``: ``-|k_j|``, per key/value head. Devoto et al., arXiv:2406.11430; code
    alessiodevoto/l2compress, ``cache.py``, whose exact rule is the variant. NVIDIA/kvpress, ``knorm_press.py``, has the
    same score but evicts only at the end of the prompt (``--compress prefill``).

    Example: budget 2, norms 3, 1, 2, 5: key 0 is evicted when key 2 arrives, key 3 when it arrives itself.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.5] * 2, [0.3] * 3, [0.25] * 4]
    >>> held(KeyNorm(), rows, budget=2, prompt=1, key_l2=[3.0, 1.0, 2.0, 5.0])
    [[0], [0, 1], [1, 2], [1, 2]]
    """

    needs = frozenset({"key_l2"})
    formula = "S[j] = -|k_j|_2"
    paper = "arXiv:2406.11430"
    citation = Citation(
        key="devoto2024l2norm",
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        authors="Devoto, Alessio and Zhao, Yu and Scardapane, Simone and Minervini, Pasquale",
        booktitle="Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
        year=2024,
        arxiv="2406.11430",
    )
    proven = "paper"

    variant: str = variant_parameter()
    # Used by the variant only; declared here so that all runs of the policy are stored with the same parameters.
    keep_ratio: float = parameter(0.9, "l2compress: share of the keys that is retained when some are evicted")
    prune_after: int = parameter(2048, "l2compress: number of keys from which some are evicted")
    skip_layers: int = parameter(0, "l2compress: first layers of the model, which retain everything")

    def __post_init__(self) -> None:
        at_least("keep_ratio", self.keep_ratio, 0, 1)
        at_least("prune_after", self.prune_after, 1)
        at_least("skip_layers", self.skip_layers, 0)

    def recurrence(self) -> Recurrence:
        return Recurrence("none", fixed=lambda keys: -keys.signals["key_l2"])

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return -step.signals["key_l2"].expand(step.visible.shape).to(score.dtype)
