"""Show tokens that are parts of a character with that character."""

from __future__ import annotations

from collections.abc import Sequence


def shown_parts(texts: Sequence[str]) -> list[str]:
    """Return the texts of tokens, where those that share a character show it: ``界 1/3``, ``界 2/3``, ``界 3/3``.

    Parameters
    ----------
    texts : sequence of str
        As a trace stores them: the token that completes a character has its text, and those before it have none.

    >>> shown_parts(["a", "", "", " 界b", ""])
    ['a', ' 界 1/3', '界 2/3', '界 3/3b', '']
    """
    shown, start = list(texts), 0
    for place, text in enumerate(texts):
        if not text:
            continue
        rest = text.lstrip()
        if place > start and rest and not rest[0].isascii():
            count = place - start + 1
            parts = [f"{rest[0]} {number}/{count}" for number in range(1, count + 1)]
            parts[0] = text[: len(text) - len(rest)] + parts[0]
            parts[-1] += rest[1:]
            shown[start : place + 1] = parts
        start = place + 1
    return shown
