"""Classes of tokens that policies read: special tokens, punctuation, and all others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

OTHER, PUNCTUATION, SPECIAL = range(3)
UNREADABLE = "\ufffd"  # what a part of a character decodes to


def is_punctuation(text: str) -> bool:
    """Return whether a token has text without letters and digits: punctuation, blanks and line ends."""
    return bool(text) and not any(sign.isalpha() or sign.isdigit() for sign in text)


def token_classes(ids: Sequence[int], texts: Sequence[str], special: Collection[int]) -> list[int]:
    """Return for each token `SPECIAL`, `PUNCTUATION` or `OTHER`, the first that applies.

    Parameters
    ----------
    ids, texts : sequence of int, sequence of str
        Number and text of each token; a part of a character is not punctuation.
    special : collection of int
        Numbers of the tokens that the tokenizer calls special.

    >>> token_classes([0, 7, 8, 9], ["<s>", "Yes", ", ", ""], [0])
    [2, 0, 1, 0]
    """
    every = frozenset(special)
    return [
        SPECIAL if number in every else PUNCTUATION if is_punctuation(text.replace(UNREADABLE, "")) else OTHER
        for number, text in zip(ids, texts, strict=True)
    ]
