"""Which token sequences are nearly identical, so that statistics count them as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

ALIKE = 0.8  # smallest similarity of near-copies


def clusters(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the cluster of every sequence: 0 for that of the first, and so on up; empty if no two are near-copies.

    Two sequences are near-copies if their `similarity` is at least `ALIKE`. Clusters are the connected components of
    this relation, so they depend neither on the order of the sequences nor on chance. Pieces of different
    novels have a similarity of 0.12 in words and of 0.43 in characters.

    The time for `N` sequences of `T` tokens grows with ``N^2 T^2``, at 0.1 s for a pair of 32,000 tokens; equal
    beginnings and ends, and pairs that have too few tokens in common, cost no more than ``T``.
    """
    parents = list(range(len(sequences)))
    counts = [Counter(sequence) for sequence in sequences]
    for one, other in combinations(range(len(sequences)), 2):
        roots = _root(parents, one), _root(parents, other)
        if roots[0] == roots[1]:
            continue
        least = ALIKE * (len(sequences[one]) + len(sequences[other])) / 2  # length of a common subsequence
        if (counts[one] & counts[other]).total() >= least and common(sequences[one], sequences[other]) >= least:
            parents[max(roots)] = min(roots)
    found = [_root(parents, number) for number in range(len(sequences))]
    if len(set(found)) == len(found):
        return ()
    numbers = {root: number for number, root in enumerate(dict.fromkeys(found))}
    return tuple(numbers[root] for root in found)


def copies_note(near_copies: Sequence[int]) -> str:
    """Return a sentence on how many sequences count, of the clusters of `clusters`; empty if all do."""
    if not near_copies:
        return ""
    count = len(set(near_copies))
    return (
        f"{len(near_copies)} sequences count as {count}: the others are near-copies, with {ALIKE:.0%} or more of their "
        "tokens in common in the same order"
    )


def similarity(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the share of tokens, 0 to 1, that two sequences have in common in the same order.

    It is twice the length of their longest common subsequence, divided by the sum of their lengths; 1 for two that
    are empty.
    """
    size = len(one) + len(other)
    return 2 * common(one, other) / size if size else 1.0


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common subsequence.

    Computed with a bit for each token of `one`, all of which are updated at once for a token of `other` (Hyyrö,
    Bit-parallel LCS-length computation revisited, AWOCA 2004). Equal beginnings and ends are taken off before.
    """
    start, shorter = 0, min(len(one), len(other))
    while start < shorter and one[start] == other[start]:
        start += 1
    end = 0
    while end < shorter - start and one[-1 - end] == other[-1 - end]:
        end += 1
    first, second = one[start : len(one) - end], other[start : len(other) - end]
    places: dict[int, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    every = (1 << len(first)) - 1
    free = every  # bit `i` is 0 where the subsequence grows with token `i` of `first`
    for token in second:
        taken = free & places.get(token, 0)
        free = ((free + taken) | (free - taken)) & every
    return start + end + len(first) - free.bit_count()


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number
