"""Kinds of tokens, the named spans that they are in, and the text around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

from kvscope.core.token_classes import is_punctuation
from kvscope.core.token_parts import shown_parts

KINDS = ("first", "digits", "punctuation", "rare", "other")
CONTEXT = 4  # tokens shown on either side of a token


class TokenInContext(TypedDict):
    """Text and kind of a token, the named span of the prompt that it is in, and the text around it."""

    text: str
    kind: str
    span: str | None
    before: str
    after: str


class TokenKinds:
    """The tokens of one sequence, with their kinds.

    The kind of a token is the first that applies: ``first`` of the sequence; it contains ``digits``; ``punctuation``,
    without letters or digits, including blanks and line ends; ``rare``, once in the sequence; ``other``, including
    tokens of unknown text.

    Parameters
    ----------
    texts : sequence of str
        Text of each token, ``[T]``.
    spans : mapping of str to sequence of int
        Positions of the tokens in the named spans of the prompt.
    """

    def __init__(self, texts: Sequence[str], spans: Mapping[str, Sequence[int]] | None = None) -> None:
        self.texts, self.spans = [str(text) for text in texts], spans or {}
        self.shown = shown_parts(self.texts)
        often = Counter(text.strip() for text in self.texts)
        self.kinds = [_kind(key, text, often[text.strip()]) for key, text in enumerate(self.texts)]

    def named(self, key: int) -> TokenInContext:
        """Return text, kind and context of a token."""
        before, after = self.texts[max(0, key - CONTEXT) : key], self.texts[key + 1 : key + 1 + CONTEXT]
        return {
            "text": self.shown[key],
            "kind": self.kinds[key],
            "span": ", ".join(name for name, keys in self.spans.items() if key in keys) or None,
            "before": "".join(before),
            "after": "".join(after),
        }


def _kind(key: int, text: str, often: int) -> str:
    if key == 0:
        return "first"
    if any(sign.isdigit() for sign in text):
        return "digits"
    if is_punctuation(text):
        return "punctuation"
    return "rare" if text and often == 1 else "other"
