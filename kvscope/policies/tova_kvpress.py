"""TOVA as in NVIDIA/kvpress: a single eviction at the end of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from kvscope.policies.base import Protection, variant
from kvscope.policies.tova import TOVA


@variant("tova", "kvpress")
@dataclass(frozen=True)
class TOVAKvpress(TOVA):
    """Reproduce NVIDIA/kvpress, ``tova_press.py``: evict once, at the end of the prompt, and retain its last key.

    >>> from kvscope.replay.example import held
    >>> held(TOVAKvpress(), [[1], [0.6, 0.4], [0.5, 0.4, 0.1], [0.1, 0.1, 0.2, 0.6]], 2, prompt=3)
    [[0], [0, 1], [0, 2], [0, 2, 3]]
    """

    phase = "prefill"
    prefills = frozenset({"full"})
    published = True
    proven = "kvpress's code, read"

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks, recent=1)
