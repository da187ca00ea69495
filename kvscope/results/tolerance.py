"""How much a metric may change before a comparison calls it worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvscope.core.errors import UsageError


@dataclass(frozen=True)
class Tolerance:
    """The largest change of a metric that is tolerated.

    Attributes
    ----------
    amount : float
        From 0 up.
    relative : bool
        Whether `amount` is a percentage of the absolute value of the base.
    """

    amount: float
    relative: bool = False

    def of(self, base: float | None) -> float:
        """Return the largest change from `base` that is tolerated."""
        return self.amount / 100 * abs(base or 0.0) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.relative else f"{self.amount:g}"


def parse_tolerance(texts: Sequence[str]) -> dict[str, Tolerance]:
    """Return tolerances from ``0.01``, ``1%`` (for all metrics) and ``retained_mass=0.001``; ``""`` is for all.

    Raises
    ------
    UsageError
        If one is not a number from 0 up.
    """
    parsed: dict[str, Tolerance] = {}
    for part in (piece.strip() for text in texts for piece in text.split(",")):
        name, _, amount = part.rpartition("=")
        relative = amount.endswith("%")
        try:
            value = float(amount.removesuffix("%"))
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf:
            raise UsageError(f"tolerance {part!r} is not a number from 0 up", "Write 0.01, 1%, or retained_mass=0.001.")
        parsed[name.strip()] = Tolerance(value, relative)
    return parsed
