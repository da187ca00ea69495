"""Near-copies are found whatever their order, and unlike texts are not."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.core.near_copies import ALIKE, clusters, common, copies_note, similarity

TOKENS = st.lists(st.integers(-3, 3), max_size=14)


def longest(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common subsequence, from the textbook's table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@given(TOKENS, TOKENS)
def test_the_common_subsequence_equals_the_table(one: list[int], other: list[int]) -> None:
    assert common(one, other) == common(other, one) == longest(one, other)


def test_more_tokens_than_a_machine_word_has_bits() -> None:
    one = [number * number % 23 for number in range(300)]
    other = [number * 7 % 19 for number in range(250)]
    assert common(one, other) == longest(one, other)


@given(st.lists(TOKENS, max_size=6), st.randoms())
def test_clusters_are_components_and_do_not_depend_on_the_order(sequences: list[list[int]], random) -> None:
    def together(found: Sequence[int], order: Sequence[int]) -> set[frozenset[int]]:
        labels = found or range(len(order))
        return {frozenset(order[i] for i, label in enumerate(labels) if label == each) for each in set(labels)}

    order = list(range(len(sequences)))
    expected = [{number} for number in order]
    for one, other in itertools.combinations(order, 2):
        size = len(sequences[one]) + len(sequences[other])
        if 2 * longest(sequences[one], sequences[other]) >= ALIKE * size:
            joined = [each for each in expected if one in each or other in each]
            expected = [each for each in expected if each not in joined] + [set().union(*joined)]
    found = clusters(sequences)
    assert together(found, order) == {frozenset(each) for each in expected}
    random.shuffle(order)
    assert together(clusters([sequences[number] for number in order]), order) == together(found, range(len(sequences)))


def test_prompts_of_one_template_are_one_cluster() -> None:
    template = "the meeting of the board on day {} of the month was moved to the large room".split()
    other = "she never told anyone where the letters had gone after the long winter ended there".split()
    ids: dict[str, int] = {}
    texts = [
        [ids.setdefault(word, len(ids)) for word in (str(n) if w == "{}" else w for w in template)] for n in range(3)
    ]
    unlike = [ids.setdefault(word, len(ids)) for word in other]
    assert clusters([texts[0], unlike, *texts[1:]]) == (0, 1, 0, 0)
    assert similarity(texts[0], texts[1]) == pytest.approx(16 / 17)
    assert clusters([texts[0], unlike]) == ()
    assert copies_note((0, 1, 0, 0)).startswith("4 sequences count as 2: the others are near-copies, with 80% or more")
    assert copies_note(()) == ""
