"""A2SF's mask evaluation: the plain rule under streaming prefill, as the authors measured it."""

from __future__ import annotations

from dataclasses import dataclass

from kvscope.core.errors import UsageError
from kvscope.policies.a2sf import A2SF
from kvscope.policies.base import variant


@variant("a2sf", "streaming-mask")
@dataclass(frozen=True)
class A2SFStreamingMask(A2SF):
    """Reproduce the paper's mask evaluation, ``utils_lm_eval`` at fd63e32.

    That evaluation evicts inside the prompt too, hence streaming prefill, and it has scores for each query head. Its
    decisions are those of the plain rule with streaming prefill. The code treats ``alpha = 0`` as a special case only
    because the sums of evicted keys are infinite there.

    >>> from kvscope.replay.example import held
    >>> held("a2sf:variant=streaming-mask", [[1], [0.6, 0.4], [0.1, 0.2, 0.7]], 2, prefill="stream")
    [[0], [0, 1], [1, 2]]
    """

    prefills = frozenset({"stream"})
    published = True
    proven = "authors' decisions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise != "none":
            raise UsageError(
                f"a2sf: normalise={self.normalise} cannot be used with variant=streaming-mask",
                "Omit one of the two: the paper's evaluation does not divide sums.",
            )
