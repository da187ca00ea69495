"""Make the examples of a family for a length: the longest prompts that have at most so many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

from kvscope.core.errors import UsageError
from kvscope.tasks.base import Draft, Example, Family, Ingredients
from kvscope.tasks.haystack import Haystack


@dataclass(frozen=True)
class Lengths:
    """How long prompts are.

    Attributes
    ----------
    longest : int
        Most tokens of a prompt.
    count : callable
        Returns the number of tokens of a text.
    unit : str
        What is counted, for messages: ``tokens``, ``words``.
    """

    longest: int
    count: Callable[[str], int]
    unit: str


def words(text: str) -> int:
    """Return the number of words of a text: a rough length where no tokenizer is named."""
    return len(text.split())


def make_examples(
    family: Family, lengths: Lengths, number: int, *, seed: int = 0, haystack: Haystack | None = None
) -> Iterator[Example]:
    """Yield `number` examples, each as long as it can be; the same seed gives the same examples.

    Depths are spread evenly from 0 to 1 over the examples, in an order that the seed decides.

    Raises
    ------
    UsageError
        If even the shortest prompt of the family is longer.
    """
    haystack = haystack or Haystack()
    depths = [index / max(number - 1, 1) if number > 1 else 0.5 for index in range(number)]
    Random(f"{seed}/{family.label}/depths").shuffle(depths)
    for index in range(number):
        drafts = _Drafts(family, haystack, f"{seed}/{family.label}/{index}", depths[index])
        draft = _longest(family, drafts, lengths)
        yield Example(
            id=f"{family.label}-{lengths.longest}-{index}",
            task=family.label,
            prompt=draft.prompt,
            answers=draft.answers,
            metric=family.metric,
            length=lengths.longest,
            spans=draft.spans,
            depth=draft.depth,
        )


@dataclass(frozen=True)
class _Drafts:
    """One example in every size."""

    family: Family
    haystack: Haystack
    seed: str
    depth: float

    def of(self, size: int) -> Draft:
        start = self.haystack.from_anywhere(Random(f"{self.seed}/haystack"))
        filler = partial(self.haystack.take, start)
        return self.family.draft(Ingredients(Random(self.seed), filler, self.depth, size))


def _longest(family: Family, drafts: _Drafts, lengths: Lengths) -> Draft:
    """Return the largest draft that is not longer than it may be: its size is found by bisection."""

    def fits(size: int) -> bool:
        return lengths.count(drafts.of(size).prompt) <= lengths.longest

    if not fits(family.least):
        least = lengths.count(drafts.of(family.least).prompt)
        raise UsageError(
            f"{family.name}: the shortest prompt has {least} {lengths.unit}, but {lengths.longest} are requested",
            f"Ask for at least {least}, or change the parameters of the task.",
        )
    low, high = family.least, min(max(2 * family.least, 8), family.most)
    while fits(high):
        if high == family.most:
            return drafts.of(high)
        low, high = high, min(2 * high, family.most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return drafts.of(low)
