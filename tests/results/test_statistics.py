"""Paired comparisons claim no more than the sequences carry."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.results.statistics import interval, paired

VALUES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=12)


def sign_test(above: int, below: int) -> float:
    """Share of all equally likely outcomes that are no likelier than the one that was seen, by counting."""
    n = above + below
    weights = [math.comb(n, k) for k in range(n + 1)]
    return sum(weight for weight in weights if weight <= weights[above]) / 2**n


@given(VALUES)
@settings(deadline=None)  # the first call loads scipy
def test_paired_equals_plain_loops(pairs: list[tuple[int, int]]) -> None:
    found = paired([a for a, _ in pairs], [b for _, b in pairs])
    above, below = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    assert (found.sequences, found.above, found.below) == (len(pairs), above, below)
    assert found.equal == len(pairs) - above - below
    assert found.p == pytest.approx(sign_test(above, below))
    assert found.smallest_p == pytest.approx(sign_test(above + below, 0))
    if pairs:
        assert found.difference == pytest.approx(sum(b - a for a, b in pairs) / len(pairs))
        assert found.difference == pytest.approx(found.mean_b - found.mean_a)
    else:
        assert (found.mean_a, found.mean_b, found.difference) == (None, None, None)


@pytest.mark.parametrize(
    ("sequences", "equal", "told"),
    [
        (0, 0, "0 sequences: p cannot go below 1"),
        (1, 0, "1 sequence: p cannot go below 1;"),
        (5, 0, r"5 sequences: p cannot go below 0.062; 6 or more are needed for p <= 0.05"),
        (6, 0, ""),
        (9, 4, "5 of 9 sequences differ: p cannot go below 0.062"),
        (9, 3, ""),
        (8, 8, "0 of 8 sequences differ: p cannot go below 1"),
    ],
)
def test_too_few_sequences_are_said(sequences: int, equal: int, told: str) -> None:
    found = paired([0.0] * sequences, [0.0] * equal + [1.0] * (sequences - equal))
    assert found.warning.startswith(told)
    assert bool(found.warning) == bool(told)
    assert found.significant == (not told)


def test_one_outlier_is_no_finding() -> None:
    """A large mean difference that one sequence makes, and an agreement too small to matter, are both not enough."""
    assert not paired([0.0] * 10, [9.0] + [-0.1] * 4 + [0.1] * 5).significant
    mixed = paired([0.0] * 8, [1.0] * 7 + [-60.0])
    assert mixed.p > 0.05 and not mixed.significant
    outlier = paired([0.0] * 10, [1.0] * 9 + [-60.0])
    assert outlier.p < 0.05 and not outlier.significant


def test_the_interval_is_as_wide_as_its_documentation_says() -> None:
    random = np.random.default_rng(0)
    for sequences, share in ((5, 0.83), (20, 0.93)):
        intervals = [interval(random.normal(size=sequences), seed) for seed in range(600)]
        inside = np.mean([low <= 0 <= high for low, high in intervals if low is not None and high is not None])
        assert inside == pytest.approx(share, abs=0.04)


def test_four_sequences_have_no_interval() -> None:
    assert interval(np.arange(4.0)) == (None, None)
    assert None not in interval(np.arange(5.0))


def test_unlike_sequences_are_a_defect() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        paired([1.0], [float("nan")])


def test_near_copies_count_as_one() -> None:
    """Eight copies of one prompt are one observation, whatever a test of eight sequences would say."""
    a, b = [0.0] * 8, [1.0 + 0.01 * number for number in range(8)]
    apart, copies = paired(a, b), paired(a, b, [0] * 8)
    assert apart.significant and apart.p == pytest.approx(2 / 2**8)
    assert not copies.significant and copies.p == 1
    assert (copies.clusters, copies.sequences, copies.above, copies.equal) == (1, 8, 1, 0)
    assert copies.low is None
    assert copies.difference == apart.difference
    assert copies.warning.startswith("1 cluster: p cannot go below 1")


def test_a_cluster_counts_by_the_mean_of_its_sequences() -> None:
    found = paired([0.0] * 5, [3.0, -1.0, -1.0, 2.0, -2.0], [4, 4, 4, 7, 7])
    assert (found.clusters, found.above, found.below, found.equal) == (2, 1, 0, 1)
    with pytest.raises(ValueError, match="2 clusters for 3 sequences"):
        paired([0.0] * 3, [1.0] * 3, [0, 1])


@given(st.lists(st.integers(-9, 9), min_size=5, max_size=9))
def test_clusters_of_one_change_nothing(values: list[int]) -> None:
    array = np.array(values, float)
    assert interval(array, clusters=list(range(len(values)))) == interval(array)


def test_the_cluster_bootstrap_draws_whole_clusters() -> None:
    """Compared with plain loops over the same draws; copies widen the interval to that of the distinct sequences."""
    values, clusters = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 16.5, 17.0]), [0, 1, 2, 3, 4, 4, 4]
    means = []
    for draw in np.random.default_rng(0).integers(0, 5, (2000, 5)):
        drawn = [value for number in draw for value, own in zip(values, clusters, strict=True) if own == number]
        means.append(sum(drawn) / len(drawn))
    assert interval(values, clusters=clusters) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    random = np.random.default_rng(1)
    distinct = random.normal(size=20)
    copied = np.repeat(distinct, 6)
    low, high = interval(copied, clusters=np.repeat(np.arange(20), 6).tolist())
    assert (low, high) == pytest.approx(interval(distinct))
    narrow = interval(copied)
    assert narrow[1] - narrow[0] < 0.6 * (high - low)
