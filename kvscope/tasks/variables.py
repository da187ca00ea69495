"""Variable tracking: which names have a value, directly or through other names?"""

from __future__ import annotations

from dataclasses import dataclass

from kvscope.tasks.base import QUESTION, Draft, Family, Ingredients, Piece, parameter, require_between, task
from kvscope.tasks.names import coined, numbers
from kvscope.tasks.planting import planted


@task("variable-tracking")
@dataclass(frozen=True)
class VariableTracking(Family):
    """A chain of assignments is planted, each of the previous name's value; the question asks for all its names.

    RULER's VT: assignments are in the order of the chain; other chains distract. Names are coined words; the haystack
    is prose, not a repeated sentence.
    """

    metric = "all"
    paper = "arXiv:2404.06654 section 3.2"

    hops: int = parameter(4, "assignments after the first of each chain")
    chains: int = parameter(1, "chains; one is asked for")

    def __post_init__(self) -> None:
        require_between(self, "hops", 1, 20)
        require_between(self, "chains", 1, 10)

    def draft(self, given: Ingredients) -> Draft:
        random, size = given.random, self.hops + 1
        names = [name.upper() for name in coined(random, size * self.chains)]
        values = numbers(random, self.chains, 5)
        facts = []
        for chain, value in enumerate(values):
            mine = names[chain * size : (chain + 1) * size]
            places = sorted(random.random() for _ in mine)
            told = [value, *mine[:-1]]
            label = "needle" if chain == 0 else "distractor"
            facts += [
                (place, Piece(f"Set {name} = {what}.", label))
                for place, name, what in zip(places, mine, told, strict=True)
            ]
        question = f"Question: which names have the value {values[0]}?"
        return Draft(
            [
                Piece("Names are set to values in this text, directly or by another name.\n\n"),
                *planted(given.filler(given.size), facts),
                Piece("\n\n"),
                Piece(question, QUESTION),
                Piece("\nAnswer: "),
                Piece(f"The names with the value {values[0]} are", QUESTION),
            ],
            tuple(names[:size]),
        )
