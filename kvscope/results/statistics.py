"""What a number of sequences can carry: an interval of a mean, and two policies on the same sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP = 2000  # resamples
FEWEST = 5  # sequences for an interval
LEVEL = 0.05  # p above which a difference is no finding


@dataclass(frozen=True)
class Paired:
    """Two policies, A and B, on the same sequences; every number is of B minus A.

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
        Two-sided exact sign test over the sequences that are not equal; 1 without any.
    smallest_p : float
        What the test would give if all of these pointed one way: no number of them can say more.
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
    def told_apart(self) -> bool:
        """Whether the sequences carry the claim that the two differ: the interval and the sign test both say so."""
        if self.low is None or self.high is None:
            return False
        return self.p <= LEVEL and not self.low <= 0 <= self.high

    @property
    def warning(self) -> str:
        """Why no claim can rest on so few sequences, or nothing."""
        if self.smallest_p <= LEVEL:
            return ""
        needed = 1 + math.ceil(math.log2(1 / LEVEL))
        differ = self.above + self.below
        if self.equal:
            told = f"{differ} of {self.sequences} sequences differ"
        else:
            told = f"{self.sequences} {'sequence' if self.sequences == 1 else 'sequences'}"
        return f"{told}: p cannot go below {self.smallest_p:.2g}; {needed} or more are needed for p <= {LEVEL:g}"


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Return how B differs from A, of which element ``i`` of both belongs to the same sequence.

    The sign test asks only in how many sequences B is above A, so it holds whatever the differences look like. The
    interval is the percentile bootstrap of the mean difference, which is too narrow for few sequences: of normal
    differences it holds the true mean in about 83 % of the cases with 5 sequences, 91 % with 10 and 93 % with 20.

    Raises
    ------
    ValueError
        If the two have different lengths, or a value is not finite.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"not the same sequences: {first.shape} and {second.shape}")
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


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
