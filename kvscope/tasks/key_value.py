"""Key-value retrieval: the prompt is a JSON object, and the value of one key is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from kvscope.tasks.base import QUESTION, Draft, Family, Ingredients, Piece, parameter, require_between, task
from kvscope.tasks.names import hexadecimal


@task("key-value")
@dataclass(frozen=True)
class KeyValue(Family):
    """A JSON object of random keys and values; the value of one, at a depth, is asked for.

    Liu et al. 2023, arXiv:2307.03172, section 3, whose keys and values are UUIDs: of 32 hexadecimal digits.
    """

    metric = "any"
    paper = "arXiv:2307.03172 section 3"
    least = 2

    digits: int = parameter(8, "hexadecimal digits of keys and values")

    def __post_init__(self) -> None:
        require_between(self, "digits", 4, 32)

    def draft(self, given: Ingredients) -> Draft:
        random = given.random
        pair = (hexadecimal(random, self.digits), hexadecimal(random, self.digits))
        others: dict[str, str] = {}
        while len(others) < given.size - 1:
            key = hexadecimal(random, self.digits)
            if key != pair[0]:
                others[key] = hexadecimal(random, self.digits)
        place = round(given.depth * len(others))
        lines = [Piece(f'"{key}": "{value}"') for key, value in others.items()]
        lines.insert(place, Piece(f'"{pair[0]}": "{pair[1]}"', "needle"))
        joined = [part for line in lines for part in (line, Piece(",\n"))][:-1]
        return Draft(
            [
                Piece("{"),
                *joined,
                Piece("}\n\n"),
                Piece(f'Question: what is the value of "{pair[0]}"?', QUESTION),
                Piece("\nAnswer: "),
                Piece(f'The value of "{pair[0]}" is "', QUESTION),
            ],
            (pair[1],),
            given.depth,
        )
