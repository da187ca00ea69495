"""Needles in a haystack: numbers are planted in a text, and the question asks for one or some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvscope.core.errors import UsageError
from kvscope.tasks.base import (
    QUESTION,
    Draft,
    Family,
    Ingredients,
    Piece,
    parameter,
    require_between,
    require_choice,
    task,
)
from kvscope.tasks.names import PAIRS, PEOPLE, keys, listed, numbers
from kvscope.tasks.planting import planted

RULER = "arXiv:2404.06654 section 3.1"
WORDINGS = ("plain", "notes")
NEEDLE, OTHER = "needle", "distractor"
_WORDING_HELP = "plain: for any model; notes: the form that the bundled model was trained on"


@dataclass(frozen=True)
class Fact:
    """A key and one of its values."""

    key: str
    value: str


@dataclass(frozen=True)
class Needles(Family):
    """Facts in a haystack; the families below differ in what is planted and what is asked for."""

    metric = "all"
    paper = RULER

    wording: str = parameter("plain", _WORDING_HELP, WORDINGS)
    digits: int = parameter(7, "digits of a number; of notes 3")

    def __post_init__(self) -> None:
        require_choice(self, "wording")
        require_between(self, "digits", 2, 18)

    def draft_of(self, given: Ingredients, asked: Sequence[Fact], others: Sequence[Fact], depth: float | None) -> Draft:
        """Return an example that asks for all values of the keys of `asked`."""
        facts = [(NEEDLE, fact) for fact in asked] + [(OTHER, fact) for fact in others]
        places = [given.random.random() for _ in facts]
        if depth is not None:
            places[0] = depth
        notes = self.wording == "notes"
        say = _note if notes else _sentence
        pieces = planted(
            given.filler(given.size),
            [(place, Piece(say(fact), name)) for place, (name, fact) in zip(places, facts, strict=True)],
        )
        asked_keys = list(dict.fromkeys(fact.key for fact in asked))
        if notes:
            (key,) = asked_keys
            end = [Piece("\n"), Piece(f"Question: what has {key}? Answer: {key} has", QUESTION)]
        else:
            pieces.insert(0, Piece("Numbers are hidden in this text. You will be asked for them.\n\n"))
            several = "numbers" if len(asked) > 1 else "number"
            end = [
                Piece("\n\n"),
                Piece(f"Question: which {several} belong{'s' * (len(asked) == 1)} to {listed(asked_keys)}?", QUESTION),
                Piece("\nAnswer: "),
                Piece(f"The {several} of {listed(asked_keys)} {'are' if len(asked) > 1 else 'is'}", QUESTION),
            ]
        return Draft([*pieces, *end], tuple(fact.value for fact in asked), depth)

    def keys(self, given: Ingredients, count: int) -> list[str]:
        """Return distinct keys: names of people for notes, otherwise pairs of words."""
        return given.random.sample(PEOPLE, count) if self.wording == "notes" else keys(given.random, count)

    def values(self, given: Ingredients, count: int) -> list[str]:
        """Return distinct numbers."""
        return numbers(given.random, count, 3 if self.wording == "notes" else self.digits)

    def require_plain(self) -> None:
        """Raise UsageError unless the wording is plain: the notes of the bundled model ask for one number."""
        if self.wording != "plain":
            raise UsageError(f"{self.name} has no notes: they ask for one number", "Use wording=plain.")


def _sentence(fact: Fact) -> str:
    return f"The number of {fact.key} is {fact.value}."


def _note(fact: Fact) -> str:
    return f"\nNote: {fact.key} has {fact.value}.\n\n"


@task("needle")
@dataclass(frozen=True)
class Needle(Needles):
    """One number is planted at a depth, and asked for.

    RULER's S-NIAH with a pair of words as key; the haystack is prose, not a repeated sentence.
    """

    def draft(self, given: Ingredients) -> Draft:
        fact = Fact(self.keys(given, 1)[0], self.values(given, 1)[0])
        return self.draft_of(given, [fact], [], given.depth)


@task("needle-multikey")
@dataclass(frozen=True)
class NeedleMultiKey(Needles):
    """Numbers of several keys are planted, and that of one is asked for, which is at a depth.

    RULER's MK-NIAH-1. ``needles-alone`` is its MK-NIAH-2.
    """

    distractors: int = parameter(3, "numbers of other keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(self, "distractors", 1, 40)

    def draft(self, given: Ingredients) -> Draft:
        count = self.distractors + 1
        facts = [Fact(*pair) for pair in zip(self.keys(given, count), self.values(given, count), strict=True)]
        return self.draft_of(given, facts[:1], facts[1:], given.depth)


@task("needle-multivalue")
@dataclass(frozen=True)
class NeedleMultiValue(Needles):
    """Several numbers of one key are planted, and the question asks for all of them. RULER's MV-NIAH."""

    needles: int = parameter(4, "numbers of the key")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_plain()
        require_between(self, "needles", 2, 40)

    def draft(self, given: Ingredients) -> Draft:
        (key,) = self.keys(given, 1)
        return self.draft_of(given, [Fact(key, value) for value in self.values(given, self.needles)], [], None)


@task("needle-multiquery")
@dataclass(frozen=True)
class NeedleMultiQuery(Needles):
    """Numbers of several keys are planted, and the question asks for all of them. RULER's MQ-NIAH."""

    needles: int = parameter(4, "keys that the question asks for")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_plain()
        require_between(self, "needles", 2, 40)

    def draft(self, given: Ingredients) -> Draft:
        names, values = self.keys(given, self.needles), self.values(given, self.needles)
        return self.draft_of(given, [Fact(*pair) for pair in zip(names, values, strict=True)], [], None)


@task("needles-alone")
@dataclass(frozen=True)
class NeedlesAlone(Needles):
    """Numbers of many keys are planted without other text, and that of one is asked for, which is at a depth.

    RULER's MK-NIAH-2. Each unit of filler is a number of another key.
    """

    least = 2

    @property
    def most(self) -> int:
        return len(PEOPLE) if self.wording == "notes" else min(PAIRS, 9 * 10 ** (self.digits - 1))

    def draft(self, given: Ingredients) -> Draft:
        facts = [Fact(*pair) for pair in zip(self.keys(given, given.size), self.values(given, given.size), strict=True)]
        return self.draft_of(replace(given, size=0), facts[:1], facts[1:], given.depth)
