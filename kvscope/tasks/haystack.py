"""The text in which facts are planted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from random import Random

from kvscope.core.errors import UsageError

FEWEST = 10  # sentences; with fewer the same ones come too often
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+")


class Haystack:
    """The sentences of a text, in order; after the last one comes the first.

    Parameters
    ----------
    text : str or None
        The text; None for the bundled one.

    Raises
    ------
    UsageError
        If the text has fewer than ten sentences.
    """

    def __init__(self, text: str | None = None) -> None:
        text = files("kvscope.tasks").joinpath("haystack.txt").read_text("utf-8") if text is None else text
        found = [" ".join(sentence.split()) for sentence in _SENTENCE.split(text)]
        self.sentences: Sequence[str] = [sentence for sentence in found if sentence]
        if len(self.sentences) < FEWEST:
            raise UsageError(
                f"the haystack has {len(self.sentences)} sentences", f"Name a text of at least {FEWEST} sentences."
            )

    def from_anywhere(self, random: Random) -> int:
        """Return a random sentence to begin with."""
        return random.randrange(len(self.sentences))

    def take(self, first: int, count: int) -> list[str]:
        """Return `count` sentences from number `first` on."""
        return [self.sentences[(first + number) % len(self.sentences)] for number in range(count)]
