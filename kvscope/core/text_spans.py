"""Named parts of a text, such as a fact or a question, as characters and as tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class TextSpan:
    """Characters `start` to `stop` - 1 of a text, under a name; several spans may have the same name."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class TokenSpan:
    """Tokens `start` to `stop` - 1 of a sequence, under a name; several spans may have the same name."""

    name: str
    start: int
    stop: int


def token_range(start: int, stop: int, texts: Sequence[str]) -> tuple[int, int]:
    """Return the first token that contains some of the characters `start` to `stop` - 1, and the one after the last.

    Parameters
    ----------
    start, stop : int
        Characters of the joined texts; at least one.
    texts : sequence of str
        The text that each token adds. A token without text belongs to the character that a later one completes.

    >>> token_range(1, 3, ["ab", "", "c", "d"])
    (0, 3)
    >>> token_range(2, 3, ["ab", "", "c", "d"])
    (1, 3)
    """
    ends = list(accumulate(map(len, texts)))
    first = bisect_right(ends, start)
    while first and not texts[first - 1]:
        first -= 1
    return first, bisect_left(ends, stop) + 1
