"""Plant facts among the sentences of a haystack."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.tasks.base import Piece


def planted(sentences: Sequence[str], facts: Sequence[tuple[float, Piece]]) -> list[Piece]:
    """Return the pieces of a text with each fact at its depth: the share of the sentences that comes before it.

    Facts at the same place are in the given order. A fact is a sentence of its own.
    """
    pieces: list[Piece] = []
    done = 0
    for depth, fact in sorted(facts, key=lambda one: one[0]):
        place = round(depth * len(sentences))
        if place > done:
            pieces.append(Piece(" ".join(sentences[done:place]) + " "))
            done = place
        pieces += [fact, Piece(" ")]
    if done < len(sentences):
        pieces.append(Piece(" ".join(sentences[done:])))
    return pieces
