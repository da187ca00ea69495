"""What a dataset says about an example besides prompt and answers: its name, its task, how it is scored, its spans."""

from __future__ import annotations

from dataclasses import dataclass

from kvscope.core.errors import UsageError
from kvscope.core.json import Json, JsonDict
from kvscope.core.text_spans import TextSpan

IDS, TASKS = ("id", "_id", "index"), ("task", "dataset")  # usual names; RULER: index; LongBench: _id, dataset
CLASSES = ("classes", "all_classes")  # LongBench: all_classes
SPANS_EXAMPLE = 'Write "spans": [{"name": "question", "start": 0, "stop": 12}, ...], in characters of the prompt.'


@dataclass(frozen=True)
class ExampleFacts:
    """Facts about one example of a dataset; None where the dataset does not say.

    Attributes
    ----------
    id, task, metric : str or None
        Its name, its task, and how an answer is scored.
    length : int or None
        The length that it was made for, or that the dataset counted.
    depth : float or None
        Where its fact is, 0 to 1.
    classes : tuple of str
        The classes among which an answer is to choose.
    """

    id: str | None = None
    task: str | None = None
    metric: str | None = None
    length: int | None = None
    depth: float | None = None
    classes: tuple[str, ...] = ()


def example_facts(place: str, entry: JsonDict) -> ExampleFacts | None:
    """Return the facts of a JSON object; None if it has none.

    Raises
    ------
    UsageError
        If one has a value of another type.
    """
    facts = ExampleFacts(
        _text(place, entry, IDS),
        _text(place, entry, TASKS),
        _text(place, entry, ("metric",)),
        _count(entry.get("length")),  # some datasets have other things there
        _depth(place, entry),
        _classes(place, entry),
    )
    return None if facts == ExampleFacts() else facts


def text_spans(place: str, entry: JsonDict, text: str) -> tuple[TextSpan, ...]:
    """Return the spans of a JSON object whose prompt is `text`.

    Raises
    ------
    UsageError
        If they are not a list of objects with name, start and stop inside the text.
    """
    given = entry.get("spans")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise UsageError(f"{place}: spans is not a list", SPANS_EXAMPLE)
    return tuple(_span(f"{place}: span {number}", span, len(text)) for number, span in enumerate(given))


def _span(place: str, span: Json, size: int) -> TextSpan:
    """Return one span of a prompt of `size` characters; raises UsageError as `text_spans`."""
    given = span if isinstance(span, dict) else {}
    name, start, stop = given.get("name"), _count(given.get("start")), _count(given.get("stop"))
    if not isinstance(name, str) or not name or start is None or stop is None:
        raise UsageError(f"{place} has not name, start and stop", SPANS_EXAMPLE)
    if not start < stop <= size:
        raise UsageError(f"{place} is {start} to {stop}, of a prompt of {size} characters", SPANS_EXAMPLE)
    return TextSpan(name, start, stop)


def _text(place: str, entry: JsonDict, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = entry.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UsageError(f"{place}: {name} is not a text", f'Write "{name}": "..."')
        return str(value)
    return None


def _depth(place: str, entry: JsonDict) -> float | None:
    value = entry.get("depth")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UsageError(f"{place}: depth is not between 0 and 1", 'Write "depth": 0.5')
    return float(value)


def _classes(place: str, entry: JsonDict) -> tuple[str, ...]:
    value = next((entry[name] for name in CLASSES if entry.get(name) is not None), [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UsageError(f"{place}: the classes are not a list of texts", 'Write "classes": ["location", "number"]')
    return tuple(map(str, value))


def _count(value: Json) -> int | None:
    """Return a number that counts something; None for any other value."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
