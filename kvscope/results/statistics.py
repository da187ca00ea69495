"""Statistics over sequences: the interval of a mean, and the comparison of two policies on the same sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP = 2000  # resamples
FEWEST = 5  # sequences that an interval needs
LEVEL = 0.05  # largest p of a significant difference


@dataclass(frozen=True)
class Paired:
    """Two policies, A and B, on the same sequences; differences are B minus A.

    Attributes
    ----------
    sequences : int
        How many have a value on both sides.
    mean_a, mean_b, difference : float or None
        Means over the sequences; None without any.
    low, high : float or None
        95 % bootstrap interval of the mean difference over sequences; None with fewer than five.
    above, below, equal : int
        Sequences in which B is above A, below it, exactly equal.
    p : float
        Of the two-sided exact sign test over the sequences that are not equal; 1 without any.
    smallest_p : float
        The p that the test would give if all of these differed in one direction: the least that they can give.
    """

    sequences: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    low: float | None
    high: float | None
    above: int
    below: int
    equal: int
    p: float
    smallest_p: float

    @property
    def significant(self) -> bool:
        """Whether the two differ: the sign test rejects equality, and the interval excludes 0."""
        if self.low is None or self.high is None:
            return False
        return self.p <= LEVEL and not self.low <= 0 <= self.high

    @property
    def warning(self) -> str:
        """Why so few sequences support no claim; empty where they are enough."""
        if self.smallest_p <= LEVEL:
            return ""
        needed = 1 + math.ceil(math.log2(1 / LEVEL))
        differ = self.above + self.below
        if self.equal:
            count = f"{differ} of {self.sequences} sequences differ"
        else:
            count = f"{self.sequences} {'sequence' if self.sequences == 1 else 'sequences'}"
        return f"{count}: p cannot go below {self.smallest_p:.2g}; {needed} or more are needed for p <= {LEVEL:g}"


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Return how B differs from A; element ``i`` of both is of the same sequence.

    The sign test counts in how many sequences B is above A, so it assumes nothing about the distribution of the
    differences. The interval is the percentile bootstrap of the mean difference, which is too narrow for few sequences:
    for normal differences it covers the true mean in about 83 % of the cases with 5 sequences, 91 % with 10 and 93 %
    with 20.

    Raises
    ------
    ValueError
        If the two have different lengths, or a value is not finite.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"A and B have different shapes: {first.shape} and {second.shape}")
    difference = second - first
    if not np.isfinite(difference).all():
        raise ValueError("a value is not finite")
    above, below = int((difference > 0).sum()), int((difference < 0).sum())
    differ = above + below
    low, high = interval(difference)
    return Paired(
        sequences=len(first),
        mean_a=_mean(first),
        mean_b=_mean(second),
        difference=_mean(difference),
        low=low,
        high=high,
        above=above,
        below=below,
        equal=len(first) - differ,
        p=float(binomtest(above, differ).pvalue) if differ else 1.0,
        smallest_p=min(1.0, 2.0 ** (1 - differ)),
    )


def interval(means: NDArray[np.float64], seed: int = 0) -> tuple[float | None, float | None]:
    """Return the 95 % percentile-bootstrap interval of the mean over sequences; None with fewer than five."""
    if len(means) < FEWEST:
        return None, None
    draws = np.random.default_rng(seed).integers(0, len(means), (BOOTSTRAP, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None
