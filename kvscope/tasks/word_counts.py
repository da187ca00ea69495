"""Words that are common or frequent in a list: answers that no single place of the prompt gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvscope.tasks.base import QUESTION, Draft, Family, Ingredients, Piece, parameter, require_between, task
from kvscope.tasks.names import PAIRS, coined, keys

AGGREGATION = "arXiv:2404.06654 section 3.3"


@task("common-words")
@dataclass(frozen=True)
class CommonWords(Family):
    """A shuffled list has few words many times and many words few times; the question asks for the common ones.

    RULER's CWE: ten common words, 30 times each, the others three times; fewer times fit a shorter prompt.
    """

    metric = "all"
    paper = AGGREGATION
    least = 1

    common: int = parameter(10, "common words")
    often: int = parameter(30, "times that each common word is in the list")
    seldom: int = parameter(3, "times that every other word is in the list")

    def __post_init__(self) -> None:
        require_between(self, "common", 1, 50)
        require_between(self, "often", 2, 1000)
        require_between(self, "seldom", 1, self.often - 1)

    def draft(self, given: Ingredients) -> Draft:
        words = keys(given.random, min(self.common + given.size, PAIRS))
        more = coined(given.random, self.common + given.size - len(words))
        common, others = words[: self.common], [*words[self.common :], *more]
        listed = [*common * self.often, *others * self.seldom]
        given.random.shuffle(listed)
        return Draft(
            [
                Piece("Some words of this list are more common than all others.\n\n"),
                *_marked(listed, set(common)),
                Piece("\n\n"),
                Piece(f"Question: which {self.common} words are the most common?", QUESTION),
                Piece("\nAnswer: "),
                Piece(f"The {self.common} most common words are", QUESTION),
            ],
            tuple(common),
        )


@task("frequent-words")
@dataclass(frozen=True)
class FrequentWords(Family):
    """A text of coined words whose frequencies fall as a power of their rank; the question asks for the most frequent.

    RULER's FWE: the k-th word comes in proportion to ``k ** -alpha``, alpha 2, and the three most frequent are asked
    for. Counts are the rounded expectation and not a draw, so that the answer is never a tie.
    """

    metric = "all"
    paper = AGGREGATION
    least = 16

    asked: int = parameter(3, "words that the question asks for")
    alpha: float = parameter(2.0, "exponent of the frequencies")

    def __post_init__(self) -> None:
        require_between(self, "asked", 1, 10)

    def draft(self, given: Ingredients) -> Draft:
        ranks = range(1, max(self.asked + 1, given.size // 4) + 1)
        shares = [rank**-self.alpha for rank in ranks]
        counts = [round(given.size * share / sum(shares)) for share in shares]
        for rank in reversed(range(self.asked)):  # above every later word, where rounding made ties
            counts[rank] = max(counts[rank], counts[rank + 1] + 1)
        words = coined(given.random, len(counts))
        listed = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        given.random.shuffle(listed)
        most = tuple(word for word, _ in Counter(listed).most_common(self.asked))
        return Draft(
            [
                Piece("These words mean nothing. Some are more frequent than others.\n\n"),
                *_marked(listed, set(most)),
                Piece("\n\n"),
                Piece(f"Question: which {self.asked} words are the most frequent?", QUESTION),
                Piece("\nAnswer: "),
                Piece(f"The {self.asked} most frequent words are", QUESTION),
            ],
            most,
        )


def _marked(listed: list[str], right: set[str]) -> list[Piece]:
    """Return the words of a list, separated by spaces; those of the answer are spans."""
    return [piece for word in listed for piece in (Piece(word, "needle" if word in right else None), Piece(" "))]
