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
    clusters : int
        How many they are without near-copies: those of one cluster count as one.
    mean_a, mean_b, difference : float or None
        Means over the sequences; None without any.
    low, high : float or None
        95 % bootstrap interval of the mean difference over clusters; None with fewer than five.
    above, below, equal : int
        Clusters in which B is above A, below it, exactly equal, on the mean of their sequences.
    p : float
        Of the two-sided exact sign test over the clusters that are not equal; 1 without any.
    smallest_p : float
        The p that the test would give if all of these differed in one direction: the least that they can give.
    """

    sequences: int
    clusters: int
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
        return is_significant(self.p, self.low, self.high)

    @property
    def unit(self) -> str:
        """What is counted: ``sequence``, or ``cluster`` where some are near-copies."""
        return "sequence" if self.clusters == self.sequences else "cluster"

    @property
    def warning(self) -> str:
        """Why so few sequences support no claim; empty where they are enough."""
        if self.smallest_p <= LEVEL:
            return ""
        needed = 1 + math.ceil(math.log2(1 / LEVEL))
        differ = self.above + self.below
        what = self.unit if self.clusters == 1 else f"{self.unit}s"
        count = f"{differ} of {self.clusters} {what} differ" if self.equal else f"{self.clusters} {what}"
        return f"{count}: p cannot go below {self.smallest_p:.2g}; {needed} or more are needed for p <= {LEVEL:g}"


def is_significant(p: float, low: float | None, high: float | None) -> bool:
    """Return whether a test rejects that two are equal, and the interval of their difference excludes 0."""
    return low is not None and high is not None and p <= LEVEL and not low <= 0 <= high


def paired(a: Sequence[float], b: Sequence[float], clusters: Sequence[int] = ()) -> Paired:
    """Return how B differs from A; element ``i`` of both is of the same sequence.

    Sequences with the same number in `clusters` are near-copies, which tell what one of them would: the sign test
    counts the mean difference of each cluster, and the interval draws whole clusters (cluster bootstrap; Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). Means are over sequences all the same.

    The sign test counts in how many sequences B is above A, so it assumes nothing about the distribution of the
    differences. The interval is the percentile bootstrap of the mean difference, which is too narrow for few sequences:
    for normal differences it covers the true mean in about 83 % of the cases with 5 sequences, 91 % with 10 and 93 %
    with 20.

    Raises
    ------
    ValueError
        If the two have different lengths, or a value is not finite; if not every sequence has a cluster.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"A and B have different shapes: {first.shape} and {second.shape}")
    difference = second - first
    if not np.isfinite(difference).all():
        raise ValueError("a value is not finite")
    counted = _cluster_means(difference, clusters)
    above, below = int((counted > 0).sum()), int((counted < 0).sum())
    differ = above + below
    low, high = interval(difference, clusters=clusters)
    return Paired(
        sequences=len(first),
        clusters=len(counted),
        mean_a=_mean(first),
        mean_b=_mean(second),
        difference=_mean(difference),
        low=low,
        high=high,
        above=above,
        below=below,
        equal=len(counted) - differ,
        p=float(binomtest(above, differ).pvalue) if differ else 1.0,
        smallest_p=min(1.0, 2.0 ** (1 - differ)),
    )


def interval(
    means: NDArray[np.float64], seed: int = 0, *, clusters: Sequence[int] = ()
) -> tuple[float | None, float | None]:
    """Return the 95 % percentile-bootstrap interval of the mean over sequences; None with fewer than five clusters.

    Parameters
    ----------
    means : ndarray
        Value of each sequence, ``[N]``.
    seed : int
        Of the draws.
    clusters : sequence of int
        Cluster of each sequence, which is drawn as a whole; by default each sequence is one.
    """
    drawn = resampled(means, seed, clusters=clusters)
    if drawn is None:
        return None, None
    sums, sizes = drawn
    low, high = np.quantile(sums / sizes, [0.025, 0.975])
    return float(low), float(high)


def resampled(
    values: NDArray[np.float64], seed: int = 0, *, clusters: Sequence[int] = ()
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Return sums over sequences that are drawn again, as `interval` draws them; None with fewer than five clusters.

    Returns
    -------
    sums : ndarray
        ``[BOOTSTRAP, ...]`` of values ``[N, ...]``.
    sizes : ndarray
        How many sequences each is the sum of, ``[BOOTSTRAP]``.
    """
    places = _places(len(values), clusters)
    count = int(places.max()) + 1 if len(places) else 0
    if count < FEWEST:
        return None
    draws = np.random.default_rng(seed).integers(0, count, (BOOTSTRAP, count))
    if count == len(values):
        return values[draws].sum(1), np.full(BOOTSTRAP, count)
    sums = np.zeros((count, *values.shape[1:]))
    np.add.at(sums, places, values)
    return sums[draws].sum(1), np.bincount(places, minlength=count)[draws].sum(1)


def _cluster_means(values: NDArray[np.float64], clusters: Sequence[int]) -> NDArray[np.float64]:
    """Return the mean of each cluster, in the order of their numbers."""
    if not clusters:
        return values
    places = _places(len(values), clusters)
    means: NDArray[np.float64] = np.bincount(places, values) / np.bincount(places)
    return means


def _places(sequences: int, clusters: Sequence[int]) -> NDArray[np.int64]:
    """Return the cluster of each sequence, numbered without gaps."""
    if not clusters:
        return np.arange(sequences)
    if len(clusters) != sequences:
        raise ValueError(f"{len(clusters)} clusters for {sequences} sequences")
    return np.unique(np.asarray(clusters), return_inverse=True)[1]


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None
