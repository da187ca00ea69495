"""The base of task families: a family drafts an example of a given size; `make` chooses the size for a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from random import Random
from typing import Any, ClassVar, TypeVar

from kvscope.core.errors import UsageError
from kvscope.core.registry import Registry
from kvscope.core.text_spans import TextSpan

ANSWER, QUESTION = "answer", "question"  # names of spans that most families have


@dataclass(frozen=True)
class Piece:
    """A part of a prompt; a named one becomes a span, without the white space around it."""

    text: str
    name: str | None = None


@dataclass(frozen=True)
class Draft:
    """An example of one size.

    Attributes
    ----------
    pieces : sequence of Piece
        Joined, they are the prompt.
    answers : tuple of str
        Right answers.
    depth : float or None
        Share of the filler that comes before the planted fact, 0 to 1; None if there are several or none.
    """

    pieces: Sequence[Piece]
    answers: tuple[str, ...]
    depth: float | None = None

    @property
    def prompt(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def spans(self) -> tuple[TextSpan, ...]:
        """The named parts, in the order of the text."""
        found, start = [], 0
        for piece in self.pieces:
            if piece.name is not None:
                inner = piece.text.strip()
                first = start + piece.text.index(inner)
                found.append(TextSpan(piece.name, first, first + len(inner)))
            start += len(piece.text)
        return tuple(found)


@dataclass(frozen=True)
class Example:
    """One prompt of a task, its right answers, and where the prompt states them.

    Attributes
    ----------
    id, task : str
        ``needle-512-3``; the label of the family.
    prompt : str
        The text.
    answers : tuple of str
        Right answers.
    metric : str
        How an answer is scored: a name in `SCORES`.
    length : int
        Number of tokens, or of words, that it was made for.
    spans : tuple of TextSpan
        Where the facts and the question are.
    depth : float or None
        Share of the filler before the planted fact; None if there are several or none.
    """

    id: str
    task: str
    prompt: str
    answers: tuple[str, ...]
    metric: str
    length: int
    spans: tuple[TextSpan, ...] = ()
    depth: float | None = None


@dataclass(frozen=True)
class Ingredients:
    """What a family drafts from.

    Attributes
    ----------
    random : Random
        Seeded for the example, the same for every size.
    filler : callable
        ``filler(n)`` returns `n` sentences of the haystack, from a place that is the same for every `n`.
    depth : float
        Depth for a single planted fact, 0 to 1.
    size : int
        Number of units of filler: sentences, words or pairs, as the family defines them.
    """

    random: Random
    filler: Callable[[int], Sequence[str]]
    depth: float
    size: int


@dataclass(frozen=True)
class Family:
    """A task family: parameters as fields, a draft for every size.

    A subclass is a frozen dataclass under ``@task("name")``; its docstring says what is planted, asked and right, and
    where it differs from the paper.

    Attributes
    ----------
    name : str
        Name on the command line; set by the decorator.
    metric : str
        How answers are scored.
    paper : str
        Source of the task.
    least, most : int
        Smallest and largest size.
    """

    name: ClassVar[str] = ""
    metric: ClassVar[str] = "exact"
    paper: ClassVar[str] = ""
    least: ClassVar[int] = 0

    @property
    def most(self) -> int:
        """Largest size; depends on parameters where words run out."""
        return 1_000_000

    def draft(self, given: Ingredients) -> Draft:
        """Return an example of the given size; a larger one is longer."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The name with the parameters that differ from their defaults, as `parse_task` reads it."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}:{','.join(changed)}" if changed else self.name


TASKS: Registry[type[Family]] = Registry("task", "kvscope.tasks", "kvscope.tasks")
F = TypeVar("F", bound=Family)


def task(name: str) -> Callable[[type[F]], type[F]]:
    """Return a decorator that registers a family under `name`."""

    def register(cls: type[F]) -> type[F]:
        cls.name = name
        TASKS.register(name, cls)
        return cls

    return register


def parameter(default: object, help: str, choices: Sequence[str] = ()) -> Any:
    """Return a dataclass field with a default, a line of help, and, of a text, the values that it may have."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


def require_choice(family: Family, name: str) -> None:
    """Raise UsageError unless the value of a parameter is one of its choices."""
    choices = next(item for item in fields(family) if item.name == name).metadata["choices"]
    value = getattr(family, name)
    if value not in choices:
        raise UsageError(f"{family.name}: {name} is {value!r}", f"Write one of: {', '.join(choices)}.")


def require_between(family: Family, name: str, low: int, high: int) -> None:
    """Raise UsageError unless the value of a parameter is in a range."""
    value = getattr(family, name)
    if not low <= value <= high:
        raise UsageError(f"{family.name}: {name} is {value}", f"Write a number from {low} to {high}.")
