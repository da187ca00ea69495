"""KeyDiff: keys that differ from the others are retained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import Policy, Step, policy
from kvscope.policies.citation import Citation


@policy("keydiff")
@dataclass(frozen=True)
class KeyDiff(Policy):
    """Retain the keys whose direction differs most from the mean direction of all retained keys.

    Score of key ``j``: ``-cos(k_j, m)``, where ``m`` is the mean of ``k_i / |k_i|`` over the visible keys ``i``. No
    weights are read, and nothing is protected. Keys are scored anew at every step that evicts. Two keys are always
    equally close to their mean, so with a budget of one key rounding decides.

    arXiv:2504.15364, section 3; code NVIDIA/kvpress, ``keydiff_press.py``, which evicts once, at the end of the prompt.
    The paper evicts after each block of the prompt, for which that code has a wrapper.

    Example: budget 2. Keys 0 and 1 have the same direction, and key 2 is orthogonal to both: of the two equal ones the
    older is evicted. The direction of key 3 is close to the mean of the two retained keys, so it is evicted at once.

    >>> from kvscope.replay.example import held
    >>> keys = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
    >>> held(KeyDiff(), [[1.0], [0.5, 0.5], [0.3, 0.3, 0.4], [0.25] * 4], budget=2, prompt=1, keys=keys)
    [[0], [0, 1], [1, 2], [1, 2]]
    """

    needs = frozenset({"keys"})
    formula = "S[j] = -cos(k_j, mean of k_i / |k_i| over the visible i)"
    paper = "arXiv:2504.15364 section 3"
    citation = Citation(
        key="park2025keydiff",
        title=(
            "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
            "Environments"
        ),
        authors=(
            "Park, Junyoung and Jones, Dalton and Morse, Matthew J. and Goel, Raghavv and Lee, Mingu and Lott, Chris"
        ),
        booktitle="Advances in Neural Information Processing Systems",
        year=2025,
        arxiv="2504.15364",
    )
    proven = "kvpress's code, read"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if not step.compresses:
            return score
        unit = self._units(step)  # [., L, G, n, D]
        total = step.visible.double()[..., None, :] @ unit  # [R, L, G, 1, D]
        mean = functional.normalize(total, dim=-1)
        return -(unit @ mean.transpose(-1, -2))[..., 0].to(score.dtype)

    def _units(self, step: Step) -> Tensor:
        """Return the directions of all keys, ``[., L, G, n, D]``, and remember them.

        In double: the order in which a processor adds must not decide between keys that are almost equally close.
        """
        known = step.memory.get("directions")
        new = step.signals["keys"][..., 0 if known is None else known.shape[-2] :, :]
        unit = functional.normalize(new.double(), dim=-1)
        step.memory["directions"] = unit if known is None else torch.cat([known, unit], -2)
        directions: Tensor = step.memory["directions"]
        return directions
