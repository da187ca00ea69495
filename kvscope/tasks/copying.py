"""Few-shot copying: random words are repeated in every example, and the model must repeat the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from kvscope.tasks.base import QUESTION, Draft, Family, Ingredients, Piece, parameter, require_between, task
from kvscope.tasks.names import coined


@task("copying")
@dataclass(frozen=True)
class Copying(Family):
    """Pairs of lines, the second of which repeats the first; the last pair lacks its second line.

    The copying task of induction heads (Olsson et al. 2022, arXiv:2209.11895), with examples before it.
    """

    metric = "exact"
    paper = "arXiv:2209.11895"
    least = 1

    words: int = parameter(4, "words of a line")

    def __post_init__(self) -> None:
        require_between(self, "words", 1, 64)

    def draft(self, given: Ingredients) -> Draft:
        last = " ".join(coined(given.random, self.words))
        shots = [" ".join(coined(given.random, self.words)) for _ in range(given.size)]
        pieces = [Piece(f"Copy: {line}\nPaste: {line}\n\n") for line in shots]
        end = [Piece("Copy: "), Piece(last, "needle"), Piece("\n"), Piece("Paste:", QUESTION)]
        return Draft([*pieces, *end], (last,))
